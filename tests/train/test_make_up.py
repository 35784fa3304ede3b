"""A stop interrupts an evaluation; the next start of the run makes up for it."""

import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint import manifest
from llama_jax.checkpoint.saved_step import load_meta
from llama_jax.data.batches import ValidationBatches
from llama_jax.train import loop
from llama_jax.train.run import train
from tests.helpers import records, replace, text_config

pytestmark = pytest.mark.usefixtures("shared_steps")


class Killed(BaseException):
    """Stands in for a kill: no code handles it."""


@pytest.fixture(scope="module")
def config(corpus, shards):
    return text_config(
        corpus,
        data__path=str(shards),
        mesh__fsdp=8,
        train__seq_len=32,
        train__steps=8,
        train__eval_every=2,
        train__eval_batches=2,
        train__checkpoint_every=4,
        train__sample_prompt="",
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """Returns the directory of a run without a stop, and the state at its end."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, jax.device_get(train(config, workdir))


def stop_in_evaluation(patch, number):
    """Raises SIGTERM in the evaluation of this number, from 1."""
    stream, seen = loop.device_batches, []

    def stopping(source, *rest):
        if isinstance(source, ValidationBatches):
            seen.append(source)
            if len(seen) == number:
                signal.raise_signal(signal.SIGTERM)
        yield from stream(source, *rest)

    patch.setattr(loop, "device_batches", stopping)


def evaluations(workdir):
    found = [line for line in records(workdir) if "eval_loss" in line]
    return [(line["step"], line["eval_loss"].hex(), line["epochs"]) for line in found]


def steps_of(workdir):
    lines = [line for line in records(workdir) if "loss" in line]
    return [(line["step"], line["loss"].hex(), line["grad_norm"].hex()) for line in lines]


def eval_loss(workdir, step):
    return load_meta(workdir / "checkpoints" / str(step)).eval_loss


def good(workdir):
    folders = [epath.Path(path) for path in (workdir / "checkpoints").iterdir()]
    return [manifest.first_damage(folder) for folder in folders] == [""] * len(folders)


def start_again(config, workdir, whole, times=2):
    """Starts the run again some times, and compares it with the run without a stop."""
    for _ in range(times):
        state = jax.device_get(train(config, workdir))
    jax.tree.map(np.testing.assert_array_equal, state, whole[1])
    assert evaluations(workdir) == evaluations(whole[0])
    assert steps_of(workdir) == steps_of(whole[0])
    for step in (path.name for path in (workdir / "checkpoints").iterdir()):
        expected = {step: loss for step, loss, _ in evaluations(whole[0])}
        assert eval_loss(workdir, step).hex() == expected[int(step)]
    assert good(workdir)


@pytest.mark.parametrize(
    "number", [2, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 3))]
)
def test_a_stop_on_an_evaluation_step(config, whole, tmp_path, monkeypatch, capsys, number):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch, number)
        assert int(train(config, run).step) == 2 * number
    assert len(evaluations(run)) == number - 1 and eval_loss(run, 2 * number) is None
    capsys.readouterr()
    start_again(config, run, whole)
    assert capsys.readouterr().out.count("has no evaluation yet: it is made now") == 1


@pytest.fixture(scope="module")
def stopped_at_the_end(config, whole, tmp_path_factory):
    """Returns a run that has done all steps but not the last evaluation."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_in_evaluation(patch, 4)
        assert int(train(config, run).step) == 8
    assert eval_loss(run, 8) is None and len(evaluations(run)) == 3
    return run


def test_a_finished_run_makes_up_for_its_last(config, whole, stopped_at_the_end, tmp_path, capsys):
    run = shutil.copytree(stopped_at_the_end, tmp_path / "run")
    plot = (run / "plots" / "loss.png").read_bytes()
    start_again(config, run, whole, 3)
    assert capsys.readouterr().out.count("step 8  eval_loss ") == 1
    assert (run / "plots" / "loss.png").read_bytes() != plot


def test_a_stop_while_it_is_made_up_for(
    config, whole, stopped_at_the_end, tmp_path, monkeypatch, capsys
):
    run = shutil.copytree(stopped_at_the_end, tmp_path / "run")
    for _ in range(2):
        with monkeypatch.context() as patch:
            stop_in_evaluation(patch, 1)
            train(config, run)
        assert "stopped at step 8, saved; run the same command again" in capsys.readouterr().out
        assert eval_loss(run, 8) is None and len(evaluations(run)) == 3
    start_again(config, run, whole)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_kill_while_it_is_written_down(
    config, whole, stopped_at_the_end, tmp_path, monkeypatch, writes
):
    """The kill comes after the record, after the manifest, or after the file is written."""
    run = shutil.copytree(stopped_at_the_end, tmp_path / "run")
    replace_file, done = manifest._replace, []

    def killed(path, data):
        if len(done) == writes:
            raise Killed
        done.append(path.name)
        replace_file(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_replace", killed)
        with pytest.raises(Killed):
            train(config, run)
    assert done == ["manifest.json", "metadata"][:writes]
    assert good(run)
    assert (eval_loss(run, 8) is None) == (writes < 2)
    assert len(evaluations(run)) == 4
    start_again(config, run, whole)


def test_a_kill_before_the_record_is_written(
    config, whole, stopped_at_the_end, tmp_path, monkeypatch
):
    run = shutil.copytree(stopped_at_the_end, tmp_path / "run")

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("llama_jax.train.instruments.metrics.Metrics.write", killed)
        with pytest.raises(Killed):
            train(config, run)
    assert len(evaluations(run)) == 3
    start_again(config, run, whole)


def test_a_kill_between_an_evaluation_and_its_save(config, whole, tmp_path, monkeypatch):
    """The resumed run evaluates at the same step again, with the same result."""
    run = tmp_path / "run"

    def killed(saver, items, meta):
        if meta.step == 8:
            raise Killed
        return save(saver, items, meta)

    with monkeypatch.context() as patch:
        save = loop.Checkpointer.save
        patch.setattr(loop.Checkpointer, "save", killed)
        with pytest.raises(Killed):
            train(config, run)
    train(config, run)
    found = evaluations(run)
    # The evaluations of steps 6 and 8 are recorded twice.
    assert found == [*evaluations(whole[0]), *evaluations(whole[0])[2:]]


def test_the_best_is_kept_though_its_evaluation_was_stopped(config, tmp_path, monkeypatch):
    """The learning rate is much too high, so the first checkpoint is the best one."""
    changes = {"train__keep_checkpoints": 1, "train__keep_best": 1, "train__checkpoint_every": 2}
    config = replace(config, train__steps=4, optim__peak_lr=5.0, **changes)
    train(config, tmp_path / "whole")
    losses = {step: float.fromhex(loss) for step, loss, _ in evaluations(tmp_path / "whole")}
    assert min(losses, key=losses.get) == 2
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch, 1)
        train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    for workdir in (tmp_path / "whole", tmp_path / "run"):
        assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")


def test_older_steps_go_when_the_last_turns_out_to_be_best(config, tmp_path, monkeypatch):
    config = replace(config, train__keep_checkpoints=1, train__keep_best=1)
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch, 4)
        train(config, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["4", "8"]
    train(config, tmp_path / "run")
    assert eval_loss(tmp_path / "run", 8) < 5.5
    assert [path.name for path in checkpoints.iterdir()] == ["8"]


def test_a_full_disk_ends_no_run(config, whole, stopped_at_the_end, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(stopped_at_the_end, tmp_path / "run")

    def full(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_replace", full)
        train(config, run)
    out = capsys.readouterr().out
    assert "warning: eval_loss could not be added to checkpoint 8: [Errno 28] No space" in out
    assert eval_loss(run, 8) is None and good(run)
    start_again(config, run, whole)


@pytest.mark.parametrize(
    "changes",
    [{"train__eval_every": 3}, {"data__source": "synthetic", "data__path": ""}],
)
def test_what_needs_no_evaluation_gets_none(config, tmp_path, monkeypatch, changes):
    """A step between two evaluations, and a run without held-out text, have none to make up for."""
    config = replace(config, **changes)
    stream = loop.device_batches

    def stopping(source, start, *rest):
        for step, batch in enumerate(stream(source, start, *rest), start=start):
            if step == 4 and not isinstance(source, ValidationBatches):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(loop, "device_batches", stopping)
        assert int(train(config, tmp_path / "run").step) == 5
    before = len(records(tmp_path / "run"))
    name = "llama_jax.train.run.run_missed_evaluation"
    monkeypatch.setattr(name, lambda *_: pytest.fail("evaluated"))
    train(config, tmp_path / "run")
    assert len(records(tmp_path / "run")) > before
