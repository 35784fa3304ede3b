"""Adds rows for the vocabulary to weights that have fewer rows than the model."""

import dataclasses
from typing import Any

import numpy as np

from llama_jax.interchange.formats import Source
from llama_jax.parameters import PARAMETERS

_AXES = {row.path: row.axes.index("V") for row in PARAMETERS.values() if "V" in row.axes}


def with_padded_vocabulary(source: Source, rows: int) -> Source:
    """Returns the source, padded to `rows` rows for the vocabulary if it has fewer."""
    found = source.description.config.model.vocab_size
    return PaddedSource(source, rows) if rows > found else source


class PaddedSource:
    """A source whose embedding and output head have added rows.

    A new row is the mean of the others. So an unused id has an average logit, and a token that a
    larger tokenizer adds starts from the mean.
    """

    def __init__(self, source: Source, rows: int) -> None:
        """Wraps a source that has fewer than `rows` rows."""
        self._source, self._rows = source, rows
        config = source.description.config
        model = dataclasses.replace(config.model, vocab_size=rows)
        self.description = dataclasses.replace(
            source.description, config=dataclasses.replace(config, model=model)
        )
        self._last: tuple[str, Any] = ("", None)  # callers read the parts of one array in a row

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Reads the array `path` of our tree; of a stacked array, the layer `layer`."""
        if path not in _AXES:
            return self._source.read(path, layer)
        if self._last[0] != path:
            self._last = (path, self._padded(path))
        return self._last[1]

    def _padded(self, path: str) -> np.ndarray:
        array, axis = self._source.read(path, None), _AXES[path]
        mean = array.mean(axis, keepdims=True, dtype=np.float32).astype(array.dtype)
        more = np.repeat(mean, self._rows - array.shape[axis], axis)
        return np.concatenate([array, more], axis)

    def read_part(self, path: str, layer: int | None, part: tuple[slice, ...]) -> np.ndarray:
        """Reads a box of the array.

        Args:
          path: path of the array in our tree.
          layer: index of the layer of a stacked array; None for other arrays.
          part: one slice for each axis of the array.
        """
        read_part = getattr(self._source, "read_part", None)
        if path in _AXES or read_part is None:
            return self.read(path, layer)[part]
        return read_part(path, layer, part)
