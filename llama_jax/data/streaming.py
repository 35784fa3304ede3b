"""Training straight from a source: tokenised on the fly, never written down.

Documents come in the order of the source (nothing is shuffled: order the files yourself), cut into
sequences by concatenate-and-chunk, epoch after epoch. Of H processes, process h takes the documents
h, h + H, .. and fills its own rows, so unlike with shards a batch depends on the number of
processes, and only the same number can go on exactly.
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

BATCH_DOCUMENTS = 16  # tokenised at once
KEPT_POSITIONS = 64  # steps whose position is remembered; more than are ever made ahead


@dataclasses.dataclass(frozen=True)
class Position:
    """Where the next token of a process comes from: a plain tuple of numbers.

    Attributes:
      epoch: passes over the source that are complete.
      document: number of the document in the pass, over all processes.
      token: tokens of it (BOS and EOS included) that were used as inputs.
    """

    epoch: int = 0
    document: int = 0
    token: int = 0


class StreamingBatches(BatchSource):
    """Makes batches of a source from a position on; a checkpoint keeps `position(step)`."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        seq_len: int,
        own: Sequence[epath.PathLike] = (),
    ) -> None:
        """Lists the files; no document is read yet.

        Args:
          config: what to read, and how.
          tokenizer: of the model.
          seq_len: tokens of a row.
          own: folders that this run writes, which are no part of a source.

        Raises:
          UserError: several named sources, or one that is not there.
        """
        sources = named_sources(config.source)
        if len(sources) > 1:
            raise UserError("data.streaming reads one source; prepare shards to mix several")
        self._config, self._tokenizer = config, tokenizer
        self._length = seq_len
        name, source = next(iter(sources.items()))
        self.listing = Tally()
        self._parts = list_parts(source, config, own, self.listing, name)
        self._positions: dict[int, Position] = {}
        self._process, self._processes = 0, 1
        self._tally = Tally()  # of the present pass
        self._told: collections.Counter[str] = collections.Counter()

    def fingerprint(self) -> str:
        """Identity of files (names and sizes) and tokenizer."""
        parts = [dataclasses.astuple(part) for part in self._parts]
        text = repr((parts, self._config.text_field, self._tokenizer.fingerprint))
        text += separator_of(self._config)
        return hashlib.sha256(text.encode()).hexdigest()

    def epochs(self, step: int) -> dict[str, float]:
        """Complete passes over this process's documents."""
        position = self._positions.get(step)
        return {"": float(position.epoch)} if position else {}

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the epochs, and what the present one has skipped."""
        return {**super().metrics(step), "documents_skipped": self.skipped()}

    def skipped(self) -> int:
        """Documents that could not be used, of all that this pass has read so far.

        Each process reads all of them; going on at a position reads what comes before again.
        """
        return self._tally.skipped.total()

    def tell_skips(self) -> None:
        """Prints what this pass has skipped or cut, if that is more than before; process 0 does."""
        met = self._tally.skipped + self._tally.changed
        if self._process == 0 and met - self._told:
            print(self._tally, flush=True)
            self._told = met

    def finish(self) -> None:
        """Prints what this pass has skipped, see `tell_skips`."""
        self.tell_skips()

    def describe(self, step: int) -> str:
        """Says where the first document of a batch is, as long as that is remembered."""
        if step not in self._positions:
            return f"the streamed batch of step {step + 1}"  # as the log counts
        at = self.position(step)
        return f"epoch {at.epoch}, from document {at.document}, token {at.token} on"

    def summary(self, steps: int) -> list[str]:
        """Returns lines on the files that are streamed and on those that are left out."""
        read = [f"data    {count:,} {kind}" for kind, count in sorted(self.listing.files.items())]
        return [*read, *self.listing.lines("left_out")]

    def start_at(self, step: int, state: list[int], process: int, processes: int) -> None:
        """Goes on at the position that `state(step)` gave, or at the first document without one.

        Raises:
          UserError: the state is that of another kind of source.
        """
        count = len(dataclasses.fields(Position))
        require(len(state) in (0, count), f"a position in streamed data has {count} numbers")
        self._positions = {step: Position(*state)}
        self._process, self._processes = process, processes

    def position(self, step: int) -> Position:
        """Where this process stands before `step`.

        Raises:
          KeyError: the step is not among the last few that were made.
        """
        return self._positions[step]

    def batches(self, rows: range, start: int, stop: int) -> Iterator[Local]:
        """Makes the batches of the steps start..stop; `start_at` must have named `start`.

        Raises:
          UserError: a file cannot be read, or no document of the source can be used.
        """
        position = self._positions[start]
        documents = self._from(position)
        position, ids = next(documents)
        shape = (len(rows), self._length)
        n_inputs = len(rows) * self._length
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
        """Documents from a position on, each with the position of its first token to use."""
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
                    f"{self._process} of {self._processes} could train on: {why.why_nothing()}"
                )
            self._tally = Tally()
            position, first = Position(epoch=position.epoch + 1), 0

    def _encoded(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """This process's documents from number `first` on, with BOS and EOS."""
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
        """Returns `position(step)` as numbers."""
        return list(dataclasses.astuple(self.position(step)))
