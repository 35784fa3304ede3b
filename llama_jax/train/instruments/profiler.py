"""Traces of a few steps, for xprof and TensorBoard's profile plugin."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath


class Profiler:
    """Marks every step of the loop, and records a trace of the steps in a window.

    Steps are numbered from 1, as in the log. A trace is recorded in a local folder and copied to
    `directory` when it ends, because the profiler of jaxlib cannot write to a bucket.

    Args:
      window: the steps to record; may be empty.
      directory: TensorBoard's folder; a trace is copied to `plugins/profile/TIME` in it, where
        TensorBoard looks for traces.
    """

    def __init__(self, window: range, directory: epath.Path) -> None:
        self._window = window
        self._directory = directory
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._steps: list[int] = []

    def must_toggle(self, step: int) -> bool:
        """Returns whether a trace must start or end before `step`."""
        return (step in self._window) != (self._folder is not None)

    def toggle(self, step: int, state: Any) -> None:
        """Starts or ends the trace, after the device has finished the steps before `step`.

        Args:
          step: the next step.
          state: result of the steps before, to wait for.
        """
        jax.block_until_ready(state)
        if step not in self._window:
            self.close()
            return
        self._folder = tempfile.TemporaryDirectory(prefix="llama_jax_profile_")
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # traces of Python calls slow the host and hide the steps
        jax.profiler.start_trace(self._folder.name, profiler_options=options)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Marks the `with` block, with one step and its batch, as a step of the trace.

        Without a trace it takes microseconds.
        """
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._folder is not None:
            self._steps.append(step)

    def close(self) -> None:
        """Ends the trace, if one is running, and prints its folder."""
        if self._folder is None:
            return
        with self._folder as name:
            self._folder = None
            jax.profiler.stop_trace()
            if not self._steps:  # the run stopped before the first step of the window
                return
            try:
                for file in pathlib.Path(name).rglob("*"):
                    if file.is_file():
                        target = self._directory / file.relative_to(name).as_posix()
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(file.read_bytes())
            except OSError as error:  # does not end the run
                print(f"warning: the profile could not be saved: {error}", flush=True)
                return
        print(
            f"profile  steps {self._steps[0]} to {self._steps[-1]} are in "
            f"{self._directory / 'plugins' / 'profile'}\n"
            f"         to view them: pip install xprof; xprof --logdir={self._directory}",
            flush=True,
        )
