"""Weights with more rows for the vocabulary than their source has."""

import dataclasses
from typing import Any

import numpy as np

from llama_jax.interchange.formats import Source
from llama_jax.parameters import PARAMETERS

_AXES = {row.path: row.axes.index("V") for row in PARAMETERS.values() if "V" in row.axes}


def with_padded_vocabulary(source: Source, rows: int) -> Source:
    """The source, with rows added up to so many; as it is where it has them."""
    found = source.description.config.model.vocab_size
    return PaddedSource(source, rows) if rows > found else source


class PaddedSource:
    """A source whose embedding and output head have rows added.

    A new row is the mean of the others: a token that has no id then has an average logit, and one
    that a larger tokenizer brings begins there.
    """

    def __init__(self, source: Source, rows: int) -> None:
        """Wraps a source of fewer rows."""
        self._source, self._rows = source, rows
        config = source.description.config
        model = dataclasses.replace(config.model, vocab_size=rows)
        self.description = dataclasses.replace(
            source.description, config=dataclasses.replace(config, model=model)
        )
        self._last: tuple[str, Any] = ("", None)  # parts of one array follow one another

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """The array `path` of our tree, for a stacked one that of `layer`."""
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
        """A box of that array."""
        read_part = getattr(self._source, "read_part", None)
        if path in _AXES or read_part is None:
            return self.read(path, layer)[part]
        return read_part(path, layer, part)
