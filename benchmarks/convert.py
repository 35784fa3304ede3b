"""Measures time and memory of conversions, and prints a line of JSON for each.

A checkpoint of random weights is written in Hugging Face's format, in bfloat16, converted to our
format, and back. A checkpoint in the form that training saves is exported, too. Each conversion
runs in its own process, whose largest resident memory is reported. The cost of the check of an
export is measured in one process, by exports with and without it in turn.

  python benchmarks/convert.py --folder=FOLDER     # LLaMA-2 7B; needs 41 GB of space
  python benchmarks/convert.py --only_check        # only the cost of the check of an export
"""

import dataclasses
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import app, flags, logging

from llama_jax.checkpoint import saved_step
from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.fingerprint import LayerPrints
from llama_jax.config import Config, ModelConfig
from llama_jax.interchange import formats
from llama_jax.interchange.ckpt import CkptSource
from llama_jax.interchange.transfer import convert
from llama_jax.model.cost import parameter_count
from llama_jax.train.step import TrainState, abstract_state

ROOT = pathlib.Path(__file__).parent.parent
# Many layers, so that one layer is much smaller than the model.
TRAINED = Config(
    model=ModelConfig(
        vocab_size=1024, dim=2048, n_layers=16, n_heads=16, n_kv_heads=16, ffn_dim=5632
    )
)


def llama2_7b(layers: int) -> Config:
    """Returns a config with the shapes of LLaMA-2 7B and this number of layers."""
    return Config(model=ModelConfig(n_layers=layers, norm_eps=1e-5))


class Repeated:
    """A source of bfloat16 weights of any size, which are parts of one array of random numbers."""

    def __init__(self, config: Config) -> None:
        self.description = formats.Description(config, "bfloat16", {})
        numbers = np.random.default_rng(0).standard_normal(2**24, np.float32) * 0.02
        self._numbers = numbers.astype(ml_dtypes.bfloat16)
        self._shapes = formats.shapes(config.model)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Returns an array that differs from layer to layer."""
        return np.resize(np.roll(self._numbers, layer or 0), self._shapes[path])


# Runs a command and prints its largest resident memory in KiB. It is a small process of its own,
# because Linux also counts the memory of the parent at the time of the fork.
WATCH = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def run(source: str, target: str, *flags: str) -> dict[str, Any]:
    """Runs the command `convert`, and returns its seconds and its largest memory in GB."""
    arguments = (f"--source={source}", f"--target={target}", *flags)
    command = [sys.executable, "-m", "llama_jax.convert", *arguments]
    start = time.perf_counter()
    watch = [sys.executable, "-c", WATCH, *command]
    process = subprocess.run(watch, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    seconds = round(time.perf_counter() - start, 1)
    places = " -> ".join(place.partition(":")[0] for place in (source, target))
    peak = round(int(process.stdout) * 1024 / 1e9, 2)
    return {"what": places, "seconds": seconds, "peak_gb": peak}


def in_and_out(config: Config, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Converts from Hugging Face to our format and back; the result stays in `folder/again`."""
    convert(Repeated(config), "hf", folder / "hf")
    results = [run(f"hf:{folder}/hf", f"ckpt:{folder}/run")]
    shutil.rmtree(folder / "hf")
    again = f"hf:{folder}/again"
    results.append(run(f"ckpt:{folder}/run", again, "--dtype=bfloat16"))
    shutil.rmtree(folder / "run")
    return results


def save_trained(config: Config, workdir: pathlib.Path) -> None:
    """Saves a step as `train` does, without optimiser state; a weight is its first index."""

    def numbered(leaf: Any) -> jax.Array:
        shape = (-1,) + (1,) * (len(leaf.shape) - 1)
        return jax.numpy.zeros(leaf.shape) + jax.numpy.arange(leaf.shape[0]).reshape(shape)

    params = jax.tree.map(numbered, abstract_state(config).params)
    state = TrainState(jax.numpy.ones((), "int32"), params, opt_state=())
    with Checkpointer(workdir, config) as saver:
        saver.save(state.to_items(), saved_step.StepMeta(config, 1, "none", b""))


class Unprinted(LayerPrints):
    """A replacement that computes no fingerprints, so that the export compares none."""

    def add(self, path: str, layer: int | None, array: Any) -> dict[str, int]:
        """Ignores an array; see `LayerPrints.add`."""
        return {}


def check(folder: pathlib.Path, pairs: int = 7) -> dict[str, Any]:
    """Measures exports with and without fingerprints in turn; leaves out the first of each.

    Args:
      folder: folder for the checkpoints.
      pairs: number of timed pairs of exports.
    """
    model = dataclasses.replace(TRAINED.model, n_layers=1)
    convert(Repeated(Config(model=model)), "ckpt", folder / "run")
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for checked in (True, False) * (pairs + 1):
        source = CkptSource(saved_step.find_step(folder / "run"))
        if not checked:
            source._prints = Unprinted(model.n_layers)
        start = time.perf_counter()
        convert(source, "hf", folder / "checked")
        seconds[checked].append(time.perf_counter() - start)
        shutil.rmtree(folder / "checked")
    with_it, without = (statistics.median(seconds[checked][1:]) for checked in (True, False))
    return {
        "what": "ckpt -> hf, with its check",
        "bytes": 4 * parameter_count(model),
        "seconds": round(with_it, 2),
        "ratio": round(with_it / without, 2),
    }


def main(_: list[str]) -> None:
    """Runs the command."""
    logging.set_verbosity(logging.ERROR)  # orbax logs every save
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as name:
        folder = pathlib.Path(name)
        print(json.dumps({"model": "1 layer of dim 2048", **check(folder)}), flush=True)
        if _ONLY_CHECK.value:
            return
        for model, results in (
            (f"LLaMA-2 7B, {_LAYERS.value} layers", in_and_out(llama2_7b(_LAYERS.value), folder)),
            ("trained, 0.8B, 16 layers", trained(folder)),
        ):
            for result in results:
                print(json.dumps({"model": model, **result}), flush=True)


def trained(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Exports a step that one device saved."""
    save_trained(TRAINED, folder / "trained")
    return [run(f"ckpt:{folder}/trained", f"hf:{folder}/exported", "--dtype=bfloat16")]


if __name__ == "__main__":
    _FOLDER = flags.DEFINE_string("folder", None, "Folder to write to; default: the system's.")
    _LAYERS = flags.DEFINE_integer("layers", 32, "Number of layers of the 7B shape.")
    _ONLY_CHECK = flags.DEFINE_bool("only_check", False, "Measure only the cost of the check.")
    app.run(main)
