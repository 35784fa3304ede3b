import pytest

from llama_jax.cli.flag_names import unknown_flag
from llama_jax.config import field_types

FIELDS = field_types()
TRAIN = ("config", "workdir", "xla_preset", "start_timeout", "stopped_status", "damaged_status")


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--steps=10", "unknown flag --steps; did you mean --config.train.steps=10?"),
        ("-steps=10", "unknown flag --steps; did you mean --config.train.steps=10?"),
        ("--steps", "unknown flag --steps; did you mean --config.train.steps?"),
        ("--lr=3e-4", "unknown flag --lr; did you mean --config.optim.peak_lr=3e-4?"),
        (
            "--learning-rate=1",
            "unknown flag --learning-rate; did you mean --config.optim.peak_lr=1?",
        ),
        ("--source=a b", "unknown flag --source; did you mean --config.data.source='a b'?"),
        ("--train.steps=5", "unknown flag --train.steps; did you mean --config.train.steps=5?"),
        ("--data=x", "unknown flag --data; did you mean --config.data.source=x?"),
        ("--optim.lr=5", "optim has no field lr; did you mean peak_lr?"),
        ("--config.optim.lr=1", "optim has no field lr; did you mean peak_lr?"),
        ("--noconfig.data.stream", "data has no field stream; did you mean streaming?"),
        (
            "--noconfig.data.workers",
            "--config.data.workers is not a switch; give its value as --config.data.workers=VALUE",
        ),
        # Other separators than dots, other capitals, and one dash too many.
        *(
            (f"{flag}=9", f"unknown flag {flag}; did you mean --config.train.steps=9?")
            for flag in (
                *("--config-train-steps", "--config_train_steps", "--config/train/steps"),
                *("--Config.Train.Steps", "--train_steps", "--TRAIN-STEPS", "--train:steps"),
            )
        ),
        (
            "---config.train.steps=9",
            "unknown flag --config.train.steps; did you mean --config.train.steps=9?",
        ),
        (
            "--config.train:steps=9",
            "the config has no group train:steps; did you mean --config.train.steps?",
        ),
        # An epoch is not a step.
        ("--epochs=3", "unknown flag --epochs; did you mean --config.train.steps?"),
        ("--work_dir=x", "unknown flag --work_dir. Did you mean: workdir?"),
        ("--output_dir=x", "unknown flag --output_dir. Did you mean: workdir?"),
        ("--work=x", "unknown flag --work. Did you mean: workdir?"),
        (
            "--nothing",
            "unknown flag --nothing; the flags are --config, --workdir, --xla_preset, "
            "--start_timeout, --stopped_status, --damaged_status, see --help",
        ),
    ],
)
def test_a_flag_that_is_unknown(arg, message):
    assert unknown_flag(arg, TRAIN, FIELDS) == message


def test_a_command_without_a_config_suggests_its_own_flags():
    own = ("checkpoint", "prompt", "prompts", "batch_size")
    assert unknown_flag("--model=x", own, ()).endswith("Did you mean: checkpoint?")
    assert unknown_flag("--batch-size=2", own, ()).endswith("Did you mean: batch_size?")
    assert "the flags are --checkpoint, --prompt" in unknown_flag("--config.train.steps=1", own, ())


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a.b.c.d", "ü", "optim.", ".lr", "x" * 300, "\udcff"]
)
def test_odd_names_have_a_message_of_one_line(name):
    for message in (
        unknown_flag(f"--{name}", TRAIN, FIELDS),
        unknown_flag(f"--config.{name}=1", TRAIN, FIELDS),
    ):
        assert message and "\n" not in message
