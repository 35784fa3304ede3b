"""The interface of everything that gives batches to a run.

Shards, streams and random tokens are sources, and so is a class of your own:

  class Countdown(BatchSource):
      def rows(self, step, rows):
          tokens = np.stack([np.arange(step + row, step + row + 65) % 64 for row in rows])
          tokens = tokens.astype(np.int32)
          weights = np.ones((len(rows), 64), np.float32)
          return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

  run(config, workdir, data=TrainingData(Countdown()))  # with train.seq_len=64
"""

from collections.abc import Iterator

import numpy as np

from llama_jax.errors import UserError

Local = dict[str, np.ndarray]

# The arrays of a batch, by name.
REQUIRED = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
OPTIONAL = {"segment_ids": np.int32, "positions": np.int32}


class BatchSource:
    """Gives the batches of a run: each process makes its own rows of the global batch of a step.

    A subclass defines `rows`. Everything else has a default, which is right where the rows are a
    function of the step alone: nothing has to be saved, and a run goes on at any step. A source
    whose batches depend on those before defines `batches`, `state` and `start_at` instead.

    Attributes:
      n_sequences: rows of one pass over the source, over all processes; None: it has no end.
        Evaluation takes no more of them.
    """

    n_sequences: int | None = None

    def rows(self, step: int, rows: range) -> Local:
        """Makes some rows of the global batch of a step; steps count from 0.

        Returns:
          `inputs` and `targets` (int32 token ids, targets one ahead of inputs) and `weights`
          (float32, 0 where the target does not count), each of shape (len(rows), train.seq_len);
          of packed documents also `segment_ids` and `positions` (int32).
        """
        raise NotImplementedError(f"{type(self).__name__} defines no rows(step, rows)")

    def batches(self, rows: range, start: int, stop: int) -> Iterator[Local]:
        """Makes these rows of the steps start..stop, in order; by default when they are asked for.

        The device computes a step while the host makes the batch of the next one. Where `rows`
        takes longer than a step, `prefetch.made_ahead` makes several at once.
        """
        for step in range(start, stop):
            yield self.rows(step, rows)

    def state(self, step: int) -> list[int]:
        """Returns what `start_at` needs to go on at `step`, for a checkpoint.

        Batches of later steps are made by then, since they are made ahead.

        Returns:
          Numbers from 0 to 2**31 - 1, equally many on all processes; by default none.
        """
        return []

    def start_at(self, step: int, state: list[int], process: int, processes: int) -> None:
        """Is called once before training, at the beginning of a run and when it goes on.

        Args:
          step: the first one whose batch is asked for.
          state: what `state(step)` returned on this process; empty at the beginning of a run.
          process: index of this process.
          processes: how many there are; with a state as many as when it was saved.
        """

    def epochs(self, step: int) -> dict[str, float]:
        """Returns the passes over each part of the source in `step` steps; "" names an only part.

        By default nothing is said of epochs.
        """
        return {}

    def metrics(self, step: int) -> dict[str, float]:
        """Returns what is logged of the data with `step`; by default the epochs."""
        epochs = self.epochs(step)
        return {f"epochs/{name}" if name else "epochs": value for name, value in epochs.items()}

    def fingerprint(self) -> str:
        """Returns what changes whenever the tokens do: a run goes on with the same only.

        By default this is the name of the class: a source of files should say more.
        """
        return f"source {type(self).__qualname__}"

    def describe(self, step: int) -> str:
        """Says which text is in the batch of a step, for errors; steps count from 0."""
        return f"{type(self).__name__}.rows({step}, ..)"

    def summary(self, steps: int) -> list[str]:
        """Returns lines on the data of a run of `steps` steps, for its overview."""
        epochs = self.epochs(steps)
        seen = ", ".join(f"{name or 'the source'} {value:.2f}" for name, value in epochs.items())
        return [f"data    epochs at the end: {seen}"] if epochs else []

    def finish(self) -> None:
        """Is called at the end of a run, on every process, unless an error ends it."""


def check_batch(source: BatchSource, batch: Local, rows: int, seq_len: int) -> None:
    """Checks the names, shapes and dtypes of what a source has made.

    Args:
      source: it, for the error.
      batch: the rows of this process.
      rows: how many rows were asked for.
      seq_len: tokens of a row.

    Raises:
      UserError: a name, a shape or a dtype is wrong.
    """
    if not isinstance(batch, dict):
        problem = f"a {type(batch).__name__}, not a dict of arrays"
    elif missing := [name for name in REQUIRED if name not in batch]:
        problem = f"no {' and no '.join(missing)}"
    elif unknown := [name for name in batch if name not in REQUIRED | OPTIONAL]:
        known = ", ".join((*REQUIRED, *OPTIONAL))
        problem = f"an unknown {unknown[0]!r}; the names are {known}"
    else:
        problem = "; ".join(filter(None, (_fault(n, a, rows, seq_len) for n, a in batch.items())))
    if problem:
        raise UserError(f"the batch of {type(source).__name__} has {problem}")


def _fault(name: str, array: np.ndarray, rows: int, seq_len: int) -> str:
    """Says what is wrong with one array of a batch; "" if nothing is."""
    dtype = np.dtype((REQUIRED | OPTIONAL)[name])
    if not isinstance(array, np.ndarray):
        return f"{name} of type {type(array).__name__}, not numpy.ndarray"
    if array.shape != (rows, seq_len):
        return f"{name} of shape {array.shape}, not {(rows, seq_len)} (rows, train.seq_len)"
    return "" if array.dtype == dtype else f"{name} of {array.dtype}, not {dtype}"
