"""prepare_data.py as a user runs it: what it writes, from which sources, into which split."""

from __future__ import annotations

import functools
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_helpers import TORTURE, Data, gpt2_cache, left_over, prepared, run, write_jsonl, write_texts

from nib.common.wording import counted
from nib.data.documents import Part, Source, read_parts
from nib.data.encode import Encoder
from nib.data.prepare import BPE_SAMPLE_BYTES, _sample
from nib.data.settings import PrepareSettings
from nib.tokenizer.chunking import PIECE_BYTES

# What it writes


def test_gpt2_shards_hold_the_tokens_of_tiktoken(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(gpt2_cache(tmp_path / "cache"))}
    texts = write_texts(tmp_path / "texts", 30) + [TORTURE]
    (tmp_path / "texts" / "torture.txt").write_text(TORTURE, newline="")
    data = prepared(tmp_path, "texts", "--tokenizer=gpt2", "--val-fraction=0", env=environment)
    encoding = data.tokenizer.encoding  # type: ignore[attr-defined]
    expected = [id for text in texts for id in [*encoding.encode_ordinary(text), 50256]]
    assert data.ids("train").tolist() == expected
    assert data.meta["format"] == "nib-data-1" and data.meta["dtype"] == "uint16"
    assert (data.meta["tokenizer"], data.meta["vocab_size"]) == ("gpt2", 50257)
    assert data.meta["documents"] == {"train": 31, "val": 0} and data.shards["val"] == []
    assert data.meta["source"] == ["texts"]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300", "char"])
def test_every_tokenizer_keeps_every_byte(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "t.txt").write_text(TORTURE, newline="")
    data = prepared(tmp_path, "t.txt", f"--tokenizer={tokenizer}", "--val-fraction=0.3")
    assert data.text("train") + data.text("val") == TORTURE
    assert sum(data.meta["bytes"].values()) == len(TORTURE.encode())


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    text = "".join(map(chr, range(0x20000, 0x20000 + 70_000)))
    (tmp_path / "t.txt").write_text(text)
    data = prepared(tmp_path, "t.txt", "--tokenizer=char")
    assert data.meta["dtype"] == "uint32" and data.text("train") + data.text("val") == text


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 300)
    (tmp_path / "texts" / "large.txt").write_text("".join(texts) * 120 + TORTURE * 3000)
    write_jsonl(tmp_path / "texts" / "lines.jsonl", [*texts, TORTURE * 3000, ""])
    assert (tmp_path / "texts" / "large.txt").stat().st_size > 3 * PIECE_BYTES
    made = {}
    for workers in (1, 2, 3):
        data = prepared(tmp_path, "texts", "--tokenizer=bpe:500", f"--workers={workers}", "--shard-tokens=100_000")
        made[workers] = {path.name: path.read_bytes() for path in (tmp_path / "data" / "out").iterdir()}
    assert len(data.shards["train"]) > 3
    assert made[1] == made[2] == made[3]
    assert sum(data.meta["documents"].values()) == 300 + 1 + 301


def test_shards_are_the_whole_cut_evenly(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 50)
    whole = prepared(tmp_path, "texts", "--tokenizer=byte", "--val-fraction=0.2")
    cut = prepared(tmp_path, "texts", "--tokenizer=byte", "--val-fraction=0.2", "--shard-tokens=101")
    assert [len(shards) for shards in whole.shards.values()] == [1, 1]
    for split in ("train", "val"):
        assert len(cut.shards[split]) == -(-len(whole.ids(split)) // 101) > 2
        assert np.array_equal(cut.ids(split), whole.ids(split))
    assert sorted(whole.documents("train") + whole.documents("val")) == sorted(texts)
    one = prepared(
        tmp_path, "texts", "--tokenizer=byte", f"--shard-tokens={len(whole.ids('train'))}", "--val-fraction=0.2"
    )
    assert len(one.shards["train"]) == 1


# Sources and formats


def test_directories_are_read_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    for name in ("b/21.py", "a.txt", "b/12.py", ".hidden/x.py", "b/.x.py", "c.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "empty.py").write_text("")
    read = functools.partial(prepared, tmp_path, "--tokenizer=byte", "--val-fraction=0")
    assert read("texts").documents("train") == ["a.txt", "b/12.py", "b/21.py", "c.py"]
    assert read("texts", "--glob=*.py").documents("train") == ["b/12.py", "b/21.py", "c.py"]
    assert read("texts", "--glob=b/*").documents("train") == ["b/12.py", "b/21.py"]
    assert read("texts/c.py", "texts/b").documents("train") == ["c.py", "b/12.py", "b/21.py"]


def test_jsonl_parquet_and_files_of_the_same_documents_agree(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [*write_texts(tmp_path / "texts", 80), TORTURE]
    (tmp_path / "texts" / "x.txt").write_text(TORTURE, newline="")
    rows = [json.dumps({"n": 1, "body": text}, ensure_ascii=False) + "\r\n" for text in texts]
    lines = "\ufeff\n\r\n" + "\ufeff".join(rows)  # as joined files have them
    (tmp_path / "t.jsonl").write_text(lines.rstrip("\r\n"), newline="")
    pyarrow.parquet.write_table(pyarrow.table({"n": range(81), "body": texts}), tmp_path / "t.parquet")
    options = ("--tokenizer=byte", "--field=body", "--val-fraction=0.2", "--workers=1")
    for source in ("texts", "t.jsonl", "t.parquet"):
        data = prepared(tmp_path, source, *options)
        assert sorted(data.documents("train") + data.documents("val")) == sorted(texts)
        made = data.meta["sha256"]
        assert made == prepared(tmp_path, "texts", *options).meta["sha256"], source
    piped = prepared(tmp_path, "-", *options, "--format=jsonl", stdin=(tmp_path / "t.jsonl").read_bytes())
    assert piped.meta["sha256"] == made


def test_standard_input_may_be_read_twice(tmp_path: Path) -> None:
    text = (TORTURE * 50).encode()
    for tokenizer in ("byte", "char", "bpe:300"):
        data = prepared(tmp_path, "-", f"--tokenizer={tokenizer}", stdin=text)
        assert data.text("train") + data.text("val") == text.decode()


def test_a_tokenizer_of_other_data_is_taken_over(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", 30)
    (tmp_path / "texts" / "t.txt").write_text(TORTURE * 5)
    assert run(tmp_path, "texts", "--tokenizer=bpe:350").returncode == 0  # data/texts
    first = Data(tmp_path / "data" / "texts")
    for file in ("data/texts", "data/texts/nib_tokenizer.json"):
        data = prepared(tmp_path, "texts", f"--tokenizer={file}")
        assert data.meta["tokenizer"] == "bpe:350" and data.meta["sha256"] == first.meta["sha256"]


def test_the_standard_library_needs_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "stdlib_char")
    assert done.returncode == 0 and b"--dataset=stdlib_char" in done.stdout
    data = Data(tmp_path / "data" / "stdlib_char")
    assert data.meta["documents"]["train"] > 300 and data.meta["source"] == ["stdlib"]
    assert (Path(json.__file__)).read_text() in data.text("train") + data.text("val")
    assert left_over(tmp_path / "data") == ["stdlib_char"]


def test_a_small_corpus_says_that_its_vocabulary_is_smaller(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abc abc abc abc")
    done = run(tmp_path, "t.txt", "--tokenizer=bpe:8192")
    assert b"words for only 260 tokens" in done.stdout and Data(tmp_path / "data" / "t").meta["vocab_size"] == 260


def test_the_bpe_sample_is_spread_over_the_corpus() -> None:
    def parts() -> Iterator[Part]:
        return (Part(str(index), block) for index in range(1000))

    block = bytes(BPE_SAMPLE_BYTES // 250)
    taken = [int(part.where) for part in _sample(parts(), [Source("x", "text", size=1000 * len(block))])]
    assert len(taken) == 250 and taken == list(range(0, 1000, 4))
    assert len(list(_sample(parts(), [Source("x", "hub")]))) == 250
    assert len(list(_sample(parts(), [Source("x", "text", size=10)]))) == 250


def test_one_is_written_without_an_s(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a")
    done = run(tmp_path, "t.txt", "--tokenizer=byte", "--val-fraction=0")
    assert re.findall(rb"[\d,]+ \w+", done.stdout)[:6] == [
        b"1 document", b"2 tokens", b"1 byte", b"0 documents", b"0 tokens", b"0 bytes",
    ]  # fmt: skip
    assert [counted(number, "step") for number in (0, 1, 2, 1.0, "1", "1,000")] == [
        "0 steps", "1 step", "2 steps", "1.0 steps", "1 step", "1,000 steps",
    ]  # fmt: skip


# The split


def test_a_document_stays_in_its_split_when_the_corpus_grows(tmp_path: Path) -> None:
    texts = [f"text {number} " * (1 + number % 3) for number in range(600)]
    options = ("--tokenizer=byte", "--val-fraction=0.1")
    small = prepared(tmp_path, write_jsonl(tmp_path / "small.jsonl", texts[:300]), *options)
    random.Random(1).shuffle(texts)
    large = prepared(tmp_path, write_jsonl(tmp_path / "large.jsonl", texts + texts[:50]), *options)
    val = set(large.documents("val"))
    assert not val & set(large.documents("train")), "the same content in both splits"
    assert set(small.documents("val")) == val & set(small.documents("val") + small.documents("train"))
    assert 30 <= len(val) <= 90
    other = prepared(tmp_path, tmp_path / "small.jsonl", *options, "--seed=1")
    assert other.documents("val") != small.documents("val")


def test_one_of_several_documents_goes_to_val(tmp_path: Path) -> None:
    texts = [f"text {number} " * 5 for number in range(7)]
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    data = prepared(tmp_path, source, "--tokenizer=byte", "--val-fraction=1e-9", "--shard-tokens=64")
    (val,) = data.documents("val")
    assert data.documents("train") == [text for text in texts if text != val]
    assert data.meta["documents"] == {"train": 6, "val": 1}
    write_jsonl(tmp_path / "t.jsonl", texts[::-1])  # in another place of the file
    assert prepared(tmp_path, source, "--tokenizer=byte", "--val-fraction=1e-9").documents("val") == [val]


def test_a_single_document_gives_its_last_part(tmp_path: Path) -> None:
    text = "".join(random.Random(1).choices("abcdef \n", k=1_115_394))  # the size of tiny Shakespeare
    (tmp_path / "t.txt").write_text(text)
    data = prepared(tmp_path, "t.txt", "--tokenizer=char", "--val-fraction=0.1")
    assert data.meta["tokens"] == {"train": 1_003_854, "val": 111_540}, "nanoGPT's split"
    assert data.text("train") == text[:1_003_854] and data.text("val") == text[1_003_854:]
    none = prepared(tmp_path, "t.txt", "--tokenizer=char", "--val-fraction=0")
    assert none.text("train") == text and none.meta["tokens"]["val"] == 0


@pytest.mark.parametrize("seed", [1, 2, 3, 4])  # by its hash alone the document would go to val with some seeds
@pytest.mark.parametrize("fraction", [0.5, 0.52, 0.54, 0.9])
def test_a_single_document_is_not_cut_inside_a_character(tmp_path: Path, seed: int, fraction: float) -> None:
    from nib.data.prepare import prepare

    text = "中文🙂é" * 10
    (tmp_path / "t.txt").write_text(text)
    settings = PrepareSettings(tokenizer="byte", val_fraction=fraction, seed=seed, workers=1)
    prepare([str(tmp_path / "t.txt")], tmp_path / "out", settings)
    data = Data(tmp_path / "out")
    assert data.text("train") + data.text("val") == text  # each is valid UTF-8 by itself
    total = len(text.encode()) + 1
    assert 0 <= len(data.ids("train")) - int(total * (1 - fraction)) < 4


def test_a_long_document_has_one_hash_in_every_format(tmp_path: Path) -> None:
    from nib.tokenizer.tokenizer import ByteTokenizer

    ByteTokenizer().save(tmp_path)
    encoder = Encoder(tmp_path, PrepareSettings())
    text = ("some words " * 200_000)[: 2 * PIECE_BYTES + 1]
    (tmp_path / "t.txt").write_text(text)
    write_jsonl(tmp_path / "t.jsonl", [text])
    hashes = []
    for name, format in (("t.txt", "text"), ("t.jsonl", "jsonl")):
        parts = list(read_parts([Source(name, format, tmp_path / name)], "text"))
        results, _ = encoder(parts)
        assert [result.content_hash != 0 for result in results] == [part.first for part in parts]
        hashes.append(results[0].content_hash)
    assert len(results) == 1 and hashes[0] == hashes[1]


# Invalid text


def test_invalid_utf8_is_refused_replaced_or_left_out(tmp_path: Path) -> None:
    good, bad = b"good text\n" * 100_000, b"x" * 2_000_000 + b"\xff\xfeend"
    for name, content in {"a.txt": good, "b.txt": bad, "c.txt": good}.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for workers in ("--workers=1", "--workers=2"):
        refused = run(tmp_path, *files, "--out=data/out", "--tokenizer=byte", workers)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: {files[1]}: byte 0xff at offset 2000000 is not UTF-8".encode())
        assert left_over(tmp_path / "data") == []
    options = ("--out=data/out", "--overwrite", "--tokenizer=byte", "--val-fraction=0")
    done = run(tmp_path, *files, *options, "--invalid=skip")
    assert Data(tmp_path / "data" / "out").documents("train") == [good.decode()] * 2
    assert f"left out: {files[1]}: byte 0xff".encode() in done.stdout and b"left out 1 " in done.stdout
    done = run(tmp_path, *files, *options, "--invalid=replace")
    assert Data(tmp_path / "data" / "out").documents("train")[1] == "x" * 2_000_000 + "\ufffd\ufffdend"
    assert b"replaced 2 places" in done.stdout


def test_invalid_text_in_jsonl(tmp_path: Path) -> None:
    lines = [b'{"text": "one \xff"}', b'{"text": "two \\ud800"}', b'{"text": "three \xef\xbf\xbd"}']
    for line, reason in zip(lines, (b"offset 14 ", b"line 1: U+D800 ", b""), strict=True):
        (tmp_path / "t.jsonl").write_bytes(line)
        assert reason in run(tmp_path, "t.jsonl", "--tokenizer=byte", "--overwrite").stderr
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    options = ("t.jsonl", "--tokenizer=char", "--val-fraction=0")
    assert prepared(tmp_path, *options, "--invalid=skip").text("train") == "three \ufffd"
    assert prepared(tmp_path, *options, "--invalid=replace").text("train") == "one \ufffdtwo \ufffdthree \ufffd"
