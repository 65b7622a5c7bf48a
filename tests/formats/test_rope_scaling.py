"""Rotary positions are those of transformers: its tables bit by bit, its logits far into a text, its config.json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import SMALL, change_config, exported, load_ours, make_model, save_model, their_logits
from model_helpers import LLAMA, random_model, random_tokens, randomise
from test_export import BYTE, open_theirs, save_run
from test_load import in_corpus, tiny_train  # noqa: F401
from test_vocabulary import hf_bytes

from model import GPT, GPTConfig, rotary_frequencies
from nib.common.exits import InputError
from nib.formats.architectures import read_config_json, write_config_json
from nib.formats.checkpoint import open_checkpoint
from nib.formats.load import open_source, read_config
from nib.tokenizer.huggingface import write_tokenizer
from nib.tokenizer.load import make_tokenizer
from nib.tokenizer.tokenizer import CharTokenizer

LENGTH, FAR = 8192, [0, 1000, 8000]
LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048)
SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "SmolLM2": dict(rope_theta=100000.0),
    "linear": dict(rope_type="linear", factor=3.0),
    "dynamic": dict(rope_type="dynamic", factor=4.0),
    "Llama 3.1": dict(LLAMA3, factor=8.0, original_max_position_embeddings=8192 // 4),
    "Llama 3.2": dict(LLAMA3, factor=32.0, original_max_position_embeddings=8192 // 16),
    "llama3, other ends": dict(
        LLAMA3, factor=3.7, original_max_position_embeddings=1000, low_freq_factor=2.0, high_freq_factor=9.0
    ),
    "llama3, a step": dict(LLAMA3, factor=8.0, original_max_position_embeddings=1000, high_freq_factor=1.0),
    "Qwen3": YARN,
    "Arcee": dict(YARN, factor=20.0, mscale=1.0, beta_fast=32.0, beta_slow=1.0),
    "yarn, other ends and attention": dict(YARN, factor=2.5, beta_fast=20, beta_slow=2, attention_factor=1.3),
    "yarn of two scales": dict(YARN, mscale=1.0, mscale_all_dim=0.7),
    "yarn of a short context": dict(YARN, original_max_position_embeddings=5),
}
BASES = (1e4, 5e5, 1e6 + 0.5)


def their_config(name: str, base: float = 5e5, **changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": base} | SCALED[name]
    return dict(max_position_embeddings=LENGTH, rope_parameters=rope, hidden_size=64, head_dim=32) | changes


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("name", SCALED)
def test_tables_are_those_of_transformers_bit_by_bit(name: str, head_dim: int, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for base in BASES:
        settings = their_config(name, base, head_dim=head_dim, num_attention_heads=2, vocab_size=8)
        config = LlamaConfig(**settings)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path)
        architecture, options, *_ = read_config_json(json.loads((tmp_path / "config.json").read_text()))
        ours = GPTConfig(**options)
        again = read_config_json(write_config_json(architecture, dataclasses.asdict(ours)))[1]
        assert torch.equal(rotary_frequencies(GPTConfig(**again)), rotary_frequencies(ours))
        theirs = LlamaRotaryEmbedding(config)
        assert torch.equal(rotary_frequencies(ours), theirs.inv_freq)
        cos, sin = theirs(torch.zeros(1), torch.arange(LENGTH)[None])
        model = GPT(dataclasses.replace(ours, n_layer=1))
        half = head_dim // 2
        assert torch.equal(model.rope_cos, cos[0])
        assert torch.equal(model.rope_sin, torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=1))


def check_far_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """With the same tables only the order of sums differs; frequencies in float64 differ by 1e-5 at 1,000 already."""
    torch.testing.assert_close(actual[:, FAR], expected[:, FAR], rtol=0, atol=2e-6 * float(expected.abs().max()))


def small_weights(model: Any) -> None:
    """Weights under which 8,000 positions stay apart: of the deviation that keeps activations at their size."""
    randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(parameter.shape[-1] ** -0.5 / 0.3)


@pytest.mark.parametrize("name", ["SmolLM2", "linear", "Llama 3.1", "Qwen3", "Arcee"])
def test_logits_far_into_a_text_are_those_of_transformers_and_come_back(name: str, tmp_path: Path) -> None:
    kind = "Qwen3" if "Qwen3" in name else "Arcee" if "Arcee" in name else "Llama"
    theirs = make_model(kind, **their_config(name))
    theirs.set_attn_implementation("sdpa")
    small_weights(theirs)
    theirs.save_pretrained(tmp_path / "in")
    write_tokenizer(CharTokenizer("".join(map(chr, range(40, 80)))), tmp_path / "in", LENGTH)
    tokens = random_tokens(1, FAR[-1] + 1)
    expected = their_logits(theirs, tokens)
    with torch.no_grad():
        check_far_logits(load_ours(tmp_path / "in")(tokens)[0], expected)
    exported(tmp_path / "in", tmp_path / "out")
    before, after = (rotary_frequencies(load_ours(tmp_path / each).config) for each in ("in", "out"))
    assert torch.equal(before, after)
    check_far_logits(their_logits(open_theirs(tmp_path / "out"), tokens), expected)


def test_the_old_key_says_the_same_and_comes_before_the_new_one(tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling, and type for rope_type; 5 reads them first."""
    yarn = dict(YARN, rope_theta=5e5)
    save_model(tmp_path, **their_config("Qwen3"))
    expected = load_ours(tmp_path).config
    old = {"type" if key == "rope_type" else key: value for key, value in YARN.items()}
    change_config(tmp_path, rope_parameters="remove", rope_scaling=old, rope_theta=5e5)
    assert load_ours(tmp_path).config == expected
    change_config(tmp_path, rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4))
    assert load_ours(tmp_path).config == expected
    outside = {key: value for key, value in yarn.items() if key != "original_max_position_embeddings"}
    change_config(tmp_path, rope_scaling=outside, original_max_position_embeddings=2048)
    assert load_ours(tmp_path).config == expected
    change_config(tmp_path, rope_scaling={**YARN, "factor": None}, original_max_position_embeddings="remove")
    assert load_ours(tmp_path).config == expected, "yarn's factor is that of the two contexts"
    change_config(tmp_path, rope_scaling={"type": "linear", "factor": 1.0})
    assert load_ours(tmp_path).config.rope_scaling == "none"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": (dict(rope_type="longrope", factor=4.0), "rope_scaling of type longrope, which nib does not"),
    "a kind that is none": (dict(rope_type=["yarn"], factor=4.0), "rope_scaling of type"),
    "no factor": (dict(rope_type="linear"), "the factor of rope_scaling in config.json is 'None', not a number"),
    "a factor below 1": (dict(rope_type="dynamic", factor=0.5), "the factor of rope_scaling"),
    "a factor that is text": (dict(rope_type="llama3", factor="8"), "the factor of rope_scaling"),
    "llama3 without its ends": (dict(rope_type="llama3", factor=8.0), "low_freq_factor in config.json is 'None'"),
    "an end of zero": (dict(LLAMA3, factor=8.0, low_freq_factor=0), "low_freq_factor"),
    "no context": (dict(YARN, original_max_position_embeddings=-1), "original_max_position_embeddings"),
    "a negative end": (dict(YARN, beta_fast=-32), "beta_fast"),
    "attention of another kind": (dict(YARN, attention_factor="1"), "attention_factor"),
    "a ramp of broken pairs": (dict(YARN, truncate=False), "rope_scaling with truncate = False, which nib does not"),
    "a part of the head": (dict(YARN, partial_rotary_factor=0.5), "partial_rotary_factor = 0.5, which nib does not"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_scaling_that_is_broken_or_unknown_is_one_line(what: str, tmp_path: Path) -> None:
    rope, message = REFUSED[what]
    save_model(tmp_path)
    change_config(tmp_path, rope_scaling=rope)
    with pytest.raises(InputError, match=message) as found:
        load_ours(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rope_scaling="yarn"), "rope_factor and rope_base above 1"),
        (dict(rope_factor=4.0), "rope_scaling takes"),
        (dict(rope_scaling="linear", rope_factor=4.0, position="learned"), "takes position=rope"),
        (dict(rope_scaling="yarn", rope_factor=4.0, rope_base=1.0), "rope_base above 1"),
        (dict(rope_scaling="longrope", rope_factor=4.0), "rope_scaling must be one of none, linear"),
        (dict(rope_scaling="yarn", rope_factor=0.5), "rope_factor must be at least 1"),
        (dict(rope_scaling="yarn", rope_factor=2.0, rope_fast=-1.0), "rope_fast must be at least 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{"position": "rope", **options})


def test_a_factor_of_attention_that_transformers_lacks_is_not_exported(tmp_path: Path) -> None:
    save_run(tmp_path / "run", random_model(**{**LLAMA, "vocab_size": 257}, rope_attention=1.2))
    with pytest.raises(InputError, match=r"rope_attention=1.2 .* trained with rope_attention=0.0"):
        exported(tmp_path / "run", tmp_path / "out")


LONGER = ["--init_from=hf", "--block_size=256", "--batch_size=2", "--max_iters=2"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--rope_scaling=yarn"], dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)),
        (["--rope_scaling=linear", "--rope_factor=3"], dict(rope_type="linear", factor=3.0)),
        (["--rope_scaling=llama3", "--rope_fast=8"], dict(LLAMA3, factor=4.0, high_freq_factor=8.0)),
        (["--rope_scaling=dynamic"], dict(rope_type="dynamic", factor=4.0)),
    ],
)
@pytest.mark.usefixtures("in_corpus")
def test_a_context_is_enlarged_on_init_from(options: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    """The run resumes, and what it exports is in transformers what it is here."""
    hf_bytes(tmp_path / "hf")
    tiny_train(*LONGER, *options)
    tiny_train(*LONGER, *options, "--max_iters=3")
    tiny_train(*(each for each in LONGER if "block" not in each), *options, "--max_iters=4")
    source = open_source("out/run")
    assert read_config(source, GPTConfig).block_size == 256
    exported(Path("out/run"), Path("exported"))
    config = json.loads(Path("exported/config.json").read_text())
    assert config["max_position_embeddings"] == 256 and expected.items() <= config["rope_scaling"].items()
    assert config["rope_parameters"].items() >= config["rope_scaling"].items()
    ours, theirs = load_ours(Path("exported")), open_theirs(Path("exported"))
    assert torch.equal(rotary_frequencies(ours.config), theirs.model.rotary_emb.inv_freq)
    tokens = random_tokens(1, 256, vocab_size=257)
    with torch.no_grad():
        actual, logits = ours(tokens)[0], their_logits(theirs, tokens)
    torch.testing.assert_close(actual, logits, rtol=0, atol=5e-6 * float(logits.abs().max()))


@pytest.mark.usefixtures("in_corpus")
def test_dynamic_is_enlarged_to_what_transformers_has_for_a_text_of_that_length(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf_bytes(tmp_path / "hf")
    change_config(tmp_path / "hf", rope_scaling=dict(type="dynamic", factor=2.0))
    tiny_train(*LONGER)
    config = read_config(open_source("out/run"), GPTConfig)
    assert (config.rope_scaling, config.rope_factor, config.block_size) == ("dynamic", 4.0, 256)
    rope = dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0)
    theirs = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, seq_len=256)
    torch.testing.assert_close(rotary_frequencies(config), expected, rtol=2e-7, atol=0)


@pytest.mark.usefixtures("in_corpus")
def test_a_scaled_model_is_enlarged_without_naming_its_scaling(tmp_path: Path) -> None:
    """As Qwen's, whose config.json has a factor of 4 beside the context before it."""
    hf_bytes(tmp_path / "hf")
    change_config(tmp_path / "hf", rope_scaling=dict(YARN, original_max_position_embeddings=64))
    tiny_train(*LONGER)
    config = read_config(open_source("out/run"), GPTConfig)
    assert (config.rope_scaling, config.rope_factor, config.rope_original) == ("yarn", 4.0, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "block_size 256 is above the 64 of hf. Lower it, or give a --rope_scaling such as yarn"),
        (["--rope_scaling=yarn", "--rope_factor=1"], "rope_factor and rope_base above 1"),
        (["--rope_scaling=yarn", "--rope_base=500"], "rope_base is 500.0 but hf has 10000.0. Leave rope_base out"),
        (["--rope_scaling=yarn", "--block_size=64"], "rope_scaling is 'yarn' but hf has 'none'. Leave rope_scaling"),
    ],
)
@pytest.mark.usefixtures("in_corpus")
def test_a_context_that_cannot_be_enlarged_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    hf_bytes(tmp_path / "hf")
    with pytest.raises(InputError, match=message):
        tiny_train(*LONGER, *options)
    assert not Path("out").exists()


@pytest.mark.usefixtures("in_corpus")
def test_learned_positions_cannot_be_enlarged(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "GPT2", vocab_size=257)
    write_tokenizer(BYTE, tmp_path / "hf", 64)
    with pytest.raises(InputError, match=r"block_size 256 is above the 64 of hf. Lower it$"):
        tiny_train(*LONGER, "--rope_scaling=yarn")


def test_a_checkpoint_from_before_there_were_scalings_opens(tmp_path: Path) -> None:
    model = random_model(**{**LLAMA, "vocab_size": 257})
    old = {name: value for name, value in dataclasses.asdict(model.config).items() if not name.startswith("rope_s")}
    old = {name: old[name] for name in old if name == "rope_base" or not name.startswith("rope_")}
    save_run(tmp_path / "run", model, model_config=old)
    assert read_config(open_checkpoint(tmp_path / "run"), GPTConfig) == model.config


def test_a_yarn_that_changes_nothing_is_no_scaling() -> None:
    rope = {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.0, "rope_theta": 500.0}
    config = {"architectures": ["LlamaForCausalLM"], **SMALL, "rope_parameters": rope}
    model = read_config_json(config)[1]
    assert (model["rope_base"], model.get("rope_scaling")) == (500.0, None)


def in_gguf(tmp_path: Path, **options: Any) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    save_run(tmp_path / "run", random_model(**{**LLAMA, "vocab_size": 257, **options}))
    exported(tmp_path / "run", tmp_path / "out", kind="gguf")
    reader = gguf.GGUFReader(tmp_path / "out/out.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if "rope.scaling" in name}
    return fields | {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors if "rope" in tensor.name}


def test_gguf_has_the_scaling_in_llama_cpp_s_words(tmp_path: Path) -> None:
    linear = in_gguf(tmp_path / "linear", rope_scaling="linear", rope_factor=3.0)
    assert linear == {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 3.0}
    assert in_gguf(tmp_path / "dynamic", rope_scaling="dynamic", rope_factor=3.0) == {}
    options: dict[str, Any] = dict(rope_scaling="yarn", rope_factor=4.0, rope_original=8, rope_attention=1.5)
    yarn = in_gguf(tmp_path / "yarn", **options)
    assert yarn.pop("llama.rope.scaling.attn_factor") == pytest.approx(1.5 / 1.138629, rel=1e-6)
    parts = {"type": "yarn", "factor": 4.0, "original_context_length": 8}
    assert yarn == {f"llama.rope.scaling.{name}": value for name, value in parts.items()}
    with pytest.raises(InputError, match=r"rope_slow=1 and rope_fast=32 only. Use --format=hf"):
        in_gguf(tmp_path / "ends", **options, rope_fast=20.0)


def test_gguf_of_llama3_divides_the_frequencies(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(rope_scaling="llama3", rope_factor=8.0, rope_original=64, head_size=32)
    scaled, plain = (GPTConfig(**{**LLAMA, **each}) for each in (options, dict(head_size=32)))
    divisors = in_gguf(tmp_path, **options)["rope_freqs.weight"]
    torch.testing.assert_close(rotary_frequencies(plain) / divisors, rotary_frequencies(scaled), rtol=1e-6, atol=0)
    assert divisors[0] == 1 and divisors[-1] == 8 and len(set(divisors.tolist())) > 2
    qwen = random_model(**{**LLAMA, **options, "vocab_size": 257}, qk_norm=True)
    save_run(tmp_path / "qwen", qwen)
    with pytest.raises(InputError, match=r"llama.cpp has no rope_scaling=llama3 for Qwen3ForCausalLM. Use --format=hf"):
        exported(tmp_path / "qwen", tmp_path / "no", kind="gguf")
    assert not (tmp_path / "no").exists()


def test_gguf_has_every_id_that_ends_a_text(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tokenizer = make_tokenizer("byte")
    tokenizer.stop_ids = frozenset({10, 7})
    save_run(tmp_path / "run", random_model(**LLAMA, vocab_size=257), tokenizer)
    exported(tmp_path / "run", tmp_path / "out", kind="gguf")
    fields = gguf.GGUFReader(tmp_path / "out/out.gguf").fields
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom")] == [256, 7, 10]
    tokenizer.stop_ids = frozenset({10, 7, 8})
    save_run(tmp_path / "many", random_model(**LLAMA, vocab_size=257), tokenizer)
    with pytest.raises(InputError, match=r"this model has 7, 8, 10 and end-of-text. Use --format=hf"):
        exported(tmp_path / "many", tmp_path / "no", kind="gguf")


def llama_cpp_logprobs(path: Path, tokens: list[int]) -> torch.Tensor:
    """Of all ids after the tokens, by the server in the package xllamacpp, which is compiled."""
    llama = pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    options = llama.CommonParams()
    options.model.path, options.warmup, options.cpuparams.n_threads = str(path), False, 1
    options.n_ctx = options.n_batch = options.n_ubatch = 2048
    options.cache_type_k = options.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    request = {"prompt": tokens, "n_predict": 1, "n_probs": 257, "logit_bias": [[97, 1000.0]]}  # "a": a whole text
    written = llama.Server(options).handle_completions(request)
    found = written["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return torch.tensor([each["logprob"] for each in sorted(found, key=lambda each: each["id"])])


IN_GGUF: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": dict(rope_scaling="linear", rope_factor=3.0),
    "dynamic": dict(rope_scaling="dynamic", rope_factor=3.0),
    "llama3": dict(rope_scaling="llama3", rope_factor=5.0, rope_original=256, rope_slow=2.0, rope_fast=8.0),
    "llama3, Arcee": dict(rope_scaling="llama3", rope_factor=8.0, rope_original=256, mlp="relu2"),
    "yarn": dict(rope_scaling="yarn", rope_factor=4.0, rope_original=512),
    "yarn, attention": dict(rope_scaling="yarn", rope_factor=4.0, rope_original=512, rope_attention=1.3),
    "yarn, Qwen3": dict(rope_scaling="yarn", rope_factor=4.0, rope_original=512, qk_norm=True, n_kv_head=2),
}


@pytest.mark.parametrize("name", IN_GGUF)
def test_llama_cpp_has_the_same_logprobs_far_into_a_text(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    settings = {**LLAMA, "vocab_size": 257, "block_size": 2048, "n_embd": 64, "mlp_hidden": 64, "tie_weights": True}
    model = random_model(**{**settings, **IN_GGUF[name]})
    save_run(tmp_path / "run", model)
    exported(tmp_path / "run", tmp_path / "out", kind="gguf")
    tokens = random_tokens(1, 1500, vocab_size=256, seed=1)
    with torch.no_grad():
        expected = model(tokens)[0][0, -1].log_softmax(-1)
    actual = llama_cpp_logprobs(tmp_path / "out/out.gguf", tokens[0].tolist())
    likely = expected > -30
    torch.testing.assert_close(actual[likely], expected[likely], rtol=0, atol=1e-4 * float(-expected[likely].min()))
