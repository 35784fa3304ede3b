import io
import os
import signal
import sys
import threading
import types

import jax
import pytest
from jax._src import distributed
from jax.experimental import multihost_utils

from llama_jax.parallel.multihost import Stopped
from llama_jax.train.instruments.signals import StopRequest


def test_the_first_signal_asks_and_the_second_kills(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.asked()
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM" and stop.asked()
        for number in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before
    assert "saving after this step" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_has_nothing_to_save_stops_at_once(number):
    name = signal.Signals(number).name
    with StopRequest() as stop, pytest.raises(Stopped, match=name), stop.at_once():
        signal.raise_signal(number)


def test_a_signal_in_the_middle_of_a_printed_line(monkeypatch):
    """Python forbids a print inside another print; the signal must not get lost because of that."""
    read, write = os.pipe()

    class Terminal(io.FileIO):
        def write(self, data):
            if b"step 1" in bytes(data):
                signal.raise_signal(signal.SIGTERM)
            return super().write(data)

    with StopRequest() as stop, open(read) as lines, Terminal(write, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(terminal)))
        print("step 1", flush=True)
        print("step 2", flush=True)
        assert stop.name == "SIGTERM"
        monkeypatch.undo()
        os.set_blocking(read, False)
        said = "SIGTERM: saving after this step (a second signal stops at once)"
        assert lines.read().splitlines() == ["", said, "step 1", "step 2"]


@pytest.fixture
def listener(monkeypatch):
    """Replaces JAX's listener by one for two processes; yields its calls. `at`: where to stop."""
    found = types.SimpleNamespace(asked=[], started=0, received=0, at=None)

    def received(*_):
        found.received += 1

    def start():
        found.started += 1
        signal.signal(signal.SIGTERM, received)

    def reached(number):
        found.asked.append(number)
        return number == found.at

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.global_state, "initialize_preemption_sync_manager", start)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
    yield found
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_many_processes_agree_by_jax(listener, capsys, number):
    """JAX's own listener for SIGTERM makes all of them stop at the same place."""
    listener.at = 4
    with StopRequest() as stop:
        assert not stop.asked()
        signal.raise_signal(number)
        assert listener.received == 1 and stop.name == ""
        assert [stop.asked() for _ in range(4)] == [False, False, True, True]
        # Once the processes agree, JAX is not asked again, and another signal kills.
        assert listener.asked == [1, 2, 3, 4] and listener.started == 1
        for each in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(each) == signal.SIG_DFL
    assert ("all processes save" in capsys.readouterr().out) == (number == signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_comes_before_jax_listens_is_passed_on(listener, number):
    with StopRequest() as stop:
        signal.raise_signal(number)
        for each in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(each) == signal.SIG_DFL
        assert listener.received == 0 and not stop.asked()
        assert listener.received == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_of_many_that_has_nothing_to_save_stops_at_once(listener, number):
    with StopRequest() as stop, pytest.raises(Stopped), stop.at_once():
        signal.raise_signal(number)


def test_another_process_interrupts_what_is_done_at_once():
    """A signal to this process, which a scheduler often sends at the same time, does not kill."""
    with StopRequest() as stop:
        stop.interrupt()  # no interruptible work is under way
        with pytest.raises(Stopped), stop.at_once():
            thread = threading.Thread(target=stop.interrupt)
            thread.start()
            thread.join()
            threading.Event().wait(600)
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == ""
        for number in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(number) == signal.SIG_DFL  # but the next one does


def test_a_signal_of_ones_own_comes_before_an_interruption():
    with StopRequest() as stop:
        with pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
            signal.raise_signal(signal.SIGTERM)
        with stop.at_once():
            stop.interrupt()  # without the signal before, this would kill
