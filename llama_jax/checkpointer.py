"""Saves the states of one run.

A step is written in the background as `checkpoints/N.saving`; when all its files are there, process
0 writes their manifest and renames the folder to `N`, as the last act. (Object stores cannot rename
a folder: there it is `N` from the start, and counts from its manifest on.)
"""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from llama_jax import manifest, retention
from llama_jax.agreement import Meeting, agreed
from llama_jax.checkpoint import Meta, meta_items
from llama_jax.config import Config
from llama_jax.errors import UserError, first_line
from llama_jax.files import is_object_store
from llama_jax.fingerprint import fingerprint
from llama_jax.restorer import Restorer
from llama_jax.step import TrainState

# What a save may fail with that is not our bug: the disk, the network, another process.
SAVE_ERRORS = (OSError, ValueError, jax.errors.JaxRuntimeError)
# Waiting for a save longer than this is said.
QUIET_S = 10.0
# Orbax counts its time-out by the wall clock, which may jump; the watchdog ends what hangs.
_NO_TIMEOUT_S = 50 * 365 * 86_400
_BLOCK_BYTES = 4096  # what a file takes of most disks at least
# Parts of a layer that are stored by themselves; of smaller ones there would be too many.
LAYER_BYTES = 2**20


class Checkpointer(Restorer):
    """Saves asynchronously, keeps what `train.keep_*` say; restores, as its base does.

    Saving returns as soon as the arrays are copied to the host. A save that fails is told in one
    line, and training goes on; the run ends when more than `train.max_failed_saves` in a row or the
    last one did. As a context manager it waits on the way out, whatever else fails: a run that ends
    in an error must not lose the save before it. All processes make the same calls.
    """

    def __init__(self, workdir: epath.PathLike, config: Config) -> None:
        """Opens the directory, and removes what unfinished saves have left there.

        Raises:
          UserError: it cannot be written to.
        """
        super().__init__(workdir, config)
        self._saves, self._meeting = 0, Meeting("")
        options = ocp.AsyncOptions(
            timeout_secs=_NO_TIMEOUT_S,
            # In the background it waits for folders by the wall clock, for 300 s, which may jump.
            create_directories_asynchronously=False,
            # Orbax waits here when all is written, and when all is committed.
            barrier_sync_fn=lambda **_: self._meeting.wait(),
        )
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # of `_thread`
        self._saving, self._began = 0, 0.0  # which step `_thread` saves, and since when
        self._failures = 0  # saves in a row
        self._unsaved = ""  # why the last save failed
        self._stuck: set[int] = set()  # old steps that could not be deleted
        problem = agreed(self._open())
        if problem:
            raise UserError(f"checkpoints cannot be saved to {self._directory}: {problem}")

    def _open(self) -> str:
        if jax.process_index() > 0:
            return ""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            warnings: list[str] = []
            names = retention.clean(self._directory, warnings.append)
            self._probe()
        except OSError as error:
            return first_line(error)
        for warning in warnings:
            self._say(warning)
        if names:
            self._say(f"cleaned {len(names)} unfinished checkpoint folder(s): {', '.join(names)}")
        return ""

    def _probe(self) -> None:
        """Raises OSError where no folder can be made, or not a block be written."""
        probe = self._directory / f"0{retention.SAVING}.probe"  # removed at the next start, if left
        probe.mkdir(exist_ok=True)
        try:
            (probe / "block").write_bytes(bytes(_BLOCK_BYTES))
        finally:
            probe.rmtree()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is None:
            self.close()
        else:  # the other processes may not come this way: wait for nobody
            self._join()
            self._orbax.close()

    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        self._join()
        return next(reversed(retention.saved_steps(self._directory)), None)

    def newest_good_step(self, fits: Callable[[int], bool] | None = None) -> int | None:
        """The same, of all saves so far."""
        self._join()
        return super().newest_good_step(fits)

    def _target(self, step: int) -> epath.Path:
        """Where `step` is written."""
        remote = is_object_store(self._directory)
        return self.folder(step) if remote else self._directory / f"{step}{retention.SAVING}"

    def save(self, state: TrainState, meta: Meta) -> None:
        """Starts saving `state`; a failure is told, and raised only by the policy.

        Raises:
          UserError: more than `train.max_failed_saves` in a row failed.
        """
        self._settle()
        problem = agreed(self._obstacle(state))
        if not problem:
            kind = jax.devices()[0].device_kind
            meta = dataclasses.replace(meta, device_kind=kind, fingerprint=fingerprint(state))
            if agreed(self._start(state, meta)):
                self._settle()
        else:
            self._warn(meta.step, problem)
            self._count(problem)

    def _obstacle(self, state: TrainState) -> str:
        """Why a save cannot work, as far as that can be told before anything is written."""
        try:
            if jax.process_index() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._clean()
                self._probe()
            if is_object_store(self._directory):
                return ""
            shards = (s for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards)
            needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)
            free = shutil.disk_usage(self._directory).free
        except OSError as error:
            return first_line(error)
        if free >= needed:
            return ""
        return f"it takes {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free"

    def _start(self, state: TrainState, meta: Meta) -> str:
        """Begins a save in the background; returns why that failed, which `_finish` handles."""
        self._saves += 1
        self._meeting = Meeting(f"save {self._saves}")
        self._saving, self._began = meta.step, time.monotonic()
        description, tokenizer = meta_items(meta)
        optimizer = {"step": state.step, "opt_state": state.opt_state}
        failed: Exception | None = None
        try:
            self._orbax.save(
                self._target(meta.step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params, save_args=_by_layer(state.params)),
                    optimizer=ocp.args.StandardSave(optimizer),
                    skips=ocp.args.StandardSave(state.skips.to_dict()),
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
        """In a thread: waits for orbax, then completes the step and lets old ones go."""
        limit = self._config.train.save_timeout
        timer = threading.Timer(limit, self._tell_slow, (step, limit))
        timer.daemon = True
        if limit:
            timer.start()
        try:
            if failed is not None:
                raise failed
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                target = self._target(step)
                manifest.write(target)
                if target != self.folder(step):
                    if aside := retention.complete(target, self.folder(step)):
                        self._say(f"{self.folder(step)} was no saved step; set aside as {aside}")
                    _sync_directory(self._directory)
            self._meeting.wait()
        except BaseException as error:
            self._error = error
            if not self._meeting.failed:  # the others do not know yet
                with contextlib.suppress(*SAVE_ERRORS):
                    self._meeting.wait(first_line(error))
            self._clean()
            self._warn(step, first_line(error))
            return
        finally:
            timer.cancel()
        if jax.process_index() == 0:
            self._retain()

    def _clean(self) -> None:
        """Frees what failed saves hold of a disk that may be full."""
        if jax.process_index() == 0:
            # Tensorstore may write a while after orbax has given up, and keep a folder from being
            # removed; the next save and the next start try again.
            with contextlib.suppress(OSError):
                retention.clean(self._directory)

    def _retain(self) -> None:
        """Lets old steps go; one that cannot be deleted is told once, and stays."""
        try:
            steps = retention.dispensable_steps(self._directory, self._config.train)
        except OSError as error:
            self._say(f"warning: old checkpoints could not be listed: {first_line(error)}")
            return
        for step in steps:
            try:
                if left := retention.remove(self.folder(step)):
                    self._say(
                        f"checkpoint {step} is deleted, but not what its links lead to: "
                        f"{', '.join(left)}"
                    )
            except OSError as error:
                if step not in self._stuck:
                    self._say(
                        f"warning: an old checkpoint could not be deleted: {first_line(error)}"
                    )
                self._stuck.add(step)

    def add_evaluation(self, step: int, eval_loss: float) -> None:
        """Adds the validation loss to a saved step, as if it had been saved with it.

        Args:
          step: a complete one.
          eval_loss: nats per token.
        """
        if jax.process_index() > 0:
            return
        described = {**manifest.described(self.folder(step)), "eval_loss": eval_loss}
        try:
            manifest.amend(self.folder(step), "meta/metadata", json.dumps(described).encode())
        except OSError as error:  # the next start tries again
            self._say(
                f"warning: eval_loss could not be added to checkpoint {step}: {first_line(error)}"
            )
        self._retain()

    def _warn(self, step: int, reason: str) -> None:
        count, limit = self._failures + 1, self._config.train.max_failed_saves
        self._print(
            f"warning: saving step {step} to {self._directory} failed: {reason}; earlier "
            f"checkpoints are untouched, the next one is tried as usual ({count} failed in a row, "
            f"train.max_failed_saves={limit})"
        )
        self._note(step, event="save_failed", reason=reason)

    def _tell_slow(self, step: int, limit: int) -> None:
        self._say(
            f"warning: saving step {step} to {self._directory} takes longer than {limit:,} s "
            "(train.save_timeout); training goes on, and waits for it at the next save"
        )
        self._note(step, event="save_slow", seconds=limit)

    def _join(self) -> BaseException | None:
        """Waits for the thread, and says so; returns what it failed with."""
        if self._thread is not None:
            self._thread.join(QUIET_S)
            if self._thread.is_alive():
                seconds = time.monotonic() - self._began
                self._say(f"waiting for the save of step {self._saving}, begun {seconds:.0f} s ago")
                self._thread.join()
        return self._error

    def _settle(self) -> None:
        """Waits for the save before, and counts it if it failed."""
        if self._thread is None:
            return
        error = self._join()
        self._thread = self._error = None
        if error is not None and not isinstance(error, SAVE_ERRORS):
            raise error
        problem = agreed("" if error is None else first_line(error))
        if problem:
            self._count(problem)
        else:
            self._failures, self._unsaved = 0, ""

    def _count(self, problem: str) -> None:
        self._failures += 1
        self._unsaved = problem
        if self._failures > self._config.train.max_failed_saves:
            raise self._save_error()

    def _save_error(self) -> UserError:
        last = self.latest_step()
        kept = f"step {last} is the newest checkpoint" if last is not None else "there is none yet"
        return UserError(
            f"saving to {self._directory} failed: {self._unsaved}; earlier checkpoints are "
            f"untouched ({kept}). Free some space or choose another --workdir, then run the same "
            "command to go on"
        )

    def wait(self) -> None:
        """Blocks until all saves are on disk.

        Raises:
          UserError: the last one failed.
        """
        self._settle()
        if self._unsaved:
            raise self._save_error()

    def close(self) -> None:
        """Waits, and frees orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()


def _by_layer(params: Any) -> Any:
    """Stacks of layers are stored in parts of one layer, so that `convert` reads them one by one.

    Orbax would store what a device holds as one part, which can only be read as a whole.
    """

    def save_args(path: Any, x: jax.Array) -> ocp.SaveArgs:
        stacked = path[0].key == "layers"
        part = x.addressable_shards[0].data.nbytes // x.shape[0]
        return ocp.SaveArgs(shard_axes=(0,) if stacked and part >= LAYER_BYTES else ())

    return jax.tree.map_with_path(save_args, params)


def _sync_directory(directory: epath.Path) -> None:
    """Has the disk confirm a rename."""
    descriptor = os.open(str(directory), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
