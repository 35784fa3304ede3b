"""The time that a run spends in each phase, over all restarts (see ML Goodput Measurement)."""

import contextlib
import json
import time
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from llama_jax.errors import UserError, as_user_error, check_type, require
from llama_jax.files import read_json, write_atomically

# init: start-up, opening data, restoring. lost: after a crash, from the last save to the restart.
PHASES = ("init", "compile", "data", "step", "eval", "checkpoint", "lost")
_EARLIEST = 10**9  # seconds since 1970: an earlier time (before 2001) is not that of a save


class Goodput:
    """Counts the seconds in each of `PHASES`, and keeps them in a file of the work directory.

    A phase ends when the next one begins; `step` is the rest of the loop's time. The device
    continues to work while the host reads data or starts a save, so these phases are the time for
    which the loop waits.
    """

    def __init__(self, path: epath.Path | None, began: float | None = None) -> None:
        """Continues the counts of an earlier run.

        Args:
          path: the file; None: keep no file.
          began: time at which this run began, by `time.monotonic`; None: now.
        """
        now = time.monotonic()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.runs = 1
        self._path, self._phase, self._since = path, "init", now if began is None else began
        if path is not None and path.exists():
            try:
                record = _read(path)
            except UserError as error:
                print(f"warning: {error}; goodput is counted from zero", flush=True)
                return
            self.seconds |= record["seconds"]
            self.runs = record["runs"] + 1
            if not record["saved_at_end"]:
                # Wall clocks of two runs may differ, but only a report depends on them.
                since_save = time.time() - record["time"]
                self.seconds["lost"] += max(since_save - (now - self._since), 0.0)

    def enter(self, phase: str) -> str:
        """Begins a phase, and returns the previous one."""
        now = time.monotonic()
        self.seconds[self._phase] += now - self._since
        self._since, before, self._phase = now, self._phase, phase
        return before

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the `with` block as a phase; then the previous phase continues."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def fraction(self) -> float:
        """Returns the fraction of all time so far that was spent in `step`."""
        self.enter(self._phase)
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def save(self, *, at_end: bool = False) -> None:
        """Writes the file; call it with each save of the state, because later time may be lost.

        Args:
          at_end: whether the run ends here with its state saved, so that no time is lost.
        """
        if self._path is None:
            return
        self.enter(self._phase)
        record: dict[str, Any] = {
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "runs": self.runs,
            "time": time.time(),
            "saved_at_end": at_end,
        }
        record["crc32"] = _crc32(record)
        with contextlib.suppress(OSError):  # a full or missing disk does not end the run
            write_atomically(self._path, f"{json.dumps(record, indent=1)}\n".encode())

    def report(self) -> str:
        """Returns one line, such as `97.0% of 120 s: init 2.1, compile 1.0, ... (2 runs)`."""
        fraction = self.fraction()
        parts = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        runs = f" ({self.runs} runs)" if self.runs > 1 else ""
        return f"{fraction:.1%} of {sum(self.seconds.values()):.0f} s: {parts}{runs}"


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _read(path: epath.Path) -> dict[str, Any]:
    """Reads the counts that an earlier run kept.

    Raises:
      UserError: the file cannot be read or is damaged, or its numbers are impossible.
    """
    record = read_json(path)
    seal = record.pop("crc32", None)  # files of earlier versions have no checksum
    require(seal in (None, _crc32(record)), f"{path} is not as it was written")
    with as_user_error(str(path)):
        seconds = {
            name: check_type(f"{path}: {name}", record["seconds"][name], float) for name in PHASES
        }
        saved = check_type(f"{path}: time", record["time"], float)
        runs = check_type(f"{path}: runs", record["runs"], int)
        at_end = check_type(f"{path}: saved_at_end", record["saved_at_end"], bool)
    total = sum(seconds.values())
    good = min(seconds.values()) >= 0 and saved >= max(_EARLIEST, total) and 1 <= runs < 2**31
    require(good, f"{path} holds impossible numbers")
    return {"seconds": seconds, "runs": runs, "time": saved, "saved_at_end": at_end}
