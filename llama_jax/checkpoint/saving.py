"""Saves in the background: writes a step, then its manifest, and gives the folder its final name.

A step is written as `checkpoints/N.saving`. When all of its files are complete, process 0 writes
the manifest and, as the last action, renames the folder to `N`. (Object stores cannot rename a
folder: there, the name is `N` from the start, and the manifest makes the step complete.)
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from llama_jax.checkpoint import manifest, retention
from llama_jax.checkpoint.events import Events
from llama_jax.checkpoint.saved_step import Items, StepMeta, meta_items
from llama_jax.errors import first_line
from llama_jax.files import is_object_store
from llama_jax.parallel.multihost import Barrier

# Errors of a save that are not bugs: the disk, the network, another process.
SAVE_ERRORS = (OSError, ValueError, jax.errors.JaxRuntimeError)
# Seconds of waiting for a save after which a line is printed.
QUIET_S = 10.0
# A layer is a chunk of its own if it has at least this many bytes on a device; with smaller chunks
# there would be too many.
LAYER_BYTES = 2**20


class BackgroundSaves:
    """Writes steps in a thread, one at a time; all processes make the same calls."""

    def __init__(
        self,
        directory: epath.Path,
        limit_s: int,
        events: Events,
        done: Callable[[], None],
        failed: Callable[[int, str], None],
    ) -> None:
        """Starts orbax's threads.

        Args:
          directory: folder of the steps.
          limit_s: seconds after which a running save is reported as slow; 0: never.
          events: where slow saves and long waits are reported.
          done: called in the thread, on process 0, when a step is complete.
          failed: called in the thread with the step and the reason when a save fails.
        """
        self._directory, self._limit_s, self._events = directory, limit_s, events
        self._done, self._failed = done, failed
        self._saves, self._barrier = 0, Barrier("")
        options = ocp.AsyncOptions(
            # Orbax's timeouts follow the wall clock, which may jump (docs/reliability.md). The
            # first is set to 50 years, because the watchdog ends a save that hangs. The second,
            # 300 s for folders that are created in the background, does not apply.
            timeout_secs=50 * 365 * 86_400,
            create_directories_asynchronously=False,
            # Orbax waits here after everything is written, and after everything is committed.
            barrier_sync_fn=lambda **_: self._barrier.wait(),
        )
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # raised in `_thread`
        self._step, self._began = 0, 0.0  # step that `_thread` saves, and when it began

    def _target(self, step: int) -> epath.Path:
        """Returns the folder in which `step` is written."""
        name = str(step) if is_object_store(self._directory) else f"{step}{retention.SAVING}"
        return self._directory / name

    def start(self, items: Items, meta: StepMeta) -> str:
        """Starts a save; returns why it failed, or ''. The thread also handles such a failure."""
        self._saves += 1
        self._barrier = Barrier(f"save {self._saves}")
        self._step, self._began = meta.step, time.monotonic()
        description, tokenizer = meta_items(meta)
        failed: Exception | None = None
        try:
            arrays = {
                name: ocp.args.StandardSave(
                    tree, save_args=_by_layer(tree) if name == "params" else None
                )
                for name, tree in items.items()
            }
            self._orbax.save(
                self._target(meta.step),
                args=ocp.args.Composite(
                    **arrays,
                    meta=ocp.args.JsonSave(description),
                    tokenizer=ocp.args.JsonSave(tokenizer),
                ),
                force=True,
            )
        except SAVE_ERRORS as error:
            failed = error
        self._thread = threading.Thread(target=self._finish, args=(meta.step, failed), name="save")
        self._thread.start()
        return "" if failed is None else first_line(failed)

    def _finish(self, step: int, failed: Exception | None) -> None:
        """Waits for orbax, then completes the step; runs in the thread."""
        timer = threading.Timer(self._limit_s, self._report_slow, (step,))
        timer.daemon = True
        if self._limit_s:
            timer.start()
        try:
            if failed is not None:
                raise failed
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                self._complete(step)
            self._barrier.wait()
        except BaseException as error:
            self._error = error
            if not self._barrier.failed:  # the other processes do not know yet
                with contextlib.suppress(*SAVE_ERRORS):
                    self._barrier.wait(first_line(error))
            self._failed(step, first_line(error))
            return
        finally:
            timer.cancel()
        if jax.process_index() == 0:
            self._done()

    def _complete(self, step: int) -> None:
        """Writes the manifest of a step whose files are complete, and gives it its final name."""
        target, folder = self._target(step), self._directory / str(step)
        manifest.write(target)
        if target != folder:
            if aside := retention.rename_to_final(target, folder):
                self._events.say(f"{folder} was not a saved step; set aside as {aside}")
            _sync_directory(self._directory)

    def _report_slow(self, step: int) -> None:
        self._events.report(
            step,
            f"warning: saving step {step} to {self._directory} takes longer than "
            f"{self._limit_s:,} s (train.save_timeout); training continues, and the next save "
            "waits for this one",
            event="save_slow",
            seconds=self._limit_s,
        )

    def join(self) -> BaseException | None:
        """Waits for the thread; returns its error, or None. Prints a line if this takes long."""
        if self._thread is not None:
            self._thread.join(QUIET_S)
            if self._thread.is_alive():
                seconds = time.monotonic() - self._began
                self._events.say(
                    f"waiting for the save of step {self._step}, begun {seconds:.0f} s ago"
                )
                self._thread.join()
        return self._error

    def settle(self) -> tuple[bool, BaseException | None]:
        """Waits for the previous save; returns whether there was one, and its error or None."""
        begun, error = self._thread is not None, self.join()
        self._thread = self._error = None
        return begun, error

    def close(self) -> None:
        """Frees orbax's threads."""
        self._orbax.close()


def _by_layer(params: Any) -> Any:
    """Returns save arguments that store each layer of a stack as a chunk, for `convert` to read.

    By default, orbax stores the part that a device holds as one chunk, which can only be read as a
    whole.
    """

    def save_args(path: Any, x: jax.Array) -> ocp.SaveArgs:
        stacked = path[0].key == "layers"
        part = x.addressable_shards[0].data.nbytes // x.shape[0]
        return ocp.SaveArgs(shard_axes=(0,) if stacked and part >= LAYER_BYTES else ())

    return jax.tree.map_with_path(save_args, params)


def _sync_directory(directory: epath.Path) -> None:
    """Flushes a directory to disk, so that a rename in it is permanent."""
    descriptor = os.open(str(directory), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
