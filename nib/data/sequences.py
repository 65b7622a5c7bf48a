"""What a model is trained and validated on, as rows of batches: windows of a text, conversations or preferences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nib.common.exits import InputError
from nib.common.wording import amount, counted
from nib.data.dataset import Dataset, TokenStream
from nib.data.mixture import Mixture
from nib.data.order import deal, epochs

T = TypeVar("T")
Row = tuple[NDArray[np.int64], NDArray[np.int64]]  # inputs and targets of one sequence, of the same length
EMPTY: Row = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
Batch = tuple[Tensor, Tensor]  # inputs and targets (rows, T) int64; targets of -1 do not count


class Windows:
    """The windows of a text, numbered from 0 without end. An epoch has `size` of them, of `mean_tokens` each.

    A window is block_size inputs and their targets, shifted by one token. An epoch visits every window once, in a
    permutation seeded by (seed, epoch). It cuts the text at its own offset, so that the borders of windows move.
    Raises InputError if the text is shorter than a window.
    """

    def __init__(self, stream: TokenStream, block_size: int, seed: int) -> None:
        if stream.tokens < block_size + 1:
            raise InputError(
                f"the training split has {counted(stream.tokens, 'token')}, fewer than one window of block_size + 1 = "
                f"{block_size + 1}. Lower block_size or prepare more text"
            )
        self.stream, self.block_size, self.seed = stream, block_size, seed
        self.mean_tokens = float(block_size)
        # A block is left over for the offset, so that every epoch has the same number of windows. The offset can be so
        # large that the last window ends with the text, so that every token is used in some epoch.
        self.size = max(1, (stream.tokens - block_size) // block_size)
        self.offsets = stream.tokens - self.size * block_size

    def begin(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """The position of the first token of each of the run's sequences."""
        begins = np.empty_like(sequences)
        for chosen, key, window in epochs(sequences, self.size, self.seed):
            begins[chosen] = key % self.offsets + window * self.block_size
        return begins

    def rows(self, sequences: NDArray[np.int64]) -> list[Row]:
        length = self.block_size + 1
        windows = [self.stream.read(begin, begin + length) for begin in self.begin(sequences).tolist()]
        return [(window[:-1], window[1:]) for window in windows]

    def tokens(self, sequences: NDArray[np.int64]) -> int:
        return len(sequences) * self.block_size


class Shuffled:
    """Items of `lengths` tokens, numbered from 0 without end: an epoch has each of the `size` items once."""

    def __init__(self, lengths: NDArray[np.int64], seed: int) -> None:
        self.lengths, self.size, self.seed = lengths, len(lengths), seed
        self.mean_tokens = max(1.0, float(lengths.mean())) if self.size else 1.0

    def index(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the item that each of the run's sequences is."""
        found = np.empty_like(sequences)
        for chosen, _, index in epochs(sequences, self.size, self.seed):
            found[chosen] = index
        return found

    def tokens(self, sequences: NDArray[np.int64]) -> int:
        return int(self.lengths[self.index(sequences)].sum())


class Conversations(Shuffled):
    """The conversations of a split, each a sequence of its own, truncated to block_size + 1 tokens.

    Tokens after the last learned one are left out of a row, since no target depends on them.
    """

    def __init__(self, stream: TokenStream, block_size: int, seed: int = 0) -> None:
        assert stream.starts is not None and stream.mask is not None
        self.stream, self.mask, self.starts = stream, stream.mask, stream.starts
        self.whole = np.diff(self.starts) - 1  # their lengths before they are truncated
        super().__init__(np.minimum(self.whole, block_size), seed)

    def rows(self, sequences: NDArray[np.int64]) -> list[Row]:
        return [self.row(number) for number in self.index(sequences).tolist()]

    def is_learned(self, number: int) -> bool:
        """Whether a conversation has a learned token that is not cut off."""
        return len(self.row(number)[0]) > 0

    def row(self, number: int) -> Row:
        begin = int(self.starts[number])
        end = begin + int(self.lengths[number]) + 1
        tokens, learned = self.stream.read(begin, end), self.mask.read(begin, end)[1:]
        width = int(learned.nonzero()[0].max(initial=-1)) + 1
        return tokens[:width], np.where(learned[:width], tokens[1 : width + 1], -1)


class Mixed:
    """The sequences of several datasets, mixed so that each has its share of the sequences at any time."""

    def __init__(self, parts: list[Windows | Conversations], shares: list[Fraction]) -> None:
        self.parts, self.shares = parts, shares
        self.size = sum(part.size for part in parts)
        self.mean_tokens = sum(float(share) * part.mean_tokens for share, part in zip(shares, parts, strict=True))

    def rows(self, sequences: NDArray[np.int64]) -> list[Row]:
        of, number = deal(sequences, self.shares)
        found = {k: iter(part.rows(number[of == k])) for k, part in enumerate(self.parts)}
        return [next(found[k]) for k in of.tolist()]

    def tokens(self, sequences: NDArray[np.int64]) -> int:
        of, number = deal(sequences, self.shares)
        return sum(part.tokens(number[of == k]) for k, part in enumerate(self.parts))


Sequences = Windows | Conversations | Mixed  # of a run


def training_sequences(data: Dataset | Mixture, block_size: int, seed: int) -> Sequences:
    """The training sequences of a dataset or mixture. Raises InputError if a training split is too short."""
    parts: list[Windows | Conversations] = []
    for dataset in data.parts:
        if dataset.chat and not dataset.train.tokens:
            raise InputError(f"{dataset.directory} has no conversation to train on. Prepare more of them")
        split = dataset.train
        parts.append(Conversations(split, block_size, seed) if dataset.chat else Windows(split, block_size, seed))
    return Mixed(parts, data.shares) if len(parts) > 1 else parts[0]


def describe(data: Dataset | Mixture, block_size: int) -> Iterator[str]:
    """The lines about the data that a run prints at its start."""
    for part, share in zip(data.parts, data.shares, strict=True):
        of = f"{float(share):.1%} of the sequences: " if len(data.parts) > 1 else ""
        yield (
            f"data:   {of}{part.directory}, {amount(part.train.tokens)} training and "
            f"{amount(part.val.tokens)} validation tokens ({part.meta['tokenizer']}, "
            f"{counted(part.vocab_size, 'id')})"
        )
        for name, split in (("training", part.train), ("validation", part.val)) if part.chat else ():
            rows = Conversations(split, block_size)
            if cut := int((rows.whole > block_size).sum()):
                what = f"{cut} of {rows.size} {name} conversations of {part.directory} are cut"
                yield f"warning: {what}: they do not fit into block_size {block_size}"
                if not any(map(rows.is_learned, range(rows.size))):
                    yield f"warning: in none of the {name} conversations is a learned token left. Raise block_size"


def micro_batches(rows: list[Row], size: int, block_size: int, widths: int = 0) -> list[Batch]:
    """The rows in batches of `size`, right-padded; see `by_length`."""
    return [padded(part, width) for part, width in by_length(rows, lambda row: len(row[0]), size, block_size, widths)]


def by_length(
    items: list[T], length: Callable[[T], int], size: int, block_size: int, widths: int
) -> Iterator[tuple[list[T], int]]:
    """The items in parts of `size`, those of similar lengths together, each with the width that its longest one needs.

    With `widths` there are at most so many different widths, since torch.compile compiles each shape anew.
    """
    items = sorted(items, key=lambda item: -length(item))  # stable: windows, all of one length, keep their order
    step = -(-block_size // widths) if widths else 1
    for first in range(0, len(items), size):
        part = items[first : first + size]
        yield part, min(block_size, -(-length(part[0]) // step) * step)


def padded(rows: list[Row], width: int) -> Batch:
    shape = len(rows), max(1, width)
    inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, -1)
    for place, (read, right) in enumerate(rows):
        inputs[place, : len(read)], targets[place, : len(read)] = read, right
    return torch.from_numpy(inputs), torch.from_numpy(targets)


class PairBatch(NamedTuple):
    """n preferences: rows 0 to n - 1 are the chosen answers, rows n to 2n - 1 the rejected ones, in the same order."""

    inputs: Tensor  # (2n, T) int64
    targets: Tensor  # (2n, T), -1 where nothing is learned: in the prompt and the padding
    numbers: NDArray[np.int64]  # (n,) the pairs' numbers in their split


class Pairs(Shuffled):
    """The preferences of a split: pairs of a chosen and a rejected answer to the same prompt.

    A sequence of the run is a pair. Raises InputError for a pair longer than the context.
    """

    def __init__(self, stream: TokenStream, block_size: int, seed: int = 0, name: str = "") -> None:
        self.conversations = Conversations(stream, block_size)
        whole = self.conversations.whole.reshape(-1, 2)  # (pairs, 2)
        super().__init__(whole.sum(axis=1), seed)
        if (whole > block_size).any():
            count, most = int((whole > block_size).any(axis=1).sum()), int(whole.max())
            what = f"{count} of {self.size} pairs in {name} do not fit into block_size {block_size}"
            raise InputError(f"{what}: the longest has {most} tokens. Raise block_size, or leave these pairs out")

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


class BatchesAhead:
    """The micro-batches of any step, made by `load(step)`. A thread loads the next step's while this step is trained.

    With a CUDA device the thread also pins them. An error in `load` is raised when its step is taken.
    """

    def __init__(self, load: Callable[[int], list[Batch]], device: torch.device) -> None:
        self.load, self.device = load, device
        self.thread = ThreadPoolExecutor(1, "batches")
        self.waiting: dict[int, Future[list[Batch]]] = {}

    def take(self, step: int) -> list[Batch]:
        batch = (self.waiting.pop(step, None) or self.thread.submit(self.prepare, step)).result()
        self.waiting = {step + 1: self.thread.submit(self.prepare, step + 1)}
        return batch

    def prepare(self, step: int) -> list[Batch]:
        batch = self.load(step)
        if self.device.type != "cuda":
            return batch
        torch.cuda.set_device(self.device)  # a new thread uses device 0, and pinning would initialise it
        return [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in batch]


class ValidationWindows:
    """Adjacent windows that cover all targets of a text, or of its first `limit` tokens (0: all)."""

    def __init__(self, stream: TokenStream, block_size: int, limit: int) -> None:
        self.stream, self.block_size = stream, block_size
        tokens = min(stream.tokens, limit + 1) if limit else stream.tokens
        self.size = math.ceil((tokens - 1) / block_size) if tokens > 1 else 0

    def batch(self, first: int, count: int) -> Batch:
        """Windows `first` to first + count - 1; targets past the end of the text are -1."""
        inputs = torch.zeros(count * self.block_size, dtype=torch.int64)
        targets = torch.full((count * self.block_size,), -1)
        end = min(first + count, self.size)
        if first < end:
            tokens = torch.from_numpy(self.stream.read(first * self.block_size, end * self.block_size + 1))
            inputs[: len(tokens) - 1], targets[: len(tokens) - 1] = tokens[:-1], tokens[1:]
        return inputs.view(count, self.block_size), targets.view(count, self.block_size)


class ValidationConversations:
    """The conversations of a split, or the first ones with `limit` learned tokens (0: all), sorted longest first."""

    def __init__(self, stream: TokenStream, block_size: int, limit: int) -> None:
        self.conversations = Conversations(stream, block_size)
        lengths, learned = [], 0  # of those with a target that counts
        for number in range(self.conversations.size):
            _, targets = self.conversations.row(number)
            if len(targets):
                lengths.append((-len(targets), number))
                learned += int((targets >= 0).sum())
            if limit and learned >= limit:
                break
        self.order = [number for _, number in sorted(lengths)]
        self.size = len(self.order)

    def batch(self, first: int, count: int) -> Batch:
        """The rows `first` to first + count - 1; an empty row if there is none, since sharded models need a pass."""
        rows = [self.conversations.row(number) for number in self.order[first : first + count]]
        return padded(rows or [EMPTY], max((len(inputs) for inputs, _ in rows), default=0))


ValidationSequences = ValidationWindows | ValidationConversations  # of a split, all of it


def validation_sequences(
    data: Dataset | Mixture, block_size: int, limit: int
) -> list[tuple[str, float, ValidationSequences]]:
    """Name, share and validation sequences of each dataset whose validation split has any target."""
    found = []
    for part, share in zip(data.parts, data.shares, strict=True):
        kind = ValidationConversations if part.chat else ValidationWindows
        found.append((part.name, float(share), kind(part.val, block_size, limit)))
    return [(name, share, sequences) for name, share, sequences in found if sequences.size]
