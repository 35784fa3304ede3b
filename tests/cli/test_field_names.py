import pytest

from llama_jax.cli.field_names import FIELD_ALIASES, GROUP_ALIASES, unknown_field
from llama_jax.config import field_types


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
        ("optim.lr_decay_style", "optim has no field lr_decay_style; did you mean schedule?"),
        ("optim.cooldown_steps", "optim has no field cooldown_steps; did you mean decay_steps?"),
        ("schedule", "the config has no group schedule; did you mean --config.optim.schedule?"),
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
            "mesh is a group of fields; set one of them with --config.mesh.FIELD: "
            "data, fsdp, context, tensor",
        ),
        (
            "mesh.nothing",
            "mesh has no field nothing; it has data, fsdp, context, tensor",
        ),
        (
            "nothing.at_all",
            "the config has no group nothing; its groups are model, mesh, dcn, data, optim, train, "
            "lora, and init_from and branch_from are in no group",
        ),
    ],
)
def test_a_field_that_is_unknown(name, message):
    assert unknown_field(name, "--config.") == message


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a.b.c.d", "ü", "optim.", ".lr", "x" * 300, "\udcff"]
)
def test_odd_names_of_fields_have_a_message_of_one_line(name):
    message = unknown_field(name, "--config.")
    assert message and "\n" not in message


def test_what_other_programs_call_a_field_is_a_name_of_one_field():
    words = " ".join(FIELD_ALIASES.values()).split()
    assert len(set(words)) == len(words)
    assert set(FIELD_ALIASES) <= set(field_types())
    assert set(GROUP_ALIASES) <= {name.partition(".")[0] for name in field_types()}
