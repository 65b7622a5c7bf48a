"""Generation with CUDA graphs: one step of all rows is compiled, recorded once, and replayed for every token.

A GPU finishes the kernels of a small model faster than Python can launch them. So a step here does the same work on the
same memory every time: from the rows' newest tokens to the next ones, with a cache of fixed size and without the host.
The host reads the tokens one step late, and decodes and prints them while the next step runs.

The text is that of nib.generation.engine, up to the rounding of fused kernels. Letters as in model.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from nib.common.device import Copied
from nib.common.exits import RunError
from nib.generation.engine import LanguageModel, Rows
from nib.generation.request import Sample, SamplingSettings
from nib.generation.sampling import choose

SHORTEST = 256  # positions of the shortest cache


def static_length(room: int, block_size: int) -> int:
    """The length of a cache for `room` positions: a power of two up to block_size, so that few shapes are compiled."""
    return min(block_size, max(SHORTEST, 1 << (room - 1).bit_length()))


class Step:
    """Runs the model on each row's newest token and replaces it by the next one, all at fixed addresses.

    The constructor runs the step once on empty rows to compile it, so fill them afterwards. On CUDA `run` replays a
    CUDA graph.
    """

    def __init__(
        self, model: LanguageModel, settings: SamplingSettings, cache: Any, vocab_size: int,
        compiling: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.settings, self.cache, self.vocab_size = model, settings, cache, vocab_size
        B, device = len(cache.lengths), cache.lengths.device
        self.tokens = torch.zeros(B, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(B, device=device)
        self.seen: Tensor | None = None
        if settings.repetition_penalty != 1:
            self.seen = torch.zeros(B, vocab_size, dtype=torch.bool, device=device)
        # torch's limit is 8 compiled shapes; a process may need more. fullgraph: a graph break is an error, since it
        # would run Python within a step.
        torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit
        self.run: Callable[[], None] = torch.compile(self.forward, fullgraph=True, dynamic=False, **compiling)
        self.compile()
        if device.type == "cuda":
            self.run = recorded(self.run)

    def compile(self) -> None:
        """Run the step once. Raises RunError if torch cannot compile it, for example without a C compiler."""
        from torch._dynamo.exc import TorchDynamoException, Unsupported

        try:
            self.run()
        except Unsupported:  # a graph break is a bug and keeps its traceback
            raise
        except TorchDynamoException as error:
            reason = " ".join(str(error).strip().split("\n")[:2])
            raise RunError(f"torch.compile failed: {reason}. Leave out --compile") from error

    def forward(self) -> None:
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, None], True)
        x = self.model.hidden(self.tokens[:, None], self.cache)  # (B, 1, C)
        logits = self.model.logits(x[:, 0])[:, : self.vocab_size]
        self.tokens.copy_(choose(logits, self.uniforms, self.settings, self.seen))


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """Record the compiled `run` as one CUDA graph, after the warm-up on a side stream that recording needs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # an operation that synchronises raises an error here
        run()
    return graph.replay


class CompiledRows(Rows):
    """Rows whose steps are queued one ahead of the tokens that the host has read.

    The batch size is compiled in, so it stays constant. Tokens of finished rows are discarded, also those of a step
    that was queued before the host knew that a row was finished.
    """

    ahead = True
    # With this option torch compiles a matmul of one row without a bias into a fused reduction (its decomposition of
    # mm), which reads int8 weights as int8.
    compiling: ClassVar[dict[str, Any]] = dict(options={"coordinate_descent_tuning": True})

    @torch.no_grad()  # not inference mode: torch.compile treats inference tensors differently
    def __init__(self, model: LanguageModel, samples: list[Sample], settings: SamplingSettings) -> None:
        super().__init__(model, samples, settings)
        self.unread: deque[Copied] = deque()  # tokens on their way to the host
        filled, count = self.cache, len(samples)
        self.cache = self.new_cache(count, static_length(filled.max_length, self.block_size))
        self.cache.lengths = torch.zeros(count, dtype=torch.int64, device=self.device)
        self.step = Step(model, settings, self.cache, self.vocab_size, self.compiling)
        self.put_rows(list(range(count)), filled)
        if self.step.seen is not None and self.seen is not None:
            self.step.seen.copy_(self.seen)
        self.step.tokens.copy_(choose(self.logits, self.next_uniforms(), settings, self.seen))
        self.fetch()

    def fetch(self) -> None:
        """Start an asynchronous copy of the step's tokens to the host, before the next step overwrites them."""
        self.unread.append(Copied(self.step.tokens))

    def queue(self) -> None:
        """Start the next step, with each row's next uniform number."""
        self.step.uniforms.copy_(self.next_uniforms())
        self.step.run()
        self.fetch()

    def runs_on(self) -> bool:
        """Whether a step may be queued before the newest tokens are read: not all are last, and no context is full."""
        going_on = [row for row, sample in enumerate(self.samples) if not sample.finish_reason]
        last = all(len(self.samples[row].tokens) + 1 == self.samples[row].max_new_tokens for row in going_on)
        return not last and all(len(self.contexts[row]) < self.block_size for row in going_on)

    @torch.no_grad()
    def choose(self) -> list[int | None]:
        """Queue the next step if possible, then wait for the tokens of the current one; a finished row has none."""
        if not self.unread:
            self.queue()
        if self.runs_on():
            self.queue()
        written = zip(self.samples, self.unread.popleft().read(), strict=True)
        self.new = [None if sample.finish_reason else token for sample, token in written]
        return self.new

    def keep(self, rows: list[int]) -> None:
        """All rows stay."""

    @torch.no_grad()
    def advance(self) -> None:
        """Update the contexts on the host, and refill rows whose context is full. No step is queued beyond these."""
        if full := self.slide():
            self.refill(full)
