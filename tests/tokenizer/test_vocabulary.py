"""Ids that end a text, of which a model may have several, and ids that a tokenizer has and its model does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Call
from hf_helpers import save_model
from test_load import in_corpus, tiny_train  # noqa: F401

import evaluate
import export
import prepare_data
import sample
from nib.common.exits import InputError
from nib.formats.checkpoint import open_checkpoint
from nib.generation.engine import generate_text
from nib.generation.request import SamplingSettings
from nib.tokenizer.huggingface import read_tokenizer, write_tokenizer
from nib.tokenizer.load import load_tokenizer, make_tokenizer

WRITE = ["--prompt=ab", "--temperature=0", "--max-new-tokens=5", "--json"]
BYTES, END = 256, 256


def hf_bytes(directory: Path, added: dict[str, bool] | None = None, **config: Any) -> Path:
    """A model of transformers over the 257 ids of bytes; its tokenizer has also the `added` tokens, special or not."""
    save_model(directory, vocab_size=BYTES + 1)
    write_tokenizer(make_tokenizer("byte"), directory, 64)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for id, (token, special) in enumerate((added or {}).items(), start=BYTES + 1):
        content["added_tokens"].append({"id": id, "content": token, "special": special, **flags})
    path.write_text(json.dumps(content))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((directory / name).read_text()) | {"eos_token_id": END}
        (directory / name).write_text(json.dumps(settings | config.get(name.removesuffix(".json"), {})))
    return directory


# ---- ids that end a text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_each_of_several_ids_ends_a_text(file: str, call: Call, tmp_path: Path) -> None:
    hf_bytes(tmp_path / "one")
    done = call(sample.main, "one", *WRITE, cwd=tmp_path)
    (first, *_) = json.loads(done.stdout)["tokens"]
    hf_bytes(tmp_path / "several", **{file: {"eos_token_id": [END, (first + 1) % 256, first]}})
    written = json.loads(call(sample.main, "several", *WRITE, cwd=tmp_path).stdout)
    assert (written["tokens"], written["finish_reason"]) == ([], "end_of_text")
    assert read_tokenizer(tmp_path / "several").end_of_text == END, "that of the data stays one"


@pytest.mark.parametrize("value", [None, [], -1, 5000, [5000, -1, END]])
def test_an_end_that_never_comes_changes_nothing(value: Any, tmp_path: Path) -> None:
    both = {"eos_token_id": value}
    tokenizer = read_tokenizer(hf_bytes(tmp_path / "hf", config=both, generation_config=both))
    assert (tokenizer.end_of_text, tokenizer.stop_ids) == (END, frozenset())


@pytest.mark.parametrize("value", ["</s>", 2.0, True, [1, "</s>"], {"id": 1}])
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_an_end_that_is_no_id_is_one_line(file: str, value: Any, tmp_path: Path) -> None:
    directory = hf_bytes(tmp_path / "hf", **{file: {"eos_token_id": value}})
    with pytest.raises(InputError, match=f"eos_token_id in {file}.json is .*, not a token id or a list. Correct it"):
        read_tokenizer(directory)


@pytest.mark.parametrize("stops", ["x", 10, [-1], [257], [True], ["a"], {"10": 1}])
def test_a_saved_tokenizer_with_wrong_ends_is_one_line(stops: Any, tmp_path: Path) -> None:
    path = make_tokenizer("byte").save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stop_ids": stops}))
    with pytest.raises(InputError, match="its stop_ids are not a list of ids"):
        load_tokenizer(path)


@pytest.mark.parametrize("text", ["{", "[1]", "", "\x00"])
def test_a_broken_generation_config_is_one_line(text: str, call: Call, tmp_path: Path) -> None:
    (hf_bytes(tmp_path / "hf") / "generation_config.json").write_text(text)
    done = call(sample.main, "hf", *WRITE, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("error:")) == (2, 1) and "Traceback" not in done.stderr
    assert "generation_config.json is not a JSON object" in done.stderr


@pytest.mark.usefixtures("in_corpus")
def test_a_tuned_model_ends_its_texts_as_the_one_it_came_from(call: Call, tmp_path: Path) -> None:
    hf_bytes(tmp_path / "hf", generation_config={"eos_token_id": [END, 10, 7]})
    tiny_train("--init_from=hf", "--max_iters=2")
    tiny_train("--init_from=hf", "--max_iters=3")
    saved = open_checkpoint(Path("out/run")).tokenizer()
    assert (saved.end_of_text, saved.stop_ids) == (END, {7, 10})
    assert call(export.main, "out/run", "exported", cwd=tmp_path).returncode == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "exported" / name).read_text())["eos_token_id"] == [END, 7, 10]
    assert read_tokenizer(tmp_path / "exported").stop_ids == {7, 10}


# ---- ids that the model has no embedding for -----------------------------------------------------------------------


def refused(done: Any, what: str) -> None:
    assert (done.returncode, done.stderr.count("error:")) == (2, 1), done.stderr
    assert (
        what in done.stderr and "the model has only the ids 0 to 256" in done.stderr and "Traceback" not in done.stderr
    )


def test_a_prompt_of_ids_beyond_the_model_is_one_line(call: Call, tmp_path: Path) -> None:
    hf_bytes(tmp_path / "hf", {"[PAD]": True, "<think>": False})
    done = call(sample.main, "hf", "--prompt=a[PAD]", cwd=tmp_path)
    refused(done, "the prompt has the token '[PAD]', id 257")
    assert not done.stdout, "the prompt is not printed before it is refused"
    model, tokenizer, _ = sample.load_model([str(tmp_path / "hf")], "cpu", "float32")
    with pytest.raises(InputError, match="id 257"):
        generate_text(model, tokenizer, ["[PAD]"], SamplingSettings())
    refused(call(sample.main, "hf", "--prompt=a", "--prompt=<think>", cwd=tmp_path), "'<think>', id 258")
    assert call(sample.main, "hf", *WRITE, cwd=tmp_path).returncode == 0


def test_a_text_of_ids_beyond_the_model_is_not_scored(call: Call, tmp_path: Path) -> None:
    hf_bytes(tmp_path / "hf", {"[PAD]": True, "<think>": False})
    (tmp_path / "plain.txt").write_text("a text with [PAD]")
    (tmp_path / "added.txt").write_text("a text with <think>")
    question = {"context": "a", "endings": ["b", "<think>"], "label": 0}
    (tmp_path / "task.jsonl").write_text(json.dumps(question))
    assert call(evaluate.main, "hf", "--data=plain.txt", cwd=tmp_path).returncode == 0
    refused(call(evaluate.main, "hf", "--data=added.txt", cwd=tmp_path), "a text has the token '<think>', id 258")
    refused(call(evaluate.main, "hf", "--data=task.jsonl", cwd=tmp_path), "a question has the token '<think>'")


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_what_nib_puts_before_a_text_is_an_id_that_the_model_has(name: str, call: Call, tmp_path: Path) -> None:
    """Of an end or beginning beyond the embedding it makes no use, as of none."""
    hf_bytes(tmp_path / "hf", {"[PAD]": True})
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({name: "[PAD]"}))
    (tmp_path / "plain.txt").write_text("a text")
    (tmp_path / "task.jsonl").write_text(json.dumps({"context": "", "endings": ["b", "cd"], "label": 0}))
    assert call(sample.main, "hf", "--max-new-tokens=2", cwd=tmp_path).returncode == 0
    done = call(evaluate.main, "hf", "--data=plain.txt", "--data=task.jsonl", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text, task = map(json.loads, done.stdout.splitlines())
    assert (text["tokens"], text["bytes"], task["questions"]) == (5, 5, 1), "the first byte is not predicted"


def test_a_token_that_the_user_did_not_write_is_not_to_be_left_out(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_bytes(tmp_path / "hf", {"[PAD]": True})
    (tmp_path / "plain.txt").write_text("a text, " * 40)
    (tmp_path / "hf/tokenizer_config.json").write_text('{"eos_token": "[PAD]"}')
    assert call(prepare_data.main, "plain.txt", "--tokenizer=hf", "--workers=1", cwd=tmp_path).returncode == 0
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(InputError, match=r"'\[PAD\]', id 257, is put before or after a text in data/plain, but .* Add"):
        tiny_train("--init_from=hf", "--dataset=plain", "--block_size=16")
    path = tmp_path / "hf/tokenizer.json"
    single = [{"SpecialToken": {"id": "[PAD]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"[PAD]": {"id": "[PAD]", "ids": [257], "tokens": ["[PAD]"]}}
    added = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": added}))
    for script, options in ((sample, ["--prompt=a"]), (sample, []), (evaluate, ["--data=plain.txt"])):
        done = call(script.main, "hf", *options, cwd=tmp_path)
        refused(done, "the token '[PAD]', id 257, is put before or after ")
        assert "Leave it out" not in done.stderr


def test_a_model_is_tuned_on_data_of_a_larger_tokenizer_that_have_none_of_its_further_ids(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_bytes(tmp_path / "hf", {"[PAD]": True, "<think>": False})
    (tmp_path / "plain.txt").write_text("a text with [PAD], " * 40)
    (tmp_path / "added.txt").write_text("a text with <think>, " * 40)
    for name in ("plain", "added"):
        options = ["--tokenizer=hf", "--val-fraction=0.2", "--workers=1"]
        assert call(prepare_data.main, f"{name}.txt", *options, cwd=tmp_path).returncode == 0
    monkeypatch.setattr(sys, "argv", ["train.py"])
    tiny_train("--init_from=hf", "--max_iters=2", "--dataset=plain", "--block_size=16", "--sample_interval=1")
    refused(call(sample.main, "out/run", "--prompt=[PAD]", cwd=tmp_path), "'[PAD]', id 257")
    assert call(evaluate.main, "out/run", cwd=tmp_path).returncode == 0
    with pytest.raises(InputError, match="data/added has the token '<think>', id 258, but the model has only") as found:
        tiny_train("--init_from=hf", "--max_iters=2", "--dataset=added", "--block_size=16", "--out_dir=out/other")
    assert "--tokenizer=hf" not in str(found.value), "which the data were prepared with"
