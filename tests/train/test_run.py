"""The order of the loop's actions, checked with fakes, and whole runs in this process."""

import dataclasses
import functools
import json
import shutil
import signal
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.saved_step import StepMeta, find_step, load_meta
from llama_jax.config import LoraConfig
from llama_jax.data.batches import SyntheticBatches
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.source import BatchSource
from llama_jax.data.training_data import TrainingData, open_data
from llama_jax.errors import UserError
from llama_jax.model.cost import adapter_count, frozen_bytes, parameter_count
from llama_jax.parallel.sharding import batch_sharding
from llama_jax.train import loop, start
from llama_jax.train import run as run_lib
from llama_jax.train.instruments.goodput import Goodput
from llama_jax.train.instruments.profiler import Profiler
from llama_jax.train.instruments.signals import StopRequest
from llama_jax.train.instruments.watchdog import Watchdog
from llama_jax.train.parts import LLAMA_PARTS
from llama_jax.train.resume import check_workdir
from llama_jax.train.rewind import Rewinder
from llama_jax.train.run import check_memory, train
from llama_jax.train.step import jit_step, model_weights
from tests.helpers import (
    LOOP_FIELDS,
    ROOT,
    TINY,
    field_names,
    mesh_of,
    records,
    replace,
    text_config,
    with_adapters,
)

pytestmark = pytest.mark.usefixtures("shared_steps")


@dataclasses.dataclass(frozen=True)
class FakeState:
    step: int
    params: None = None
    frozen: None = None
    skips: Any = dataclasses.field(default_factory=lambda: types.SimpleNamespace(in_row=0))

    def to_items(self):
        return {"step": self.step}


class FakeRun:
    """Records what the loop does, in order."""

    def __init__(self, config, shards=None, stop_at=None):
        self.events, self.config, self.stop = [], config, StopRequest()
        self.stop_at = stop_at
        source = SyntheticBatches(config.model.vocab_size, 16, 8, config.train.seed)
        validation = SyntheticBatches(config.model.vocab_size, 16, 8, config.train.seed)
        validation.n_sequences = 100
        self.data = TrainingData(source, validation, None, "fake")
        self.compiled = types.SimpleNamespace(
            config=config,
            batch_sharding=batch_sharding(mesh_of((1, 1, 1, 1))),
            train=self.train,
            evaluate=self.evaluate,
            weights=lambda state: model_weights(state, config),
        )

    def train(self, state, batch):
        first = int(np.asarray(batch["inputs"])[0, 0])
        self.events.append(("train", state.step, first))
        if state.step + 1 == self.stop_at:
            self.stop_now()
        return FakeState(state.step + 1), {"loss": np.float32(state.step)}

    def evaluate(self, params, batch):
        self.events.append(("evaluate",))
        return jnp.float32(2.0), jnp.float32(4.0)

    def stop_now(self):
        self.stop.name = "SIGTERM"
        return True

    # The methods of a saver:
    def save(self, items, meta):
        assert items == {"step": meta.step}
        self.events.append(("save", meta.step))

    def wait(self):
        self.events.append(("wait",))

    # The methods of a log:
    def start(self, step):
        pass

    def push(self, step, metrics):
        self.flush()
        if metrics is not None:
            self.pending = step

    pending = None

    def flush(self):
        if self.pending is not None:
            self.events.append(("log", self.pending))
            self.pending = None

    def write(self, step, record):
        self.events.append(("eval", step, record["eval_loss"]))

    def run(self, state=FakeState(0)):
        profiler = Profiler(self.config.train.profile_window, epath.Path("none"))
        watch = (Goodput(None), Watchdog(0), Rewinder(self.config, self.data, self, []))
        instruments = loop.Instruments(self, self, profiler, self.stop, *watch)
        state = loop.run_loop(self.compiled, state, self.data, self.config, instruments, META)
        return state.step

    def steps_of(self, kind):
        return [event[1] for event in self.events if event[0] == kind]


META = StepMeta(TINY, 0, "made up", b"")
SHORT = replace(
    TINY,
    train__steps=6,
    train__global_batch=8,
    train__log_every=2,
    train__eval_every=4,
    train__eval_batches=1,
    train__checkpoint_every=3,
)


def test_the_order_is_the_contract():
    run = FakeRun(SHORT)
    assert run.run() == 6
    kinds = [event[:2] for event in run.events]
    assert kinds == [
        ("train", 0),
        ("train", 1),
        ("train", 2),
        ("log", 2),  # logged while the next step runs
        ("save", 3),
        ("train", 3),
        ("log", 4),  # everything pending is written before evaluating
        ("evaluate",),
        ("eval", 4),
        ("train", 4),
        ("train", 5),
        ("log", 6),
        ("evaluate",),
        ("eval", 6),
        ("save", 6),
        ("wait",),
    ]
    assert [event[2] for event in run.events if event[0] == "eval"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("field", "value", "kind", "expected"),
    [
        ("train__log_every", 3, "log", [3, 6]),
        ("train__eval_every", 2, "eval", [2, 4, 6]),
        ("train__checkpoint_every", 2, "save", [2, 4, 6]),
        ("train__steps", 4, "train", [0, 1, 2, 3]),
    ],
)
def test_how_often(field, value, kind, expected):
    run = FakeRun(replace(SHORT, **{field: value}))
    run.run()
    assert run.steps_of(kind) == expected


def test_eval_batches_is_how_many():
    run = FakeRun(replace(SHORT, train__eval_batches=3))
    run.run()
    assert [event[0] for event in run.events].count("evaluate") == 6


def test_each_batch_of_an_evaluation_is_a_sign_of_life(monkeypatch):
    """The first batch may take as long as compiling does."""
    run, beat = FakeRun(replace(SHORT, train__eval_batches=3)), Watchdog.beat

    def noted(dog, what, compiles=False):
        run.events.append(("beat", what, compiles))
        beat(dog, what, compiles=compiles)

    monkeypatch.setattr(Watchdog, "beat", noted)
    run.run()
    first = run.events.index(("evaluate",))
    beats = [("beat", f"evaluation, batch {n} of 3", n == 1) for n in (1, 2, 3)]
    expected = [event for each in beats for event in (each, ("evaluate",))]
    assert run.events[first - 1 : first + 5] == expected


def test_restoring_is_watched(tmp_path, monkeypatch):
    beats = []
    monkeypatch.setattr(Watchdog, "beat", lambda dog, *what, **how: beats.append((what, how)))

    def restore(*_):
        assert beats == [(("restoring",), {"compiles": True})]
        raise UserError("seen")

    monkeypatch.setattr(run_lib, "initial_state", restore)
    with pytest.raises(UserError, match="seen"):
        train(TINY, tmp_path)


def test_an_evaluation_is_broken_off_when_all_have_agreed():
    """The loop asks after each batch whether all processes have agreed to stop."""
    run = FakeRun(replace(SHORT, train__eval_batches=3))
    # At steps 0 to 4, after the first batch, and after the second.
    asked = iter([*[False] * 6, True])
    run.stop.asked = lambda: bool(run.stop.name) or (next(asked) and run.stop_now())
    assert run.run() == 4
    assert [event[0] for event in run.events].count("evaluate") == 2
    assert run.steps_of("eval") == [] and run.steps_of("save") == [3, 4]


def test_a_stop_request_saves_at_once_and_ends():
    run = FakeRun(SHORT, stop_at=2)
    assert run.run() == 2
    assert run.steps_of("save") == [2]
    assert run.events[-1] == ("wait",)


def test_going_on_reads_the_batches_that_come_next():
    whole, later = FakeRun(SHORT), FakeRun(SHORT)
    whole.run()
    later.run(FakeState(4))
    seen = [event for event in whole.events if event[0] == "train"]
    assert [event for event in later.events if event[0] == "train"] == seen[4:]


# Whole runs.


@pytest.fixture(scope="module")
def config(corpus):
    return text_config(
        corpus,
        mesh__fsdp=8,
        train__steps=8,
        train__eval_every=4,
        train__checkpoint_every=4,
        train__seq_len=32,
        train__sample_prompt="abc",
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Returns a work directory of 8 uninterrupted steps, and the state at the end."""
    workdir = tmp_path_factory.mktemp("run") / "finished"
    return workdir, jax.device_get(train(config, workdir))


def test_the_work_directory(finished, config):
    workdir, state = finished
    assert int(state.step) == 8
    assert sorted(path.name for path in workdir.iterdir()) == [
        "checkpoints",
        "config.json",
        "data",
        "goodput.json",
        "metrics.jsonl",
        "plots",
        "tensorboard",
        "tokenizer.model",
    ]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "8"]
    assert (workdir / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events*"))
    assert (workdir / "config.json").read_text() == config.to_json()
    same = (workdir / "data" / "tokenizer.model").read_bytes()
    assert (workdir / "tokenizer.model").read_bytes() == same


def test_metrics_of_a_run(finished):
    lines = records(finished[0])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert set(steps[0]) >= {"loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu"}
    assert steps[0]["mfu"] is None
    assert steps[0]["loss"] == pytest.approx(np.log(300), abs=0.2)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [4, 8]
    assert evaluations[-1]["eval_loss"] == pytest.approx(steps[-1]["loss"], abs=0.5)


@pytest.mark.parametrize("mesh", [(2, 2, 1, 2), pytest.param((1, 8, 1, 1), marks=pytest.mark.slow)])
def test_stopped_and_resumed_equals_one_go(finished, config, tmp_path, monkeypatch, mesh):
    """3 steps, a stop and 5 more steps equal 8; the second part also runs on another mesh."""
    whole_dir, whole = finished
    shutil.copytree(whole_dir / "data", tmp_path / "run" / "data")
    counted = {"steps": 0}
    stream = loop.device_batches

    def stop_after_three(source, start, stop, *rest):
        for batch in stream(source, start, stop, *rest):
            if stop == config.train.steps:
                counted["steps"] += 1
                if counted["steps"] == 3:
                    signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop, "device_batches", stop_after_three)
    first = train(config, tmp_path / "run")
    assert int(first.step) == 3
    assert find_step(tmp_path / "run").name == "3"
    monkeypatch.setattr(loop, "device_batches", stream)
    other = replace(
        config,
        **dict(
            zip(("mesh__data", "mesh__fsdp", "mesh__context", "mesh__tensor"), mesh, strict=True)
        ),
    )
    second = jax.device_get(train(other, tmp_path / "run"))
    assert int(second.step) == 8
    losses = {line["step"]: line["loss"] for line in records(tmp_path / "run") if "loss" in line}
    expected = {line["step"]: line["loss"] for line in records(whole_dir) if "loss" in line}
    if mesh == (1, 8, 1, 1):
        assert losses == expected
        jax.tree.map(np.testing.assert_array_equal, second, whole)
    else:
        # Another mesh sums in another order.
        assert losses == pytest.approx(expected, abs=2e-6)


def test_a_finished_run_says_so(finished, config, capsys):
    workdir, state = finished
    before = sorted(
        (p, p.stat().st_mtime_ns) for p in workdir.rglob("*") if "checkpoints" in str(p)
    )
    again = train(config, workdir)
    out = capsys.readouterr().out
    assert f"finished already: {workdir} is at step 8 of 8" in out
    assert "what it writes after 'abc'" in out
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), state)
    after = sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*") if "checkpoints" in str(p))
    assert [p for p, _ in before] == [p for p, _ in after]


def test_init_is_all_that_comes_before_the_loop(tmp_path, monkeypatch):
    clock, offset = time.monotonic, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock() + offset)

    def slow(*arguments):
        nonlocal offset
        offset = 10_000.0
        return open_data(*arguments)

    monkeypatch.setattr(run_lib, "open_data", slow)
    run_lib.run(replace(TINY, train__steps=3), tmp_path, time.monotonic() - 100_000)
    seconds = json.loads((tmp_path / "goodput.json").read_text())["seconds"]
    assert 110_000 < seconds["init"] < 111_000
    assert sum(seconds.values()) - seconds["init"] < 1_000


def test_no_prompt_no_sample(finished, config, capsys):
    workdir, _ = finished
    train(replace(config, train__sample_prompt=""), workdir)
    assert "what it writes" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [{"optim__peak_lr": 0.5}, {"model__n_kv_heads": 2}, {"train__seed": 3}, {"train__steps": 9}],
)
def test_a_work_directory_of_another_config_is_refused(finished, config, changes):
    workdir, _ = finished
    name = next(iter(changes)).replace("__", ".")
    saved = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match=f"holds a run of another config .*{name}"):
        train(replace(config, **changes), workdir)
    assert (workdir / "config.json").read_text() == saved


def test_a_damaged_config_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: .* not valid JSON.*another --workdir"):
        check_workdir(TINY, epath.Path(tmp_path))


def test_a_checkpoint_of_other_data_is_refused(finished, config, corpus, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    from llama_jax.data.prepare.job import prepare

    other = replace(config, data__validation_fraction=0.4)
    prepare(other, tmp_path / "other", log=lambda line: None)
    before = open_data(config, epath.Path(workdir / "data")).fingerprint
    after = TokenDataset.open(tmp_path / "other", "train").fingerprint
    message = f"was trained on data {before}, but this is data {after}"
    with pytest.raises(UserError, match=message):
        train(replace(config, data__path=str(tmp_path / "other")), workdir)
    told = replace(config, data__path=str(tmp_path / "other"), data__accept_other_data=True)
    assert int(train(told, workdir).step) == 8


def test_synthetic_data_trains_too(tmp_path, capsys):
    config = replace(TINY, train__steps=4, train__eval_every=2, train__sample_prompt="x")
    state = train(config, tmp_path / "run")
    assert int(state.step) == 4
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2, 3, 4]


# Other ways to read data.


def stop_after(monkeypatch, steps):
    """Sends SIGTERM after this many batches."""
    stream = loop.device_batches

    def stopping(source, start, *rest):
        for step, batch in enumerate(stream(source, start, *rest), start=start):
            if step == steps:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop, "device_batches", stopping)


def losses(workdir):
    return {line["step"]: line["loss"] for line in records(workdir) if "loss" in line}


def test_streamed_data_goes_on_exactly(corpus, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(corpus, tmp_path / "text")
    (folder / "000-bad.txt").write_bytes(b"\xff")
    config = text_config(
        folder, data__streaming=True, train__steps=7, train__seq_len=32, train__global_batch=8
    )
    whole = jax.device_get(train(config, tmp_path / "whole"))
    said = capsys.readouterr().out
    # Once by the pass that trains the tokenizer, and once by that of the run, at its end.
    assert said.count(f"skipped  1 invalid UTF-8; the first: {folder}/000-bad.txt\n") == 2
    assert {line["documents_skipped"] for line in records(tmp_path / "whole")} == {1}
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert int(train(config, tmp_path / "parts").step) < 7
    parts = jax.device_get(train(config, tmp_path / "parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_streamed_data_needs_as_many_processes(corpus, tmp_path, monkeypatch):
    config = text_config(corpus, data__streaming=True, train__steps=3)
    train(config, tmp_path / "run")
    data = open_data(config, epath.Path(tmp_path / "run" / "data"))
    saver = Checkpointer(tmp_path / "run", config)
    meta = load_meta(saver.folder(3))
    assert len(meta.positions) == 1
    two = dataclasses.replace(meta, positions=meta.positions * 2)
    monkeypatch.setattr(start, "load_meta", lambda *_: two)
    compiled = types.SimpleNamespace(parts=LLAMA_PARTS)
    with pytest.raises(UserError, match=r"positions of 2 process\(es\), and this job has 1"):
        start.initial_state(compiled, saver, data, config, None)
    saver.close()


@pytest.mark.parametrize("packing", ["concat", pytest.param("best_fit", marks=pytest.mark.slow)])
def test_a_mixture_trains_and_logs_its_epochs(corpus, tmp_path, capsys, packing):
    config = text_config(
        f"a={corpus}/00*.txt; b={corpus}/01*.txt,{corpus}/02*.txt",
        data__mixture="a=0.25,b=0.75",
        data__packing=packing,
        train__seq_len=32,
        train__steps=12,
        train__eval_every=6,
    )
    train(config, tmp_path / "run")
    lines = records(tmp_path / "run")
    last = [line for line in lines if "loss" in line][-1]
    data = open_data(config, epath.Path(tmp_path / "run" / "data"))
    assert {name: last[f"epochs/{name}"] for name in "ab"} == data.train.epochs(12)
    assert data.train.schedule.drawn(12 * 8) == {"a": 24, "b": 72}
    assert "epochs at the end: a " in capsys.readouterr().out
    found = losses(tmp_path / "run")
    assert found[12] < found[1] - 0.3
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert evaluations[-1] == pytest.approx(found[12], abs=0.6)


@pytest.mark.parametrize(
    ("source", "mixture", "message"),
    [
        ("a={c}/00*.txt; b={c}/01*.txt", "a=0.5,d=0.5", "the sources are a, b: see 'd'"),
        ("a={c}/00*.txt; b={c}/01*.txt", "a=1", "the sources are a, b: see 'b'"),
        ("{c}", "a=0.5,b=0.5", "one without a name"),
    ],
)
def test_a_mixture_of_other_sources(corpus, tmp_path, source, mixture, message):
    config = text_config(source.format(c=corpus), data__mixture=mixture)
    with pytest.raises(UserError, match=message):
        open_data(config, epath.Path(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_mixture_of_shards_prepared_elsewhere(corpus, tmp_path):
    from llama_jax.data.prepare.job import prepare

    named = text_config(f"a={corpus}/00*.txt; b={corpus}/01*.txt")
    prepare(named, tmp_path / "shards", log=lambda line: None)
    config = text_config(corpus, data__path=str(tmp_path / "shards"), data__mixture="a=0.5,b=0.5")
    data = open_data(config, epath.Path(tmp_path / "none"))
    assert data.train.schedule.names == ["a", "b"]
    with pytest.raises(UserError, match="the sources are a, b: see 'c'"):
        open_data(replace(config, data__mixture="a=0.5,c=0.5"), epath.Path(tmp_path))
    # Shards of another tokenizer:
    shutil.rmtree(tmp_path / "shards" / "b")
    other = text_config(f"{corpus}/02*.txt")
    prepare(other, tmp_path / "shards" / "b", log=lambda line: None)
    with pytest.raises(UserError, match="were made with different tokenizers"):
        open_data(config, epath.Path(tmp_path))


# Data that does not fit.


def test_shards_of_another_vocabulary(shards, corpus, tmp_path):
    config = text_config(corpus, data__path=str(shards), model__vocab_size=299)
    message = (
        "vocabulary of 300, but model.vocab_size is 299; raise model.vocab_size to 300 or more"
    )
    with pytest.raises(UserError, match=message):
        open_data(config, epath.Path(tmp_path))


def test_a_path_without_shards(corpus, tmp_path):
    config = text_config(corpus, data__path=str(tmp_path))
    with pytest.raises(UserError, match="make them with llama_jax.prepare"):
        open_data(config, epath.Path(tmp_path))


def test_without_held_out_documents_there_is_no_evaluation(corpus, tmp_path):
    config = text_config(corpus, data__validation_fraction=0.0)
    assert open_data(config, epath.Path(tmp_path / "data")).validation is None


def test_check_memory_tells_how_many_devices_it_takes():
    mesh = mesh_of((1, 8, 1, 1))

    def state_of(config):
        with jax.set_mesh(mesh):
            return jit_step(config, mesh).placed_state()

    check_memory(TINY, state_of(TINY), mesh, 10**9)
    config = replace(TINY, model__dim=8192, model__ffn_dim=22016, model__n_layers=80)
    state = state_of(config)
    check_memory(config, state, mesh, None)
    parameters = parameter_count(config.model)
    with pytest.raises(UserError) as caught:
        check_memory(config, state, mesh, 16 * 2**30)
    devices = -(-parameters * 16 // (16 * 2**30))
    assert f"use {devices} or more such devices" in str(caught.value)
    assert f"need {parameters * 16 / 8 / 2**30:,.0f} GiB per device" in str(caught.value)
    half = replace(config, optim__moment_dtype="bfloat16")
    # Norm scales and a few counters are on every device.
    capacity = int(parameters * 14 / 8 * 1.001)
    check_memory(config, state_of(half), mesh, capacity)
    with pytest.raises(UserError):
        check_memory(config, state, mesh, capacity)


def test_check_memory_counts_the_base_below_adapters():
    mesh = mesh_of((1, 1, 1, 1))
    config = replace(TINY, model__dim=4096, model__ffn_dim=11008, model__n_layers=32)
    lora = LoraConfig(rank=4, base_dtype="nf4")
    config = dataclasses.replace(config, lora=lora, init_from="hf:there")
    with jax.set_mesh(mesh):
        state = jit_step(config, mesh).placed_state()
    held = frozen_bytes(config.model, config.lora) + 16 * adapter_count(config.model, config.lora)
    check_memory(config, state, mesh, int(held * 1.001))
    with pytest.raises(UserError, match="parameters: weights, gradients and moments"):
        check_memory(config, state, mesh, int(held * 0.999))


# Every field has an effect: this list names each with the test that shows it.

SCALING = "model__rope_scaling_factor"
YARN = ("beta_fast", "beta_slow", "truncate", "attention_factor")
STEP_FIELDS = {
    "model__vocab_size": 96,
    "model__dim": 64,
    "model__n_layers": 3,
    "model__n_heads": 8,
    "model__n_kv_heads": 2,
    "model__ffn_dim": 64,
    "model__rope_theta": 5e5,
    "model__explicit_head_dim": 16,
    "model__rope_scaling_factor": 8.0,
    "model__rope_low_freq_factor": 2.0,
    "model__rope_high_freq_factor": 8.0,
    "model__rope_original_context": 64,
    "model__rope_scaling": "linear",
    "model__rope_beta_fast": 4.0,
    "model__rope_beta_slow": 0.1,
    "model__rope_truncate": False,
    "model__rope_attention_factor": 0.5,
    "model__norm_eps": 1e-5,
    "model__sliding_window": 8,
    "model__tied_embeddings": True,
    "model__compute_dtype": "bfloat16",
    "model__remat": "full",
    "model__scan_unroll": 2,
    "optim__peak_lr": 1e-3,
    "optim__final_lr_fraction": 0.5,
    "optim__warmup_steps": 5,
    "optim__schedule": "linear",
    "optim__decay_steps": 3,
    "optim__decay_shape": "linear",
    "optim__beta1": 0.8,
    "optim__beta2": 0.99,
    "optim__eps": 1e-6,
    "optim__weight_decay": 0.2,
    "optim__clip_norm": 2.0,
    "optim__moment_dtype": "bfloat16",
    "train__steps": 40,
    "train__seq_len": 32,
    "train__global_batch": 16,
    "train__grad_accum": 2,
    "train__loss_chunk": 16,
    "train__z_loss": 0.1,
    "train__spike_factor": 6.0,
    "train__norm_stats": True,
    "lora__rank": 4,
    "lora__alpha": 4.0,
    "lora__dropout": 0.1,
    "lora__targets": "wq,w2",
    "lora__base_dtype": "float32",
}
# For each field, the test that shows its effect.
OTHER_FIELDS = {
    "branch_from": "train/test_origin::test_trunk_and_cooldown_are_one_run",
    "train.stages": "train/test_origin::test_a_ramp_that_is_stopped_and_resumed",
    "data.start": "train/test_origin::test_a_run_from_weights_begins_after_what_they_have_seen",
    "init_from": "interchange/test_opening::test_weights_of_another_model_are_refused",
    "model.attention": "model/test_attention::test_an_unknown_backend_is_an_error",
    "model.attention_tile": "model/test_attention::test_tiles_of_splash_change_no_gradient",
    "model.attention_backward": "model/test_attention::test_tiles_of_splash_change_no_gradient",
    **dict.fromkeys(
        ("mesh.data", "mesh.fsdp", "mesh.context", "mesh.tensor"),
        "parallel/test_mesh::test_minus_one_takes_what_is_left",
    ),
    **dict.fromkeys(
        ("dcn.data", "dcn.fsdp", "dcn.context", "dcn.tensor"),
        "train/test_run::test_dcn_factors_change_the_mesh",
    ),
    "data.source": "data/sources/test_documents::test_a_folder_is_read_in_order",
    "data.path": "train/test_run::test_shards_of_another_vocabulary",
    "data.tokenizer": "data/prepare/test_job::test_a_given_tokenizer_is_used",
    "data.tokenizer_size": "data/test_vocabulary_size::test_a_trained_tokenizer_may_have_fewer_ids",
    "data.template": "data/sources/test_conversations::test_shards_hold_the_masks",
    "data.text_field": "data/sources/test_documents::test_another_text_field",
    "data.separator": "data/sources/test_text_files::test_shards_of_another_separator_are_refused",
    "data.tfds_split": "data/sources/test_tfds::test_tfds",
    "data.tfds_data_dir": "data/sources/test_tfds::test_tfds",
    "data.mixture": "train/test_run::test_a_mixture_trains_and_logs_its_epochs",
    "data.packing": "train/test_run::test_a_mixture_trains_and_logs_its_epochs",
    "data.streaming": "train/test_run::test_streamed_data_goes_on_exactly",
    "data.accept_other_data": "train/test_run::test_a_checkpoint_of_other_data_is_refused",
    "data.part_bytes": "data/prepare/test_job::test_many_processes_write_the_same_bytes",
    "data.workers": "data/prepare/test_job::test_many_processes_write_the_same_bytes",
    "data.validation_fraction": "data/prepare/test_job::test_the_fingerprint_is_of_the_tokens",
    "data.shard_tokens": "data/prepare/test_job::test_shards_hold_every_document_once_in_order",
    "data.max_document_bytes": "data/sources/test_documents::test_unusable_files_are_counted",
    "train.seed": "train/test_run::test_the_seed_changes_weights_and_data",
    "train.log_every": "train/test_run::test_how_often",
    "train.eval_every": "train/test_run::test_how_often",
    "train.eval_batches": "train/test_run::test_eval_batches_is_how_many",
    "train.checkpoint_every": "train/test_run::test_how_often",
    "train.keep_checkpoints": "checkpoint/test_checkpointer::test_the_newest_are_kept",
    "train.keep_every": "checkpoint/test_retention::test_what_is_kept",
    "train.keep_best": "checkpoint/test_retention::test_what_is_kept",
    "train.max_failed_saves": "checkpoint/test_checkpointer::test_failed_saves",
    "train.save_timeout": "checkpoint/test_checkpointer::test_a_slow_save_is_told",
    "train.sample_prompt": "train/test_run::test_no_prompt_no_sample",
    "train.step_timeout": "faults/test_stopping::test_a_process_that_hangs_is_noticed",
    "train.max_skipped": "faults/test_numeric::test_bad_batches_in_a_row_stop_the_run",
    **dict.fromkeys(
        ("train.max_rewinds", "train.rewind_steps"),
        "faults/test_rewind::test_it_goes_on_from_the_old_weights_with_the_new_batches",
    ),
    "train.profile_steps": "train/instruments/test_profiler::test_a_run_traces_its_window",
}


def test_steps_are_shared_by_configs_that_differ_in_no_field_of_the_step():
    loop_fields = {name for name in OTHER_FIELDS if name.startswith("train.")} - {"train.seed"}
    assert {f"train.{name}" for name in LOOP_FIELDS} == loop_fields


def test_every_field_is_covered():
    covered = {name.replace("__", ".") for name in STEP_FIELDS} | set(OTHER_FIELDS)
    assert covered == field_names(".")


@pytest.mark.parametrize("where", sorted(set(OTHER_FIELDS.values())))
def test_the_test_of_a_field_is_there(where):
    file, name = where.split("::")
    assert f"\ndef {name}(" in (ROOT / "tests" / f"{file}.py").read_text()


@functools.cache
def program(config):
    """Returns the train step as text."""
    from llama_jax.model.weights import abstract_frozen
    from llama_jax.train.step import abstract_state, train_step

    state = dataclasses.replace(abstract_state(config), frozen=abstract_frozen(config))
    shape = (config.train.global_batch, config.train.seq_len)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = {"inputs": ids, "targets": ids, "weights": jax.ShapeDtypeStruct(shape, jnp.float32)}
    step = jax.make_jaxpr(lambda s, b: train_step(s, b, config=config))
    return str(step(state, batch))


@pytest.mark.parametrize("field", STEP_FIELDS)
def test_the_field_changes_the_step(field):
    if field.startswith("model__rope_") and field not in ("model__rope_theta", SCALING):
        # These fields have an effect only where RoPE is scaled.
        kind = "yarn" if field.removeprefix("model__rope_") in YARN else "llama3"
        scaled = replace(TINY, **{SCALING: 8.0}, model__rope_scaling=kind)
        assert program(replace(scaled, **{field: STEP_FIELDS[field]})) != program(scaled)
        return
    if field.startswith("optim__decay_"):
        decaying = replace(TINY, optim__schedule="wsd")
        assert program(replace(decaying, **{field: STEP_FIELDS[field]})) != program(decaying)
        return
    if field.startswith("lora__"):
        adapted = with_adapters(TINY)
        assert program(replace(adapted, **{field: STEP_FIELDS[field]})) != program(adapted)
        return
    assert program(replace(TINY, **{field: STEP_FIELDS[field]})) != program(TINY)


@pytest.mark.parametrize("axis", ["data", "fsdp", "context", "tensor"])
def test_dcn_factors_change_the_mesh(axis):
    from llama_jax.config import DcnConfig, MeshConfig
    from llama_jax.parallel.mesh import make_mesh

    mesh = make_mesh(MeshConfig(), DcnConfig(**{axis: 2}))
    expected = {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    expected[axis] *= 2
    assert dict(mesh.shape) == expected


def test_the_seed_changes_weights_and_data(tmp_path, shards, corpus):
    config = text_config(corpus, data__path=str(shards))
    other = replace(config, train__seed=1)
    first, second = (open_data(c, epath.Path(tmp_path)).train for c in (config, other))
    assert not np.array_equal(first.rows(0, range(8))["inputs"], second.rows(0, range(8))["inputs"])
    seeds = []

    class Stop(Exception):
        pass

    def init(key):
        seeds.append(jax.random.key_data(key).tolist())
        raise Stop

    for c in (config, other):
        compiled = types.SimpleNamespace(init=init)
        saver = types.SimpleNamespace(newest_good_step=lambda: None)
        with pytest.raises(Stop):
            start.initial_state(compiled, saver, TrainingData(BatchSource()), c, None)
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(("template", "flag"), [("", "--prompt=def"), ("vicuna", "--chat")])
def test_what_to_try_next(capsys, tokenizer, template, flag):
    data = dataclasses.replace(TINY.data, packing="best_fit", source="x.json", template=template)
    config = replace(TINY, data=data)
    ended = types.SimpleNamespace(name="")
    outcome = run_lib.Outcome(types.SimpleNamespace(step=20), True, False, 20, False, [])
    with_text = TrainingData(BatchSource(), tokenizer=tokenizer)
    run_lib._report(LLAMA_PARTS, config, epath.Path("runs/x"), outcome, ended, with_text)
    expected = f"python -m llama_jax.generate --checkpoint=runs/x {flag}\n"
    assert capsys.readouterr().out.endswith(expected)
    run_lib._report(
        LLAMA_PARTS, config, epath.Path("runs/x"), outcome, ended, TrainingData(BatchSource())
    )
    assert "generate" not in capsys.readouterr().out  # which needs a tokenizer
