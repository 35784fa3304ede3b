"""A counter of the programs that this process has compiled."""

import functools

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def compiled_programs() -> int:
    """Returns the number of programs compiled, or read from the cache, since the first call."""
    _listen()
    return _count


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_duration_secs_listener(_add)


def _add(event: str, duration_secs: float, **_: str | int) -> None:
    global _count
    if event == _EVENT:
        _count += 1
