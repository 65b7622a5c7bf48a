"""Tokenizers: nothing is lost, files can be trusted, and a long text has the tokens its pieces have."""

from __future__ import annotations

import base64
import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import regex  # tiktoken needs it too
from data_helpers import TORTURE, gpt2_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nib.common.exits import InputError
from nib.tokenizer import chunking as pieces
from nib.tokenizer.load import load_tokenizer, make_tokenizer
from nib.tokenizer.tokenizer import (
    SPLIT_PATTERN,
    TOKENIZER_FILE,
    WORD_CHARACTERS,
    BpeTokenizer,
    Tokenizer,
    _short_words,
    train_bpe,
    train_char,
)

KINDS = ["byte", "char", "bpe:400", "gpt2"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache(tmp_path_factory.mktemp("cache"))))
        gpt2 = make_tokenizer("gpt2")
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    source = Path(__file__).read_text(encoding="utf-8")
    return {"byte": make_tokenizer("byte"), "char": train_char([everything]), "gpt2": gpt2,
            "bpe:400": train_bpe([source, TORTURE], 400)}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_text_back(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for text in ("", TORTURE, TORTURE[::-1], "\r\n", " ", "\x00", "<|endoftext|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= id < tokenizer.vocab_size and id != tokenizer.end_of_text for id in ids)
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
        assert len(tokenizer.decode_bytes(ids)) == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.text(st.one_of(st.sampled_from("a1 '\n\r\t."), st.characters(exclude_categories=["Cs"]))))
    def comes_back(text: str) -> None:
        assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text

    comes_back()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same_and_needs_nothing_else(
    tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "nothing"))
    before = tokenizers[kind]
    assert before.save(tmp_path) == tmp_path / TOKENIZER_FILE
    for place in (tmp_path, tmp_path / TOKENIZER_FILE):
        after = load_tokenizer(place)
        assert (after.name, after.vocab_size, after.end_of_text) == (before.name, before.vocab_size, before.end_of_text)
        assert after.encode(TORTURE) == before.encode(TORTURE)
        assert after.token_bytes == before.token_bytes


def test_gpt2_has_the_ids_everyone_has(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    gpt2 = tokenizers["gpt2"]
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert (gpt2.vocab_size, gpt2.end_of_text, gpt2.decode([50256])) == (50257, 50256, "")


def test_special_and_unused_ids_stand_for_no_bytes() -> None:
    ranks = {bytes([value]): value for value in range(256)}
    tokenizer = BpeTokenizer("gaps", SPLIT_PATTERN, ranks, {"<|endoftext|>": 300, "<|pad|>": 280})
    assert tokenizer.vocab_size == 301
    assert tokenizer.decode([65, 280, 290, 300, 66]) == "AB"
    assert tokenizer.byte_lengths()[256:].sum() == 0
    for outside in (-1, 301):
        with pytest.raises(InputError, match="vocabulary"):
            tokenizer.decode([outside])


def test_half_a_character_is_decoded_as_a_replacement(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["byte"].decode("é".encode()[:1]) == "\ufffd"


def test_byte_and_char_ids(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["byte"].encode("é") == [0xC3, 0xA9]
    assert (tokenizers["byte"].vocab_size, tokenizers["byte"].end_of_text) == (257, 256)
    char = train_char(["hello ", "wörld"])
    assert char.characters == " dehlorwö" and char.end_of_text is None
    assert char.encode("he") == [3, 2]
    with pytest.raises(InputError, match=r"'🙂' \(U\+1F642\)"):
        char.encode("hello 🙂")


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_an_input_error(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    for text in ("a\ud83d", "a" * pieces.PIECE_BYTES + "\udc80"):
        with pytest.raises(InputError, match=r"U\+D[0-9A-F]{3}"):
            tokenizers[kind].encode(text)


def test_bpe_learns_the_words_and_keeps_the_size() -> None:
    words = " ".join(f"word{index} alpha beta" for index in range(500))
    tokenizer = train_bpe([words], 300)
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.name) == (300, 299, "bpe:300")
    assert len(tokenizer.encode(" alpha beta")) == 2
    assert train_bpe([words], 300).token_bytes == tokenizer.token_bytes
    small = train_bpe(["abc abc"], 5000)
    assert small.vocab_size == 256 + 3 + 1 and small.name == "bpe:260"  # ab, abc, " abc"


@pytest.mark.parametrize("unit", [" ", "GATTACA", "=-", "\n", "\u4e2d\u6587"])
def test_words_of_any_length_train_in_time_that_grows_with_the_text(unit: str) -> None:
    ordinary = " ".join("word" * (number % 249) for number in range(300)) + " \n" * 400
    assert list(_short_words([ordinary])) == [ordinary], "a word below the limit was cut"
    long = ordinary + unit * (300_000 // len(unit)) + ordinary
    pieces = list(_short_words([long]))
    assert "".join(pieces) == long and max(map(len, pieces[1:-1])) <= 2 * WORD_CHARACTERS
    began = time.monotonic()
    trained = train_bpe([long], 400)
    assert time.monotonic() - began < 10  # it was 50 s
    assert trained.decode(trained.encode(long)) == long


def test_training_does_not_depend_on_the_process() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from nib.tokenizer.tokenizer import train_bpe;"
        "text = open(sys.argv[2], encoding='utf-8').read(); print(hash(tuple(train_bpe([text], 500).encode(text))))"
    )
    root = str(Path(__file__).resolve().parents[2])
    said = {
        subprocess.check_output([sys.executable, "-c", program, root, __file__], env={"PYTHONHASHSEED": seed})
        for seed in ("0", "1")
    }
    assert len(said) == 1


@pytest.mark.parametrize("unit", [" ", "\n", "\t \n", "a", "A", "!", "中", "\u0301", "\r\n", "\u00a0", "ab "])
def test_a_million_of_one_character_neither_fails_nor_is_lost(tokenizers: dict[str, Tokenizer], unit: str) -> None:
    text = unit * (1_500_000 // len(unit)) + "x"
    for kind in ("gpt2", "bpe:400"):
        ids = tokenizers[kind].encode_array(text)
        assert tokenizers[kind].decode(ids.tolist()) == text


def test_tiktoken_does_fail_there(tokenizers: dict[str, Tokenizer]) -> None:
    """Guards the guard: when this stops to hold, texts need not be cut because of it."""
    with pytest.raises(BaseException, match="StackOverflow"):
        tokenizers["gpt2"].encoding.encode_ordinary(" " * 1_500_000 + "x")  # type: ignore[attr-defined]


def known_patterns(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The split patterns of tiktoken's encodings, whose ranks it would have to download, and ours."""
    import tiktoken_ext.openai_public as public

    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
    names = ("gpt2", "p50k_base", "cl100k_base", "o200k_base")
    return {name: getattr(public, name)()["pat_str"] for name in names} | {"ours": SPLIT_PATTERN}


def test_pieces_have_the_tokens_of_the_whole(tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = tokenizers["gpt2"]
    assert isinstance(gpt2, BpeTokenizer)
    draw = random.Random(1)
    between = [" ", "\n", "\r\n", "\n\n", "  ", " \n ", "\t", "\n    "]
    between += [" '", "'s ", "'S\n", ", ", ".\n", "! ", "7 ", " ²\n"]
    # No ASCII letter: the second way to cut.
    foreign = ["。", "、", "，", "\n", " ", "\u3000", "。🙂 हिन्दी", " é\u0301 "]
    for name, pattern in known_patterns(monkeypatch).items():
        tokenizer = BpeTokenizer(name, pattern, gpt2.ranks, {})
        for letters, units in (("abcXYZ019", between), ("中本に한д", foreign)):
            words = ["".join(draw.choices(letters, k=draw.randint(1, 5))) for _ in range(300)]
            text = "".join(word + draw.choice(units) for word in words for _ in range(3))
            for size in (128, 200, 333):  # half of it always holds a safe place
                parts = [piece.decode() for piece, _ in pieces.read_pieces(io.BytesIO(text.encode()), size)]
                assert "".join(parts) == text and len(parts) > 3
                matches = [match for part in parts for match in regex.findall(pattern, part)]
                assert matches == regex.findall(pattern, text), (name, size)
                tokens = [id for part in parts for id in tokenizer._encode_piece(part).tolist()]
                assert tokens == tokenizer._encode_piece(text).tolist(), (name, size)


@settings(max_examples=300, deadline=None, database=None)
@given(st.binary(max_size=400), st.integers(16, 64))
def test_pieces_lose_no_byte(data: bytes, size: int) -> None:
    found = list(pieces.read_pieces(io.BytesIO(data), size))
    assert b"".join(piece for piece, _ in found) == data
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    assert all(0 < len(piece) <= size for piece, _ in found[:-1])


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=400), st.integers(16, 64))
def test_pieces_end_between_characters(text: str, size: int) -> None:
    assert "".join(piece.decode() for piece, _ in pieces.read_pieces(io.BytesIO(text.encode()), size)) == text


def valid_file() -> dict[str, object]:
    tokens = [base64.b64encode(bytes([value])).decode() for value in range(256)] + [None]
    return {
        "format": "nib-tokenizer-1", "kind": "bpe", "name": "t", "end_of_text": 256, "pattern": SPLIT_PATTERN,
        "tokens": tokens, "special_tokens": {"<|endoftext|>": 256},
    }  # fmt: skip


def tokens_with(index: int, token: object) -> list[object]:
    tokens = list(valid_file()["tokens"])  # type: ignore[call-overload]
    tokens[index] = token
    return tokens


CHAR = {"kind": "char", "end_of_text": None}
BROKEN: dict[str, object] = {
    "empty": b"",
    "cut short": json.dumps(valid_file()).encode()[:-30],
    "not text": b"\x80\x04\x95pickle\x00\xff",
    "deep": b"[" * 200_000,
    "huge number": b"1" * 10_000,
    "a list": [],
    "null": None,
    "other format": {"format": "nib-tokenizer-2"},
    "no kind": {"kind": None},
    "unknown kind": {"kind": "pickle"},
    "unhashable kind": {"kind": ["bpe"]},
    "no name": {"name": None},
    "two-line name": {"name": "a\nb"},
    "wrong end of text": {"end_of_text": 3},
    "end of text is a list": {"end_of_text": [256]},
    "no pattern": {"pattern": None},
    "pattern does not compile": {"pattern": "(["},
    "pattern is too large": {"pattern": "(((a{1000}){1000}){1000}){1000}"},
    "pattern loses text": {"pattern": "[a-z]+"},
    "tokens is a text": {"tokens": "abc"},
    "tokens are few": {"tokens": ["YQ=="]},
    "a token is a number": {"tokens": tokens_with(7, 7)},
    "a token is not base64": {"tokens": tokens_with(7, "*!")},
    "a token is not ASCII": {"tokens": tokens_with(7, "é")},
    "a token is empty": {"tokens": tokens_with(7, "")},
    "a token is there twice": {"tokens": tokens_with(7, "YQ==")},
    "a byte is missing": {"tokens": tokens_with(7, None)},
    "the last id means nothing": {"special_tokens": {}, "end_of_text": None},
    "special tokens are a list": {"special_tokens": [256]},
    "a special id is outside": {"special_tokens": {"<|endoftext|>": 257}},
    "a special id is negative": {"special_tokens": {"<|endoftext|>": -1}},
    "a special id is true": {"special_tokens": {"<|endoftext|>": 256, "x": True}},
    "a special id is a token's": {"special_tokens": {"<|endoftext|>": 256, "x": 65}},
    "two specials share an id": {"special_tokens": {"<|endoftext|>": 256, "x": 256}},
    "characters are a list": {**CHAR, "characters": ["a"]},
    "characters are none": {**CHAR, "characters": ""},
    "characters are twice there": {**CHAR, "characters": "aab"},
    "characters are not sorted": {**CHAR, "characters": "ba"},
    "half a character": {**CHAR, "characters": "a\ud800"},
    "char with end of text": {**CHAR, "characters": "ab", "end_of_text": 1},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_one_line(what: str, tmp_path: Path) -> None:
    broken = BROKEN[what]
    path = tmp_path / TOKENIZER_FILE
    if isinstance(broken, dict):
        broken = valid_file() | broken
    path.write_bytes(broken if isinstance(broken, bytes) else json.dumps(broken).encode())
    with pytest.raises(InputError) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value)) < 500


def test_the_unbroken_file_is_fine(tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(valid_file()))
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode(TORTURE)) == TORTURE
    for missing in valid_file():
        content = valid_file()
        del content[missing]
        (tmp_path / TOKENIZER_FILE).write_text(json.dumps(content))
        with pytest.raises(InputError, match=missing):
            load_tokenizer(tmp_path)


def test_a_file_that_is_not_there_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_tokenizer(tmp_path / "none")
    with open(tmp_path / TOKENIZER_FILE, "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="over 64 MB"):
        load_tokenizer(tmp_path)


def test_arrays_and_lists_agree(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        array = tokenizer.encode_array(TORTURE)
        assert array.dtype == np.uint32 and array.tolist() == tokenizer.encode(TORTURE)
