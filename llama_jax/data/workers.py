"""Writes the parts of a source: here, in a pool of processes, or on the workers of Apache Beam."""

import concurrent.futures
import errno
import functools
import multiprocessing
import os
from typing import Any

from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data import beam
from llama_jax.data.part import report_name, write_part
from llama_jax.data.reading import Part
from llama_jax.data.report import Progress

_counters: Any = None  # of a worker process: bytes and tokens done, shared with the parent


def _start_worker(counters: Any) -> None:
    global _counters
    _counters = counters


def _count(position: int, tokens: int) -> None:
    with _counters.get_lock():
        _counters[0] += position
        _counters[1] += tokens


def write_parts(
    data: DataConfig, pack_len: int, parts: list[Part], folder: epath.Path, beam_options: str | None
) -> None:
    """Writes all parts that are not done yet.

    Raises:
      UserError: a file cannot be opened.
      OSError: the disk is full or not writable, or a worker was killed.
    """
    finished = parts_done(folder, parts)
    todo = [(index, part) for index, part in enumerate(parts) if not finished[index]]
    if beam_options is not None:
        beam.run(functools.partial(write_part, data, pack_len, str(folder)), todo, beam_options)
        return
    bar = Progress(sum(part.size for _, part in todo))
    workers = min(data.workers or os.cpu_count() or 1, len(todo))
    if workers <= 1:
        threads = data.workers or os.cpu_count() or 1
        for index, part in todo:
            write_part(data, pack_len, str(folder), index, part, bar.add, threads)
        bar.close()
        return
    # Not a fork: JAX, TensorFlow and SentencePiece have threads, which do not survive one.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 2)
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, _start_worker, (counters,)
    ) as pool:
        futures = {
            pool.submit(write_part, data, pack_len, str(folder), index, part, _count)
            for index, part in todo
        }
        try:
            while futures:
                done, futures = concurrent.futures.wait(
                    futures, 0.5, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()
                bar.set(counters[0], counters[1])
        except concurrent.futures.process.BrokenProcessPool as error:
            raise OSError(errno.ECHILD, "a worker process was killed (out of memory?)") from error
        finally:
            for future in futures:
                future.cancel()
    bar.close()


def parts_done(partial: epath.Path, parts: list[Part]) -> list[bool]:
    """Of each part, whether its shards are complete."""
    return [(partial / report_name(index)).exists() for index in range(len(parts))]
