"""Where the time of a run goes, over all its restarts (goodput, as in ML Goodput Measurement)."""

import contextlib
import json
import time
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from llama_jax.errors import UserError, as_user_error, check_type, require
from llama_jax.files import read_json, write_atomically

# init: start-up, data, restoring. lost: of a run that was cut off, from its last save to a restart.
PHASES = ("init", "compile", "data", "step", "eval", "checkpoint", "lost")
_EARLIEST = 10**9  # seconds since 1970: no run was saved before 2001


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
                record = _read(path)
            except UserError as error:
                print(f"warning: {error}; goodput is counted anew", flush=True)
                return
            self.seconds |= record["seconds"]
            self.runs = record["runs"] + 1
            if not record["saved_at_end"]:
                # Wall clocks of two runs: only a report depends on them.
                since_save = time.time() - record["time"]
                self.seconds["lost"] += max(since_save - (now - self._since), 0.0)

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
        record: dict[str, Any] = {
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "runs": self.runs,
            "time": time.time(),
            "saved_at_end": at_end,
        }
        record["crc32"] = _crc32(record)
        with contextlib.suppress(OSError):  # a disk that is full or gone ends no run
            write_atomically(self._path, f"{json.dumps(record, indent=1)}\n".encode())

    def report(self) -> str:
        """One line, such as `97.0% of 120 s: init 2.1, compile 1.0, ... (2 runs)`."""
        fraction = self.fraction()
        parts = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        runs = f" ({self.runs} runs)" if self.runs > 1 else ""
        return f"{fraction:.1%} of {sum(self.seconds.values()):.0f} s: {parts}{runs}"


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _read(path: epath.Path) -> dict[str, Any]:
    """What a run before has kept.

    Raises:
      UserError: the file cannot be read, is not as it was written, or says what cannot be.
    """
    record = read_json(path)
    seal = record.pop("crc32", None)  # versions before wrote none
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
    require(good, f"{path} holds numbers that cannot be")
    return {"seconds": seconds, "runs": runs, "time": saved, "saved_at_end": at_end}
