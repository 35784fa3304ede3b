"""TensorBoard finds the traces, and they hold the steps of the window."""

import json
import pathlib

import jax
import pytest
from etils import epath

from llama_jax.train.instruments.profiler import Profiler
from llama_jax.train.run import train
from tests.helpers import TINY, replace

pytestmark = pytest.mark.usefixtures("shared_steps")


def traced(workdir):
    """Returns the numbers of the steps in each trace of a work directory."""
    # The layout that TensorBoard's plugin lists: LOGDIR/plugins/profile/RUN/HOST.xplane.pb
    files = sorted(pathlib.Path(workdir).glob("tensorboard/plugins/profile/*/*.xplane.pb"))
    return [
        sorted(
            int(dict(event.stats)["step_num"])
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            for line in plane.lines
            for event in line.events
            if event.name == "train"
        )
        for file in files
    ]


def test_a_run_traces_its_window(tmp_path, capsys):
    config = replace(TINY, train__steps=6, train__profile_steps="3,4")
    train(config, tmp_path / "run")
    assert traced(tmp_path / "run") == [[3, 4]]
    out = capsys.readouterr().out
    assert f"steps 3 to 4 are in {tmp_path}/run/tensorboard/plugins/profile" in out
    assert f"xprof --logdir={tmp_path}/run/tensorboard" in out
    # A finished run may be resumed with another window.
    train(replace(config, train__profile_steps="1,2"), tmp_path / "run")
    assert traced(tmp_path / "run") == [[3, 4]]


def test_a_run_that_ends_in_its_window_keeps_the_trace(tmp_path, capsys):
    train(replace(TINY, train__steps=4, train__profile_steps="4,9"), tmp_path / "run")
    assert traced(tmp_path / "run") == [[4]]
    assert "steps 4 to 4 are in" in capsys.readouterr().out


class Recorder:
    """Stands in for JAX's profiler."""

    def __init__(self, monkeypatch):
        self.events = []
        monkeypatch.setattr(jax.profiler, "start_trace", self.start)
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: self.events.append("stop"))

    def start(self, folder, profiler_options):
        self.events.append("start")
        (pathlib.Path(folder) / "plugins").mkdir()
        (pathlib.Path(folder) / "plugins" / "x").write_text(json.dumps(self.events))

    def run(self, profiler, first, last):
        for step in range(first, last + 1):
            if profiler.must_toggle(step):
                profiler.toggle(step, None)
            if step < last:
                with profiler.step(step):
                    self.events.append(step)
        profiler.close()
        return self.events


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [
        (1, 6, [1, "start", 2, 3, "stop", 4, 5]),
        (3, 5, ["start", 3, "stop", 4]),  # resumed inside the window
        (4, 6, [4, 5]),  # resumed after the window
        (1, 3, [1, "start", 2, "stop"]),  # ended inside the window
        (1, 2, [1, "start", "stop"]),  # ended before the window
    ],
)
def test_when_a_trace_runs(monkeypatch, tmp_path, first, end, expected):
    recorder = Recorder(monkeypatch)
    profiler = Profiler(range(2, 4), epath.Path(tmp_path / "tb"))
    assert recorder.run(profiler, first, end) == expected
    assert (tmp_path / "tb" / "plugins" / "x").exists() == (2 in expected or 3 in expected)


def test_no_window_no_trace(monkeypatch, tmp_path):
    recorder = Recorder(monkeypatch)
    assert recorder.run(Profiler(range(0), epath.Path(tmp_path)), 1, 4) == [1, 2, 3]
