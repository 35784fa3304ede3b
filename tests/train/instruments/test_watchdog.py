import subprocess
import sys
import threading

import pytest

from llama_jax.train.instruments.watchdog import Watchdog
from tests.helpers import ROOT


def run(code):
    imports = "import os, signal, time\nfrom llama_jax.train.instruments.watchdog import Watchdog"
    code = f"{imports}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


def test_a_hang_ends_with_a_message_and_stacks():
    process = run("""
def stuck():
    time.sleep(3600)
with Watchdog(1) as dog:
    dog.beat("step 7")
    stuck()
""")
    assert process.returncode == 1
    first = process.stderr.splitlines()[0]
    assert first.startswith("error: no sign of life in step 7 for longer than 1 s (")
    assert "in stuck" in process.stderr  # the stack is in the output


class Ticks:
    """Replaces the event that the thread waits on: a tick passes when the test allows it."""

    def __init__(self):
        self.allowed, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = False

    def wait(self, seconds):
        self.begun.release()
        self.allowed.acquire()
        return self.ended

    def set(self):
        self.ended = True
        self.allowed.release()

    def pass_by(self, n):
        """Lets `n` ticks pass, and returns when the thread has done its work after the last one."""
        for _ in range(n):
            self.allowed.release()
            self.begun.acquire()


@pytest.fixture
def given_up(monkeypatch):
    """Returns a list to which the watchdogs of a test add what they give up on."""
    found = []
    monkeypatch.setattr(Watchdog, "_give_up", lambda dog, what: found.append(what))
    return found


def started(timeout_s):
    """Returns a watchdog after its first beat, whose thread waits for the first tick."""
    dog = Watchdog(timeout_s)
    dog._ended = ticks = Ticks()
    dog.beat("step 0")
    ticks.begun.acquire()
    return dog, ticks


def test_beats_keep_it_alive(given_up):
    dog, ticks = started(2)
    with dog:
        for step in range(10):
            dog.beat(f"step {step}")
            ticks.pass_by(4)  # one tick to notice the beat, and three of half a second
        assert given_up == []
        ticks.pass_by(1)
        assert given_up == ["step 9"]


def test_what_compiles_has_ten_times_as_long(given_up):
    dog, ticks = started(2)
    with dog:
        dog.beat("step 1", compiles=True)
        ticks.pass_by(40)
        assert given_up == []
        ticks.pass_by(1)
        assert given_up == ["step 1"]


def test_its_end_calls_it_off(given_up):
    dog, _ = started(2)
    with dog:
        pass
    dog._thread.join()
    assert given_up == []


def test_a_stopped_process_did_not_hang():
    """The process is stopped for longer than its limit; the watchdog does not count that time."""
    process = run("""
from llama_jax.train.instruments import watchdog
watchdog.TICK_S = 0.1
if os.fork() == 0:
    while open(f"/proc/{os.getppid()}/stat").read().split()[2] != "T":
        time.sleep(0.01)
    time.sleep(4)
    os.kill(os.getppid(), signal.SIGCONT)
    os._exit(0)
with Watchdog(3) as dog:
    dog.beat("step 1")
    time.sleep(0.5)  # it has been seen
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)  # what it takes for the stop is seen now
print("alive")
""")
    assert (process.returncode, process.stdout, process.stderr) == (0, "alive\n", "")


def test_none_at_all():
    with Watchdog(0) as dog:
        dog.beat("step 1")
        assert not dog._thread.is_alive()
