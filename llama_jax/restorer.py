"""Finds the newest good step of a run, and restores its state."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from llama_jax import manifest, retention
from llama_jax.agreement import agreed
from llama_jax.checkpoint import CHECKPOINTS, DamagedCheckpoint, restore_items
from llama_jax.config import Config
from llama_jax.errors import UserError
from llama_jax.files import append_records
from llama_jax.skips import Skips, no_skips
from llama_jax.step import TrainState, abstract_state


class Restorer:
    """Tells of damaged steps and sets them aside; all processes make the same calls."""

    def __init__(self, workdir: epath.PathLike, config: Config) -> None:
        self._workdir = epath.Path(workdir).absolute()
        self._directory = self._workdir / CHECKPOINTS
        self._config = config
        self._damaged: dict[int, str] = {}  # what is wrong with which step
        self.passed_over = False  # whether a damaged step was set aside

    def folder(self, step: int) -> epath.Path:
        """Where `step` is, or would be."""
        return self._directory / str(step)

    def newest_good_step(self, fits: Callable[[int], bool] | None = None) -> int | None:
        """The newest step (that fits) whose files are all as they were written; None if none is.

        Newer, damaged ones are set aside, which is said on the console and in metrics.jsonl.

        Raises:
          UserError: any step fits, there are some, and none is good; nothing is changed.
        """
        mine = (jax.process_index(), jax.process_count())
        for step in self._steps(fits):
            if step in self._damaged:
                continue
            reason = agreed(manifest.damage(self.folder(step), mine))
            if reason:
                self._damaged[step] = reason
                continue
            self._set_damaged_aside(step)
            if manifest.is_unverified(self.folder(step)):
                self._say(f"unverified checkpoint {step}: saved by a version without a manifest")
            return step
        if self._damaged and fits is None:
            what = "; ".join(f"step {step}: {reason}" for step, reason in self._damaged.items())
            raise UserError(
                f"no good checkpoint is left in {self._directory} ({what}); nothing was changed. "
                "Bring one back from a copy, or use another --workdir to start anew"
            )
        return None

    def _steps(self, fits: Callable[[int], bool] | None) -> list[int]:
        """Complete steps as process 0 sees them, newest first."""
        first = jax.process_index() == 0
        # A shared file system may show other processes a folder late.
        steps = retention.saved_steps(self._directory)[::-1] if first else []
        if fits is not None:
            steps = [step for step in steps if fits(step)]
        text = agreed(",".join(map(str, steps[:50])))
        return [int(step) for step in text.split(",") if step]

    def mark_damaged(self, step: int, reason: str) -> None:
        """Makes `newest_good_step` pass over `step`, which could not be restored."""
        self._damaged[step] = reason

    def _set_damaged_aside(self, used: int) -> None:
        self.passed_over |= bool(self._damaged)
        for step in sorted(self._damaged):
            if jax.process_index() == 0:
                reason = self._damaged[step]
                target = retention.set_aside(self.folder(step))
                self._say(
                    f"damaged checkpoint {step}: {reason}; set aside as {target}, going on from "
                    f"step {used}"
                )
                self._note(used, event="checkpoint_damaged", damaged_step=step, reason=reason)
        self._damaged.clear()

    def restore(self, step: int, shardings: Any) -> TrainState:
        """Reads the state of `step` onto the mesh of `shardings` (a `TrainState` of shardings).

        Raises:
          UserError: the saved arrays are not those of this config.
          DamagedCheckpoint: it cannot be read, or its fingerprint is not the saved one.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract_state(self._config),
            shardings,
        )
        optimizer = {"step": target.step, "opt_state": target.opt_state}
        items = {"params": target.params, "optimizer": optimizer}
        if (self.folder(step) / "skips").exists():  # not before format 2
            items["skips"] = target.skips.to_dict()

        def build(found: dict[str, Any]) -> TrainState:
            if "skips" in found:
                skips = Skips(**found["skips"])
            else:
                skips = jax.jit(no_skips, out_shardings=shardings.skips)()
            return TrainState(params=found["params"], **found["optimizer"], skips=skips)

        restored, problem = None, ""
        try:
            restored = restore_items(self.folder(step), items, build)
        except DamagedCheckpoint as error:
            problem = str(error)
        problem = agreed(problem)
        if problem or restored is None:
            raise DamagedCheckpoint(problem)
        return restored

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            self._print(text)

    @staticmethod
    def _print(text: str) -> None:
        """Prints in one piece, since the loop does, too; a full disk under stdout ends no save."""
        with contextlib.suppress(OSError):
            print(f"{text}\n", end="", flush=True)

    def note(self, step: int, text: str, **record: Any) -> None:
        """Says what has happened, and adds it to metrics.jsonl."""
        self._say(text)
        self._note(step, **record)

    def _note(self, step: int, **record: Any) -> None:
        """Adds a line to metrics.jsonl, if that can be."""
        if jax.process_index() > 0:
            return
        # The console has it too; a full disk is likely what it is about.
        with contextlib.suppress(OSError):
            append_records(self._workdir / "metrics.jsonl", [{"step": step, **record}])
