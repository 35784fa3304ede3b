"""Whole documents into sequences of one length, with little padding."""

import bisect
from collections.abc import Sequence

import numpy as np

INDEX_DTYPE = np.dtype("<i8")


def pack_documents(starts: Sequence[int], n_tokens: int, seq_len: int) -> tuple[np.ndarray, int]:
    """Best-fit-decreasing packing of whole documents (arXiv:2404.10830).

    A document longer than a sequence is cut into pieces of full sequences and a rest; no other is
    cut. A piece of n inputs covers n + 1 tokens, whose last is only a target.

    Args:
      starts: first token of each document.
      n_tokens: where the last one ends.
      seq_len: inputs in a sequence, T.

    Returns:
      What a `.pack` file holds, int64: first piece of each sequence and the end (n_sequences + 1),
      then the first token of each piece, then its inputs; and n_sequences.
    """
    edges = np.append(np.asarray(starts, np.int64), n_tokens)
    pieces: list[tuple[int, int]] = []
    for start, inputs in zip(edges[:-1].tolist(), (np.diff(edges) - 1).tolist(), strict=True):
        pieces += [(min(seq_len, inputs - at), start + at) for at in range(0, inputs, seq_len)]
    pieces.sort(key=lambda piece: (-piece[0], piece[1]))
    room: dict[int, list[int]] = {}  # free inputs -> sequences with so many
    free: list[int] = []  # the keys of `room` in order
    sequences: list[list[tuple[int, int]]] = []
    for inputs, start in pieces:
        at = bisect.bisect_left(free, inputs)
        if at == len(free):
            index, left = len(sequences), seq_len - inputs
            sequences.append([])
        else:
            size = free[at]
            index, left = room[size].pop(), size - inputs
            if not room[size]:
                del room[size], free[at]
        sequences[index].append((start, inputs))
        if left:
            if left not in room:
                room[left] = []
                bisect.insort(free, left)
            room[left].append(index)
    counts = np.cumsum([0, *(len(sequence) for sequence in sequences)])
    flat = np.asarray([piece for sequence in sequences for piece in sequence]).reshape(-1, 2)
    return np.concatenate([counts, flat[:, 0], flat[:, 1]]).astype(INDEX_DTYPE), len(sequences)
