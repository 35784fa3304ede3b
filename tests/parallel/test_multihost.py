import collections
import concurrent.futures
import threading

import jax
import pytest

from llama_jax.parallel import multihost
from llama_jax.parallel.multihost import Barrier, agreed


def test_agreed_is_the_text_itself_on_one_process():
    assert agreed("x") == "x" and agreed("") == ""


def test_a_meeting_of_one_process():
    meeting = Barrier("save 1")
    meeting.wait()
    assert not meeting.failed
    with pytest.raises(OSError, match=r"^no space$"):
        meeting.wait("no space")
    assert meeting.failed


class Coordinator:
    """Stands in for JAX's coordinator, for threads that act as two processes."""

    def __init__(self):
        self.values = {}
        self.barriers = collections.defaultdict(lambda: threading.Barrier(2, timeout=600))
        self.lock = threading.Lock()

    def key_value_set(self, key, value):
        assert key not in self.values
        value.encode()  # JAX's coordinator takes only UTF-8
        self.values[key] = value

    def wait_at_barrier(self, place, timeout_ms):
        assert 86_400_000 < timeout_ms < 2**31
        with self.lock:
            barrier = self.barriers[place]
        barrier.wait()

    def key_value_dir_get(self, place):
        return [(key, text) for key, text in self.values.items() if key.startswith(place)]


@pytest.fixture
def two(monkeypatch):
    """Returns a function that makes a call in two "processes", and returns results or errors."""
    mine = threading.local()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: mine.index)
    monkeypatch.setattr(multihost.distributed.global_state, "client", Coordinator())

    def run(call):
        def one(index):
            mine.index = index
            try:
                return call(index)
            except (OSError, threading.BrokenBarrierError) as error:
                return str(error)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))

    return run


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("process", [0, 1])
def test_a_problem_is_known_to_all_at_the_stage_where_it_is(two, stage, process):
    meetings = [Barrier("save 1"), Barrier("save 1")]

    def work(index):
        for each in range(1, 4):
            meetings[index].wait("no space \udcff" if (each, index) == (stage, process) else "")
        return "done"

    assert two(work) == [f"process {process}: no space \udcff"] * 2
    assert [meeting._stage for meeting in meetings] == [stage, stage]
    assert all(meeting.failed for meeting in meetings)


def test_the_next_meeting_knows_nothing_of_it(two):
    two(lambda index: Barrier("save 1").wait("no space" if index else ""))
    assert two(lambda index: Barrier("save 2").wait()) == [None, None]


def test_who_cannot_meet_does_not_try_again(two):
    meeting = Barrier("save 1")
    multihost.distributed.global_state.client.barriers[f"llama_jax/{meeting._name}/1"].abort()
    two(lambda index: index or meeting.wait())
    assert meeting.failed


def test_a_failed_collective_is_printed_before_the_coordinator_is_asked(monkeypatch, capsys):
    said = []

    class Gone:
        """A coordinator that has ended: JAX ends any process that contacts it."""

        def blocking_key_value_get(self, key, timeout_ms):
            asked.wait()
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")

        def key_value_set(self, key, value):
            said.append(capsys.readouterr().err)
            asked.set()
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    asked = threading.Event()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost.distributed.global_state, "client", Gone())
    monkeypatch.setattr(multihost, "_peers", multihost._peers)  # restored at the end of the test
    with pytest.raises(jax.errors.JaxRuntimeError, match="reset by peer"), multihost.Peers():
        raise jax.errors.JaxRuntimeError("Connection reset by peer")
    assert len(said) == 1 and "Connection reset by peer" in said[0] and "Traceback" in said[0]
