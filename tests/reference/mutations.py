"""Foreign files with something changed: the same ones in every run."""

import copy
import json
import random

STRANGE = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "x", "../x", "\ud800", "\n", "é" * 300, [], [[]], {}, {"a": {}}, [None]),
)


def of_bytes(content, count, seed=0):
    """Yields copies of some bytes, in each of which a few are changed, added or removed."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            place, kind = rng.randrange(len(changed) + 1), rng.randrange(5)
            if kind == 0:
                changed[place : place + 1] = bytes([rng.randrange(256)])
            elif kind == 1:
                changed[place:place] = rng.choice((b'"', b"{", b"]", b"9", b"\xff", b"\0", b"\n"))
            elif kind == 2:
                del changed[place : place + rng.choice((1, 5, 50))]
            elif kind == 3:
                del changed[place:]
            else:
                changed[place:place] = changed[place : place + 40]
        yield bytes(changed)


def of_json(values, count, seed=0):
    """Yields copies of a JSON value, in each of which one or two parts are changed or removed."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(values)
        for _ in range(rng.choice((1, 1, 2))):
            changed = _one(changed, rng)
        yield changed


def _one(value, rng):
    if not isinstance(value, dict | list) or not value or rng.random() < 0.03:
        return rng.choice(STRANGE)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value[key], dict | list) and rng.random() < 0.7:
        value[key] = _one(value[key], rng)
    elif rng.random() < 0.2:
        del value[key]
    else:
        value[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def of_json_file(content, count, seed=0):
    """Yields both kinds of changes of a JSON file, an empty one, and one nested too deeply."""
    yield b"[" * 100_000
    yield b""
    yield from of_bytes(content, count // 2, seed)
    for values in of_json(json.loads(content), count // 2, seed):
        yield json.dumps(values).encode()
