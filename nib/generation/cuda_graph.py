"""Writing with CUDA graphs: one step of all rows is compiled, recorded once, and replayed for every token.

A GPU does a small model's step faster than Python can ask for it, kernel by kernel. So a step here is the same work
on the same memory every time: from the rows' newest tokens to the next ones, with a cache of fixed size, nothing of
which the host has to see. It reads the tokens one step late, and decodes and prints them while the next step runs.

What is written is what nib.generation.engine writes, up to the rounding of fused kernels. Letters as in model.py.
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
    """Positions for a cache that must hold `room`: a power of two up to block_size, so that few are ever compiled."""
    return min(block_size, max(SHORTEST, 1 << (room - 1).bit_length()))


class Step:
    """Shows the model each row's newest token and puts the next one in its place, all at fixed addresses.

    Making it runs the step on empty rows, to compile it, so fill them afterwards. On CUDA `run` replays a recording.
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
        # torch compiles 8 shapes in a process, which may be asked for many. A graph break would put Python back into
        # the step, so it is an error.
        torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit
        self.run: Callable[[], None] = torch.compile(self.forward, fullgraph=True, dynamic=False, **compiling)
        self.compile()
        if device.type == "cuda":
            self.run = recorded(self.run)

    def compile(self) -> None:
        """Run the step once. Raises RunError where torch cannot compile it, for want of a C compiler for example."""
        from torch._dynamo.exc import TorchDynamoException, Unsupported

        try:
            self.run()
        except Unsupported:  # a graph break, so a bug, which keeps its traceback
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
    """`run`, which is compiled by now, as one CUDA graph; recording wants it to have run on a side stream before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # an operation that waits for the device raises here
        run()
    return graph.replay


class CompiledRows(Rows):
    """Rows whose steps are queued one ahead of what the host has read.

    The batch keeps its size, which is compiled in. What a finished row goes on to write is thrown away, and so is the
    step that was queued before a row's last token was known for it.
    """

    ahead = True
    # How the step is compiled. With this, torch makes products of one row without a bias fused sums (its decomposition
    # of mm), which read int8 as int8.
    compiling: ClassVar[dict[str, Any]] = dict(options={"coordinate_descent_tuning": True})

    @torch.no_grad()  # here not inference mode, whose tensors torch.compile treats apart
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
        self.draw()
        self.step.tokens.copy_(choose(self.logits, self.step.uniforms, settings, self.seen))
        self.fetch()

    def draw(self) -> None:
        """Give the step each row's next uniform number; those of DRAWN steps come to the device at once."""
        self.step.uniforms.copy_(self.next_uniforms())

    def fetch(self) -> None:
        """Have the step's tokens copied to the host, without waiting for them; the next step overwrites them."""
        self.unread.append(Copied(self.step.tokens))

    def queue(self) -> None:
        self.draw()
        self.step.run()
        self.fetch()

    def runs_on(self) -> bool:
        """Whether the token that is not read yet can be shown to the model as it is, and is not the last."""
        going_on = [row for row, sample in enumerate(self.samples) if not sample.finish_reason]
        last = all(len(self.samples[row].tokens) + 1 == self.samples[row].max_new_tokens for row in going_on)
        return not last and all(len(self.contexts[row]) < self.block_size for row in going_on)

    @torch.no_grad()
    def choose(self) -> list[int | None]:
        """Queue the step after the next tokens, then wait for those; a finished row has none."""
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
        """Follow the rows on the host; one whose context is full is filled anew, which no queued step has passed."""
        if full := self.slide():
            self.refill(full)
