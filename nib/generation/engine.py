"""Text from a model: one prefill for all prompts, then a step for every sample that goes on.

When the context is full: the model sees at most block_size tokens of a row. A longer prompt is seen from its last
block_size tokens on. When a token comes to a row that shows block_size of them already, the row goes on with its
newest block_size - block_size // 2, the new one included, at positions from 0 on. Refilling costs about one extra token
of work per generated token; moving the window at every token would refill at every token. With and without a cache, and
for every kind of position, the model sees the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nib.common.exits import RunError
from nib.generation.request import Sample, SamplingSettings, make_samples
from nib.generation.sampling import choose, row_generator
from nib.tokenizer.tokenizer import Tokenizer

DRAWN = 256  # uniform numbers per row that are drawn and moved to the device at a time


class LanguageModel(Protocol):
    """The part of model.GPT that generation uses."""

    config: Any
    training: bool

    def hidden(self, tokens: Tensor, cache: Any = None) -> Tensor: ...
    def logits(self, x: Tensor) -> Tensor: ...
    def make_cache(self, batch_size: int, max_length: int = 0) -> Any: ...
    def parameters(self) -> Iterator[Any]: ...
    def train(self, mode: bool = True) -> Any: ...


def generate_text(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], settings: SamplingSettings
) -> list[Sample]:
    """The finished samples of all prompts, `num_samples` of each, prompt by prompt.

    Does not change torch's random state or the model's mode. Raises InputError for a prompt that the tokenizer cannot
    encode, RunError if the model's logits are not finite.
    """
    samples = make_samples(prompts, tokenizer, settings, model.config.vocab_size)
    for _ in stream_text(model, samples, settings):
        pass
    return samples


def stream_text(
    model: LanguageModel, samples: list[Sample], settings: SamplingSettings, make_rows: Any = None
) -> Iterator[tuple[Sample, str]]:
    """Generate all samples as one batch; yield (sample, new text) for each token until all are finished.

    `make_rows` is Rows, or nib.generation.cuda_graph.CompiledRows.
    """
    unfinished = [sample for sample in samples if not sample.finish_reason]
    if not unfinished:  # max_new_tokens is 0
        return
    was_training, written, seconds = model.training, 0, 0.0
    model.train(False)
    try:
        rows: Rows = (make_rows or Rows)(model, unfinished, settings)
        tokens = rows.choose()
        began = time.perf_counter()
        while True:
            for sample, token in zip(rows.samples, tokens, strict=True):
                if token is not None:
                    yield sample, sample.append(token)
            going_on = [row for row, sample in enumerate(rows.samples) if not sample.finish_reason]
            if not going_on:
                break
            if not rows.ahead:
                began = time.perf_counter()
            rows.keep(going_on)
            rows.advance()
            tokens = rows.choose()
            now = time.perf_counter()
            seconds, began = seconds + now - began, now
            written += len(tokens) - tokens.count(None)
    finally:
        model.train(was_training)
        for sample in samples:
            sample.tokens_per_second = written / seconds if seconds else None


class Rows:
    """The samples being generated, one row each: the tokens that the model sees, the cache and the random numbers."""

    ahead = False  # whether the next step runs on the device while the caller handles the tokens

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, samples: list[Sample], settings: SamplingSettings) -> None:
        self.model, self.samples, self.settings = model, samples, settings
        self.block_size: int = model.config.block_size
        self.device = next(iter(model.parameters())).device
        # The model's vocabulary may be padded to a round number; ids beyond the tokenizer's are never generated.
        self.vocab_size = min(model.config.vocab_size, samples[0].tokenizer.vocab_size)
        # Each prompt is computed once, and its cache row is copied for each sample.
        contexts: list[list[int]] = []
        branch = []
        for sample in samples:
            context = sample.prompt_tokens[-self.block_size :]
            sample.tokenizer.check_ids(context, self.vocab_size, "the prompt")
            if not contexts or context != contexts[-1]:
                contexts.append(context)
            branch.append(len(contexts) - 1)
        room = max(map(len, contexts)) + settings.max_new_tokens
        self.cache: Any = self.new_cache(len(contexts), room) if settings.cache else None
        self.logits = self.prefill(contexts)[branch]  # (B, V)
        if not self.logits.isfinite().all():
            raise RunError("the model's logits are not finite: its training diverged. Use an earlier checkpoint")
        self.contexts = [list(contexts[row]) for row in branch]
        self.random = [
            row_generator(settings.seed, sample.number, context)
            for sample, context in zip(samples, self.contexts, strict=True)
        ]
        self.uniforms = torch.empty(len(samples), 0, device=self.device)  # (B, DRAWN) after the first draw
        self.drawn = 0  # how many of them each row has used
        self.new: list[int | None] = []  # each row's newest token; a finished row may have None
        if self.cache is not None and branch != list(range(len(contexts))):
            self.cache = take_rows(self.cache, branch)
        self.seen = None
        if settings.repetition_penalty != 1:
            self.seen = torch.zeros(len(samples), self.vocab_size, dtype=torch.bool, device=self.device)
            for row, context in enumerate(self.contexts):
                self.seen[row, context] = True

    def new_cache(self, rows: int, room: int) -> Any:
        """A cache in the dtype of the model's computation: the weights' dtype, or with FSDP model.compute_dtype."""
        cache = self.model.make_cache(rows, room)
        cache.memory = cache.memory.to(getattr(self.model, "compute_dtype", cache.memory.dtype))
        return cache

    def encode(self, contexts: list[list[int]], cache: Any) -> Tensor:
        """Hidden states (B, T, C) of contexts of different lengths, padded on the right; fills the empty `cache`."""
        tokens = np.zeros((len(contexts), max(map(len, contexts))), dtype=np.int64)
        for row, context in enumerate(contexts):
            tokens[row, : len(context)] = context
        x = self.model.hidden(torch.from_numpy(tokens).to(self.device), cache)
        if cache is not None:
            cache.lengths = [len(context) for context in contexts]
        return x

    def prefill(self, contexts: list[list[int]]) -> Tensor:
        """The logits (B, V) after each context, computed only at its last position; fills the empty cache."""
        x = self.encode(contexts, self.cache)
        last = torch.tensor([len(context) - 1 for context in contexts], device=self.device)
        return self.model.logits(x[torch.arange(len(contexts), device=self.device), last])[:, : self.vocab_size]

    @torch.inference_mode()
    def choose(self) -> list[int | None]:
        """Draw each row's next token. Reading them is the only synchronisation with the device in a step."""
        self.new = choose(self.logits, self.next_uniforms(), self.settings, self.seen).tolist()
        if self.settings.top_logprobs:
            self.record()
        return self.new

    def record(self) -> None:
        """Store with each sample the log-probability of its new token, and the most probable tokens."""
        log_probs = self.logits.float().log_softmax(-1)  # (B, V)
        values, ids = log_probs.topk(min(self.settings.top_logprobs, log_probs.shape[-1]))
        for row, (sample, token) in enumerate(zip(self.samples, self.new, strict=True)):
            best = list(zip(ids[row].tolist(), values[row].tolist(), strict=True))
            sample.logprobs.append((float(log_probs[row, token]), best))

    def next_uniforms(self) -> Tensor:
        """The next uniform number (B,) of every row; the numbers for DRAWN steps are drawn together."""
        if self.drawn == self.uniforms.shape[1]:
            more = np.stack([generator.random(DRAWN, dtype=np.float32) for generator in self.random])
            self.uniforms, self.drawn = torch.from_numpy(more).to(self.device), 0
        self.drawn += 1
        return self.uniforms[:, self.drawn - 1]

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> None:
        """Keep only these rows; the model has not seen their newest tokens yet."""
        if len(rows) == len(self.samples):
            return
        for name in ("samples", "random", "contexts", "new"):
            kept = getattr(self, name)
            setattr(self, name, [kept[row] for row in rows])
        self.uniforms = self.uniforms[rows]
        self.seen = None if self.seen is None else self.seen[rows]
        self.cache = None if self.cache is None else take_rows(self.cache, rows)

    @torch.inference_mode()
    def advance(self) -> None:
        """Run the model on each row's newest token, and store the logits after it."""
        full = self.slide()
        newest = torch.tensor(self.new, device=self.device)[:, None]  # (B, 1)
        if self.seen is not None:
            self.seen.scatter_(1, newest, True)
        if self.cache is None:
            self.logits = self.prefill(self.contexts)
            return
        if full:
            self.refill(full)
        x = self.model.hidden(newest, self.cache)  # (B, 1, C)
        self.logits = self.model.logits(x[:, 0])[:, : self.vocab_size]

    def slide(self) -> list[int]:
        """Append the new tokens to the contexts; returns the rows that were full and now keep only their newer half."""
        full = []
        for row, (context, new) in enumerate(zip(self.contexts, self.new, strict=True)):
            if new is not None:
                context.append(new)
            if len(context) > self.block_size:
                del context[: -(self.block_size - self.block_size // 2)]
                full.append(row)
        return full

    def refill(self, rows: list[int]) -> None:
        """Refill the cache of these rows with their shortened contexts, without the newest token."""
        contexts = [self.contexts[row][:-1] for row in rows]
        filled = self.new_cache(len(rows), len(contexts[0]))
        if contexts[0]:  # with block_size 1 or 2 there is only the newest token
            self.encode(contexts, filled)
        self.put_rows(rows, filled)

    def put_rows(self, rows: list[int], filled: Any) -> None:
        """Replace these rows of the cache by those of `filled`, in order."""
        index, end = torch.tensor(rows, device=self.device), max(filled.lengths)
        self.cache.memory[:, :, index, :, :end] = filled.memory[..., :end, :]
        for row, length in zip(rows, filled.lengths, strict=True):
            self.cache.lengths[row] = length


def take_rows(cache: Any, rows: list[int]) -> Any:
    """A new cache with copies of these rows; a row may be given several times."""
    taken = copy.copy(cache)
    taken.lengths = [cache.lengths[row] for row in rows]
    taken.memory = cache.memory[:, :, torch.tensor(rows, device=cache.memory.device)]
    return taken
