"""What the processes of a job tell each other about files, so that all of them do the same."""

from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its coordinator has no public name; orbax does the same
from jax.experimental import multihost_utils

_TEXT_BYTES = 1024
# Who is dead or hangs ends the job by other means: heartbeats, and the watchdog.
_WAIT_MS = 7 * 86_400_000


def agreed(text: str) -> str:
    """The first text that is not empty, over all processes: they then all do the same about it."""
    if jax.process_count() == 1:
        return text
    row = np.zeros(_TEXT_BYTES, np.uint8)
    data = text.encode()[:_TEXT_BYTES]
    row[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    texts = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows)
    return next(filter(None, texts), "")


class Meeting:
    """Where threads of all processes wait for each other while they do one thing in several stages.

    It takes no part of the devices, whose collectives are the main thread's, but JAX's coordinator.
    Whoever fails comes too, with its problem: else the others would wait for it.
    """

    def __init__(self, name: str) -> None:
        """`name` is the same on all processes, and used once in a job."""
        self._name, self._stage = name, 0
        self.failed = False  # nobody comes any more

    def wait(self, problem: str = "") -> None:
        """Returns when all processes have come to this stage, each once and without a problem.

        Raises:
          OSError: the problem of the first process that has one, on all of them.
          JaxRuntimeError: they cannot meet.
        """
        self._stage += 1
        self.failed = True
        if jax.process_count() > 1:
            problem = self._share(problem)
        if problem:
            raise OSError(problem)
        self.failed = False

    def _share(self, problem: str) -> str:
        client: Any = distributed.global_state.client
        place = f"llama_jax/{self._name}/{self._stage}"
        if problem:
            mine = f"process {jax.process_index()}: {problem}"
            client.key_value_set(f"{place}/{jax.process_index():06}", mine)
        client.wait_at_barrier(place, _WAIT_MS)
        return next((text for _, text in sorted(client.key_value_dir_get(f"{place}/"))), "")
