"""look.py as a user meets it: the page that it writes, and what it says about mistakes."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Call
from hf_helpers import save_model
from model_helpers import LLAMA, random_model, randomise

import evaluate
import look
from model import GPT, GPTConfig
from nib.formats.checkpoint import write_checkpoint
from nib.look.page import make_page
from nib.look.snapshot import take_snapshot
from nib.tokenizer.huggingface import write_tokenizer
from nib.tokenizer.load import make_tokenizer
from nib.tokenizer.tokenizer import CharTokenizer, Tokenizer

BYTES, CHARACTERS = make_tokenizer("byte"), CharTokenizer("\n abcdefgh")
HOSTILE = "</script><script>window.hacked=1</script><!--<img src=x onerror=window.hacked=1>"


def make_run(directory: Path, tokenizer: Tokenizer, steps: tuple[int, ...] = (3,), **changes: Any) -> Path:
    """A run with a checkpoint of other random weights at each of `steps`."""
    sizes = dict(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
    for step in steps:
        model = GPT(GPTConfig(**LLAMA | sizes | changes))
        randomise(model, seed=step)
        state = {"step": step, "model_config": asdict(model.config)}
        write_checkpoint(directory / "checkpoints", model.state_dict(), {}, state, tokenizer)
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    make_run(place / "out/chars", CHARACTERS, (2, 10, 30))
    make_run(place / "out/long", BYTES, block_size=20000, n_layer=1)
    make_run(place / "out/bytes", BYTES)  # the newest
    return place


def read_page(path: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def array(value: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(value["data"]), value["type"]).reshape(value["shape"])


def test_the_page_holds_the_prompt_and_what_sample_writes(place: Path, call: Call) -> None:
    import sample

    done = call(look.main, "bytes", "--prompt=hé!", "--max-new-tokens=9", cwd=place)
    assert done.returncode == 0 and "look.html: 13 tokens" in done.stdout and not done.stderr
    data = read_page(place / "look.html")
    written = json.loads(call(sample.main, "bytes", "--prompt=hé!", "--max-new-tokens=9", "--json", cwd=place).stdout)
    assert data["tokens"] == [*"hé!".encode(), *written["tokens"]] and data["prompt_tokens"] == 4
    assert data["names"][str(ord("h"))] == ["h"] and data["names"][str(0xC3)] == ["C3", "bytes"]
    (snapshot,) = data["snapshots"]
    assert not snapshot["missing"] and array(snapshot["maps"]).shape == (8, 13 * 14 // 2)


def test_surprise_is_what_evaluate_prints(place: Path, call: Call) -> None:
    (place / "text").write_text("abc hgf\nabc")
    assert not call(look.main, "chars", "--prompt=FILE:text", "--max-new-tokens=0", cwd=place).returncode
    data = read_page(place / "look.html")
    printed = call(evaluate.main, "chars", "--data=text", "--tokens", "--json", cwd=place).stdout.splitlines()
    *tokens, total = map(json.loads, printed)
    surprise = array(data["snapshots"][0]["surprise"])
    assert [each["text"] for each in tokens] == list("bc hgf\nabc")
    assert [each["id"] for each in tokens] == data["tokens"][1:]
    assert np.allclose([each["surprise"] for each in tokens], surprise, atol=1e-6)
    assert abs(total["loss"] - surprise.mean()) < 1e-6
    table = call(evaluate.main, "chars", "--data=text", "--tokens", cwd=place).stdout.splitlines()
    assert table[0].split() == [f"{surprise[0]:.4f}", "'b'"] and len(table) == 12
    (place / "questions.jsonl").write_text('{"context": "a", "endings": ["b", "c"], "label": 0}\n')
    done = call(evaluate.main, "chars", "--data=questions.jsonl", "--tokens", cwd=place)
    assert done.returncode == 2 and "Leave out --tokens" in done.stderr


def test_checkpoints_are_shown_in_the_order_of_training(place: Path, call: Call) -> None:
    step = place / "out/chars/checkpoints/step-00000002/model.safetensors"
    whole = step.read_bytes()
    arguments = ("chars/checkpoints/step-00000010", "--prompt=abc", "--max-new-tokens=2", "--checkpoints")
    assert not call(look.main, *arguments, cwd=place).returncode
    data = read_page(place / "look.html")
    assert [each["step"] for each in data["snapshots"]] == [2, 10, 30] and data["shown"] == 1
    surprise = [tuple(array(each["surprise"])) for each in data["snapshots"]]
    assert len(set(surprise)) == 3
    step.write_bytes(whole[:-4])
    done = call(look.main, *arguments, cwd=place)
    step.write_bytes(whole)
    assert not done.returncode and "step-00000002 is skipped" in done.stderr
    assert [each["step"] for each in read_page(place / "look.html")["snapshots"]] == [10, 30]


def test_of_many_checkpoints_twelve_are_shown(tmp_path: Path, call: Call) -> None:
    make_run(tmp_path / "out/run", CHARACTERS, tuple(range(1, 31)), n_layer=1)
    assert not call(look.main, "--prompt=abc", "--max-new-tokens=0", "--checkpoints", cwd=tmp_path).returncode
    steps = [each["step"] for each in read_page(tmp_path / "look.html")["snapshots"]]
    assert len(steps) == 12 and steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == 30


def test_a_hugging_face_directory_is_shown(place: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save_model(place / "hf", "Llama", vocab_size=257, num_key_value_heads=2)
    write_tokenizer(BYTES, directory, block_size=64)
    capsys.readouterr()
    done = call(look.main, "hf", "--prompt=<|endoftext|>a🙂", "--max-new-tokens=3", cwd=place)
    assert done.returncode == 0, done.stderr
    data = read_page(place / "look.html")
    names = [data["names"][str(id)] for id in data["tokens"]]
    assert names[:3] == [["<|endoftext|>", "special"], ["a"], ["F0", "bytes"]] and not data["snapshots"][0]["missing"]
    done = call(look.main, "hf", "--prompt=Hello", "--checkpoints", cwd=place)
    assert done.returncode == 2 and "Leave out --checkpoints" in done.stderr


MISTAKES = {
    "no prompt": ([], "there is no text to look at. Give --prompt"),
    "an empty prompt": (["--prompt="], "there is no text to look at. Give --prompt"),
    "an empty file": (["--prompt=FILE:empty"], "there is no text to look at. Give --prompt"),
    "no such file": (["--prompt=FILE:none"], "cannot read the prompt from none"),
    "a prompt beyond the context": (["--prompt=" + "a" * 65], "the prompt has 65 tokens, the context 64. Shorten it"),
    "10,000 tokens": (["long", "--prompt=" + "a" * 10000], "10016 tokens are too many for a page of 4 heads. Give at"),
    "no such model": (["none", "--prompt=a"], "there is no run or checkpoint none"),
    "a character without an id": (["chars", "--prompt=é"], "is not among the 10 of this char tokenizer"),
    "an output that is a directory": (["--prompt=a", "--output=out"], "cannot write out: Is a directory"),
    "an output in no directory": (["--prompt=a", "--output=no/x.html"], "cannot write no/x.html: No such file"),
    "an output under a file": (["--prompt=a", "--output=empty/x.html"], "cannot write empty/x.html: Not a directory"),
    "two models": (["bytes", "chars", "--prompt=a"], "unexpected argument 'chars'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, place: Path, call: Call) -> None:
    arguments, message = MISTAKES[mistake]
    (place / "empty").write_text("")
    (place / "look.html").unlink(missing_ok=True)
    done = call(look.main, *arguments, cwd=place)
    assert done.returncode == 2 and message in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not done.stdout and not (place / "look.html").exists()


def test_no_run_at_all_is_one_line(tmp_path: Path, call: Call) -> None:
    done = call(look.main, "--prompt=a", cwd=tmp_path)
    assert done.returncode == 2 and "there is no run under out/" in done.stderr


def test_a_full_context_gets_no_continuation(place: Path, call: Call) -> None:
    assert not call(look.main, "--prompt=" + "a" * 60, cwd=place).returncode
    assert len(read_page(place / "look.html")["tokens"]) == 64


def test_no_prompt_can_end_the_data(place: Path, call: Call) -> None:
    assert not call(look.main, "--prompt=" + HOSTILE[:60], "--max-new-tokens=0", cwd=place).returncode
    data = read_page(place / "look.html")
    assert "".join(data["names"][str(id)][0] for id in data["tokens"]) == HOSTILE[:60]


def test_a_page_of_64_tokens_and_270_heads_is_under_2_mb() -> None:
    sizes = dict(vocab_size=4000, block_size=64, n_layer=30, n_head=9, n_kv_head=3, n_embd=72)
    model = random_model(**LLAMA | sizes)
    tokenizer = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 4000))))
    ids = torch.randperm(4000)[:64].tolist()
    about = {"model": "x", "parameters": 1, "config": asdict(model.config), "prompt_tokens": 48, "ended": False,
             "vocab_size": 4000, "shown": 0, "defaults": {"temperature": 0.8, "top_k": 200, "top_p": 1.0}}  # fmt: skip
    page = make_page(ids, tokenizer, [take_snapshot(model, ids, tokenizer) | {"step": 0}], about)
    assert len(page.encode()) < 1_400_000
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\(|<link|src=", page)


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['look.py', '--help']; import look\ntry: look.main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'model'} & set(sys.modules)"
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--checkpoints" in done.stdout, done.stderr
    assert time.perf_counter() - begin < 5
