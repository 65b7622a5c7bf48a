"""Hugging Face directories: the same logits as transformers', and a refusal by name of all that cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import (
    MODELS,
    change_config,
    change_tensors,
    exported,
    greedy,
    load_ours,
    make_model,
    save_model,
    their_logits,
    weights_of,
)
from model_helpers import random_tokens
from safetensors.torch import load_file

from nib.common.exits import InputError
from nib.formats.huggingface import HuggingFaceModel
from nib.tokenizer.huggingface import write_tokenizer
from nib.tokenizer.tokenizer import CharTokenizer


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_text_equal_transformers(name: str, tmp_path: Path) -> None:
    kind, settings = MODELS[name]
    theirs = make_model(kind, **settings)
    theirs.save_pretrained(tmp_path)
    ours = load_ours(tmp_path)
    tokens = random_tokens(3, 64)
    with torch.no_grad():
        expected, actual = their_logits(theirs, tokens), ours(tokens)[0]
    # float32 keeps 2^-24 = 6e-8 of a number; sums of some 100 terms in layers of sharp attention lose about a
    # factor of 20 more. Any wrong permutation changes the first digit.
    scale = float(expected.abs().max())
    assert scale > 3, "weights too small to show a mistake"
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6 * scale)
    prompt = random_tokens(1, 10, seed=1)
    assert greedy(lambda x: ours(x)[0], prompt, 50) == greedy(lambda x: theirs(x).logits, prompt, 50)


def test_bfloat16_weights_are_read_as_they_are(tmp_path: Path) -> None:
    import transformers

    make_model("Qwen3", head_dim=8).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {weight.dtype for weight in weights_of(tmp_path).values()} == {torch.bfloat16}
    tokens = random_tokens(2, 30)
    expected = their_logits(theirs, tokens)
    with torch.no_grad():
        difference = (load_ours(tmp_path)(tokens)[0] - expected).abs().max()
    assert difference < 5e-6 * expected.abs().max(), "bfloat16 numbers are float32 numbers too"
    write_tokenizer(CharTokenizer("".join(map(chr, range(40, 80)))), tmp_path, 64)
    exported(tmp_path, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


def test_shards_are_put_together(tmp_path: Path) -> None:
    theirs = make_model("Llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    tokens = random_tokens(1, 20)
    with torch.no_grad():
        difference = (load_ours(tmp_path)(tokens)[0] - theirs(tokens).logits).abs().max()
    assert difference < 1e-4


def test_names_as_in_the_files_of_gpt2_itself(tmp_path: Path) -> None:
    """They lack the first part of each name and hold the causal mask, as the hub's gpt2 does."""
    theirs = make_model("GPT2")
    theirs.save_pretrained(tmp_path)

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)

    change_tensors(tmp_path, shorten)
    tokens = random_tokens(1, 20)
    with torch.no_grad():
        assert (load_ours(tmp_path)(tokens)[0] - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "own"), [
    ("Mistral", dict(num_attention_heads=8, num_key_value_heads=8, sliding_window=None)),
    ("Qwen3", dict(hidden_size=128, num_attention_heads=32, num_key_value_heads=32, head_dim=128)),
    ("Starcoder2", dict(num_key_value_heads=2)),
])  # fmt: skip
def test_what_a_config_leaves_out_is_the_default_of_its_class(kind: str, own: dict[str, Any], tmp_path: Path) -> None:
    theirs = make_model(kind, **own)
    theirs.save_pretrained(tmp_path)
    change_config(tmp_path, num_key_value_heads="remove", head_dim="remove", architectures=[])
    tokens = random_tokens(1, 20)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (load_ours(tmp_path)(tokens)[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_tied_model_that_was_saved_with_its_head_only_is_read(kind: str, tmp_path: Path) -> None:
    """safetensors.torch.save_model keeps one name of a shared matrix."""
    theirs = make_model(kind, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    embedding = "transformer.wte.weight" if kind == "GPT2" else "model.embed_tokens.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(embedding)}))
    tokens = random_tokens(1, 20)
    with torch.no_grad():
        assert (load_ours(tmp_path)(tokens)[0] - theirs(tokens).logits).abs().max() < 1e-4
    shutil.copytree(tmp_path, tmp_path / "sharded")  # with both names in the index
    (tmp_path / "sharded/model.safetensors").rename(tmp_path / "sharded/a.safetensors")
    names = [*load_file(tmp_path / "sharded/a.safetensors"), embedding]
    listed = json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")})
    (tmp_path / "sharded/model.safetensors.index.json").write_text(listed)
    with torch.no_grad():
        assert (load_ours(tmp_path / "sharded")(tokens)[0] - theirs(tokens).logits).abs().max() < 1e-4
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(41, 32)}))
    refused(tmp_path, r"has the shape \[41, 32\]")
    change_config(tmp_path, tie_word_embeddings=False)
    refused(tmp_path, f"{embedding} is missing")


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DDP of a compiled model": lambda name: f"module._orig_mod.{name}",
    "compiled DDP": lambda name: f"_orig_mod.module.{name}",
    "compiled blocks": lambda name: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name),
    "checkpointed blocks of FSDP": lambda name: re.sub(
        r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name
    ),
    "inside a module": lambda name: f"model.{name}",
    "inside modules": lambda name: f"module.base_model.model.{name}",
}


@pytest.mark.parametrize("how", WRAPPED)
def test_names_of_a_model_that_was_saved_in_a_wrapper_are_read(how: str, copy: Path) -> None:
    before = weights_of(copy)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[WRAPPED[how](name)] = tensors.pop(name)

    change_tensors(copy, rename)
    after = weights_of(copy)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    change_tensors(copy, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    if "inside" in how:
        refused(copy, "is missing|is not part of")
    elif "blocks" not in how:
        refused(copy, "model.norm.weight is stored twice")


@pytest.mark.parametrize("left_out", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_tied_model_that_was_saved_inside_a_module_is_read(kind: str, left_out: str, tmp_path: Path) -> None:
    copy = save_model(tmp_path, kind, tie_word_embeddings=True)
    before = weights_of(copy)
    embedding = "transformer.wte.weight" if kind == "GPT2" else "model.embed_tokens.weight"

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[embedding].clone()
        tensors.pop(embedding if "embed" in left_out else left_out)
        for name in list(tensors):
            tensors[f"model.{name}"] = tensors.pop(name)

    change_tensors(copy, rename)
    after = weights_of(copy)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_two_models_in_one_file_are_refused(copy: Path) -> None:
    def twice(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"student.{name}"], tensors[f"teacher.{name}"] = tensors[name].clone(), tensors.pop(name)

    change_tensors(copy, twice)
    refused(copy, "the tensor model.embed_tokens.weight is missing")


def test_a_config_of_transformers_4_is_read(tmp_path: Path) -> None:
    expected = HuggingFaceModel(save_model(tmp_path, "Qwen3", rope_parameters={"rope_theta": 5e5})).model_config
    change_config(tmp_path, rope_parameters="remove", rope_theta=5e5, rope_scaling=None, architectures="remove")
    assert HuggingFaceModel(tmp_path).model_config == expected
    assert expected["rope_base"] == 5e5


REFUSED: dict[str, tuple[dict, str]] = {
    "another architecture": (dict(architectures=["MambaForCausalLM"]), "MambaForCausalLM is not one of GPT2LMHeadM"),
    "two architectures": (dict(architectures=["A", "B"]), "A, B is not one of"),
    "no architecture": (dict(architectures="remove", model_type="bert"), "bert is not one of"),
    "architecture of a wrong kind": (dict(architectures={"a": 1}), "is not one of"),
    "rope by layer": (dict(rope_parameters={"full_attention": {"rope_theta": 1.0}}), "rope_parameters = "),
    "rope on a part": (dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary"),
    "rope base": (dict(rope_parameters={"rope_theta": "1e4"}), "rope_theta in config.json is '1e4'"),
    "activation": (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "activation of a wrong kind": (dict(hidden_act=["silu"]), "hidden_act = "),
    "quantized": (dict(quantization_config={"bits": 4}), "quantization_config"),
    "code of its own": (dict(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "mixed layers": (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types of several kinds"),
    "softcapping": (dict(final_logit_softcapping=30.0), "final_logit_softcapping = 30"),
    "biases that are not there": (dict(attention_bias=True), "q_proj.bias is missing"),
    "a number that is none": (dict(hidden_size="32"), "hidden_size in config.json is '32'"),
    "a number that is true": (dict(num_hidden_layers=True), "num_hidden_layers"),
    "a huge context": (dict(max_position_embeddings=10**12), "max_position_embeddings"),
    "huge heads": (dict(num_attention_heads=2**20, head_dim=2**20), "num_attention_heads times head_dim"),
    "a huge table of positions": (dict(max_position_embeddings=2**20, head_dim=512), "positions|head_dim"),
    "a huge width": (dict(hidden_size=2**23, head_dim=8), "embed_tokens.weight has the shape"),
    "very many layers": (dict(num_hidden_layers=10**6), "no weights for 1000000 layers"),
    "more layers": (dict(num_hidden_layers=3), r"layers\.2\..* is missing"),
    "fewer layers": (dict(num_hidden_layers=1), r"layers\.1\..* is not part of"),
    "no width": (dict(hidden_size="remove"), "lacks hidden_size"),
    "heads that do not divide": (dict(num_attention_heads=5, head_dim="remove"), "not divisible by n_head 5"),
    "another vocabulary": (dict(vocab_size=41), r"shape \[40, 32\], but the model's settings need \[41, 32\]"),
    "tied with another head": (dict(tie_word_embeddings=True), "lm_head.weight is another matrix"),
    "tying of a wrong kind": (dict(tie_word_embeddings="no"), "not true or false"),
    "infinite epsilon": (dict(rms_norm_eps=float("inf")), "rms_norm_eps"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def refused(directory: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as found:
        load_ours(directory)
    assert "\n" not in str(found.value) and len(str(found.value)) < 500
    assert str(directory) in str(found.value)


@pytest.mark.parametrize("what", REFUSED)
def test_what_nib_does_not_do_is_refused_by_name(what: str, copy: Path) -> None:
    changes, message = REFUSED[what]
    change_config(copy, **changes)
    refused(copy, message)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("GPT2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        ("GPT2", dict(scale_attn_weights=False), "scale_attn_weights"),
        ("GPT2", dict(activation_function="silu"), "activation_function = 'silu'"),
        ("Qwen3", dict(attention_bias=True), "attention_bias"),
        ("Qwen3", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "layer_types"),
    ],
)
def test_what_other_architectures_ask_for_is_refused(kind: str, changes: dict, message: str, tmp_path: Path) -> None:
    refused(save_model(tmp_path, kind, **changes), message)


def pickled(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")


def index(path: Path, name: str) -> None:
    (path / "model.safetensors").rename(path / "other")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))


def header(path: Path, length: int, text: bytes) -> None:
    (path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text)


def to_int(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (pickled, r"pytorch_model\.bin is pickled and there is no model\.safetensors"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), r"there is no model\.safetensors"),
    "missing shard": (lambda path: index(path, "model-2.safetensors"), r"model-2\.safetensors is missing"),
    "path up": (lambda path: index(path, "../other.safetensors"), "not a file beside it"),
    "absolute path": (lambda path: index(path, "/etc/passwd"), "not a file beside it"),
    "hidden name": (lambda path: index(path, "..safetensors"), "not a file beside it"),
    "index of nothing": (
        lambda path: (index(path, "x"), (path / "model.safetensors.index.json").write_text('{"weight_map": []}')),
        "no weight_map",
    ),
    "index that lies": (
        lambda path: (index(path, "a.safetensors"), shutil.copy(path / "other", path / "a.safetensors"),
                      (path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')),
        "x is not in the shard",
    ),
    "cut short": (lambda path: os.truncate(path / "model.safetensors", 9000), "cannot read model.safetensors"),
    "huge header": (lambda path: header(path, 2**62, b"{}"), "cannot read model.safetensors"),
    "overlapping tensors": (
        lambda path: header(path, 200, json.dumps({
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(200) + b"1234"),
        "cannot read model.safetensors",
    ),
    "empty file": (lambda path: (path / "model.safetensors").write_bytes(b""), "cannot read model.safetensors"),
    "tensor too many": (
        lambda path: change_tensors(path, lambda tensors: tensors.update(extra=torch.zeros(1))), "extra is not part of",
    ),
    "tensor missing": (
        lambda path: change_tensors(path, lambda tensors: tensors.pop("model.norm.weight")), "norm.weight is missing",
    ),
    "wrong shape": (
        lambda path: change_tensors(path, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, 1)})),
        r"model\.norm\.weight has the shape \[32, 1\], but the model's settings need \[32\]",
    ),
    "bias that config.json denies": (
        lambda path: change_tensors(
            path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})),
        "q_proj.bias is not part of",
    ),
    "whole numbers": (lambda path: change_tensors(path, to_int), "lm_head.weight is of type I8"),
    "config that is none": (lambda path: (path / "config.json").write_bytes(b"\x80\x04"), "not a JSON object"),
    "config too deep": (lambda path: (path / "config.json").write_text("[" * 10**5), "not a JSON object"),
    "config is a pipe": (
        lambda path: ((path / "config.json").unlink(), os.mkfifo(path / "config.json")), "it is not a regular file",
    ),
    "weights are a pipe": (
        lambda path: ((path / "model.safetensors").unlink(), os.mkfifo(path / "model.safetensors")), "there is no",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_directory_is_one_line(what: str, copy: Path) -> None:
    damage, message = BROKEN[what]
    damage(copy)
    refused(copy, message)


def test_transformers_is_not_imported(copy: Path) -> None:
    import subprocess
    import sys

    program = (
        "import sys; from model import GPT, GPTConfig; from nib.formats.load import build, open_source, read_config;"
        f"source = open_source({str(copy)!r}); build(source, lambda: GPT(read_config(source, GPTConfig)));"
        "assert 'transformers' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60).returncode == 0
