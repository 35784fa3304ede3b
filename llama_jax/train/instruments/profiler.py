"""Traces of a few steps, for xprof and TensorBoard's profile plugin."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath


class Profiler:
    """Marks every step of the loop, and records those in a window.

    Steps are numbered from 1, as in the log. A trace is recorded into a local folder and copied to
    `directory` when it ends: the profiler of jaxlib cannot write to a bucket.

    Args:
      window: the steps to record; empty: none.
      directory: TensorBoard's folder; a trace goes to `plugins/profile/TIME` below it, where
        TensorBoard looks for it.
    """

    def __init__(self, window: range, directory: epath.Path) -> None:
        self._window = window
        self._directory = directory
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._steps: list[int] = []

    def must_toggle(self, step: int) -> bool:
        """Whether a trace must start before `step`, or end before it."""
        return (step in self._window) != (self._folder is not None)

    def toggle(self, step: int, state: Any) -> None:
        """Starts or ends the trace, once the device has done the steps before `step`."""
        jax.block_until_ready(state)
        if step not in self._window:
            self.close()
            return
        self._folder = tempfile.TemporaryDirectory(prefix="llama_jax_profile_")
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call: slows the host, and hides the steps
        jax.profiler.start_trace(self._folder.name, profiler_options=options)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one step and its batch: what a trace calls a step; microseconds otherwise."""
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._folder is not None:
            self._steps.append(step)

    def close(self) -> None:
        """Ends the trace where one is running, and says where it is."""
        if self._folder is None:
            return
        with self._folder as name:
            self._folder = None
            jax.profiler.stop_trace()
            if not self._steps:  # stopped before the first of them
                return
            try:
                for file in pathlib.Path(name).rglob("*"):
                    if file.is_file():
                        target = self._directory / file.relative_to(name).as_posix()
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(file.read_bytes())
            except OSError as error:  # a profile ends no run
                print(f"warning: the profile could not be kept: {error}", flush=True)
                return
        print(
            f"profile  steps {self._steps[0]} to {self._steps[-1]} are in "
            f"{self._directory / 'plugins' / 'profile'}\n"
            f"         to look at it: pip install xprof; xprof --logdir={self._directory}",
            flush=True,
        )
