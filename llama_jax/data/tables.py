"""Documents of Parquet files and TensorFlow Datasets; their libraries are imported when used."""

import itertools
from collections.abc import Iterator
from typing import Any

from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.reading import Part, Reading, texts
from llama_jax.errors import UserError, first_line


def parquet_parts(path: epath.Path, size: int, config: DataConfig) -> Iterator[Part]:
    """Cuts a Parquet file at row groups.

    Raises:
      UserError: it is none, or has no column of text.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as raw:
            file = parquet.ParquetFile(raw)
            names = file.schema_arrow.names
            groups = [
                file.metadata.row_group(g).total_byte_size for g in range(file.num_row_groups)
            ]
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error
    if config.text_field not in names:
        raise UserError(f"{path} has no column {config.text_field!r}; it has {', '.join(names)}")
    start, total = 0, 0
    for group, length in enumerate(groups):
        total += length
        if total >= config.part_bytes or group == len(groups) - 1:
            share = size * (group + 1 - start) // len(groups)
            yield Part("parquet", (str(path),), start, group + 1, share)
            start, total = group + 1, 0


def read_parquet(part: Part, config: DataConfig, reading: Reading) -> Iterator[str]:
    """Documents of some row groups; a damaged one costs only itself."""
    import pyarrow
    from pyarrow import parquet

    path = part.paths[0]
    with epath.Path(path).open("rb") as raw:
        file = parquet.ParquetFile(raw)
        for group in range(part.start, part.stop):
            where = f"{path}, row group {group}"
            batches = file.iter_batches(256, row_groups=[group], columns=[config.text_field])
            values = (value for batch in batches for value in _values(batch.column(0)))
            try:
                yield from texts(values, where, config, reading)
            except (pyarrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno:  # the disk's, not the decoder's
                    raise
                reading.skip("damaged Parquet row group", where)
    reading.position = part.size


def _values(column: Any) -> list[Any]:
    """The values of a column; text as bytes, since one that is no UTF-8 would cost all of them."""
    from pyarrow import large_binary, types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        column = column.cast(large_binary())
    return column.to_pylist()


def _tfds_builder(name: str, config: DataConfig) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=config.tfds_data_dir or None)
    except (tfds.core.DatasetNotFoundError, ValueError, OSError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"data.source: cannot open the TFDS dataset {name}: {reason}") from error


def tfds_parts(name: str, config: DataConfig) -> list[Part]:
    """Cuts a split of a TFDS dataset into ranges of examples.

    Raises:
      UserError: there is no such dataset, split or feature.
    """
    builder = _tfds_builder(name, config)
    splits = builder.info.splits
    if config.tfds_split not in splits:
        raise UserError(
            f"data.tfds_split={config.tfds_split!r}: {name} has {', '.join(splits) or 'no splits'}"
            + ("" if splits else "; is it in data.tfds_data_dir?")
        )
    if config.text_field not in builder.info.features:
        fields = ", ".join(builder.info.features)
        raise UserError(f"{name} has no feature {config.text_field!r}; it has {fields}")
    split = splits[config.tfds_split]
    total, size = split.num_examples, split.num_bytes
    count = max(1, min(total, -(-size // config.part_bytes)))
    edges = [total * index // count for index in range(count + 1)]
    return [
        Part("tfds", (name,), start, stop, size // count)
        for start, stop in itertools.pairwise(edges)
    ]


def read_tfds(part: Part, config: DataConfig, reading: Reading) -> Iterator[str]:
    """Documents of a range of examples, in the order of the files."""
    import tensorflow_datasets as tfds

    builder = _tfds_builder(part.paths[0], config)
    split = f"{config.tfds_split}[{part.start}:{part.stop}]"
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        rows = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
    else:  # random-access formats cannot be read as a tf.data.Dataset
        rows = iter(builder.as_data_source(split=split))
    values = (row[config.text_field] for row in rows)
    yield from texts(values, f"{part.paths[0]} {split}", config, reading)
    reading.position = part.size
