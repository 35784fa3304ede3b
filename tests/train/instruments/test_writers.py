import json

from etils import epath

from llama_jax.train.instruments import writers
from llama_jax.train.instruments.writers import ConsoleWriter, JsonlWriter, TensorBoardWriter


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
    console.write(20, {**record, "mfu": None})
    console.write(20, {"eval_loss": 3.25})
    console.write(20, {"eval_loss": 3.25, "epochs": 0.5})
    console.write(20, {"eval_loss": 3.25, "epochs/web": 0.125, "epochs/books": 2.0})
    first, second, third, fourth, fifth = capsys.readouterr().out.splitlines()
    assert "step  10/100  loss 2.5000  lr 3.00e-04  grad_norm 0.50  12,346 tokens/s" in first
    assert "MFU 45.6% of NVIDIA H200 989 TFLOP/s" in first and "ETA -" in first
    assert "MFU n/a" in second and second.endswith("ETA 8m00s")
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
    writer.close()
    data = next(tmp_path.iterdir()).read_bytes()
    found = {}
    while data:  # TFRecord: length (8 bytes), its checksum (4), the record, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
        data = data[16 + size :]
    assert found == {(7, "loss"): 2.5}
