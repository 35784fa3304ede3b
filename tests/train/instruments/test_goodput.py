import json
import time

import pytest
from etils import epath

from llama_jax.train.instruments.goodput import PHASES, Goodput


@pytest.fixture
def clock(monkeypatch):
    """Returns an object whose `now` is the time of both clocks."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(time, "time", lambda: Clock.now + 10**9)
    return Clock


def test_time_goes_to_the_innermost_phase(clock):
    goodput = Goodput(None)
    clock.now += 5
    goodput.enter("step")
    clock.now += 60
    with goodput.phase("eval"):
        clock.now += 20
        with goodput.phase("checkpoint"):
            clock.now += 4
        clock.now += 10
    clock.now += 1
    assert goodput.fraction() == pytest.approx(61 / 100)
    times = {"init": 5, "step": 61, "eval": 30, "checkpoint": 4}
    assert goodput.seconds == {**dict.fromkeys(PHASES, 0.0), **times}
    report = "61.0% of 100 s: init 5.0, compile 0.0, data 0.0, step 61.0, eval 30.0"
    assert goodput.report() == f"{report}, checkpoint 4.0, lost 0.0"


def test_it_is_kept_across_restarts_and_a_crash_is_lost_time(clock, tmp_path):
    path = epath.Path(tmp_path / "goodput.json")
    first = Goodput(path)
    first.enter("step")
    clock.now += 50
    first.save()
    clock.now += 7  # steps that no save holds, then a kill and a restart
    second = Goodput(path)
    assert (second.seconds["step"], second.seconds["lost"], second.runs) == (50, 7, 2)
    second.enter("step")
    clock.now += 43
    second.save(at_end=True)
    clock.now += 1000  # a run that saved its last step loses nothing
    third = Goodput(path)
    assert (third.seconds["step"], third.seconds["lost"], third.runs) == (93, 7, 3)
    assert third.report().endswith("lost 7.0 (3 runs)") and third.report().startswith("93.0%")


def test_what_was_before_is_counted_once(clock, tmp_path):
    """Start-up counts as init, and not as lost time as well."""
    path = epath.Path(tmp_path / "goodput.json")
    Goodput(path).save()
    clock.now += 7
    began = clock.now
    clock.now += 30
    second = Goodput(path, began)
    clock.now += 4
    second.enter("step")
    assert (second.seconds["init"], second.seconds["lost"]) == (34, 7)


def test_a_file_that_a_kill_cut_off_begins_anew(clock, tmp_path):
    path = epath.Path(tmp_path / "goodput.json")
    Goodput(path).save()
    text = path.read_text()
    for damaged in (text[:40], "[]", json.dumps({"seconds": {}})):
        path.write_text(damaged)
        assert Goodput(path).runs == 1
