"""Accepted changes and branches at a kill or damage, and bad input that leaves the run as it was.

All runs are in this process; test_changing_hosts.py has real kills.
"""

import json
import shutil

import pytest
from etils import epath

from llama_jax.checkpoint.saved_step import find_step, load_meta
from llama_jax.config import from_json
from llama_jax.data.prepare.job import prepare
from llama_jax.errors import UserError
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.transfer import convert
from llama_jax.train import loop, run
from tests.faults.soak import losses
from tests.faults.test_damage import files_of
from tests.helpers import (
    flip_bit,
    mesh_of,
    one_line_error,
    replace,
    run_command,
    text_config,
    write_corpus,
)

pytestmark = pytest.mark.usefixtures("shared_steps", "on_two_devices")

WIKI = "until 9: data.mixture=web=0.5,wiki=0.5"
ACCEPT = ("train.global_batch", "optim.peak_lr")


class Killed(BaseException):
    """Ends a run as SIGKILL does: it is no error that the run handles."""


@pytest.fixture(scope="module")
def on_two_devices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_mesh", lambda *_: mesh_of((1, 2, 1, 1)))
        yield


@pytest.fixture(scope="module")
def config(two_sources):
    return text_config(
        f"web={two_sources / 'web'};books={two_sources / 'books'}",
        data__path=str(two_sources / "shards"),
        data__mixture="web=0.7,books=0.3",
        model__n_layers=1,
        train__steps=10,
        train__checkpoint_every=3,
        train__keep_checkpoints=9,
        train__eval_every=1000,
    )


@pytest.fixture(scope="module")
def changed(config):
    """Returns the config with the changes in `ACCEPT`."""
    return replace(config, train__global_batch=16, optim__peak_lr=5e-3)


def train(config, workdir, accept=(), kill=None):
    """Trains until the end, or until the run is killed after some steps."""

    def killed(self, state, batch, step, take_step=loop._Actions.take_step):
        if step == kill:
            raise Killed
        return take_step(self, state, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        if kill is None:
            return run.run(config, workdir, accept=accept)
        patch.setattr(loop._Actions, "take_step", killed)
        with pytest.raises(Killed):
            run.run(config, workdir, accept=accept)


def result(workdir):
    """Returns the loss of each step, and the fingerprints of the last state."""
    meta = load_meta(find_step(epath.Path(workdir)))
    assert meta.config == from_json((workdir / "config.json").read_text())
    return losses(workdir), meta.fingerprint


def changes_of(workdir):
    return [json.loads(line) for line in (workdir / "changes.jsonl").read_text().splitlines()]


def damage(workdir, step, item="params"):
    """Inverts a bit of an array of a step."""
    flip_bit(next(path for path in files_of(workdir, step) if f"/{item}/d/" in str(path)), 99)


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory):
    """Returns a run that was killed after 8 steps; it has saved steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    train(config, workdir, kill=8)
    return workdir


@pytest.fixture(scope="module")
def twin(config, changed, tmp_path_factory):
    """Returns the result of the run that has the change after step 6 as a stage."""
    workdir = tmp_path_factory.mktemp("twin") / "run"
    stages = "until 6: train.global_batch=8 optim.peak_lr=0.01"
    train(replace(changed, train__stages=stages), workdir)
    return result(workdir)


@pytest.fixture
def workdir(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run")


def test_killed_after_a_change_before_the_next_save(workdir, config, changed, twin):
    train(changed, workdir, ACCEPT, kill=8)
    for other in (changed, config):  # also the old values need the flag now
        with pytest.raises(UserError, match="--accept_changes=") as caught:
            train(other, workdir)
        assert len(str(caught.value).splitlines()) == 1
    train(changed, workdir, ACCEPT, kill=8)
    train(changed, workdir, ACCEPT)
    assert result(workdir) == twin
    (change,) = changes_of(workdir)
    assert change["step"] == 6


@pytest.mark.parametrize("again", [False, True], ids=["once", "killed again"])
def test_the_newest_step_is_damaged_when_a_change_is_accepted(workdir, changed, twin, again):
    """The steps between the older checkpoint and the change are made with the old values."""
    damage(workdir, 6)
    if again:
        train(changed, workdir, ACCEPT, kill=5)
    outcome = train(changed, workdir, ACCEPT)
    assert outcome.start == 3 and (workdir / "checkpoints" / "6.damaged").exists()
    assert result(workdir) == twin
    assert {change["step"] for change in changes_of(workdir)} == {6}


def test_a_step_after_the_change_is_damaged(workdir, changed, twin):
    """The flag was needed once; going back to a step before the change does not need it again."""
    train(changed, workdir, ACCEPT)
    assert result(workdir) == twin
    recorded = changes_of(workdir)
    for step in (6, 9, 10):
        damage(workdir, step)
    train(changed, workdir, kill=5)
    assert train(changed, workdir).start == 3
    assert result(workdir) == twin
    assert changes_of(workdir) == recorded and len(recorded) == 1


def branch_of(config, place, **changes):
    """Returns the config of a branch that cools down in the last 4 of 10 steps."""
    wsd = {"optim__schedule": "wsd", "optim__decay_steps": 4, **changes}
    return replace(config, branch_from=str(place), **wsd)


@pytest.fixture(scope="module")
def trunk(config, tmp_path_factory):
    """Returns a run with a constant rate that was killed after 8 steps."""
    workdir = tmp_path_factory.mktemp("trunk") / "run"
    train(replace(config, optim__schedule="constant", train__steps=100), workdir, kill=8)
    return workdir


def test_a_branch_equals_one_run(config, trunk, tmp_path):
    """Also if it is killed before its first save, and resumed when the trunk is gone."""
    place = shutil.copytree(trunk, tmp_path / "trunk") / "checkpoints" / "6"
    branch = branch_of(config, place)
    train(branch, tmp_path / "branch", kill=7)
    train(branch, tmp_path / "branch", kill=9)
    shutil.rmtree(tmp_path / "trunk")
    assert train(branch, tmp_path / "branch").start == 9
    train(replace(branch, branch_from=""), tmp_path / "one")
    lost, state = result(tmp_path / "one")
    assert {step: loss for step, loss in losses(trunk).items() if step < 7} == {
        step: lost[step] for step in range(1, 7)
    }
    assert result(tmp_path / "branch") == ({step: lost[step] for step in range(7, 11)}, state)
    (change,) = changes_of(tmp_path / "branch")
    assert (change["step"], change["branch_from"]) == (6, str(place))


def check_refused(config, workdir, accept, message, folder):
    """Checks that a run is refused in one line, and that no file of `folder` changes."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message) as caught:
        train(config(), workdir, filter(None, accept.split(",")))
    assert len(str(caught.value).splitlines()) == 1
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before and len(before) > 20


# Name: changed fields of a run that goes on, accepted fields, and a part of the message.
GOING_ON = {
    "a branch into its own run": (
        {"branch_from": "RUN"},
        "optim",
        "holds a run, and a branch .* needs a new work directory",
    ),
    "a stage before it begins": (
        {"train__stages": "until 8: z_loss=0.1; until 7: z_loss=0.2"},
        "train.stages",
        r"stage 2 \(until 7\) ends before it begins, at step 8",
    ),
    "a decay longer than the run": (
        {"optim__schedule": "wsd", "optim__decay_steps": 50},
        "optim",
        "decay_steps=50 .* train.steps=10",
    ),
    "a change without the flag": (
        {"optim__peak_lr": 5e-3},
        "",
        "peak_lr is 0.01, now 0.005.*--accept_changes=optim.peak_lr$",
    ),
    "a change that is not the accepted one": (
        {"optim__peak_lr": 5e-3},
        "train.steps",
        "peak_lr is 0.01, now 0.005.*--accept_changes=optim.peak_lr$",
    ),
    "an unknown field": ({}, "optim.lr", "accept_changes: optim.lr is not a field"),
    "a short name": ({}, "peak_lr", "did you mean optim.peak_lr"),
    "a field that must not change": ({}, "model.dim", "model.dim must not change in a run"),
    "a field that may always change": ({}, "mesh.fsdp", "may always change, and needs no flag"),
    "another model": (
        {"model__dim": 64},
        "optim",
        r"model.dim is 32, now 64.*\(model.dim cannot change in a run\)$",
    ),
    "an end before the step reached": (
        {"train__steps": 4},
        "train.steps",
        "has made 6 steps, more than train.steps=4; .*--config.branch_from=",
    ),
    "a batch that does not divide": (
        {"train__stages": "until 9: train.global_batch=7"},
        "train.stages",
        "global_batch=7",
    ),
    "an unknown source": (
        {"train__stages": WIKI},
        "train.stages",
        "'wiki'",
    ),
}


@pytest.mark.parametrize("name", GOING_ON)
def test_bad_input_leaves_a_run_as_it_was(workdir, config, name):
    changes, accept, message = GOING_ON[name]
    changes = {key: str(workdir) if value == "RUN" else value for key, value in changes.items()}
    check_refused(lambda: replace(config, **changes), workdir, accept, message, workdir)


# Name: the place to branch from, relative to the trunk, changed fields, and a part of the message.
BRANCHES = {
    "a step that does not exist": (
        "checkpoints/7",
        {},
        "checkpoints/7 does not exist; the saved steps are 3, 6$",
    ),
    "no run": ("../none", {}, "none does not exist$"),
    "another shape": (
        "",
        {"model__dim": 64},
        r"model.dim is 32, now 64.*\(model.dim cannot change",
    ),
    "other data": ("", {"data__path": "other"}, "data.source is .*accept_other_data=True"),
    "another tokenizer": ("", {"data__path": "third"}, "tokenizer's sha256 is"),
    "an end before it begins": (
        "",
        {"train__steps": 5, "optim__decay_steps": 2},
        "has made 6 steps, more than train.steps=5",
    ),
    "a decay longer than the run": ("", {"optim__decay_steps": 50}, "decay_steps=50"),
    "an unknown source": (
        "",
        {"train__stages": WIKI},
        "has shares for .*wiki, but the sources are web, books: see 'wiki'$",
    ),
    "an unknown source in the only mixture": (
        "",
        {"train__stages": WIKI, "data__mixture": ""},
        "has a share for 'wiki'; the sources are web, books$",
    ),
    "a batch that does not divide": (
        "",
        {"train__stages": "until 9: train.global_batch=7"},
        "the stage from step 1 on: .*global_batch=7",
    ),
    "damaged weights": ("../damaged", {}, "checkpoints/6 is damaged: params/.* older step$"),
    "damaged moments": (
        "checkpoints/3",
        {},
        "checkpoints/3 is damaged: optimizer/.* branch from another step$",
    ),
    "weights without moments": ("../converted", {}, "no optimiser state"),
}


@pytest.fixture(scope="module")
def trunks(trunk, two_sources, tmp_path_factory):
    """Returns a folder with a trunk whose step 3 is damaged, converted weights, and other data."""
    folder = tmp_path_factory.mktemp("trunks")
    place = shutil.copytree(trunk, folder / "trunk")
    convert(open_source("ckpt", epath.Path(place)), "ckpt", folder / "converted")
    damage(place, 3, "optimizer")
    damage(shutil.copytree(place, folder / "damaged"), 6)
    (folder / "text").mkdir()
    source = str(write_corpus(folder / "text", 20))
    same = str(two_sources / "shards" / "web" / "tokenizer.model")
    for name, tokenizer in (("other", same), ("third", "")):
        config = text_config(source, data__tokenizer=tokenizer)
        prepare(config, folder / name, log=lambda line: None)
    return folder


@pytest.mark.parametrize("name", BRANCHES)
def test_bad_input_of_a_branch_leaves_the_trunk_as_it_was(trunks, config, tmp_path, name):
    place, changes, message = BRANCHES[name]
    if "data__path" in changes:
        path = str(trunks / changes["data__path"])
        changes = {"data__path": path, "data__source": str(trunks / "text"), "data__mixture": ""}
    trunk = trunks / "trunk" / place
    check_refused(
        lambda: branch_of(config, trunk, **changes), tmp_path / "run", "", message, trunks
    )
    assert not any(tmp_path.rglob("*.json*"))  # the next try does not find a run there


def test_the_command_ends_with_status_1(trunks):
    place = f"--config.branch_from={trunks}/trunk/checkpoints/7"
    flags = ("--config=tiny", f"--workdir={trunks}/branch", place, "--config.data.source=synthetic")
    line = one_line_error(run_command("train", *flags))
    assert line.endswith("checkpoints/7 does not exist; the saved steps are 3, 6")
