"""Adapter directories of peft's: the same logits both ways; what is broken or of another kind is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import change_tensors, load_ours, make_model, save_model, their_logits
from model_helpers import random_tokens, randomise
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from nib.common.exits import InputError
from nib.formats.adapter import AdaptedModel
from nib.formats.export import export, export_adapter
from nib.formats.load import build, open_source, parameter_shapes, read_config
from nib.formats.peft import PeftAdapter, write_peft

TOKENS = random_tokens(2, 24)
GPT2, LLAMA = ("GPT2", {}), ("Llama", dict(num_key_value_heads=2))
LAYERS = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
CONFIG: dict[str, Any] = dict(peft_type="LORA", r=4, lora_alpha=8, base_model_name_or_path="base", bias="none")


def write_adapter(directory: Path, **config: Any) -> Path:
    """An adapter of the attention of a Llama of two layers, as peft writes it."""
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    generator, tensors = torch.Generator().manual_seed(1), {}
    for layer in range(2):
        for name, (rows, columns) in LAYERS.items():
            start = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{start}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / 4
            tensors[f"{start}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


def adapted(base: Path, adapter: Path) -> GPT:
    source = open_source(str(base), adapter=str(adapter))
    config = read_config(source, GPTConfig)
    return build(source, lambda: GPT(config)).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, settings = LLAMA
    return save_model(tmp_path_factory.mktemp("llama") / "base", kind, **settings)


@pytest.mark.parametrize(("kind", "settings"), [GPT2, LLAMA], ids=["GPT-2", "Llama"])
def test_an_adapter_gives_the_same_logits_in_peft_and_here(kind: str, settings: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = make_model(kind, **settings)
    model.save_pretrained(tmp_path / "base")
    patterns = dict(use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 3}, alpha_pattern={r".*o_proj": 5})
    options = dict(fan_in_fan_out=True) if kind == "GPT2" else patterns
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(model, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            randomise(torch.nn.ParameterList([parameter]), seed=len(name))
            parameter.data *= 0.3
    theirs.save_pretrained(tmp_path / "adapter")
    expected = their_logits(theirs, TOKENS)

    def check(found: torch.Tensor) -> None:  # merged weights are rounded once more than peft's
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    with torch.no_grad():
        check(adapted(tmp_path / "base", tmp_path / "adapter")(TOKENS)[0])
        assert not torch.allclose(load_ours(tmp_path / "base")(TOKENS)[0], expected, rtol=0, atol=0.01)
    source = AdaptedModel(open_source(str(tmp_path / "base")), PeftAdapter(tmp_path / "adapter"))
    (tmp_path / "again").mkdir()
    write_peft(source, parameter_shapes(lambda: GPT(read_config(source, GPTConfig))), tmp_path / "again", None)
    back = peft.PeftModel.from_pretrained(make_model(kind, **settings), tmp_path / "again").eval()
    check(their_logits(back, TOKENS))


def test_targets_name_no_other_module(tmp_path: Path) -> None:
    """GPT-2's attn.c_proj is not adapted here, so c_proj alone would name too much. A config.json beside is ignored."""
    base = save_model(tmp_path / "base", "GPT2")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": str(base)}))
    (adapter / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = {}
    for name, (rows, columns) in {"attn.c_attn": (96, 32), "mlp.c_proj": (32, 128)}.items():
        for layer in range(2):
            start = f"base_model.model.transformer.h.{layer}.{name}"
            tensors[f"{start}.lora_A.weight"] = torch.randn(4, columns)
            tensors[f"{start}.lora_B.weight"] = torch.randn(rows, 4)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    source = open_source(str(adapter))
    assert isinstance(source, AdaptedModel)
    weights = source.weights(shapes := parameter_shapes(lambda: GPT(read_config(source, GPTConfig))))
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    assert export_adapter(source, weights, tmp_path / "out") == "an adapter for peft"
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"] == ["c_attn", "mlp.c_proj"]


def test_the_adapter_of_a_model_that_cannot_be_exported_is_written(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=0,
                      num_key_value_heads=2)  # fmt: skip
    source = open_source(str(base), adapter=str(write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))))
    assert isinstance(source, AdaptedModel)
    config = read_config(source, GPTConfig)
    weights = source.weights(parameter_shapes(lambda: GPT(config)))
    with pytest.raises(InputError, match="no architecture of transformers has"):
        export(source, config, weights, tmp_path / "out")
    export_adapter(source, weights, tmp_path / "out")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert written.keys() == load_file(tmp_path / "adapter/adapter_model.safetensors").keys()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": (dict(use_dora=True), "use_dora = 'True', which nib does not support"),
    "another kind": (dict(peft_type="IA3"), "the kind 'IA3', which nib does not support"),
    "biases": (dict(bias="lora_only"), "bias = 'lora_only'"),
    "a base changed at the start": (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "whole modules": (dict(modules_to_save=["lm_head"]), r"modules_to_save = \"\['lm_head'\]\""),
    "what is not known yet": (dict(use_tomorrow=1), "use_tomorrow = '1'"),
    "a pattern that may never end": (dict(rank_pattern={"(a+)+": 3}), r"the rank_pattern \{'\(a\+\)\+': 3\}"),
    "rank 0": (dict(r=0), "the rank of .*q_proj is 0, not from 1 to 32"),
    "rank beyond the matrix": (dict(rank_pattern={"k_proj": 17}), "the rank of .*k_proj is 17, not from 1 to 16"),
    "another rank": (dict(r=3), r"are \[4, 32\] and \[32, 4\], not \[3, 32\] and \[32, 3\]"),
    "alpha in words": (dict(lora_alpha="much"), "lora_alpha of .* is 'much', not a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case: str, llama: Path, tmp_path: Path) -> None:
    config, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as found:
        adapted(llama, write_adapter(tmp_path / "adapter", **config))
    assert "\n" not in str(found.value)


def rename(old: str, new: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


BROKEN: dict[str, tuple[Any, str]] = {
    "a matrix is missing": (lambda tensors: tensors.pop(min(tensors)), "one of the two matrices of .* is missing"),
    "an embedding": (rename("layers.0.self_attn.q_proj", "embed_tokens"), "nib does not adapt the embedding or head"),
    "a head": (rename("model.layers.0.self_attn.q_proj", "lm_head"), "nib does not adapt the embedding or head"),
    "a layer that the base lacks": (rename("layers.1", "layers.2"), "does not fit"),
    "a magnitude of DoRA's": (
        rename("0.self_attn.q_proj.lora_A.weight", "0.lora_magnitude_vector"),
        "q_proj is missing",
    ),
    "nothing": (lambda tensors: tensors.clear(), "there is no pair"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_without_a_place_are_refused(case: str, llama: Path, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    change_tensors(write_adapter(tmp_path / "adapter"), change, "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        adapted(llama, tmp_path / "adapter")


def test_broken_and_pickled_files_and_other_bases_are_refused(llama: Path, tmp_path: Path) -> None:
    place = write_adapter(tmp_path / "adapter")
    wide = save_model(tmp_path / "wide", "Llama", num_key_value_heads=4)
    with pytest.raises(InputError, match=r"k_proj are \[4, 32\] and \[16, 4\], not \[4, 32\] and \[32, 4\]"):
        adapted(wide, place)
    with pytest.raises(InputError, match=r"k_proj.* does not fit"):
        adapted(save_model(tmp_path / "gpt2", "GPT2"), place)
    weights = place / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"cannot read adapter_model.safetensors.*Copy the adapter again"):
        adapted(llama, place)
    weights.rename(place / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin is pickled.*Save the adapter as safetensors"):
        adapted(llama, place)
    (place / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read adapter_config\.json"):
        adapted(llama, place)
    with pytest.raises(InputError, match="there is no adapter nowhere"):
        adapted(llama, Path("nowhere"))
