"""A base with adapters added to it, as a source of plain weights.

The base has the form that it had in training: `lora.base_dtype`, with the error of NF4 if it was
quantised, because the adapters were trained on that form.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from llama_jax.checkpoint.fingerprint import LayerPrints, changed_arrays
from llama_jax.config import Config, LoraConfig
from llama_jax.interchange.formats import Description, Source, paths_and_layers, refuse_other_base
from llama_jax.model.lora import adapter_of, delta, to_float32, to_frozen
from llama_jax.text.tokenizer_config import with_base_files


def base_fingerprint(base: Source, config: Config) -> dict[str, int]:
    """Computes the fingerprints of a base in its frozen form, one array of one layer at a time."""
    prints = LayerPrints(config.model.n_layers)
    for path, layer in paths_and_layers(config.model):
        prints.add(path, layer, to_frozen(path, base.read(path, layer), config.lora))
    return prints.found


class MergedSource:
    """Weights of a base with adapters added; verifies each array of the base by its fingerprint."""

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
          base: source of the base, which fits the config's model.
          adapters: adapters in NumPy, in the tree of `lora.init_adapters`.
          config: config with the `lora` of the adapters' training.
          fingerprints: fingerprints of the base in its frozen form; empty: unknown, not verified.
          description: description of the adapters; this source changes it to that of plain weights.
        """
        self._base, self._adapters, self._config = base, adapters, config
        self._wanted = fingerprints
        self._prints = LayerPrints(config.model.n_layers)
        plain = dataclasses.replace(config, lora=LoraConfig(), init_from="")
        files = with_base_files(description.files, base.description.files)
        self.description = dataclasses.replace(
            description, config=plain, files=files, dtype=base.description.dtype
        )

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Reads the array `path` of our tree; of a stacked array, the layer `layer`.

        Raises:
          UserError: the base is not that of the adapters (checked at the last layer of the array).
        """
        lora = self._config.lora
        frozen = to_frozen(path, self._base.read(path, layer), lora)
        if self._wanted:
            whole = self._prints.add(path, layer, frozen)
            changed = changed_arrays(self._wanted, whole)
            refuse_other_base(changed, self._config, "this checkpoint")
        array, adapter = to_float32(frozen), adapter_of(self._adapters, path)
        if adapter is None:
            return array
        ours = jax.tree.map(lambda x: x[layer], adapter)
        return (array + delta(ours, lora, stacked=False)).astype(np.float32)
