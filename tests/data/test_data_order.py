"""The order of training windows, for any split, processes and micro-batches, and the windows of validation."""

from __future__ import annotations

import queue
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nib.common.exits import InputError
from nib.data.dataset import TokenStream
from nib.data.order import permute
from nib.data.sequences import Batch, BatchesAhead, ValidationWindows, Windows, micro_batches

torch.set_num_threads(1)
quick = settings(max_examples=100, deadline=None, database=None, derandomize=True)
BLOCKS = st.integers(1, 12)
SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(2, 150)


def stream_of(tokens: int, shard: int) -> TokenStream:
    """Tokens 0, 1, 2 ... in shards of `shard`, so that a token says where it is."""
    whole = np.arange(tokens, dtype=np.uint16)
    return TokenStream([whole[begin : begin + shard] for begin in range(0, tokens, shard)], shard)


def windows_of(tokens: int, block: int, seed: int) -> Windows:
    return Windows(stream_of(tokens, max(1, tokens)), block, seed)


def batch_of(windows: Windows, first: int, count: int) -> Batch:
    (batch,) = micro_batches(windows.rows(np.arange(first, first + count)), count, windows.block_size)
    return batch


# ---- the order of training -----------------------------------------------------------------------------------------


@quick
@given(st.one_of(st.integers(1, 600), st.sampled_from([2, 3, 4, 5, 15, 16, 17, 64, 65, 255, 256, 257])), st.integers(0))
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    image = permute(np.arange(size), size, key)
    assert sorted(image.tolist()) == list(range(size))


@given(st.integers(0, 60), st.integers(-2, 2), st.integers(0, 2**64))
@quick
def test_permutation_of_huge_ranges_stays_inside_and_apart(bits: int, beside: int, key: int) -> None:
    size = max(1, 2**bits + beside)
    index = np.unique(np.array([0, 1, 2, size // 3, size // 2, size - 2, size - 1, *range(100)]).clip(0, size - 1))
    image = permute(index, size, key)
    assert image.min() >= 0 and image.max() < size and len(set(image.tolist())) == len(index)


def test_permutation_mixes() -> None:
    """A key moves nearly everything, neighbours do not stay neighbours, and two keys have nothing in common."""
    size = 5000
    first, second = permute(np.arange(size), size, 1), permute(np.arange(size), size, 2)
    assert (first == np.arange(size)).sum() < 10 and (first == second).sum() < 10
    assert (np.abs(np.diff(first)) == 1).sum() < 10
    # A shuffle's rank correlation with the identity has deviation 1/sqrt(size) = 0.014.
    assert abs(np.corrcoef(np.arange(size), first)[0, 1]) < 0.06
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


@quick
@given(SIZES, BLOCKS, SEEDS, st.integers(0, 5))
def test_every_window_once_an_epoch(tokens: int, block: int, seed: int, epoch: int) -> None:
    tokens = max(tokens, block + 1)
    windows = windows_of(tokens, block, seed)
    begins = windows.begin(np.arange(windows.size) + epoch * windows.size)
    offset = int(begins.min())
    assert sorted(begins.tolist()) == [offset + block * window for window in range(windows.size)]
    assert offset >= 0 and begins.max() + block + 1 <= tokens, "inputs and targets lie in the split"
    assert windows.size >= max(1, tokens // block - 2), "nearly all of the split is used"


@settings(quick, max_examples=30)
@given(BLOCKS, st.integers(0, 40), SEEDS)
def test_every_token_has_its_turn(block: int, more: int, seed: int) -> None:
    """Over the epochs no target is left out: the offset moves windows over the first and the last token too."""
    tokens = block + 1 + more
    windows = windows_of(tokens, block, seed)
    begins = windows.begin(np.arange(windows.size * 40 * block))
    assert begins.min() == 0 and begins.max() + block + 1 == tokens


@quick
@given(SEEDS)
def test_offsets_and_orders_are_fresh(seed: int) -> None:
    windows = windows_of(5000, 50, seed)
    epochs = windows.begin(np.arange(windows.size * 20)).reshape(20, windows.size)
    offsets = epochs.min(1)
    assert len(set(offsets.tolist())) >= 8, "20 draws of 50, of which some 17 differ"
    orders = {tuple((epoch - offset).tolist()) for epoch, offset in zip(epochs, offsets, strict=True)}
    assert len(orders) == 20
    assert not np.array_equal(windows_of(5000, 50, seed + 1).begin(np.arange(99)), epochs.flatten()[:99])


@quick
@given(SIZES, BLOCKS, SEEDS, st.integers(1, 40), st.data())
def test_same_global_batch_for_any_processes_and_micro_batches(
    tokens: int, block: int, seed: int, step: int, data: st.DataObject
) -> None:
    """Process r of w takes sequences r * local to (r + 1) * local of the batch, as train.py does."""
    tokens = max(tokens, block + 1)
    world = data.draw(st.integers(1, 5))
    local = data.draw(st.integers(1, 6))
    micro = data.draw(st.sampled_from([size for size in range(1, local + 1) if local % size == 0]))
    windows, batch = Windows(stream_of(tokens, 37), block, seed), world * local
    whole = batch_of(windows, step * batch, batch)
    firsts = [step * batch + rank * local for rank in range(world)]
    rows = [windows.rows(np.arange(first, first + local)) for first in firsts]
    pieces = [piece for part in rows for piece in micro_batches(part, micro, block)]
    assert all(torch.equal(torch.cat([piece[side] for piece in pieces]), whole[side]) for side in (0, 1))
    # Processes share a window only where the batch is larger than what is left of an epoch.
    places = windows.begin(np.arange(step * batch, (step + 1) * batch)).reshape(world, local)
    if step * batch // windows.size == ((step + 1) * batch - 1) // windows.size:
        assert len(set(places.flatten().tolist())) == batch


@quick
@given(SIZES, BLOCKS, SEEDS, st.integers(1, 60), st.integers(0, 300), st.integers(1, 40))
def test_batches_are_the_windows_of_the_concatenated_shards(
    tokens: int, block: int, seed: int, shard: int, first: int, count: int
) -> None:
    """Also where a batch crosses the end of an epoch, and a window the end of a shard or of several."""
    tokens = max(tokens, block + 1)
    windows, whole = windows_of(tokens, block, seed), np.arange(tokens)
    inputs, targets = batch_of(Windows(stream_of(tokens, shard), block, seed), first, count)
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (count, block)
    begins = [int(windows.begin(np.array([sequence]))[0]) for sequence in range(first, first + count)]
    for row, begin in enumerate(begins):
        assert inputs[row].tolist() == whole[begin : begin + block].tolist()
        assert targets[row].tolist() == whole[begin + 1 : begin + block + 1].tolist()


@quick
@given(st.integers(1, 100), st.integers(1, 30), st.data())
def test_reading_shards_is_reading_one_array(tokens: int, shard: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, tokens - 1))
    end = data.draw(st.integers(begin + 1, tokens + 10))
    found = stream_of(tokens, shard).read(begin, end)
    assert found.dtype == np.int64 and found.tolist() == list(range(begin, min(end, tokens)))


def test_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    """Runs are resumed with it: a change here silently makes another run of them."""
    windows = windows_of(10_007, 16, 1337)
    found = windows.begin(np.array([0, 1, 2, 623, 624, 10**9]))
    assert found.tolist() == [3005, 8877, 4653, 7357, 8020, 2113]


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_a_split_shorter_than_a_window_is_refused(tokens: int) -> None:
    with pytest.raises(InputError, match=f"the training split has {tokens} tokens?, fewer than one window of .* = 9"):
        windows_of(tokens, 8, 0)
    assert windows_of(9, 8, 0).size == 1


# ---- validation ----------------------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 150), BLOCKS, st.integers(0, 160), st.integers(1, 7), st.integers(1, 3), st.integers(1, 40))
def test_validation_covers_every_target_once(
    tokens: int, block: int, limit: int, batch: int, world: int, shard: int
) -> None:
    windows = ValidationWindows(stream_of(tokens, shard), block, limit)
    seen: list[int] = []
    for rank in range(world):  # batches are dealt out as nib.training.validation does
        for first in range(rank * batch, windows.size, world * batch):
            inputs, targets = windows.batch(first, batch)
            assert inputs.shape == targets.shape == (batch, block)
            for row in range(batch):
                for position, target in enumerate(targets[row].tolist()):
                    if target == -1:
                        continue
                    seen.append(target)
                    # Its window begins at a multiple of block_size, and it has all of it for context.
                    begin = (first + row) * block
                    assert target == begin + position + 1
                    assert inputs[row, : position + 1].tolist() == list(range(begin, begin + position + 1))
    wanted = max(0, tokens - 1)
    if limit and limit < wanted:
        wanted = min(wanted, -(-limit // block) * block)  # whole windows
    assert Counter(seen) == Counter(range(1, wanted + 1))


def test_the_next_batch_is_loaded_while_one_is_trained_on() -> None:
    loaded: queue.Queue[int] = queue.Queue()

    def load(step: int) -> list[Batch]:
        loaded.put(step)
        if step == 5:
            raise OSError("the disk is gone")
        return [(torch.tensor(step), torch.tensor(-step))]

    batches = BatchesAhead(load, torch.device("cpu"))
    assert batches.take(3) == [(3, -3)]
    assert [loaded.get(timeout=10) for _ in range(2)] == [3, 4], "the second was not asked for"
    assert batches.take(8) == [(8, -8)], "any step will do"
    assert batches.take(4) == [(4, -4)]
    with pytest.raises(OSError, match="gone"):
        batches.take(5)
