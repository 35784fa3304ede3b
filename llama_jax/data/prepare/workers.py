"""Writes the parts of a source: in this process, in a pool of processes, or on Apache Beam."""

import concurrent.futures
import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.prepare.report import Progress
from llama_jax.data.prepare.tokenize import report_name, write_part
from llama_jax.data.sources.part import Part
from llama_jax.errors import UserError
from llama_jax.text import child_process

# The signals that end all processes of a terminal or a job.
_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h

# In a worker process: the bytes and tokens that are done of each part, shared with the parent. It
# has no lock, because a killed worker would keep it. It needs none: one worker writes each part.
_counters: Any = None


def _start_worker(counters: Any) -> None:
    global _counters
    _counters = counters
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))  # the pool ends workers so
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        # The kernel kills the worker at the moment when the parent dies. So a new run, started
        # after that, never meets a worker that still writes.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    child_process.end_with(parent.sentinel)


def _count(slot: int, position: int, tokens: int) -> None:
    _counters[2 * slot] += position
    _counters[2 * slot + 1] += tokens


def write_parts(
    data: DataConfig, pack_len: int, parts: list[Part], folder: epath.Path, beam_options: str | None
) -> None:
    """Writes all parts that are not done yet.

    Args:
      data: how to read the parts, how large shards are, and the number of workers.
      pack_len: sequence length in tokens to pack documents for; 0: do not pack.
      parts: all parts of the source.
      folder: folder of the shards.
      beam_options: pipeline options of Apache Beam; None: write on this machine.

    Raises:
      UserError: a file cannot be opened, or a worker was killed.
      OSError: the disk is full or not writable.
    """
    finished = parts_done(folder, len(parts))
    todo = [(index, part) for index, part in enumerate(parts) if not finished[index]]
    if beam_options is not None:
        work = functools.partial(write_part, data, pack_len, str(folder))
        _run_on_beam(work, todo, beam_options)
        return
    bar = Progress(sum(part.size for _, part in todo))
    workers = min(data.workers or os.cpu_count() or 1, len(todo))
    try:
        if workers > 1:
            _write_in_pool(data, pack_len, todo, folder, workers, bar)
            return
        threads = data.workers or os.cpu_count() or 1
        for index, part in todo:
            write_part(data, pack_len, str(folder), index, part, bar.add, threads)
    finally:
        bar.close()


def _run_on_beam(work: Callable[..., Any], items: list[tuple[Any, ...]], options: str) -> None:
    """Calls `work(*item)` for each item on the workers of a Beam pipeline.

    Args:
      work: the function; must allow pickling, and more than one call for the same item.
      items: tuples of arguments.
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
            | beam.Reshuffle()  # spreads the items over the workers
            | beam.MapTuple(work)
        )


def _write_in_pool(
    data: DataConfig,
    pack_len: int,
    todo: list[tuple[int, Part]],
    folder: epath.Path,
    workers: int,
    bar: Progress,
) -> None:
    # Not a fork: JAX, TensorFlow and SentencePiece have threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counters = context.RawArray("q", 2 * len(todo))
    # In a block of its own, because starting the pool starts a resource tracker, which unblocks the
    # signals.
    with _signals_held_back():
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (counters,))
    with pool, _killed_by_interrupts():
        with _signals_held_back():
            futures = {
                pool.submit(
                    write_part,
                    *(data, pack_len, str(folder), index, part),
                    functools.partial(_count, slot),
                )
                for slot, (index, part) in enumerate(todo)
            }
        try:
            while futures:
                done, futures = concurrent.futures.wait(
                    futures, 0.5, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()
                bar.set(sum(counters[::2]), sum(counters[1::2]))
        except Exception as error:
            pool.shutdown(cancel_futures=True)  # parts that have begun are finished and kept
            if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                raise UserError(
                    "a worker process was killed (out of memory?); run the same command again, it "
                    "keeps the finished parts; a smaller data.workers takes less memory"
                ) from error
            raise


@contextlib.contextmanager
def _killed_by_interrupts() -> Iterator[None]:
    """Kills the processes that were started inside the block if a signal ends it."""
    before = multiprocessing.active_children()
    try:
        yield
    except Exception:
        raise
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in before:
                process.kill()
        raise


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Delays signals until all processes that are started inside the block are known.

    These processes inherit the signal mask, and so ignore the signals that a terminal sends to its
    process group. The mask alone does not protect this process, whose other threads still receive
    signals; so the handlers record them, and the signals are raised again at the end.
    """
    came: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # Python's rule
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                handlers[number] = signal.signal(number, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def parts_done(folder: epath.Path, n_parts: int) -> list[bool]:
    """Returns for each part whether its shards are complete."""
    return [(folder / report_name(index)).exists() for index in range(n_parts)]
