"""A conversation: its messages as the prompt of the next turn, and the KV cache kept from turn to turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nib.common.exits import InputError
from nib.generation.engine import LanguageModel, Rows
from nib.generation.request import Sample, SamplingSettings
from nib.tokenizer.tokenizer import Tokenizer

Message = dict[str, Any]
Encode = Callable[[list[Message]], list[int]]


def open_chat(tokenizer: Tokenizer) -> Encode:
    """A function that turns messages into the ids of a prompt, with the tokenizer's chat template.

    Adds the template's stop ids to the tokenizer. Raises InputError if there is no template.
    """
    from nib.data.chat import Chat  # takes 10 ms of start-up, for chats only

    chat = Chat(tokenizer)
    tokenizer.stop_ids |= chat.stop_ids

    def encode(messages: list[Message]) -> list[int]:
        try:
            return chat.prompt_ids(messages)
        except InputError as error:
            if ". " in str(error):  # it has advice of its own
                raise
            raise InputError(f"{error}. Give other messages, or leave out --system") from None

    return encode


class Conversation:
    """The messages of a conversation, as many as fit into the context.

    `encode` turns messages into the ids of a prompt for the assistant's next message.
    """

    def __init__(self, encode: Encode, block_size: int, room: int, system: str) -> None:
        """Keeps `room` tokens of the context free for an answer, but at most a quarter of it."""
        self.encode, self.block_size, self.most = encode, block_size, block_size - min(room, block_size // 4)
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []  # questions and answers, alternating
        self.asked: list[Message] = []  # the turns and the last question
        self.rows: NextTurn | None = None  # generated the last answer, with its cache

    def ask(self, question: str) -> tuple[list[Message], int]:
        """The messages with this question as the last, and how many of the oldest turns are dropped for good.

        When the context is full, turns are dropped until half of it is free, so that this does not happen each turn.
        """
        self.asked, left_out, most = [*self.turns, {"role": "user", "content": question}], 0, self.most
        while len(self.encode(self.system + self.asked)) > most and len(self.asked) > 1:
            self.asked, left_out, most = self.asked[2:], left_out + 1, self.block_size // 2
        return self.system + self.asked, left_out

    def answer(self, text: str) -> None:
        """Add the last question and its answer. A question without an answer is forgotten."""
        self.turns = [*self.asked, {"role": "assistant", "content": text}]

    def make_rows(self, model: LanguageModel, samples: list[Sample], settings: SamplingSettings) -> Rows:
        """For stream_text: rows that compute only the part of the prompt that is not in the previous turn's cache."""
        before, self.rows = self.rows, None
        if before and before.samples[0].finish_reason == "interrupted":  # its cache may be incomplete
            before = None
        self.rows = NextTurn(model, samples, settings, before)
        return self.rows


class NextTurn(Rows):
    """One row whose cache starts with the common prefix in the previous turn's cache."""

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
