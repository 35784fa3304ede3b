"""Flags of config fields, as the commands read them."""

import json
import re

import pytest

from llama_jax.cli.config_flags import fields_help, parse_value
from llama_jax.config import field_types
from llama_jax.errors import UserError
from tests.helpers import TINY_FLAGS, one_line_error, run_command

TINY = "--config=configs/tiny.py"


def refused(*flags, module="train"):
    return one_line_error(run_command(module, *flags)).removeprefix("error: ")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.steps", "10", 10),
        ("train.steps", "1_000", 1000),
        ("train.steps", " 7 ", 7),
        ("mesh.fsdp", "-1", -1),
        ("optim.peak_lr", "3e-4", 3e-4),
        ("optim.peak_lr", "1", 1.0),
        ("data.streaming", "true", True),
        ("data.streaming", "False", False),
        ("data.streaming", "1", True),
        ("data.source", "a,b; c=d", "a,b; c=d"),
        ("data.source", "", ""),
        ("init_from", "hf:x", "hf:x"),
    ],
)
def test_the_value_of_a_flag(name, text, value):
    found = parse_value(name, text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text", "mend"),
    [
        ("train.steps", "ten", ""),
        ("train.steps", "", ""),
        ("train.steps", "1.5", ""),
        ("train.steps", "1e3", "; did you mean 1000?"),
        ("train.steps", "10.0", "; did you mean 10?"),
        ("train.steps", "1,000", "; did you mean 1000?"),
        ("train.steps", "(1, 2)", ""),
        ("train.steps", "None", ""),
        ("train.steps", "True", ""),
        ("train.steps", "nan", ""),
        ("train.steps", "inf", ""),
        ("train.steps", "1\n2", ""),
        ("train.steps", "--workdir=x", ""),
        ("optim.peak_lr", "fast", ""),
        ("optim.peak_lr", "1/3", ""),
        ("optim.peak_lr", "0,5", "; did you mean 0.5?"),
        ("optim.peak_lr", "", ""),
        ("data.streaming", "yes", ""),
        ("data.streaming", "on", ""),
        ("data.streaming", "", ""),
        ("data.streaming", "2", ""),
    ],
)
def test_a_value_of_another_type_is_told_with_field_and_type(name, text, mend):
    kinds = {"train": "int, a whole number", "optim": "float, a number"}
    kind = kinds.get(name.split(".")[0], "bool, true or false")
    with pytest.raises(UserError) as error:
        parse_value(name, text)
    assert str(error.value) == f"--config.{name} must be of type {kind}, got {text!r}{mend}"


def test_the_list_of_fields_is_by_group_with_types_checks_defaults_and_meanings():
    text = fields_help(80)
    names = re.findall(r"^  --(?:\[no\])?config\.([\w.]+) \(\w+[,;] ", text, re.M)
    assert names == list(field_types())
    assert max(map(len, text.splitlines())) <= 80
    assert (
        "\n\ntrain: Sets the training loop. Steps are optimiser steps, counted from 1.\n"
        "  --config.train.steps (int, positive; default 250_000)\n      Steps of the whole run.\n"
    ) in text
    assert "\n  --[no]config.data.streaming (bool; default False)\n      Tokenise" in text
    assert "\n\n  --config.init_from (str; default '')\n" in text  # a field without a group
    assert "such as --config.train.steps=200" in text


def test_help_shows_the_fields_and_helpshort_does_not():
    short, long = (run_command("prepare", flag).stdout for flag in ("--helpshort", "--help"))
    assert long == (
        f"{short}\n{fields_help(80)}\n\n--helpshort prints the flags without these fields.\n"
    )
    assert "--output" in short and "--config.train.steps" not in short
    assert "fields of the config" not in run_command("convert", "--help").stdout


def test_a_long_value_is_cut():
    with pytest.raises(UserError) as error:
        parse_value("train.steps", "9" * 5000)
    assert len(str(error.value)) < 150


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config.optim.lr=1",), "optim has no field lr; did you mean peak_lr?"),
        (("--config.optim.lr", "1"), "optim has no field lr; did you mean peak_lr?"),
        (("-config.optim.lr=1",), "optim has no field lr; did you mean peak_lr?"),
        (("--steps=10",), "unknown flag --steps; did you mean --config.train.steps=10?"),
        (
            ("--config.train.steps=ten",),
            "--config.train.steps must be of type int, a whole number, got 'ten'",
        ),
        (
            ("--config.train.steps",),
            "--config.train.steps has no value; give one as --config.train.steps=VALUE",
        ),
        (
            ("--config.train.steps", "--workdir=x"),
            "--config.train.steps has no value; give one as --config.train.steps=VALUE",
        ),
        (
            ("steps=10",),
            "unexpected argument 'steps=10'; options look like --name=value; did you "
            "mean --config.train.steps=10?",
        ),
        (
            ("train.steps=10",),
            "unexpected argument 'train.steps=10'; options look like "
            "--name=value; did you mean --config.train.steps=10?",
        ),
        (
            ("–workdir=x",),
            "unexpected argument '–workdir=x'; options look like --name=value; did "
            "you mean --workdir=x?",
        ),
        (("x",), "unexpected argument 'x'; options look like --name=value"),
        (("--noconfig.data.streaming=1",), "--noconfig.data.streaming=1 does not take an argument"),
        (
            ("--config.train.steps=" + "9" * 40,),
            "train.steps must be less than 2**31, got " + "9" * 40,
        ),
        (("--config.optim.beta1=1",), "optim.beta1 must be in [0, 1) in float32, got 1.0"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message):
    assert refused(TINY, "--workdir=x", *flags) == message


def test_the_config_may_come_after_its_fields_and_the_last_of_two_counts(tmp_path):
    flags = ("--config.train.steps=4", "--config.train.steps=2", f"--workdir={tmp_path}/run")
    flags += ("--config.data.source=synthetic", "--noconfig.data.streaming")
    flags += ("--config.train.sample_prompt=x", "--config.train.sample_prompt", "")
    flags += ("--config.model.tied_embeddings",)
    flags += ("--config.optim.warmup_steps=1",)
    process = run_command("train", *TINY_FLAGS[1:], *flags, "--config=7b", "--config", "tiny")
    assert process.returncode == 0, process.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["steps"] == 2
    assert config["model"]["tied_embeddings"] and not config["data"]["streaming"]
    assert config["train"]["sample_prompt"] == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (TINY, "--config.train.steps=50"),
            "optim.warmup_steps=80 must be less than train.steps=50; set "
            "--config.optim.warmup_steps=5 (optim.warmup_steps from configs/tiny.py, train.steps "
            "from the command line)",
        ),
        (
            (TINY, "--config.train.steps=50", "--config.optim.warmup_steps=60"),
            "optim.warmup_steps=60 must be less than train.steps=50; set "
            "--config.optim.warmup_steps=5 (optim.warmup_steps and train.steps from the command "
            "line)",
        ),
        (
            (TINY, "--config.mesh.data=-1"),
            "only one mesh axis may be -1, got data=-1, fsdp=-1; give the other ones a number, "
            "such as fsdp=1",
        ),
        (
            (TINY, "--config.optim.peak_lr=-1"),
            "optim.peak_lr must be positive, got -1.0",
        ),
    ],
)
def test_fields_that_do_not_fit_come_with_where_they_are_from(flags, message):
    assert refused(*flags, "--workdir=x") == message


def test_a_value_of_the_file_is_told_to_be_of_the_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from llama_jax.config import default\n\n\ndef get_config():\n    config = default()\n"
        "    config.optim.peak_lr = -1.0\n"
        "    config.optim.warmup_steps = config.train.get_ref('steps') * 2\n"
        "    return config\n"
    )
    message = f"optim.peak_lr must be positive, got -1.0 (optim.peak_lr from {path})"
    assert refused(f"--config={path}", "--workdir=x") == message
    # A field that is computed from another one changes with it.
    flags = ("--config.optim.peak_lr=1", "--config.train.steps=5")
    message = (
        "optim.warmup_steps=10 must be less than train.steps=5; set "
        f"--config.optim.warmup_steps=0 (optim.warmup_steps from {path}, train.steps from the "
        "command line)"
    )
    assert refused(f"--config={path}", "--workdir=x", *flags) == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "c = default().unlock()\n    c.optim.lr = 1\n    return c",
            "unknown fields of config group optim: lr (optim has no field lr; did you mean "
            "peak_lr?)",
        ),
        (
            "c = default().unlock()\n    del c.optim['eps']\n    return c",
            "missing fields of config group optim: eps",
        ),
        (
            "return ConfigDict()",
            "missing config groups: branch_from, data, dcn, init_from, lora, mesh, model, optim, "
            "train",
        ),
    ],
)
def test_a_config_file_with_other_fields_is_named(body, message, tmp_path):
    path = tmp_path / "mine.py"
    head = "from llama_jax.config import default\nfrom ml_collections import ConfigDict\n\n\n"
    path.write_text(f"{head}def get_config():\n    {body}\n")
    assert refused(f"--config={path}", "--workdir=x") == f"{path}: {message}"


@pytest.mark.parametrize("module", ["train", "prepare", "data", "plan"])
def test_every_command_with_a_config_reads_it_alike(module, tmp_path):
    needed = {
        "train": "--workdir=x",
        "prepare": "--output=x",
        "data": f"--show={tmp_path}",
        "plan": "--topology=v5p-8",
    }[module]
    assert refused(TINY, needed, "--config.optim.lr=1", module=module).endswith("mean peak_lr?")
    assert "did you mean --config=tiny?" in refused("--config=tinny", needed, module=module)
    text = refused(needed, "--config.train.steps=5", module=module)
    assert text.startswith("--config is missing, but --config.train.steps sets a field of it")
    assert "must be of type int" in refused(TINY, needed, "--config.train.steps=x", module=module)


def test_commands_without_a_config_say_what_they_have():
    assert refused("--config=tiny", module="generate").startswith(
        "unknown flag --config; the flags are --checkpoint, --prompt"
    )
    assert refused("--model=x", module="evaluate").endswith("Did you mean: checkpoint?")


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("plan", (TINY, "--topology=v5p-8", "--price=nan"), "--price must be a number of dollars"),
        ("plan", (TINY, "--topology=v5p-8", "--price=-1"), "--price must be a number of dollars"),
        ("plan", (TINY, "--topology=v5p-8", "--search_limit=0"), "--search_limit=0"),
        ("evaluate", ("--checkpoint=x", "--text=y", f"--limit={2**63}"), "less than 2**31"),
        ("evaluate", ("--checkpoint=x", "--text=y", f"--batch_size={2**31}"), "less than 2**31"),
        ("generate", ("--checkpoint=x", f"--seed={10**30}"), "seed must be in [-2**31, 2**32)"),
        ("generate", ("--checkpoint=x", "--max_tokens=1e3"), "--max_tokens=1e3"),
        ("data", (f"--step={10**30}", "--show=x"), "--step="),
    ],
)
def test_a_number_that_a_command_cannot_use(module, flags, message):
    assert message in refused(*flags, module=module)
