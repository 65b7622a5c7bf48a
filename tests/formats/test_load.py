"""Models and data from elsewhere, through the scripts: Hugging Face directories, nanoGPT's files, chats, Parquet."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_script
from data_helpers import prepared, run, write_jsonl
from hf_helpers import exported, greedy, make_model, their_logits, weights_of
from model_helpers import random_tokens
from test_train import TINY

import sample
import train as train_script
from model import GPT, GPTConfig
from nib.common.exits import InputError
from nib.common.hub import is_hub_name
from nib.data.nanogpt import read_meta
from nib.formats.checkpoint import open_checkpoint
from nib.formats.load import build, open_source, read_config
from nib.formats.nanogpt import NanoGPTCheckpoint
from nib.tokenizer.huggingface import write_tokenizer
from nib.tokenizer.load import make_tokenizer

# ---- Hugging Face --------------------------------------------------------------------------------------------------


def hf_bytes(directory: Path, kind: str = "Llama", **settings: Any) -> Any:
    """A model of transformers over the 257 ids of bytes, in `directory` with its tokenizer."""
    theirs = make_model(kind, vocab_size=257, **settings)
    theirs.save_pretrained(directory)
    write_tokenizer(make_tokenizer("byte"), directory, 64)
    return theirs


def test_sample_writes_what_transformers_writes(tmp_path: Path) -> None:
    theirs = hf_bytes(tmp_path / "hf", "Qwen3", head_dim=8)
    done = run_script(
        "sample.py", "hf", "--prompt=abc", "--temperature=0", "--max-new-tokens=50", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    tokens = json.loads(done.stdout)["tokens"]
    assert tokens == greedy(lambda x: theirs(x).logits, torch.tensor([list(b"abc")]), 50)[: len(tokens)]
    assert len(tokens) > 20 and sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def tiny_train(*arguments: str) -> int:
    options = [option for option in TINY if not option.startswith(("--n_", "--block_size"))]
    return train_script.train(train_script.read_settings([*options, *arguments]))


@pytest.fixture
def in_corpus(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(corpus / "data")
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY])


def losses(run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Qwen3", "Arcee"])
def test_fine_tuning_an_imported_model_lowers_its_loss_goes_on_and_exports_as_the_same(
    kind: str, in_corpus: None
) -> None:
    theirs = hf_bytes(Path("hf"), kind)
    tiny_train("--init_from=hf", "--max_iters=12", "--learning_rate=1e-2", "--schedule=constant")
    first = losses("out/run")
    assert first[-1] < first[0] - 1
    tiny_train("--init_from=hf", "--max_iters=14", "--learning_rate=1e-2", "--schedule=constant")
    assert len(losses("out/run")) == 14
    saved, source = open_checkpoint(Path("out/run")), open_source("hf")
    assert GPTConfig(**saved.model_config) == GPTConfig(**source.model_config)
    assert exported(Path("out/run"), Path("tuned")) == type(theirs).__name__


def test_a_model_with_spare_ids_is_fine_tuned_and_one_with_other_ids_is_not(in_corpus: None) -> None:
    make_model("Llama", vocab_size=320).save_pretrained("hf")
    write_tokenizer(make_tokenizer("byte"), Path("hf"), 64)
    tiny_train("--init_from=hf", "--max_iters=2")
    tiny_train("--init_from=hf", "--max_iters=3")  # resumed
    content = json.loads(Path("hf/tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    Path("hf/tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"hf has 320 token ids, data/words 257. Prepare the data with --tokenizer=hf"):
        tiny_train("--init_from=hf", "--out_dir=out/other")
    make_model("Llama", vocab_size=257).save_pretrained("hf")
    with pytest.raises(InputError, match="hf has another tokenizer than data/words"):
        tiny_train("--init_from=hf", "--out_dir=out/other")
    assert not Path("out/other").exists()


def test_a_hostile_directory_is_one_line_in_every_script(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    hf_bytes(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/pytorch_model.bin")
    for command in ("sample.py hf", "train.py --init_from=hf --dataset=words", "export.py hf new", "evaluate.py hf"):
        done = run_script(*command.split(), cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (command, done.stderr)
        assert "pytorch_model.bin is pickled" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "hf"]


def test_names_of_the_hub() -> None:
    for name in ("gpt2", "gpt2-xl", "HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-0.6B"):
        assert is_hub_name(name)
    for name in ("gpt3", "out/smal", "./a/b", "/a/b", "../b", "a/b/c", "nib/x", "small", "a/", "data/x"):
        assert not is_hub_name(name)


def test_a_hub_name_without_the_package_names_the_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="Run: pip install huggingface_hub"):
        open_source("some/model")


def test_a_hub_name_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no-one/nothing is not here, and .*Check the name and the network") as found:
        open_source("no-one/nothing")
    assert "\n" not in str(found.value)


# ---- nanoGPT -------------------------------------------------------------------------------------------------------


def nanogpt_checkpoint(path: Path, bias: bool, prefix: str = "_orig_mod.", **changes: Any) -> Any:
    """A ckpt.pt as nanoGPT's train.py writes it, of the weights of a GPT-2 of transformers, which is returned."""
    theirs = make_model("GPT2", activation_function="gelu", vocab_size=65)
    weights = {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") and not bias:
                parameter.zero_()
                continue
            is_matrix = parameter.ndim == 2 and ".h." in name
            weights[prefix + name] = parameter.T.contiguous() if is_matrix else parameter
    weights[prefix + "lm_head.weight"] = theirs.transformer.wte.weight
    weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
    arguments = dict(n_layer=2, n_head=4, n_embd=32, block_size=64, bias=bias, vocab_size=65, dropout=0.1)
    content = {"model": weights, "optimizer": {"state": {}, "param_groups": []}, "model_args": arguments,
               "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "letters"}}  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    torch.save(content | changes, path)
    return theirs


LETTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def write_meta(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tables = {"vocab_size": 65, "itos": dict(enumerate(LETTERS)), "stoi": {c: i for i, c in enumerate(LETTERS)}}
    (directory / "meta.pkl").write_bytes(pickle.dumps(tables))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("one_name", [True, False])
def test_a_nanogpt_checkpoint_gives_its_logits(bias: bool, prefix: str, one_name: bool, tmp_path: Path) -> None:
    path = tmp_path / "out-x/ckpt.pt"
    theirs = nanogpt_checkpoint(path, bias, prefix)
    if one_name:
        content = torch.load(path)
        del content["model"][f"{prefix}transformer.wte.weight"]
        torch.save(content, path)
    source = open_source(str(tmp_path / "out-x"))
    ours = build(source, lambda: GPT(read_config(source, GPTConfig))).eval()
    assert ours.config.bias == bias and ours.config.mlp == "gelu"
    tokens = random_tokens(2, 64, vocab_size=65)
    with torch.no_grad():
        expected, actual = their_logits(theirs, tokens), ours(tokens)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


def test_a_nanogpt_checkpoint_is_sampled_and_trained_with_the_letters_of_its_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = nanogpt_checkpoint(Path("out-x/ckpt.pt"), bias=False)
    with pytest.raises(InputError, match=r"has no tokenizer\. Put the meta\.pkl of its dataset beside it"):
        sample.main(["out-x"])
    write_meta(Path("data/letters"))
    assert sample.main(["out-x/ckpt.pt", "--prompt=To be", "--temperature=0", "--max-new-tokens=50"]) == 0
    prompt = torch.tensor([[LETTERS.index(letter) for letter in "To be"]])
    expected = "".join(LETTERS[id] for id in greedy(lambda x: theirs(x).logits, prompt, 50))
    assert capsys.readouterr().out == f"To be{expected}\n"

    ids = np.random.default_rng(0).integers(0, 65, 5000).astype("<u2")
    ids.tofile("data/letters/train.bin")
    ids[:500].tofile("data/letters/val.bin")
    data = prepared(tmp_path, "data/letters", "--shard-tokens=2048")
    assert data.ids("train").tolist() == ids.tolist() and data.ids("val").tolist() == ids[:500].tolist()
    assert data.meta["tokenizer"] == "char" and data.text("val")[:50] == "".join(LETTERS[id] for id in ids[:50])
    tiny_train("--init_from=out-x", "--max_iters=3", "--dataset=out")
    assert losses("out/run")[-1] < losses("out/run")[0]


@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint_is_exported(bias: bool, tmp_path: Path) -> None:
    import transformers

    theirs = nanogpt_checkpoint(tmp_path / "x/ckpt.pt", bias)
    write_meta(tmp_path / "x")
    exported(tmp_path / "x", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = random_tokens(1, 30, vocab_size=65)
    torch.testing.assert_close(their_logits(again, tokens), their_logits(theirs, tokens), rtol=0, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("To be") == [32, 53, 1, 40, 43]


def test_nanogpt_data_without_letters_has_gpt2s_ids(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    ids = np.array([*b"one two", 256, *b"three", 256] * 40, dtype="<u2")
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"web/{split}.bin")
    data = prepared(tmp_path, "web", "--tokenizer=byte")
    assert data.documents("train") == ["one two", "three"] * 40 and data.meta["documents"]["val"] == 80
    np.array([300], dtype="<u2").tofile(tmp_path / "web/val.bin")
    done = run(tmp_path, "web", "--tokenizer=byte", "--out=data/bad")
    assert done.returncode == 2 and b"val.bin has id 300, byte only 257 ids" in done.stderr
    assert not (tmp_path / "data/bad").exists()


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    "content",
    [pickle.dumps({"itos": Evil()}), pickle.dumps(Evil()), b"", b"\x80", pickle.dumps({"itos": {0: "ab"}}),
     pickle.dumps({"itos": {0: "b", 1: "a"}}), pickle.dumps({"itos": {1: "b"}}), pickle.dumps([]),
     b"cposix\nsystem\n(S'touch ran'\ntR."],
)  # fmt: skip
def test_a_pickle_that_is_no_table_of_letters_is_one_line_and_runs_nothing(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("meta.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"holds no table of characters") as found:
        read_meta(Path("meta.pkl"))
    assert "\n" not in str(found.value) and not Path("ran").exists()


BAD_ARGUMENTS = dict(n_layer=2, n_head=4, n_embd=32, block_size=64, bias=True, vocab_size=65)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Evil()}, "is not a nanoGPT checkpoint"),
        ({"model_args": {}}, "vocab_size"),
        ({"model": {}}, "no weights for 2 layers"),
        ({"model": {str(i): torch.zeros(1) for i in range(9)}}, "transformer.wte.weight is missing"),
        ({"model_args": BAD_ARGUMENTS | {"n_embd": 2**23}}, "transformer.wte.weight has the shape"),
        ({"model_args": BAD_ARGUMENTS | {"n_head": "4"}}, "n_head"),
        ({"model_args": BAD_ARGUMENTS | {"n_layer": 1}}, "is not part of"),
    ],
)
def test_another_pt_file_is_one_line_and_runs_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nanogpt_checkpoint(Path("x/ckpt.pt"), bias=True, **changes)
    with pytest.raises(InputError, match=message) as found:
        weights_of(Path("x/ckpt.pt"))
    assert "\n" not in str(found.value) and not Path("ran").exists()
    Path("x/ckpt.pt").write_bytes(b"\x80\x02cposix\nsystem\nq\x00X\t\x00\x00\x00touch ranq\x01\x85q\x02Rq\x03.")
    with pytest.raises(InputError, match="is not a nanoGPT checkpoint"):
        NanoGPTCheckpoint(Path("x/ckpt.pt"))
    assert not Path("ran").exists()


# ---- chats and tables ----------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.\nWhat now?"}]
CHAT_TEXT = "user: Hi\n\nassistant: Hello.\nWhat now?\n"


def test_chat_messages_become_plain_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "image"}, {"type": "text", "text": "i"}]
    rows = [CHAT, [{"from": "user", "value": "Hi"}, CHAT[1]], [{"role": "user", "content": parts}, CHAT[1]]]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    data = prepared(tmp_path, "chat.jsonl", "--tokenizer=byte", "--val-fraction=0")
    assert data.documents("train") == [CHAT_TEXT] * 3
    (tmp_path / "chat.jsonl").write_text(json.dumps({"talk": CHAT}) + "\n")
    data = prepared(tmp_path, "chat.jsonl", "--tokenizer=byte", "--field=talk", "--val-fraction=0")
    assert data.documents("train") == [CHAT_TEXT]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": ["Hi"]}) + "\n")
    done = run(tmp_path, "chat.jsonl", "--tokenizer=byte")
    assert done.returncode == 2 and b"field 'messages' holds list, not text" in done.stderr


def test_a_directory_of_parquet_is_read_without_the_notes_beside_it(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "hub/data").mkdir(parents=True)
    (tmp_path / "hub/README.md").write_text("a card\n")
    for number in range(3):
        table = pyarrow.table({"text": [f"row {number} {index}" for index in range(4)]})
        parquet.write_table(table, tmp_path / f"hub/data/train-{number}.parquet")
    data = prepared(tmp_path, "hub", "--tokenizer=byte", "--val-fraction=0")
    assert data.documents("train") == [f"row {number} {index}" for number in range(3) for index in range(4)]
    write_jsonl(tmp_path / "hub/more.jsonl", ["x"])
    options = ["--tokenizer=byte", "--val-fraction=0"]
    assert prepared(tmp_path, "hub", *options, "--glob=*.jsonl").documents("train") == ["x"]
    parquet.write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "chat.parquet")
    chat = prepared(tmp_path, "chat.parquet", "--tokenizer=byte", "--val-fraction=0")
    assert chat.documents("train") == [CHAT_TEXT]
