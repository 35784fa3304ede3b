"""Hugging Face folders: weights, `config.json`, and the tokenizer's files.

They store a linear layer as (out, in); ours is (in, out), with heads as separate axes. So every
matrix except the embedding is transposed. RoPE rotates the same pairs in both (see
`rope.apply_rope`).
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.files import parse_json, read_bytes
from llama_jax.interchange import fast_tokenizer, formats, hf_config, safetensors, weight_files
from llama_jax.interchange.formats import Description
from llama_jax.interchange.weight_files import abbreviate_names
from llama_jax.parameters import PARAMETERS
from llama_jax.text import tokenizer_files
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_config import adds_bos, special_ids, token_ids, tokenizer_config

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
TEKKEN = "tekken.json"  # Mistral's own tokenizer format
SHARD_SIZE = 5_000_000_000  # maximum bytes of one file, as in transformers


def matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns (in, out) of an array as a matrix, stored transposed; None if stored as it is."""
    split = len(PARAMETERS[path].inputs)
    if not split:
        return None
    return math.prod(shape[:split]), math.prod(shape[split:])


def stored_shapes(model: ModelConfig) -> dict[tuple[str, int | None], tuple[int, ...]]:
    """Returns (path, layer) -> shape in the file, in the order in which the model uses them."""
    ours = formats.shapes(model)
    order = sorted(
        formats.paths_and_layers(model),
        key=lambda unit: (unit[0] != "embed", unit[1] is None, unit[1] or 0),
    )
    found = {}
    for path, layer in order:
        pair = matrix_shape(path, ours[path])
        found[path, layer] = ours[path] if pair is None else pair[::-1]
    return found


def name_of(path: str, layer: int | None) -> str:
    """Returns the name of the tensor in Hugging Face's format."""
    return NAMES[path].format(layer)


class HfSource:
    """A folder of weights; opening it checks names, shapes and sizes of all tensors."""

    def __init__(self, folder: epath.PathLike) -> None:
        """Reads the headers.

        Raises:
          UserError: a file or tensor is missing, extra, damaged, or does not match config.json.
        """
        self._folder = epath.Path(folder)
        path = self._folder / "config.json"
        if not path.exists():
            raise UserError(f"{folder} is not a Hugging Face model: it has no config.json")
        content = read_bytes(path)
        config = hf_config.parse(content, str(path))
        values = parse_json(content, str(path))
        self._entries = weight_files.open_weights(self._folder, values.get("transformers_weights"))
        self._shapes = formats.shapes(config.model)
        self._check(config.model)
        dtype = self._dtype(config.model)
        files = tokenizer_files.read_files(self._folder)
        tokenizer_files.check_vocabulary(files, config.model.vocab_size, str(folder))
        self._keep_special_ids(values, files)
        special_ids(files, config.model.vocab_size)  # raises an error for bad ids
        notes: tuple[str, ...] = ()
        if not files.keys() & tokenizer_files.TOKENIZERS and (self._folder / TEKKEN).exists():
            notes = (f"{TEKKEN} is not read; add the tokenizer.json of the same model",)
        computed = formats.computed_in(config, dtype)
        self.description = Description(computed, dtype, files, notes=notes)

    def _keep_special_ids(self, values: dict[str, Any], files: dict[str, bytes]) -> None:
        """Copies BOS and EOS of config.json to `files`, because our checkpoint drops config.json.

        They go into generation_config.json, unless there is one.
        """
        bos, eos = token_ids(values, f"{self._folder}/config.json", values["vocab_size"])
        if "generation_config.json" not in files and eos is not None:
            ids = {"bos_token_id": bos, "eos_token_id": eos}
            files["generation_config.json"] = json.dumps(ids, indent=2).encode() + b"\n"

    def _dtype(self, model: ModelConfig) -> str:
        """Returns the dtype of the matrices, which make up nearly all bytes; float32 if mixed."""
        matrices = [path for path in self._shapes if not PARAMETERS[path].is_vector]
        layers = {
            path: range(model.n_layers if PARAMETERS[path].is_stacked else 1) for path in matrices
        }
        names = [name_of(path, layer) for path in matrices for layer in layers[path]]
        dtypes = {str(self._entries[name].dtype) for name in names}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def _check(self, model: ModelConfig) -> None:
        if model.n_layers > len(self._entries):  # before names are made for each layer
            raise UserError(
                f"{self._folder} has {len(self._entries)} tensors, too few for the "
                f"{model.n_layers} layers of config.json"
            )
        wanted = {name_of(*unit): shape for unit, shape in stored_shapes(model).items()}
        missing = [name for name in wanted if name not in self._entries]
        if missing:
            raise UserError(
                f"{self._folder} lacks {abbreviate_names(missing)}, which config.json requires"
            )
        for name, shape in wanted.items():
            found = self._entries[name].shape
            if found != shape:
                raise UserError(
                    f"{self._folder}: {name} has shape {found}, config.json requires {shape}"
                )
        extra = [name for name in self._entries if name not in wanted and not self._ignored(name)]
        if extra:
            raise UserError(
                f"{self._folder} holds {abbreviate_names(extra)}, unknown to config.json"
            )

    def _ignored(self, name: str) -> bool:
        """Returns whether a tensor is not needed: old frequencies, or a copy of a tied matrix.

        Raises:
          UserError: the matrices are tied in config.json, but their numbers differ.
        """
        if name.endswith("rotary_emb.inv_freq"):
            return True
        if name != NAMES["lm_head"]:
            return False
        head, embed = self._entries[name], self._entries[NAMES["embed"]]
        if head.shape != embed.shape or head.dtype != embed.dtype:
            return False
        if not weight_files.same_numbers(head, embed):
            raise UserError(
                f"{self._folder}: {name} is not the embedding, "
                "but config.json sets tie_word_embeddings"
            )
        return True

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Reads the array `path` of our tree; of a stacked array, the layer `layer`."""
        return self.read_part(path, layer, tuple(slice(None) for _ in self._shapes[path]))

    def read_part(self, path: str, layer: int | None, part: tuple[slice, ...]) -> np.ndarray:
        """Reads a box of the array; reads only the rows of the box from the file.

        Args:
          path: path of the array in our tree.
          layer: index of the layer of a stacked array; None for other arrays.
          part: one slice for each axis of the array.
        """
        entry, shape = self._entries[name_of(path, layer)], self._shapes[path]
        pair = matrix_shape(path, shape)
        if pair is None:
            return entry.rows(part[0])[(slice(None), *part[1:])]
        # The rows of the file are our last axes. If these are heads, whole heads are read.
        head_rows = len(PARAMETERS[path].outputs) == 2
        unit = shape[-1] if head_rows else 1
        start, stop, _ = part[1 if head_rows else -1].indices(pair[1] // unit)
        rows = entry.rows(slice(start * unit, stop * unit))
        if head_rows:
            array = rows.T.reshape(shape[0], stop - start, shape[2])
            return array[part[0], :, part[2]]
        return rows.T.reshape(*shape[:-1], stop - start)[(*part[:-1], slice(None))]


class HfTarget:
    """A new folder that transformers can load.

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
        """Writes everything except the weights.

        Args:
          folder: an existing folder, which is empty.
          description: description of the weights.
          dtype: name of the dtype in which weights are stored.
          shard_size: maximum bytes of one file.
        """
        self._dtype = DTYPES[dtype]
        model = description.config.model
        self._stored = stored_shapes(model)
        names = {name_of(*unit): shape for unit, shape in self._stored.items()}
        self._writer = safetensors.Writer(folder, names, self._dtype, shard_size)
        special = special_ids(description.files)
        text = hf_config.to_json(description.config, dtype, special)
        (folder / "config.json").write_text(text)
        files, reason = _with_tokenizer_config(
            tokenizer_files.for_transformers(description.files), model.vocab_size
        )
        self.notes = (
            [f"no tokenizer.json is written, only tokenizer.model: {reason}"] if reason else []
        )
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)  # the folder of further chat templates
            (folder / name).write_bytes(content)
        ids = {"bos_token_id": special[0], "eos_token_id": special[1]}
        if "generation_config.json" not in description.files:
            text = json.dumps(ids if special[1] is not None else {}, indent=2)
            (folder / "generation_config.json").write_text(text + "\n")
        if description.card:
            (folder / "README.md").write_text(description.card)

    def write(self, path: str, layer: int | None, array: np.ndarray) -> None:
        """Writes an array as `Source.read` returns it.

        Args:
          path: path of the array in our tree.
          layer: index of the layer of a stacked array; None for other arrays.
          array: the array, of one layer if stacked.
        """
        pair = matrix_shape(path, array.shape)
        if pair is not None:
            array = array.reshape(pair).T
        name = name_of(path, layer)
        self._writer.write(name, formats.cast(array, self._dtype, name))

    def close(self) -> None:
        """Completes the files."""
        self._writer.close()


# A tokenizer_config.json with none of these fields does not describe a tokenizer, and is left as it
# is.
_OF_TOKENIZERS = {
    *("chat_template", "add_bos_token", "add_eos_token", "bos_token", "eos_token", "unk_token"),
    *("pad_token", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
    *("clean_up_tokenization_spaces", "model_max_length", "legacy", "sp_model_kwargs"),
}


def _with_tokenizer_config(files: dict[str, bytes], rows: int) -> tuple[dict[str, bytes], str]:
    """Adds the files that transformers needs to read a SentencePiece model which lacks them.

    If a run has learnt a chat template, its tokenizer_config.json holds the template and names of
    tokens, but no class.

    Args:
      files: files of the tokenizer, by name.
      rows: rows of the model's vocabulary.

    Returns:
      The files, and why no tokenizer.json was added; '' if it was added, or is not needed.
    """
    name = "tokenizer_config.json"
    given, chosen = (
        tokenizer_config(files),
        tokenizer_files.fitting(files, rows, "it"),
    )
    if chosen is None or chosen.file == tokenizer_files.JSON or tokenizer_files.JSON in files:
        return files, ""
    if "tokenizer_class" in given or (name in files and not given.keys() & _OF_TOKENIZERS):
        which = given.get("tokenizer_class", "no class")
        return files, (
            f"the present {name} names {which!s:.80}, and transformers reads the model by the "
            "rules of that class: it may give other ids"
        )
    begins = adds_bos(files, Tokenizer(chosen.content), "it")
    tokenizer, reason = Tokenizer(chosen.content, adds_bos=begins), ""
    try:
        made = fast_tokenizer.fast_files(tokenizer)
        given.pop("added_tokens_decoder", None)  # tokenizer.json holds these tokens
    except UserError as error:
        made = fast_tokenizer.slow_files(tokenizer)
        reason = f"{error}; transformers adds a space after special tokens, as in conversations"
    config = json.dumps({**json.loads(made[name]), **given}, ensure_ascii=False, indent=2)
    return {**files, **made, name: config.encode() + b"\n"}, reason
