"""Documents of TensorFlow Datasets. The library is imported only when it is used."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from llama_jax.config import DataConfig
from llama_jax.data.source import quieten_tensorflow
from llama_jax.data.sources.nested_fields import listed_fields, nested_field
from llama_jax.data.sources.part import Part, Tally, texts
from llama_jax.errors import UserError, first_line


def _library() -> Any:
    """Imports the library, which imports TensorFlow."""
    quieten_tensorflow()
    import tensorflow_datasets as tfds

    return tfds


def _tfds_builder(name: str, config: DataConfig) -> Any:
    tfds = _library()

    try:
        return tfds.builder(name, data_dir=config.tfds_data_dir or None)
    except (tfds.core.DatasetNotFoundError, ValueError, OSError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"data.source: cannot open the TFDS dataset {name}: {reason}") from error


def tfds_parts(name: str, config: DataConfig) -> list[Part]:
    """Cuts a split of a TFDS dataset into ranges of examples.

    Raises:
      UserError: the dataset, the split or the feature does not exist, or the feature is not text.
    """
    builder = _tfds_builder(name, config)
    splits = builder.info.splits
    if config.tfds_split not in splits:
        raise UserError(
            f"data.tfds_split={config.tfds_split!r}: {name} has {', '.join(splits) or 'no splits'}"
            + ("" if splits else "; check that data.tfds_data_dir contains it")
        )
    _text_feature(name, builder.info.features, config.text_field)
    split = splits[config.tfds_split]
    total, size = split.num_examples, split.num_bytes
    count = max(1, min(total, -(-size // config.part_bytes)))
    edges = [total * index // count for index in range(count + 1)]
    return [
        Part("tfds", (name,), start, stop, size // count)
        for start, stop in itertools.pairwise(edges)
    ]


def _text_feature(name: str, features: Any, field: str) -> list[str]:
    """Returns the keys that lead to a text feature.

    Args:
      name: the name of the dataset, for errors.
      features: the features of the dataset.
      field: the field, as in `data.text_field`.

    Raises:
      UserError: the feature does not exist, or does not hold text.
    """
    tfds = _library()

    def fields(feature: Any) -> dict[str, Any] | None:
        return dict(feature.items()) if isinstance(feature, tfds.features.FeaturesDict) else None

    names, feature = nested_field(features, field, fields)
    if not names:
        listed = listed_fields(features, fields)
        raise UserError(f"{name} has no feature {field!r}; it has {listed}")
    if fields(feature) is not None:
        listed = listed_fields(feature, fields, field)
        raise UserError(
            f"feature {field!r} of {name} has no text; name one of its fields: {listed}"
        )
    info = feature.get_tensor_info()
    if not isinstance(info, tfds.features.TensorInfo) or info.shape or info.np_dtype != np.object_:
        raise UserError(f"feature {field!r} of {name} is {type(feature).__name__}, not text")
    return names


def read_tfds(part: Part, config: DataConfig, tally: Tally) -> Iterator[str]:
    """Streams the documents of a range of examples, in the order of the files.

    Args:
      part: the range.
      config: how to read it.
      tally: receives the counts of skipped documents.

    Raises:
      UserError: the dataset cannot be opened, or the feature does not hold text.
    """
    tfds = _library()

    builder = _tfds_builder(part.paths[0], config)
    split = f"{config.tfds_split}[{part.start}:{part.stop}]"
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        rows = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
    else:  # a random-access format cannot be read as a tf.data.Dataset
        rows = iter(builder.as_data_source(split=split))
    names = _text_feature(part.paths[0], builder.info.features, config.text_field)
    values = (functools.reduce(lambda found, key: found[key], names, row) for row in rows)
    yield from texts(values, f"{part.paths[0]} {split}", config, tally)
    tally.position = part.size
