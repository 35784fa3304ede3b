"""From instructions to a model that chats: base, all weights, adapters on top."""

import shutil

import jax
import pytest

from llama_jax.checkpoint.saved_step import load_meta
from llama_jax.inference.chat import Conversation, open_template
from llama_jax.inference.decode import Sampling
from llama_jax.inference.loaded_model import open_model
from llama_jax.text.templates import built_in
from llama_jax.train.run import train
from tests.data.sources.test_conversations import chat_config
from tests.helpers import (
    one_line_error,
    random_params,
    records,
    replace,
    run_command,
    save_checkpoint,
)
from tests.reference.chat_templates import said

pytestmark = pytest.mark.slow  # two trainings, each resumed once


@pytest.fixture(scope="module")
def finetuned(tokenizer, tmp_path_factory):
    """Trains all weights of a base, then adapters on top; returns the folder of all three."""
    folder = tmp_path_factory.mktemp("finetune")
    pairs = [
        {"instruction": f"say {n}", "input": "", "output": f"{n} is what I say"} for n in range(60)
    ]
    config = replace(
        chat_config(folder, tokenizer, pairs),
        train__steps=4,
        train__log_every=1,
        train__eval_every=4,
        train__checkpoint_every=2,
        optim__warmup_steps=0,
    )
    base = folder / "base"
    save_checkpoint(base, config, random_params(config.model), tokenizer.model_bytes)
    tokenizer.save(base / "tokenizer.model")
    full = replace(config, init_from=f"ckpt:{base}", data__tokenizer="")
    train(full, folder / "full")
    adapted = replace(full, init_from=f"ckpt:{folder / 'full'}", lora__rank=2)
    train(adapted, folder / "adapted")
    return folder


@pytest.mark.parametrize("run", ["full", "adapted"])
def test_resume_on_packed_conversations_is_bit_exact(finetuned, run, tmp_path):
    """Weights and moments, compared by their fingerprints, and the losses of the repeated steps."""
    workdir = shutil.copytree(finetuned / run, tmp_path / run)
    expected = load_meta(workdir / "checkpoints" / "4")
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "metrics.jsonl").unlink()
    train(expected.config, workdir)
    found = load_meta(workdir / "checkpoints" / "4")
    assert found.fingerprint == expected.fingerprint and len(found.fingerprint) > 12
    assert found.base == expected.base and bool(found.base) == (run == "adapted")
    again = [(r["step"], r["loss"]) for r in records(workdir) if "loss" in r]
    first = [(r["step"], r["loss"]) for r in records(finetuned / run) if "loss" in r]
    assert again == first[2:]


@pytest.mark.parametrize("run", ["full", "adapted"])
def test_a_finetuned_checkpoint_answers_by_the_template_that_it_learnt(finetuned, run, tokenizer):
    losses = [r["loss"] for r in records(finetuned / run) if "loss" in r]
    assert len(losses) == 4
    model = open_model(finetuned / run, "fsdp=1")
    template = open_template(model)
    expected = built_in("vicuna", tokenizer)
    assert template.encode(said("say 7")) == expected.encode(said("say 7"))
    sampling = Sampling(max_tokens=4, temperature=0.0)
    with jax.set_mesh(model.mesh):
        talk = Conversation(model, template, sampling)
        assert "".join(talk.answer("say 7", pytest.fail)) == talk.messages[1]["content"]


def test_the_command_chats_above_a_base_that_was_moved(finetuned, tmp_path):
    flags = (f"--checkpoint={finetuned / 'adapted'}", "--chat", "--temperature=0")
    talk = {"stdin": "say 7\nsay 8\n/exit\n"}
    here = run_command("generate", *flags, "--max_tokens=6", **talk)
    assert here.returncode == 0 and here.stderr == "", here.stderr
    assert len(here.stdout.splitlines()) >= 2
    moved = shutil.copytree(finetuned / "full", tmp_path / "moved")
    there = run_command("generate", *flags, "--max_tokens=6", f"--base=ckpt:{moved}", **talk)
    assert there.returncode == 0 and there.stdout == here.stdout, there.stderr
    gone = run_command("generate", *flags, "--base=ckpt:/gone", **talk)
    assert "does not exist; name it: --base=hf:DIR" in one_line_error(gone)
    # The run that trains all weights and the adapters have different bases.
    other = run_command("generate", *flags, f"--base=ckpt:{finetuned / 'base'}", **talk)
    assert "were trained on another base than" in one_line_error(other)
