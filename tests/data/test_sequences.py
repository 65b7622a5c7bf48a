"""Conversations as rows, several datasets in their shares, and what is noticed when their files are damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_data import conversation, sums, write_chats
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset import TRAIN, VAL, write_dataset

from nib.common.exits import InputError
from nib.data.dataset import Dataset
from nib.data.mixture import Mixture, read_names
from nib.data.order import deal
from nib.data.sequences import (
    Conversations,
    ValidationConversations,
    describe,
    micro_batches,
    training_sequences,
    validation_sequences,
)
from nib.tokenizer.tokenizer import ByteTokenizer, CharTokenizer

torch.set_num_threads(1)
quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)
CHATS = [*sums(50), ([1, 2, 3], [1, 0, 0]), ([9], [1]), ([65] * 60 + [66], [0] * 60 + [1])]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("data") / "chats"
    write_chats(directory, CHATS, sums(20, first=50), shard_tokens=7)  # a conversation goes through several shards
    return Dataset(directory)


# ---- conversations -------------------------------------------------------------------------------------------------


def wanted(number: int, block_size: int) -> tuple[list[int], list[int]]:
    """Inputs and targets of a conversation, up to the last target that counts."""
    ids, learned = (side[: block_size + 1] for side in CHATS[number])
    targets = [right if counts else -1 for right, counts in zip(ids[1:], learned[1:], strict=True)]
    while targets and targets[-1] == -1:
        targets.pop()
    return ids[: len(targets)], targets


@quick
@given(st.integers(1, 70), st.integers(0, 2**31 - 1), st.integers(0, 3))
def test_an_epoch_has_every_conversation_once(chats: Dataset, block_size: int, seed: int, epoch: int) -> None:
    conversations = Conversations(chats.train, block_size, seed)
    numbers = np.arange(len(CHATS)) + epoch * len(CHATS)
    order = conversations.index(numbers).tolist()
    assert sorted(order) == list(range(len(CHATS)))
    found = [(inputs.tolist(), targets.tolist()) for inputs, targets in conversations.rows(numbers)]
    assert found == [wanted(number, block_size) for number in order]
    assert conversations.tokens(numbers) == sum(min(len(ids) - 1, block_size) for ids, _ in CHATS)
    assert (conversations.whole > block_size).sum() == sum(len(ids) > block_size + 1 for ids, _ in CHATS)


def test_the_order_of_conversations_is_the_same_on_every_machine_and_in_every_version(chats: Dataset) -> None:
    """Runs are resumed with it: a change here silently makes another run of them."""
    conversations = Conversations(chats.train, 32, 1337)
    assert conversations.index(np.array([0, 1, 2, 52, 53, 10**9])).tolist() == [20, 11, 22, 17, 21, 4]
    of, before = deal(np.array([0, 1, 2, 3, 4, 10**9]), [Fraction(7, 10), Fraction(1, 5), Fraction(1, 10)])
    assert list(zip(of.tolist(), before.tolist(), strict=True)) == [
        (2, 0),
        (0, 0),
        (0, 1),
        (1, 0),
        (0, 2),
        (2, 100000000),
    ]


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 40), st.integers(1, 70), st.booleans())
def test_micro_batches_have_each_row_once(
    chats: Dataset, world: int, micro: int, parts: int, step: int, block_size: int, compiled: bool
) -> None:
    conversations, local = Conversations(chats.train, block_size, 1), micro * parts
    numbers = np.arange(step * world * local, (step + 1) * world * local)
    expected = sorted(wanted(number, block_size) for number in conversations.index(numbers).tolist())
    found, widths = [], set()
    for own in np.array_split(numbers, world):
        batches = micro_batches(conversations.rows(own), micro, block_size, 8 if compiled else 0)
        assert len(batches) == parts, "every process has as many"
        for inputs, targets in batches:
            assert inputs.shape == targets.shape and 1 <= inputs.shape[1] <= block_size and len(inputs) == micro
            widths.add(inputs.shape[1])
            for row, right in zip(inputs.tolist(), targets.tolist(), strict=True):
                length = max((place + 1 for place, each in enumerate(right) if each >= 0), default=0)
                assert not any(row[length:]), "padding"
                found.append((row[:length], right[:length]))
    assert sorted(found) == expected
    assert not compiled or widths <= {min(block_size, -(-block_size // 8) * number) for number in range(1, 9)}


def test_like_lengths_make_padding_cheap(chats: Dataset) -> None:
    conversations = Conversations(chats.train, 64, 1)
    rows = conversations.rows(np.arange(48))
    tokens = sum(len(inputs) for inputs, _ in rows)
    padding = sum(inputs.numel() for inputs, _ in micro_batches(rows, 4, 64)) - tokens
    as_they_come = sum(4 * max(len(inputs) for inputs, _ in rows[at : at + 4]) for at in range(0, 48, 4)) - tokens
    assert padding < 0.45 * as_they_come


@quick
@given(st.integers(1, 70), st.integers(1, 7), st.integers(1, 3), st.integers(0, 200))
def test_validation_has_every_learned_token_once(
    chats: Dataset, block_size: int, batch: int, world: int, limit: int
) -> None:
    sequences = ValidationConversations(chats.val, block_size, limit)
    found: list[int] = []
    for first in range(0, sequences.size, batch * world):
        for rank in range(world):
            inputs, targets = sequences.batch(first + rank * batch, batch)
            assert inputs.shape == targets.shape and inputs.numel(), "sharded models need a row on every process"
            found += targets[targets >= 0].tolist()
    texts = [(ids[: block_size + 1], learned[: block_size + 1]) for ids, learned in sums(20, first=50)]
    rows = [[right for right, counts in list(zip(*text, strict=True))[1:] if counts] for text in texts]
    used = next((n for n in range(len(rows) + 1) if limit and sum(map(len, rows[:n])) >= limit), len(rows))
    assert sorted(found) == sorted(token for row in rows[:used] for token in row)


def test_a_split_with_nothing_to_learn_is_not_validated(tmp_path: Path) -> None:
    write_chats(tmp_path, sums(3), [([1, 2, 3], [0, 0, 0])])
    assert validation_sequences(Dataset(tmp_path), 8, 0) == []


def test_conversations_that_are_cut_are_counted_and_said(chats: Dataset) -> None:
    said = list(describe(chats, 32))
    assert re.fullmatch(r"data: .*chats, [\d.]+k? training and .* \(byte, 257 ids\)", said[0])
    assert said[1:] == [
        f"warning: 1 of 53 training conversations of {chats.directory} are cut: they do not fit into block_size 32"
    ]
    assert len(list(describe(chats, 64))) == 1


def flip(name: str, at: int, value: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[at] = value
        (directory / name).write_bytes(content)

    return change


def kind(name: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        meta = json.loads((directory / "meta.json").read_text())
        (directory / "meta.json").write_text(json.dumps(meta | {"kind": name}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip("train-00001.mask", 3, 0), r"train-00001\.mask does not have the content that meta\.json records"),
        (flip("train-00000.rows", 0, 77), r"train-00000\.rows does not have the content"),
        (lambda data: (data / "val-00000.rows").unlink(), r"cannot read .*val-00000\.rows: No such file"),
        (lambda data: (data / "train-00000.mask").write_bytes(b"\1"), r"mask has 1 byte instead of 100"),
        (kind("ranking"), r"meta\.json is not what prepare_data\.py writes"),
        (kind(["chat"]), r"meta\.json is not what prepare_data\.py writes"),
    ],
)
def test_damage_to_chats_is_noticed_on_opening(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write_chats(tmp_path, CHATS, sums(20), shard_tokens=100)
    Dataset(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        Dataset(tmp_path)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([([1, 2], [0, 2])], r"train-00000\.mask holds a 2, beyond the numbers of 2"),
        ([([1, 2], [0, 1]), ([], [])], r"the rows of train do not fit its 2 tokens"),
    ],
)
def test_chats_that_cannot_be_are_refused(
    train: list[tuple[list[int], list[int]]], message: str, tmp_path: Path
) -> None:
    write_chats(tmp_path, train, sums(2))
    with pytest.raises(InputError, match=message):
        Dataset(tmp_path)


# ---- mixtures ------------------------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.fractions(Fraction(1, 1000), 1), min_size=1, max_size=5)


@quick
@given(WEIGHTS, st.integers(1, 500))
def test_shares_are_right_at_any_time(weights: list[Fraction], count: int) -> None:
    of, before = deal(np.arange(count), weights)
    for k, weight in enumerate(weights):
        assert before[of == k].tolist() == list(range((of == k).sum())), "each takes its own in order"
        share = weight / sum(weights)
        assert abs((of == k).sum() - share * count) < len(weights), "so 0.1 % of a run of 1000 n sequences"


@quick
@given(WEIGHTS, st.lists(st.integers(0, 2000), min_size=1, max_size=20))
def test_the_deal_needs_no_history(weights: list[Fraction], numbers: list[int]) -> None:
    of, before = deal(np.arange(2001), weights)
    found, index = deal(np.array(numbers), weights)
    assert found.tolist() == of[numbers].tolist() and index.tolist() == before[numbers].tolist()


def test_a_mixture_has_the_sequences_of_its_parts(chats: Dataset, tmp_path: Path) -> None:
    write_dataset(tmp_path / "text", TRAIN, VAL)
    parts = [chats, Dataset(tmp_path / "text")]
    shares = [Fraction(1, 4), Fraction(3, 4)]
    mixed = training_sequences(Mixture(dict(zip("ab", parts, strict=True)), shares), 16, 5)
    alone = [training_sequences(part, 16, 5) for part in parts]
    assert mixed.size == alone[0].size + alone[1].size
    numbers = np.array([400, 7, 8, 9, 10, 11])
    of, before = deal(numbers, shares)
    for row, k, number in zip(mixed.rows(numbers), of.tolist(), before.tolist(), strict=True):
        (expected,) = alone[k].rows(np.array([number]))
        assert all(np.array_equal(mine, its) for mine, its in zip(row, expected, strict=True))
    assert mixed.tokens(np.arange(4)) == 3 * 16 + alone[0].tokens(np.array([0]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0,b:0", r"the weight of a is 0"),
        ("a:0.5,b:1e-999999999", r"the weight of b is 0"),
        ("a,b:0.3", r"'a' is not a name with a weight"),
        ("a:0.7,", r"'' is not a name with a weight"),
        (":1", r"':1' is not a name with a weight"),
        ("a:-1,b:2", r"'a:-1' is not a name with a weight"),
        ("a:nan,b:1", r"'a:nan' is not a name with a weight"),
        ("a:1e999999999,b:1", r"'a:1e999999999' is not a name with a weight"),
        ("a:x,b:1", r"'a:x' is not a name with a weight"),
        ("a:1,a:2", r"names a twice"),
    ],
)
def test_weights_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as found:
        read_names(text)
    assert "\n" not in str(found.value)


def test_names_and_their_shares_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_names("words") == {"words": 1}
    assert read_names("a:7, b:3") == read_names("a:0.7,b:0.3") == {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    write_dataset(Path("data/a:1,b"), TRAIN, VAL)
    assert read_names("a:1,b") == {"a:1,b": 1}, "a dataset of that name"


def test_another_tokenizer_is_refused(chats: Dataset, tmp_path: Path) -> None:
    write_dataset(tmp_path / "text", TRAIN % 3, VAL % 3)
    CharTokenizer("abc").save(tmp_path / "text")
    meta = json.loads((tmp_path / "text/meta.json").read_text())
    (tmp_path / "text/meta.json").write_text(json.dumps(meta | {"vocab_size": 3}))
    message = (
        rf"text has another tokenizer than {chats.directory}\. Prepare .*text again with --tokenizer={chats.directory}"
    )
    with pytest.raises(InputError, match=message):
        Mixture({"a": chats, "b": Dataset(tmp_path / "text")}, [Fraction(1, 2)] * 2)
    # The same ids under other names, and conversations that are written in another way.
    for name, template in (("<|other|>", ""), ("", "{{ messages }}")):
        write_chats(tmp_path / "other", [conversation("a", "b")], [])
        tokenizer = ByteTokenizer()
        tokenizer.chat_template = template
        tokenizer.special_tokens = {name: 256} if name else tokenizer.special_tokens
        (opened := Dataset(tmp_path / "other")).tokenizer = tokenizer
        message = "other has another tokenizer" if name else "other has another chat template"
        with pytest.raises(InputError, match=message):
            Mixture({"a": chats, "b": opened}, [Fraction(1, 2)] * 2)
