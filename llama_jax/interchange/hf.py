"""Hugging Face's folders: safetensors, `config.json`, and the tokenizer's files.

A linear layer there is (out, in), ours (in, out) with heads as axes of their own: every matrix but
the embedding is transposed. RoPE rotates the same pairs in both (see `model.rope`).
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from llama_jax.config import Config, ModelConfig
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import UserError
from llama_jax.interchange import fast_tokenizer, formats, hf_config, safetensors
from llama_jax.interchange.formats import Description
from llama_jax.interchange.loading import load
from llama_jax.step import abstract_state

NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "layers/attn_norm": "model.layers.{}.input_layernorm.weight",
    "layers/attn/wq": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attn/wk": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attn/wv": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attn/wo": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/w1": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/w2": "model.layers.{}.mlp.down_proj.weight",
    "layers/mlp/w3": "model.layers.{}.mlp.up_proj.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
SHARD_SIZE = 5_000_000_000  # bytes of one file, as transformers cuts them


def groups(path: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(in, out) of our array as one matrix, which is stored transposed; None: stored as it is."""
    if path == "embed" or len(shape) == 1:
        return None
    split = 2 if path.endswith("/wo") else 1  # wo's inputs are heads and head size
    return math.prod(shape[:split]), math.prod(shape[split:])


def stored_shapes(model: ModelConfig) -> dict[tuple[str, int | None], tuple[int, ...]]:
    """(path, layer) -> shape in the file, layer after layer, as the model computes."""
    ours = formats.shapes(model)
    order = sorted(
        formats.units(model),
        key=lambda unit: (unit[0] != "embed", unit[1] is None, unit[1] or 0),
    )
    found = {}
    for path, layer in order:
        pair = groups(path, ours[path])
        found[path, layer] = ours[path] if pair is None else pair[::-1]
    return found


def name_of(path: str, layer: int | None) -> str:
    """The tensor's name there."""
    return NAMES[path].format(layer)


class HfSource:
    """A folder of safetensors; opening it checks names, shapes and sizes of all tensors."""

    def __init__(self, folder: epath.PathLike) -> None:
        """Reads the headers.

        Raises:
          UserError: a file or tensor is missing, extra, damaged, or not what config.json says.
        """
        self._folder = epath.Path(folder)
        path = self._folder / "config.json"
        if not path.exists():
            raise UserError(f"{folder} is no Hugging Face model: it has no config.json")
        config = hf_config.parse(path.read_text(), str(path))
        self._entries = _entries(self._folder)
        self._shapes = formats.shapes(config.model)
        self._check(config.model)
        files = {
            name: (self._folder / name).read_bytes()
            for name in formats.TOKENIZER_FILES
            if (self._folder / name).exists()
        }
        for file in (self._folder / formats.MORE_TEMPLATES).glob("*.jinja"):
            files[f"{formats.MORE_TEMPLATES}/{file.name}"] = file.read_bytes()
        formats.check_vocabulary(files, config.model.vocab_size, str(folder))
        self._keep_special_ids(json.loads(path.read_text()), files)
        formats.special_ids(files)  # which says what is wrong
        dtypes = {str(entry.dtype) for entry in self._entries.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        self.description = Description(formats.computed_in(config, dtype), dtype, files)

    def _keep_special_ids(self, values: dict[str, Any], files: dict[str, bytes]) -> None:
        """BOS and EOS in config.json alone would be lost: our checkpoint has no place for them."""
        if "generation_config.json" not in files and values.get("eos_token_id") is not None:
            ids = {name: values.get(name) for name in ("bos_token_id", "eos_token_id")}
            files["generation_config.json"] = json.dumps(ids, indent=2).encode() + b"\n"

    def _check(self, model: ModelConfig) -> None:
        wanted = {name_of(*unit): shape for unit, shape in stored_shapes(model).items()}
        missing = [name for name in wanted if name not in self._entries]
        if missing:
            raise UserError(f"{self._folder} lacks {_some(missing)}, which config.json asks for")
        extra = [name for name in self._entries if name not in wanted and not self._ignored(name)]
        if extra:
            raise UserError(f"{self._folder} holds {_some(extra)}, unknown to config.json")
        for name, shape in wanted.items():
            found = self._entries[name].shape
            if found != shape:
                raise UserError(
                    f"{self._folder}: {name} has shape {found}, config.json makes it {shape}"
                )

    def _ignored(self, name: str) -> bool:
        """Frequencies that old versions saved; the second copy of a tied matrix, if it is one."""
        if name.endswith("rotary_emb.inv_freq"):
            return True
        if name != NAMES["lm_head"]:
            return False
        head, embed = self._entries[name], self._entries[NAMES["embed"]]
        if head.shape != embed.shape or head.dtype != embed.dtype:
            return False
        for start in range(0, head.shape[0], 4096):
            rows = slice(start, start + 4096)
            left, right = (safetensors.read_rows(entry, rows) for entry in (head, embed))
            if not np.array_equal(left.view(np.uint8), right.view(np.uint8)):
                raise UserError(
                    f"{self._folder}: {name} is not the embedding, "
                    "but config.json says tie_word_embeddings"
                )
        return True

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """The array `path` of our tree, for a stacked one that of `layer`."""
        return self.read_part(path, layer, tuple(slice(None) for _ in self._shapes[path]))

    def read_part(self, path: str, layer: int | None, part: tuple[slice, ...]) -> np.ndarray:
        """A box of that array; only its rows are read."""
        entry, shape = self._entries[name_of(path, layer)], self._shapes[path]
        pair = groups(path, shape)
        if pair is None:
            return safetensors.read_rows(entry, part[0])[(slice(None), *part[1:])]
        # The rows of the file are our last axes. If they are heads, whole ones are read.
        head_rows = len(shape) == 3 and not path.endswith("/wo")
        unit = shape[-1] if head_rows else 1
        start, stop, _ = part[1 if head_rows else -1].indices(pair[1] // unit)
        rows = safetensors.read_rows(entry, slice(start * unit, stop * unit))
        if head_rows:
            array = rows.T.reshape(shape[0], stop - start, shape[2])
            return array[part[0], :, part[2]]
        return rows.T.reshape(*shape[:-1], stop - start)[(*part[:-1], slice(None))]


def _entries(folder: epath.Path) -> dict[str, safetensors.Entry]:
    """Every tensor of a folder, by its name."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        if single.exists():
            return safetensors.read_header(single)
        if any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} has several safetensors files, but no {index.name}")
        raise UserError(f"{folder} has no model.safetensors (pickles, .bin, are not read)")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged: it has no weight_map") from error
    outside = [name for name in files if epath.Path(name).name != name]
    if outside:
        raise UserError(f"{index} names files outside its folder: {_some(outside)}")
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise UserError(f"{folder} lacks {_some(missing)}, which {index.name} names")
    found: dict[str, safetensors.Entry] = {}
    for name in files:
        found |= safetensors.read_header(folder / name)
    absent = [name for name in weight_map if name not in found]
    if absent:
        raise UserError(f"{folder} lacks {_some(absent)}, which {index.name} names")
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more


class HfTarget:
    """A new folder that transformers loads.

    Attributes:
      notes: lines to print about what could not be written.
    """

    def __init__(
        self,
        folder: epath.Path,
        description: Description,
        dtype: str,
        shard_size: int = SHARD_SIZE,
    ) -> None:
        """Writes all but the weights."""
        self._dtype = DTYPES[dtype]
        model = description.config.model
        self._stored = stored_shapes(model)
        names = {name_of(*unit): shape for unit, shape in self._stored.items()}
        self._writer = safetensors.Writer(folder, names, self._dtype, shard_size)
        special = formats.special_ids(description.files)
        text = hf_config.write(description.config, dtype, special)
        (folder / "config.json").write_text(text)
        files, reason = _with_tokenizer_config(description.files)
        self.notes = (
            [f"no tokenizer.json is written, only tokenizer.model: {reason}"] if reason else []
        )
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)  # of further chat templates
            (folder / name).write_bytes(content)
        ids = {"bos_token_id": special[0], "eos_token_id": special[1]}
        if "generation_config.json" not in description.files:
            text = json.dumps(ids if special[1] is not None else {}, indent=2)
            (folder / "generation_config.json").write_text(text + "\n")
        if description.card:
            (folder / "README.md").write_text(description.card)

    def write(self, path: str, layer: int | None, array: np.ndarray) -> None:
        """Takes what `Source.read` gave."""
        pair = groups(path, array.shape)
        if pair is not None:
            array = array.reshape(pair).T
        name = name_of(path, layer)
        self._writer.write(name, formats.cast(array, self._dtype, name))

    def close(self) -> None:
        """Completes the files."""
        self._writer.close()


def _with_tokenizer_config(files: dict[str, bytes]) -> tuple[dict[str, bytes], str]:
    """Tells transformers how to read a SentencePiece model that came without its other files.

    Of a run that learnt a template, a tokenizer_config.json has that and names, but no class.

    Returns:
      The files, and why no tokenizer.json was added; empty if one was, or none was needed.
    """
    model, name = files.get("tokenizer.model", b""), "tokenizer_config.json"
    given = formats.tokenizer_config(files)
    if not model or formats.is_tiktoken(model) or "tokenizer.json" in files:
        return files, ""
    if name in files and ("tokenizer_class" in given or "chat_template" not in given):
        return files, ""
    tokenizer, reason = Tokenizer(model), ""
    try:
        made = fast_tokenizer.fast_files(tokenizer)
    except UserError as error:
        made, reason = fast_tokenizer.slow_files(tokenizer), str(error)
    config = json.dumps({**json.loads(made[name]), **given}, ensure_ascii=False, indent=2)
    return {**files, **made, name: config.encode() + b"\n"}, reason


def load_hf(folder: epath.PathLike, config: Config, shardings: Any) -> Any:
    """Reads a Hugging Face folder straight into sharded float32 parameters.

    Each process reads only what its devices hold; the memory beside the result is one array of one
    layer.

    Args:
      folder: with safetensors and config.json.
      config: what the caller expects; `HfSource(folder).description.config` fits.
      shardings: a tree like the parameters.

    Raises:
      UserError: as `HfSource`, or the folder holds another model.
    """
    source = HfSource(folder)
    found, wanted = formats.shapes(source.description.config.model), formats.shapes(config.model)
    layers = source.description.config.model.n_layers
    if found != wanted or layers != config.model.n_layers:
        raise UserError(f"{folder} holds a model of other shapes than this config")

    target = abstract_state(config).params
    return load(source, target, shardings, lambda _, x: x.astype(np.float32))
