"""Batches of the host to batches of the devices, made ahead of the step that takes them."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from llama_jax.data.batches import BatchSource, Local, SyntheticBatches
from llama_jax.data.streaming import StreamingBatches
from llama_jax.errors import UserError

PREFETCH = 2  # batches ready on the host


def local_rows(sharding: jax.sharding.NamedSharding, global_batch: int, seq_len: int) -> range:
    """The rows of the global batch that this process's devices hold.

    Raises:
      UserError: they are not one run of rows, so the mesh puts hosts in a strange order.
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


def host_batches(
    source: BatchSource | StreamingBatches, rows: range, start: int, stop: int
) -> Iterator[Local]:
    """The batches of the steps start..stop, made ahead by tf.data.

    TensorFlow is imported here, and only for shards: synthetic batches need none.
    """
    if isinstance(source, StreamingBatches):
        yield from source.batches(rows, start, stop)
        return
    if isinstance(source, SyntheticBatches):
        for step in range(start, stop):
            yield source.rows(step, rows)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # they are JAX's
    template = source.rows(start, rows)
    names = list(template)
    failures: list[UserError] = []

    def make(step: np.ndarray) -> list[np.ndarray]:
        try:
            batch = source.rows(int(step), rows)
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


def device_batches(
    source: BatchSource | StreamingBatches,
    start: int,
    stop: int,
    sharding: jax.sharding.NamedSharding,
    global_batch: int,
    seq_len: int,
) -> Iterator[dict[str, jax.Array]]:
    """Global device batches of the steps start..stop; each host makes only its own rows.

    The batch of the next step is on its way to the device while the present one is computed.

    Raises:
      UserError: a damaged shard, or a mesh whose rows are not contiguous per host.
    """
    rows = local_rows(sharding, global_batch, seq_len)
    ahead: dict[str, jax.Array] | None = None
    for local in host_batches(source, rows, start, stop):
        batch = {
            name: jax.make_array_from_process_local_data(sharding, array, (global_batch, seq_len))
            for name, array in local.items()
        }
        if ahead is not None:
            yield ahead
        ahead = batch
    if ahead is not None:
        yield ahead
