import os
import signal

import jax
import pytest

from llama_jax.signals import Stopped, StopRequest


def test_the_first_signal_asks_and_the_second_kills(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.at(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM" and stop.at(2)
        for number in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before
    assert "saving after this step" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_has_nothing_to_save_stops_at_once(number):
    name = signal.Signals(number).name
    with StopRequest() as stop, pytest.raises(Stopped, match=name), stop.at_once():
        signal.raise_signal(number)


def test_many_processes_leave_it_to_jax(monkeypatch, capsys):
    """Its listener for SIGTERM, which is not Python's, makes all of them stop at the same step."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) == before
        signal.raise_signal(signal.SIGINT)
        assert stop.name == ""  # until all have agreed on the step
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert "all processes save" in capsys.readouterr().out
