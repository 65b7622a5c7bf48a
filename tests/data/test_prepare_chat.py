"""prepare_data.py --format chat: rows of every kind to shards with masks, what is shown, and bad rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import Data, left_over, prepared, run

from nib.data.chat import PLAIN_TEMPLATE, Chat

OPTIONS = ("--format=chat", "--tokenizer=byte")

# With blocks that say what is learned.
MARKED = (
    "{% for message in messages %}{{ '<|' ~ message.role ~ '|>' }}{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{{ '<|end|>' }}{% endfor %}"
)


def conversation(number: int) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": "Be brief."}] * (number % 2)
    for turn in range(1 + number % 3):
        messages.append({"role": "user", "content": f"Question {number} of {turn}?\n"})
        messages.append({"role": "assistant", "content": f"{turn} ü" * turn})
    return messages


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(data: Data, directory: Path, split: str) -> list[tuple[list[int], list[int]]]:
    """Ids and mask of each conversation of a split, as the files say it."""
    masks, lengths = (
        [np.fromfile(directory / name.replace(".bin", ending), dtype) for name in names]
        for ending, dtype in ((".mask", np.uint8), (".rows", "<u4"))
        for names in [sorted(name for name in data.meta["sha256"] if name.startswith(split) and name.endswith(".bin"))]
    )
    assert [len(mask) for mask in masks] == [len(shard) for shard in data.shards[split]], "a byte a token"
    mask, ends = np.concatenate([*masks, []]), np.cumsum(np.concatenate([*lengths, []])).astype(int)
    assert data.meta["learned"][split] == mask.sum() and set(mask) <= {0, 1}
    assert len(ends) == data.meta["documents"][split] and (ends[-1] if len(ends) else 0) == data.meta["tokens"][split]
    first = 0  # in the stream, of the shard; each length is beside the shard in which its conversation begins
    begins = np.concatenate([[0], ends[:-1]])
    for shard, beside in zip(data.shards[split], lengths, strict=True):
        assert len(beside) == np.sum((begins >= first) & (begins < first + len(shard)))
        first += len(shard)
    cut = ends[:-1]
    ids = np.split(data.ids(split), cut)
    return [(one.tolist(), on.tolist()) for one, on in zip(ids, np.split(mask, cut), strict=True) if len(one)]


def test_each_conversation_is_a_row_with_its_mask(tmp_path: Path) -> None:
    messages = [conversation(number) for number in range(40)]
    write_rows(tmp_path / "chats.jsonl", [{"messages": each} for each in messages])
    seen = []
    for options in ([], ["--shard-tokens=37"], ["--shard-tokens=100", "--workers=2"]):
        data = prepared(tmp_path, "chats.jsonl", *OPTIONS, "--val-fraction=0.2", *options)
        rows = {split: rows_of(data, tmp_path / "data" / "out", split) for split in ("train", "val")}
        assert data.meta["kind"] == "chat"
        seen.append(rows)
    assert seen[0] == seen[1] == seen[2] and len(seen[0]["val"]) > 2
    chat = Chat(data.tokenizer)
    wanted = [tuple(each.tolist() for each in chat.encode_conversation(one)) for one in messages]
    assert sorted(seen[0]["train"] + seen[0]["val"]) == sorted(wanted)


@pytest.mark.parametrize("count, documents", [(1, {"train": 1, "val": 0}), (2, {"train": 1, "val": 1})])
def test_a_conversation_is_in_one_split(count: int, documents: dict[str, int], tmp_path: Path) -> None:
    write_rows(tmp_path / "chats.jsonl", [{"messages": conversation(number)} for number in range(count)])
    data = prepared(tmp_path, "chats.jsonl", *OPTIONS)
    assert data.meta["documents"] == documents
    for split in documents:
        rows_of(data, tmp_path / "data" / "out", split)


def test_rows_of_all_kinds_give_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    sides = [(f"What is {number}?", f"A number.\n{number}") for number in range(6)]
    messages = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in sides]
    sharegpt = [[{"from": "human", "value": a}, {"from": "gpt", "value": b}] for a, b in sides]
    kinds: dict[str, list[dict[str, Any]]] = {
        "messages": [{"messages": each, "id": 1} for each in messages],
        "texts": [{"prompt": a, "completion": b} for a, b in sides],
        "sides": [{"prompt": each[:1], "completion": each[1:]} for each in messages],
        "sharegpt": [{"conversations": each} for each in sharegpt],
        "another field": [{"talk": each} for each in messages],
    }
    found = {}
    for name, rows in kinds.items():
        options = ["--field=talk"] if name == "another field" else []
        data = prepared(tmp_path, write_rows(tmp_path / f"{name}.jsonl", rows), *OPTIONS, *options)
        found[name] = data.meta["sha256"]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        found[f"{name} in Parquet"] = prepared(tmp_path, f"{name}.parquet", *OPTIONS, *options).meta["sha256"]
    assert all(each == found["messages"] for each in found.values()), found


def test_tokenizers_are_trained_on_what_is_said(tmp_path: Path) -> None:
    write_rows(tmp_path / "chats.jsonl", [{"messages": conversation(number)} for number in range(8)])
    data = prepared(tmp_path, "chats.jsonl", "--format=chat", "--tokenizer=char", "--val-fraction=0")
    assert "{" not in data.tokenizer._content()["characters"] and data.tokenizer.chat_template
    for name in ("bpe:300", str(tmp_path / "data" / "out")):
        again = prepared(tmp_path, "chats.jsonl", "--format=chat", f"--tokenizer={name}", "--val-fraction=0")
        assert rows_of(again, tmp_path / "data" / "out", "train")


def test_a_template_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% for message in messages %}{{ '<|say|>' + message.content + eos_token }}{% endfor %}"
    )
    write_rows(tmp_path / "chats.jsonl", [{"prompt": "a", "completion": "b"}])
    data = prepared(tmp_path, "chats.jsonl", *OPTIONS, "--chat-template=t.jinja")
    assert data.ids("train").tolist() == [257, ord("a"), 256, 257, ord("b"), 256]
    assert data.tokenizer.chat_template == (tmp_path / "t.jinja").read_text()


def test_the_first_conversations_are_shown_with_what_is_learned(tmp_path: Path) -> None:
    rows = [{"prompt": "a\nb", "completion": "c\x1bd\ne"}, {"prompt": "f", "completion": "g"}]
    write_rows(tmp_path / "chats.jsonl", rows)
    done = run(tmp_path, "chats.jsonl", *OPTIONS, "--show=1")
    assert done.returncode == 0, done.stderr
    shown = "<|user|>a\nb<|end|><|assistant|>[[c\\x1bd]]\n[[e<|end|>]]\n"
    assert done.stdout.decode().startswith(f"chats.jsonl, line 1:\n{shown}") and b"<|user|>f" not in done.stdout
    every = run(tmp_path, "chats.jsonl", *OPTIONS, "--show=1", "--train-on=all", "--overwrite").stdout.decode()
    assert "[[<|user|>a]]\n[[b<|end|><|assistant|>c" in every


BAD = {
    "roles out of order": '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
    "an empty conversation": '{"messages": []}',
    "no assistant turn": '{"messages": [{"role": "user", "content": "a"}]}',
    "message 1 is no text": '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
    "message 2 is no text": '{"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "tool_calls": [{}]}]}',
    "no messages, conversations": '{"text": "a"}',
    "list, not an object": "[]",
    "not valid JSON": '{"messages": ',
    "message 1 is int": '{"messages": [1]}',
    "message 1 has no content": '{"messages": [{"role": "user"}]}',
    "message 1 has no role": '{"conversations": [{"value": "a"}]}',
    "its messages are str": '{"messages": "a"}',
    "U+D83D is a lone surrogate": '{"prompt": "\\ud83d", "completion": "b"}',
    "its tools are not valid JSON": '{"prompt": "a", "completion": "b", "tools": "{"}',
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_one_line_with_its_place(what: str, tmp_path: Path) -> None:
    mentioned = "message 1 is of the role assistant" if what == "roles out of order" else what
    good = json.dumps({"prompt": "a", "completion": "b"})
    (tmp_path / "chats.jsonl").write_text(f"{good}\n{BAD[what]}\n")
    done = run(tmp_path, "chats.jsonl", *OPTIONS, "--workers=1")
    said = done.stderr.decode()
    assert done.returncode == 2 and said.count("\n") == 1 and said.startswith("error: chats.jsonl, line 2: "), said
    assert mentioned in said and "--invalid=" in said
    assert left_over(tmp_path / "data") == []
    data = prepared(tmp_path, "chats.jsonl", *OPTIONS, "--invalid=skip")
    assert data.meta["documents"] == {"train": 1, "val": 0}


def test_a_bad_template_is_one_line_and_nothing_is_overwritten(tmp_path: Path) -> None:
    write_rows(tmp_path / "chats.jsonl", [{"prompt": "a", "completion": "b"}])
    prepared(tmp_path, "chats.jsonl", *OPTIONS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "data" / "out").iterdir()}
    bad = {
        "{{ messages.__class__.x }}": "SecurityError", "{% for %}": "not valid", "": "is empty",
        "{{ raise_exception('no') }}": "line 1", "{{ nothing.at.all }}": "line 1",
    }  # fmt: skip
    for source, mentioned in bad.items():
        (tmp_path / "t.jinja").write_text(source)
        done = run(tmp_path, "chats.jsonl", *OPTIONS, "--chat-template=t.jinja", "--out=data/out", "--overwrite")
        said = done.stderr.decode()
        assert done.returncode == 2 and said.startswith("error: ") and said.count("\n") == 1 and mentioned in said, said
    assert {path.name: path.read_bytes() for path in (tmp_path / "data" / "out").iterdir()} == before


PREFERENCES = {
    "texts and a prompt": [{"prompt": "Say: ", "chosen": "yes", "rejected": "no"}],
    "texts with a beginning": [{"chosen": "Say: yes", "rejected": "Say: no"}],
}


@pytest.mark.parametrize("what", PREFERENCES)
def test_preferences_of_texts_are_two_rows_with_the_prompt_not_learned(what: str, tmp_path: Path) -> None:
    sides = ("yes", "no") if "prompt" in PREFERENCES[what][0] else (" yes", " no")
    write_rows(tmp_path / "pairs.jsonl", PREFERENCES[what] * 3)
    data = prepared(tmp_path, "pairs.jsonl", "--format=preference", "--tokenizer=byte", "--val-fraction=0")
    assert data.meta["kind"] == "preference" and data.meta["vocab_size"] == 257
    assert data.meta["documents"]["train"] == 3 and data.meta["learned"]["train"] == 3 * sum(
        len(f"{each}.") for each in sides
    )
    directory = tmp_path / "data" / "out"
    lengths = np.fromfile(directory / "train-00000.rows", "<u4").tolist()
    assert lengths == [len("Say: yes") + 1, len("Say: no") + 1] * 3
    mask = np.fromfile(directory / "train-00000.mask", np.uint8)
    chosen, rejected = np.split(mask[: sum(lengths[:2])], [lengths[0]])
    assert data.tokenizer.decode(data.ids("train")[: lengths[0]][chosen == 1]) == sides[0] and rejected[-3:].all()


def test_preferences_of_messages_learn_what_differs(tmp_path: Path) -> None:
    begin = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    ask, yes, no = (
        {"role": role, "content": said} for role, said in (("user", "Q"), ("assistant", "y"), ("assistant", "n"))
    )
    rows = [
        {"chosen": [*begin, ask, yes], "rejected": [*begin, ask, no]},
        {"prompt": [*begin, ask], "chosen": [yes], "rejected": [no]},
        {"prompt": "Q", "chosen": [*begin, ask, yes], "rejected": [*begin, ask, no]},  # as in UltraFeedback
    ]
    found = []
    for row in rows:
        write_rows(tmp_path / "pairs.jsonl", [row])
        (tmp_path / "t.jinja").write_text(PLAIN_TEMPLATE)
        data = prepared(tmp_path, "pairs.jsonl", "--format=preference", "--tokenizer=byte", "--chat-template=t.jinja")
        assert data.meta["documents"]["train"] == 1 and data.meta["learned"]["train"] == 4
        found.append(data.meta["sha256"])
    assert found[0] == found[1] == found[2]
    one = []
    for row in ({"prompt": "Q", "chosen": [yes], "rejected": [no]}, {"chosen": [ask, yes], "rejected": [ask, no]}):
        write_rows(tmp_path / "pairs.jsonl", [row])
        data = prepared(tmp_path, "pairs.jsonl", "--format=preference", "--tokenizer=byte", "--chat-template=t.jinja")
        one.append(data.meta["sha256"])
    assert one[0] == one[1]
    done = run(tmp_path, "pairs.jsonl", "--format=preference", "--tokenizer=byte", "--out=data/x")
    assert done.returncode == 2 and b"no chat template" in done.stderr


@pytest.mark.parametrize(
    "row, mentioned",
    [
        ({"chosen": "a", "rejected": "a"}, "the same"),
        ({"chosen": "a", "rejected": ""}, "an empty side"),
        ({"chosen": "a"}, "no chosen and rejected"),
        ({"system": "s", "prompt": "p", "chosen": "a", "rejected": "b"}, "a system text beside texts"),
        ({"chosen": [1], "rejected": [2]}, "message 1 is int"),
        ({"chosen": "a", "rejected": [2]}, "its messages are str"),
    ],
)
def test_a_bad_pair_is_one_line_with_its_place(row: dict[str, Any], mentioned: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [row])
    done = run(tmp_path, "pairs.jsonl", "--format=preference", "--tokenizer=byte", "--workers=1")
    said = done.stderr.decode()
    assert done.returncode == 2 and said.startswith("error: pairs.jsonl, line 1: ") and said.count("\n") == 1
    assert mentioned in said, said


def test_of_a_prompt_of_messages_nothing_is_learned(tmp_path: Path) -> None:
    turns = [{"role": ("user", "assistant")[number % 2], "content": f"word {number}"} for number in range(4)]
    for number, template in enumerate((PLAIN_TEMPLATE, MARKED)):
        (tmp_path / "t.jinja").write_text(template)
        write_rows(tmp_path / "chats.jsonl", [{"prompt": turns[:3], "completion": turns[3:]}])
        data = prepared(tmp_path, "chats.jsonl", *OPTIONS, "--chat-template=t.jinja")
        assert data.meta["learned"]["train"] == len("word 3") + 1, number


@pytest.mark.parametrize("option", ["--show=1", "--train-on=all", "--chat-template=x"])
def test_options_of_chats_want_chats(option: str, tmp_path: Path) -> None:
    done = run(tmp_path, "stdlib", option)
    assert done.returncode == 2 and b"Give --format=chat too" in done.stderr


def test_a_missing_jinja2_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "chats.jsonl", [{"prompt": "a", "completion": "b"}])
    (tmp_path / "jinja2.py").write_text("raise ImportError")
    done = run(tmp_path, "chats.jsonl", *OPTIONS, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and b"pip install 'jinja2>=3.1.6'" in done.stderr


def test_values_of_parquet_that_json_lacks(tmp_path: Path) -> None:
    """Bytes are text; what cannot be read is a fault of its row. Other columns are named if none is known."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "t.jinja").write_text(PLAIN_TEMPLATE)
    write = lambda name, **columns: parquet.write_table(pyarrow.table(columns), tmp_path / name)  # noqa: E731
    write("bytes.parquet", prompt=pyarrow.array(["Hi é".encode()] * 2, pyarrow.binary()), completion=["a", "b"])
    write("texts.parquet", prompt=["Hi é"] * 2, completion=["a", "b"])
    options = (*OPTIONS, "--chat-template=t.jinja", "--val-fraction=0")
    one, two = (prepared(tmp_path, f"{name}.parquet", *options).meta["sha256"] for name in ("bytes", "texts"))
    assert one == two
    broken = pyarrow.array([b"ab", b"\xff\xfe"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, broken.buffers())
    for name, column in (("bad", texts), ("bad bytes", broken)):
        write(f"{name}.parquet", prompt=column, completion=["x", "y"])
        done = run(tmp_path, f"{name}.parquet", *options, "--out=data/x")
        assert done.returncode == 2 and f"{name}.parquet, row 2: a value cannot be read" in done.stderr.decode()
        done = run(tmp_path, f"{name}.parquet", *options, "--invalid=skip", f"--out=data/{name}")
        assert done.returncode == 0 and b"left out 1 document" in done.stdout
    write("other.parquet", talk=["a"], id=[1])
    done = run(tmp_path, "other.parquet", *options, "--out=data/x")
    assert done.returncode == 2 and b"has no column of chats. Give --field=talk|id" in done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (("stdlib", "--format=chat"), "holds texts, not rows of chats"),
    (("pairs.jsonl", "--format=preference", "--train-on=all"), "of preferences only the answers are learned"),
    (("deep.jsonl", "--format=chat", "--chat-template=t.jinja"), "deep.jsonl, line 1: "),
])  # fmt: skip
def test_what_does_not_fit_the_format_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(PLAIN_TEMPLATE)
    write_rows(tmp_path / "pairs.jsonl", PREFERENCES["texts and a prompt"])
    deep = '{"a": ' * 700 + "1" + "}" * 700
    row = (
        f'{{"messages": [{{"role": "user", "content": "x", "more": {deep}}}, {{"role": "assistant", "content": "y"}}]}}'
    )
    (tmp_path / "deep.jsonl").write_text(row)
    done = run(tmp_path, *arguments, "--tokenizer=byte", "--workers=1")
    said = done.stderr.decode()
    assert done.returncode == 2 and said.startswith("error: ") and said.count("\n") == 1 and message in said, said


def test_questions_are_chats_without_saying_so(tmp_path: Path) -> None:
    assert prepared(tmp_path, "questions", "--train-on=all").meta["kind"] == "chat"
