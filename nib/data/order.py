"""The order of the data: which sequence of which dataset comes at each place of a run. No state is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def epochs(sequences: NDArray[np.int64], size: int, seed: int) -> Iterator[tuple[NDArray[np.bool_], int, NDArray]]:
    """For each epoch of `size` sequences: which of the run's `sequences` are in it, its key, and their item numbers.

    An epoch has every number below `size` once, in a permutation chosen by the key, a function of (seed, epoch).
    """
    for epoch in np.unique(sequences // size):
        chosen = sequences // size == epoch
        key = hashed(f"epoch {seed} {epoch}")
        yield chosen, key, permute(sequences[chosen] % size, size, key)


def deal(sequences: NDArray[np.int64], weights: list[Fraction]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The dataset of each of the run's `sequences`, and how many sequences of that dataset came before it.

    Of the first n sequences, dataset k has its share of n, rounded: the first gets floor(n w), the second its share
    of the rest, and so on, in exact fractions.
    """
    part, before = np.empty_like(sequences), np.empty_like(sequences)
    shares = [weight / sum(weights[k:]) for k, weight in enumerate(weights)]  # of what the datasets before it leave
    for place, number in enumerate(sequences.tolist()):
        for k, share in enumerate(shares):
            taken = number * share.numerator // share.denominator
            if (number + 1) * share.numerator // share.denominator > taken:  # always for the last, whose share is 1
                part[place], before[place] = k, taken
                break
            number -= taken
    return part, before


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """The images of `index` under a permutation of range(size) chosen by `key`.

    A Feistel network on the next even number of bits, applied again while the image is not below `size` (cycle
    walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The permutation is never stored.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.array([hashed(f"round {key} {turn}") for turn in range(6)], dtype=np.uint64)
    x = index.astype(np.uint64)
    todo = np.ones(len(x), dtype=bool)
    while todo.any():
        left, right = x[todo] >> np.uint64(half), x[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        x[todo] = (left << np.uint64(half)) | right
        todo[todo] = x[todo] >= size
    return x.astype(np.int64)


def hashed(text: str) -> int:
    """64 bits of the SHA-256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit of x affects every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
