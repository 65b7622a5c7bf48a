"""A tokenizer of Hugging Face's gives back the text that it was given, or says what it loses: nothing in between."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Call
from data_helpers import TORTURE, Data
from hypothesis import given, settings
from hypothesis import strategies as st
from test_huggingface_tokenizer import CODE, TEXTS, trained
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

import prepare_data
from nib.common.exits import InputError
from nib.generation.request import SamplingSettings, make_samples
from nib.tokenizer.byte_level import HuggingFaceTokenizer
from nib.tokenizer.chunking import PIECE_BYTES, read_pieces
from nib.tokenizer.huggingface import begin_of_text
from nib.tokenizer.load import load_tokenizer

LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def content(change: Callable[[Any], object], kind: str = "smollm") -> dict[str, Any]:
    """A tokenizer.json of all bytes, after `change` to it."""
    made = trained(kind)
    change(made)
    return dict(json.loads(made.to_str()))


def splits(*parts: Any) -> Callable[[Any], object]:
    return lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.Sequence([*parts, LEVEL]))


def normalizes(normalizer: Any) -> Callable[[Any], object]:
    return lambda made: setattr(made, "normalizer", normalizer)


def model(**changes: Any) -> dict[str, Any]:
    plain = content(lambda made: None)
    return plain | {"model": plain["model"] | changes}


def lacking(**changes: Any) -> dict[str, Any]:
    """Trained without the alphabet of all bytes: it has tokens for those of its corpus only."""
    made = Tokenizer(models.BPE(**changes))
    made.pre_tokenizer = LEVEL
    names = ["<|endoftext|>", *changes.values()][: 1 + ("unk_token" in changes)]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=names, show_progress=False)
    made.train_from_iterator(["a small dog met a small cat. they sat."] * 5, trainer)
    return dict(json.loads(made.to_str())) | {"decoder": {"type": "ByteLevel", "add_prefix_space": True,
                                                          "trim_offsets": True, "use_regex": True}}  # fmt: skip


def missing_unknown() -> dict[str, Any]:
    made = lacking()
    return made | {"model": made["model"] | {"unk_token": "none"}}


def prefixed(made: Any) -> None:
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


REFUSED: dict[str, Callable[[], dict[str, Any]]] = {
    "white space dropped": lambda: content(splits(pre_tokenizers.WhitespaceSplit())),
    "words and signs only": lambda: content(splits(pre_tokenizers.Whitespace())),
    "as BERT splits": lambda: content(splits(pre_tokenizers.BertPreTokenizer())),
    "spaces removed": lambda: content(splits(pre_tokenizers.Split(" ", "removed"))),
    "signs removed": lambda: content(splits(pre_tokenizers.Punctuation("removed"))),
    "a letter as the border": lambda: content(splits(pre_tokenizers.CharDelimiterSplit("e"))),
    "spaces as another sign": lambda: content(splits(pre_tokenizers.Metaspace())),
    "not split into bytes": lambda: content(lambda made: None) | {"pre_tokenizer": None},
    "lower case": lambda: content(normalizes(normalizers.Lowercase())),
    "other forms of characters": lambda: content(normalizes(normalizers.NFKC())),
    "decomposed": lambda: content(normalizes(normalizers.NFD())),
    "accents": lambda: content(normalizes(normalizers.StripAccents())),
    "one of two normalisers": lambda: content(
        normalizes(normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]))
    ),
    "the ends stripped": lambda: content(normalizes(normalizers.Strip())),
    "a sign put in front": lambda: content(normalizes(normalizers.Prepend("_"))),
    "random merges": lambda: model(dropout=0.5),
    "an end of words": lambda: model(end_of_word_suffix="</w>"),
    "a sign of continuation": lambda: model(continuing_subword_prefix="##"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_tokenizer_that_loses_ordinary_text_is_refused_when_it_is_loaded(what: str) -> None:
    with pytest.raises(InputError, match=r"loses text: .* becomes|, which nib does not support") as found:
        HuggingFaceTokenizer("x", REFUSED[what](), {}, None)
    assert "\n" not in str(found.value)


ACCEPTED: dict[str, Callable[[], dict[str, Any]]] = {
    "all bytes": lambda: content(lambda made: None),
    "composed": lambda: content(lambda made: None, "qwen"),
    "composed twice": lambda: content(normalizes(normalizers.Sequence([normalizers.NFC(), normalizers.NFC()]))),
    "a space put in front": lambda: content(prefixed),
    "signs apart": lambda: content(splits(pre_tokenizers.Punctuation())),
    "an unknown token that is a letter": lambda: model(unk_token="e"),
}
# These have no ids for some texts: they are told which.
PARTIAL: dict[str, Callable[[], dict[str, Any]]] = {
    "some bytes": lacking,
    "some bytes, an unknown token": lambda: lacking(unk_token="<unk>"),
    "some bytes, unknown ones as one": lambda: lacking(unk_token="<unk>", fuse_unk=True),
    "some bytes, an unknown token that is missing": missing_unknown,
    "a rare word replaced": lambda: content(normalizes(normalizers.Replace("qq", "q"))),
    "by scripts, which loses spaces in front": lambda: content(splits(pre_tokenizers.UnicodeScripts())),
    "a token that takes the spaces around it": lambda: content(
        lambda made: made.add_tokens([AddedToken("ab", lstrip=True, rstrip=True)])
    ),
}


@pytest.mark.parametrize("what", [*ACCEPTED, *PARTIAL])
def test_what_is_encoded_is_the_text_and_every_byte_is_counted(what: str) -> None:
    tokenizer = HuggingFaceTokenizer("x", (ACCEPTED | PARTIAL)[what](), {}, None)
    lengths, lost = tokenizer.byte_lengths(), []

    def exact(text: str) -> None:
        try:
            ids = tokenizer.encode_array(text)
        except InputError:
            lost.append(text)
            assert what in PARTIAL, text
            return
        assert tokenizer.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.text(st.one_of(st.sampled_from("ab qé\u0301'\n 1"), st.characters(exclude_categories=["Cs"]))))
    def any_text(text: str) -> None:
        exact(text)

    any_text()
    for text in [*TEXTS, "a small cat met a dog", "xqqx", "see", "  ab  ab", " a"]:
        exact(text)
    assert bool(lost) == (what in PARTIAL)


def test_a_token_of_letters_that_write_no_byte_is_its_own_text() -> None:
    made, odd = content(lambda made: None), ("\u2581the", "two words", "\u65e5\u672c", "e\u0301")
    vocab = made["model"]["vocab"]
    size = 1 + max(*vocab.values(), *(token["id"] for token in made["added_tokens"]))
    made["model"]["vocab"] = vocab | {token: size + place for place, token in enumerate(odd)}
    ours, theirs = HuggingFaceTokenizer("x", made, {}, None), Tokenizer.from_str(json.dumps(made))
    for id, token in enumerate(odd, start=size):
        assert ours.decode([id]) == theirs.decode([id]) == token
    for text in [*TEXTS, *odd, "".join(odd)]:
        assert ours.decode(ours.encode(text)) == text and max(ours.encode(text), default=0) < size


@pytest.mark.parametrize("what", [*ACCEPTED, "llama"])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(what: str) -> None:
    made = content(lambda made: None, "llama") if what == "llama" else ACCEPTED[what]()
    tokenizer = HuggingFaceTokenizer("x", made, {}, None)
    whole = Tokenizer.from_str(json.dumps(made))
    whole.encode_special_tokens = True
    text = " " + "".join(f"{CODE}{number} of {TORTURE}" for number in range(8))
    text = whole.normalizer.normalize_str(text) if whole.normalizer else text  # so that the library changes nothing
    expected = whole.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == expected
    for size in (250, 299, 1000):
        pieces = [piece.decode() for piece, _ in read_pieces(io.BytesIO(text.encode()), size)]
        assert len(pieces) > 3
        assert [id for piece in pieces for id in tokenizer.encode(piece)] == expected


def save(directory: Path, made: dict[str, Any]) -> Path:
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(made))
    return directory


def test_prepared_data_are_the_text_also_where_a_space_is_put_in_front(call: Call, tmp_path: Path) -> None:
    save(tmp_path / "tok", ACCEPTED["a space put in front"]())
    text = "word cafe\u0301 " * (PIECE_BYTES // 12)
    (tmp_path / "a.txt").write_text(text)
    options = ["--tokenizer=tok", "--val-fraction=0", "--workers=1", "--out=data"]
    done = call(prepare_data.main, "a.txt", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = Data(tmp_path / "data")
    assert data.text("train") == text and data.meta["bytes"]["train"] == len(text.encode())


def test_the_first_text_that_is_lost_is_named_and_nothing_is_made(call: Call, tmp_path: Path) -> None:
    save(tmp_path / "tok", lacking())
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a small cat.")
    (tmp_path / "texts/b.txt").write_text("a small dog met caf\u00e9s")
    options = ["--tokenizer=tok", "--val-fraction=0", "--workers=1", "--out=data"]
    done = call(prepare_data.main, "texts", *options, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: texts/b.txt: tokenizer tok loses text: 'f\u00e9s' becomes 's'. Use another")
    assert not (tmp_path / "data").exists()


def test_a_prompt_is_that_of_transformers_or_what_is_lost_is_told(tmp_path: Path) -> None:
    import transformers

    made = content(prefixed)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(made)))
    ours = load_tokenizer(save(tmp_path / "prefixed", made))
    for text in [*TEXTS, "ab<|im_end|>cd", " a"]:
        assert ours.encode_prompt(text) == theirs(text).input_ids, text
    assert begin_of_text(ours)[0] == ours.end_of_text
    partial = load_tokenizer(save(tmp_path / "partial", lacking()))
    assert partial.encode_prompt("<|endoftext|>a cat")[0] == partial.end_of_text, "a token, whose letters it lacks"
    with pytest.raises(InputError, match="loses text: 'X' becomes ''"):
        make_samples(["a", "a cat X"], partial, SamplingSettings())


def test_a_token_that_begins_a_text_is_put_there_where_transformers_does(tmp_path: Path) -> None:
    import transformers
    from test_huggingface_tokenizer import gpt2_files

    gpt2_files(tmp_path)
    for begins in (True, False):
        config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": begins, "bos_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
        assert ours.encode_prompt("ab") == theirs("ab").input_ids
        assert begin_of_text(ours) == (50256, begins)
    # transformers goes by tokenizer.json where there is one.
    made = trained("smollm")
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "bos_token": "<|begin|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.encode_prompt("ab") == theirs("ab").input_ids


def test_an_end_of_text_that_is_not_called_special_is_still_the_end(tmp_path: Path) -> None:
    made = content(lambda made: None)
    end = next(token for token in made["added_tokens"] if token["content"] == "<|endoftext|>")
    end["special"] = False
    tokenizer = HuggingFaceTokenizer("t", made, {}, end["id"])
    tokenizer.save(tmp_path)
    for loaded in (tokenizer, load_tokenizer(tmp_path)):
        assert loaded.decode(loaded.encode("a text é")) == "a text é" and loaded.token_bytes[end["id"]] == b""
        with pytest.raises(InputError, match="loses text"):
            loaded.encode("in data <|endoftext|> is text")
