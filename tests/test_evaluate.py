"""evaluate.py: the sums that a plain computation gives, whatever window, batch or tokenizer; and lm_eval's choices."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Call, run_script
from model_helpers import random_model
from test_export import save_run
from test_load import hf_bytes
from torch.nn import functional as F

import evaluate as script
from nib.common.exits import InputError
from nib.generation.scoring import Window, ending_window, read_choices, score_choices, score_texts, windows
from nib.tokenizer.load import make_tokenizer
from nib.tokenizer.tokenizer import CharTokenizer, train_bpe

BYTE = make_tokenizer("byte")


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 10, 31, 64])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_each_token_is_predicted_once_from_as_much_as_there_is(length: int, stride: int) -> None:
    context, ids = 8, list(range(length))
    predicted = []
    for window in windows(ids, context, stride):
        assert len(window.ids) <= context + 1
        for place in range(window.first, len(window.ids)):
            predicted.append(window.ids[place])
            assert place >= min(window.ids[place], context - stride + 1), "too little before it"
    assert predicted == ids[1:]


def plain_nats(model: torch.nn.Module, ids: list[int], context: int, stride: int) -> float:
    """One token at a time, from the front of its window."""
    total, begin = 0.0, 0
    for place in range(1, len(ids)):
        while place > begin + context:
            begin += stride
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:place]]))[0][0, -1]
        total -= float(F.log_softmax(logits, dim=-1)[ids[place]])
    return total


@pytest.mark.parametrize(("context", "stride", "batch"), [(24, 12, 3), (8, 8, 1), (8, 1, 7), (10, 4, 64)])
def test_loss_is_that_of_a_plain_computation(context: int, stride: int, batch: int) -> None:
    model = random_model(vocab_size=257)
    texts = ["one two three, and so on to the end of this text", "x", "short one", "中文 and é"]
    ids = [BYTE.encode(text) for text in texts]
    score = score_texts(model, BYTE, ids, context=context, stride=stride, batch=batch)
    expected = sum(plain_nats(model, [256, *each], context, stride) for each in ids)
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.texts == 4 and score.bytes == score.tokens == sum(len(text.encode()) for text in texts)
    assert score.loss == pytest.approx(expected / score.tokens) and score.perplexity == pytest.approx(
        math.exp(score.loss)
    )
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / score.bytes)
    few = score_texts(model, BYTE, ids, context=context, stride=stride, batch=batch, max_tokens=50)
    assert few.tokens == 50 and few.texts == 3


def test_without_an_end_of_text_the_first_character_is_not_counted() -> None:
    tokenizer = CharTokenizer("abcé")
    score = score_texts(random_model(vocab_size=4), tokenizer, [tokenizer.encode("éab")], context=8, stride=4, batch=2)
    assert (score.tokens, score.bytes) == (2, 2)


def test_several_models_and_data_side_by_side(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    save_run(tmp_path / "out/a", random_model(vocab_size=257), settings={"dataset": "words"})
    theirs = hf_bytes(tmp_path / "b", "Llama")
    (tmp_path / "notes.txt").write_text("line 1 of text 2 counts 3\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    command = ["a", "b", "--data=words", "--data=notes.txt", "--data=rows.jsonl", "--max-tokens=500", "--stride=20"]
    done = run_script("evaluate.py", *command, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["words", "notes.txt", "rows.jsonl"]
    assert [(each["model"], each["data"]) for each in results] == [(model, data) for model in "ab" for data in names]
    assert [each["tokens"] for each in results[:3]] == [500, 26, 6] and results[2]["texts"] == 2
    assert results[0]["context"] == 24 and results[3]["context"] == 64 and results[0]["stride"] == 20
    ids = [256, *BYTE.encode("line 1 of text 2 counts 3\n")]
    with torch.no_grad():
        logits = theirs(torch.tensor([ids[:-1]])).logits[0]
    assert results[4]["loss"] == pytest.approx(float(F.cross_entropy(logits, torch.tensor(ids[1:]))), rel=1e-5)

    after = ["--max-tokens=500", "--stride=20", "--data", "words", "notes.txt", "rows.jsonl"]  # as of a shell's *.txt
    shown = run_script("evaluate.py", "a", "b", *after, cwd=tmp_path).stdout.splitlines()
    assert shown[0].split() == script.TEXT_COLUMNS and len(shown) == 7
    assert shown[5].split()[4:7] == [f"{results[4][key]:.4f}" for key in ("loss", "perplexity", "bits_per_byte")]
    # A file and a dataset of the same name: a name with an extension or a slash is the file.
    (tmp_path / "own").mkdir()
    (tmp_path / "own/data").mkdir()
    shutil.copytree(corpus / "data/words", tmp_path / "own/data/notes.txt")
    (tmp_path / "own/notes.txt").write_text("line 1 of text 2 counts 3\n")
    done = run_script("evaluate.py", str(tmp_path / "out/a"), "--data=notes.txt", "--json", cwd=tmp_path / "own")
    assert json.loads(done.stdout)["tokens"] == 26
    # Without --data: the validation split of the dataset a run was trained on; "whole" is what meta.json says.
    own = json.loads(run_script("evaluate.py", "--json", cwd=tmp_path).stdout)
    meta = json.loads((corpus / "data/words/meta.json").read_text())
    assert own["bytes"] == own["tokens"] == meta["bytes"]["val"] and own["texts"] == meta["documents"]["val"]


def test_another_tokenizer_sees_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    tokenizer = train_bpe([(corpus / "texts/00.txt").read_text()], 300)
    save_run(tmp_path / "out/a", random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    done = run_script("evaluate.py", "a", "--data=words", "--json", cwd=tmp_path)
    meta = json.loads((corpus / "data/words/meta.json").read_text())
    found = json.loads(done.stdout)
    assert found["bytes"] == meta["bytes"]["val"] and found["tokens"] < 0.7 * found["bytes"]


QUESTIONS = [
    {"context": f"Question {number}: what is {number} and {number + 1}?",
     "endings": [f"It is {number + other}, or so it seems." if other % 2 else f"{other}" for other in range(4)],
     "label": number % 4}
    for number in range(30)
]  # fmt: skip


def write_task(directory: Path) -> Path:
    path = directory / "task.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


def test_choices_are_scored_by_their_own_tokens(tmp_path: Path) -> None:
    model = random_model(vocab_size=257, block_size=128)
    save_run(tmp_path / "out/a", model)
    write_task(tmp_path)
    results = []
    for batch in ("1", "7"):
        done = run_script("evaluate.py", "--data=task.jsonl", "--json", f"--batch-size={batch}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0] == results[1]
    plain = normalized = 0
    for question in QUESTIONS:
        values = []
        for ending in question["endings"]:
            ids = BYTE.encode(question["context"] + " " + ending)
            with torch.no_grad():
                log_probs = F.log_softmax(model(torch.tensor([ids[:-1]]))[0][0], dim=-1)
            first = len(question["context"])
            values.append(sum(float(log_probs[place - 1, ids[place]]) for place in range(first, len(ids))))
        per_character = [value / len(ending) for value, ending in zip(values, question["endings"], strict=True)]
        plain += values.index(max(values)) == question["label"]
        normalized += per_character.index(max(per_character)) == question["label"]
    found = results[0]
    assert (found["accuracy"], found["accuracy_norm"], found["questions"]) == (plain / 30, normalized / 30, 30)
    assert plain != normalized, "a task in which the norm makes no difference tells nothing"
    assert found["stderr"] == pytest.approx(math.sqrt(plain / 30 * (1 - plain / 30) / 29))
    assert "accuracy_norm" in run_script("evaluate.py", "--data=task.jsonl", cwd=tmp_path).stdout


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_jsonl_ends_at_a_line_feed_only(sign: str, end: str, tmp_path: Path) -> None:
    questions = [{**question, "context": f"one{sign}two"} for question in QUESTIONS[:3]]
    lines = [json.dumps(question, ensure_ascii=False) + end for question in questions]
    path = tmp_path / "task.jsonl"
    path.write_bytes(("\ufeff" + "".join(lines)).encode())
    assert read_choices(path) == questions


@pytest.mark.parametrize("name", ["task.jsonl", "task.JSONL.gz", "task.jsonlines", "task.ndjson.xz", "task.json"])
def test_questions_of_joined_and_packed_files_are_read(name: str, tmp_path: Path) -> None:
    lines = "".join("\ufeff" + json.dumps(question) + "\n\n" for question in QUESTIONS).encode()
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)(lines)
    (tmp_path / name).write_bytes(packed)
    assert read_choices(tmp_path / name) == QUESTIONS


def test_questions_of_a_json_array_are_read(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps(QUESTIONS, indent=1))
    assert read_choices(tmp_path / "task.json") == QUESTIONS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (rb'{"context": "a \ud800", "endings": ["b", "c"], "label": 0}', "U+D800 is a lone surrogate. Correct it"),
        (rb'{"context": "a", "endings": ["b", "c \udfff"], "label": 0}', "U+DFFF is a lone surrogate. Correct it"),
        (b'{"context": "\xff", "endings": ["b", "c"], "label": 0}', 'not {"context": TEXT'),
        (b'{"context": "a", "endings": ["b", "c"], "label": "' + b"9" * 5000 + b'"}', 'not {"context": TEXT'),
        (b'{"context": "a", "endings": ["b", "c"], "label": ' + b"9" * 5000 + b"}", 'not {"context": TEXT'),
        (b"[" * 9999, 'not {"context": TEXT'),
    ],
)
def test_a_wrong_question_is_named_by_its_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(json.dumps(QUESTIONS[0]).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(InputError) as found:
        read_choices(path)
    assert f"{path}, line 3: {message}" in str(found.value)


def test_lm_evaluation_harness_finds_the_same_through_the_exported_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason='pip install "lm_eval[hf]"')
    lm_eval = pytest.importorskip("lm_eval", reason='pip install "lm_eval[hf]"')
    from lm_eval.tasks import TaskManager

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    model = random_model(vocab_size=257, block_size=128)
    save_run(tmp_path / "out/a", model)
    path = write_task(tmp_path)
    assert run_script("export.py", "a", "hf", cwd=tmp_path).returncode == 0
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: context\ndoc_to_choice: endings\ndoc_to_target: label\n"
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    found = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={tmp_path / 'hf'},dtype=float32", tasks=["mine"], device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=0,
    )["results"]["mine"]  # fmt: skip
    ours = json.loads(run_script("evaluate.py", "hf", "--data=task.jsonl", "--json", cwd=tmp_path).stdout)
    assert (found["acc,none"], found["acc_norm,none"]) == (ours["accuracy"], ours["accuracy_norm"])


def test_of_an_ending_of_one_token_after_nothing_nothing_is_predicted() -> None:
    question = {"context": "", "endings": ["a", "b"], "label": 0}
    found = score_choices(random_model(vocab_size=3), CharTokenizer("abc"), [question], 8)
    assert (found["questions"], found["accuracy"]) == (1, 1), "both have probability 1, and the first is taken"


def test_the_token_that_begins_an_ending_is_the_endings() -> None:
    tokenizer = train_bpe(["the end the end the end"] * 9, 280)
    for context, ending in (("the", "end"), ("the ", "end"), ("the", " end"), ("the  ", " end")):
        window = ending_window(tokenizer, context, ending, 64, 280)
        assert tokenizer.decode(window.ids[window.first :]).strip() == "end", (context, ending)
    assert ending_window(tokenizer, "", "end", 64, 280).ids[0] == tokenizer.end_of_text
    cut = ending_window(BYTE, "a" * 100, "b" * 10, 20, 257)
    assert cut == Window(list(b"a" * 10 + b" " + b"b" * 10), 10)
    assert ending_window(BYTE, "a", "b" * 100, 20, 257) == Window(list(b"b" * 21), 1)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("a", "does not say what it was trained on. Give --data"),
        ("a --data=nothing", "there is no dataset 'nothing'"),
        ("a --data=empty.txt", "there is no text in empty.txt"),
        ("a --data=bad.jsonl", 'bad.jsonl, line 2: not {"context": TEXT'),
        ("a --data=binary.txt", "is not UTF-8"),
        ("a --data=notes.txt --data=task.jsonl --tokens", "task.jsonl holds questions"),
        ("a --data=empty.txt --context=4 --stride=5", "--stride 5 is above --context 4"),
        ("none", "there is no run or checkpoint none"),
    ],
)
def test_a_mistake_is_one_line(call: Call, command: str, message: str, tmp_path: Path) -> None:
    save_run(tmp_path / "out/a", random_model(vocab_size=257))
    write_task(tmp_path)
    (tmp_path / "notes.txt").write_text("a text that is scored if nothing is wrong")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    rows = [QUESTIONS[0], QUESTIONS[1] | {"label": 9}]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call(script.main, *command.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert message in done.stderr
