"""What the loop must not do: wait for the device, move arrays implicitly, compile twice."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import loop, metrics
from llama_jax.step import TrainState
from llama_jax.train import train
from tests.helpers import replace, text_config
from tests.test_train import SHORT, FakeRun


class Output:
    """Stands in for an array of a step: notes when the host asks for its value or waits for it."""

    def __init__(self, events, step):
        self.wait = lambda value: (events.append(("wait", step)), value)[1]

    def __array__(self, dtype=None, copy=None):
        return self.wait(np.zeros((), np.int32))

    def __int__(self):
        return self.wait(0)

    def __index__(self):
        return self.wait(0)

    def __float__(self):
        return self.wait(0.0)

    def __bool__(self):
        return self.wait(True)

    def __repr__(self):
        return self.wait("")

    def item(self):
        return self.wait(0)

    def block_until_ready(self):
        return self.wait(self)


def test_every_way_to_wait_is_noted():
    events = []
    output = Output(events, 0)
    ways = (int, float, bool, str, np.asarray, jax.device_get, jax.block_until_ready)
    for number, way in enumerate((*ways, lambda x: x.item()), start=1):
        way(output)
        assert len(events) == number, way


@pytest.mark.parametrize("log_every", [1, 2])
def test_the_loop_waits_for_nothing_but_the_previous_step(log_every):
    """The contract: a step but the first is read when its successor is already running."""
    run = FakeRun(
        replace(SHORT, train__log_every=log_every, train__eval_every=4, train__steps=8),
    )
    events = []

    def outputs(step):
        skips = types.SimpleNamespace(in_row=Output(events, step))
        return TrainState(*(Output(events, step) for _ in range(3)), skips)

    def dispatch(state, batch):
        step = sum(kind == "run" for kind, _ in events) + 1
        events.append(("run", step))
        return outputs(step), {name: Output(events, step) for name in ("loss", "grad_norm")}

    run.compiled.train = dispatch
    run.save = lambda state, meta: events.append(("save", meta.step))
    log = metrics.Metrics([], metrics.Speed(run.config, 8, None))
    run.start, run.push, run.flush, run.write = log.start, log.push, log.flush, log.write
    run.run(outputs(0))
    order = [event for event, _ in itertools.groupby(events)]
    expected = [("wait", 0)]  # which step it starts from
    for step in range(1, 9):
        expected.append(("run", step))
        if step == 1:  # which compiles, on other processes too
            expected.append(("wait", 1))
        elif (step - 1) % log_every == 0 and step - 1 != 4:
            expected.append(("wait", step - 1))
        if step in (4, 8):  # evaluation: all that ran is logged first
            expected.append(("wait", step))
        if step % 3 == 0 or step == 8:
            if step != 8:  # what is copied is looked at: a bad state is not saved
                expected.append(("wait", step))
            expected.append(("save", step))
    assert order == expected


def test_an_implicit_transfer_is_an_error():
    run = FakeRun(SHORT)
    double = jax.jit(lambda x: 2 * x)
    run.compiled.train = lambda state, batch: double(np.ones(3))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run.run()


@pytest.fixture
def compiled_names(monkeypatch):
    """Names of the programs that are compiled, as it happens; from the cache counts too."""
    names = []

    def listen(event, duration, **what):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(what["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def compiled_before_each_batch(
    config, workdir, names, monkeypatch, change=lambda step, batch: batch
):
    """Trains; what was compiled between the batches: [before the first, .., after the last]."""
    stream = loop.stream
    marks = []

    def marking(source, start, stop, *rest):
        for step, batch in enumerate(stream(source, start, stop, *rest), start=start):
            if stop == config.train.steps:
                marks.append(len(names))
                batch = change(step, batch)
            yield batch

    monkeypatch.setattr(loop, "stream", marking)
    train(config, workdir)
    ends = [0, *marks, len(names)]
    return [names[a:b] for a, b in itertools.pairwise(ends)]


@pytest.fixture
def run_config(corpus, shards):
    """Two evaluations and saves, and a profile."""
    return text_config(
        corpus,
        data__path=str(shards),
        mesh__fsdp=8,
        train__seq_len=32,
        train__steps=9,
        train__eval_every=3,
        train__checkpoint_every=3,
        train__profile_steps="5,6",
    )


def test_nothing_is_compiled_after_the_first_of_each(
    run_config, tmp_path, compiled_names, monkeypatch
):
    between = compiled_before_each_batch(run_config, tmp_path / "run", compiled_names, monkeypatch)
    assert between[1] == ["jit(train_step)"]
    assert between[2] == []
    assert between[3].count("jit(eval_step)") == 1 and "jit(train_step)" not in between[3]
    assert between[4:] == [[]] * 6


def test_a_recompilation_is_seen(run_config, tmp_path, compiled_names, monkeypatch):
    def other_dtype(step, batch):
        weights = batch["weights"].astype(jnp.bfloat16) if step == 7 else batch["weights"]
        return {**batch, "weights": weights}

    between = compiled_before_each_batch(
        run_config, tmp_path / "run", compiled_names, monkeypatch, other_dtype
    )
    assert "jit(train_step)" in between[8]
