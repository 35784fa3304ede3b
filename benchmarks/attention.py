"""Compares the attention backends on this device: speed, and error against float64.

Prints one line of JSON for each shape and backend: milliseconds and TFLOP/s of forward and backward
together, where only the visible half of the causal square counts; and the largest error of the
output and each gradient, as a fraction of its largest value, against NumPy in float64 for one
sequence of 512 tokens.

Example:
  python benchmarks/attention.py
  python benchmarks/attention.py --shapes=1x512x4x2x64 --rounds=3
"""

import functools
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llama_jax.cli import command
from llama_jax.errors import UserError
from llama_jax.model.attention import attention

EXACT_TOKENS = 512


def arrays(shape: tuple[int, ...], segments: int) -> tuple[list[jax.Array], jax.Array | None]:
    """Makes random inputs of attention in bfloat16.

    Args:
      shape: B, T, N, K and H.
      segments: number of documents per sequence; 0: no segment ids.

    Returns:
      Queries, keys, values and the gradient of the output; and the segment ids or None.
    """
    b, t, n, k, h = shape
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(b, t, n, h), (b, t, k, h), (b, t, k, h), (b, t, n, h)]
    made = [jax.random.normal(*pair, jnp.bfloat16) for pair in zip(keys, shapes, strict=True)]
    if not segments:
        return made, None
    ids_T = jnp.arange(t, dtype=jnp.int32) * segments // t + 1
    return made, jnp.broadcast_to(ids_T, (b, t))


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, mask: np.ndarray) -> list:
    """Computes the output and the gradients of q, k and v for one sequence with NumPy.

    Args:
      q: queries, T N H, float64.
      k: keys, T K H.
      v: values, T K H.
      d_out: gradient of the output, T N H.
      mask: T T; True where a query sees a key.
    """
    group, root = q.shape[1] // k.shape[1], q.shape[2] ** 0.5
    keys, values = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.where(mask, np.einsum("tnh,snh->nts", q, keys) / root, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("tnh,snh->nts", d_out, values)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / root

    def by_group(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], -1, group, x.shape[2]).sum(2)

    return [
        np.einsum("nts,snh->tnh", weights, values),
        np.einsum("nts,snh->tnh", d_scores, keys),
        by_group(np.einsum("nts,tnh->snh", d_scores, q)),
        by_group(np.einsum("nts,tnh->snh", weights, d_out)),
    ]


def program(backend: str, segments: jax.Array | None) -> Callable[..., list[jax.Array]]:
    """Returns a compiled function from the inputs of `arrays` to the output and gradients."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> list[jax.Array]:
        ids = None if segments is None else (segments, segments)
        call = functools.partial(attention, segment_ids=ids, backend=backend)
        out, backward = jax.vjp(call, q, k, v)
        return [out, *backward(d_out)]

    return run


def errors(backend: str, shape: tuple[int, ...], segments: int) -> dict[str, float]:
    """Measures the largest errors of output and gradients, as fractions of their largest values.

    Args:
      backend: name of the backend.
      shape: see `arrays`; B and T are replaced by 1 and `EXACT_TOKENS`.
      segments: see `arrays`.
    """
    made, ids = arrays((1, EXACT_TOKENS, *shape[2:]), segments)
    found = program(backend, ids)(*made)
    mask = np.tril(np.ones((EXACT_TOKENS, EXACT_TOKENS), bool))
    if ids is not None:
        row = np.asarray(ids[0])
        mask &= row[:, None] == row[None, :]
    q, k, v, d_out = (np.asarray(x[0], np.float64) for x in made)
    wanted = exact(q, k, v, d_out, mask)
    pairs = zip(("out", "dq", "dk", "dv"), found, wanted, strict=True)
    return {
        name: float(np.abs(np.asarray(x[0], np.float64) - y).max() / np.abs(y).max())
        for name, x, y in pairs
    }


def measure(backend: str, shape: tuple[int, ...], segments: int, rounds: int) -> dict[str, object]:
    """Measures one backend, and returns a line of the report.

    Args:
      backend: name of the backend.
      shape: see `arrays`.
      segments: see `arrays`.
      rounds: timed calls.
    """
    b, t, n, _, h = shape
    line = {"backend": backend, "shape": "x".join(map(str, shape)), "segments": segments}
    try:
        made, ids = arrays(shape, segments)
        run = program(backend, ids)
        jax.block_until_ready([run(*made) for _ in range(3)])
        began = time.perf_counter()
        for _ in range(rounds):
            out = run(*made)
        jax.block_until_ready(out)
        seconds = (time.perf_counter() - began) / rounds
        # Two products forward and five backward, each over half of the square of scores.
        tflops = 7 * b * n * t * t * h / seconds / 1e12
        off = errors(backend, shape, segments)
    except (UserError, jax.errors.JaxRuntimeError, ValueError) as error:
        return {**line, "obstacle": str(error)[:200]}
    shares = {name: float(f"{x:.1e}") for name, x in off.items()}
    return {**line, "ms": round(seconds * 1e3, 3), "tflops": round(tflops, 1), "error": shares}


def main() -> None:
    """Runs the command."""
    try:
        shapes = [tuple(map(int, shape.split("x"))) for shape in _SHAPES.value]
    except ValueError:
        shapes = [()]
    if any(len(shape) != 5 for shape in shapes):
        raise UserError("--shapes must have the form BxTxNxKxH, such as 8x2048x32x32x128")
    for shape in shapes:
        for segments in (0, 4):
            for backend in _BACKENDS.value:
                line = measure(backend, shape, segments, _ROUNDS.value)
                print(json.dumps({"device": jax.devices()[0].device_kind, **line}), flush=True)


if __name__ == "__main__":
    _SHAPES = flags.DEFINE_list(
        "shapes",
        ["8x2048x32x32x128", "2x8192x32x8x128", "8x2048x32x8x64"],
        "Shapes to measure: sequences x tokens x query heads x kv heads x head dim.",
    )
    _BACKENDS = flags.DEFINE_list("backends", ["xla", "cudnn", "triton"], "Backends to measure.")
    _ROUNDS = flags.DEFINE_integer("rounds", 20, "Timed calls.", lower_bound=1)
    command.run(main, __doc__)
