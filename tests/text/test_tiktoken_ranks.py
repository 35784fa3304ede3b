"""Llama 3's tokenizer.model gives the ids of tiktoken, and survives every conversion."""

import dataclasses
import json
import random
import shutil

import pytest
from etils import epath

from llama_jax.errors import UserError
from llama_jax.inference.loaded_model import open_model
from llama_jax.interchange.opening import open_source, tokenizer_file
from llama_jax.interchange.transfer import convert
from llama_jax.text.tiktoken_ranks import LLAMA3, LLAMA31, is_tiktoken, tokenizer_json
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_files import open_tokenizer
from tests.helpers import ROOT, TINY, random_params, replace, text_config
from tests.interchange.test_transfer import Memory, exported
from tests.reference.llama3_ranks import file_of, merged, ranks_of
from tests.text.test_tokenizer_formats import HARD, MARKED

# Texts, cut into words by hand.
CUT = [
    ["Hello", ",", " world", "!", "  ", " It", "'s", " they", "'LL"],
    ["def", " f", "(x", "):\n", "   ", " return", " x", "\r\n\r\n", "\ty", " "],
    ["123", "456", "7", " ", "89", ".", "5", " naïve", " 日本語", " 🦙🦙", "!?\n\n", "  "],
    [" file", " ", "3", "\n", "abc", " de", " ===", "\n\n", " x", "   "],
    ["<|", "eot", "_id", "|>", " <", "s", ">"],
]


@pytest.fixture(scope="module")
def ranks(corpus):
    return ranks_of(corpus)


@pytest.fixture(scope="module")
def content(ranks):
    return file_of(ranks)


@pytest.mark.parametrize("words", CUT)
def test_ids_by_hand(ranks, content, words):
    tokenizer = Tokenizer(content)
    expected = [token for word in words for token in merged(ranks, word)]
    assert tokenizer.encode("".join(words)) == expected
    assert tokenizer.decode(expected) == "".join(words)
    assert len(expected) <= len("".join(words).encode())


@pytest.mark.parametrize("count", [256, 257, 420])
def test_special_ids_follow_the_ranks(corpus, count):
    content = file_of(ranks_of(corpus, count))
    tokenizer = Tokenizer(content)
    assert tokenizer.model_bytes == content and tokenizer.vocab_size == count + 256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (count, count + 1)
    assert tokenizer.encode_text("a")[0] == count and len(tokenizer.special_names) == 256
    # In the published model, these are 128004, 128005, 128006 and so on.
    names = {4: "finetune_right_pad_id", 5: "reserved_special_token_2", 6: "start_header_id"}
    names |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    names |= {2: "reserved_special_token_0", 11: "reserved_special_token_3"}
    names[255] = "reserved_special_token_247"
    for place, name in names.items():
        assert tokenizer.encode(f"a<|{name}|>", special=True)[-1] == count + place, name


def test_the_names_of_the_first_llama_3(content, ranks):
    tokenizer = Tokenizer(tokenizer_json(content, "x", LLAMA3))
    names = {0: "begin_of_text", 1: "end_of_text", 5: "reserved_special_token_3", 9: "eot_id"}
    names |= {6: "start_header_id", 7: "end_header_id", 8: "reserved_special_token_4"}
    names |= {10: "reserved_special_token_5", 255: "reserved_special_token_250"}
    for place, name in names.items():
        assert tokenizer.encode(f"<|{name}|>", special=True) == [len(ranks) + place], name
    assert len(set(LLAMA3)) == len(set(LLAMA31)) == 256


def lines_of(content):
    return content.splitlines(keepends=True)


DAMAGE = {
    "base64": (lambda c: c.replace(lines_of(c)[3], b"!!!! 3\n"), "line 4 is not a token in base64"),
    "padding": (lambda c: c.replace(lines_of(c)[3], b"YQ 3\n"), "line 4 is not a token in base64"),
    "first": (lambda c: b"@@@@ 0\n" + c, "line 1 is not a token in base64"),
    "no rank": (lambda c: c + b"YWJjZGVm\n", "line 421 is not a token in base64 and its rank"),
    "words": (lambda c: c + b"YWJj ZGVm 3\n", "line 421 is not a token"),
    "negative": (lambda c: c + b"YWJjZGVm -1\n", "line 421 is not a token"),
    "gap": (lambda c: c + b"YWJjZGVm 421\n", "the ranks of its 421 tokens are not consecutive"),
    "same rank": (lambda c: c + b"YWJjZGVm 7\n", "ranks of its 421 tokens are not consecutive"),
    "same token": (lambda c: c + lines_of(c)[0], "line 421 repeats an earlier token"),
    "cut off": (
        lambda c: file_of({bytes([n]): n for n in range(200)}),
        "has no token for the byte 0xC8; is it truncated",
    ),
    "binary": (lambda c: c + b"\xff\xfe\x00", "line 421 is not a token"),
    "pointer": (
        lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n",
        "is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_in_one_line(content, tmp_path, kind):
    damage, message = DAMAGE[kind]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage(content))
    with pytest.raises(UserError) as caught:
        Tokenizer.load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "tokenizer.model" in str(caught.value)


def test_what_tiktoken_reads_as_well(content, tokenizer):
    plain = Tokenizer(content)
    lines = lines_of(content)
    shuffled = b"".join(random.Random(0).sample(lines, len(lines)))
    windows = content.replace(b"\n", b"\r\n")
    for other in (windows, content + b"\n\n", content.rstrip(), b"\n" + content, shuffled):
        assert Tokenizer(other).encode("def f(x): 日") == plain.encode("def f(x): 日")
    assert is_tiktoken(content) and not is_tiktoken(tokenizer.model_bytes)
    assert not is_tiktoken(b"") and not is_tiktoken(b"not a model")


def test_mistrals_tekken_is_named(tmp_path, capsys):
    tekken = {"config": {"pattern": "x"}, "vocab": [{"rank": 0, "token_bytes": "AA=="}]}
    folder = exported(tmp_path / "hf", TINY)
    (folder / "tekken.json").write_text(json.dumps(tekken))
    with pytest.raises(UserError, match="is a tekken file of Mistral's; use the tokenizer.json"):
        open_tokenizer(tokenizer_file(f"hf:{folder}"))
    convert(open_source("hf", folder), "ckpt", tmp_path / "run")
    assert "note  " in (said := capsys.readouterr().out) and "tekken.json is not read" in said


def test_shards_are_made_with_it(content, corpus, tmp_path):
    from llama_jax.data.prepare.job import prepare
    from llama_jax.data.shards.reader import TokenDataset

    (tmp_path / "tokenizer.model").write_bytes(content)
    config = text_config(corpus, data__tokenizer=str(tmp_path / "tokenizer.model"))
    config = replace(config, model__vocab_size=Tokenizer(content).vocab_size)
    prepare(config, tmp_path / "shards", log=lambda line: None)
    data = TokenDataset.open(tmp_path / "shards", "train")
    assert data.tokenizer().model_bytes == content
    assert "# file 0\n" in data.tokenizer().decode(data.tokens(0, data.n_tokens))


# Conversions.


def test_a_hugging_face_folder_that_has_nothing_else(content, tmp_path):
    """The file may also be `original/tokenizer.model`, as in Meta's repositories."""
    size = Tokenizer(content).vocab_size
    config = replace(TINY, model__vocab_size=size, train__seq_len=64)
    exported(tmp_path / "hf", config)
    for name in ("tokenizer.model", "original/tokenizer.model"):
        place = tmp_path / "hf" / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)
        assert tokenizer_file(f"hf:{tmp_path}/hf") == str(place)
        target = tmp_path / name.replace("/", "-")
        convert(open_source("hf", tmp_path / "hf"), "ckpt", target)
        place.unlink()
        model = open_model(target)
        assert model.tokenizer.model_bytes == content and model.eos_ids == (size - 255,)
        assert (target / "tokenizer.model").read_bytes() == content
        again = tmp_path / f"{target.name}-again"
        convert(open_source("ckpt", target), "hf", again)
        assert (again / "original" / "tokenizer.model").read_bytes() == content
        assert not (again / "tokenizer.model").exists()  # others read it as SentencePiece
        config_json = json.loads((again / "config.json").read_text())
        assert (config_json["bos_token_id"], config_json["eos_token_id"]) == (
            size - 256,
            size - 255,
        )
        read = Tokenizer.load(again / "tokenizer.json")
        assert read.encode_text("def f(x): 日") == model.encode("def f(x): 日")
        assert open_source("hf", again).description.files["tokenizer.model"] == content


def test_names_of_the_config_beside_it(content, tmp_path):
    """The config of an instruct model names `<|eot_id|>`, which ends turns, as EOS."""
    size = Tokenizer(content).vocab_size
    names = json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}).encode()
    config = replace(TINY, model__vocab_size=size)
    files = {"tokenizer.model": content, "tokenizer_config.json": names}
    convert(Memory(config, random_params(config.model), files=files), "ckpt", tmp_path / "run")
    model = open_model(tmp_path / "run")
    assert model.eos_ids == (model.tokenizer.eos_id,) == (size - 256 + 9,)
    assert open_source("ckpt", tmp_path / "run").description.files["tokenizer.model"] == content
    assert model.encode("abc") == Tokenizer(content).encode_text("abc")


def test_checkpoints_from_before_have_it_beside_them(content, tmp_path):
    from llama_jax.checkpoint import saved_step

    size = Tokenizer(content).vocab_size
    config = replace(TINY, model__vocab_size=size)
    convert(Memory(config, random_params(config.model)), "ckpt", tmp_path / "run")
    folder = epath.Path(tmp_path / "run" / "checkpoints" / "0")
    meta = saved_step.load_meta(folder)
    old = {"tokenizer.model": content}
    shutil.rmtree(folder / "meta")
    shutil.rmtree(folder / "tokenizer")
    saved_step.save_meta(folder, dataclasses.replace(meta, tokenizer_files=old))
    from llama_jax.checkpoint import manifest

    manifest.write(folder)
    assert open_model(tmp_path / "run").tokenizer.bos_id == size - 256


def test_damage_in_a_folder(content, tmp_path):
    config = replace(TINY, model__vocab_size=Tokenizer(content).vocab_size)
    exported(tmp_path / "hf", config)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(content + b"YWJj ?\n")
    with pytest.raises(UserError, match=r"hf/tokenizer.model: line 421 is not a token in base64"):
        open_source("hf", tmp_path / "hf")


# Against tiktoken, and through Meta's folders.


def reference(ranks, names=LLAMA31):
    import tiktoken

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    special = {name: len(ranks) + place for place, name in enumerate(names)}
    return tiktoken.Encoding("x", pat_str=words, mergeable_ranks=ranks, special_tokens=special)


ODD = [
    "\x1c\x1d\x1e\x1f\x85",
    "\u180e\u200b\u2028\u3000\xa0",
    "ſ 'ſ İı ǅ",
    "e\u0345\u0301",
    "''s''S",
]
ODD += [" \n \n", "\r \r\n", "  a  b   c\t\td", "x" * 3000, "0" * 50, "\u0660\u0661\u00bd\u2167"]
LETTERS = [
    *"aerst \n\t_'12()",
    "  ",
    "é",
    "日",
    "🦙",
    "\r\n",
    "'ll",
    "<|eot_id|>",
    "\x1f",
    "\u200d",
]


@pytest.mark.parity
def test_the_ids_of_tiktoken(ranks, content):

    theirs, ours = reference(ranks), Tokenizer(content)
    rng = random.Random(0)
    texts = [*HARD, *MARKED, *ODD]
    texts += ["".join(rng.choices(LETTERS, k=rng.randint(1, 60))) for _ in range(2000)]
    sources = sorted(ROOT.glob("**/*.py"))
    texts += [path.read_text() for path in sources[:200]]
    for text in texts:
        expected = theirs.encode(text, disallowed_special=())
        assert ours.encode(text) == expected, text[:80]
        assert ours.decode(expected) == text
        assert ours.encode(text, special=True) == theirs.encode(text, allowed_special="all")
    assert len(texts) > 2100


@pytest.mark.parity
def test_ranks_that_no_merges_made():
    """Random tokens of the characters a and b; some are no two other tokens joined."""
    rng = random.Random(1)
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 400:
        ranks.setdefault(bytes(rng.choices(b"ab", k=rng.randint(2, 9))), len(ranks))
    theirs, ours = reference(ranks), Tokenizer(file_of(ranks))
    for _ in range(5000):
        text = "".join(rng.choices("ab", k=rng.randint(1, 40)))
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.parity
@pytest.mark.parametrize(("scaled", "names"), [(False, LLAMA3), (True, LLAMA31)])
@pytest.mark.parametrize("above", [False, True])
def test_metas_folder(tmp_path, corpus, scaled, names, above):
    """Conversion to our format and back keeps the bytes; transformers gives the same ids."""
    import transformers

    from tests.interchange.test_transfer_parity import load_quietly

    ranks = ranks_of(corpus, 300)
    content, size = file_of(ranks), 300 + 256
    config = replace(TINY, model__vocab_size=size, model__rope_theta=5e5)
    if scaled:
        config = replace(config, model__rope_scaling_factor=8.0, model__rope_original_context=8)
    convert(Memory(config, random_params(config.model)), "meta", tmp_path / "llama" / "8b")
    place = tmp_path / "llama" if above else tmp_path / "llama" / "8b"
    (place / "tokenizer.model").write_bytes(content)
    convert(open_source("meta", tmp_path / "llama" / "8b"), "ckpt", tmp_path / "run")
    model = open_model(tmp_path / "run")
    assert model.eos_ids == (301,) and model.encode("a")[0] == 300
    theirs = reference(ranks, names)
    text = "def f(x): 日" + "".join(names)
    expected = theirs.encode(text, allowed_special="all")
    assert model.tokenizer.encode(text, special=True) == expected
    convert(open_source("ckpt", tmp_path / "run"), "meta", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == content
    convert(open_source("meta", tmp_path / "llama" / "8b"), "hf", tmp_path / "hf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded(text)["input_ids"] == [300, *expected]
    assert (loaded.bos_token_id, loaded.eos_token_id) == (300, 301)
    assert load_quietly(tmp_path / "hf").generation_config.eos_token_id == 301


@pytest.mark.parity
def test_a_tokenizer_json_survives_metas_format(tmp_path, corpus):
    from tests.helpers import llama3_tokenizer
    from tests.inference.test_chat import chat_files

    tokenizer = Tokenizer(llama3_tokenizer(corpus))
    config = replace(TINY, model__vocab_size=tokenizer.vocab_size)
    files = chat_files(tokenizer)
    exported(tmp_path / "hf", config, files=files)
    convert(open_source("hf", tmp_path / "hf"), "meta", tmp_path / "meta")
    assert tokenizer_file(f"meta:{tmp_path}/meta") == f"{tmp_path}/meta/tokenizer.json"
    convert(open_source("meta", tmp_path / "meta"), "ckpt", tmp_path / "run")
    model = open_model(tmp_path / "run")
    assert model.tokenizer.model_bytes == tokenizer.model_bytes
    assert list(model.eos_ids) == json.loads(files["generation_config.json"])["eos_token_id"]
    convert(open_source("ckpt", tmp_path / "run"), "hf", tmp_path / "again")
    for name, kept in files.items():
        assert (tmp_path / "again" / name).read_bytes() == kept
