"""Generate text with a trained model.

    python sample.py                                     the newest run under out/, with an empty prompt
    python sample.py small --prompt 'def ' --num-samples 3
    python sample.py out/small/checkpoints/best --prompt FILE:notes.txt --stop 'END' --json
    python sample.py --interactive
    python sample.py out/chat --chat --system 'You are Ada.'

The options, the prompts, the model. nib/generation/terminal.py prints the text.
"""

from __future__ import annotations

from nib.common.signals import exit_on_interrupt

if __name__ == "__main__":  # before the other imports, so that Ctrl-C during them leaves no traceback
    exit_on_interrupt()

import io
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nib.common.exits import InputError, memory_errors, run_script
from nib.common.options import ADAPTER, DEVICES, DTYPES, option, parse
from nib.common.streams import write_result
from nib.cpu.threads import choose_threads
from nib.generation.request import Sample, SamplingSettings, TextStream, make_samples, read_messages, read_prompt

if TYPE_CHECKING:
    from model import GPT
    from nib.tokenizer.tokenizer import Tokenizer

SAMPLE_BYTES = 2500  # of a sample besides its cache and logits: its text, generator and random numbers
USAGE = "python sample.py [RUN|CHECKPOINT|HF_DIR] [--prompt TEXT|FILE:path|-]... [--name=value]..."
ABOUT = (
    "Continues texts with a model: the newest run under out/, or a run, a checkpoint, a file such as checkpoints/best, "
    "a Hugging Face directory or hub name, or nanoGPT's ckpt.pt. The text goes to standard output, everything else to "
    "standard error."
)


@dataclass
class Options(SamplingSettings):
    prompt: list[str] = option(
        [], "the text to continue, FILE:path to read a file, - for standard input; several are generated as one batch",
        group="input and output",
    )  # fmt: skip
    interactive: bool = option(False, "continue each line that you type; Ctrl-D ends", group="input and output")
    chat: bool = option(
        False, "chat, by the model's chat template: answer each line that you type, or each --prompt (a question, or a "
        "list of messages as JSON)", group="input and output",
    )  # fmt: skip
    system: str = option("", "the system message of --chat", group="input and output")
    json: bool = option(
        False, "print one JSON object per sample: prompt, text, tokens, finish_reason, tokens_per_second, and logprobs "
        "with --top-logprobs",
        group="input and output",
    )  # fmt: skip
    adapter: str = option("", ADAPTER, group="system")
    device: str = option("auto", DEVICES, group="system")
    dtype: str = option("auto", "of the weights; auto takes 16 bits on a GPU", choices=DTYPES, group="system")
    quantize: str = option(
        "none", "int8: 8-bit weights, activations not quantized; a quarter of the memory, faster on a CPU",
        choices=("none", "int8"), group="system",
    )  # fmt: skip
    compile: bool = option(
        False, "run each step as one CUDA graph, compiled before the first token. Only for CUDA, where it has not been "
        "run yet", group="system",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parsed = parse(Options, sys.argv[1:] if argv is None else argv, usage=USAGE, about=ABOUT, max_arguments=1)
    write_result("", end="")  # fail now if standard output is closed
    options = parsed.settings
    prompts: list[Any] = read_prompts(options)
    TextStream(options.stop)  # fail now if a stop text is empty
    if options.compile and not options.cache:
        raise InputError("--compile needs the cache. Leave out --compile or --no-cache")
    if options.top_logprobs and not options.json:
        raise InputError("--top-logprobs is printed by --json. Add --json")
    if options.top_logprobs and options.compile:
        raise InputError("--compile does not support --top-logprobs. Leave out --compile or --top-logprobs")
    # Here, not at the top, so that --help and a typing error answer before torch is loaded.
    choose_threads()
    from nib.generation.chat import open_chat
    from nib.generation.cuda_graph import CompiledRows
    from nib.generation.engine import Rows
    from nib.generation.terminal import conversation_turns, converse, say, write

    with memory_errors("Use a smaller model, or --quantize int8"):
        model, tokenizer, origin = load_model(
            parsed.arguments, options.device, options.dtype, options.quantize, options.compile, options.adapter
        )
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows a question mark
        sys.stdout.reconfigure(errors="replace")
    with memory_errors("Lower --num-samples or --max-new-tokens, or give fewer or shorter prompts"):
        reserve(model, len(prompts) * options.num_samples, options)
        encode = open_chat(tokenizer) if options.chat else None

        def make(prompts: list[Any]) -> list[Sample]:
            return make_samples(prompts, tokenizer, options, model.config.vocab_size, encode)

        def show(samples: list[Sample]) -> int:
            return write(model, samples, options, options.json, CompiledRows if options.compile else Rows)

        if options.interactive or (encode and not options.prompt):
            say(origin)
            if encode:
                return converse(conversation_turns(model, tokenizer, encode, options, options.system, options.json))
            return converse(lambda line: show(make([line])))
        samples = make(prompts)
        say(origin)
        return show(samples)


def read_prompts(options: Options) -> list[Any]:
    """The prompts of --prompt: texts, or with --chat messages; an empty text if there is none. Raises InputError."""
    if options.interactive and options.prompt:
        raise InputError("--interactive reads the prompts from standard input. Leave out --prompt or --interactive")
    if options.prompt.count("-") > 1:
        raise InputError("--prompt - is given twice, but standard input can only be read once. Leave one out")
    if options.system and not options.chat:
        raise InputError("--system is the system message of a chat. Add --chat")
    if options.chat and not options.prompt and (options.compile or options.num_samples > 1):
        what = "--compile would compile for each turn" if options.compile else "a turn of --chat has one answer"
        raise InputError(f"{what}. Leave out {'--compile' if options.compile else '--num-samples'}, or give a --prompt")
    prompts = [read_prompt(source) for source in options.prompt] or [""]
    return [read_messages(prompt, options.system) for prompt in prompts] if options.chat else prompts


def load_model(
    arguments: list[str],
    device_name: str,
    dtype_name: str,
    quantized: str = "none",
    compiled: bool = False,
    adapter: str = "",
) -> tuple[GPT, Tokenizer, str]:
    """The named model on its device and in its dtype, its tokenizer, and a line that describes it.

    Raises InputError.
    """
    import torch

    from model import GPT, GPTConfig
    from nib.common.device import cast, pick_device, pick_dtype
    from nib.cpu.build import kernels
    from nib.cpu.fused_blocks import fuse_blocks
    from nib.cpu.int8 import pack_int8, quantize
    from nib.cpu.linear import pack_bfloat16, pack_linears
    from nib.cpu.process import tune_for_sampling
    from nib.formats.adapter import AdaptedModel
    from nib.formats.load import build, open_source, read_config

    device = pick_device(device_name)
    dtype = pick_dtype(dtype_name, device)
    if device.type == "cpu":
        tune_for_sampling()
    if compiled and device.type != "cuda":
        raise InputError("--compile is for CUDA; it is slower on a CPU (measured in bench/NOTES.md). Leave it out")
    source = open_source(arguments[0] if arguments else None, adapter=adapter)
    if quantized == "int8" and isinstance(source, AdaptedModel):
        what = "an adapter is not merged into 8 bits"
        raise InputError(f"{what}. Leave out --quantize, or merge first: python export.py RUN OUT --merge")
    config = read_config(source, GPTConfig)
    model = build(source, lambda: GPT(config), sampling=True)
    model.to(device)
    int8, hidden = quantized == "int8", dtype  # hidden: of all but the matrices
    native = kernels() if device.type == "cpu" and dtype == torch.bfloat16 else None
    if native:  # it reads matrices of fewer bits and computes in float32
        hidden = torch.float32
    if int8:
        quantize(model, hidden)
    elif native:
        pack_bfloat16(model, native)
    for name, parameter in model.named_parameters():  # not RoPE's tables: 16 bits are too few for angles
        parameter.data = cast(parameter.data, hidden, name, copy=True)
    if int8:
        pack_int8(model)
    elif not native:
        pack_linears(model)
    model.eval()
    if device.type == "cpu" and hidden == torch.float32 and (reason := fuse_blocks(model)):
        print(f"sampling with model.py's own blocks: {reason}", file=sys.stderr)
    origin = f"{source.directory} on {device}, {str(dtype).removeprefix('torch.')}{', int8' * int8}"
    return model, source.tokenizer(), origin + ", compiled" * compiled


def reserve(model: GPT, count: int, options: Options) -> None:
    """Allocate the least memory that so many samples need, to fail early if that is too much.

    Raises MemoryError or RuntimeError. If the system overcommits memory, it may still kill the process later.
    """
    import torch

    config, weight = model.config, next(model.parameters())
    room = min(config.block_size, options.max_new_tokens) if options.cache else 0
    cache = 2 * config.n_layer * config.n_kv_head * config.head_size * room * weight.itemsize
    for size, device in ((SAMPLE_BYTES, "cpu"), (cache + 4 * config.vocab_size, weight.device)):
        torch.empty(min(2**62, count * size), dtype=torch.uint8, device=device)


if __name__ == "__main__":
    run_script(main)
