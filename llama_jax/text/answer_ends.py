"""Whether answers end in a token that ends generation: a model that is never shown one never stops.

An answer has ended if its last token that counts is an end token, or only white space follows that
in the answer: generation stops at the token and never comes to the white space.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.text.chat_template import Encoded
from llama_jax.text.tokenizer_formats import MARK


def last_tokens(encoded: Encoded, first: int, stop: int) -> Iterator[int]:
    """The tokens of an answer from its last one back, up to one that is more than white space."""
    for index in range(stop - 1, first - 1, -1):
        yield int(encoded.ids[index])
        begin = int(encoded.stops[index - 1]) if index else 0
        if encoded.text[begin : int(encoded.stops[index])].replace(MARK, "").strip():
            return


def count_answers(encoded: Encoded, length: int, ends: frozenset[int]) -> tuple[int, int]:
    """Whole answers among the first tokens of a conversation, and how many of them have no end.

    Args:
      encoded: the conversation.
      length: tokens that are kept; an answer that is cut there is not whole, and not counted.
      ends: tokens at which generation stops.
    """
    whole = [answer for answer in encoded.answers if answer[1] <= length]
    unended = [one for one in whole if ends.isdisjoint(last_tokens(encoded, *one))]
    return len(whole), len(unended)


def describe_unended(answers: int, unended: int) -> str:
    """What a report says of them."""
    return f"answers that end in no end token: {unended:,} of {answers:,}"


def count_in_splits(splits: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Answers and unended answers of all splits of a manifest; 0 where it does not say.

    Manifests before them, and those of plain text, do not.
    """
    names = ("answers", "unended_answers")
    answers, unended = (sum(split.get(name, 0) for split in splits.values()) for name in names)
    return answers, unended
