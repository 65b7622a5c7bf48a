"""Decoding speed of a GPT-2 of 124 M random weights on the CPU: nib, transformers, llama.cpp, memory bandwidth.

    python bench/decode.py [--rounds 5] [--layers 12]

Needs transformers; llama.cpp is included if llama-cpp-python and gguf are installed. All engines alternate in this
process, with torch's number of threads; medians over the rounds. The read-bandwidth limit is the speed of summing as
many bytes as the weights have. It is measured just before and just after nib's text (mean of the best of three each),
since the bandwidth of a shared machine changes from second to second. Prints a table and one JSON line last.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import GPT2, finish, parser_for

from model import GPT, GPTConfig
from nib.cpu.build import kernels
from nib.cpu.fused_blocks import fuse_blocks
from nib.cpu.int8 import pack_int8, quantize
from nib.cpu.linear import pack_bfloat16, pack_linears
from nib.cpu.process import keep_freed_memory
from nib.generation.engine import stream_text
from nib.generation.request import Sample, SamplingSettings
from nib.generation.sampling import choose
from nib.tokenizer.tokenizer import Tokenizer

RAGGED = (40, 33, 57, 64, 12, 48, 25, 61)  # tokens in the prompts of the eight streams


class Numbers(Tokenizer):
    """A placeholder tokenizer with the vocabulary size of GPT-2's."""

    def __init__(self) -> None:
        super().__init__("numbers", [b"."] * 50257, end_of_text=None)


def prompt_of(length: int) -> list[int]:
    return torch.randint(50257, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def write(model: GPT, lengths: tuple[int, ...], tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it over all streams, generated as by sample.py."""
    settings = SamplingSettings(max_new_tokens=tokens)
    samples = [Sample("", i, 0, prompt_of(n), Numbers(), settings) for i, n in enumerate(lengths)]
    began, first = time.perf_counter(), 0.0
    for _ in stream_text(model, samples, settings):
        first = first or time.perf_counter() - began
    return first, samples[0].tokens_per_second or 0.0


def fast_model(model: GPT, bits: int = 32) -> GPT:
    """The model prepared for a CPU as sample.py prepares it, with weights of so many bits, changed in place."""
    native = kernels()
    if bits == 8:
        quantize(model)
        pack_int8(model)
    elif bits == 16 and native:
        pack_bfloat16(model, native)
    else:
        pack_linears(model)
    fuse_blocks(model)
    return model


def read_speed(size: int) -> Callable[[], float]:
    memory = torch.ones(size // 4)

    def measure() -> float:
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            memory.sum()
            seconds.append(time.perf_counter() - began)
        return size / min(seconds)

    return measure


def transformers_speed(model: Any, length: int, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it."""
    prompt = torch.tensor([prompt_of(length)])
    seconds = []
    for count in (1, tokens):
        began = time.perf_counter()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
            do_sample=True, top_k=200, temperature=0.8, pad_token_id=0,
        )  # fmt: skip
        seconds.append(time.perf_counter() - began)
    return seconds[0], (tokens - 1) / max(seconds[1] - seconds[0], 1e-9)


def write_gguf(model: GPT, path: Path, eight_bits: bool) -> None:
    """Write the weights for llama.cpp, with a placeholder vocabulary."""
    import gguf
    import numpy as np

    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_hidden)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_merges(["t 0"])
    names = {"wte": "token_embd", "wpe": "position_embd", "norm": "output_norm"}
    parts = {"attention_norm": "attn_norm", "attention.qkv": "attn_qkv", "attention.out": "attn_output"}
    parts |= {"mlp_norm": "ffn_norm", "mlp.up": "ffn_up", "mlp.down": "ffn_down"}
    for i in range(config.n_layer):
        names |= {f"blocks.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in parts.items()}
    tensors = {f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": p for name, p in model.named_parameters()}
    tensors["output.weight"] = model.wte.weight
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor.detach().numpy())
        if eight_bits and array.ndim == 2 and name != "position_embd.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_llama(model: GPT, directory: Path, eight_bits: bool) -> Any:
    try:
        import gguf  # noqa: F401
        from llama_cpp import Llama
    except ImportError:
        return None
    path = directory / f"{eight_bits}.gguf"
    write_gguf(model, path, eight_bits)
    threads = torch.get_num_threads()
    return Llama(str(path), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)


def llama_speed(llama: Any, length: int, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it: forward passes only, without sampling."""
    llama.reset()
    began = time.perf_counter()
    llama.eval(prompt_of(length))
    first = time.perf_counter() - began
    began = time.perf_counter()
    for token in prompt_of(tokens - 1):
        llama.eval([token])
    return first, (tokens - 1) / (time.perf_counter() - began)


def choice_seconds(rows: int) -> float:
    """Seconds to sample one token per row with top-k and top-p."""
    logits, settings = torch.randn(rows, 50257) * 3, SamplingSettings(top_k=200, top_p=0.95)
    uniforms = torch.rand(rows)
    began = time.perf_counter()
    for _ in range(10):
        choose(logits, uniforms, settings).tolist()
    return (time.perf_counter() - began) / 10


def main() -> None:
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--tokens", type=int, default=48, help="generated in each measurement")
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    keep_freed_memory()  # as sample.py does
    torch.manual_seed(0)
    model, tokens = GPT(GPTConfig(**GPT2 | {"n_layer": arguments.layers})).eval(), arguments.tokens
    size = sum(p.nbytes for p in model.parameters())
    speed = read_speed(size)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=arguments.layers, eos_token_id=None, bos_token_id=None)).eval()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        llamas = {kind: open_llama(model, Path(name), kind == "q8_0") for kind in ("f32", "q8_0")}
    small, half = (fast_model(copy.deepcopy(model), bits) for bits in (8, 16))
    fast_model(model)
    for round_number in range(arguments.rounds + 1):  # the first is a warm-up
        taken: dict[str, float] = {}
        for label, engine in (("nib f32", model), ("nib bf16", half), ("nib int8", small)):
            before = speed() / size
            taken[label] = write(engine, (64,), tokens)[1]
            if engine is model:
                taken["limit"] = (before + speed() / size) / 2
                taken["share"] = taken[label] / taken["limit"]
            taken[f"{label}, 8 streams"] = write(engine, RAGGED, tokens)[1]
            taken[f"{label}, first of 512"] = write(engine, (512,), 1)[0]
        taken["transformers"] = transformers_speed(theirs, 64, tokens)[1]
        taken["transformers, first of 512"] = transformers_speed(theirs, 512, 2)[0]
        for kind, llama in llamas.items():
            if llama:
                time.sleep(0.05)  # until torch's threads stop spinning
                taken[f"llama.cpp {kind}"] = llama_speed(llama, 64, tokens)[1]
                taken[f"llama.cpp {kind}, first of 512"] = llama_speed(llama, 512, 2)[0]
        taken["choice, 1 row"], taken["choice, 8 rows"] = choice_seconds(1), choice_seconds(8)
        for key, value in taken.items() if round_number else ():
            found.setdefault(key, []).append(value)
    middle = {key: statistics.median(values) for key, values in found.items()}
    for key, values in found.items():
        unit, scale = ("ms", 1000) if key.startswith("choice") or "first" in key else ("tokens/s", 1)
        unit = "" if key == "share" else unit
        low, high = min(values) * scale, max(values) * scale
        print(f"{key:32} {middle[key] * scale:9.2f} {unit:9} ({low:.2f} to {high:.2f})")
    if not llamas["f32"]:
        print("llama.cpp was left out: pip install llama-cpp-python gguf")
    report(middle, arguments.check)


def report(middle: dict[str, float], check: bool) -> None:
    f32, int8 = middle["nib f32"], middle["nib int8"]
    ratios = {  # name: (found, target)
        "share of the limit": (middle["share"], 0.9),
        "to transformers": (f32 / middle["transformers"], 3.0),
        "bf16 to f32": (middle["nib bf16"] / f32, 1.5),
        "int8 to f32": (int8 / f32, 3.0),
        "8 streams to one": (middle["nib f32, 8 streams"] / f32, 5.0),
        "first token, transformers to nib": (middle["transformers, first of 512"] / middle["nib f32, first of 512"], 1),
        "step to 33 choices": (1 / f32 / middle["choice, 1 row"] / 33.3, 1.0),
    }
    if "llama.cpp f32" in middle:
        ratios["to llama.cpp f32"] = (f32 / middle["llama.cpp f32"], 1.0)
        ratios["int8 to llama.cpp q8_0"] = (int8 / middle["llama.cpp q8_0"], 1.0)
    for name, (ratio, target) in ratios.items():
        print(f"{name:34} {ratio:6.2f}   target {target:.2f}   {'met' if ratio >= target else 'missed'}")
    result = {"ratios": {name: round(ratio, 3) for name, (ratio, _) in ratios.items()}, **middle}
    finish(result, all(ratio >= target for ratio, target in ratios.values()), check)


if __name__ == "__main__":
    main()
