"""The arrays of a LLaMA: one strict table that defines every property of a parameter.

A LLaMA of any depth has 12 arrays, because its layers are stacked on a leading axis. Each array has
a row: its path in the tree, its dimensions, the mesh axes that divide them, the dimensions that a
matrix product sums over, and whether weight decay applies. Shapes, shardings, adapters
(`model.lora`), blocks of 4-bit numbers (`model.nf4`), groups in the log and in error messages, the
transposition of other formats (`interchange`) and parameter counts (`model.cost`) derive from the
rows. A variant of the model makes its own table from this one, which stays as it is.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from llama_jax.config import ModelConfig
from llama_jax.errors import require

# `context` shards weights too, as a second fsdp axis: its devices hold different tokens of the
# same batch, so they would otherwise hold the same weights several times.
SHARD = ("fsdp", "context")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A row of the table.

    Attributes:
      path: the keys in the tree of parameters, joined by `/`.
      axes: a letter for each dimension, see `sizes`. Arrays of the layers begin with `L`.
      placement: the mesh axes that divide each dimension.
      inputs: the dimensions that a product with activations sums over; they follow `L`. Empty for
        an array that enters no product.
      decays: whether weight decay applies.
      when: returns whether a model has the array; None: every model has it.
    """

    path: str
    axes: str
    placement: P
    inputs: str = ""
    decays: bool = True
    when: Callable[[ModelConfig], bool] | None = None

    def __post_init__(self) -> None:
        require(
            len(self.placement) <= len(self.axes),
            f"{self.path}: its placement {self.placement} has more dimensions than {self.axes}",
        )
        require(
            self.own_axes.startswith(self.inputs),
            f"{self.path}: its dimensions {self.own_axes} do not begin with the inputs "
            f"{self.inputs}",
        )

    @property
    def name(self) -> str:
        """The last key of the path, such as `wq`."""
        return self.path.rpartition("/")[2]

    @property
    def is_stacked(self) -> bool:
        """Says whether the array has a leading axis of layers."""
        return self.axes.startswith("L")

    @property
    def own_axes(self) -> str:
        """The dimensions of one layer."""
        return self.axes.removeprefix("L")

    @property
    def outputs(self) -> str:
        """The dimensions of a product with activations; empty if the array enters no product."""
        return self.own_axes.removeprefix(self.inputs) if self.inputs else ""

    @property
    def is_matrix(self) -> bool:
        """Says whether the array multiplies activations; the embedding is looked up instead."""
        return bool(self.inputs)

    @property
    def is_vector(self) -> bool:
        """Says whether one layer's array has one dimension (the scale of a norm); stays float32."""
        return len(self.own_axes) == 1

    @property
    def group(self) -> str:
        """The group that the log and messages name: `attn`, `mlp`, `norms`, ..."""
        if self.is_vector:
            return "norms"
        return self.path.split("/")[1] if self.is_stacked else self.path

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Returns the shape of the array in a model."""
        return shape_of(self.axes, model)


Table = Mapping[str, Parameter]


def parameter_table(*rows: Parameter) -> Table:
    """Makes a table: each row by its path."""
    return {row.path: row for row in rows}


PARAMETERS: Table = parameter_table(
    Parameter("embed", "VD", P("tensor", SHARD)),
    Parameter("layers/attn_norm", "LD", P(), decays=False),
    Parameter("layers/attn/wq", "LDNH", P(None, SHARD, "tensor", None), inputs="D"),
    Parameter("layers/attn/wk", "LDKH", P(None, SHARD, "tensor", None), inputs="D"),
    Parameter("layers/attn/wv", "LDKH", P(None, SHARD, "tensor", None), inputs="D"),
    Parameter("layers/attn/wo", "LNHD", P(None, "tensor", None, SHARD), inputs="NH"),
    Parameter("layers/mlp_norm", "LD", P(), decays=False),
    Parameter("layers/mlp/w1", "LDF", P(None, SHARD, "tensor"), inputs="D"),
    Parameter("layers/mlp/w2", "LFD", P(None, "tensor", SHARD), inputs="F"),
    Parameter("layers/mlp/w3", "LDF", P(None, SHARD, "tensor"), inputs="D"),
    Parameter("final_norm", "D", P(), decays=False),
    Parameter(
        "lm_head",
        "DV",
        P(SHARD, "tensor"),
        inputs="D",
        when=lambda model: not model.tied_embeddings,
    ),
)


def sizes(model: ModelConfig) -> dict[str, int]:
    """Returns the size of the dimension that each letter of `Parameter.axes` stands for."""
    return {
        "L": model.n_layers,
        "V": model.vocab_size,
        "D": model.dim,
        "N": model.n_heads,
        "K": model.n_kv_heads,
        "H": model.head_dim,
        "F": model.ffn_dim,
    }


def shape_of(axes: str, model: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of an array with these dimensions."""
    size = sizes(model)
    return tuple(size[letter] for letter in axes)


def present(model: ModelConfig, rows: Table = PARAMETERS) -> Iterator[Parameter]:
    """Yields the rows of the arrays that a model has, in the order of JAX's trees (by key)."""
    for row in sorted(rows.values(), key=lambda row: row.path.split("/")):
        if row.when is None or row.when(model):
            yield row


def abstract(model: ModelConfig, rows: Table = PARAMETERS) -> dict[str, Any]:
    """Returns the tree of parameters as shapes and dtypes (float32); traces no model."""
    arrays = {
        row.path: jax.ShapeDtypeStruct(row.shape(model), np.float32) for row in present(model, rows)
    }
    return traverse_util.unflatten_dict(arrays, sep="/")


def row_of(path: str, rows: Table = PARAMETERS) -> Parameter | None:
    """Returns the row of an array, or None; parts of adapters and NF4 have their matrix's row.

    Args:
      path: path of the array, such as `layers/attn/wq`, or `layers/attn/wq/a` of an adapter.
      rows: the table.
    """
    return rows.get(path) or rows.get(path.rpartition("/")[0])


def layer_matrices(rows: Table = PARAMETERS) -> dict[str, Parameter]:
    """Returns the matrices of the layers by name: they may have adapters, or be in NF4."""
    return {row.name: row for row in rows.values() if row.is_stacked and row.is_matrix}


def path_of(keys: tuple[Any, ...]) -> str:
    """Joins the keys of a leaf, as `jax.tree.map_with_path` gives them, by `/`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")
