"""Copies the batches of a source to the devices, one step ahead."""

from collections.abc import Iterator

import jax

from llama_jax.data.source import BatchSource, check_batch
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
    for local in source.batches(rows, start, stop):
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
