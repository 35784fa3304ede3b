"""Compiles the train step for a machine that you do not have: does it fit, how long does it take?

The compiler of the target runs on this computer, ahead of time (TPU: `pip install '.[tpu]'`, GPU:
`pip install '.[cuda13]'`). Its figures for memory and collectives are exact; the time of a step is
predicted from its schedule and the chip's data sheet, see roofline.py. Compiler flags are the same
as in training: those of a TPU by default, others by --xla_preset; set flags of your own in
XLA_FLAGS, for TPUs in LIBTPU_INIT_ARGS.

Example:
  python -m llama_jax.plan --config=configs/7b.py --topology=v5p-128
  python -m llama_jax.plan --config=configs/65b.py --topology=v5p:8x8x8 --json \\
      --config.mesh.tensor=4
  python -m llama_jax.plan --config=configs/65b.py --topology=a100-80g:256x8 --price=1.50 \\
      --xla_preset=ampere --config.mesh.data=8 --config.model.remat=dots
  python -m llama_jax.plan --config=configs/7b.py --topology=v5e-256 --slices=2
  python -m llama_jax.plan --config=configs/13b.py --topology=h100:32x8 --search
  python -m llama_jax.plan --calibration
"""

import json
import math

import jax
from absl import flags

from llama_jax.cli import command
from llama_jax.errors import UserError
from llama_jax.hardware import xla_flags
from llama_jax.hardware.topology import parse_topology
from llama_jax.plan import calibration
from llama_jax.plan.advice import advice
from llama_jax.plan.report import plan, stage_to_plan, table
from llama_jax.plan.search import search

_CONFIG = command.config_flag()
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "A TPU slice, such as v5p-1024 or v5p:8x8x8, or nodes x GPUs, such as h100:256x8.",
)
_STEP = flags.DEFINE_integer(
    "step",
    None,
    "Step of the run whose stage is planned, for a config with train.stages; default: the last "
    "step.",
    lower_bound=1,
)
_SLICES = flags.DEFINE_integer("slices", 1, "Number of TPU slices; the product of config.dcn.")
_PRICE = flags.DEFINE_float(
    "price", 0.0, "Dollars per chip and hour, to compute the cost of the run."
)
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "Try mesh shapes, remat policies and numbers of microbatches, with a line for each; show the "
    "fastest that fits. For TPUs each is compiled up to its schedule, which takes seconds, and "
    "only the best two to the end.",
)
_SEARCH_LIMIT = flags.DEFINE_integer(
    "search_limit", 6, "Candidates that --search tries.", lower_bound=1
)
_XLA_PRESET = flags.DEFINE_string(
    "xla_preset", xla_flags.AUTO, f"{xla_flags.HELP} The chip is that of --topology."
)
_CALIBRATION = flags.DEFINE_bool(
    "calibration", False, "Print measured and predicted step times, and exit."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main() -> None:
    """Runs the command."""
    if _CALIBRATION.value:
        print(calibration.table())
        return
    config = command.load_config(_CONFIG)
    if _TOPOLOGY.value is None:
        raise UserError("--topology is missing; try --topology=v5p-128 or --topology=h100:256x8")
    topology = parse_topology(_TOPOLOGY.value, _SLICES.value)
    if not 0 <= _PRICE.value < math.inf:
        raise UserError(f"--price must be a number of dollars, got {_PRICE.value}")
    config, stage = stage_to_plan(config, _STEP.value)
    tpu = topology.chip.name if topology.chip.torus else ""
    chosen = xla_flags.use_preset(_XLA_PRESET.value, tpu=tpu)
    jax.config.update("jax_platforms", "cpu")  # the compiler needs no device
    if _SEARCH.value:
        result = search(config, topology, _SEARCH_LIMIT.value, _PRICE.value)
    else:
        result = plan(config, topology, _PRICE.value)
        if not result["fits"]:
            result["would_fit"] = advice(config, topology, result)
    result["xla_preset"] = chosen.preset
    if stage:
        result["stage"] = stage
    if _JSON.value:
        print(json.dumps(result))
        return
    print(f"{table(result)}\nflags        {chosen}")
    if stage:
        print(f"stage        {stage}")


if __name__ == "__main__":
    command.run(main, __doc__)
