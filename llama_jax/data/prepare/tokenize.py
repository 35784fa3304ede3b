"""Tokenises one part of a source into shards.

The result depends on the arguments alone, so any worker may write a part, or write it again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.shards import layout
from llama_jax.data.shards.writer import ShardWriter
from llama_jax.data.sources import conversations
from llama_jax.data.sources.documents import read_documents
from llama_jax.data.sources.part import Example, Part, Tally
from llama_jax.files import write_atomically
from llama_jax.text import templates
from llama_jax.text.tokenizer import Tokenizer

# Limits of a batch that is tokenised at once: enough work for the threads, but little memory.
BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 8_000_000


def report_name(index: int) -> str:
    """Returns the name of the report of a part, which shows that the part is done."""
    return f"part-{index:05d}.json"


def write_part(
    data: DataConfig,
    pack_len: int,
    folder: str,
    index: int,
    part: Part,
    progress: Callable[[int, int], None] = lambda position, tokens: None,
    threads: int = 1,
    train_tokens: int = -1,
) -> int:
    """Writes the shards of one part, and then its report, which marks the part as done.

    Args:
      data: how to read the part, and how large shards are.
      pack_len: sequence length in tokens to pack documents for; 0: do not pack.
      folder: folder of the shards; must hold the tokenizer, and for instruction data the chat
        template.
      index: number of the part.
      part: what to read.
      progress: receives the numbers of bytes of the source and of tokens that were just done.
      threads: number of threads that tokenise.
      train_tokens: the first tokens of the part, which are trained on; all others are held out.
        -1: whole documents are held out, by their contents.

    Returns:
      The index.

    Raises:
      UserError: a file cannot be opened.
      OSError: the disk is full, or not writable.
    """
    path = epath.Path(folder)
    tokenizer = Tokenizer.load(path / layout.TOKENIZER)
    writers = {
        split: ShardWriter(
            path, f"{split}-{index:05d}", tokenizer.vocab_size, data.shard_tokens, pack_len
        )
        for split in layout.SPLITS
    }
    tally = Tally()
    position = tokens = 0
    if data.template:
        template = templates.open_choice(str(path / layout.TEMPLATE), tokenizer, {})
        template = dataclasses.replace(template, name=f"the chat template {data.template}")
        stream = conversations.examples(part, data, template, pack_len, tally)
    else:
        stream = _documents(part, data, tokenizer, tally, threads)
    for example in stream:
        if train_tokens >= 0:
            pieces = _cut(example, train_tokens - tokens, tokenizer)
        else:
            held_out = _held_out(example.key, data.validation_fraction)
            pieces = [("validation" if held_out else "train", example)]
        for split, piece in pieces:
            writers[split].add(piece)
        tokens += len(example.ids)
        progress(tally.position - position, len(example.ids))
        position = tally.position
    progress(part.size - position, 0)
    report: dict[str, Any] = {
        "splits": {split: writer.finish() for split, writer in writers.items()},
        "skipped": tally.noted("skipped"),
        "changed": tally.noted("changed"),
    }
    if train_tokens >= 0:
        report["train_tokens"] = train_tokens
    write_atomically(path / report_name(index), json.dumps(report).encode())
    return index


def _documents(
    part: Part, data: DataConfig, tokenizer: Tokenizer, tally: Tally, threads: int
) -> Iterator[Example]:
    """Streams the documents of a part of plain text as tokens."""
    for batch in _batches(read_documents(part, data, tally)):
        for text, ids in zip(batch, tokenizer.encode_documents(batch, threads), strict=True):
            raw = text.encode()
            yield Example(ids, len(raw), raw)


def _batches(stream: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in stream:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _held_out(data: bytes, fraction: float) -> bool:
    """Returns whether a document is held out: depends on its contents, so copies share a split."""
    digest = hashlib.sha256(data).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _cut(example: Example, at: int, tokenizer: Tokenizer) -> list[tuple[str, Example]]:
    """Cuts a document at the border of the held-out tail: tokens before `at` are trained on."""
    if at >= len(example.ids):
        return [("train", example)]
    if at <= 0:
        return [("validation", example)]
    tail = example.ids[at:]
    text_bytes = min(example.text_bytes, len(tokenizer.decode(tail.tolist()).encode()))
    return [
        (
            "train",
            dataclasses.replace(
                example, ids=example.ids[:at], text_bytes=example.text_bytes - text_bytes
            ),
        ),
        ("validation", dataclasses.replace(example, ids=tail, text_bytes=text_bytes)),
    ]
