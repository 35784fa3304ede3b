"""What is checked before a run starts or goes on: that it fits, and that it is the same run."""

import math
import os

import jax
from etils import epath

from llama_jax.config import Config, difference, from_json
from llama_jax.errors import UserError

# Fields that may change when a run is resumed: where and how often, not what is trained.
RESUMABLE = (
    *("mesh.", "dcn.", "model.attention", "model.remat", "model.scan_unroll", "data.path"),
    *("data.tfds_data_dir", "data.workers", "data.part_bytes", "data.shard_tokens"),
    *("data.accept_other_data",),
    *("train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every"),
    *("train.keep_checkpoints", "train.sample_prompt", "train.profile_steps"),
    *("train.keep_every", "train.keep_best", "train.max_failed_saves"),
)


def device_memory(device: jax.Device) -> int | None:
    """Bytes that one device can hold; for CPU devices, their share of the machine's memory."""
    if device.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def check_memory(config: Config, mesh: jax.sharding.Mesh, capacity: int | None) -> None:
    """Checks that the state and its gradients alone fit, before anything is allocated.

    Raises:
      UserError: they need more than `capacity` bytes per device.
    """
    if capacity is None:
        return
    parameters = config.model.parameter_count()
    moment = 2 if config.optim.moment_dtype == "bfloat16" else 4
    shards = math.prod(mesh.shape[axis] for axis in ("fsdp", "context", "tensor"))
    # float32 weights, gradients and second moment; activations come on top.
    needed = parameters * (4 + 4 + 4 + moment) / shards
    if needed <= capacity:
        return
    kind = mesh.devices.flat[0].device_kind
    devices = math.ceil(parameters * (12 + moment) / capacity)
    raise UserError(
        f"this model has {parameters:,} parameters: weights, gradients and moments need "
        f"{needed / 2**30:,.0f} GiB per device on this mesh, and each of the {mesh.size} {kind} "
        f"device(s) has {capacity / 2**30:,.0f} GiB; use {devices} or more such devices with "
        "mesh.fsdp=-1, or try --config=configs/tiny.py"
    )


def check_workdir(config: Config, workdir: epath.Path) -> None:
    """Writes `config.json`; refuses a directory that belongs to another run.

    Raises:
      UserError: the run in `workdir` trains something else.
    """
    path = workdir / "config.json"
    if path.exists():
        try:
            saved = from_json(path.read_text())
        except UserError as error:
            raise UserError(f"{path}: {error}; use another --workdir") from error
        changed = {
            name: values
            for name, values in difference(saved, config).items()
            if not name.startswith(RESUMABLE)
        }
        if changed:
            fields = "; ".join(f"{n} is {was}, now {now}" for n, (was, now) in changed.items())
            raise UserError(
                f"{workdir} holds a run of another config ({fields}); "
                "use another --workdir, or the same values"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(config.to_json())
