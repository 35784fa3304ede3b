"""The interface of every source of batches.

Shards, streams and random tokens are sources, and so is your own class:

  class Countdown(BatchSource):
      def rows(self, step, rows):
          tokens = np.stack([np.arange(step + row, step + row + 65) % 64 for row in rows])
          tokens = tokens.astype(np.int32)
          weights = np.ones((len(rows), 64), np.float32)
          return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

  run(config, workdir, data=TrainingData(Countdown()))  # with train.seq_len=64
"""

import os
from collections.abc import Iterator

import numpy as np

from llama_jax.errors import UserError

Local = dict[str, np.ndarray]

# The arrays of a batch, by name.
REQUIRED = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
OPTIONAL = {"segment_ids": np.int32, "positions": np.int32}


def quieten_tensorflow() -> None:
    """Keeps what TensorFlow says about itself off the terminal; call it before the import.

    Here TensorFlow only feeds data. Its note about oneDNN is written whatever the log level is.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


class BatchSource:
    """Gives the batches of a run: each process makes its own rows of the global batch of a step.

    A subclass defines `rows`. The other methods have defaults, which are right if the rows are a
    function of the step alone: no state has to be saved, and a run can resume at any step. A
    source whose batches depend on earlier batches defines `batches`, `state` and `start_at`
    instead.

    Attributes:
      n_sequences: rows in one pass over the source, over all processes; None: the source has no
        end. Evaluation reads at most one pass.
      ahead: number of batches that threads of tf.data make at once, by `rows`; 0: `batches` makes
        them one by one.
    """

    n_sequences: int | None = None
    ahead: int = 0

    def rows(self, step: int, rows: range) -> Local:
        """Makes some rows of the global batch of a step; steps count from 0.

        Returns:
          `inputs` and `targets` (int32 token ids, targets one ahead of inputs) and `weights`
          (float32, 0 where the target does not count), each of shape (len(rows), train.seq_len);
          for packed documents also `segment_ids` and `positions` (int32). A stage of the run may
          have its own `train.seq_len`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no rows(step, rows)")

    def batches(self, rows: range, start: int, stop: int) -> Iterator[Local]:
        """Yields these rows of the steps start..stop, in order.

        By default each batch is made when the loop takes it: the devices compute a step while the
        host makes the batch of the next one. See also `ahead`.

        Args:
          rows: rows of the global batch to make.
          start: the first step.
          stop: the step after the last one.
        """
        for step in range(start, stop):
            yield self.rows(step, rows)

    def state(self, step: int) -> list[int]:
        """Returns the state for a checkpoint, from which `start_at` resumes at `step`.

        When this is called, batches of later steps are already made, since they are made ahead.

        Returns:
          Numbers from 0 to 2**31 - 1, as many on each process; by default an empty list.
        """
        return []

    def start_at(self, step: int, state: list[int], process: int, processes: int) -> None:
        """Is called once before training, when a run begins and when it resumes.

        Args:
          step: the first step whose batch the run needs.
          state: the value that `state(step)` returned on this process; empty when a run begins.
          process: index of this process.
          processes: number of processes; if the state is not empty, the same as when it was saved.
        """

    def epochs(self, step: int) -> dict[str, float]:
        """Returns the number of passes over each part of the source in `step` steps, by name.

        A source with one part calls it "". By default there are no parts.
        """
        return {}

    def seen(self, step: int) -> dict[str, float]:
        """Returns how much of each part `step` steps have used up, by the part's fingerprint.

        A run with `init_from` begins after what its weights have seen. By default there are no
        parts.
        """
        return {}

    def reshaped(self, seq_len: int, global_batch: int) -> "BatchSource":
        """Returns the same text for evaluation in batches of another shape; by default itself.

        Args:
          seq_len: tokens in a row.
          global_batch: sequences per step, over all processes.
        """
        return self

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the metrics of the data to log with `step`; by default the epochs."""
        epochs = self.epochs(step)
        return {f"epochs/{name}" if name else "epochs": value for name, value in epochs.items()}

    def fingerprint(self) -> str:
        """Returns a text that changes whenever the tokens do; a run resumes only with the same one.

        By default this is the name of the class. A source that reads files should add them.
        """
        return f"source {type(self).__qualname__}"

    def describe(self, step: int) -> str:
        """Describes the text in the batch of a step, for errors; steps count from 0."""
        return f"{type(self).__name__}.rows({step}, ..)"

    def summary(self, steps: int) -> list[str]:
        """Returns lines on the data of a run of `steps` steps, for its overview."""
        epochs = self.epochs(steps)
        seen = ", ".join(f"{name or 'the source'} {value:.2f}" for name, value in epochs.items())
        return [f"data    epochs at the end: {seen}"] if epochs else []

    def finish(self) -> None:
        """Is called on every process when a run ends without an error."""


def check_batch(source: BatchSource, batch: Local, rows: int, seq_len: int) -> None:
    """Checks the names, shapes and dtypes of a batch that a source has made.

    Args:
      source: the source, for the error.
      batch: the rows of this process.
      rows: number of rows that the batch must have.
      seq_len: number of tokens that a row must have.

    Raises:
      UserError: a name, a shape or a dtype is wrong.
    """
    if not isinstance(batch, dict):
        problem = f"a {type(batch).__name__}, not a dict of arrays"
    elif missing := [name for name in REQUIRED if name not in batch]:
        problem = f"no {' and no '.join(missing)}"
    elif unknown := [name for name in batch if name not in REQUIRED | OPTIONAL]:
        known = ", ".join((*REQUIRED, *OPTIONAL))
        problem = f"an unknown array {unknown[0]!r}; the names are {known}"
    else:
        problem = "; ".join(filter(None, (_fault(n, a, rows, seq_len) for n, a in batch.items())))
    if problem:
        raise UserError(f"the batch of {type(source).__name__} has {problem}")


def _fault(name: str, array: np.ndarray, rows: int, seq_len: int) -> str:
    """Describes what is wrong with one array of a batch; "" if it is right."""
    dtype = np.dtype((REQUIRED | OPTIONAL)[name])
    if not isinstance(array, np.ndarray):
        return f"{name} of type {type(array).__name__}, not numpy.ndarray"
    if array.shape != (rows, seq_len):
        return f"{name} of shape {array.shape}, not {(rows, seq_len)} (rows, train.seq_len)"
    return "" if array.dtype == dtype else f"{name} of {array.dtype}, not {dtype}"
