"""A learnt chat template replaces the template and the tokenizer files of the base."""

import json

import pytest
from etils import epath

from llama_jax.data.training_data import TrainingData
from llama_jax.inference.chat import open_template, templates
from llama_jax.inference.loaded_model import open_model
from llama_jax.interchange.ckpt import write_adapters
from llama_jax.interchange.formats import Description
from llama_jax.interchange.merged_adapters import base_fingerprint
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.transfer import convert
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.templates import built_in, to_json
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_config import special_ids, with_base_files
from tests.helpers import TINY, random_adapters, random_params, released_json, replace
from tests.interchange.test_transfer import Memory, exported
from tests.reference.chat_templates import chat_tokenizer, said

pytestmark = pytest.mark.usefixtures("shared_steps")

TALK = said("abc def?", "Yes. 42", " more ", " no\n")
NAMES = ("alpaca", "vicuna", "llama2", "llama3")
BASE_TEMPLATES = {
    "chat_template.jinja": b"the base's own",
    "additional_chat_templates/rag.jinja": b"one more of the base",
}


def learnt_files(template):
    """Returns the files that a run with a learnt template stores next to its weights."""
    kind = "json" if template.tokenizer.model_bytes[:1] == b"{" else "model"
    data = TrainingData(None, None, template.tokenizer, "x", to_json(template))
    return {f"tokenizer.{kind}": template.tokenizer.model_bytes, **data.files}


def adapters_over(base, workdir, config, files):
    """Writes a checkpoint of adapters with these files."""
    config = replace(config, init_from=f"hf:{base}", lora__rank=2, lora__base_dtype="float32")
    print_of_base = base_fingerprint(open_source("hf", epath.Path(base)), config)
    workdir.mkdir()
    description = Description(config, "float32", files)
    write_adapters(epath.Path(workdir), description, random_adapters(config), print_of_base)


@pytest.fixture(scope="module")
def runs(tokenizer, corpus, tmp_path_factory):
    """Returns, by name, a template and a folder: `base`, and the runs `full` and `adapted`.

    Both runs learnt the template. The base has another template and, except for llama3, both
    tokenizer files.
    """
    found = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        given = Tokenizer(chat_tokenizer(corpus)) if name == "llama3" else tokenizer
        template = built_in(name, given)
        config = replace(TINY, model__vocab_size=given.vocab_size, train__seq_len=512)
        files = {**BASE_TEMPLATES, "tokenizer.json": given.model_bytes}
        if name != "llama3":
            files |= {"tokenizer.model": given.model_bytes, "tokenizer.json": released_json(given)}
        exported(folder / "base", config, files=files)
        learnt = learnt_files(template)
        convert(Memory(config, random_params(config.model), files=learnt), "ckpt", folder / "full")
        adapters_over(folder / "base", folder / "adapted", config, learnt)
        for run in ("full", "adapted"):
            convert(open_source("ckpt", folder / run), "hf", folder / f"{run}_hf")
        found[name] = template, folder
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", ["full", "adapted"])
def test_chat_writes_what_was_trained_on(runs, name, run):
    template, folder = runs[name]
    found = open_template(open_model(folder / run, "fsdp=1"))
    messages = TALK[:2] if name == "alpaca" else TALK
    example = template.example(messages)
    prompt = found.encode(messages[:-1])
    assert prompt == example.ids[: len(prompt)].tolist()
    assert example.counts[len(prompt) :].all() and not example.counts[len(prompt) - 1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", ["full", "adapted"])
def test_an_exported_folder_has_only_the_learnt_template(runs, name, run):
    template, folder = runs[name]
    files = {
        str(path.relative_to(folder / f"{run}_hf")): path.read_bytes()
        for path in (folder / f"{run}_hf").rglob("*")
        if path.suffix in (".json", ".jinja", ".model")
    }
    assert templates(files) == {"default": template.source}
    # The exported tokenizer.json gives the same ids.
    tokens = {"bos_token": template.tokens["bos_token"], "eos_token": template.tokens["eos_token"]}
    again = ChatTemplate(template.source, name, Tokenizer(files["tokenizer.json"]), tokens)
    assert again.example(TALK).ids.tolist() == template.example(TALK).ids.tolist()


@pytest.mark.parametrize("name", ["vicuna", "llama3"])
@pytest.mark.parametrize("run", ["full", "adapted"])
def test_answers_end_where_the_template_ends_them(runs, name, run):
    template, folder = runs[name]
    tokenizer = template.tokenizer
    ends = [tokenizer.eos_id]
    if name == "llama3":
        ends += tokenizer.encode("<|eot_id|>", special=True)
    assert open_model(folder / run, "fsdp=1").eos_ids == tuple(ends)
    exported = json.loads((folder / f"{run}_hf" / "generation_config.json").read_text())
    assert exported == {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}


def test_a_tokenizer_json_alone_says_what_ends_a_text(corpus):
    """A run that trained all weights of a LLaMA-3 on text has only this file."""
    llama3 = Tokenizer(chat_tokenizer(corpus))
    assert special_ids({"tokenizer.json": llama3.model_bytes}) == (llama3.bos_id, llama3.eos_id)
    assert special_ids({"tokenizer.json": b"{}"}) == (None, None)


@pytest.mark.parametrize("own", ["tokenizer_config.json", "chat_template.jinja"])
def test_files_of_a_base_below_a_learnt_template(own):
    base = {
        **dict.fromkeys((*BASE_TEMPLATES, "tokenizer.json", "added_tokens.json"), b"base"),
        "generation_config.json": b"base",
    }
    files = {"tokenizer_config.json": b"{}", own: json.dumps({"chat_template": "A"}).encode()}
    assert with_base_files(files, base) == {**files, "generation_config.json": b"base"}
    plain = {"tokenizer_config.json": b"{}"}
    assert with_base_files(plain, base) == {**base, **plain}


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", ["full", "adapted"])
def test_transformers_writes_what_was_trained_on(runs, name, run):
    import transformers

    template, folder = runs[name]
    theirs = transformers.AutoTokenizer.from_pretrained(folder / f"{run}_hf")
    ids = theirs.apply_chat_template(TALK, return_dict=False)
    assert ids == template.example(TALK).ids.tolist()
    ids = theirs.apply_chat_template(TALK[:-1], return_dict=False, add_generation_prompt=True)
    assert ids == template.encode(TALK[:-1])
    assert theirs.decode(theirs("  abc d")["input_ids"], skip_special_tokens=True) == "  abc d"
