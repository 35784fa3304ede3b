"""In a folder with several tokenizers, the one with the most ids that fit the model is used."""

import json

import pytest
import sentencepiece
import tokenizers
from etils import epath

from llama_jax.checkpoint.saved_step import find_step, load_meta
from llama_jax.data.prepare.job import prepare
from llama_jax.errors import UserError
from llama_jax.inference.chat import open_template
from llama_jax.inference.loaded_model import open_model
from llama_jax.interchange.hf import HfSource
from llama_jax.interchange.opening import open_source, tokenizer_file
from llama_jax.interchange.transfer import convert
from llama_jax.text import tokenizer_files
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_files import open_tokenizer
from llama_jax.train.start import with_tokenizer
from tests.data.sources.test_conversations import quiet
from tests.helpers import TINY, random_params, released_json, replace, save_checkpoint, text_config
from tests.reference.chat_templates import said
from tests.text.test_answer_ends import CHATML, with_names
from tests.text.test_templates import own

NAMES = ("<|im_start|>", "<|im_end|>")
ADDED = json.dumps({"<s>": 1, "</s>": 2, NAMES[1]: 301, NAMES[0]: 300}).encode()
TEXTS = ["abc  def", " é ☃", "a<|im_end|>b", "ghi\n\nfed<s>", ""]


def decoder_of(special):
    """Returns a tokenizer_config.json that lists the added tokens, as in newer folders."""
    listed = {"300": NAMES[0], "301": NAMES[1], "2": "</s>"}
    values = {number: {"content": name, "special": special} for number, name in listed.items()}
    found = {"added_tokens_decoder": values, "chat_template": CHATML}
    return json.dumps({**found, "tokenizer_class": "LlamaTokenizer"}).encode()


@pytest.fixture(scope="module")
def two_more(tokenizer):
    """Returns a tokenizer.json with two tokens more than the SentencePiece model."""
    return with_names(released_json(tokenizer), *NAMES)


def chosen(files, rows):
    found = tokenizer_files.choose(files, rows, "there")
    return None if found is None else (found.file, found.size, found.plain)


def test_which_of_several(tokenizer, two_more):
    model = tokenizer.model_bytes
    both = {"tokenizer.model": model, "tokenizer.json": two_more}
    assert chosen(both, 302) == chosen(both, 320) == ("tokenizer.json", 302, True)
    assert chosen(both, 301) == chosen(both, 300) == ("tokenizer.model", 300, True)
    same = {"tokenizer.json": released_json(tokenizer), "tokenizer.model": model}
    assert chosen(same, 302) == ("tokenizer.model", 300, True)
    added = {"tokenizer.model": model, "added_tokens.json": ADDED}
    assert chosen(added, 302) == chosen(added, None) == ("tokenizer.model", 302, False)
    assert chosen(added, 301) == ("tokenizer.model", 300, True)
    assert chosen({**added, "tokenizer.json": two_more}, 302) == ("tokenizer.json", 302, True)
    listed = {"tokenizer.model": model, "tokenizer_config.json": decoder_of(True)}
    assert chosen(listed, 302) == ("tokenizer.model", 302, False)
    assert chosen({}, 300) is None and chosen({"tokenizer_config.json": b"{}"}, 3) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"json"},
            "there/tokenizer.json has 302 ids, but the model's vocabulary is 299: '.*', "
            r"'<\|im_start\|>', '<\|im_end\|>' have no rows; add rows .*embeddings\(302\)",
        ),
        ({"json", "model"}, "there/tokenizer.model has 300 ids, but the model's vocabulary is 299"),
        ({"model"}, "there/tokenizer.model has 300 ids"),
    ],
)
def test_more_ids_than_rows(files, message, tokenizer, two_more):
    every = {"tokenizer.json": two_more, "tokenizer.model": tokenizer.model_bytes}
    some = {name: content for name, content in every.items() if name.split(".")[1] in files}
    with pytest.raises(UserError, match=message) as caught:
        tokenizer_files.choose(some, 299, "there")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b'{"a": "b"}',
        b'{"a": true}',
        b'{"a": -1}',
        b'{"a": 300, "b": 300}',
        b'{"": 300}',
        b'{"a": 4e9}',
        b'{"<a>": 1000000000}',
        b"{",
    ],
)
def test_added_tokens_that_are_none(content, tokenizer):
    files = {"tokenizer.model": tokenizer.model_bytes, "added_tokens.json": content}
    with pytest.raises(UserError, match="there"):
        tokenizer_files.choose(files, 302, "there")


def test_gaps_and_names_that_are_taken(tokenizer):
    model = tokenizer.model_bytes
    gap = {"tokenizer.model": model, "added_tokens.json": b'{"<pad>": 303}'}
    made = tokenizer_files.choose(gap, 304, "there")
    assert made.size == 304 and made.names(300)[3] == "<pad>"
    found = Tokenizer(made.content)
    assert found.encode("a<unused_300>b", special=True) == [
        *found.encode("a<unused_300>b")
    ]  # the name of an unused id is plain text
    taken = {"tokenizer.model": model, "added_tokens.json": b'{"<s>": 300}'}
    assert chosen(taken, 304) == ("tokenizer.model", 300, True)


@pytest.mark.parametrize("special", [True, False])
def test_a_model_with_added_tokens_encodes_as_it_did(special, tokenizer):
    """SentencePiece's ids for text; names that are not special follow the tokenizers library."""
    files = {"tokenizer.model": tokenizer.model_bytes, "tokenizer_config.json": decoder_of(special)}
    made = Tokenizer(tokenizer_files.choose(files, 302, "there").content)
    plain = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    for text in TEXTS:
        if special or NAMES[1] not in text:
            assert made.encode(text) == plain.encode(text)
    assert made.encode("a<|im_end|>b", special=True)[1:-1] == [301] or special is False
    assert 301 in made.encode("a<|im_end|>b", special=True)
    assert (301 in made.encode("a<|im_end|>b")) is not special
    assert made.decode([*plain.encode("abc"), 301]) == ("abc" if special else "abc<|im_end|>")
    assert (made.bos_id, made.eos_id) == (1, 2)


@pytest.fixture(scope="module")
def folders(tokenizer, two_more, tmp_path_factory):
    """Returns a folder of Hugging Face models of 304 rows that add two tokens in three ways."""
    folder = tmp_path_factory.mktemp("folders")
    config = replace(TINY, model__vocab_size=304, train__seq_len=64)
    params = random_params(config.model)
    ways = {
        "json": {"tokenizer.json": two_more},
        "added": {"added_tokens.json": ADDED},
        "config": {"tokenizer_config.json": decoder_of(True)},
    }
    save_checkpoint(folder / "ckpt", config, params, tokenizer.model_bytes)
    for way, files in ways.items():
        convert(open_source("ckpt", epath.Path(folder / "ckpt")), "hf", folder / way)
        for path in (folder / way).iterdir():
            if path.name.startswith(("tokenizer", "special_tokens")):
                path.unlink()
        for name, content in {"tokenizer.model": tokenizer.model_bytes, **files}.items():
            (folder / way / name).write_bytes(content)
        if way != "config":
            kind = "PreTrainedTokenizerFast" if way == "json" else "LlamaTokenizer"
            template = {"chat_template": CHATML, "tokenizer_class": kind}
            (folder / way / "tokenizer_config.json").write_text(json.dumps(template))
    return folder


@pytest.mark.parametrize("way", ["json", "added", "config"])
def test_the_added_tokens_are_kept_everywhere(way, folders, corpus, tmp_path):
    """`convert` (both ways), `init_from`, `data.tokenizer` and chat keep them."""
    source = HfSource(folders / way)
    convert(source, "ckpt", tmp_path / "ckpt")
    meta = load_meta(find_step(tmp_path / "ckpt"))
    kept = Tokenizer(meta.tokenizer_model)
    assert kept.vocab_size == 302 and [kept.piece(n) for n in (300, 301)] == list(NAMES)
    model = open_model(tmp_path / "ckpt", "fsdp=1")
    ids = open_template(model).encode(said("abc"))
    assert ids[0] == 300 and ids.count(301) == 1 and ids.count(300) == 2
    convert(open_source("ckpt", epath.Path(tmp_path / "ckpt")), "hf", tmp_path / "hf")
    for path in (folders / way).iterdir():
        if "token" in path.name:
            assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name
    config = text_config(corpus, init_from=f"hf:{folders / way}", model__vocab_size=304)
    begun = with_tokenizer(config, epath.Path(tmp_path))
    assert begun.data.tokenizer == tokenizer_file(f"hf:{folders / way}")
    assert open_tokenizer(begun.data.tokenizer).same_ids(kept)
    report = prepare(replace(begun, init_from=""), tmp_path / "shards", log=quiet)[0]
    assert report.splits["train"]["tokens"]
    assert Tokenizer.load(tmp_path / "shards" / "tokenizer.model").vocab_size == 302


def test_the_ids_are_those_of_the_tokenizers_library(folders, two_more):
    """A rendered chat gets the ids that the library gives with the same tokenizer.json."""
    whole = tokenizers.Tokenizer.from_str(two_more.decode())
    text = "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n"
    expected = whole.encode(text, add_special_tokens=False).ids
    assert open_tokenizer(folders / "json").encode(text, special=True) == expected


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.model and no tokenizer.json"):
        open_tokenizer(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("way", ["json", "added", "config"])
def test_the_ids_are_those_of_transformers(way, folders):
    """Plain text and a chat get the ids that transformers gives with the same folder."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folders / way)
    ours = open_tokenizer(tokenizer_file(f"hf:{folders / way}"))
    assert len(theirs) == ours.vocab_size == 302
    for text in ("abc  def", "ghi\n\nfed", "jab é"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    chat = said("abc def", "ghi", "jab")
    expected = theirs.apply_chat_template(chat, chat_template=CHATML, add_generation_prompt=True)
    template = own(CHATML, ours)
    assert template.encode(chat) == expected["input_ids"]


def test_a_token_with_two_ids(tokenizer):
    listed = json.dumps({"added_tokens_decoder": {"301": {"content": "<a>"}}}).encode()
    files = {"tokenizer.model": tokenizer.model_bytes, "added_tokens.json": b'{"<a>": 300}'}
    with pytest.raises(UserError, match="there/tokenizer_config.json is malformed: '<a>' has two"):
        tokenizer_files.choose({**files, "tokenizer_config.json": listed}, 302, "there")
