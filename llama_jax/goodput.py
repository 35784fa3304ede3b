"""Where the time of a run goes, over all its restarts (goodput, as in ML Goodput Measurement)."""

import contextlib
import json
import time
from collections.abc import Iterator

from etils import epath

from llama_jax.files import write_atomically

# init: start-up, data, restoring. lost: of a run that was cut off, from its last save to a restart.
PHASES = ("init", "compile", "data", "step", "eval", "checkpoint", "lost")


class Goodput:
    """Seconds in each of `PHASES`, kept in a file of the work directory.

    A phase lasts from its beginning to that of the next; `step` is what is left in the loop. The
    device works on while the host reads data or starts a save: these are times that the loop waits.
    """

    def __init__(self, path: epath.Path | None, began: float | None = None) -> None:
        """Goes on from what the file holds (None keeps no file); `began` by the monotonic clock."""
        now = time.monotonic()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.runs = 1
        self._path, self._phase, self._since = path, "init", now if began is None else began
        if path is not None and path.exists():
            try:
                record = json.loads(path.read_text())
                self.seconds |= {name: float(record["seconds"][name]) for name in PHASES}
                self.runs = int(record["runs"]) + 1
                if not record["saved_at_end"]:
                    # Wall clocks of two runs: only a report depends on them.
                    since_save = time.time() - float(record["time"])
                    self.seconds["lost"] += max(since_save - (now - self._since), 0.0)
            except (ValueError, KeyError, TypeError):
                pass  # half-written by a kill: it starts anew

    def enter(self, phase: str) -> str:
        """Begins a phase; returns the one before."""
        now = time.monotonic()
        self.seconds[self._phase] += now - self._since
        self._since, before, self._phase = now, self._phase, phase
        return before

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time inside; then the phase before goes on."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def fraction(self) -> float:
        """The share of `step` in all time so far."""
        self.enter(self._phase)
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def save(self, *, at_end: bool = False) -> None:
        """Writes the file, with a save of the state or at the end of a run that saved its last."""
        if self._path is None:
            return
        self.enter(self._phase)
        record = {
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "runs": self.runs,
            "time": time.time(),
            "saved_at_end": at_end,
        }
        with contextlib.suppress(OSError):  # a disk that is full or gone ends no run
            write_atomically(self._path, f"{json.dumps(record, indent=1)}\n".encode())

    def report(self) -> str:
        """One line, such as `97.0% of 120 s: init 2.1, compile 1.0, ... (2 runs)`."""
        fraction = self.fraction()
        parts = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        runs = f" ({self.runs} runs)" if self.runs > 1 else ""
        return f"{fraction:.1%} of {sum(self.seconds.values()):.0f} s: {parts}{runs}"
