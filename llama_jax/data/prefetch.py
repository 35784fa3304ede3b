"""Makes batches ahead of their use, in the threads of tf.data."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llama_jax.data.source import Local
from llama_jax.errors import UserError

PREFETCH = 2  # batches ready on the host


def quieten_tensorflow() -> None:
    """Keeps what TensorFlow says about itself off the terminal; call it before the import.

    Here TensorFlow only feeds data. Its note about oneDNN is written whatever the log level is.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def made_ahead(
    make_rows: Callable[[int, range], Local], rows: range, start: int, stop: int
) -> Iterator[Local]:
    """Yields the batches of the steps start..stop, which several threads make.

    Only this function imports TensorFlow, so a source with its own `batches` does not need it.

    Args:
      make_rows: `BatchSource.rows`, which several threads call at once.
      rows: rows of the global batch to make.
      start: the first step.
      stop: the step after the last one.

    Raises:
      UserError: `make_rows` has raised it.
    """
    quieten_tensorflow()
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # otherwise TensorFlow takes memory that JAX needs
    template = make_rows(start, rows)
    names = list(template)
    failures: list[UserError] = []

    def make(step: np.ndarray) -> list[np.ndarray]:
        try:
            batch = make_rows(int(step), rows)
        except UserError as error:  # TensorFlow would hide it in its own error
            failures.append(error)
            raise
        return [batch[name] for name in names]

    def load(step: Any) -> dict[str, Any]:
        # One call for the whole batch: each call costs 0.1 ms, whatever it returns.
        arrays = tf.numpy_function(make, [step], [template[n].dtype for n in names], stateful=False)
        return {
            name: tf.ensure_shape(array, template[name].shape)
            for name, array in zip(names, arrays, strict=True)
        }

    dataset = tf.data.Dataset.range(start, stop).map(
        load, num_parallel_calls=PREFETCH, deterministic=True
    )
    # All sizes are given, so there is nothing to tune. When an iterator ends, its tuner can miss
    # the signal to stop and sleep on, for up to the lifetime of the iterator, or 60 s.
    options = tf.data.Options()
    options.autotune.enabled = False
    try:
        yield from dataset.prefetch(PREFETCH).with_options(options).as_numpy_iterator()
    except tf.errors.OpError:
        if failures:
            raise failures[0] from None
        raise
