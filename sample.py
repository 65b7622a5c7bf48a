"""Write text with a trained model.

    python sample.py                                     the newest run under out/, from nothing
    python sample.py small --prompt 'def ' --num-samples 3
    python sample.py out/small/checkpoints/best --prompt FILE:notes.txt --stop 'END' --json
    python sample.py --interactive
    python sample.py chat --chat --system 'You are Ada.'

From the command line down: the options, the prompts, the model, and the ways to print what it writes.
"""

from __future__ import annotations

from nib.common.signals import exit_on_interrupt, stop_signals_raise

if __name__ == "__main__":  # before the other imports, so that Ctrl-C during them leaves no traceback
    exit_on_interrupt()

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nib.common.exits import InputError, run_script
from nib.common.options import option, parse
from nib.common.streams import write_result
from nib.common.wording import counted, printable
from nib.cpu.threads import choose_threads
from nib.generation.request import (
    BYTE_ORDER_MARK,
    Sample,
    SamplingSettings,
    TextStream,
    make_samples,
    read_prompt,
)  # fmt: skip

if TYPE_CHECKING:
    from model import GPT
    from nib.tokenizer.tokenizer import Tokenizer

Encode = Callable[[list[dict[str, Any]]], list[int]]
INTERRUPTED = 130
SAMPLE_BYTES = 2500  # of what a sample takes beside its cache and logits: its text, generator and random numbers
USAGE = "python sample.py [RUN|CHECKPOINT|HF_DIR] [--prompt TEXT|FILE:path|-]... [--name=value]..."
ABOUT = (
    "Continue texts with a model: the newest run under out/, or the run, checkpoint or file (checkpoints/best) that is "
    "named, or a Hugging Face directory or hub name, or nanoGPT's ckpt.pt. The text goes to standard output, all else "
    "to standard error."
)


@dataclass
class Options(SamplingSettings):
    prompt: list[str] = option(
        [], "the text to continue, FILE:path for a file's, - for standard input's; several are written as one batch",
        group="input and output",
    )  # fmt: skip
    interactive: bool = option(False, "continue each line that is typed; Ctrl-D ends", group="input and output")
    chat: bool = option(
        False, "answer as the assistant of the model's chat template: each line that is typed, or each --prompt, which "
        "is a question or the JSON of a list of messages", group="input and output",
    )  # fmt: skip
    system: str = option("", "the system message of a --chat", group="input and output")
    json: bool = option(
        False, "print a JSON object a sample: prompt, text, tokens, finish_reason, tokens_per_second, and logprobs "
        "with --top-logprobs",
        group="input and output",
    )  # fmt: skip
    adapter: str = option(
        "", "a low-rank adapter to add to the model: a directory of peft's, or a run of LoRA", group="system"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", group="system")
    dtype: str = option(
        "auto", "of the weights; auto takes 16 bits on a GPU",
        choices=("auto", "float32", "bfloat16", "float16"), group="system",
    )  # fmt: skip
    quantize: str = option(
        "none", "int8: matrices of 8 bits and exact activations; a quarter of the memory, faster on a CPU",
        choices=("none", "int8"), group="system",
    )  # fmt: skip
    compile: bool = option(
        False, "record a step of all texts as one CUDA graph; compiling takes a while before the first. Only for CUDA, "
        "where it has not been run yet", group="system",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parsed = parse(Options, sys.argv[1:] if argv is None else argv, usage=USAGE, about=ABOUT, max_arguments=1)
    write_result("", end="")  # says now that standard output is closed
    options = parsed.settings
    prompts: list[Any] = read_prompts(options)
    TextStream(options.stop)  # says now what is wrong with them
    if options.compile and not options.cache:
        raise InputError("--compile works on the cache. Leave out --compile or --no-cache")
    if options.top_logprobs and not options.json:
        raise InputError("--top-logprobs is printed by --json. Add --json")
    if options.top_logprobs and options.compile:
        raise InputError("--compile keeps no probabilities. Leave out --compile or --top-logprobs")
    from nib.common.memory import memory_errors

    with memory_errors("Use a smaller model, or --quantize int8"):
        model, tokenizer, origin = load_model(
            parsed.arguments, options.device, options.dtype, options.quantize, options.compile, options.adapter
        )
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows a question mark
        sys.stdout.reconfigure(errors="replace")
    with memory_errors("Lower --num-samples or --max-new-tokens, or give fewer or shorter prompts"):
        reserve(model, len(prompts) * options.num_samples, options)
        size, encode = model.config.vocab_size, open_chat(tokenizer) if options.chat else None
        if encode and not options.prompt:
            status(origin)
            return converse(answer_turns(encode, model, tokenizer, options))
        if options.interactive:
            status(origin)
            return converse(lambda line: write(make_samples([line], tokenizer, options, size), model, options))
        samples = make_samples(prompts, tokenizer, options, size, encode)
        status(origin)
        return write(samples, model, options)


def read_prompts(options: Options) -> list[Any]:
    """The texts, with --chat messages, that --prompt means; an empty text where there is none. Raises InputError."""
    if options.interactive and options.prompt:
        raise InputError("--interactive reads the prompts from standard input. Leave out --prompt or --interactive")
    if options.prompt.count("-") > 1:
        raise InputError("--prompt - is there twice, but standard input can be read once. Leave one out")
    if options.system and not options.chat:
        raise InputError("--system is the system message of a chat. Add --chat")
    if options.chat and not options.prompt and (options.compile or options.num_samples > 1):
        what = "--compile compiles anew for each turn" if options.compile else "a turn of --chat has one answer"
        raise InputError(f"{what}. Leave out {'--compile' if options.compile else '--num-samples'}, or give a --prompt")
    prompts = [read_prompt(source) for source in options.prompt] or [""]
    return [read_messages(prompt, options.system) for prompt in prompts] if options.chat else prompts


def read_messages(prompt: str, system: str) -> list[dict[str, Any]]:
    """The messages of a chat's prompt, which is their JSON or a question. Raises InputError."""
    messages: Any = [{"role": "user", "content": prompt}]
    if prompt.lstrip().startswith(("[", "{")):
        try:
            messages = json.loads(prompt)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--prompt begins as JSON does and is none: {error}. Correct it") from None
        messages = messages.get("messages") if isinstance(messages, dict) else messages
    whole = isinstance(messages, list) and messages
    if not whole or not all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages):
        raise InputError('--prompt is not a list of messages. Write [{"role": "user", "content": "..."}]')
    if messages[-1]["role"] == "assistant":
        raise InputError("the last message of --prompt is the assistant's. Give one that it can answer")
    if system and messages[0]["role"] == "system":
        raise InputError("--prompt has a system message. Leave out --system")
    return [{"role": "system", "content": system}] * bool(system) + messages


def load_model(
    arguments: list[str],
    device_name: str,
    dtype_name: str,
    quantized: str = "none",
    compiled: bool = False,
    adapter: str = "",
) -> tuple[GPT, Tokenizer, str]:
    """The model that is named, on its device, in its dtype; its tokenizer; and a line that says which.

    Raises InputError.
    """
    # Here, not at the top, so that --help and a typing error answer before torch is loaded.
    choose_threads()
    import torch

    from model import GPT, GPTConfig
    from nib.common.device import pick_device, pick_dtype
    from nib.cpu.fused_blocks import fuse_blocks
    from nib.cpu.int8 import pack_int8, quantize
    from nib.cpu.linear import pack_linears
    from nib.cpu.process import tune_for_sampling
    from nib.formats.adapter import AdaptedModel
    from nib.formats.load import build, open_source, read_config

    device = pick_device(device_name)
    dtype = pick_dtype(dtype_name, device)
    if device.type == "cpu":
        tune_for_sampling()
    if compiled and device.type != "cuda":
        raise InputError("--compile is for CUDA and does not pay on a CPU (measured in bench/NOTES.md). Leave it out")
    source = open_source(arguments[0] if arguments else None, adapter=adapter)
    if quantized == "int8" and isinstance(source, AdaptedModel):
        what = "an adapter is not merged into 8 bits"
        raise InputError(f"{what}. Leave out --quantize, or merge first: python export.py RUN OUT --merge")
    config = read_config(source, GPTConfig)
    model = build(source, lambda: GPT(config), sampling=True)
    model.to(device)
    int8 = quantized == "int8"
    if int8:
        quantize(model, dtype)
    for parameter in model.parameters():  # not the tables of rope: angles lose more than weights in 16 bits
        parameter.data = parameter.data.to(dtype, copy=True)
    (pack_int8 if int8 else pack_linears)(model)
    model.eval()
    if device.type == "cpu" and dtype == torch.float32 and (reason := fuse_blocks(model)):
        status(f"sampling with model.py's own blocks: {reason}")
    origin = f"{source.directory} on {device}, {str(dtype).removeprefix('torch.')}{', int8' * int8}"
    return model, source.tokenizer(), origin + ", compiled" * compiled


def open_chat(tokenizer: Tokenizer) -> Encode:
    """Messages to the ids of a prompt by the tokenizer's chat template, whose stop tokens end texts from now on.

    Raises InputError where there is none.
    """
    from nib.data.chat import Chat

    chat = Chat(tokenizer)
    tokenizer.stop_ids |= chat.stop_ids

    def encode(messages: list[dict[str, Any]]) -> list[int]:
        try:
            return chat.prompt_ids(messages)
        except InputError as error:
            raise InputError(f"{error}. Give other messages, or leave out --system") from None

    return encode


def answer_turns(encode: Encode, model: GPT, tokenizer: Tokenizer, options: Options) -> Callable[[str], int]:
    """What answers one line after another in a conversation."""
    from nib.generation.chat import Conversation

    conversation = Conversation(encode, model.config.block_size, options.max_new_tokens, options.system)

    def answer(line: str) -> int:
        if not line.strip():
            return 0
        messages, left_out = conversation.ask(line)
        if left_out:
            status(f"the context is full: left out {counted(left_out, 'turn')} from the beginning")
        (sample,) = make_samples([messages], tokenizer, options, model.config.vocab_size, encode)
        code = write([sample], model, options, conversation.make_rows)
        conversation.answer(sample.text)
        if sample.finish_reason == "length":
            status(f"the answer is cut after {counted(options.max_new_tokens, 'token')}. Raise --max-new-tokens")
        return code

    return answer


def reserve(model: GPT, count: int, options: Options) -> None:
    """Ask at once for the memory that so many samples take at least, which may be more than there is.

    Raises MemoryError or RuntimeError. What is only found to be too much as it is filled is ended by the system.
    """
    import torch

    config, weight = model.config, next(model.parameters())
    room = min(config.block_size, options.max_new_tokens) if options.cache else 0
    cache = 2 * config.n_layer * config.n_kv_head * config.head_size * room * weight.itemsize
    for size, device in ((SAMPLE_BYTES, "cpu"), (cache + 4 * config.vocab_size, weight.device)):
        torch.empty(min(2**62, count * size), dtype=torch.uint8, device=device)


@stop_signals_raise()
def write(samples: list[Sample], model: GPT, options: Options, make_rows: Any = None) -> int:
    """Write the samples and print them; returns the exit status. Raises RunError."""
    from nib.generation.cuda_graph import CompiledRows
    from nib.generation.engine import Rows, stream_text

    make_rows = make_rows or (CompiledRows if options.compile else Rows)
    warn_of_long_prompts(samples, model.config.block_size)
    printer = None if options.json else Printer(samples)
    interrupted = False
    try:
        for sample, text in stream_text(model, samples, options, make_rows):
            if printer:
                printer.show(sample, text)
    except KeyboardInterrupt:
        interrupted = True
        for sample in samples:
            if not sample.finish_reason:
                text = sample.finish("interrupted")
                if printer:
                    printer.show(sample, text)
    if options.json:
        for sample in samples:
            write_result(json.dumps(as_json(sample)))
    return INTERRUPTED if interrupted else 0


def warn_of_long_prompts(samples: list[Sample], block_size: int) -> None:
    for sample in samples:
        if sample.number == 0 and len(sample.prompt_tokens) > block_size:
            length = len(sample.prompt_tokens)
            which = f"prompt {sample.prompt_number + 1}" if samples[-1].prompt_number else "the prompt"
            status(f"{which} has {length} tokens; the model sees its last {block_size}")


def as_json(sample: Sample) -> dict[str, Any]:
    speed = sample.tokens_per_second
    shown: dict[str, Any] = {
        "prompt": sample.prompt,
        "text": sample.text,
        "tokens": sample.tokens,
        "finish_reason": sample.finish_reason,
        "tokens_per_second": None if speed is None else round(speed, 1),
    }
    if sample.logprobs:  # of the model itself, before temperature and filters
        of = sample.tokenizer.token_text
        shown["logprobs"] = [
            {
                "id": token, "text": of(token), "logprob": logprob,
                "top": [{"id": id, "text": of(id), "logprob": value} for id, value in top],
            }
            for token, (logprob, top) in zip(sample.tokens, sample.logprobs, strict=False)  # without the end of text's
        ]  # fmt: skip
    return shown


class Printer:
    """Prints samples in their order: one as it comes; those after it are kept until it is their turn.

    An answer in a chat is printed without what it answers.
    """

    def __init__(self, samples: list[Sample]) -> None:
        self.samples, self.turn = samples, 0
        self.begin()

    def begin(self) -> None:
        """Print what there is of the sample whose turn it is, and go on to the next when it is finished."""
        while self.turn < len(self.samples):
            sample = self.samples[self.turn]
            if len(self.samples) > 1:
                several = f"prompt {sample.prompt_number + 1}, " if self.samples[-1].prompt_number else ""
                write_result(f"--- {several}sample {sample.number + 1} ---")
            before = sample.prompt if isinstance(sample.prompt, str) else ""
            write_result(before + sample.text, end="")
            if not sample.finish_reason:
                return
            self.end()

    def end(self) -> None:
        write_result("")
        self.turn += 1

    def show(self, sample: Sample, text: str) -> None:
        if sample is self.samples[self.turn]:
            write_result(text, end="")
            if sample.finish_reason:
                self.end()
                self.begin()


def converse(answer: Callable[[str], int]) -> int:
    """Answer each line of standard input until it ends. What is wrong with a line is said, and the next one read."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
    while True:
        try:
            with stop_signals_raise():  # Ctrl-C leaves the terminal as it was
                line = input("> " if typed else "")
        except EOFError:
            if typed:
                write_result("")
            return 0
        except UnicodeDecodeError:
            raise InputError("standard input is not UTF-8. Give text") from None
        except OSError as error:
            raise InputError(f"cannot read standard input: {error.strerror}. Give text") from None
        try:
            answer(line.removeprefix(BYTE_ORDER_MARK))
        except InputError as error:
            status(f"error: {printable(error)}")


def status(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_script(main)
