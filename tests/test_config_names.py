import pytest

from llama_jax.config import field_types
from llama_jax.config_names import unknown_field, unknown_flag
from tests.helpers import field_names

FIELDS = field_types()
TRAIN = ("config", "workdir", "xla_preset", "start_timeout", "stopped_status", "damaged_status")


def test_the_fields_are_those_of_the_config():
    assert set(FIELDS) == field_names(".")
    assert (FIELDS["train.steps"], FIELDS["init_from"]) == (int, str)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optim.lr", "optim has no field lr; did you mean peak_lr?"),
        ("optim.learning_rate", "optim has no field learning_rate; did you mean peak_lr?"),
        ("optim.peek_lr", "optim has no field peek_lr; did you mean peak_lr?"),
        ("optim.peak-lr", "optim has no field peak-lr; did you mean peak_lr?"),
        ("optim.Peak_LR", "optim has no field Peak_LR; did you mean peak_lr?"),
        ("optim.wd", "optim has no field wd; did you mean weight_decay?"),
        ("optim.beta", "optim has no field beta; did you mean beta1 or beta2?"),
        ("optim.momentum", "optim has no field momentum; did you mean beta1?"),
        ("optim.max_grad_norm", "optim has no field max_grad_norm; did you mean clip_norm?"),
        ("train.batch_size", "train has no field batch_size; did you mean global_batch?"),
        ("train.max_steps", "train has no field max_steps; did you mean steps?"),
        ("train.context_length", "train has no field context_length; did you mean seq_len?"),
        ("train.stpes", "train has no field stpes; did you mean steps?"),
        ("train.eval", "train has no field eval; did you mean eval_every or eval_batches?"),
        ("model.hidden_size", "model has no field hidden_size; did you mean dim?"),
        ("data.dataset", "data has no field dataset; did you mean source?"),
        ("mesh.tp", "mesh has no field tp; did you mean tensor?"),
        ("dcn.tensr", "dcn has no field tensr; did you mean tensor?"),
        ("lora.r", "lora has no field r; did you mean rank?"),
        ("train.peak_lr", "train has no field peak_lr; did you mean --config.optim.peak_lr?"),
        ("train.lr", "train has no field lr; did you mean --config.optim.peak_lr?"),
        ("model.seq_len", "model has no field seq_len; did you mean --config.train.seq_len?"),
        ("data.peak_lrr", "data has no field peak_lrr; did you mean --config.optim.peak_lr?"),
        (
            "optimizer.peak_lr",
            "the config has no group optimizer; did you mean --config.optim.peak_lr?",
        ),
        ("optimizer.lr", "the config has no group optimizer; did you mean --config.optim.peak_lr?"),
        ("trian.steps", "the config has no group trian; did you mean --config.train.steps?"),
        ("nothing.steps", "the config has no group nothing; did you mean --config.train.steps?"),
        ("optimizer", "the config has no group optimizer; did you mean --config.optim?"),
        ("steps", "the config has no field steps; did you mean --config.train.steps?"),
        (
            "config.train.steps",
            "there is no --config.config.train.steps; did you mean --config.train.steps?",
        ),
        (
            "train.steps.x",
            "train.steps is a field, not a group; did you mean --config.train.steps?",
        ),
        ("init_from.hf", "init_from is a field, not a group; did you mean --config.init_from?"),
        (
            "mesh",
            "mesh is a group of fields; set one of them, as --config.mesh.FIELD: "
            "data, fsdp, context, tensor",
        ),
        (
            "mesh.nothing",
            "mesh has no field nothing; it has data, fsdp, context, tensor",
        ),
        (
            "nothing.at_all",
            "the config has no group nothing; its groups are model, mesh, dcn, data, optim, train, "
            "lora, and init_from is in none",
        ),
    ],
)
def test_a_field_that_is_unknown(name, message):
    assert unknown_field(name, FIELDS, "--config.") == message


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
        # Other signs than dots, other letters, and a dash too many.
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
        unknown_field(name, FIELDS, "--config."),
        unknown_flag(f"--{name}", TRAIN, FIELDS),
        unknown_flag(f"--config.{name}=1", TRAIN, FIELDS),
    ):
        assert message and "\n" not in message


def test_what_other_programs_call_a_field_is_a_name_of_one_field():
    from llama_jax import config_names

    words = " ".join(config_names._ALIASES.values()).split()
    assert len(set(words)) == len(words)
    assert set(config_names._ALIASES) <= set(FIELDS)
