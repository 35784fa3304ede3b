import json

import jax.numpy as jnp
import pytest
from etils import epath

from llama_jax.model.cost import flops_per_token
from llama_jax.train.instruments import metrics
from llama_jax.train.instruments.writers import AllWriters, Run, open_writers
from tests.helpers import TINY, replace


def test_speed_and_mfu(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    speed = metrics.Speed(TINY, devices=4, peak=1e9)
    now[0] += 2.0
    reading = speed.read(10)
    tokens = 10 * TINY.train.global_batch * TINY.train.seq_len
    assert reading["tokens_per_second"] == pytest.approx(tokens / 2)
    flops = flops_per_token(TINY.model, TINY.lora, TINY.train.seq_len)
    assert reading["mfu"] == pytest.approx(tokens / 2 * flops / 4e9)
    assert reading["chip_seconds"] == pytest.approx(4 * 2.0)
    now[0] += 1.0  # an evaluation: it does not slow the steps, but takes time of the chips
    speed.restart()
    now[0] += 1.0
    reading = speed.read(1)
    assert reading["tokens_per_second"] == pytest.approx(tokens / 10)
    assert reading["chip_seconds"] == pytest.approx(4 * 2.0)
    assert metrics.Speed(TINY, devices=1, peak=None).read(1)["mfu"] is None


def test_steps_of_two_stages_have_their_own_tokens(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    speed = metrics.Speed(TINY, devices=1, peak=1e9)
    other = replace(TINY, train__seq_len=8, train__global_batch=128)
    now[0] += 2.0
    speed.count(4)
    speed.use(other)
    now[0] += 3.0
    reading = speed.read(6)
    tokens = [4 * TINY.train.tokens_per_step, 6 * other.train.tokens_per_step]
    assert reading["tokens_per_second"] == pytest.approx(sum(tokens) / 5)
    each = [flops_per_token(TINY.model, TINY.lora, length) for length in (16, 8)]
    flops = sum(n * f for n, f in zip(tokens, each, strict=True))
    assert reading["mfu"] == pytest.approx(flops / 5e9)


class Recorder:
    def __init__(self):
        self.records = []

    def write(self, step, record):
        self.records.append((step, record))


def test_a_step_is_logged_when_the_next_is_pushed():
    recorder = Recorder()
    read = []
    log = metrics.Metrics(recorder, metrics.Speed(TINY, 1, None), on_read=read.append)
    log.start(0)
    log.push(1, {"loss": jnp.float32(3.5)})
    assert recorder.records == []
    log.push(2, None)
    assert [step for step, _ in recorder.records] == [1]
    assert recorder.records[0][1]["loss"] == 3.5
    log.push(3, {"loss": jnp.float32(2.5)})
    assert [values["loss"] for values in read] == [3.5]
    log.flush()
    assert [step for step, _ in recorder.records] == [1, 3]
    assert read == [record for _, record in recorder.records]


def test_a_speed_that_nobody_has_measured_is_left_out(tmp_path, capsys):
    """Without a timed step, a speed is null, `-` on the console, and left out in TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    record = dict.fromkeys(("loss", "learning_rate", "grad_norm"), 1.0)
    record |= metrics.Speed(TINY, devices=1, peak=1e9).read(0) | {"chip_seconds": 2.0}
    assert record["tokens_per_second"] is None and record["mfu"] is None
    folder = epath.Path(tmp_path)
    with AllWriters(lambda: open_writers(Run(TINY, folder, "x"))) as writers:
        metrics.Metrics(writers, metrics.Speed(TINY, 1, None)).write(1, record)
    assert "  - tokens/s  MFU n/a  " in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["tokens_per_second"] is None
    (file,) = (tmp_path / "tensorboard").iterdir()
    tags = []
    for event in framed(file.read_bytes()):
        tags += [value.tag for value in Event.FromString(event).summary.value]
    assert sorted(tags) == ["chip_seconds", "grad_norm", "learning_rate", "loss"]


def framed(data):
    """Yields the contents of a TFRecord file: length (8 bytes), checksum (4), content, checksum."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + length]
        data = data[16 + length :]


@pytest.fixture
def drawn(monkeypatch):
    """Returns the points that the code under test draws, by label."""
    from matplotlib.axes import Axes

    points, plot = {}, Axes.plot

    def spy(self, x, y, *args, **kwargs):
        points[kwargs["label"]] = list(zip(x, y, strict=True))
        return plot(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    return points


def test_the_plot_shows_both_losses_and_the_later_record_of_a_step(tmp_path, drawn):
    lines = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 9.0},
        {"step": 2, "eval_loss": 4.5},
        {"step": 2, "loss": 4.0},
        {"step": 3, "loss": None},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = epath.Path(tmp_path / "plots" / "loss.png")
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a kill in the middle of a line
    metrics.plot_loss(epath.Path(tmp_path / "m.jsonl"), output)
    assert drawn == {"training": [(1, 5.0), (2, 4.0)], "validation": [(2, 4.5)]}
    assert output.read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_the_learning_rate_on_an_axis_of_its_own(tmp_path, monkeypatch, drawn):
    from matplotlib.figure import Figure

    lines = [
        {"step": 1, "loss": 5.0, "learning_rate": 1e-4},
        {"step": 2, "loss": 4.0, "learning_rate": 9e-4},
        {"step": 2, "loss": 4.0, "learning_rate": 2e-4},
        {"step": 3, "loss": 3.0, "learning_rate": None},
    ]
    file = epath.Path(tmp_path / "m.jsonl")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    metrics.plot_loss(file, epath.Path(tmp_path / "loss.png"))
    assert drawn["learning rate"] == [(1, 1e-4), (2, 2e-4)]
    losses, rates = figures[0].axes
    assert rates.get_ylabel() == "learning rate" and rates.yaxis.get_label_position() == "right"
    assert rates.get_ylim()[0] == 0 < 2e-4 <= rates.get_ylim()[1] < 1e-3
    # The losses are in front, and the rate shows through.
    assert losses.get_zorder() > rates.get_zorder() and not losses.patch.get_visible()
