"""Makes the batches of a source ahead, and copies them to the devices one step ahead."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from llama_jax.data.source import BatchSource, Local, check_batch, quieten_tensorflow
from llama_jax.errors import UserError


def local_rows(sharding: jax.sharding.NamedSharding, global_batch: int, seq_len: int) -> range:
    """Returns the rows of the global batch that the devices of this process hold.

    Args:
      sharding: sharding of the global batch.
      global_batch: sequences in a step, over all hosts.
      seq_len: tokens in a sequence.

    Raises:
      UserError: the rows are not contiguous: the mesh does not follow the order of the hosts.
    """
    indices = sharding.addressable_devices_indices_map((global_batch, seq_len)).values()
    spans = {index[0].indices(global_batch)[:2] for index in indices if index is not None}
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    if sum(stop - start for start, stop in spans) != last - first:
        raise UserError(
            f"this process would need rows {sorted(spans)} of the batch, which are not contiguous; "
            "order the mesh so that data and fsdp follow the hosts"
        )
    return range(first, last)


def made_ahead(
    make_rows: Callable[[int, range], Local], rows: range, start: int, stop: int, ahead: int
) -> Iterator[Local]:
    """Yields the batches of the steps start..stop; threads of tf.data make them ahead.

    Only this function imports TensorFlow, so a source whose `ahead` is 0 does not need it.

    Args:
      make_rows: `BatchSource.rows`, which several threads call at once.
      rows: rows of the global batch to make.
      start: the first step.
      stop: the step after the last one.
      ahead: number of batches that are made at once, and then wait on the host.

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
        load, num_parallel_calls=ahead, deterministic=True
    )
    # All sizes are given, so there is nothing to tune. When an iterator ends, its tuner can miss
    # the signal to stop and sleep on, for up to the lifetime of the iterator, or 60 s.
    options = tf.data.Options()
    options.autotune.enabled = False
    try:
        yield from dataset.prefetch(ahead).with_options(options).as_numpy_iterator()
    except tf.errors.OpError:
        if failures:
            raise failures[0] from None
        raise


def host_batches(source: BatchSource, rows: range, start: int, stop: int) -> Iterator[Local]:
    """Yields the batches of the steps start..stop on this host; `source.ahead` are made ahead.

    Args:
      source: makes the rows.
      rows: rows of the global batch to make.
      start: the first step.
      stop: the step after the last one.

    Raises:
      UserError: a shard is damaged.
    """
    if source.ahead:
        return made_ahead(source.rows, rows, start, stop, source.ahead)
    return source.batches(rows, start, stop)


def device_batches(
    source: BatchSource,
    start: int,
    stop: int,
    sharding: jax.sharding.NamedSharding,
    global_batch: int,
    seq_len: int,
) -> Iterator[dict[str, jax.Array]]:
    """Yields the global batches of the steps start..stop on the devices.

    Each host makes only its own rows. The batch of the next step is copied to the devices while
    they compute the current step.

    Args:
      source: makes the rows.
      start: the first step.
      stop: the step after the last one.
      sharding: sharding of a global batch.
      global_batch: sequences in a step, over all hosts.
      seq_len: tokens in a sequence.

    Raises:
      UserError: a shard is damaged, a batch has wrong names, shapes or dtypes, or the rows of a
        host are not contiguous.
    """
    rows = local_rows(sharding, global_batch, seq_len)
    ahead: dict[str, jax.Array] | None = None
    for local in host_batches(source, rows, start, stop):
        check_batch(source, local, len(rows), seq_len)
        batch = {
            name: jax.make_array_from_process_local_data(sharding, array, (global_batch, seq_len))
            for name, array in local.items()
        }
        if ahead is not None:
            yield ahead
        ahead = batch
    if ahead is not None:
        yield ahead
