"""A base with adapters added to it, as a source of plain weights.

The base is taken as it lay below the adapters in training: in `lora.base_dtype`, with the error of
NF4 if it was quantised, because that is what the adapters were trained to add to.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from llama_jax.config import Config, LoraConfig
from llama_jax.errors import UserError
from llama_jax.fingerprint import array_fingerprint
from llama_jax.frozen import freeze, thaw
from llama_jax.interchange.formats import Description, Source, is_stacked, units, with_base
from llama_jax.lora import adapter_of, delta

_fingerprint = functools.cache(lambda: jax.jit(array_fingerprint))


def _add_prints(found: dict[str, int], path: str, layer: int | None, frozen: Any) -> list[str]:
    """Adds one layer to the fingerprints of an array; returns the names of the array's parts."""
    names = []
    for keys, x in jax.tree.leaves_with_path(frozen):
        part = jax.tree_util.keystr(keys, simple=True, separator="/")
        name = f"{path}/{part}" if part else path
        found[name] = (found.get(name, 0) + int(_fingerprint()(x, layer))) % 2**32
        names.append(name)
    return names


def base_fingerprint(base: Source, config: Config) -> dict[str, int]:
    """The fingerprint of a base in its frozen form, one array of one layer after another."""
    found: dict[str, int] = {}
    for path, layer in units(config.model):
        _add_prints(found, path, layer, freeze(path, base.read(path, layer), config.lora))
    return found


def refuse_other_base(changed: list[str], config: Config, adapters: epath.PathLike) -> None:
    """Raises UserError if arrays of a base are others than those that adapters were trained on.

    Args:
      changed: names of these arrays.
      config: which says where the base is from.
      adapters: what to call them in the error.
    """
    if not changed:
        return
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    raise UserError(
        f"the adapters of {adapters} were trained on another base than {config.init_from} is "
        f"({changed[0]}{more} differ by fingerprint); name the weights that they belong to by "
        "--config.init_from or --base, or train in another --workdir"
    )


class MergedSource:
    """Weights of a base with adapters; each array of the base is compared by its fingerprint."""

    def __init__(
        self,
        base: Source,
        adapters: Any,
        config: Config,
        fingerprints: Mapping[str, int],
        description: Description,
    ) -> None:
        """Wraps a base.

        Args:
          base: opened, of the config's model.
          adapters: in NumPy, as `lora.init_adapters` makes them.
          config: with the `lora` that they were trained with.
          fingerprints: of the base's arrays in their frozen form; empty: not known.
          description: of the adapters; what it becomes here has none.
        """
        self._base, self._adapters, self._config = base, adapters, config
        self._wanted = fingerprints
        self._found: dict[str, int] = {}
        self._seen: dict[str, set[int | None]] = {}
        plain = dataclasses.replace(config, lora=LoraConfig(), init_from="")
        files = with_base(description.files, base.description.files)
        self.description = dataclasses.replace(
            description, config=plain, files=files, dtype=base.description.dtype
        )

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """The array `path` of our tree, for a stacked one that of `layer`.

        Raises:
          UserError: with its last layer, the array is not that of the base of the adapters.
        """
        lora = self._config.lora
        frozen = freeze(path, self._base.read(path, layer), lora)
        if self._wanted:
            self._compare(path, layer, frozen)
        array, adapter = thaw(frozen), adapter_of(self._adapters, path.split("/"))
        if adapter is None:
            return array
        ours = jax.tree.map(lambda x: x[layer], adapter)
        return (array + delta(ours, lora, stacked=False)).astype(np.float32)

    def _compare(self, path: str, layer: int | None, frozen: Any) -> None:
        seen = self._seen.setdefault(path, set())
        if layer in seen:
            return
        seen.add(layer)
        names = _add_prints(self._found, path, layer, frozen)
        if len(seen) == (self._config.model.n_layers if is_stacked(path) else 1):
            changed = [n for n in names if self._wanted.get(n) != self._found[n]]
            refuse_other_base(changed, self._config, "this checkpoint")
