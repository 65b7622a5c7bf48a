"""The architectures of Hugging Face transformers that model.py's options cover, with their names.

Each has one table for both directions: keys of config.json and fields of model.GPTConfig, names of modules there and
in model.py. A setting of config.json that model.py does not support is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nib.common.exits import InputError

MAX_POSITIONS = 1 << 20  # position tables are built before any other check could find a wrong number
ACTIVATIONS = {  # transformers' name: nib's
    "silu": "swiglu", "swish": "swiglu", "relu": "relu", "relu2": "relu2", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
PLAIN_MLPS = ("gelu_tanh", "gelu", "relu2", "relu")

GPT2_NAMES = {  # module of model.py: modules of the architecture, whose rows are concatenated; N is the layer
    "wte": ["transformer.wte"],
    "wpe": ["transformer.wpe"],
    "norm": ["transformer.ln_f"],
    "head": ["lm_head"],
    "blocks.N.attention_norm": ["transformer.h.N.ln_1"],
    "blocks.N.attention.qkv": ["transformer.h.N.attn.c_attn"],
    "blocks.N.attention.out": ["transformer.h.N.attn.c_proj"],
    "blocks.N.mlp_norm": ["transformer.h.N.ln_2"],
    "blocks.N.mlp.up": ["transformer.h.N.mlp.c_fc"],
    "blocks.N.mlp.down": ["transformer.h.N.mlp.c_proj"],
}
LLAMA_NAMES = {
    "wte": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "head": ["lm_head"],
    "blocks.N.attention_norm": ["model.layers.N.input_layernorm"],
    "blocks.N.attention.qkv": [f"model.layers.N.self_attn.{part}_proj" for part in "qkv"],
    "blocks.N.attention.q_norm": ["model.layers.N.self_attn.q_norm"],
    "blocks.N.attention.k_norm": ["model.layers.N.self_attn.k_norm"],
    "blocks.N.attention.out": ["model.layers.N.self_attn.o_proj"],
    "blocks.N.mlp_norm": ["model.layers.N.post_attention_layernorm"],
    "blocks.N.mlp.up": ["model.layers.N.mlp.gate_proj", "model.layers.N.mlp.up_proj"],
    "blocks.N.mlp.down": ["model.layers.N.mlp.down_proj"],
}
UP_ONLY = {"blocks.N.mlp.up": ["model.layers.N.mlp.up_proj"]}
STARCODER2_NAMES = LLAMA_NAMES | {
    "blocks.N.mlp.up": ["model.layers.N.mlp.c_fc"],
    "blocks.N.mlp.down": ["model.layers.N.mlp.c_proj"],
}
GPT2_KEYS = {  # fields of GPTConfig: keys of config.json
    "vocab_size": "vocab_size", "block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head",
    "n_embd": "n_embd", "mlp_hidden": "n_inner", "norm_eps": "layer_norm_epsilon", "mlp": "activation_function",
    "tie_weights": "tie_word_embeddings",
}  # fmt: skip
LLAMA_KEYS = {
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "head_size": "head_dim", "mlp_hidden": "intermediate_size", "norm_eps": "rms_norm_eps", "mlp": "hidden_act",
    "tie_weights": "tie_word_embeddings",
}  # fmt: skip
ROPE_KEYS = {  # fields of GPTConfig: keys of rope_parameters, by kind of scaling
    "default": {}, "linear": {}, "dynamic": {},
    "llama3": {"rope_slow": "low_freq_factor", "rope_fast": "high_freq_factor"},
    "yarn": {"rope_slow": "beta_slow", "rope_fast": "beta_fast", "rope_attention": "attention_factor"},
}  # fmt: skip
RMS = {"norm": ("rmsnorm",), "position": ("rope",)}


@dataclass(frozen=True)
class Architecture:
    """One architecture: `options` are the values that it allows for fields of GPTConfig."""

    name: str
    model_type: str
    options: dict[str, tuple[Any, ...]]
    names: dict[str, list[str]] = field(default_factory=lambda: LLAMA_NAMES)
    keys: dict[str, str] = field(default_factory=lambda: LLAMA_KEYS)
    defaults: dict[str, Any] = field(default_factory=dict)  # values of keys that config.json leaves out
    # Switches in config.json, and the linear layers to which they give biases.
    bias_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    always_bias: tuple[str, ...] = ()  # linear layers that always have a bias
    transposed: bool = False  # matrices of the blocks are stored as (inputs, outputs)


LINEAR = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
LLAMA_BIASES = {"attention_bias": LINEAR[:2], "mlp_bias": LINEAR[2:]}
NO_BIAS = {"bias": (False,)}
FULL = {"window": (0,)}
NO_QK_NORM = {"qk_norm": (False,)}

# Export takes the first one that fits.
ARCHITECTURES = [
    Architecture(
        "GPT2LMHeadModel", "gpt2", {"norm": ("layernorm",), "position": ("learned",), "mlp": PLAIN_MLPS}
        | NO_QK_NORM | FULL, GPT2_NAMES, GPT2_KEYS,
        {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True, "n_inner": None},
        always_bias=LINEAR, transposed=True,
    ),
    Architecture("LlamaForCausalLM", "llama", RMS | {"mlp": ("swiglu",)} | NO_QK_NORM | FULL, bias_keys=LLAMA_BIASES),
    Architecture(
        "MistralForCausalLM", "mistral", RMS | {"mlp": ("swiglu",)} | NO_QK_NORM | NO_BIAS,
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    Architecture(
        "Qwen3ForCausalLM", "qwen3", RMS | {"mlp": ("swiglu",), "qk_norm": (True,)} | NO_BIAS,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    Architecture(
        "ArceeForCausalLM", "arcee", RMS | {"mlp": ("relu2", "gelu_tanh", "gelu", "relu")} | NO_QK_NORM | FULL,
        LLAMA_NAMES | UP_ONLY, defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5}, bias_keys=LLAMA_BIASES,
    ),
    Architecture(
        "Starcoder2ForCausalLM", "starcoder2",
        {"norm": ("layernorm",), "position": ("rope",), "mlp": PLAIN_MLPS} | NO_QK_NORM, STARCODER2_NAMES,
        LLAMA_KEYS | {"norm_eps": "norm_epsilon"},
        {"norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "use_bias": True,
         "num_key_value_heads": 2},
        bias_keys={"use_bias": LINEAR},
    ),
    # Only read, as a model with biases in all layers, zero where Qwen2 has none. It is exported as Llama with biases.
    Architecture(
        "Qwen2ForCausalLM", "qwen2", RMS | {"mlp": ("swiglu",), "bias": (True,)} | NO_QK_NORM,
        defaults={"num_key_value_heads": 32}, always_bias=LINEAR[:1],
    ),
]  # fmt: skip
EXPORTED = ARCHITECTURES[:-1]
# The fields of GPTConfig that an architecture stores, restricts, or does not need.
KNOWN = {*GPT2_KEYS, *LLAMA_KEYS, *RMS, *ROPE_KEYS["yarn"], "qk_norm", "window", "bias", "dropout", "init"}
KNOWN |= {"rope_base", "rope_scaling", "rope_factor", "rope_original"}
# The values of options that a user may have removed from model.py.
REMOVED = {"window": 0, "rope_scaling": "none", "rope_factor": 1.0, "dropout": 0.0, "init": ""}
REMOVED |= {"rope_original": 0} | dict.fromkeys(ROPE_KEYS["yarn"], 0.0)
# Other keys of config.json that change the model, and the values at which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,), "auto_map": (None,), "scale_attn_weights": (True,),
    "add_cross_attention": (False,), "scale_attn_by_inverse_layer_idx": (False,), "partial_rotary_factor": (None, 1),
    "is_encoder_decoder": (None, False), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "logit_scale": (None, 1), "attention_bias": (None, False), "mlp_bias": (None, False), "no_rope_layers": (None, []),
}  # fmt: skip


def read_config_json(config: dict[str, Any]) -> tuple[Architecture, dict[str, Any], frozenset[str]]:
    """The architecture of a config.json, its settings for GPTConfig, and the linear layers that lack a bias.

    Raises InputError for an unknown architecture, a wrong or missing number, and any other setting that model.py does
    not support.
    """
    architecture = find_architecture(config)
    value = architecture.defaults | config
    for key, neutral in NEUTRAL.items():
        if key in value and value[key] not in neutral and key not in architecture.bias_keys:
            raise refuse(architecture, f"{key} = {str(value[key])[:60]}")
    model: dict[str, Any] = {"dropout": 0.0, "n_kv_head": 0, "head_size": 0, "mlp_hidden": 0, "qk_norm": False}
    for ours, theirs in architecture.keys.items():
        if ours == "norm_eps":
            model[ours] = number(value.get(theirs, 1e-6), theirs, float, 0, 1)
        elif ours == "mlp":
            name = value.get(theirs, "silu")
            model[ours] = ACTIVATIONS.get(str(name))
            if model[ours] not in architecture.options["mlp"]:
                raise refuse(architecture, f"{theirs} = {str(name)[:60]!r}")
        elif ours == "tie_weights":
            model[ours] = switch(value.get(theirs, False), theirs)
        elif value.get(theirs) is not None:
            model[ours] = number(value[theirs], theirs, int, 1, MAX_POSITIONS if ours == "block_size" else 1 << 24)
        elif ours not in model:
            raise InputError(f"config.json lacks {theirs}. Give a complete model directory")
    number(model["n_head"] * model["head_size"], "num_attention_heads times head_dim", int, 0, 1 << 24)
    number(model["block_size"] * model["head_size"], "max_position_embeddings times head_dim", int, 0, 1 << 28)
    for name in ("norm", "position", "qk_norm"):
        model[name] = architecture.options[name][0] if name in architecture.options else model[name]
    model["window"] = read_window(architecture, value, model["n_layer"])
    if model["position"] == "rope":
        model |= read_rope(architecture, value, model["block_size"])
    with_bias = set(architecture.always_bias)
    for key, layers in architecture.bias_keys.items():
        with_bias |= set(layers) if switch(value.get(key, False), key) else set()
    model["bias"] = bool(with_bias) or model["norm"] == "layernorm"
    return architecture, model, frozenset(LINEAR) - with_bias if model["bias"] else frozenset()


def find_architecture(config: dict[str, Any]) -> Architecture:
    names = config.get("architectures")
    if not names:
        names = [each.name for each in ARCHITECTURES if each.model_type == config.get("model_type")]
    known = {each.name: each for each in ARCHITECTURES}
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in known:
        asked = ", ".join(map(str, names)) if isinstance(names, list) and names else config.get("model_type", "none")
        raise InputError(f"the architecture {str(asked)[:80]} is not one of {', '.join(known)}. Give one of these")
    return known[names[0]]


def refuse(architecture: Architecture, what: str) -> InputError:
    return InputError(f"this {architecture.name} needs {what}, which nib does not support. Give a model without it")


def number(value: Any, key: str, kind: type, low: float, high: float) -> Any:
    right = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not right or not low <= value <= high:
        raise InputError(f"{key} in config.json is {str(value)[:40]!r}, not a number from {low} to {high}. Correct it")
    return kind(value)


def switch(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{key} in config.json is {str(value)[:40]!r}, not true or false. Correct it")
    return value


def read_window(architecture: Architecture, value: dict[str, Any], n_layer: int) -> int:
    """The window of sliding-window attention in all layers; 0: full attention. A mix of both is refused."""
    kinds = value.get("layer_types")
    width = value.get("sliding_window") if "window" not in architecture.options else None
    if architecture.model_type in ("qwen2", "qwen3"):
        width = width if value.get("use_sliding_window", False) else None
        from_layer = number(value.get("max_window_layers", 28), "max_window_layers", int, 0, 1 << 20)
        if width is not None and kinds is None:
            slides = [layer >= from_layer for layer in range(n_layer)]
            kinds = ["sliding_attention" if each else "full_attention" for each in slides]
    if kinds is not None:
        if not isinstance(kinds, list) or set(map(str, kinds)) not in ({"full_attention"}, {"sliding_attention"}):
            raise refuse(architecture, "layer_types of several kinds")
        width = width if kinds[0] == "sliding_attention" else None
    return 0 if width is None else number(width, "sliding_window", int, 1, 1 << 31)


def read_rope(architecture: Architecture, value: dict[str, Any], block_size: int) -> dict[str, Any]:
    """The RoPE settings, in rope_parameters since transformers 5, in rope_theta and rope_scaling before."""
    key = "rope_scaling" if value.get("rope_scaling") else "rope_parameters"  # the same precedence as in transformers
    rope = value.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(each, dict) for each in rope.values()):
        raise refuse(architecture, f"{key} = {str(rope)[:60]}")
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise refuse(architecture, f"{key} of type {str(kind)[:60]}")
    for name, neutral in {"partial_rotary_factor": 1, "truncate": True}.items():
        if rope.get(name, neutral) != neutral:
            raise refuse(architecture, f"{key} with {name} = {str(rope[name])[:60]}")
    base = number(rope.get("rope_theta", value.get("rope_theta", 10000.0)), "rope_theta", float, 1, 1e12)
    if kind == "default":
        return {"rope_base": base}
    model: dict[str, Any] = {"rope_base": base, "rope_scaling": kind, "rope_factor": rope.get("factor")}
    if ROPE_KEYS[kind]:
        original = value.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        original = number(original or block_size, "original_max_position_embeddings", int, 1, MAX_POSITIONS)
        model["rope_original"] = original
        if kind == "yarn" and model["rope_factor"] is None:
            model["rope_factor"] = block_size / original
    factor = model["rope_factor"] = number(model["rope_factor"], f"the factor of {key}", float, 1, 1e6)
    for ours, theirs in ROPE_KEYS[kind].items():
        needed = kind == "llama3" or rope.get(theirs)  # transformers has defaults only for yarn
        model[ours] = number(rope.get(theirs), theirs, float, 1e-3, 1e6) if needed else 0.0
    if kind == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim") and not model["rope_attention"]:
        scales = [number(rope[name], name, float, 0, 1e3) for name in ("mscale", "mscale_all_dim")]
        above, below = (0.1 * scale * math.log(factor) + 1.0 for scale in scales)
        model["rope_attention"] = above / below
    if factor == 1 and model.get("rope_attention", 0) in (0, 1):  # the scaling changes nothing
        return {"rope_base": base}
    return model


def misfits(architecture: Architecture, model: dict[str, Any]) -> dict[str, Any]:
    """The options of a model that do not fit the architecture, each with a value that would."""
    wrong = {name: allowed[0] for name, allowed in architecture.options.items() if model[name] not in allowed}
    plain_heads = {"n_kv_head": model["n_head"], "head_size": model["n_embd"] // model["n_head"]}
    if "n_kv_head" not in architecture.keys:
        wrong |= {name: plain for name, plain in plain_heads.items() if model[name] != plain}
    elif model["n_embd"] % model["n_head"] and architecture.model_type in ("llama", "arcee"):
        wrong["n_embd"] = model["n_head"] * max(1, model["n_embd"] // model["n_head"])
    if model["rope_attention"] and model["rope_scaling"] != "yarn":
        wrong["rope_attention"] = 0.0
    return wrong


def choose_architecture(model: dict[str, Any]) -> Architecture:
    """The first architecture that expresses all options of a model.

    Otherwise raises InputError, which names the nearest architecture and the options that do not fit it.
    """
    nearest = min(EXPORTED, key=lambda each: len(misfits(each, model)))
    wrong = misfits(nearest, model)
    if wrong:
        has = ", ".join(f"{name}={model[name]}" for name in wrong)
        wanted = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise InputError(
            f"no architecture of transformers has {has} with the other options. The nearest is {nearest.name}, "
            f"for a model trained with {wanted}"
        )
    return nearest


def write_config_json(architecture: Architecture, model: dict[str, Any]) -> dict[str, Any]:
    """The architecture's part of config.json for these settings of GPTConfig."""
    config: dict[str, Any] = {"architectures": [architecture.name], "model_type": architecture.model_type}
    for ours, theirs in architecture.keys.items():
        config[theirs] = model[ours]
    gpt2 = architecture.model_type == "gpt2"
    by_ours = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    by_ours["gelu_tanh"] = "gelu_new" if gpt2 else "gelu_pytorch_tanh"
    config[architecture.keys["mlp"]] = by_ours[model["mlp"]]
    config |= dict.fromkeys(architecture.bias_keys, model["bias"])
    if gpt2:
        config["n_ctx"] = model["block_size"]  # for llama.cpp's converter
        return config | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model["dropout"])
    # In both forms: for transformers 5, and the older one, which vLLM and converters read.
    base, scaling = model["rope_base"], rope_scaling(model)
    config |= {"rope_theta": base, "rope_scaling": scaling or None}
    config["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": base}
    if "window" not in architecture.options:
        config["sliding_window"] = model["window"] or None
        if architecture.model_type == "qwen3":
            kind = "sliding_attention" if model["window"] else "full_attention"
            config |= {"use_sliding_window": bool(model["window"]), "layer_types": [kind] * model["n_layer"]}
            config["max_window_layers"] = 0 if model["window"] else model["n_layer"]
    return config


def rope_scaling(model: dict[str, Any]) -> dict[str, Any]:
    """The rope scaling under the keys of config.json, with all defaults written out; empty without scaling."""
    kind, factor = model["rope_scaling"], model["rope_factor"]
    if kind == "none":
        return {}
    found: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if ROPE_KEYS[kind]:
        found["original_max_position_embeddings"] = model["rope_original"] or model["block_size"]
    default = {"rope_slow": 1.0, "rope_fast": 4.0 if kind == "llama3" else 32.0}
    default["rope_attention"] = 0.1 * math.log(factor) + 1.0
    return found | {theirs: model[ours] or default[ours] for ours, theirs in ROPE_KEYS[kind].items()}
