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
    """Yields the batches of the steps start..stop, made by several threads.

    TensorFlow is imported here, and only here: a source that makes its batches itself needs none.

    Args:
      make_rows: `BatchSource.rows`, which several threads call at once.
      rows: of the global batch.
      start: the first step.
      stop: the step after the last one.

    Raises:
      UserError: as `make_rows`.
    """
    quieten_tensorflow()
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # they are JAX's
    template = make_rows(start, rows)
    names = list(template)
    failures: list[UserError] = []

    def make(step: np.ndarray) -> list[np.ndarray]:
        try:
            batch = make_rows(int(step), rows)
        except UserError as error:  # TensorFlow would bury it in an error of its own
            failures.append(error)
            raise
        return [batch[name] for name in names]

    def load(step: Any) -> dict[str, Any]:
        # One call for the whole batch: a call costs 0.1 ms, whatever it returns.
        arrays = tf.numpy_function(make, [step], [template[n].dtype for n in names], stateful=False)
        return {
            name: tf.ensure_shape(array, template[name].shape)
            for name, array in zip(names, arrays, strict=True)
        }

    dataset = tf.data.Dataset.range(start, stop).map(
        load, num_parallel_calls=PREFETCH, deterministic=True
    )
    # With all sizes given there is nothing to tune; and at the end of an iterator its tuner can
    # miss the signal to stop, and sleeps on: up to as long as the iterator has lived, or 60 s.
    options = tf.data.Options()
    options.autotune.enabled = False
    try:
        yield from dataset.prefetch(PREFETCH).with_options(options).as_numpy_iterator()
    except tf.errors.OpError:
        if failures:
            raise failures[0] from None
        raise
