"""Meta's folders: `consolidated.NN.pth`, the pieces of its tensor parallelism, and `params.json`.

Meta rotates the pairs (2i, 2i + 1) of a head; we rotate (i, i + H/2). So the rows of wq and wk have
another order. Needs torch (`pip install '.[meta]'`), which maps the pickles into memory.

If there are more pieces than kv heads, the pieces hold copies of heads. Such folders are refused:
the joined arrays do not have the shapes that `params.json` gives.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from llama_jax.config import Config, ModelConfig
from llama_jax.errors import UserError, as_user_error
from llama_jax.files import read_bytes
from llama_jax.interchange import formats, pickles
from llama_jax.interchange import meta_params as params_lib
from llama_jax.interchange.fields import Fields
from llama_jax.interchange.formats import Description
from llama_jax.interchange.hf import DTYPES, matrix_shape
from llama_jax.interchange.pickles import import_torch, to_numpy
from llama_jax.parameters import PARAMETERS
from llama_jax.text import tiktoken_ranks, tokenizer_files

NAMES: Mapping[str, str] = {
    "embed": "tok_embeddings.weight",
    "layers/attn_norm": "layers.{}.attention_norm.weight",
    "layers/attn/wq": "layers.{}.attention.wq.weight",
    "layers/attn/wk": "layers.{}.attention.wk.weight",
    "layers/attn/wv": "layers.{}.attention.wv.weight",
    "layers/attn/wo": "layers.{}.attention.wo.weight",
    "layers/mlp_norm": "layers.{}.ffn_norm.weight",
    "layers/mlp/w1": "layers.{}.feed_forward.w1.weight",
    "layers/mlp/w2": "layers.{}.feed_forward.w2.weight",
    "layers/mlp/w3": "layers.{}.feed_forward.w3.weight",
    "final_norm": "norm.weight",
    "lm_head": "output.weight",
}


def half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of wq or wk from Meta's order (adjacent pairs) to ours (halves)."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of wq or wk from our order to Meta's: the inverse of `half_split`."""
    heads = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


class MetaSource:
    """A folder as Meta released it; opening it checks names and shapes of all tensors."""

    def __init__(self, folder: epath.PathLike, context: int = 0) -> None:
        """Maps the pieces into memory.

        Args:
          folder: folder with params.json and consolidated.*.pth; the tokenizer is in it or in its
            parent.
          context: context in tokens; 0: `max_seq_len`, otherwise the usual context of the family.

        Raises:
          UserError: a piece or tensor is missing, extra, damaged, or does not match params.json.
        """
        self._folder = epath.Path(folder)
        path = self._folder / "params.json"
        if not path.exists():
            raise UserError(f"{folder} is not a folder of Meta's: it has no params.json")
        self._pieces = self._open_pieces()
        with as_user_error(str(path)):
            params = params_lib.read(path)
            self._model = self._model_of(params)
            given = params.size("max_seq_len") if params.given("max_seq_len") else 0
        self._shapes = formats.shapes(self._model)
        self._check()
        context = context or given or params_lib.habitual_context(self._model)
        config = Config(model=self._model)
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, seq_len=context)
        )
        dtype = self._dtype()
        files = self._read_files(bool(params.values.get("use_scaled_rope")))
        tokenizer_files.check_vocabulary(files, self._model.vocab_size, str(folder))
        self.description = Description(formats.computed_in(config, dtype), dtype, files)

    def _read_files(self, scaled: bool) -> dict[str, bytes]:
        """Reads the tokenizer's files; `scaled`: RoPE is scaled, as in Llama 3.1 and later."""
        files = tokenizer_files.read_files(self._folder)
        # The first LLaMA and LLaMA-2 keep the tokenizer next to the folders of the models.
        for name in tokenizer_files.TOKENIZERS:
            path = self._folder.parent / name
            if not files.keys() & tokenizer_files.TOKENIZERS and path.exists():
                files[name] = read_bytes(path)
        model = files.get("tokenizer.model", b"")
        if tiktoken_ranks.is_tiktoken(model) and not scaled and "tokenizer.json" not in files:
            name = f"{self._folder}/tokenizer.model"
            made = tiktoken_ranks.tokenizer_json(model, name, tiktoken_ranks.LLAMA3)
            files["tokenizer.json"] = made
        return files

    def _open_pieces(self) -> list[dict[str, Any]]:
        files = sorted(self._folder.glob("consolidated.*.pth"))
        numbers = [file.name.split(".")[1] for file in files]
        if not files:
            raise UserError(f"{self._folder} has no consolidated.00.pth")
        if numbers != [f"{number:02d}" for number in range(len(files))]:
            found = ", ".join(numbers)
            raise UserError(f"{self._folder}: pieces are missing, there are only {found}")
        pieces = [pickles.load(file) for file in files]
        for file, piece in zip(files, pieces, strict=True):
            if set(piece) != set(pieces[0]):
                raise UserError(f"{file} does not have the same tensors as {files[0].name}")
        return pieces

    def _model_of(self, params: Fields) -> ModelConfig:
        """Returns our config, from `params.json` and from the shapes of tensors."""
        first, count = self._pieces[0], len(self._pieces)
        for path, axes in (("embed", 2), ("layers/mlp/w1", 2), ("final_norm", 1)):
            name = NAMES[path].format(0)
            if name not in first:
                raise UserError(f"{self._folder} lacks {name}")
            if first[name].ndim != axes:
                shape = tuple(first[name].shape)
                raise UserError(f"{self._folder}: {name} has shape {shape}, not {axes} axes")
        embed = first[NAMES["embed"]].shape
        # Llama 3 splits the embedding along the ids, its predecessors along the columns.
        vocab = embed[0] * (count if embed[1] == params.size("dim") else 1)
        ffn_dim = first[NAMES["layers/mlp/w1"].format(0)].shape[0] * count
        return params_lib.model_of(params, vocab, ffn_dim, self._is_tied())

    def _dtype(self) -> str:
        """Returns the dtype of the matrices; float32 if they differ."""
        torch = import_torch()
        kinds = {getattr(torch, name): name for name in DTYPES}
        found = set()
        for path, layer in formats.paths_and_layers(self._model):
            for piece in self._pieces:
                name = NAMES[path].format(layer)
                dtype = piece[name].dtype
                if dtype not in kinds:
                    raise UserError(
                        f"{self._folder}: {name} has dtype {str(dtype).removeprefix('torch.')}; "
                        f"known: {', '.join(DTYPES)}"
                    )
                if not PARAMETERS[path].is_vector:
                    found.add(kinds[dtype])
        return found.pop() if len(found) == 1 else "float32"

    def _is_tied(self) -> bool:
        """Returns whether the output matrix is the embedding; Llama 3.2 ships both copies."""
        torch, head = import_torch(), NAMES["lm_head"]
        return all(
            head not in piece or torch.equal(piece[head], piece[NAMES["embed"]])
            for piece in self._pieces
        )

    def _check(self) -> None:
        if self._model.n_layers > len(self._pieces[0]):  # before names are made for each layer
            raise UserError(
                f"{self._folder} has {len(self._pieces[0])} tensors, too few for the "
                f"{self._model.n_layers} layers of params.json"
            )
        names = {
            NAMES[path].format(layer): path for path, layer in formats.paths_and_layers(self._model)
        }
        found = self._pieces[0]
        for name in names:
            if name not in found:
                raise UserError(f"{self._folder} lacks {name}, which params.json requires")
        known = {"rope.freqs", NAMES["lm_head"]}  # a buffer; the copy of a tied matrix
        extra = [name for name in found if name not in names and name not in known]
        if extra:
            raise UserError(f"{self._folder} holds {extra[0]}, unknown to params.json")
        for name, path in names.items():
            wanted = self._shapes[path]
            pair = matrix_shape(path, wanted)
            shape = wanted if pair is None else pair[::-1]
            pieces = [tuple(piece[name].shape) for piece in self._pieces]
            joined = self._joined(path, pieces)
            if joined != shape:
                raise UserError(
                    f"{self._folder}: {name} has shape {joined}, params.json requires {shape}"
                )

    def _axis(self, path: str, shape: tuple[int, ...]) -> int | None:
        """Returns the axis along which pieces are joined; None: each piece has the whole array."""
        if len(shape) == 1 or len(self._pieces) == 1:
            return None
        if path == "embed":
            return 0 if shape[1] == self._model.dim else 1
        # Megatron's rule: a matrix that writes into the residual stream is split along its inputs,
        # the second axis in the file; the others are split along their outputs, the first axis.
        return 1 if PARAMETERS[path].outputs == "D" else 0

    def _joined(self, path: str, pieces: list[tuple[int, ...]]) -> tuple[int, ...]:
        axis = self._axis(path, pieces[0])
        if axis is None:
            return pieces[0]
        joined = list(pieces[0])
        joined[axis] = sum(shape[axis] for shape in pieces)
        return tuple(joined)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Reads the array `path` of our tree; of a stacked array, the layer `layer`."""
        name = NAMES[path].format(layer)
        axis = self._axis(path, tuple(self._pieces[0][name].shape))
        parts = [to_numpy(piece[name]) for piece in self._pieces]
        array = parts[0] if axis is None else np.concatenate(parts, axis)
        if path in ("layers/attn/wq", "layers/attn/wk"):
            array = half_split(array, self._model.head_dim)
        return (
            array
            if matrix_shape(path, self._shapes[path]) is None
            else array.T.reshape(self._shapes[path])
        )


class MetaTarget:
    """A new folder in Meta's layout, in one piece.

    torch pickles all tensors at once, so they wait in a temporary file that is mapped into memory.
    """

    def __init__(self, folder: epath.Path, description: Description, dtype: str) -> None:
        """Writes everything except the weights.

        Args:
          folder: an existing folder, which is empty.
          description: description of the weights.
          dtype: name of the dtype in which weights are stored.
        """
        torch = import_torch()
        self._folder, self._dtype = folder, DTYPES[dtype]
        self._torch_dtype = getattr(torch, dtype)
        config = description.config
        self._model = config.model
        (folder / "params.json").write_text(params_lib.to_json(config))
        for name, content in description.files.items():
            (folder / name).parent.mkdir(exist_ok=True)  # the folder of further chat templates
            (folder / name).write_bytes(content)
        if description.card:
            (folder / "README.md").write_text(description.card)
        self._spool = folder / "weights.tmp"
        self._stream = self._spool.open("wb")
        self._tensors: list[tuple[str, int, tuple[int, ...]]] = []

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
        if path in ("layers/attn/wq", "layers/attn/wk"):
            array = interleaved(array, self._model.head_dim)
        name = NAMES[path].format(layer)
        array = np.ascontiguousarray(formats.cast(array, self._dtype, name))
        self._tensors.append((name, self._stream.tell() // array.itemsize, array.shape))
        self._stream.write(array.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Pickles the tensors, and removes the temporary file."""
        torch = import_torch()
        size = self._stream.tell() // np.dtype(self._dtype).itemsize
        self._stream.close()
        flat = torch.from_file(str(self._spool), shared=True, size=size, dtype=self._torch_dtype)
        state = {}
        for name, start, shape in self._tensors:
            count = math.prod(shape)
            state[name] = flat[start : start + count].view(shape)
        torch.save(state, str(self._folder / "consolidated.00.pth"))
        del flat, state
        self._spool.unlink()
