"""Work over many machines, on Apache Beam."""

from collections.abc import Callable
from typing import Any

from llama_jax.errors import UserError


def run(work: Callable[..., Any], items: list[tuple[Any, ...]], options: str) -> None:
    """Calls `work(*item)` for each item, on the workers of a pipeline.

    Args:
      work: what to do; can be pickled, and may be called twice for an item.
      items: arguments.
      options: pipeline options, such as `--runner=DirectRunner`.

    Raises:
      UserError: Apache Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("Apache Beam is not installed; pip install 'llama_jax[beam]'") from error
    with beam.Pipeline(options=PipelineOptions(options.split())) as pipeline:
        _ = (
            pipeline
            | beam.Create(items)
            | beam.Reshuffle()  # so that items spread over workers
            | beam.MapTuple(work)
        )
