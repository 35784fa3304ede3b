"""Runs that change on the way, against runs that were so from the start: equal to the last bit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint.saved_step import find_step, load_meta
from llama_jax.config import from_json
from llama_jax.data.training_data import open_data
from llama_jax.errors import UserError
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.transfer import convert
from llama_jax.train import loop, origin
from llama_jax.train.origin import branch_folder, find_origin, with_data_of_trunk
from llama_jax.train.run import run
from tests.helpers import TINY, records, replace, text_config
from tests.train.test_run import stop_after

pytestmark = pytest.mark.usefixtures("shared_steps")

BASE = replace(
    TINY,
    train__steps=8,
    train__checkpoint_every=4,
    train__eval_every=100,
    optim__schedule="constant",
)
WSD = replace(BASE, optim__schedule="wsd", optim__decay_steps=3, optim__final_lr_fraction=0.0)


def go(config, workdir, **options):
    return jax.device_get(run(config, workdir, **options).state)


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def log_of(workdir):
    """Returns loss, gradient norm and learning rate of each step; a repeated step counts once."""
    names = ("loss", "grad_norm", "learning_rate", "tokens")
    lines = [line for line in records(workdir) if "loss" in line]
    return {line["step"]: [line[name] for name in names] for line in lines}


def changes_of(workdir):
    return [json.loads(line) for line in (workdir / "changes.jsonl").read_text().splitlines()]


def stages_of(workdir):
    return from_json((workdir / "config.json").read_text()).train.stages


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A run at a constant rate."""
    workdir = tmp_path_factory.mktemp("trunk") / "run"
    go(BASE, workdir)
    return workdir


@pytest.mark.parametrize("shape", ["1-sqrt", pytest.param("linear", marks=pytest.mark.slow)])
def test_trunk_and_cooldown_are_one_run(trunk, tmp_path, capsys, shape):
    config = replace(WSD, train__steps=7, optim__decay_shape=shape)
    whole = go(config, tmp_path / "whole")
    capsys.readouterr()
    branch = replace(config, branch_from=str(trunk / "checkpoints" / "4"))
    equal(go(branch, tmp_path / "branch"), whole)
    log, parts = log_of(tmp_path / "whole"), log_of(tmp_path / "branch")
    assert parts == {step: log[step] for step in (5, 6, 7)}
    assert log[4][2] == pytest.approx(1e-2) and 0 < log[7][2] < log[6][2] < log[5][2] <= log[4][2]
    said = capsys.readouterr().out
    assert f"branch  from step {trunk}/checkpoints/4\n" in said
    line = "changed from step 5 on: optim.final_lr_fraction is 0.1, now 0.0; optim.schedule is "
    assert f"{line}constant, now wsd" in said
    (change,) = changes_of(tmp_path / "branch")
    assert (change["step"], change["branch_from"]) == (4, str(trunk / "checkpoints" / "4"))
    assert change["changes"]["optim.schedule"] == ["constant", "wsd"]
    assert change["changes"]["train.steps"] == [8, 7]
    # The trunk is as it was, and the branch does not need it any more.
    assert stages_of(trunk) == ""
    resumed = replace(branch, branch_from=str(tmp_path / "gone" / "checkpoints" / "4"))
    again = rf"use another --workdir, or go on with it: --config.branch_from={trunk}/checkpoints/4$"
    with pytest.raises(UserError, match=f"needs a new work directory; {again}"):
        run(resumed, tmp_path / "branch")
    equal(go(branch, tmp_path / "branch"), whole)
    assert len(changes_of(tmp_path / "branch")) == 1


def test_a_branch_that_is_stopped_goes_on(trunk, tmp_path):
    config = replace(WSD, branch_from=str(trunk / "checkpoints" / "4"))
    whole = go(config, tmp_path / "whole")
    copy = shutil.copytree(trunk, tmp_path / "trunk")
    config = replace(config, branch_from=str(copy / "checkpoints" / "4"))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        assert int(go(config, tmp_path / "parts").step) == 6
    shutil.rmtree(copy)  # a branch holds all that it needs
    equal(go(config, tmp_path / "parts"), whole)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert len(changes_of(tmp_path / "parts")) == 1


def test_a_lengthened_run_is_one_that_was_long_from_the_start(trunk, tmp_path, capsys):
    long = replace(BASE, train__steps=12)
    whole = go(long, tmp_path / "whole")
    workdir = shutil.copytree(trunk, tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    message = r"\(train.steps is 8, now 12\).*--accept_changes=train.steps$"
    with pytest.raises(UserError, match=message):
        run(long, workdir)
    assert all(path.read_bytes() == content for path, content in before.items())
    capsys.readouterr()
    for _ in range(2):  # the second time the run is finished, and nothing has changed
        equal(go(long, workdir, accept=["train.steps"]), whole)
    assert log_of(workdir) == log_of(tmp_path / "whole")
    assert "changed from step 9 on: train.steps is 8, now 12\n" in capsys.readouterr().out
    assert changes_of(workdir) == [{"step": 8, "changes": {"train.steps": [8, 12]}}]
    equal(go(long, workdir), whole)  # the flag is not needed any more


def test_the_saved_config_describes_the_whole_run(tmp_path):
    """A run that begins with its `config.json` makes the same steps as the run that changed."""
    first = replace(BASE, train__global_batch=16, optim__peak_lr=5e-3, train__steps=4)
    second = replace(BASE, train__seq_len=8, train__z_loss=1e-3, train__steps=6, train__seed=5)
    go(first, tmp_path / "run")
    accept = ["train", "optim.peak_lr"]
    go(second, tmp_path / "run", accept=accept)
    third = replace(WSD, train__global_batch=64, train__seed=5)
    last = go(third, tmp_path / "run", accept=["train", "optim"])
    assert [change["step"] for change in changes_of(tmp_path / "run")] == [4, 6]
    config = from_json((tmp_path / "run" / "config.json").read_text())
    assert [stage.stop for stage in config.stages[:-1]] == [4, 6]
    assert load_meta(find_step(tmp_path / "run")).config == config
    equal(go(config, tmp_path / "again"), last)
    assert log_of(tmp_path / "again") == log_of(tmp_path / "run")
    assert [log_of(tmp_path / "run")[step][3] for step in (4, 6, 8)] == [16 * 16, 32 * 8, 64 * 16]


RAMP = replace(
    BASE,
    train__stages="until 2: train.global_batch=8; until 5: train.global_batch=16 train.seq_len=8; "
    "until 6: train.z_loss=0.1",
)


@pytest.mark.parametrize("stop", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_a_ramp_that_is_stopped_and_resumed(tmp_path_factory, tmp_path, capsys, stop):
    workdir = tmp_path_factory.getbasetemp() / "ramp"
    if not workdir.exists():
        go(RAMP, workdir)
        said = capsys.readouterr().out
        assert "stage   from step 3 on: train.seq_len is 16, now 8; train.global_batch is 8" in said
        assert "        steps 7 to 8: as above" in said
        assert f"run     8 steps = {2 * 8 * 16 + 3 * 16 * 8 + 3 * 32 * 16:,} tokens" in said
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, stop)
        assert int(go(RAMP, tmp_path / "run").step) < 8
    parts = go(RAMP, tmp_path / "run")
    assert log_of(tmp_path / "run") == log_of(workdir)
    assert [line[3] for line in log_of(workdir).values()] == [128] * 5 + [512] * 3
    lines = [line for line in records(workdir) if "loss" in line]
    assert {line["step"] for line in lines if line["objective"] > line["loss"]} == {6}  # z-loss
    equal(parts, go(RAMP, workdir))
    assert not (tmp_path / "run" / "changes.jsonl").exists()


@pytest.mark.parametrize(
    "other",
    [
        {"train__grad_accum": 4, "train__loss_chunk": 4, "model__remat": "full"},
        {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
    ],
)
def test_what_cannot_change_the_result_needs_no_flag(trunk, tmp_path, other):
    """2e-6 is the tolerance of losses on different meshes (README): sums have other orders."""
    workdir = shutil.copytree(trunk, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "8")
    go(replace(BASE, **other), workdir)
    for step, values in log_of(workdir).items():
        np.testing.assert_allclose(values[0], log_of(trunk)[step][0], rtol=2e-6)
    assert stages_of(workdir) == ""
    (change,) = changes_of(workdir)
    assert {name.replace(".", "__") for name in change["changes"]} == set(other)


def test_a_run_is_shortened(trunk, tmp_path):
    workdir = shutil.copytree(trunk, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "8")
    short = replace(BASE, train__steps=6)
    state = go(short, workdir, accept=["train.steps"])
    assert int(state.step) == 6 and find_step(workdir).name == "6"
    with pytest.raises(
        UserError, match=r"has made 6 steps, more than train.steps=5; .*branch_from"
    ):
        run(replace(BASE, train__steps=5), workdir, accept=["train.steps"])


@pytest.mark.slow
def test_a_branch_takes_the_data_of_its_trunk(corpus, tmp_path, capsys):
    config = text_config(corpus, train__steps=4, train__checkpoint_every=2, train__seq_len=32)
    go(config, tmp_path / "trunk")
    longer = replace(config, train__steps=6)
    whole = go(longer, tmp_path / "whole")
    place = str(tmp_path / "trunk")
    branch = replace(config, train__steps=6, branch_from=place, optim__schedule="constant")
    assert int(go(branch, tmp_path / "branch").step) == 6
    assert not (tmp_path / "branch" / "data").exists()
    saved = from_json((tmp_path / "branch" / "config.json").read_text())
    assert saved.data.path == f"{place}/data"
    # The sequences are those of the run that was long from the start, each once.
    epochs = [line["epochs"] for line in records(tmp_path / "branch") if "loss" in line]
    assert epochs == [line["epochs"] for line in records(tmp_path / "whole") if "loss" in line][4:]
    assert int(whole.step) == 6
    other = tmp_path / "other"
    go(replace(config, data__validation_fraction=0.4, train__steps=3), other)
    with pytest.raises(UserError, match=r"was trained on data .*accept_other_data"):
        run(replace(branch, data__path=str(other / "data")), tmp_path / "elsewhere")
    # A branch whose shards are gone still knows where they were.
    assert int(go(branch, tmp_path / "branch").step) == 6


def test_a_run_from_weights_begins_after_what_they_have_seen(corpus, tmp_path, capsys):
    config = text_config(corpus, train__steps=5, train__seq_len=32, train__checkpoint_every=5)
    go(config, tmp_path / "first")
    tuned = replace(
        config,
        init_from=f"ckpt:{tmp_path / 'first'}",
        data__path=str(tmp_path / "first" / "data"),
        train__steps=3,
    )
    seen = load_meta(find_step(tmp_path / "first")).seen
    data = open_data(tuned, epath.Path(tmp_path))
    assert seen == {data.sources[""]: data.train.epochs(5)[""]}
    capsys.readouterr()
    found = batches_of(lambda: go(tuned, tmp_path / "tuned"))
    np.testing.assert_array_equal(found[0], data.train.rows(5, range(8))["inputs"])
    assert "data    begins at these epochs (data.start): the source 0." in capsys.readouterr().out
    meta = load_meta(find_step(tmp_path / "tuned"))
    assert meta.seen == {data.sources[""]: data.train.epochs(8)[""]}
    # It is resumed in the same place, and the third run begins after both.
    more = replace(tuned, train__steps=4)
    shutil.move(tmp_path / "first" / "checkpoints", tmp_path / "gone")
    (tmp_path / "first" / "tokenizer.model").rename(tmp_path / "gone" / "tokenizer.model")
    given = replace(more, data__tokenizer=str(tmp_path / "gone" / "tokenizer.model"))
    found = batches_of(lambda: go(given, tmp_path / "tuned", accept=["train.steps"]))
    np.testing.assert_array_equal(found[0], data.train.rows(8, range(8))["inputs"])
    # A converted copy, such as an average of steps, knows it, too.
    copy = tmp_path / "copy"
    convert(open_source("ckpt", epath.Path(tmp_path / "tuned")), "ckpt", copy)
    third = replace(tuned, init_from=f"ckpt:{copy}")
    found = batches_of(lambda: go(third, tmp_path / "third"))
    np.testing.assert_array_equal(found[0], data.train.rows(9, range(8))["inputs"])
    asked = replace(third, data__start="0")
    found = batches_of(lambda: go(asked, tmp_path / "asked"))
    np.testing.assert_array_equal(found[0], data.train.rows(0, range(8))["inputs"])
    # Its weights have still seen what the ones that it began with had.
    assert load_meta(find_step(tmp_path / "asked")).seen == load_meta(find_step(copy)).seen


def test_weights_of_an_earlier_version_do_not_say_what_they_have_seen(
    trunk, tmp_path, monkeypatch, capsys
):
    config = replace(BASE, init_from=f"ckpt:{trunk}", train__steps=3)
    go(config, tmp_path / "new")
    assert "does not say how far" not in capsys.readouterr().out
    described = origin.load_meta
    monkeypatch.setattr(origin, "load_meta", lambda *a: dataclasses.replace(described(*a), seen={}))
    go(config, tmp_path / "old")
    assert f"data    ckpt:{trunk} was trained on these data, but" in capsys.readouterr().out


def batches_of(train):
    """Returns the inputs of the training batches of a run."""
    stream, found = loop.device_batches, []

    def noted(source, *rest):
        for batch in stream(source, *rest):
            if source.epochs(1):  # not of validation
                found.append(np.asarray(batch["inputs"]))
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "device_batches", noted)
        train()
    return found


def test_a_place_that_is_no_step(trunk, tmp_path):
    assert branch_folder(str(trunk)) == epath.Path(trunk / "checkpoints" / "8")
    config = replace(BASE, branch_from=str(trunk / "checkpoints" / "5"))
    with pytest.raises(UserError, match=r"5 does not exist; the saved steps are 4, 8$"):
        run(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"nowhere does not exist$"):
        run(replace(BASE, branch_from=str(tmp_path / "nowhere")), tmp_path / "run")
    with pytest.raises(UserError, match="it is neither a work directory nor a saved step"):
        run(replace(BASE, branch_from=str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_branch_without_a_step_to_make(trunk, tmp_path):
    config = replace(BASE, train__steps=4, branch_from=str(trunk / "checkpoints" / "4"))
    message = r"has made all train.steps=4 steps, so a branch from it has no step to make"
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_branch_does_not_prepare_the_shards_that_its_trunk_names(trunk, tmp_path):
    """They may be seen from another folder only: to prepare them again could take days."""
    step = shutil.copytree(trunk / "checkpoints" / "4", tmp_path / "trunk" / "checkpoints" / "4")
    with pytest.MonkeyPatch.context() as patch:
        saved = load_meta(epath.Path(step))
        named = replace(saved.config, data__source="stdlib", data__path="shards/web")
        patch.setattr(origin, "load_meta", lambda *_: dataclasses.replace(saved, config=named))
        config = replace(named, data__path="", branch_from=str(step))
        with pytest.raises(UserError, match=r"in data.path=shards/web, which do not exist here"):
            with_data_of_trunk(config, epath.Path(tmp_path / "run"))
        there = replace(named, data__path=str(tmp_path))
        patch.setattr(origin, "load_meta", lambda *_: dataclasses.replace(saved, config=there))
        found = with_data_of_trunk(config, epath.Path(tmp_path / "run"))
        assert found.data.path == str(tmp_path)


def test_a_branch_into_a_run_is_refused(trunk, tmp_path):
    workdir = shutil.copytree(trunk, tmp_path / "run")
    branch = replace(BASE, train__steps=9, branch_from=str(trunk))
    for place in (str(trunk), str(workdir)):
        with pytest.raises(UserError, match="holds a run, and a branch .* needs a new work dir"):
            run(replace(branch, branch_from=place), workdir, accept=["train.steps"])


def test_a_new_run_goes_on_from_nothing(tmp_path):
    found = find_origin(TINY, epath.Path(tmp_path))
    assert (found.config, found.step, found.initial) == (TINY, 0, None)


def test_a_stage_that_cannot_be_trained_is_refused_at_the_start(tmp_path):
    context = replace(BASE, mesh__context=2, mesh__fsdp=1, mesh__data=4)
    with pytest.raises(UserError, match=r"the stage from step 1 on: train.seq_len=10 does not div"):
        run(replace(context, train__stages="until 4: train.seq_len=10"), tmp_path / "run")
    batch = replace(BASE, train__stages="until 4: train.z_loss=1; until 6: train.global_batch=9")
    with pytest.raises(UserError, match=r"the stage from step 5 on: train.global_batch=9"):
        run(batch, tmp_path / "run")
    backend = replace(
        BASE, train__stages="until 4: train.z_loss=1; until 6: model.attention=splash"
    )
    with pytest.raises(UserError, match="the stage from step 5 on: .*splash"):
        run(backend, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_weights_have_the_model_and_the_context_of_their_stage(tmp_path):
    config = replace(
        BASE,
        train__steps=6,
        train__checkpoint_every=2,
        model__rope_theta=5e4,
        train__stages="until 2: train.seq_len=8 model.rope_theta=1e4; until 4: train.seq_len=32",
    )
    go(config, tmp_path)
    metas = [load_meta(tmp_path / "checkpoints" / str(step)) for step in (2, 4, 6)]
    found = [(m.of_weights.model.rope_theta, m.of_weights.train.seq_len, m.context) for m in metas]
    # A later stage with shorter sequences keeps the context.
    assert found == [(1e4, 8, 8), (5e4, 32, 32), (5e4, 16, 32)]
    assert {m.config for m in metas} == {config}


def test_rope_of_initial_weights_may_be_stretched(trunk, tmp_path, capsys):
    """As in Code Llama (arXiv:2308.12950), which trains LLaMA-2 on with another RoPE theta."""
    config = replace(BASE, init_from=f"ckpt:{trunk}", train__steps=3, model__rope_theta=1e6)
    message = "rope_theta is 10000.0 in .* 1000000.0 in .*--accept_changes=model.rope_theta$"
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")
    go(config, tmp_path / "run", accept=["model.rope_theta"])
    pair = [1e4, 1e6]
    assert changes_of(tmp_path / "run") == [{"step": 0, "changes": {"model.rope_theta": pair}}]
    assert "changed from step 1 on: model.rope_theta is 10000.0" in capsys.readouterr().out
    other = replace(config, model__norm_eps=1e-3)
    with pytest.raises(UserError, match="norm_eps is 1e-06 in the weights, 0.001 in the config$"):
        run(other, tmp_path / "other", accept=["model.rope_theta"])


def test_evaluation_has_the_shape_of_the_stage(corpus, tmp_path, monkeypatch):
    stages = "until 2: train.seq_len=16 train.global_batch=16"
    config = text_config(corpus, train__steps=4, train__seq_len=32, train__stages=stages)
    config = replace(config, train__eval_every=2, train__eval_batches=1)
    stream, shapes = loop.device_batches, []

    def noted(source, start, stop, *rest):
        for batch in stream(source, start, stop, *rest):
            shapes.append(batch["inputs"].shape)
            yield batch

    monkeypatch.setattr(loop, "device_batches", noted)
    state = go(config, tmp_path)
    # Two steps and an evaluation of one batch, twice.
    assert shapes == [*[(16, 16)] * 3, *[(8, 32)] * 3]
    found = [line["eval_loss"] for line in records(tmp_path) if "eval_loss" in line]
    assert len(found) == 2 and int(state.step) == 4


def test_a_branch_does_not_evaluate_the_step_of_its_trunk(corpus, tmp_path):
    config = text_config(corpus, train__steps=4, train__checkpoint_every=2, train__seq_len=32)
    config = replace(config, train__eval_every=3)
    go(config, tmp_path / "trunk")
    step = str(tmp_path / "trunk" / "checkpoints" / "2")
    branch = replace(config, train__eval_every=2, branch_from=step)
    go(branch, tmp_path / "branch")
    evaluated = [line["step"] for line in records(tmp_path / "branch") if "eval_loss" in line]
    assert evaluated == [4]


@pytest.mark.slow
def test_streamed_data_go_on_where_the_weights_stopped(corpus, tmp_path):
    config = text_config(corpus, data__streaming=True, train__steps=4, train__seq_len=32)
    go(config, tmp_path / "first")
    stopped = load_meta(find_step(tmp_path / "first")).positions
    tokenizer = str(tmp_path / "first" / "tokenizer.model")
    tuned = replace(config, init_from=f"ckpt:{tmp_path / 'first'}", data__tokenizer=tokenizer)
    longer = replace(config, train__steps=7, data__tokenizer=tokenizer)
    go(longer, tmp_path / "whole")
    after = load_meta(find_step(tmp_path / "whole")).positions
    go(replace(tuned, train__steps=3), tmp_path / "tuned")
    assert load_meta(find_step(tmp_path / "tuned")).positions == after != stopped
    go(replace(tuned, train__steps=4, data__start="0"), tmp_path / "asked")
    assert load_meta(find_step(tmp_path / "asked")).positions == stopped


@pytest.mark.slow
def test_many_lengths_from_one_trunk_cost_what_the_law_says(tmp_path):
    """(1 - f) l_max + f sum(l_i) steps in place of sum(l_i) (arXiv:2405.18392, section 5)."""
    part, lengths = 0.2, [10 * number for number in range(1, 9)]
    stable = [round((1 - part) * length) for length in lengths]
    config = replace(
        BASE, train__steps=stable[-1], train__checkpoint_every=8, train__keep_checkpoints=99
    )
    go(config, tmp_path / "trunk")
    made = len(log_of(tmp_path / "trunk"))
    for length, begin in zip(lengths, stable, strict=True):
        cooldown = replace(
            WSD,
            train__steps=length,
            optim__decay_steps=length - begin,
            branch_from=str(tmp_path / "trunk" / "checkpoints" / str(begin)),
        )
        go(cooldown, tmp_path / f"{length}")
        log = log_of(tmp_path / f"{length}")
        assert min(log) == begin + 1 and max(log) == length
        made += len(log)
    expected = (1 - part) * lengths[-1] + part * sum(lengths)
    assert made == round(expected) == 136 and sum(lengths) == 360
    whole = replace(WSD, train__steps=30, optim__decay_steps=6)
    go(whole, tmp_path / "whole")
    log = log_of(tmp_path / "whole")
    assert {step: log[step] for step in range(25, 31)} == log_of(tmp_path / "30")
