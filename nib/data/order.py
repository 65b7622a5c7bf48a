"""Which sequence of which dataset comes when, for every place in a run, without keeping any state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from nib.common.exits import InputError
from nib.common.wording import counted


def epochs(sequences: NDArray[np.int64], size: int, seed: int) -> Iterator[tuple[NDArray[np.bool_], int, NDArray]]:
    """Which of the run's `sequences` belong to each epoch of `size`, the epoch's key, and what each is in it.

    An epoch has every number below `size` once, in a permutation chosen by the key, a function of (seed, epoch).
    """
    for epoch in np.unique(sequences // size):
        chosen = sequences // size == epoch
        key = int.from_bytes(hashlib.sha256(f"epoch {seed} {epoch}".encode()).digest()[:8], "little")
        yield chosen, key, permute(sequences[chosen] % size, size, key)


def deal(sequences: NDArray[np.int64], weights: list[Fraction]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of several datasets each of the run's `sequences` is of, and how many of that dataset came before it.

    Of the first n sequences, dataset k has its share of n, rounded: the first takes floor(n w), the second its share
    of what the first left, and so on, in exact fractions.
    """
    part, before = np.empty_like(sequences), np.empty_like(sequences)
    shares = [weight / sum(weights[k:]) for k, weight in enumerate(weights)]  # of what those before it left
    for place, number in enumerate(sequences.tolist()):
        for k, share in enumerate(shares):
            taken = number * share.numerator // share.denominator
            if (number + 1) * share.numerator // share.denominator > taken:  # always of the last one, whose share is 1
                part[place], before[place] = k, taken
                break
            number -= taken
    return part, before


def shuffled(sequences: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Which of `size` items each of the run's sequences is: all of them once in an epoch."""
    found = np.empty_like(sequences)
    for chosen, _, index in epochs(sequences, size, seed):
        found[chosen] = index
    return found


class WindowOrder:
    """Which window of the stream is the i-th training sequence, for every i, without keeping any state.

    A window is block_size inputs and the targets one further on. Sequence i belongs to epoch i // windows; an
    epoch visits every window once, in a permutation seeded by (seed, epoch), and cuts the stream at an offset of
    its own, so that other tokens meet at the borders. Raises InputError when the split is shorter than a window.
    """

    def __init__(self, tokens: int, block_size: int, seed: int) -> None:
        if tokens < block_size + 1:
            raise InputError(
                f"the training split has {counted(tokens, 'token')}, fewer than one window of block_size + 1 = "
                f"{block_size + 1}. Lower block_size or prepare more text"
            )
        self.block_size, self.seed = block_size, seed
        # One block is kept free for the offset to move in, so that every epoch has the same number of windows, and
        # the offset moves up to the end, so that every token has its turn.
        self.windows = max(1, (tokens - block_size) // block_size)
        self.offsets = tokens - self.windows * block_size

    def begin(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """First token of each of these sequences."""
        begins = np.empty_like(sequences)
        for chosen, key, window in epochs(sequences, self.windows, self.seed):
            begins[chosen] = key % self.offsets + window * self.block_size
        return begins


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """The images of `index` under a permutation of range(size) chosen by `key`.

    A Feistel network on the next even number of bits, applied again where the image is not below `size` (cycle
    walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). It needs no memory for the order.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.array([hash_round(key, turn) for turn in range(6)], dtype=np.uint64)
    x = index.astype(np.uint64)
    todo = np.ones(len(x), dtype=bool)
    while todo.any():
        left, right = x[todo] >> np.uint64(half), x[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        x[todo] = (left << np.uint64(half)) | right
        todo[todo] = x[todo] >= size
    return x.astype(np.int64)


def hash_round(key: int, turn: int) -> int:
    return int.from_bytes(hashlib.sha256(f"round {key} {turn}".encode()).digest()[:8], "little")


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit of x moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
