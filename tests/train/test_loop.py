"""The loop never waits for the device too early, moves arrays implicitly, or compiles twice."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.cost import flops_per_token
from llama_jax.train import loop
from llama_jax.train.instruments import metrics
from llama_jax.train.instruments.writers import AllWriters
from llama_jax.train.run import train
from llama_jax.train.step import TrainState
from tests.helpers import replace, text_config
from tests.train.test_run import SHORT, FakeRun


class Output:
    """Stands in for an array of a step; records when the host waits for it or reads its value."""

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
    """Every step but the first is read while the next one runs."""
    run = FakeRun(
        replace(SHORT, train__log_every=log_every, train__eval_every=4, train__steps=8),
    )
    events = []

    def outputs(step):
        skips = types.SimpleNamespace(in_row=Output(events, step), to_dict=dict)
        return TrainState(*(Output(events, step) for _ in range(3)), skips)

    def dispatch(state, batch):
        step = sum(kind == "run" for kind, _ in events) + 1
        events.append(("run", step))
        return outputs(step), {name: Output(events, step) for name in ("loss", "grad_norm")}

    run.compiled.train = dispatch
    run.save = lambda state, meta: events.append(("save", meta.step))
    log = metrics.Metrics(AllWriters(list), metrics.Speed(run.config, 8, None))
    run.start, run.push, run.flush, run.write = log.start, log.push, log.flush, log.write
    run.run(outputs(0))
    order = [event for event, _ in itertools.groupby(events)]
    expected = [("wait", 0)]  # the loop asks for the step that it starts from
    for step in range(1, 9):
        expected.append(("run", step))
        if step == 1:  # it compiles, on other processes too
            expected.append(("wait", 1))
        elif (step - 1) % log_every == 0 and step - 1 != 4:
            expected.append(("wait", step - 1))
        if step in (4, 8):  # all steps are logged before an evaluation
            expected.append(("wait", step))
        if step % 3 == 0 or step == 8:
            if step != 8:  # the skip counter is read before a save, so that no bad state is saved
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
    """Yields a growing list of the programs that are compiled or loaded from the cache."""
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
    """Trains; returns the programs compiled before the first batch, .., after the last batch."""
    stream = loop.device_batches
    marks = []

    def marking(source, start, stop, *rest):
        for step, batch in enumerate(stream(source, start, stop, *rest), start=start):
            if stop == config.train.steps:
                marks.append(len(names))
                batch = change(step, batch)
            yield batch

    monkeypatch.setattr(loop, "device_batches", marking)
    train(config, workdir)
    ends = [0, *marks, len(names)]
    return [names[a:b] for a, b in itertools.pairwise(ends)]


@pytest.fixture
def run_config(corpus, shards):
    """Returns a config with two evaluations and saves, and a profile."""
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


# The logged speed, which is that of steps only.


class Clock:
    """Replaces `time.perf_counter` by `now`, which the test sets."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)


class Device:
    """Runs steps one after another in simulated time; the host does not wait for it.

    With `inline` the call of a step returns when the step is done, as on some backends.
    """

    def __init__(self, clock, seconds, inline):
        self.clock, self.seconds, self.inline, self.idle_at = clock, seconds, inline, 0.0

    def step(self):
        began = max(self.clock.now, self.idle_at)
        self.idle_at = began + self.seconds
        number = DeviceNumber(self.clock, self.idle_at)
        if self.inline:
            number.block_until_ready()
        return number


class DeviceNumber:
    """A result of the device: waiting for it moves the clock to the time at which it is ready."""

    def __init__(self, clock, done_at):
        self.clock, self.done_at = clock, done_at

    def is_ready(self):
        return self.clock.now >= self.done_at

    def block_until_ready(self):
        self.clock.now = max(self.clock.now, self.done_at)
        return self

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.zeros((), np.int32)

    def __int__(self):
        return int(self.__array__())


STEP_S, COMPILE_S, SAVE_S, EVAL_S, DEVICES = 2.0, 500.0, 70.0, 31.0, 4


def timed_run(monkeypatch, config, inline, start=0, compiles_at=()):
    """Runs the loop in simulated time; returns its records, and the seconds until the last one."""
    clock = Clock(monkeypatch)
    run, device = FakeRun(config), Device(clock, STEP_S, inline)
    dispatched = start

    def dispatch(state, batch):
        nonlocal dispatched
        dispatched += 1
        if dispatched == start + 1 or dispatched in compiles_at:
            clock.now += COMPILE_S
            if dispatched in compiles_at:
                jax.jit(lambda x: x + dispatched)(device_zero)  # a new program
        number = device.step()
        state = TrainState(
            number, number, number, types.SimpleNamespace(in_row=number, to_dict=dict)
        )
        return state, {"loss": number}

    def save(state, meta):
        clock.now = max(clock.now, device.idle_at) + SAVE_S

    def evaluate(*_):
        clock.now = max(clock.now, device.idle_at) + EVAL_S
        return 2.5

    class Recorder:
        def write(self, step, record):
            if "loss" in record:
                found.append((step, record))
                times.append(clock.now - 1000.0)

    found, times, device_zero = [], [], jnp.float32(0)
    run.compiled.train, run.save = dispatch, save
    monkeypatch.setattr(loop, "mean_validation_loss", evaluate)
    log = metrics.Metrics(Recorder(), metrics.Speed(config, DEVICES, 1e9))
    run.start, run.push, run.flush, run.write = log.start, log.push, log.flush, log.write
    zero = np.int32(start)
    run.run(TrainState(zero, zero, zero, types.SimpleNamespace(in_row=zero, to_dict=dict)))
    log.flush()
    return found, times[-1]


TIMED = replace(
    SHORT, train__steps=12, train__log_every=1, train__eval_every=100, train__checkpoint_every=100
)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("log_every", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__checkpoint_every": 3},
        {"train__checkpoint_every": 1},
        {"train__eval_every": 4},
        {"train__eval_every": 3, "train__checkpoint_every": 2},
    ],
)
def test_tokens_per_second_are_of_steps_only(monkeypatch, changes, log_every, inline):
    """The speed counts no save, no evaluation and no first compilation, at any logging interval."""
    config = replace(TIMED, train__log_every=log_every, **changes)
    found, seconds = timed_run(monkeypatch, config, inline)
    assert [step for step, _ in found] == list(range(log_every, 13, log_every))
    rate = config.train.global_batch * config.train.seq_len / STEP_S
    flops = flops_per_token(config.model, config.lora, config.train.seq_len)
    for step, record in found:
        if step == 1:  # step 1 compiled, and no other step has been timed
            assert record["tokens_per_second"] is None and record["mfu"] is None
            continue
        assert record["tokens_per_second"] == pytest.approx(rate, rel=1e-12)
        assert record["mfu"] == pytest.approx(rate * flops / (1e9 * DEVICES), rel=1e-12)
    # All of the time counts as time of the chips.
    total = sum(record["chip_seconds"] for _, record in found)
    assert total == pytest.approx(seconds * DEVICES, rel=1e-12)


@pytest.mark.parametrize("inline", [False, True])
def test_a_run_that_goes_on_times_no_compile_either(monkeypatch, inline):
    found, _ = timed_run(monkeypatch, replace(TIMED, train__log_every=4), inline, start=7)
    rate = TIMED.train.global_batch * TIMED.train.seq_len / STEP_S
    # Step 8 compiles.
    speeds = [(step, record["tokens_per_second"]) for step, record in found]
    assert speeds == [(8, None), (12, pytest.approx(rate))]


@pytest.mark.parametrize("inline", [False, True])
def test_a_later_compile_is_left_out(monkeypatch, inline):
    """Step 6 compiles, for example because its batch has another shape."""
    found, _ = timed_run(monkeypatch, TIMED, inline, compiles_at=(6,))
    rate = TIMED.train.global_batch * TIMED.train.seq_len / STEP_S
    speeds = {step: record["tokens_per_second"] for step, record in found}
    assert speeds.pop(1) is None and speeds.pop(6) is None
    speeds.pop(5)  # step 5 is read only after step 6 has compiled
    assert speeds == {step: pytest.approx(rate) for step in (2, 3, 4, 7, 8, 9, 10, 11, 12)}
