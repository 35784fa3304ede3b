"""A run that meets a stretch of bad batches goes back to a checkpoint from before them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.retention import saved_steps
from llama_jax.checkpoint.saved_step import DamagedCheckpoint, load_meta
from llama_jax.data.batches import ValidationBatches
from llama_jax.errors import UserError
from llama_jax.parallel.mesh import make_mesh
from llama_jax.train import loop
from llama_jax.train import run as run_lib
from llama_jax.train.bad_steps import LOSS
from llama_jax.train.step import TrainState
from tests.faults import test_hosts
from tests.helpers import flip_bit, records, replace, shared_step, text_config
from tests.train.test_run import stop_after

pytestmark = pytest.mark.usefixtures("shared_steps")

STEPS, BAD = 13, (7, 8, 9)
# The log of step 8 is read while step 9 runs. The first bad step is 7; the newest regular
# checkpoint at least two steps before it is 4.
AT, TO = 9, 4
REASONS = "the loss is not finite; gradients are not finite in embed, attn, mlp, norms, lm_head"


@pytest.fixture(scope="module")
def config(corpus, shards):
    return text_config(
        corpus,
        data__path=str(shards),
        model__n_layers=1,
        mesh__fsdp=8,
        train__steps=STEPS,
        train__eval_every=STEPS,
        train__log_every=2,
        train__checkpoint_every=2,
        train__keep_checkpoints=1,
        train__max_skipped=2,
        train__max_rewinds=1,
        train__rewind_steps=2,
    )


def poison(monkeypatch, *bad, before=lambda step: None):
    """Makes the weights of the batches of these steps (from 1) NaN."""
    stream = loop.device_batches

    def poisoning(source, start, stop, *rest):
        for step, batch in enumerate(stream(source, start, stop, *rest), start=start + 1):
            if not isinstance(source, ValidationBatches):
                before(step)
                if step in bad:
                    batch = {**batch, "weights": batch["weights"] * jnp.nan}
            yield batch

    monkeypatch.setattr(loop, "device_batches", poisoning)


def run(config, workdir):
    return jax.device_get(run_lib.train(config, workdir))


def rewinds(workdir):
    return [r for r in records(workdir) if r.get("event") == "rewound"]


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def rewound(config, tmp_path_factory):
    """Returns the last state and the directory of a run that was disturbed by its data only."""
    workdir = tmp_path_factory.mktemp("rewound") / "run"
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, *BAD)
        return run(config, workdir), workdir


def test_it_goes_on_from_the_old_weights_with_the_new_batches(config, rewound, tmp_path):
    """The twin trains to the checkpoint, leaves out the batches that follow it, and trains on."""
    state, _ = rewound
    mesh = make_mesh(config.mesh)
    data = run_lib.open_data(config, epath.Path(tmp_path))
    with jax.set_mesh(mesh):
        compiled = shared_step(config, mesh)
        twin = compiled.init(jax.random.key(config.train.seed))
        shape = (config.train.global_batch, config.train.seq_len)
        for step in (*range(TO), *range(AT, STEPS)):
            if step == AT:
                place = twin.step.sharding
                counts = {"total": AT - TO, "last": AT, "reasons": 2 * LOSS - 1}
                placed = jax.device_put({n: np.int32(c) for n, c in counts.items()}, place)
                skips = dataclasses.replace(twin.skips, **placed)
                at = jax.device_put(np.int32(AT), place)
                twin = TrainState(at, twin.params, twin.opt_state, skips)
            batch = next(
                loop.device_batches(data.train, step, step + 1, compiled.batch_sharding, *shape)
            )
            twin, _ = compiled.train(twin, batch)
    assert int(state.step) == STEPS
    assert_same(state, jax.device_get(twin))


def test_it_is_said_and_written_down(config, rewound, tmp_path, monkeypatch, capsys):
    """The same command in another directory does the same."""
    state, workdir = rewound
    poison(monkeypatch, *BAD)
    assert_same(run(config, tmp_path), state)
    out = capsys.readouterr().out
    assert (
        "rewound at step 9 to the weights of step 4, skipping 5 batches: steps from 7 on made "
        f"no update: {REASONS} (train.max_rewinds: 1 of 1)\n"
    ) in out
    assert "rewound      at step 9, to the weights of step 4\n" in out
    event = {"step": 9, "event": "rewound", "from": 9, "to": 4, "passed_over": 5}
    assert rewinds(tmp_path) == rewinds(workdir) == [{**event, "reasons": REASONS}]
    losses = [
        [(r["step"], r["loss"]) for r in records(w) if "loss" in r] for w in (tmp_path, workdir)
    ]
    assert losses[0] == losses[1]
    # Steps between the two are no longer needed; step 4 may be needed for another rewind.
    assert saved_steps(epath.Path(workdir / "checkpoints")) == [4, 9, 10, 12, 13]
    metas = {step: load_meta(workdir / "checkpoints" / str(step)) for step in (4, 9, 13)}
    assert [meta.rewinds for meta in metas.values()] == [[], [[9, 4]], [[9, 4]]]


def test_it_goes_back_over_the_end_of_a_stage(config, tmp_path, monkeypatch):
    """The weights are those of the first stage, and the data go on in the second one."""
    stages = "until 6: train.global_batch=16; until 11: train.z_loss=0.1"
    config = replace(config, train__stages=stages, train__log_every=1)
    poison(monkeypatch, *BAD)
    state = run(config, tmp_path / "whole")
    logged = [r for r in records(tmp_path / "whole") if r.get("loss") is not None]
    again = logged[[r["step"] for r in logged].index(11) :]  # after the rewind
    (event,) = rewinds(tmp_path / "whole")
    assert event["from"] in (8, 9) and event["to"] == TO and int(state.step) == STEPS
    tokens = {r["step"]: r["tokens"] for r in logged}
    assert tokens[4] == 2 * tokens[12] == 2 * tokens[11] > 0
    assert [r["objective"] > r["loss"] for r in again] == [True, False, False]
    stop_after(monkeypatch, 11)
    assert int(run(config, tmp_path / "parts").step) < STEPS
    assert_same(run(config, tmp_path / "parts"), state)
    assert rewinds(tmp_path / "parts") == [event]


@pytest.mark.parametrize(
    "stops",
    [(5,), (8, 9, 10), *(pytest.param((step,), marks=pytest.mark.slow) for step in (8, 9))],
    ids=str,
)
def test_stopping_and_starting_changes_nothing(config, rewound, tmp_path, monkeypatch, stops):
    """The run never rewinds to a save that only a stop made, even if it is the newest.

    If a stop comes before the log of a step is checked, the next start checks it.
    """
    poison(monkeypatch, *BAD)
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, stop - 1)
            assert int(run(config, tmp_path).step) == stop
    assert_same(run(config, tmp_path), rewound[0])
    assert len(rewinds(tmp_path)) == 1


def test_streamed_data_go_on(config, tmp_path, monkeypatch):
    """The position in the stream is saved with the rewound weights."""
    config = replace(config, data__streaming=True, data__path="")
    poison(monkeypatch, *BAD)
    whole = run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, AT - 1)
        assert int(run(config, tmp_path / "parts").step) == AT
    assert_same(run(config, tmp_path / "parts"), whole)
    assert len(rewinds(tmp_path / "whole")) == len(rewinds(tmp_path / "parts")) == 1


def test_killed_before_it_is_saved_it_rewinds_again(config, rewound, tmp_path, monkeypatch):
    poison(monkeypatch, *BAD)
    save = Checkpointer.save

    def killed(saver, items, meta):
        if meta.step == AT:
            raise KeyboardInterrupt
        save(saver, items, meta)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path)
    assert saved_steps(epath.Path(tmp_path / "checkpoints"))[-1] == 8
    assert_same(run(config, tmp_path), rewound[0])
    first, second = rewinds(tmp_path)
    assert first == second


@pytest.mark.parametrize(
    "changes",
    [{"eval_every": 4}, pytest.param({"profile_steps": "9,9"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_who_reads_the_log_first_changes_nothing(config, rewound, tmp_path, monkeypatch, changes):
    """A profile or an evaluation after step 8 reads the log of it before the next step runs."""
    poison(monkeypatch, *BAD)
    config = replace(config, **{f"train__{name}": value for name, value in changes.items()})
    assert_same(run(config, tmp_path), rewound[0])
    assert len(rewinds(tmp_path)) == 1


@pytest.mark.slow  # it starts two processes
def test_processes_go_back_together(config, tmp_path):
    """Process 0 alone traces a profile, and so reads the log of step 8 earlier than process 1."""
    path = tmp_path / "config.json"
    path.write_text(replace(config, train__profile_steps="9,9").to_json())
    outputs = test_hosts.run(tmp_path / "run", 2, "rewind_child", path)
    first, second = map(test_hosts.state_in, outputs)
    assert first == second and first[:2] == [STEPS, AT - TO]
    assert [(r["from"], r["to"]) for r in rewinds(tmp_path / "run")] == [(AT, TO)]


@pytest.mark.parametrize("allowed", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_it_rewinds_so_many_times(config, tmp_path, monkeypatch, allowed):
    """The second rewind goes back to the step that the first one saved, and no further."""
    poison(monkeypatch, *BAD, 11, 12)
    config = replace(config, train__max_rewinds=allowed, train__log_every=1)
    if allowed == 1:
        with pytest.raises(UserError) as caught:
            run(config, tmp_path)
        message = str(caught.value)
        assert message.startswith("steps 11 to ") and "\n" not in message
        assert message.endswith("; train.max_rewinds=1 rewinds were made")
    else:
        assert run(config, tmp_path).step == STEPS
    assert [(r["from"], r["to"]) for r in rewinds(tmp_path)] == [(9, 4), (13, 9)][:allowed]


def test_nothing_to_go_back_to(config, tmp_path, monkeypatch):
    poison(monkeypatch, 3, 4, 5)
    with pytest.raises(UserError) as caught:
        run(config, tmp_path)
    message = str(caught.value)
    assert message.startswith("steps 3 to 4 made no update") and "\n" not in message
    assert "Nothing was saved, the last checkpoint is 2; " in message
    assert message.endswith(
        "; no good checkpoint of step 1 or before is left to rewind to (train.rewind_steps=2)"
    )
    assert rewinds(tmp_path) == []


@pytest.mark.parametrize("kind", ["fingerprint", pytest.param("file", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_passed_over(config, tmp_path, monkeypatch, capsys, kind):
    """The damage shows either in the files or only in the arrays that are read from them."""
    folder = tmp_path / "checkpoints" / "4"

    def damage(step):
        if step == 9 and kind == "file":
            path = max((folder / "params").rglob("d/*"), key=lambda p: p.stat().st_size)
            flip_bit(path, 8 * (path.stat().st_size // 2))

    if kind == "fingerprint":
        restore = Checkpointer.restore

        def unlike(saver, step, targets):
            if step == 4:
                raise DamagedCheckpoint("not what was saved")
            return restore(saver, step, targets)

        monkeypatch.setattr(Checkpointer, "restore", unlike)
    poison(monkeypatch, *BAD, before=damage)
    state = run(replace(config, train__keep_checkpoints=9), tmp_path)
    assert [(r["from"], r["to"]) for r in rewinds(tmp_path)] == [(9, 2)]
    assert int(state.skips.total) == 7
    said = "holds other bytes than were written" if kind == "file" else "not what was saved"
    assert f"{said}; set aside as {folder}.damaged, going on from step 2" in capsys.readouterr().out


def test_weights_that_a_fault_has_broken_are_left_behind_too(config, tmp_path, monkeypatch):
    jit_step_ = run_lib.jit_step

    def faulty(config, mesh, parts):
        compiled = jit_step_(config, mesh, parts)

        @jax.jit
        def break_weight(state):
            value = jnp.where(state.step == 5, jnp.nan, 0)
            params = {**state.params, "final_norm": state.params["final_norm"] + value}
            return state.replace(params=params)

        def train(state, batch):
            state, metrics = compiled.train(state, batch)
            return break_weight(state), metrics

        return dataclasses.replace(compiled, train=train)

    monkeypatch.setattr(run_lib, "jit_step", faulty)
    often = replace(config, train__log_every=1, train__checkpoint_every=4)
    state = run(often, tmp_path)
    assert [(r["from"], r["to"]) for r in rewinds(tmp_path)] == [(8, 4)]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert int(state.skips.in_row) == 0 and int(state.step) == STEPS
