"""Both tokenizer formats have one interface and give the ids of `transformers`."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.inference.loaded_model import open_model
from llama_jax.interchange.fast_tokenizer import fast_files
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.transfer import convert
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_formats import MARK, SPACE
from tests.helpers import TINY, llama3_tokenizer, released_json, replace
from tests.interchange.test_transfer import exported

HARD = [
    "",
    " ",
    "Hello, world!  It's   2023, they're 1234567 times\t\tbetter.\n\n\n  def f(x):\n\treturn x\r\n",
    "naïve café ﬁ ½ é e\u0301 日本語 العربية हिन्दी 🦙👩‍👩‍👧‍👦 \u200b\ufeff",
    "   leading and trailing   ",
    "\x00\x01\x7f",
    "DON'T don't I'LL x^2 + y_3 <= 1e-10 http://a.b/c?d=e&f",
    "a" * 300,
]
MARKED = ["<s>", "a</s>", "</s> b", "x<s> y </s>\n<s>z", "<|begin_of_text|>", "<|eot_id|> q"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def llama3(corpus):
    return Tokenizer(llama3_tokenizer(corpus))


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_byte_level_decoding_gives_the_text_back(llama3, text):
    ids = llama3.encode(text)
    assert llama3.decode(ids) == text
    assert "".join(llama3.texts([llama3.bos_id, *ids, llama3.eos_id])) == text


def test_what_a_tokenizer_json_says_of_itself(llama3):
    assert llama3.vocab_size == 404
    assert llama3.piece(llama3.bos_id) == "<|begin_of_text|>"
    assert llama3.piece(llama3.eos_id) == "<|end_of_text|>"
    assert Tokenizer(llama3.model_bytes).fingerprint == llama3.fingerprint


def test_a_character_of_several_tokens_appears_whole(llama3):
    ids = llama3.encode("a🦙b")
    assert len(ids) == 6
    assert llama3.texts(ids) == ["a", "", "", "", "🦙", "b"]
    stream = llama3.stream()
    assert [stream.add(token) for token in ids[:3]] == ["a", "", ""]
    assert stream.end() == "\ufffd" and stream.end() == ""


def test_special_tokens_in_a_text_are_text_unless_asked(llama3, tokenizer):
    for one, name in ((llama3, "<|end_of_text|>"), (tokenizer, "</s>")):
        text = f"a{name}b"
        assert one.eos_id not in one.encode(text) and one.decode(one.encode(text)) == text
        parsed = one.encode(text, special=True)
        assert parsed.count(one.eos_id) == 1
        assert one.decode(parsed) == "ab"


def test_documents_are_from_bos_to_eos(llama3):
    for threads in (1, 2):
        rows = llama3.encode_documents(["abc", ""], threads)
        assert [row.dtype.name for row in rows] == ["int32", "int32"]
        assert rows[0].tolist() == [llama3.bos_id, *llama3.encode("abc"), llama3.eos_id]
        assert rows[1].tolist() == [llama3.bos_id, llama3.eos_id]


def test_shards_and_batches_of_a_tokenizer_json(llama3, corpus, tmp_path):
    from llama_jax.data.prepare.job import prepare
    from llama_jax.data.shards.reader import TokenDataset
    from tests.helpers import replace, text_config

    llama3.save(tmp_path / "tokenizer.json")
    config = text_config(corpus, data__tokenizer=str(tmp_path / "tokenizer.json"))
    config = replace(config, model__vocab_size=llama3.vocab_size)
    prepare(config, tmp_path / "shards", log=lambda line: None)
    data = TokenDataset.open(tmp_path / "shards", "train")
    found = data.tokenizer().decode(data.tokens(0, data.n_tokens))
    assert "# file 0\n" in found and data.tokenizer().fingerprint == llama3.fingerprint


def with_names(corpus, bos, eos):
    found = tokenizers.Tokenizer.from_str(llama3_tokenizer(corpus).decode())
    described = json.loads(found.to_str())
    described["post_processor"] = None
    text = json.dumps(described).replace("<|begin_of_text|>", bos).replace("<|end_of_text|>", eos)
    return text.encode()


def test_bos_and_eos_of_other_names_are_in_the_config_beside_it(corpus, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(with_names(corpus, "<|begins|>", "<|ends|>"))
    with pytest.raises(UserError, match=r"has no BOS or no EOS token.*tokenizer_config.json"):
        Tokenizer.load(path)
    config = {"bos_token": "<|begins|>", "eos_token": {"content": "<|ends|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(path)
    again = Tokenizer(loaded.model_bytes)  # as from a checkpoint, without config
    assert again.piece(again.bos_id) == "<|begins|>" and again.piece(again.eos_id) == "<|ends|>"


def test_a_tokenizer_json_is_kept_as_it_is(llama3, tmp_path):
    llama3.save(tmp_path / "tokenizer.json")
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path / "tokenizer.json").model_bytes == llama3.model_bytes


def described(corpus, pieces=(), added=(), bos=None):
    """Returns a byte-level tokenizer.json with more pieces and added tokens (name, special)."""
    values = json.loads(llama3_tokenizer(corpus))
    vocab = values["model"]["vocab"]
    for piece in pieces:
        vocab[piece] = len(vocab)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    values["added_tokens"] = [
        {"id": len(vocab) + number, "content": name, **flags, "special": special}
        for number, (name, special) in enumerate(added)
    ]
    values["post_processor"] = None
    return values


def ends_of(values, config=None, more=None, folder=None):
    """Returns the names of BOS and EOS that `Tokenizer` finds."""
    for name, content in (("tokenizer_config", config), ("special_tokens_map", more)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    if folder is None:
        found = Tokenizer(json.dumps(values).encode())
    else:
        (folder / "tokenizer.json").write_text(json.dumps(values))
        found = Tokenizer(Tokenizer.load(folder / "tokenizer.json").model_bytes)
    names = {found.piece(found.bos_id), found.piece(found.eos_id)}
    assert names <= set(found.special_names)  # parsed, protected, and not decoded
    assert found.decode([found.bos_id, *found.encode("abc"), found.eos_id]) == "abc"
    return found.piece(found.bos_id), found.piece(found.eos_id)


def test_ends_are_added_tokens_before_ordinary_pieces(corpus):
    """Qwen's vocabulary, for example, has an ordinary piece `<s>`."""
    qwen = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True)]
    pieces = ("<s>", "</s>", "<bos>", "<eos>")
    assert ends_of(described(corpus, pieces, qwen)) == ("<|endoftext|>",) * 2
    gemma = [("<bos>", True), ("<eos>", True)]
    assert ends_of(described(corpus, ("<s>", "</s>"), gemma)) == ("<bos>", "<eos>")
    # Special tokens come before other added ones, whatever the order of names.
    mixed = [("<s>", False), ("<bos>", True), ("<eos>", True), ("</s>", False)]
    assert ends_of(described(corpus, (), mixed)) == ("<bos>", "<eos>")
    plain = [("<s>", False), ("</s>", False)]
    assert ends_of(described(corpus, (), plain)) == ("<s>", "</s>")
    values = described(corpus, ("</s>",), [("<s>", True)])
    with pytest.raises(UserError, match=r"\('</s>' is an ordinary piece, .*tokenizer_config.json"):
        Tokenizer(json.dumps(values).encode())


NAMED = [
    # tokenizer_config.json, special_tokens_map.json, and the names of BOS and EOS.
    ({"bos_token": "<s>", "eos_token": "</s>"}, None, ("<s>", "</s>")),  # though ordinary pieces
    ({"bos_token": None, "eos_token": "<|im_end|>"}, None, ("<|endoftext|>", "<|im_end|>")),
    (
        {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}},
        None,
        ("<|endoftext|>", "<|im_end|>"),
    ),
    ({}, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, ("<s>", "</s>")),
    ({"eos_token": "</s>"}, {"eos_token": "<|im_end|>"}, ("<|endoftext|>", "<|im_end|>")),
    (
        {"eos_token": "</s>", "added_tokens_decoder": {}},
        {"eos_token": "<|im_end|>"},
        ("<|endoftext|>", "</s>"),
    ),
    ({"tokenizer_class": "x"}, None, ("<|endoftext|>", "<|endoftext|>")),
]


@pytest.mark.parametrize(("config", "more", "expected"), NAMED)
def test_ends_are_those_that_the_config_names(corpus, tmp_path, config, more, expected):
    values = described(corpus, ("<s>", "</s>"), [("<|endoftext|>", True), ("<|im_end|>", False)])
    assert ends_of(values, config, more, tmp_path) == expected


@pytest.mark.parity
@pytest.mark.parametrize(("config", "more", "expected"), NAMED[:-1])
def test_transformers_finds_the_same_ends(corpus, tmp_path, config, more, expected):
    import transformers

    values = described(corpus, ("<s>", "</s>"), [("<|endoftext|>", True), ("<|im_end|>", False)])
    ends_of(values, config, more, tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.bos_token_id in (ours.bos_id, None)  # our documents need a BOS


def test_documents_of_a_tokenizer_without_bos_begin_with_eos(corpus, tmp_path):
    values = described(corpus, (), [("<|stop|>", True)])
    config = {"bos_token": None, "eos_token": "<|stop|>"}
    assert ends_of(values, config, None, tmp_path) == ("<|stop|>", "<|stop|>")


def test_tokens_that_only_the_config_lists(corpus, tmp_path):
    values = described(corpus, (), [("<s>", True), ("</s>", True), ("[A]", False)])
    size = len(values["model"]["vocab"]) + 3
    new = {"content": "<|im_end|>", "special": True, "normalized": False}
    marked = {"content": "[A]", "special": True, "normalized": False}
    config = {"added_tokens_decoder": {str(size): new, str(size - 1): marked}}
    assert ends_of(values, {**config, "eos_token": "<|im_end|>"}, None, tmp_path) == (
        "<s>",
        "<|im_end|>",
    )
    found = Tokenizer.load(tmp_path / "tokenizer.json")
    assert found.eos_id == size and found.vocab_size == size + 1
    assert {"<|im_end|>", "[A]"} <= set(found.special_names)
    config["added_tokens_decoder"][str(size + 7)] = {**new, "content": "<|far|>"}
    with pytest.raises(UserError, match="has another id for '<|far|>' than tokenizer_config.json"):
        ends_of(values, config, None, tmp_path)


BAD_CONFIGS = [
    ({"eos_token": "<none>"}, "has no token '<none>', which tokenizer_config.json names"),
    ({"eos_token": 3}, "eos_token=3 is not a token"),
    ({"bos_token": ["<s>"]}, "bos_token=.* is not a token"),
    ({"bos_token": {"content": {}}}, "is not a token"),
    ({"added_tokens_decoder": [1]}, "malformed"),
    ({"added_tokens_decoder": {"x": {"content": "a"}}}, "malformed"),
    ({"added_tokens_decoder": {"1": {}}}, "does not have 'content'"),
    ({"added_tokens_decoder": {"1": "a"}}, "malformed"),
    ({"added_tokens_decoder": {"9999": {"content": 5}}}, "tokenizer.json"),
    ([], "JSON"),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_configs_that_are_wrong(llama3, tmp_path, config, message):
    (tmp_path / "tokenizer.json").write_bytes(llama3.model_bytes)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0"}'])
def test_json_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer.json: ") as caught:
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_a_config_beside_it_that_is_broken(llama3, tmp_path):
    llama3.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer_config.json, is not JSON"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parity
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", HARD + MARKED)
def test_the_ids_of_transformers_byte_level(llama3, tmp_path, text, special):
    import transformers

    llama3.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    expected = theirs.encode(text, add_special_tokens=False, split_special_tokens=not special)
    assert llama3.encode(text, special=special) == expected
    assert [llama3.bos_id, *llama3.encode(text)] == theirs.encode(text, split_special_tokens=True)
    assert llama3.decode(expected) == theirs.decode(expected, skip_special_tokens=True)


def as_released(model):
    """Returns the tokenizer.json with LLaMA's released rule: a space before every text.

    The file that transformers 5 makes of a `.model` adds no space to a text that begins with
    one, so that decoding loses it. SentencePiece, and so Meta's code, follows the released rule.
    """
    normalizers = tokenizers.normalizers
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    described = json.loads(model.to_str())
    described["pre_tokenizer"] = None
    return json.dumps(described)


@pytest.mark.parity
@pytest.mark.parametrize("text", HARD + MARKED)
def test_the_ids_of_transformers_sentencepiece(tokenizer, tmp_path, text):
    import transformers

    tokenizer.save(tmp_path / "tokenizer.model")
    made = transformers.LlamaTokenizer.from_pretrained(str(tmp_path), legacy=False)
    (tmp_path / "tokenizer.json").write_text(as_released(made.backend_tokenizer))
    released = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    expected = released.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.encode(text) == expected
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(text) == expected
    assert tokenizer.decode(expected) == released.decode(expected) == text
    if not text.startswith(" "):
        made = transformers.LlamaTokenizer.from_pretrained(str(tmp_path), legacy=False)
        for special in (False, True):
            assert tokenizer.encode(text, special=special) == made.encode(
                text, add_special_tokens=False, split_special_tokens=not special
            )


def test_imported_weights_write_with_their_tokenizer_json_and_give_it_back(corpus, tmp_path):
    model = with_names(corpus, "<|begins|>", "<|ends|>")
    ends = json.dumps({"bos_token": "<|begins|>", "eos_token": "<|ends|>"}).encode()
    files = {"tokenizer.json": model, "tokenizer_config.json": ends}
    config = replace(TINY, model__vocab_size=Tokenizer(llama3_tokenizer(corpus)).vocab_size)
    exported(tmp_path / "hf", config, files=files)
    convert(open_source("hf", tmp_path / "hf"), "ckpt", tmp_path / "run")
    model_of = open_model(tmp_path / "run")
    tokenizer = model_of.tokenizer
    assert tokenizer.piece(tokenizer.bos_id) == "<|begins|>"
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"
    convert(open_source("ckpt", tmp_path / "run"), "hf", tmp_path / "again", "")
    assert json.loads((tmp_path / "again" / "tokenizer.json").read_text()) == json.loads(model)


@pytest.mark.parametrize("text", [*HARD, *MARKED, "  <s>  [INST] x</s>  y"])
def test_the_exported_json_gives_the_ids_of_the_model(tokenizer, text):
    """Spaces after special tokens agree as well, so that templates give the same ids."""
    exported = Tokenizer(fast_files(tokenizer)["tokenizer.json"])
    for special in (False, True):
        ids = tokenizer.encode(text, special=special)
        assert exported.encode(text, special=special) == ids
        assert exported.decode(ids) == tokenizer.decode(ids)
    assert exported.gap == tokenizer.gap


def with_trimming(tokenizer):
    """Adds the post-processor of the released LLaMA-3, which trims spaces from token offsets."""
    described = json.loads(tokenizer.model_bytes)
    trim = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    processors = [trim, described["post_processor"]]
    described["post_processor"] = {"type": "Sequence", "processors": processors}
    return Tokenizer(json.dumps(described).encode())


KINDS = ["sentencepiece", "released", "exported", "byte level", "trimming"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_knows_its_letters(kind, llama3, tokenizer):
    if kind == "sentencepiece":
        found = tokenizer
    elif kind == "released":
        found = Tokenizer(released_json(tokenizer))
    elif kind == "exported":
        found = Tokenizer(fast_files(tokenizer)["tokenizer.json"])
    else:
        found = llama3 if kind == "byte level" else with_trimming(llama3)
    bos = found.piece(found.bos_id)
    for text in [*HARD, *MARKED, "日 🦙🦙 é  x\n\n y", f"{bos} a {bos}b"]:
        for whole in (text, found.protected(text), f"{bos}{found.protected(text)}{bos}"):
            ids, spans = found.encode_spans(whole)
            assert ids == found.encode(whole, special=True)
            assert spans == sorted(spans)
            covered = {at for start, stop in spans for at in range(start, stop)}
            assert {at for at, letter in enumerate(whole) if letter != MARK} <= covered
            for token, (start, stop) in zip(ids, spans, strict=True):
                letters = whole[start:stop].replace(MARK, "")
                if (name := found.piece(token)) in found.special_names:
                    assert letters == name
                elif letters.isascii() and start < stop and name != SPACE:
                    assert found.texts([token])[0].strip(" ") == letters.strip(" ")


def test_a_vocabulary_that_lacks_a_text(corpus):
    """The library refuses an unknown word if the vocabulary has no token for unknown words."""
    values = described(corpus, (), [("<s>", True), ("</s>", True)])
    values["model"] = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "<unk>"}
    values["pre_tokenizer"] = {"type": "Whitespace"}
    for number, token in enumerate(values["added_tokens"]):
        token["id"] = 2 + number
    found = Tokenizer(json.dumps(values).encode())
    assert found.encode("a b") == [0, 1]
    for read in (
        lambda: found.encode("a c"),
        lambda: found.encode("a c", special=True),
        lambda: found.encode(found.protected("c </s>"), special=True),
        lambda: found.encode_documents(["a c"], 1),
        lambda: found.encode_documents(["a c"], 2),
    ):
        with pytest.raises(UserError, match="the tokenizer cannot read a text: ") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_piece_of_letters_that_byte_level_does_not_have(corpus):
    """The piece decodes to its own text, as in the library."""
    values = described(corpus, ("\u65e5 x",), [("<s>", True), ("</s>", True)])
    found = Tokenizer(json.dumps(values).encode())
    token = values["model"]["vocab"]["\u65e5 x"]
    raw = tokenizers.Tokenizer.from_str(json.dumps(values))
    assert found.texts([token]) == [raw.decode([token])] == ["\u65e5 x"]
