"""Which fields may change in a run, and how its past is written down."""

import json

import pytest
from etils import epath

from llama_jax.config import Config, changed_fields, from_json
from llama_jax.errors import UserError
from llama_jax.train import changes
from llama_jax.train.changes import (
    ACCEPTABLE,
    accepted_fields,
    changed_since,
    record_changes,
    refused,
    with_past,
)
from tests.helpers import TINY, replace


def steps_of(config, steps=30):
    """Returns the config of each step; loop fields do not matter."""
    return [config.at(step) for step in range(steps)]


def test_the_flag_names_fields_and_groups():
    assert accepted_fields(["train.steps", "train.steps"]) == ("train.steps",)
    optim = {name for name in ACCEPTABLE if name.startswith("optim.")}
    for name in ("optim", "optim.", "optim.*"):
        assert set(accepted_fields([name])) == optim
    assert "optim.moment_dtype" not in optim and "optim.peak_lr" in optim
    assert accepted_fields([]) == accepted_fields([""]) == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.dim", "model.dim must not change in a run: that would be another run"),
        ("optim.moment_dtype", "must not change in a run"),
        ("train.grad_accum", "train.grad_accum may always change, and needs no flag"),
        ("steps", "steps is not a field; did you mean train.steps"),
        ("peak_lr", "did you mean optim.peak_lr"),
        ("optim.lr", "optim.lr is not a field; the fields that may change are"),
        ("mesh", "mesh is not a field"),
    ],
)
def test_the_flag_refuses_other_names(name, message):
    with pytest.raises(UserError, match=message):
        accepted_fields(["train.steps", name])


def test_a_past_that_stays_what_it_was():
    """`with_past` gives each step the config that it was made with, whatever comes later."""
    first = replace(TINY, train__global_batch=8)
    second = replace(TINY, optim__peak_lr=5e-3)
    third = replace(second, train__stages="until 20: train.z_loss=0.5", train__steps=30)
    run = with_past(first, second, 6)
    assert run.train.stages == "until 6: train.global_batch=8 optim.peak_lr=0.01"
    assert steps_of(run) == [*steps_of(first, 6), *steps_of(second)[6:]]
    again = with_past(run, third, 12)
    wanted = [*steps_of(first, 6), *steps_of(second)[6:12], *steps_of(third)[12:]]
    assert steps_of(again) == wanted
    # The same command resumes it: nothing has changed, and the past is the same.
    assert with_past(again, third, 15) == again and not changed_since(again, third, 15)
    assert with_past(again, again, 25) is again
    assert from_json(again.to_json()) == again
    # A change where a stage ends: that stage has not begun to be the past.
    staged = replace(TINY, train__stages="until 6: train.z_loss=1; until 9: train.z_loss=2")
    run = with_past(staged, replace(TINY, train__z_loss=3.0), 6)
    assert run.train.stages == "until 6: train.z_loss=1.0"


def test_without_a_change_nothing_is_written():
    loop = replace(TINY, train__log_every=7, train__grad_accum=2, model__remat="full")
    for config in (TINY, loop, replace(loop, train__stages="until 9 tokens: train.z_loss=1")):
        assert with_past(config, config, 5) is config
    assert with_past(TINY, loop, 5) is loop  # these fields do not change the result


def test_a_change_back_leaves_the_stage_between():
    other = replace(TINY, train__z_loss=0.5)
    run = with_past(with_past(TINY, other, 4), TINY, 9)
    assert [(s.start, s.config.train.z_loss) for s in run.stages] == [(0, 0.0), (4, 0.5), (9, 0.0)]
    assert changed_since(with_past(TINY, other, 4), TINY, 9) == {"train.z_loss": (0.5, 0.0)}


def test_a_batch_that_did_not_divide_by_the_new_microbatches():
    was = replace(TINY, train__global_batch=8, train__grad_accum=2)
    run = with_past(was, replace(TINY, train__grad_accum=16), 4)
    assert (run.at(3).train.global_batch, run.at(3).train.grad_accum) == (8, 2)
    assert run.at(4).train.grad_accum == 16


def test_stages_of_the_past_may_differ():
    """Only the steps that follow count."""
    saved = replace(TINY, train__stages="until 4: train.global_batch=8; until 9: train.z_loss=1")
    same = replace(TINY, train__stages="until 5: train.seq_len=8; until 9: train.z_loss=1.0")
    assert changed_since(saved, same, 6) == {}
    assert list(changed_since(saved, same, 3)) == ["train.stages"]
    assert steps_of(with_past(saved, same, 6)) == steps_of(saved)
    # A stage that sets a field to the value that the config has anyway changes nothing.
    assert changed_since(TINY, replace(TINY, train__stages="until 9: train.seq_len=16"), 3) == {}
    # The saved text names only what differs; the user's text may name more.
    asked = replace(TINY, train__stages="until 9: train.seq_len=16 train.z_loss=1")
    whole = with_past(replace(TINY, train__global_batch=8), asked, 3)
    assert whole.train.stages == "until 3: train.global_batch=8; until 9: train.z_loss=1.0"
    assert list(changed_since(whole, replace(asked, train__steps=40), 6)) == ["train.steps"]
    later = replace(TINY, train__stages="until 9: train.z_loss=1")
    assert changed_since(saved, later, 6) == {}
    assert changed_since(saved, replace(later, train__z_loss=2.0), 6) == {
        "train.z_loss": (0.0, 2.0)
    }


def test_other_data_have_no_past_of_shares():
    was = replace(TINY, data__source="a=a.txt; b=b.txt", data__mixture="a=1,b=1")
    now = replace(TINY, data__source="c=c.txt; d=d.txt", data__mixture="c=1,d=1")
    run = with_past(was, now, 5)
    assert {stage.config.data.mixture for stage in run.stages} == {"c=1,d=1"}
    named = "a=a.txt; b=b.txt; c=c.txt"
    more = replace(TINY, data__source=named, data__mixture="a=1,b=1,c=1")
    fewer = replace(more, data__mixture="a=1,b=1")
    assert with_past(fewer, more, 5).at(4).data.mixture == "a=1,b=1"


def test_what_is_refused():
    now = replace(TINY, train__steps=30, model__dim=64, train__log_every=3)
    found = changed_since(TINY, now, 5)
    assert found == changed_fields(TINY, now)
    assert set(refused(found, now, ["train.steps"])) == {"model.dim"}
    assert set(refused(found, now, [])) == {"model.dim", "train.steps"}
    told = changes.mend(refused(found, now, []), "use the same values")
    assert told == "use the same values (model.dim cannot change in a run)"


def test_changes_are_recorded_once(tmp_path):
    folder, path = epath.Path(tmp_path), tmp_path / "changes.jsonl"
    assert record_changes(folder, 5, {}) == "" and not path.exists()
    found = {"train.steps": (20, 30), "optim.peak_lr": (0.01, 1e-3)}
    line = "changed from step 6 on: train.steps is 20, now 30; optim.peak_lr is 0.01, now 0.001"
    for _ in range(2):  # the run is killed before it saves, and the same command runs again
        assert record_changes(folder, 5, found) == line
    record_changes(folder, 5, {}, branch_from="run/checkpoints/5")
    assert [json.loads(text) for text in path.read_text().splitlines()] == [
        {"step": 5, "changes": {"train.steps": [20, 30], "optim.peak_lr": [0.01, 0.001]}},
        {"step": 5, "changes": {}, "branch_from": "run/checkpoints/5"},
    ]


def test_a_config_with_a_past_is_that_of_65b_too():
    was = replace(Config(), train__global_batch=1024)
    run = with_past(was, Config(), 1000)
    assert run.total(lambda one: one.train.tokens_per_step, 1001) == (1000 * 1024 + 2048) * 2048
