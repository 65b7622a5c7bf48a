"""Requests for generation and their results as text: settings, stop strings, samples. Does not import torch."""

from __future__ import annotations

import codecs
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nib.common.exits import InputError
from nib.common.options import option

if TYPE_CHECKING:
    from nib.tokenizer.tokenizer import Tokenizer

sampling = functools.partial(option, group="sampling")
BYTE_ORDER_MARK = "\ufeff"  # some programs put it at the start of a text file


@dataclass
class SamplingSettings:
    """How to continue a text. After the repetition penalty and the temperature, the filters apply in the order of
    their fields, as in Hugging Face transformers."""

    num_samples: int = sampling(1, "continuations of each prompt", at_least=1)
    max_new_tokens: int = sampling(200, "maximum number of tokens to generate", at_least=0)
    temperature: float = sampling(
        0.8, "below 1 sharpens the distribution, above 1 flattens it; 0 takes the most probable token", at_least=0
    )
    top_k: int = sampling(200, "draw from this many most probable tokens, ties by lowest id; 0: from all", at_least=0)
    top_p: float = sampling(
        1.0, "draw from the fewest most probable tokens that together have this probability; 0: take the best one",
        at_least=0, at_most=1,
    )  # fmt: skip
    min_p: float = sampling(
        0.0, "draw from tokens with at least this share of the best token's probability", at_least=0, at_most=1
    )
    repetition_penalty: float = sampling(
        1.0, "above 1 makes tokens of the prompt and of the text so far less probable", above=0
    )
    stop: list[str] = option([], "stop before this text; may be given several times", group="sampling")
    seed: int = sampling(1337, "sample i of a prompt is a function of the seed, the prompt and i", at_least=0)
    top_logprobs: int = sampling(
        0, "with --json: also each token's log-probability, and those of this many most probable tokens", at_least=0
    )
    cache: bool = sampling(
        True, "use a KV cache; --no-cache recomputes everything for each token, with the same result"
    )


class TextStream:
    """Bytes in, text out as soon as it is final: no incomplete characters, and nothing that may begin a stop string.

    The whole output is the bytes decoded as UTF-8, with U+FFFD for invalid bytes, up to the first stop string.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise InputError("a stop text cannot be empty. Leave --stop out, or give the text to stop before")
        self.stop = stop
        self.stopped = False
        self.held = ""  # decoded text that may begin a stop string
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes, final: bool = False) -> str:
        """The text that is final after `data`; with `final` all the rest. Nothing after a stop string."""
        if self.stopped:
            return ""
        text = self.held + self.decoder.decode(data, final)
        ends = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        self.stopped = bool(ends)
        certain = min(ends) if ends else len(text) if final else self._certain(text)
        self.held = "" if ends else text[certain:]
        return text[:certain]

    def _certain(self, text: str) -> int:
        """The start of the longest suffix of `text` that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        for begin in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[begin:]) for stop in self.stop):
                return begin
        return len(text)


class Sample:
    """One continuation of one prompt (a text or the messages of a chat), finished or still being generated.

    `tokens` are the generated ids, without the id that ended the text; `text` is their text, up to a stop string.
    `finish_reason` is "length", "end_of_text", "stop" or "interrupted", or "" while the sample is not finished.
    """

    def __init__(
        self, prompt: Any, prompt_number: int, number: int, prompt_tokens: list[int],
        tokenizer: Tokenizer, settings: SamplingSettings,
    ) -> None:  # fmt: skip
        self.prompt, self.prompt_number, self.number = prompt, prompt_number, number
        self.prompt_tokens = prompt_tokens
        self.tokenizer = tokenizer
        self.max_new_tokens = settings.max_new_tokens
        self.stream = TextStream(settings.stop)
        self.tokens: list[int] = []
        self.logprobs: list[tuple[float, list[tuple[int, float]]]] = []  # with top_logprobs: each token's, and the best
        self.text = ""
        self.finish_reason = "" if settings.max_new_tokens else "length"
        self.tokens_per_second: float | None = None  # of all samples, after the first token; None: too few tokens

    def append(self, token: int) -> str:
        """Add the next token; returns the text that is now final. Sets `finish_reason` if the token ends the sample."""
        if token == self.tokenizer.end_of_text or token in self.tokenizer.stop_ids:
            return self.finish("end_of_text")
        self.tokens.append(token)
        text = self.stream.push(self.tokenizer.decode_bytes([token]))
        self.text += text
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_new_tokens:
            text += self.finish("length")
        return text

    def finish(self, reason: str) -> str:
        """End the sample; returns the text that was held back."""
        text = self.stream.push(b"", final=True)
        self.text += text
        self.finish_reason = "stop" if self.stream.stopped else reason
        return text


def read_prompt(source: str) -> str:
    """The text of --prompt: TEXT itself, FILE:path from a file, - from standard input. Raises InputError."""
    if source != "-" and not source.startswith("FILE:"):
        return source
    name = "standard input" if source == "-" else source.removeprefix("FILE:")
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(name).read_bytes()
        return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except MemoryError:
        raise InputError(f"the prompt in {name} does not fit into memory. Give a shorter one") from None
    except OSError as error:
        raise InputError(f"cannot read the prompt from {name}: {error.strerror}. Give a readable text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt in {name} is not UTF-8 at byte {error.start}. Give a text file") from None


def read_messages(prompt: str, system: str) -> list[dict[str, Any]]:
    """The messages of a --chat prompt: a question, or messages as JSON. Raises InputError."""
    messages: Any = [{"role": "user", "content": prompt}]
    if prompt.lstrip().startswith(("[", "{")):
        try:
            messages = json.loads(prompt)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--prompt begins like JSON but is not valid: {error}. Correct it") from None
        messages = messages.get("messages") if isinstance(messages, dict) else messages
    whole = isinstance(messages, list) and messages
    if not whole or not all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages):
        raise InputError('--prompt is not a list of messages. Write [{"role": "user", "content": "..."}]')
    if messages[-1]["role"] == "assistant":
        raise InputError("the last message of --prompt is the assistant's. End with a message to answer")
    if system and messages[0]["role"] == "system":
        raise InputError("--prompt has a system message. Leave out --system")
    return [{"role": "system", "content": system}] * bool(system) + messages


def start_tokens(tokenizer: Tokenizer, known: int) -> list[int]:
    """The ids for an empty prompt: end-of-text, else a newline, else id 0.

    End-of-text is not used if the model has embeddings only for ids 0 to known - 1 and this is not one of them.
    """
    if tokenizer.end_of_text is not None and tokenizer.end_of_text < known:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode("\n")
    except InputError:  # a character tokenizer without a newline
        return [0]


def make_samples(
    prompts: Sequence[Any], tokenizer: Tokenizer, settings: SamplingSettings, known: int = 2**63,
    encode: Callable[[Any], list[int]] | None = None,
) -> list[Sample]:  # fmt: skip
    """`num_samples` empty samples of each prompt, in order, for a model with embeddings for ids 0 to known - 1.

    Prompts are texts, or whatever `encode` turns into ids. Raises InputError for a prompt that cannot be encoded or
    has other ids.
    """
    samples, put = [], tokenizer.encode_prompt("")
    for prompt_number, prompt in enumerate(prompts):
        tokens = (encode or tokenizer.encode_prompt)(prompt) or start_tokens(tokenizer, known)
        tokenizer.check_ids(tokens, known, "the prompt", put)
        for number in range(settings.num_samples):
            samples.append(Sample(prompt, prompt_number, number, tokens, tokenizer, settings))
    return samples
