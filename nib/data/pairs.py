"""Preferences: pairs of a chosen and a rejected answer to the same prompt, as the rows of a batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nib.common.exits import InputError
from nib.data.dataset import TokenStream
from nib.data.order import shuffled
from nib.data.sequences import Conversations, by_length, padded


class PairBatch(NamedTuple):
    """n pairs: rows 0 to n - 1 are the chosen answers, rows n to 2n - 1 the rejected ones, in the same order."""

    inputs: Tensor  # (2n, T) int64
    targets: Tensor  # (2n, T), -1 where nothing is learned: in the prompt and the padding
    numbers: NDArray[np.int64]  # (n,) the pairs' numbers in their split


class Pairs:
    """The pairs of a split; a sequence of the run is a pair. Raises InputError for a pair longer than the context."""

    def __init__(self, stream: TokenStream, block_size: int, seed: int = 0, name: str = "") -> None:
        self.conversations, self.seed = Conversations(stream, block_size), seed
        self.size = self.conversations.size // 2
        whole = np.diff(self.conversations.starts)[: 2 * self.size].reshape(-1, 2).max(axis=1, initial=0) - 1
        if (whole > block_size).any():
            count, most = int((whole > block_size).sum()), int(whole.max())
            what = f"{count} of {self.size} pairs in {name} do not fit into block_size {block_size}"
            raise InputError(f"{what}: the longest has {most} tokens. Raise block_size, or leave these pairs out")
        self.lengths = self.conversations.lengths[: 2 * self.size].reshape(-1, 2).sum(axis=1)
        self.mean_tokens = max(1.0, float(self.lengths.mean())) if self.size else 1.0

    def index(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the pair that each of the run's sequences is."""
        return shuffled(sequences, self.size, self.seed)

    def tokens(self, sequences: NDArray[np.int64]) -> int:
        return int(self.lengths[self.index(sequences)].sum())

    def batches(self, numbers: NDArray[np.int64], size: int, block_size: int, widths: int = 0) -> list[PairBatch]:
        """Pairs in batches of `size`, those of similar lengths together; `widths` as in `by_length`."""
        rows = {n: [self.conversations.row(2 * n + side) for side in (0, 1)] for n in set(numbers.tolist())}
        longest = {n: max(len(inputs) for inputs, _ in pair) for n, pair in rows.items()}
        found = []
        for part, width in by_length(numbers.tolist(), longest.__getitem__, size, block_size, widths):
            batch = padded([rows[n][side] for side in (0, 1) for n in part], width)
            found.append(PairBatch(*batch, np.array(part, dtype=np.int64)))
        return found

    @staticmethod
    def empty() -> PairBatch:
        """The batch of a process that has no pair left: sharded models need the same number of passes on each."""
        return PairBatch(torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), -1), np.zeros(0, dtype=np.int64))
