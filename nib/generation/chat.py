"""A conversation: what has been said, as the model is shown it, and the cache that one turn leaves to the next."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nib.common.exits import InputError
from nib.data.chat import Chat
from nib.generation.engine import LanguageModel, Rows
from nib.generation.request import Sample, SamplingSettings
from nib.tokenizer.tokenizer import Tokenizer

Message = dict[str, Any]
Encode = Callable[[list[Message]], list[int]]


def open_chat(tokenizer: Tokenizer) -> Encode:
    """Messages to the ids of a prompt by the tokenizer's chat template, whose stop tokens end texts from now on.

    Raises InputError where there is none.
    """
    chat = Chat(tokenizer)
    tokenizer.stop_ids |= chat.stop_ids

    def encode(messages: list[Message]) -> list[int]:
        try:
            return chat.prompt_ids(messages)
        except InputError as error:
            raise InputError(f"{error}. Give other messages, or leave out --system") from None

    return encode


class Conversation:
    """Messages that are kept from turn to turn, as many as fit into the context.

    `encode` turns messages into the ids of a prompt for the assistant's next one.
    """

    def __init__(self, encode: Encode, block_size: int, room: int, system: str) -> None:
        """Keeps `room` of block_size tokens free for an answer, but not more than a quarter."""
        self.encode, self.block_size, self.most = encode, block_size, block_size - min(room, block_size // 4)
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []  # question and answer in turn
        self.asked: list[Message] = []  # the same, and the last question
        self.rows: NextTurn | None = None  # those that wrote the last answer

    def ask(self, question: str) -> tuple[list[Message], int]:
        """The messages with this question as the last, and how many of the oldest are left out from now on.

        When the context is full they are, until half of it is free, so that this does not come with each turn.
        """
        self.asked, left_out, most = [*self.turns, {"role": "user", "content": question}], 0, self.most
        while len(self.encode(self.system + self.asked)) > most and len(self.asked) > 1:
            self.asked, left_out, most = self.asked[2:], left_out + 1, self.block_size // 2
        return self.system + self.asked, left_out

    def answer(self, text: str) -> None:
        """Take the answer to the last question; without it that was not asked."""
        self.turns = [*self.asked, {"role": "assistant", "content": text}]

    def make_rows(self, model: LanguageModel, samples: list[Sample], settings: SamplingSettings) -> Rows:
        """For stream_text: of the prompt only what the turn before did not show the model is computed."""
        before, self.rows = self.rows, None
        if before and before.samples[0].finish_reason == "interrupted":  # perhaps while the cache was written
            before = None
        self.rows = NextTurn(model, samples, settings, before)
        return self.rows


class NextTurn(Rows):
    """One row whose cache begins with what that of the row before has in common with it."""

    def __init__(
        self, model: LanguageModel, samples: list[Sample], settings: SamplingSettings, before: NextTurn | None
    ) -> None:
        self.before = before
        super().__init__(model, samples, settings)
        self.before = None

    def prefill(self, contexts: list[list[int]]) -> Tensor:
        if not self.before or not self.before.cache or not self.cache or len(contexts) > 1:
            return super().prefill(contexts)
        (context,), known = contexts, self.before.contexts[0]
        pairs = zip(context[:-1], known, strict=False)  # the last token is always computed, for its logits
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.cache.memory[..., :same, :] = self.before.cache.memory[..., :same, :]
        self.cache.lengths = [same]
        x = self.model.hidden(torch.tensor([context[same:]], device=self.device), self.cache)  # (1, T, C)
        return self.model.logits(x[:, -1])[:, : self.vocab_size]
