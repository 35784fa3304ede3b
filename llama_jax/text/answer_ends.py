"""Counts answers without an end token at their end: they do not teach a model to stop.

An answer ends in an end token if that is its last token that counts, or if only white space follows
it: generation stops at the token and never reaches the white space.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.text.chat_template import Encoded
from llama_jax.text.tokenizer_formats import MARK


def last_tokens(encoded: Encoded, first: int, stop: int) -> Iterator[int]:
    """Yields the tokens of an answer backwards, up to the first that is more than white space.

    Args:
      encoded: the conversation.
      first: index of the first token of the answer.
      stop: index after its last token.
    """
    for index in range(stop - 1, first - 1, -1):
        yield int(encoded.ids[index])
        begin = int(encoded.stops[index - 1]) if index else 0
        if encoded.text[begin : int(encoded.stops[index])].replace(MARK, "").strip():
            return


def count_answers(encoded: Encoded, length: int, ends: frozenset[int]) -> tuple[int, int]:
    """Counts the uncut answers in a conversation, and those of them without an end token.

    Args:
      encoded: the conversation.
      length: number of tokens that are kept; an answer that continues after them is not counted.
      ends: tokens at which generation stops.
    """
    whole = [answer for answer in encoded.answers if answer[1] <= length]
    unended = [one for one in whole if ends.isdisjoint(last_tokens(encoded, *one))]
    return len(whole), len(unended)


def describe_unended(answers: int, unended: int) -> str:
    """Returns the line of a report about answers without an end token."""
    return f"answers without an end token: {unended:,} of {answers:,}"


def count_in_splits(splits: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Adds up the answers, and the answers without an end token, of all splits of a manifest.

    Both are 0 for plain text, and for manifests of earlier versions, which do not count them.
    """
    names = ("answers", "unended_answers")
    answers, unended = (sum(split.get(name, 0) for split in splits.values()) for name in names)
    return answers, unended
