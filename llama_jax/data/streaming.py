"""Streaming: tokenises a source during training, without token shards.

Documents keep the order of the source (nothing is shuffled: order the files yourself) and are cut
into sequences by concatenate-and-chunk, epoch after epoch. With H processes, process h reads the
documents h, h + H, .. and fills its own rows. So unlike with shards, a batch depends on the number
of processes, and a run resumes exactly only with the same number.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.source import BatchSource, Local
from llama_jax.data.sources.documents import list_parts, read_documents
from llama_jax.data.sources.listing import named_sources
from llama_jax.data.sources.part import Tally
from llama_jax.data.sources.text_files import separator_of
from llama_jax.errors import UserError, require
from llama_jax.text.tokenizer import Tokenizer

BATCH_DOCUMENTS = 16  # documents that are tokenised together
KEPT_POSITIONS = 64  # steps whose positions are kept; more than the batches that are made ahead


@dataclasses.dataclass(frozen=True)
class Position:
    """The place of the next token of a process.

    Attributes:
      epoch: number of complete passes over the source.
      document: number of the document in this pass, over all processes.
      token: tokens of this document (BOS and EOS included) that were already inputs.
    """

    epoch: int = 0
    document: int = 0
    token: int = 0


class StreamingBatches(BatchSource):
    """Makes batches of a source from a position on; a checkpoint saves `position(step)`."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        seq_len: int | Sequence[tuple[int, int]],
        own: Sequence[epath.PathLike] = (),
    ) -> None:
        """Lists the files of the source; reads no document yet.

        Args:
          config: which source to read, and how.
          tokenizer: the tokenizer of the model.
          seq_len: tokens in a row; or for each stage of a run, its first step and this number.
          own: folders that this run writes; they are not part of a source.

        Raises:
          UserError: there are several named sources, or the source does not exist.
        """
        sources = named_sources(config.source)
        if len(sources) > 1:
            raise UserError("data.streaming reads one source; prepare shards to mix several")
        self._config, self._tokenizer = config, tokenizer
        self._lengths = [(0, seq_len)] if isinstance(seq_len, int) else seq_len
        name, source = next(iter(sources.items()))
        self.listing = Tally()
        self._parts = list_parts(source, config, own, self.listing, name)
        self._positions: dict[int, Position] = {}
        self._process, self._processes = 0, 1
        self._tally = Tally()  # counts of the current pass
        self._told: collections.Counter[str] = collections.Counter()

    def fingerprint(self) -> str:
        """Returns a hash of the files (names and sizes), the settings and the tokenizer."""
        parts = [dataclasses.astuple(part) for part in self._parts]
        text = repr((parts, self._config.text_field, self._tokenizer.fingerprint))
        text += separator_of(self._config)
        return hashlib.sha256(text.encode()).hexdigest()

    def epochs(self, step: int) -> dict[str, float]:
        """Returns the number of complete passes over the documents of this process."""
        position = self._positions.get(step)
        return {"": float(position.epoch)} if position else {}

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the epochs, and the number of documents skipped in the current one."""
        return {**super().metrics(step), "documents_skipped": self.skipped()}

    def skipped(self) -> int:
        """Returns the number of unusable documents among those that this pass has read so far.

        Each process reads all documents. After a resume, a pass reads the documents before its
        position again, so they are counted, too.
        """
        return self._tally.skipped.total()

    def tell_skips(self) -> None:
        """Prints on process 0 what this pass has skipped or changed.

        It prints nothing if no count is higher than when it last printed.
        """
        met = self._tally.skipped + self._tally.changed
        if self._process == 0 and met - self._told:
            print(self._tally, flush=True)
            self._told = met

    def finish(self) -> None:
        """Prints what this pass has skipped; see `tell_skips`."""
        self.tell_skips()

    def describe(self, step: int) -> str:
        """Describes where a batch begins, if its position is still kept."""
        if step not in self._positions:
            return f"the streamed batch of step {step + 1}"  # the log counts steps from 1
        at = self.position(step)
        return f"epoch {at.epoch}, from document {at.document}, token {at.token} on"

    def summary(self, steps: int) -> list[str]:
        """Returns lines on the files to stream and on the files that are left out."""
        read = [f"data    {count:,} {kind}" for kind, count in sorted(self.listing.files.items())]
        return [*read, *self.listing.lines("left_out")]

    def start_at(self, step: int, state: list[int], process: int, processes: int) -> None:
        """Moves to the position that `state(step)` returned, or to the first document.

        Args:
          step: the first step to make.
          state: the saved position; empty: the first document.
          process: index of this process.
          processes: number of processes.

        Raises:
          UserError: another kind of source has saved the state.
        """
        count = len(dataclasses.fields(Position))
        require(len(state) in (0, count), f"a position in streamed data has {count} numbers")
        self._positions = {step: Position(*state)}
        self._process, self._processes = process, processes

    def position(self, step: int) -> Position:
        """Returns the position of this process before `step`.

        Raises:
          KeyError: the step is not one of the last `KEPT_POSITIONS` that were made.
        """
        return self._positions[step]

    def batches(self, rows: range, start: int, stop: int) -> Iterator[Local]:
        """Yields the batches of the steps start..stop.

        Args:
          rows: rows of this process; only their number matters.
          start: the first step: that of the call of `start_at`, or the `stop` of the last call.
          stop: the step after the last one, in the same stage.

        Raises:
          UserError: a file cannot be read, or no document of the source can be used.
        """
        position = self._positions[start]
        documents = self._from(position)
        position, ids = next(documents)
        length = next(length for first, length in self._lengths[::-1] if first <= start)
        shape = (len(rows), length)
        n_inputs = len(rows) * length
        for step in range(start, stop):
            flat = np.empty(n_inputs + 1, np.int32)
            filled = 0
            while filled < n_inputs:
                if position.token == len(ids):
                    position, ids = next(documents)
                taken = ids[position.token : position.token + n_inputs - filled]
                flat[filled : filled + len(taken)] = taken
                filled += len(taken)
                position = dataclasses.replace(position, token=position.token + len(taken))
            if position.token == len(ids):
                position, ids = next(documents)
            flat[-1] = ids[position.token]  # a target now, an input of the next batch
            self._positions[step + 1] = position
            self._positions.pop(step + 1 - KEPT_POSITIONS, None)
            yield {
                "inputs": flat[:-1].reshape(shape),
                "targets": flat[1:].reshape(shape),
                "weights": np.ones(shape, np.float32),
            }

    def _from(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Yields the documents from a position on, each with the position of its next token."""
        position, first = start, start.document
        while True:
            found = False
            for number, ids in self._encoded(first):
                found = True
                token = position.token if number == position.document else 0
                yield dataclasses.replace(position, document=number, token=token), ids
                position = dataclasses.replace(position, document=number + 1, token=0)
            self.tell_skips()
            if not found and first == 0:
                why = Tally()
                why.skipped, why.left_out = self._tally.skipped, self.listing.left_out
                why.first = self._tally.first | self.listing.first
                raise UserError(
                    f"data.source={self._config.source} has no text that process "
                    f"{self._process} of {self._processes} can train on: {why.why_nothing()}"
                )
            self._tally = Tally()
            position, first = Position(epoch=position.epoch + 1), 0

    def _encoded(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the documents of this process from number `first` on, with BOS and EOS."""
        texts: list[tuple[int, str]] = []

        def flush() -> Iterator[tuple[int, np.ndarray]]:
            encoded = self._tokenizer.encode_documents([text for _, text in texts])
            for (number, _), ids in zip(texts, encoded, strict=True):
                yield number, ids
            texts.clear()

        for number, text in enumerate(self._documents()):
            if number >= first and number % self._processes == self._process:
                texts.append((number, text))
                if len(texts) == BATCH_DOCUMENTS:
                    yield from flush()
        yield from flush()

    def _documents(self) -> Iterator[str]:
        for part in self._parts:
            yield from read_documents(part, self._config, self._tally)

    def state(self, step: int) -> list[int]:
        """Returns `position(step)` as a list of numbers."""
        return list(dataclasses.astuple(self.position(step)))
