"""Converts weights between Hugging Face's format, Meta's format, and our checkpoints.

FORMAT is hf (safetensors, config.json, tokenizer), meta (consolidated.*.pth, params.json), ckpt (a
work directory, or the folder of one step) or peft (adapters: adapter_model.safetensors,
adapter_config.json). Pickles of torch (meta, pytorch_model.bin, adapter_model.bin) need
`pip install '.[meta]'`; hf and peft are written as safetensors. Only one array of one layer is in
memory at a time. The target is written as TARGET.partial and renamed when it is complete; an
existing target is an error.

A checkpoint of a run with adapters (config.lora), and adapters of peft, are merged with the base
that they were trained on; between ckpt and peft they stay adapters. Conversion to peft needs no
base; a base that --base names is compared with that of the adapters.

A checkpoint holds float32; hf, meta and peft keep the source's dtype, unless --dtype sets another.

--average converts the average of several steps of a work directory: --average=5 that of the newest
5 steps, --average=400,500,600 that of these. Steps with adapters are merged with their base first.

For a SentencePiece model, hf gets a tokenizer.json with the same ids; if that is impossible, a line
says why (`pip install '.[hf]'` brings the library that checks the ids).

Example:
  python -m llama_jax.convert --source=hf:Llama-3.2-1B --target=ckpt:runs/llama3_2_1b
  python -m llama_jax.convert --source=ckpt:runs/tiny --target=hf:exports/tiny --dtype=bfloat16
  python -m llama_jax.convert --source=ckpt:runs/tiny --target=hf:exports/average --average=3
  python -m llama_jax.convert --source=meta:llama-2-7b --target=hf:Llama-2-7b --context=4096
  python -m llama_jax.convert --source=ckpt:runs/lora --target=peft:exports/adapters
  python -m llama_jax.convert --source=peft:adapters --base=hf:Llama-2-7b --target=ckpt:runs/lora
"""

import math
import time

import numpy as np
from absl import flags

from llama_jax.cli import command
from llama_jax.errors import UserError
from llama_jax.interchange.averaged import open_average
from llama_jax.interchange.formats import Source
from llama_jax.interchange.hf import DTYPES
from llama_jax.interchange.opening import open_source, parse_place
from llama_jax.interchange.transfer import convert, export_adapters, import_adapters
from llama_jax.model.cost import parameter_count

_SOURCE = command.path_flag("source", None, "Weights to read, as FORMAT:DIR.")
_TARGET = command.path_flag("target", None, "Place to write to, as FORMAT:DIR; must not exist.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    list(DTYPES),
    "Type of the weights in an hf, meta or peft target; default: that of the source.",
)
_CONTEXT = flags.DEFINE_integer(
    "context",
    0,
    "Longest sequence in tokens, for a meta source; 0: the usual length of its model family.",
    lower_bound=0,
)
_BASE = command.path_flag(
    "base",
    "",
    "Base weights of a source's adapters, as FORMAT:DIR; default: the place that they name.",
)
_AVERAGE = flags.DEFINE_string(
    "average",
    None,
    "Steps of a ckpt source whose weights are averaged: a number N, for the newest N steps, or a "
    "list of steps, such as 400,500,600.",
)


def main() -> None:
    """Runs the command."""
    source_kind, source_folder = parse_place(_SOURCE.value, "source")
    target_kind, target_folder = parse_place(_TARGET.value, "target")
    if target_kind == "ckpt" and _DTYPE.value:
        raise UserError("a checkpoint holds float32; --dtype is for hf, meta and peft")
    if _CONTEXT.value and source_kind != "meta":
        raise UserError("--context is for meta, whose params.json does not contain it")
    if _AVERAGE.value is not None and source_kind != "ckpt":
        raise UserError(f"--average reads steps of a run: --source=ckpt:DIR; got {_SOURCE.value!r}")
    if _AVERAGE.value is not None and target_kind == "peft":
        raise UserError(
            "--average merges adapters with their base, so --target must be hf, meta or ckpt"
        )
    start = time.perf_counter()
    if target_kind == "peft" or (source_kind, target_kind) == ("peft", "ckpt"):
        if source_kind not in ("peft", "ckpt") or source_kind == target_kind:
            raise UserError(f"adapters cannot be converted from {source_kind} to {target_kind}")
        if target_kind == "peft":
            written = export_adapters(source_folder, target_folder, _BASE.value, _DTYPE.value or "")
        else:
            written = import_adapters(source_folder, target_folder, _BASE.value)
        lora = written.config.lora
        print(f"wrote {target_folder}: adapters of rank {lora.rank} for {lora.targets}")
        return
    source: Source
    if _AVERAGE.value is not None:
        source = average = open_average(source_folder, _AVERAGE.value, _BASE.value)
        print(f"average of steps {', '.join(map(str, average.steps))}")
    else:
        source = open_source(source_kind, source_folder, _CONTEXT.value, _BASE.value)
    written = convert(source, target_kind, target_folder, _DTYPE.value or "")
    model = written.config.model
    count = parameter_count(model)
    print(
        f"wrote {target_folder}: {count:,} parameters, {written.dtype}, "
        f"{math.ceil(count * np.dtype(DTYPES[written.dtype]).itemsize / 1e6):,} MB, "
        f"in {time.perf_counter() - start:.1f} s"
    )
    if target_kind == "ckpt":
        print(f"sample  python -m llama_jax.generate --checkpoint={target_folder} --prompt=TEXT")


if __name__ == "__main__":
    command.run(main, __doc__)
