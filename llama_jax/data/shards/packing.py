"""Packing of whole documents into sequences of one length, with little padding."""

import bisect
from collections.abc import Sequence

import numpy as np

INDEX_DTYPE = np.dtype("<i8")


def pack_documents(starts: Sequence[int], n_tokens: int, seq_len: int) -> tuple[np.ndarray, int]:
    """Packs whole documents by best-fit-decreasing (arXiv:2404.10830).

    Only a document that is longer than a sequence is cut: into pieces that fill whole sequences,
    and a shorter last piece. A piece with n inputs covers n + 1 tokens, of which the last is only a
    target.

    Args:
      starts: first token of each document.
      n_tokens: number of tokens, which is the end of the last document.
      seq_len: T, inputs in a sequence.

    Returns:
      The int64 array in a `.pack` file, and n_sequences. The array holds the first piece of each
      sequence and the number of pieces (n_sequences + 1 values), then the first token of each
      piece, then the number of inputs of each piece.
    """
    edges = np.append(np.asarray(starts, np.int64), n_tokens)
    pieces: list[tuple[int, int]] = []
    for start, inputs in zip(edges[:-1].tolist(), (np.diff(edges) - 1).tolist(), strict=True):
        pieces += [(min(seq_len, inputs - at), start + at) for at in range(0, inputs, seq_len)]
    pieces.sort(key=lambda piece: (-piece[0], piece[1]))
    room: dict[int, list[int]] = {}  # number of free inputs -> sequences that have this number
    free: list[int] = []  # the keys of `room`, sorted
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
