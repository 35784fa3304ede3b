"""Converts weights between Hugging Face's format, Meta's, and our checkpoints.

FORMAT is hf (safetensors, config.json, tokenizer), meta (consolidated.*.pth, params.json), ckpt (a
work directory, or the folder of one step) or peft (adapters: adapter_model.safetensors,
adapter_config.json). Pickles of torch (meta, pytorch_model.bin, adapter_model.bin) need
`pip install '.[meta]'`; hf and peft are written as safetensors. One array of one layer is in memory
at a time. The target is written beside its place, as TARGET.partial, and gets its name when it is
complete; a target that exists is refused.

A checkpoint of a run with adapters (config.lora) is merged with the base that it was trained on,
and adapters of peft with theirs; between ckpt and peft they stay adapters. To go to peft they need
no base: one that --base names is compared with theirs.

A checkpoint holds float32; hf, meta and peft keep the source's dtype, unless --dtype says another.

For a SentencePiece model, hf gets a tokenizer.json with the same ids, or a line says why not
(`pip install '.[hf]'` has the library that checks it).

Example:
  python -m llama_jax.convert --source=hf:Llama-3.2-1B --target=ckpt:runs/llama3_2_1b
  python -m llama_jax.convert --source=ckpt:runs/tiny --target=hf:exports/tiny --dtype=bfloat16
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
from llama_jax.interchange.hf import DTYPES
from llama_jax.interchange.opening import open_source, parse_place
from llama_jax.interchange.transfer import convert, export_adapters, import_adapters
from llama_jax.model.cost import parameter_count

_SOURCE = command.path_flag("source", None, "What to read, as FORMAT:DIR.")
_TARGET = command.path_flag("target", None, "What to write, as FORMAT:DIR; must not exist.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    list(DTYPES),
    "Of an hf, meta or peft target's weights; default: the source's.",
)
_CONTEXT = flags.DEFINE_integer(
    "context",
    0,
    "Longest sequence in tokens, for a meta source; 0: by the family's habit.",
    lower_bound=0,
)
_BASE = command.path_flag(
    "base",
    "",
    "Weights below the adapters of a source, as FORMAT:DIR; default: where these say it was.",
)


def main() -> None:
    """Runs the command."""
    source_kind, source_folder = parse_place(_SOURCE.value, "source")
    target_kind, target_folder = parse_place(_TARGET.value, "target")
    if target_kind == "ckpt" and _DTYPE.value:
        raise UserError("a checkpoint holds float32; --dtype is for hf, meta and peft")
    if _CONTEXT.value and source_kind != "meta":
        raise UserError("--context is for meta, whose params.json does not tell it")
    start = time.perf_counter()
    if target_kind == "peft" or (source_kind, target_kind) == ("peft", "ckpt"):
        if source_kind not in ("peft", "ckpt") or source_kind == target_kind:
            raise UserError(f"{source_kind} has no adapters for {target_kind}")
        if target_kind == "peft":
            written = export_adapters(source_folder, target_folder, _BASE.value, _DTYPE.value or "")
        else:
            written = import_adapters(source_folder, target_folder, _BASE.value)
        lora = written.config.lora
        print(f"wrote {target_folder}: adapters of rank {lora.rank} for {lora.targets}")
        return
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
