"""The checkpoints of one run: finds the newest undamaged step, restores it, and saves new ones."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from llama_jax.checkpoint import manifest, retention
from llama_jax.checkpoint.events import Events, OnEvent
from llama_jax.checkpoint.saved_step import (
    CHECKPOINTS,
    DamagedCheckpoint,
    Items,
    StepMeta,
    fingerprints,
    restore_items,
)
from llama_jax.checkpoint.saving import SAVE_ERRORS, BackgroundSaves
from llama_jax.config import Config
from llama_jax.errors import UserError, first_line
from llama_jax.files import is_object_store
from llama_jax.parallel.multihost import agreed

_BLOCK_BYTES = 4096  # the smallest space that a file takes on most disks


class Checkpointer:
    """Saves asynchronously, deletes old steps (`train.keep_*`), restores, sets damaged steps aside.

    `save` returns as soon as the arrays are copied to the host. A failed save is logged in one
    line, and training goes on; the run ends with an error if more than `train.max_failed_saves`
    saves fail in a row, or if the last one fails. The context manager waits for a running save on
    exit, even after an error, so that this save is not lost. All processes make the same calls.

    Attributes:
      passed_over: whether a damaged step was set aside.
    """

    def __init__(
        self, workdir: epath.PathLike, config: Config, on_event: OnEvent | None = None
    ) -> None:
        """Opens the directory, and removes the leftovers of unfinished saves.

        Args:
          workdir: folder of the run.
          config: config of the run.
          on_event: called for each event, in addition to the console; see `events.Events`.

        Raises:
          UserError: the directory is not writable.
        """
        workdir = epath.Path(workdir).absolute()
        self._directory = workdir / CHECKPOINTS
        self._train = config.train
        self._events = Events(on_event)
        self._background = BackgroundSaves(
            self._directory,
            self._train.save_timeout,
            self._events,
            done=self._retain,
            failed=self._give_up,
        )
        self._failures = 0  # failed saves in a row
        self._unsaved = ""  # why the last save failed; empty if it succeeded
        self._stuck: set[int] = set()  # old steps that could not be deleted
        self._damaged: dict[int, str] = {}  # step -> what is wrong with it
        self.passed_over = False
        problem = agreed(self._open())
        if problem:
            raise UserError(f"checkpoints cannot be saved to {self._directory}: {problem}")

    def _open(self) -> str:
        if jax.process_index() > 0:
            return ""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            warnings: list[str] = []
            names = retention.remove_leftovers(self._directory, warnings.append)
            self._probe()
        except OSError as error:
            return first_line(error)
        for warning in warnings:
            self._events.say(warning)
        if names:
            self._events.say(
                f"cleaned {len(names)} unfinished checkpoint folder(s): {', '.join(names)}"
            )
        return ""

    def _probe(self) -> None:
        """Raises OSError if the directory cannot take a new folder with a block of data."""
        probe = self._directory / f"0{retention.SAVING}.probe"  # the next start removes a leftover
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
        else:  # the other processes may not get here, so do not wait for them
            self._background.join()
            self._background.close()

    def folder(self, step: int) -> epath.Path:
        """Returns the folder of `step`, which need not exist."""
        return self._directory / str(step)

    def has(self, step: int) -> bool:
        """Returns whether process 0 sees this step in the directory; all processes must call it."""
        first = jax.process_index() == 0
        return not agreed("no" if first and not self.folder(step).exists() else "")

    def latest_step(self) -> int | None:
        """Returns the newest complete step, or None; waits for a running save first."""
        self._background.join()
        return next(reversed(retention.saved_steps(self._directory)), None)

    def newest_good_step(self, fits: Callable[[int], bool] | None = None) -> int | None:
        """Returns the newest undamaged step (for which `fits` holds), or None.

        Verifies all files of the steps, newest first. Newer, damaged steps are set aside, and each
        is reported as an event.

        Raises:
          UserError: every step is damaged, and `fits` is None; nothing is changed.
        """
        self._background.join()
        mine = (jax.process_index(), jax.process_count())
        for step in self._steps(fits):
            if step in self._damaged:
                continue
            reason = agreed(manifest.first_damage(self.folder(step), mine))
            if reason:
                self._damaged[step] = reason
                continue
            self._set_damaged_aside(step)
            return step
        if self._damaged and fits is None:
            what = "; ".join(f"step {step}: {reason}" for step, reason in self._damaged.items())
            raise UserError(
                f"no good checkpoint is left in {self._directory} ({what}); nothing was changed. "
                "Restore one from a copy, or use another --workdir to start a new run"
            )
        return None

    def _steps(self, fits: Callable[[int], bool] | None) -> list[int]:
        """Returns the complete steps that process 0 sees, newest first."""
        first = jax.process_index() == 0
        # On a shared file system, the other processes may see a new folder late.
        steps = retention.saved_steps(self._directory)[::-1] if first else []
        if fits is not None:
            steps = [step for step in steps if fits(step)]
        text = agreed(",".join(map(str, steps[:50])))
        return [int(step) for step in text.split(",") if step]

    def mark_damaged(self, step: int, reason: str) -> None:
        """Marks a step that could not be restored as damaged; `newest_good_step` skips it."""
        self._damaged[step] = reason

    def _set_damaged_aside(self, used: int) -> None:
        self.passed_over |= bool(self._damaged)
        for step in sorted(self._damaged):
            if jax.process_index() == 0:
                reason = self._damaged[step]
                target = retention.set_aside(self.folder(step))
                self._events.report(
                    used,
                    f"damaged checkpoint {step}: {reason}; set aside as {target}, going on from "
                    f"step {used}",
                    event="checkpoint_damaged",
                    damaged_step=step,
                    reason=reason,
                )
        self._damaged.clear()

    def restore(self, step: int, targets: Items) -> Items:
        """Reads trees of `step`, by name.

        Args:
          step: a complete step.
          targets: shapes, dtypes and shardings of the trees, as `jax.ShapeDtypeStruct`.

        Raises:
          UserError: the saved arrays do not match `targets`.
          DamagedCheckpoint: the step cannot be read, or its fingerprint differs from the saved one.
        """
        restored, problem = None, ""
        try:
            restored = restore_items(self.folder(step), targets)
        except DamagedCheckpoint as error:
            problem = str(error)
        problem = agreed(problem)
        if problem or restored is None:
            raise DamagedCheckpoint(problem)
        return restored

    def save(self, items: Items, meta: StepMeta) -> None:
        """Starts saving named trees; a failed save is logged, and training goes on.

        Args:
          items: trees of arrays by name, such as those of `TrainState.to_items`.
          meta: description of the step; this method adds the device kind and the fingerprints.

        Raises:
          UserError: more than `train.max_failed_saves` saves in a row failed.
        """
        self._settle()
        problem = agreed(self._obstacle(items))
        if not problem:
            kind = jax.devices()[0].device_kind
            meta = dataclasses.replace(meta, device_kind=kind, fingerprint=fingerprints(items))
            if agreed(self._background.start(items, meta)):
                self._settle()
        else:
            self._warn(meta.step, problem)
            self._count(problem)

    def _obstacle(self, items: Items) -> str:
        """Returns why a save would fail (full or read-only disk), found before writing, or ''."""
        try:
            if jax.process_index() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._clean()
                self._probe()
            if is_object_store(self._directory):
                return ""
            shards = (s for leaf in jax.tree.leaves(items) for s in leaf.addressable_shards)
            needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)
            free = shutil.disk_usage(self._directory).free
        except OSError as error:
            return first_line(error)
        if free >= needed:
            return ""
        return f"the step takes {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free"

    def _give_up(self, step: int, reason: str) -> None:
        """Handles a failed save, in its thread: frees disk space and logs the failure."""
        self._clean()
        self._warn(step, reason)

    def _clean(self) -> None:
        """Removes the leftovers of failed saves, because the disk may be full."""
        if jax.process_index() == 0:
            # Tensorstore may keep writing for a while after orbax has given up, so that a folder
            # cannot be removed yet; the next save and the next start try again.
            with contextlib.suppress(OSError):
                retention.remove_leftovers(self._directory)

    def _retain(self) -> None:
        """Deletes the steps that no rule keeps; reports a step that cannot be deleted only once."""
        try:
            steps = retention.dispensable_steps(self._directory, self._train)
        except OSError as error:
            self._events.say(f"warning: old checkpoints could not be listed: {first_line(error)}")
            return
        for step in steps:
            try:
                if left := retention.remove(self.folder(step)):
                    self._events.say(
                        f"checkpoint {step} is deleted, but not the targets of its links: "
                        f"{', '.join(left)}"
                    )
            except OSError as error:
                if step not in self._stuck:
                    self._events.say(
                        f"warning: an old checkpoint could not be deleted: {first_line(error)}"
                    )
                self._stuck.add(step)

    def add_evaluation(self, step: int, eval_loss: float) -> None:
        """Adds the validation loss to the description of a saved step.

        Args:
          step: a complete step.
          eval_loss: validation loss, in nats per token.
        """
        if jax.process_index() > 0:
            return
        described = {**manifest.read_description(self.folder(step)), "eval_loss": eval_loss}
        try:
            manifest.amend(self.folder(step), "meta/metadata", json.dumps(described).encode())
        except OSError as error:  # the next start tries again
            self._events.say(
                f"warning: eval_loss could not be added to checkpoint {step}: {first_line(error)}"
            )
        self._retain()

    def report(self, step: int, text: str, **record: Any) -> None:
        """Reports an event on the console and to `on_event`; see `Events.report`.

        Args:
          step: the step that the event belongs to.
          text: the line to print.
          **record: `event` (its kind) and the details.
        """
        self._events.report(step, text, **record)

    def _warn(self, step: int, reason: str) -> None:
        count, limit = self._failures + 1, self._train.max_failed_saves
        self._events.report(
            step,
            f"warning: saving step {step} to {self._directory} failed: {reason}; earlier "
            f"checkpoints are untouched, the next one is tried as usual ({count} failed in a row, "
            f"train.max_failed_saves={limit})",
            on_all=True,
            event="save_failed",
            reason=reason,
        )

    def _settle(self) -> None:
        """Waits for the previous save, and counts it if it failed."""
        begun, error = self._background.settle()
        if not begun:
            return
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
        if self._failures > self._train.max_failed_saves:
            raise self._save_error()

    def _save_error(self) -> UserError:
        last = self.latest_step()
        kept = f"step {last} is the newest checkpoint" if last is not None else "none exists yet"
        return UserError(
            f"saving to {self._directory} failed: {self._unsaved}; earlier checkpoints are "
            f"untouched ({kept}). Free some space or choose another --workdir, then run the same "
            "command to continue"
        )

    def wait(self) -> None:
        """Blocks until all saves are on disk.

        Raises:
          UserError: the last save failed.
        """
        self._settle()
        if self._unsaved:
            raise self._save_error()

    def close(self) -> None:
        """Waits until all saves are on disk, and frees orbax's threads."""
        try:
            self.wait()
        finally:
            self._background.close()
