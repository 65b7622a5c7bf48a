"""Samples at the terminal: printed while they are written, and lines that are answered as they are typed."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

from nib.common.exits import InputError
from nib.common.signals import stop_signals_raise
from nib.common.streams import write_result
from nib.common.wording import counted, printable
from nib.generation.chat import Conversation, Encode
from nib.generation.engine import LanguageModel, Rows, stream_text
from nib.generation.request import BYTE_ORDER_MARK, Sample, SamplingSettings, make_samples
from nib.tokenizer.tokenizer import Tokenizer

INTERRUPTED = 130


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@stop_signals_raise()
def write(
    model: LanguageModel, samples: list[Sample], settings: SamplingSettings, as_json: bool = False,
    make_rows: Any = Rows,
) -> int:  # fmt: skip
    """Write the samples and print them, also what there is of them at Ctrl-C; returns the exit status.

    `make_rows` is what stream_text takes. Raises RunError.
    """
    warn_of_long_prompts(samples, model.config.block_size)
    show = (lambda *_: None) if as_json else Printer(samples).show
    status = 0
    try:
        for sample, text in stream_text(model, samples, settings, make_rows):
            show(sample, text)
    except KeyboardInterrupt:
        status = INTERRUPTED
        for sample in samples:
            if not sample.finish_reason:
                show(sample, sample.finish("interrupted"))
    if as_json:
        for sample in samples:
            write_result(json.dumps(to_json(sample)))
    return status


def warn_of_long_prompts(samples: list[Sample], block_size: int) -> None:
    for sample in samples:
        if sample.number == 0 and len(sample.prompt_tokens) > block_size:
            length = len(sample.prompt_tokens)
            which = f"prompt {sample.prompt_number + 1}" if samples[-1].prompt_number else "the prompt"
            say(f"{which} has {length} tokens; the model sees its last {block_size}")


def to_json(sample: Sample) -> dict[str, Any]:
    speed = sample.tokens_per_second
    shown: dict[str, Any] = {
        "prompt": sample.prompt,
        "text": sample.text,
        "tokens": sample.tokens,
        "finish_reason": sample.finish_reason,
        "tokens_per_second": None if speed is None else round(speed, 1),
    }
    if sample.logprobs:  # the model's, before temperature and filters
        of = sample.tokenizer.token_text
        shown["logprobs"] = [
            {
                "id": token, "text": of(token), "logprob": logprob,
                "top": [{"id": id, "text": of(id), "logprob": value} for id, value in top],
            }
            for token, (logprob, top) in zip(sample.tokens, sample.logprobs, strict=False)  # without end-of-text
        ]  # fmt: skip
    return shown


class Printer:
    """Prints samples in order: the current one token by token, later ones when it is their turn.

    An answer in a chat is printed without its prompt.
    """

    def __init__(self, samples: list[Sample]) -> None:
        self.samples, self.turn = samples, 0
        self.begin()

    def begin(self) -> None:
        """Print what exists of the current sample, and continue with the next one if it is finished."""
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
    """Answer each line of standard input until it ends. An error in a line is printed, and the next line is read."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
    while True:
        try:
            with stop_signals_raise():  # so that readline restores the terminal after Ctrl-C
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
            say(f"error: {printable(error)}")


def conversation_turns(
    model: LanguageModel, tokenizer: Tokenizer, encode: Encode, settings: SamplingSettings, system: str,
    as_json: bool,
) -> Callable[[str], int]:  # fmt: skip
    """For `converse`: what answers one line after another as the assistant, in one conversation."""
    conversation = Conversation(encode, model.config.block_size, settings.max_new_tokens, system)

    def answer(line: str) -> int:
        if not line.strip():
            return 0
        messages, left_out = conversation.ask(line)
        if left_out:
            say(f"the context is full: left out {counted(left_out, 'turn')} from the beginning")
        (sample,) = make_samples([messages], tokenizer, settings, model.config.vocab_size, encode)
        code = write(model, [sample], settings, as_json, conversation.make_rows)
        conversation.answer(sample.text)
        if sample.finish_reason == "length":
            say(f"the answer was cut off at {counted(settings.max_new_tokens, 'token')}. Raise --max-new-tokens")
        return code

    return answer
