"""generate, evaluate and the harness put BOS before a text exactly where transformers does."""

import json

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.inference.loaded_model import open_model
from llama_jax.inference.perplexity import evaluate, read_texts, text_document
from llama_jax.interchange.fast_tokenizer import fast_files
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.transfer import convert
from llama_jax.text.tokenizer import Tokenizer
from tests.helpers import (
    TINY,
    llama3_tokenizer,
    random_params,
    replace,
    run_command,
)
from tests.interchange.test_transfer import exported

TEXT = "abc def ghi"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def template(ids, before=(), after=()):
    """Returns a post-processor that puts tokens around a text."""
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in before]
    single.append({"Sequence": {"id": "A", "type_id": 0}})
    single += [{"SpecialToken": {"id": name, "type_id": 0}} for name in after]
    tokens = {
        name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (*before, *after)
    }
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def processors(ids):
    """Returns post-processors by kind, and whether each puts BOS before a text."""
    bos, eos = ids
    cls, sep = [[name, ids[name]] for name in (bos, eos)]
    return {
        "none": (None, False),
        "empty": (template(ids), False),
        "bytes": (BYTES, False),
        "bos": (template(ids, [bos]), True),
        "bos and eos": (template(ids, [bos], [eos]), True),
        "eos": (template(ids, [], [eos]), False),
        "sequence": ({"type": "Sequence", "processors": [BYTES, template(ids, [bos])]}, True),
        "bert": ({"type": "BertProcessing", "sep": sep, "cls": cls}, True),
    }


KINDS = list(processors({"a": 0, "b": 1}))


def byte_level(corpus, kind):
    described = json.loads(llama3_tokenizer(corpus))
    ids = {token["content"]: token["id"] for token in described["added_tokens"]}
    described["post_processor"], adds = processors({BOS: ids[BOS], EOS: ids[EOS]})[kind]
    return json.dumps(described).encode(), adds


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_json_says_it_by_its_post_processor(corpus, kind):
    content, adds = byte_level(corpus, kind)
    found = Tokenizer(content)
    ids = found.encode(TEXT)
    assert found.piece(found.bos_id) == BOS and found.piece(found.eos_id) == EOS
    assert found.encode_text(TEXT) == ([found.bos_id] if adds else []) + ids
    assert text_document(TEXT, found).tokens == found.encode_text(TEXT)
    # Training documents have both tokens in any case.
    (row,) = found.encode_documents([TEXT])
    assert row.tolist() == [found.bos_id, *ids, found.eos_id]


@pytest.mark.parametrize("kind", ["bos", "none"])
def test_a_bos_that_is_written_is_not_put_there_again(corpus, tokenizer, kind):
    for found in (Tokenizer(byte_level(corpus, kind)[0]), tokenizer):
        bos, adds = found.piece(found.bos_id), bool(found.prefix)
        once = [found.bos_id, *found.encode(f"{bos}{TEXT}", special=True)[1:]]
        assert found.encode_text(f"{bos}{TEXT}", special=True) == once
        # Without `special`, the name of BOS is plain text.
        assert found.encode_text(f"{bos}{TEXT}").count(found.bos_id) == adds
        assert found.encode_text(bos, special=True) == [found.bos_id]
        later = found.encode_text(f"x{bos}", special=True)
        assert later == [*found.prefix, *found.encode(f"x{bos}", special=True)]
        assert found.encode_prompt("") == [found.bos_id] == found.encode_prompt("", special=True)
        assert found.encode_text("") == list(found.prefix)


def opened(folder, files, size):
    """Imports a Hugging Face folder with these files, and opens the model."""
    config = replace(TINY, model__vocab_size=size, train__seq_len=32)
    exported(folder / "hf", config, files=files)
    convert(open_source("hf", folder / "hf"), "ckpt", folder / "run")
    return open_model(folder / "run", "fsdp=1")


def sentencepiece_files(tokenizer, config, kind=None):
    """Returns a SentencePiece model with tokenizer_config.json and, for `kind`, tokenizer.json."""
    names = {"bos_token": "<s>", "eos_token": "</s>", **config}
    names.setdefault("tokenizer_class", "LlamaTokenizer")
    files = {"tokenizer.model": tokenizer.model_bytes}
    files["tokenizer_config.json"] = json.dumps(names).encode()
    if kind is not None:
        described = json.loads(fast_files(tokenizer)["tokenizer.json"])
        described["post_processor"] = processors({"<s>": 1, "</s>": 2})[kind][0]
        files["tokenizer.json"] = json.dumps(described).encode()
    return files


@pytest.mark.parametrize(
    ("config", "kind", "adds"),
    [
        ({}, None, True),  # as in LLaMA's own code
        ({"add_bos_token": True}, None, True),
        ({"add_bos_token": None}, None, True),
        ({"add_bos_token": False}, None, False),
        # A tokenizer.json decides, as it does for transformers.
        ({"add_bos_token": False}, "bos", True),
        ({"add_bos_token": True}, "empty", False),
    ],
)
def test_a_sentencepiece_model_has_its_config_say_it(tokenizer, tmp_path, config, kind, adds):
    model = opened(tmp_path, sentencepiece_files(tokenizer, config, kind), 300)
    assert model.tokenizer.model_bytes == tokenizer.model_bytes
    assert model.encode(TEXT) == [1] * adds + tokenizer.encode(TEXT)
    assert model.tokenizer.encode_prompt("") == [1]


def test_a_config_that_does_not_say_it(tokenizer, tmp_path):
    with pytest.raises(UserError, match="add_bos_token='no' in tokenizer_config.json is not a boo"):
        opened(tmp_path, sentencepiece_files(tokenizer, {"add_bos_token": "no"}), 300)


def test_the_command(corpus, tmp_path):
    files = {"tokenizer.json": byte_level(corpus, "empty")[0]}
    opened(tmp_path, files, Tokenizer(files["tokenizer.json"]).vocab_size)
    prompts = [f"--prompt={text}" for text in (f"{BOS}{TEXT}", TEXT, "")]
    flags = (f"--checkpoint={tmp_path}/run", "--max_tokens=3", "--json", "--temperature=0")
    process = run_command("generate", *flags, "--special", *prompts)
    assert process.returncode == 0, process.stderr
    assert [json.loads(line)["tokens"] for line in process.stdout.splitlines()] == [3, 3, 3]


def test_a_single_token_with_none_before_it_is_not_scored(corpus, tmp_path):
    files = {"tokenizer.json": byte_level(corpus, "empty")[0]}
    model = opened(tmp_path, files, Tokenizer(files["tokenizer.json"]).vocab_size)
    for text in ("a", ""):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
        with pytest.raises(UserError, match="there is no text to evaluate"):
            evaluate(
                model,
                read_texts(f"{tmp_path}/a.jsonl", "text", model),
                stride=8,
                batch_size=1,
                limit=None,
            )


# Against transformers.


def theirs_of(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_begins_texts_so(corpus, tmp_path, kind):
    """Version 5 takes this from tokenizer.json alone, whatever tokenizer_config.json says."""
    content, adds = byte_level(corpus, kind)
    (tmp_path / "tokenizer.json").write_bytes(content)
    ours = Tokenizer(content)
    for choice in ({}, {"add_bos_token": False}, {"add_bos_token": True}):
        for name in ("PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"):
            config = {"tokenizer_class": name, "bos_token": BOS, "eos_token": EOS, **choice}
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
            found = theirs_of(tmp_path)(TEXT)["input_ids"]
            assert (found[0] == ours.bos_id) == adds
            assert [one for one in found if one != ours.eos_id] == ours.encode_text(TEXT)
            assert Tokenizer.load(tmp_path / "tokenizer.json").encode_text(TEXT) == (
                ours.encode_text(TEXT)
            )


@pytest.mark.parity
@pytest.mark.parametrize("adds", [False, True])
def test_transformers_reads_a_sentencepiece_model_so(tokenizer, tmp_path, adds):
    files = sentencepiece_files(tokenizer, {"add_bos_token": adds})
    model = opened(tmp_path, files, 300)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert theirs_of(tmp_path)(TEXT)["input_ids"] == model.encode(TEXT)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["empty", "bos"])
def test_the_loss_and_text_of_transformers(corpus, tmp_path, kind):
    import torch

    from llama_jax.inference.decode import Sampling
    from llama_jax.inference.generation import complete
    from tests.reference import hf_reference

    content, _ = byte_level(corpus, kind)
    size = Tokenizer(content).vocab_size
    names = json.dumps({"bos_token": BOS, "eos_token": EOS}).encode()
    files = {"tokenizer.json": content, "tokenizer_config.json": names}
    model = opened(tmp_path, files, size)
    params = random_params(model.config.model)
    theirs = hf_reference.build(model.config.model, params)
    texts = [TEXT, "def f(x): 日", "a b c d"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sources = read_texts(f"{tmp_path}/a.jsonl", "text", model)
    found = evaluate(model, sources, stride=32, batch_size=2, limit=None)["text"]
    tokens, total = 0, 0.0
    for text in texts:
        ids = torch.tensor([theirs_of(tmp_path / "hf")(text)["input_ids"]])
        with torch.no_grad():
            loss = theirs(input_ids=ids, labels=ids).loss.item()
        tokens += ids.shape[1] - 1
        total += loss * (ids.shape[1] - 1)
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    ids = theirs_of(tmp_path / "hf")(TEXT, return_tensors="pt")["input_ids"]
    output = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=size - 1)
    wanted = theirs_of(tmp_path / "hf").decode(output[0], skip_special_tokens=True)
    sampling = Sampling(max_tokens=8, temperature=0.0)
    (got,) = complete(
        model.config.model, model.params, model.tokenizer, [TEXT], sampling, context=32
    )
    assert got == wanted
    assert np.isfinite(found["loss"])
