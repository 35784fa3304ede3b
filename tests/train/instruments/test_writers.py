import json
import threading

import pytest
from etils import epath

from llama_jax.files import append_jsonl
from llama_jax.train.instruments import writers
from llama_jax.train.instruments.writers import (
    WRITERS,
    AllWriters,
    ConsoleWriter,
    JsonlWriter,
    TensorBoardWriter,
)
from tests.helpers import TINY


def test_json_lines_are_valid_whatever_the_numbers(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    writer = JsonlWriter(path)
    writer.write(1, {"loss": 2.0, "mfu": None})
    writer.write(2, {"loss": float("nan"), "mfu": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.0, "mfu": None},
        {"step": 2, "loss": None, "mfu": 0.5},
    ]
    writer.close()


def test_console(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(writers.time, "perf_counter", lambda: now[0])
    console = ConsoleWriter(100, "NVIDIA H200 989 TFLOP/s")
    record = {
        "loss": 2.5,
        "learning_rate": 3e-4,
        "grad_norm": 0.5,
        "tokens_per_second": 12345.6,
        "mfu": 0.456,
    }
    console.write(10, record)
    now[0] = 60.0
    console.write(20, {**record, "mfu": None, "learning_rate": float("nan")})
    console.write(20, {"eval_loss": 3.25})
    console.write(20, {"eval_loss": 3.25, "epochs": 0.5})
    console.write(20, {"eval_loss": 3.25, "epochs/web": 0.125, "epochs/books": 2.0})
    first, second, third, fourth, fifth = capsys.readouterr().out.splitlines()
    assert "step  10/100  loss 2.5000  lr 3.00e-04  grad_norm 0.50  12,346 tokens/s" in first
    assert "MFU 45.6% of NVIDIA H200 989 TFLOP/s" in first and "ETA -" in first
    assert "MFU n/a" in second and "  lr n/a  " in second and second.endswith("ETA 8m00s")
    assert third == "step  20  eval_loss 3.2500"
    assert fourth.endswith("eval_loss 3.2500  epochs 0.50")
    assert fifth.endswith("epochs web 0.12, books 2.00")


def test_long_eta_is_in_hours(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(writers.time, "perf_counter", lambda: now[0])
    console = ConsoleWriter(1000, "x")
    record = dict.fromkeys(("loss", "learning_rate", "grad_norm", "tokens_per_second"), 1.0)
    console.write(0, {**record, "mfu": None})
    now[0] = 60.0
    console.write(10, {**record, "mfu": None})
    assert capsys.readouterr().out.splitlines()[1].endswith("ETA 1h39m")


def test_tensorboard_files_hold_the_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writer = TensorBoardWriter(epath.Path(tmp_path))
    writer.write(7, {"loss": 2.5, "mfu": None})
    writer.event(8, "went back", {"event": "rewound", "to": 4})
    writer.close()
    data = next(tmp_path.iterdir()).read_bytes()
    found, texts = {}, {}
    while data:  # TFRecord: length (8 bytes), its checksum (4), the record, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        for value in event.summary.value:
            if value.HasField("tensor"):
                texts[event.step, value.tag] = value.tensor.string_val[0].decode()
            else:
                found[event.step, value.tag] = value.simple_value
        data = data[16 + size :]
    assert found == {(7, "loss"): 2.5}
    assert texts == {(8, "events/rewound/text_summary"): "went back"}


def test_further_metrics_are_printed_by_name(capsys):
    console = ConsoleWriter(100, "x", further=("accuracy", "not there"))
    record = dict.fromkeys(("loss", "learning_rate", "grad_norm", "tokens_per_second"), 1.0)
    console.write(10, {**record, "mfu": None, "accuracy": 0.123456, "other": 7.0})
    assert capsys.readouterr().out.rstrip().endswith("ETA -  accuracy 0.1235")


class Noted(list):
    """A writer that keeps all its records and events in a list."""

    def write(self, step, record):
        self.append((step, record))

    def event(self, step, text, record):
        self.append((step, text, record))

    def close(self):
        self.append("closed")


class Full:
    """A writer whose disk is full."""

    def write(self, *_):
        raise OSError(28, "No space left on device")

    def event(self, *_):
        self.write()

    def close(self):
        self.write()


def test_a_record_that_cannot_be_written_ends_no_run(capsys):
    noted = Noted()
    with AllWriters(lambda: [Full(), noted]) as all_writers:
        all_writers.write(3, {"eval_loss": 1.0})
        all_writers.event(4, "went back", {"event": "rewound"})
    assert noted == [(3, {"eval_loss": 1.0}), (4, "went back", {"event": "rewound"}), "closed"]
    assert capsys.readouterr().out == (
        "warning: step 3 could not be logged: [Errno 28] No space left on device\n"
    )


def test_writers_are_opened_by_their_first_record(tmp_path):
    """An event may come before the first step; a run that is refused makes no files."""
    opened, noted = [], Noted()
    with AllWriters(lambda: opened.append(1) or [noted]) as all_writers:
        assert not opened
        all_writers.event(0, "set aside", {"event": "checkpoint_damaged"})
        all_writers.open()
        all_writers.write(1, {})
    assert opened == [1] and len(noted) == 3
    with AllWriters(lambda: pytest.fail("opened")):
        pass

    def fails():
        raise OSError(28, "No space left on device")

    with AllWriters(fails) as all_writers:
        all_writers.event(0, "set aside", {"event": "checkpoint_damaged"})
        with pytest.raises(OSError, match="No space"):
            all_writers.open()


def test_events_of_two_threads_are_written_one_after_the_other():
    """A save in the background reports while the loop writes."""
    inside, both, gate = [], [], threading.Event()

    class Slow(Noted):
        def write(self, step, record):
            inside.append(step)
            gate.wait(0.05)  # time for the other thread to come in, if it were not kept out
            both.append(len(inside))
            inside.pop()

        def event(self, step, text, record):
            self.write(step, record)

    all_writers = AllWriters(lambda: [Slow()])
    other = threading.Thread(target=all_writers.event, args=(1, "", {"event": "save_slow"}))
    other.start()
    all_writers.write(2, {})
    other.join()
    assert both == [1, 1]


def test_events_in_json_lines(tmp_path, monkeypatch):
    """An event is one line of step, kind and details; after a full disk it is written late."""
    path = epath.Path(tmp_path / "metrics.jsonl")
    writer = JsonlWriter(path)
    with monkeypatch.context() as patch:
        patch.setattr(writers, "append_jsonl", Full().write)
        with pytest.raises(OSError, match="No space"):
            writer.event(3, "said", {"event": "save_failed", "reason": "full"})
    writer.event(4, "said", {"event": "rewound", "from": 4, "to": 2})
    assert path.read_text() == (
        '{"step": 3, "event": "save_failed", "reason": "full"}\n'
        '{"step": 4, "event": "rewound", "from": 4, "to": 2}\n'
    )
    assert writers.append_jsonl is append_jsonl


def test_a_writer_is_a_line_in_the_table(tmp_path, monkeypatch):
    noted = Noted()
    monkeypatch.setitem(WRITERS, "tracker", lambda run: noted)
    opened = writers.open_writers(writers.Run(TINY, epath.Path(tmp_path), "x"))
    kinds = [type(writer) for writer in opened]
    assert kinds == [ConsoleWriter, JsonlWriter, TensorBoardWriter, Noted]
