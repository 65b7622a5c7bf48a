"""Which files a source means, what is in them, and what becomes of rows that hold no text."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from nib.common.exits import InputError
from nib.data.dataset import Dataset
from nib.data.documents import HEAD_BYTES, find_sources, read_parts
from nib.data.encode import part_text
from nib.data.prepare import prepare
from nib.data.rows import chat_text
from nib.data.settings import PrepareSettings


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names: str) -> None:
    """Files that hold their own names."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)


def texts(*sources: str, glob: str = "", format: str = "auto", invalid: str = "error") -> list[str]:
    """The documents of these sources."""
    found = find_sources(list(sources), format, glob, Path(), spool=False)
    parts = [part_text(part, "text", invalid) for part in read_parts(found, "text")]
    return [text for text, _, fault in parts if not fault]


# ---- files of a directory


@pytest.mark.parametrize(
    "glob, names",
    [
        ("**/*.md", "d/a.md d/sub/b.md d/sub/deep/c.md"),
        ("./**/*.md", "d/a.md d/sub/b.md d/sub/deep/c.md"),
        ("*.md", "d/a.md d/sub/b.md d/sub/deep/c.md"),
        ("**", "d/a.md d/a.txt d/sub/b.md d/sub/deep/c.md"),
        ("sub/**", "d/sub/b.md d/sub/deep/c.md"),
        ("sub/**/*.md", "d/sub/b.md d/sub/deep/c.md"),
        ("**/sub/**/*.md", "d/sub/b.md d/sub/deep/c.md"),
        ("**/deep/*", "d/sub/deep/c.md"),
        ("**/c.md", "d/sub/deep/c.md"),
        ("*/*.md", "d/sub/b.md"),
        ("sub/*", "d/sub/b.md"),
        ("/a.[mt]*", "d/a.md d/a.txt"),
    ],
)
def test_two_stars_are_any_directories_or_none(glob: str, names: str) -> None:
    write("d/a.md", "d/a.txt", "d/sub/b.md", "d/sub/deep/c.md")
    assert texts("d", glob=glob) == names.split()


def test_linked_directories_are_read_once_each(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("d/a.txt", "d/sub/b.txt", "d/sub/deep/c.txt", "elsewhere/x.txt", "elsewhere/y.txt", "beside.txt")
    for link, target in {
        "d/0-linked": work / "elsewhere",
        "d/again": work / "elsewhere",
        "d/sub/inner": work / "d" / "sub" / "deep",  # which is read without it
        "d/sub/loop": work / "d",
        "d/above": work,  # beside.txt must not come in
        "elsewhere/back": work / "d",
        "elsewhere/same.txt": work / "d" / "a.txt",
        "d/nothing.txt": work / "nothing.txt",
        "d/itself": work / "d" / "itself",
    }.items():
        Path(link).symlink_to(target)
    found = [source.name for source in find_sources(["d"], "auto", "*.txt", Path(), spool=False)]
    assert found == ["d/0-linked/x.txt", "d/0-linked/y.txt", "d/a.txt", "d/sub/b.txt", "d/sub/deep/c.txt"]
    assert capsys.readouterr().err == "skipped d/nothing.txt: it is not a readable file\n"
    os.link("d/a.txt", "d/hard.txt")  # a file like any other
    assert texts("d", glob="*.txt").count("d/a.txt") == 2


def test_what_is_no_file_in_a_directory_is_passed_over_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    write("d/a.txt")
    os.mkfifo("d/pipe.txt")
    assert texts("d") == ["d/a.txt"]
    assert capsys.readouterr().err == "skipped d/pipe.txt: it is not a readable file\n"


def test_a_dataset_in_a_directory_is_no_text(work: Path) -> None:
    write("d/input.txt")
    for out in ("d", "d/inner"):
        prepare(["d/input.txt"], work / "new", PrepareSettings(tokenizer="byte", workers=1))
        (work / out).mkdir(exist_ok=True)
        for path in (work / "new").iterdir():
            path.rename(work / out / path.name)
        (work / "new").rmdir()
        Dataset(work / out)  # leaves stamps
    assert texts("d") == ["d/input.txt"]


# ---- what is in a file

ROWS = [{"text": "one é 😀 ]}[{,"}, {"n": {"deep": ["]"]}, "text": 'two \\ " \u2028'}, {"text": "three"}]
TEXTS = [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, ensure_ascii=False, indent=2) + "\n",
        "\ufeff \n" + json.dumps(ROWS, ensure_ascii=False),
        "\n\n".join(map(json.dumps, ROWS)),  # JSONL under another name
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
    ],
    ids=["one line", "indented", "byte order mark", "lines", "indented objects"],
)
def test_rows_of_a_json_file_are_documents(content: str) -> None:
    Path("t.json").write_text(content)
    assert texts("t.json") == texts("t.json", format="json") == TEXTS
    assert texts("t.json", format="text") == [content]


def test_rows_of_json_may_be_longer_than_what_is_read_at_a_time() -> None:
    long = ["x" * 300_000, "é" * 100_000, "\\" * 70_000]
    for indent in (None, 1):
        Path("t.json").write_text(json.dumps([{"text": text} for text in long], indent=indent))
        assert texts("t.json") == long
    Path("t.json").write_text(json.dumps({"text": long[0]}))
    assert texts("t.json") == long[:1]
    cut_at_a_brace = json.dumps({"text": "x" * (HEAD_BYTES - 11) + "}" * 99})
    assert cut_at_a_brace[HEAD_BYTES - 1] == "}"
    Path("t.json").write_text(cut_at_a_brace)
    assert len(texts("t.json")) == 1


@pytest.mark.parametrize(
    "content, where, kept",
    [
        ('[{"text": "a"}, {"text": "b"', "row 2 and what follows: not valid JSON", ["a"]),
        ('[{"text": "a"}', "row 2 and what follows: not valid JSON", ["a"]),
        ('[{"text": "a"}] and more', "row 2 and what follows: not valid JSON", ["a"]),
        ('[{"text": "a"}, 7, "b", {"text": "c"}]', "row 2: int, not an object", ["a", "c"]),
        ('{\n"name": "package"\n}', "row 1: no field 'text' among name", []),
        ('{"name": "package"}', "line 1: no field 'text' among name", []),
        ("words", "row 1 and what follows: not valid JSON", []),
        ("[" * 100_000, "row 1 and what follows: not valid JSON", []),
    ],
)
def test_a_json_file_that_is_not_rows_of_text_is_refused_or_left_out(content: str, where: str, kept: list[str]) -> None:
    Path("t.json").write_text(content)
    with pytest.raises(InputError) as refused:
        texts("t.json")
    assert f"t.json, {where}" in str(refused.value) and "--format" in str(refused.value)
    assert texts("t.json", invalid="skip") == kept


@pytest.mark.parametrize("ending, pack", [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_text_and_rows_are_read(ending: str, pack: Any) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name, content in {"a.txt": "plain text " * 99_999, "b.jsonl": rows, "c.json": json.dumps(ROWS)}.items():
        Path(f"{name}.{ending}").write_bytes(pack(content.encode()))
    assert "".join(texts(f"a.txt.{ending}")) == "plain text " * 99_999
    assert texts(f"b.jsonl.{ending}") == texts(f"c.json.{ending}") == TEXTS
    data = Path(f"b.jsonl.{ending}").read_bytes()
    for damaged in (data[:-9], data[:30] + b"\xff" * 9 + data[39:], b"no such thing"):
        Path(f"bad.jsonl.{ending}").write_bytes(damaged)
        with pytest.raises(InputError, match=r"cannot read bad\.jsonl"):
            texts(f"bad.jsonl.{ending}", invalid="skip")


@pytest.mark.parametrize("name", "t.zst t.jsonl.zst t.tar t.tar.gz t.tgz t.zip t.7z t.parquet.gz t.JSONL.LZ4".split())
def test_what_cannot_be_unpacked_is_refused_by_its_name_or_passed_over(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(f"d/{name}", "d/a.txt")
    for glob in ("", "*", "[at]*"):
        assert texts("d", glob=glob) == ["d/a.txt"]
        said = f"skipped 1 packed file: d/{name}. Unpack what belongs to the corpus\n"
        assert capsys.readouterr().err == said
    assert texts("d", glob="*.txt") == ["d/a.txt"] and capsys.readouterr().err == ""
    write(f"d/more/{name}")  # most of the directory: not to be left out
    for source, glob in ((f"d/{name}", ""), ("d", ""), ("d", "t.*"), ("d/more", "")):
        with pytest.raises(InputError, match=r"is packed.*Unpack it"):
            texts(source, glob=glob)


def test_no_more_than_three_packed_files_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    write(*(f"d/{number}.{kind}" for number in range(5) for kind in ("zip", "txt")))
    assert len(texts("d")) == 5
    assert "skipped 5 packed files: d/0.zip, d/1.zip, d/2.zip, .... Unpack" in capsys.readouterr().err


# ---- rows without a text

BAD_ROWS = [
    ('{"text": null}', "field 'text' holds null"),
    ('{"text": 7}', "field 'text' holds int"),
    ('{"text": {"a": 1}}', "field 'text' holds dict"),
    ('{"body": "x"}', "no field 'text' among body"),
    ("{}", "no field 'text' among none"),
    ("null", "NoneType, not an object"),
    ('{"text": "cut', "not valid JSON"),
    ('{"messages": [{"role": "user", "content": null}]}', "field 'messages' holds a message without a role or content"),
    ('{"messages": [{"content": "x"}]}', "field 'messages' holds a message without a role or content"),
    ('{"messages": ["x"]}', "field 'messages' holds list"),
    ('{"messages": null}', "field 'messages' holds null"),
]


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:300"])
def test_rows_without_a_text_are_left_out_counted_and_said(
    tokenizer: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = '{"text": "good"}\n'
    Path("t.jsonl").write_text(good + "".join(f"{row}\n" for row, _ in BAD_ROWS) + good)
    settings = PrepareSettings(tokenizer=tokenizer, val_fraction=0.0, workers=1, invalid="skip")
    meta = prepare(["t.jsonl"], work / "out", settings)
    assert meta["documents"]["train"] == 2 and meta["bytes"]["train"] == 8
    said = capsys.readouterr().out
    assert f"left out {len(BAD_ROWS)} documents" in said and said.count("left out: t.jsonl, line ") == 10
    for number, (row, fault) in enumerate(BAD_ROWS, start=2):
        assert number > 11 or f"left out: t.jsonl, line {number}: {fault}" in said
        Path("t.jsonl").write_text(f"{good}\n{row}\n{good}")
        for invalid in ("error", "replace"):
            with pytest.raises(InputError) as refused:
                texts("t.jsonl", invalid=invalid)
            assert f"t.jsonl, line 3: {fault}" in str(refused.value) and "--invalid=skip" in str(refused.value)


def test_rows_of_parquet_without_a_text_are_left_out() -> None:
    import pyarrow
    from pyarrow import parquet

    strings = pyarrow.array([b"good", None, b"bad \xff", b"more"])
    for column in (strings, strings.view(pyarrow.string()), strings.view(pyarrow.string()).dictionary_encode()):
        parquet.write_table(pyarrow.table({"text": column}), "t.parquet")
        assert texts("t.parquet", invalid="skip") == ["good", "more"]
        with pytest.raises(InputError, match=r"row 2: column 'text' holds null.*--invalid=skip"):
            texts("t.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([b"bad \xff"]).view(pyarrow.string())}), "t.parquet")
    assert texts("t.parquet", invalid="replace") == ["bad \ufffd"]
    chats = [[{"role": "user", "content": "hi", "tool_calls": None}], None, [{"role": "user", "content": None}]]
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    parquet.write_table(pyarrow.table({"messages": [*chats, calls]}), "t.parquet")
    assert texts("t.parquet", invalid="skip") == ["user: hi\n", "assistant: \n"]


def test_bad_utf_8_inside_the_parts_of_a_column_is_called_so() -> None:
    import pyarrow
    from pyarrow import parquet

    bad = pyarrow.array([b"good", b"bad \xff"]).view(pyarrow.string())
    struct = pyarrow.StructArray.from_arrays([bad, bad], ["role", "content"])
    columns = (
        struct,
        pyarrow.ListArray.from_arrays([0, 1, 2], struct),
        pyarrow.ListArray.from_arrays([0, 1, 2], bad),
        pyarrow.ListArray.from_arrays([0, 1, 2], bad.dictionary_encode()),
    )
    for column in columns:
        parquet.write_table(pyarrow.table({"text": column.slice(1)}), "t.parquet")
        for invalid in ("error", "replace"):
            with pytest.raises(InputError, match=r"row 1: column 'text' holds (struct|list).* that is not UTF-8.*skip"):
                texts("t.parquet", invalid=invalid)
        assert texts("t.parquet", invalid="skip") == []
    parquet.write_table(pyarrow.table({"text": bad.dictionary_encode()}), "t.parquet")
    assert texts("t.parquet", invalid="replace") == ["good", "bad \ufffd"]
    with pytest.raises(InputError, match=r"row 2: byte 0xff at offset 4 is not UTF-8"):
        texts("t.parquet")


def test_messages_of_both_kinds_may_be_mixed() -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [[{"role": "user", "content": "hi"}], [{"from": "human", "value": "ho"}], [{"from": "gpt", "value": ""}]]
    kind = pyarrow.list_(pyarrow.struct([(key, pyarrow.string()) for key in ("role", "content", "from", "value")]))
    parquet.write_table(pyarrow.table({"messages": pyarrow.array(rows, kind)}), "t.parquet")  # null where one lacks it
    assert texts("t.parquet") == ["user: hi\n", "human: ho\n", "gpt: \n"]


@pytest.mark.parametrize("call", [{"tool_calls": [{"type": "function"}]}, {"function_call": {"name": "f"}}])
@pytest.mark.parametrize("content", [{"content": None}, {}])
def test_a_message_that_calls_tools_needs_no_content(call: dict[str, Any], content: dict[str, Any]) -> None:
    assert chat_text([{"role": "assistant", **content, **call}]) == "assistant: \n"
    assert chat_text([{"role": "assistant", **content}]) is None


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, {"text": "c"}, "d"], "abcd"),
        ([{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_text", "text": "a"}], "a"),
        ([{"type": "text", "text": None}], None),
        ([7], None),
        ([{"type": "text"}], ""),
        # As rows of Parquet have them: null for what other parts have.
        ([{"type": "image", "text": None, "image": "x"}, {"type": "text", "text": "a", "image": None}], "a"),
        ([{"type": None, "text": "a"}, {"type": None, "text": None}], None),
    ],
)
def test_no_text_in_the_parts_of_a_message_is_lost(parts: list[Any], text: str | None) -> None:
    expected = None if text is None else f"user: {text}\n"
    assert chat_text([{"role": "user", "content": parts}]) == expected


@pytest.mark.parametrize(("kind", "value"), [("timestamp", 1), ("time64", 1), ("duration", 1), ("date32", 2**31 - 1)])
def test_times_that_python_cannot_hold_are_rows_without_a_text(kind: str, value: int) -> None:
    import pyarrow
    from pyarrow import parquet

    made = pyarrow.date32() if kind == "date32" else getattr(pyarrow, kind)("ns")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([value, None], made)}), "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet, row 1: column 'text' holds .*, not text.*--invalid=skip"):
        texts("t.parquet")
    assert texts("t.parquet", invalid="skip") == []


def test_what_is_left_out_is_said_on_one_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.jsonl").write_text('{"text": "good"}\n' + json.dumps({"a\n\x1b[31m": 1}) + "\n")
    settings = PrepareSettings(tokenizer="byte", val_fraction=0.0, workers=1, invalid="skip")
    prepare(["t.jsonl"], work / "out", settings)
    said = capsys.readouterr().out
    assert "no field 'text' among a\\n\\x1b[31m\n" in said and "\x1b" not in said


def test_hidden_files_are_read_only_by_a_glob_that_names_them(work: Path) -> None:
    for name in ("a.md", ".b.md", ".c/d.md", "e/.f"):
        Path("d", name).parent.mkdir(parents=True, exist_ok=True)
        Path("d", name).write_text(name)
    for glob, names in (("*.md", ["a.md"]), (".*.md", [".b.md"]), (".c/*.md", [".c/d.md"]), ("**/.f", ["e/.f"])):
        assert texts("d", glob=glob) == names
