"""prepare_data.py and bad input: one line on standard error, status 2, nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from data_helpers import left_over, prepared, run

from nib.tokenizer.tokenizer import train_char

# Bad input, through the command line


@pytest.fixture(scope="module")
def bad_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("bad")
    (root / "t.txt").write_text("some text\n")
    (root / "binary.bin").write_bytes(bytes(range(256)))
    (root / "empty.txt").write_text("")
    (root / "nothing").mkdir()
    (root / "lines.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (root / "list.jsonl").write_text('{"text": "a"}\n\n[1, 2]\n')
    (root / "cut.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    (root / "number.jsonl").write_text('{"text": 3}\n')
    (root / "deep.jsonl").write_text("[" * 100_000)
    (root / "cut.parquet").write_bytes(b"PAR1 and no more")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None]}), root / "t.parquet")
    (root / "tokenizer.json").write_text("{}")
    (root / "loop").symlink_to("loop")
    return root


BAD = {
    "no source": ([], "no SOURCE"),
    "a URL that cannot be read": (["https://["], "https://[ is not a URL"),
    "such a URL and an output": (["https://[", "--out=x"], "https://[ is not a URL"),
    "an empty source": ([""], "no SOURCE, or an empty one"),
    "an empty source among others": (["t.txt", "", "--out=x"], "no SOURCE, or an empty one"),
    "an empty tokenizer": (["t.txt", "--tokenizer="], "no tokenizer ''"),
    "a source that is not there": (["missing.txt"], "missing.txt"),
    "a loop of links": (["loop"], "loop"),
    "several sources and no name": (["t.txt", "empty.txt"], "--out"),
    "unknown option": (["t.txt", "--tokeniser=byte"], "--tokenizer"),
    "an option without value": (["t.txt", "--tokenizer"], "--tokenizer"),
    "workers is a text": (["t.txt", "--workers=many"], "--workers"),
    "negative workers": (["t.txt", "--workers=-1"], "--workers"),
    "no tokens a shard": (["t.txt", "--shard-tokens=0"], "--shard-tokens"),
    "negative seed": (["t.txt", "--seed=-1"], "--seed"),
    "everything for validation": (["t.txt", "--val-fraction=1"], "below 1"),
    "negative fraction": (["t.txt", "--val-fraction=-0.1"], "--val-fraction"),
    "fraction is NaN": (["t.txt", "--val-fraction=nan"], "finite"),
    "unknown format": (["t.txt", "--format=csv"], "--format"),
    "unknown way with invalid text": (["t.txt", "--invalid=ignore"], "--invalid"),
    "unknown tokenizer": (["t.txt", "--tokenizer=gtp2"], "'gtp2'"),
    "bpe without a number": (["t.txt", "--tokenizer=bpe:many"], "bpe:8192"),
    "bpe below the bytes": (["t.txt", "--tokenizer=bpe:256"], "bpe:8192"),
    "a tokenizer file that is none": (["t.txt", "--tokenizer=tokenizer.json"], "tokenizer.json"),
    "a directory without tokenizer": (["t.txt", "--tokenizer=nothing"], "nothing"),
    "an encoding that cannot be downloaded": (["t.txt", "--tokenizer=cl100k_base"], "bpe:8192"),
    "an empty file": (["empty.txt", "--tokenizer=byte"], "no text"),
    "an empty file for bpe": (["empty.txt", "--tokenizer=bpe:300"], "no text"),
    "an empty file for char": (["empty.txt", "--tokenizer=char"], "no text"),
    "an empty directory": (["nothing", "--tokenizer=byte"], "nothing"),
    "no matching file": ([".", "--tokenizer=byte", "--glob=*.md"], "*.md"),
    "a binary file": (["binary.bin", "--tokenizer=byte"], "binary.bin: byte 0x80 at offset 128"),
    "a binary file for bpe": (["binary.bin", "--tokenizer=bpe:300"], "binary.bin: byte 0x80 at offset 128"),
    "a binary file for char": (["binary.bin", "--tokenizer=char"], "binary.bin: byte 0x80 at offset 128"),
    "a line without the field": (
        ["lines.jsonl", "--tokenizer=byte"],
        "lines.jsonl, line 2: no field 'text' among body",
    ),
    "a line that is no object": (["list.jsonl", "--tokenizer=byte"], "list.jsonl, line 3"),
    "a line that is cut": (["cut.jsonl", "--tokenizer=byte"], "cut.jsonl, line 2: not valid JSON"),
    "a field that is no text": (["number.jsonl", "--tokenizer=byte"], "number.jsonl, line 1: field 'text' holds int"),
    "JSON that is too deep": (["deep.jsonl", "--tokenizer=byte"], "deep.jsonl, line 1"),
    "text as JSONL": (["t.txt", "--format=jsonl", "--tokenizer=byte"], "t.txt, line 1: not valid JSON"),
    "a column that is not there": (["t.parquet", "--tokenizer=byte"], "--field=body"),
    "a row without text": (["t.parquet", "--field=body", "--tokenizer=byte"], "t.parquet, row 2"),
    "a cut Parquet file": (["cut.parquet", "--tokenizer=byte"], "cut.parquet"),
    "Parquet through a pipe": (["-", "--format=parquet", "--tokenizer=byte"], "pipe"),
    "an output that is a file": (["t.txt", "--out=empty.txt", "--tokenizer=byte"], "empty.txt"),
    "an output below a file": (["t.txt", "--out=empty.txt/x/y", "--tokenizer=byte"], "empty.txt"),
    "an output without a place": (["t.txt", "--out=/proc/none/x", "--tokenizer=byte"], "/proc/none"),
    "a character the tokenizer does not know": (["t.txt", "--tokenizer=known"], "'m' (U+006D)"),
    "a URL of a server that is not there": (["http://127.0.0.1:9/x.txt", "--tokenizer=byte"], "127.0.0.1:9"),
    "a URL that is none": (["http://", "--out=data/x", "--tokenizer=byte"], "http://"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_status_2(what: str, bad_input: Path, tmp_path: Path) -> None:
    arguments, mentioned = BAD[what]
    if what == "a character the tokenizer does not know":
        train_char(["so text\n"]).save(tmp_path)
        arguments = ["t.txt", f"--tokenizer={tmp_path}"]
    before = left_over(bad_input)
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "TIKTOKEN_CACHE_DIR": str(tmp_path), "no_proxy": "127.0.0.1"}
    done = run(bad_input, *arguments, "--workers=1", env=os.environ | nowhere)
    said = done.stderr.decode()
    assert done.returncode == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1 and mentioned in said, said
    if (bad_input / "data").exists():
        (bad_input / "data").rmdir()  # it is empty, or this fails
    assert left_over(bad_input) == before, "something was left behind"


@pytest.mark.parametrize("package, source", [("pyarrow", "t.parquet"), ("datasets", "openwebtext")])
def test_a_missing_package_is_named(package: str, source: str, bad_input: Path, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError")
    done = run(bad_input, source, "--tokenizer=byte", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and f"pip install {package}".encode() in done.stderr


def test_hub_corpora_are_streamed_through_datasets(tmp_path: Path) -> None:
    """With a stand-in for the package: what is asked of it, and what becomes of its rows."""
    (tmp_path / "datasets.py").write_text(
        "def load_dataset(*names, split, streaming):\n"
        "    assert names == ('HuggingFaceFW/fineweb-edu', 'sample-10BT') and split == 'train' and streaming\n"
        "    return ({'text': f'row {i}'} for i in range(100))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    data = prepared(tmp_path, "fineweb-edu", "--tokenizer=byte", "--val-fraction=0", env=environment)
    assert data.documents("train") == [f"row {number}" for number in range(100)]
