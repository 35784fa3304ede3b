"""A small tokenizer.model in Llama 3's own format, and its results, counted by hand."""

import base64
import collections
import itertools
import pathlib

NAMES = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")


def train_ranks(words, count):
    """Returns ranks by bytes: first 256 single bytes, then the most frequent pair, repeatedly."""
    ranks = {bytes([byte]): 255 - byte for byte in range(256)}  # not in the order of the bytes
    parts = {word: [bytes([byte]) for byte in word.encode()] for word in set(words)}
    weight = collections.Counter(words)
    while len(ranks) < count:
        pairs = collections.Counter()
        for word, pieces in parts.items():
            for left, right in itertools.pairwise(pieces):
                pairs[left + right] += weight[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best] = len(ranks)
        for pieces in parts.values():
            at = 0
            while at < len(pieces) - 1:
                if pieces[at] + pieces[at + 1] == best:
                    pieces[at : at + 2] = [best]
                at += 1
    return ranks


def ranks_of(corpus, count=420):
    """Returns ranks of the words of a folder and of this file, each also with a space before it."""
    text = " ".join(
        path.read_text() for path in [pathlib.Path(__file__), *sorted(corpus.iterdir())]
    )
    words = [f" {word}" for word in text.split()] + text.split() + ["日本語", "123"] * 40
    return train_ranks(words, count)


def file_of(ranks):
    """Returns the bytes of the file."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def merged(ranks, word):
    """Returns the ids of a word: its own if it is a token, otherwise tiktoken's merges by rank."""
    pieces = [bytes([byte]) for byte in word.encode()]
    if word.encode() in ranks:
        return [ranks[word.encode()]]
    while True:
        found = [
            (ranks[left + right], at)
            for at, (left, right) in enumerate(itertools.pairwise(pieces))
            if left + right in ranks
        ]
        if not found:
            return [ranks[piece] for piece in pieces]
        at = min(found)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
