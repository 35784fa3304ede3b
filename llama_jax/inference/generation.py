"""Continuations of prompts as text; `decode` works on token ids.

`complete` returns whole texts, for the sample after training. `new_texts` yields text as the model
generates it.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.inference.decode import Sampling, generate, stream_tokens
from llama_jax.inference.loaded_model import InferenceModel
from llama_jax.text.tokenizer import Tokenizer


def complete(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    context: int,
) -> list[str]:
    """Continues texts, and returns each prompt with its continuation.

    Args:
      config: the model.
      params: its parameters.
      tokenizer: tokenizer of the model.
      prompts: the texts.
      sampling: how to draw tokens.
      context: longest sequence that the model supports, in tokens.

    Raises:
      UserError: see `decode.stream_tokens`.
    """
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    new = generate(
        config,
        params,
        ids,
        sampling,
        context=context,
        eos_id=tokenizer.eos_id,
        n_ids=tokenizer.vocab_size,
    )
    special = (tokenizer.bos_id, tokenizer.eos_id)
    return [
        tokenizer.decode([token for token in (*prompt, *answer) if token not in special])
        for prompt, answer in zip(ids, new, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class NewText:
    """New text of one row.

    Attributes:
      row: index of the prompt.
      text: the new text; it contains only whole characters.
      tokens: number of new tokens.
      ended: whether this is the last text of the row.
      part: number of earlier programs that drew tokens for this batch.
    """

    row: int
    text: str
    tokens: int
    ended: bool
    part: int


def new_texts(
    model: InferenceModel, prompts: Sequence[Sequence[int]], sampling: Sampling, *, chunk: int
) -> Iterator[NewText]:
    """Continues prompts of token ids, and yields the new text of each row as it comes.

    Args:
      model: the model.
      prompts: token ids of each row.
      sampling: how to draw tokens.
      chunk: tokens drawn by one program.

    Raises:
      UserError: see `decode.stream_tokens`.
    """
    tokenizer = model.tokenizer
    streams = [tokenizer.stream() for _ in prompts]
    for begun, prompt in zip(streams, prompts, strict=True):
        for token in prompt:
            begun.add(token)
        begun.end()  # drops an incomplete character at the end of the prompt
    running = set(range(len(prompts)))
    parts = stream_tokens(
        model.config.model,
        model.params,
        prompts,
        sampling,
        context=model.context,
        eos_id=model.eos_ids,
        n_ids=tokenizer.vocab_size,
        chunk=chunk,
    )
    number = 0
    for number, part in enumerate(parts):
        for row in sorted(running):
            new = part[row]
            text = "".join(streams[row].add(token) for token in new)
            ended = bool(new) and new[-1] in model.eos_ids
            if ended:
                running.remove(row)
            yield NewText(row, text, len(new), ended, number)
    for row in sorted(running):
        yield NewText(row, streams[row].end(), 0, True, number)


def show_in_order(
    prompts: Sequence[str],
    found: Iterator[NewText],
    write: Callable[[str], Any],
    first: int | None = None,
) -> Iterator[NewText]:
    """Writes each prompt and its continuation, one row after another.

    The text of the current row is written as it comes; text of later rows waits.

    Args:
      prompts: texts of the rows.
      found: new text of the rows; this function yields it unchanged.
      write: writes a text.
      first: number of rows of earlier batches, to number the rows in a line above each text; None:
        write no such lines.
    """
    waiting, ended, shown = list(prompts), set(), 0

    def begin(row: int) -> None:
        heading = "" if first is None else f"--- {first + row + 1} ---\n"
        write(heading + waiting[row])

    begin(0)
    for piece in found:
        row = piece.row
        waiting[row] += piece.text
        if row == shown:
            write(piece.text)
        if piece.ended:
            ended.add(row)
        while shown in ended:
            write("\n")
            shown += 1
            if shown < len(prompts):
                begin(shown)
        yield piece


class Stopwatch:
    """Counts and times new tokens, without the time of the first program, which compiles."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first_seconds = 0.0
        self._last = self._start
        self._first_tokens = self._tokens = 0

    def count(self, found: Iterator[NewText]) -> None:
        """Counts the tokens of a batch, until its texts end."""
        first_batch = not self._tokens
        for piece in found:
            self._last = time.perf_counter()
            self._tokens += piece.tokens
            if first_batch and piece.part == 0:
                self._first_tokens = self._tokens
                self._first_seconds = self._last - self._start

    def summary(self) -> str:
        """Returns one line with the number of tokens, the first delay and the speed."""
        later = self._tokens - self._first_tokens
        seconds = self._last - self._start - self._first_seconds
        speed = f", then {later / seconds:,.1f} tokens/s" if later else ""
        return (
            f"{self._tokens:,} new tokens; the first after {self._first_seconds:.2f} s "
            f"(compilation included){speed}"
        )
