"""A decoder-only transformer language model, whole, in one file that needs nothing but torch.

From bottom to top: the settings, rotary positions, the key/value cache, attention, the feed-forward layer, a block,
the loss, and the GPT that joins them. Letters in shape comments:

    B batch   T new positions   S positions attended to (cached and new)   C channels (n_embd)
    H heads   K key/value heads   D head size   V vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "sinusoidal", "rope", "none")
MLPS = ("gelu", "gelu_tanh", "relu", "relu2", "swiglu")


@dataclass
class GPTConfig:
    """The shape of a model. The defaults are GPT-2's; raises ValueError for a shape that cannot be built."""

    vocab_size: int = 50257
    block_size: int = 1024  # the context: the most positions the model sees at once
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # key/value heads, each shared by n_head / n_kv_head heads (arXiv 2305.13245); 0: n_head
    n_embd: int = 768
    head_size: int = 0  # 0: n_embd / n_head
    mlp_hidden: int = 0  # 0: 4 n_embd; with swiglu 8/3 n_embd, rounded up to a multiple of 64
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorm
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    position: str = "learned"
    rope_base: float = 10000.0
    mlp: str = "gelu_tanh"
    qk_norm: bool = False  # RMSNorm on each query and key head before the rotation (arXiv 2302.05442)
    window: int = 0  # each position sees itself and the window - 1 before it; 0: all before it
    tie_weights: bool = True  # the head that makes logits is the token embedding (arXiv 1608.05859)

    def __post_init__(self) -> None:
        self.n_kv_head = self.n_kv_head or self.n_head
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            value = getattr(self, name)
            check(value >= 1, f"{name} must be at least 1, not {value}. Give a positive number")
        for name, kinds in (("norm", NORMS), ("position", POSITIONS), ("mlp", MLPS)):
            value = getattr(self, name)
            check(value in kinds, f"{name} must be one of {', '.join(kinds)}, not {value!r}. Choose one")
        near = self.n_head * max(1, round(self.n_embd / self.n_head))
        fault = f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}. Use n_embd={near}"
        check(bool(self.head_size) or self.n_embd % self.n_head == 0, fault)
        fault = f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}. Use a divisor of it"
        check(self.n_head % self.n_kv_head == 0, fault)
        self.head_size = self.head_size or self.n_embd // self.n_head
        hidden = 64 * math.ceil(self.n_embd * 8 / 3 / 64) if self.mlp == "swiglu" else 4 * self.n_embd
        self.mlp_hidden = self.mlp_hidden or hidden
        fault = f"position=rope needs an even head size, not {self.head_size}. Change n_embd or n_head"
        check(self.position != "rope" or self.head_size % 2 == 0, fault)
        fault = f"position=sinusoidal needs an even n_embd, not {self.n_embd}. Change n_embd"
        check(self.position != "sinusoidal" or self.n_embd % 2 == 0, fault)
        fault = "window, mlp_hidden and head_size cannot be negative, dropout lies in [0, 1). Correct it"
        check(self.window >= 0 and self.mlp_hidden >= 1 and self.head_size >= 1 and 0 <= self.dropout < 1, fault)


def check(right: bool, fault: str) -> None:
    if not right:
        raise ValueError(fault)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation (arXiv 1910.07467), in the dtype of its input under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(size: int, config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


def angles(length: int, size: int, base: float) -> Tensor:
    """Position times frequency, (length, size / 2): position p turns pair i by p / base^(2i / size)."""
    frequency = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.outer(torch.arange(length, dtype=torch.float64), frequency).float()


def dropped(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout where there is some: each call that does nothing would cost a microsecond of every decoded token."""
    return F.dropout(x, rate, training) if rate and training else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of x (B, heads, T, D); cos and sin (..., T, D).

    Channel i is paired with channel i + D / 2, as in Hugging Face transformers, so that weights need no
    permutation on their way there and back; `sin` is negative in its first half.
    """
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).type_as(x)


class KVCache:
    """Keys and values of the positions seen so far, in one buffer allocated once. No gradient passes through it.

    Each row of the batch has a length of its own. Rows may be filled together from a right-padded batch: call the
    model on it, then `truncate` to the true lengths; what lies beyond a row's length is never attended to and is
    overwritten by its next tokens. A call that does not fit raises ValueError and changes nothing: drop the oldest
    tokens and fill the cache again (positions are part of what is cached).
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, max_length: int = 0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.max_length = min(max_length or config.block_size, config.block_size)
        shape = (2, config.n_layer, batch_size, config.n_kv_head, self.max_length, config.head_size)
        # Zeros, not empty memory: a weight of zero times a NaN that happened to lie there would be NaN.
        self.memory = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size

    def truncate(self, lengths: list[int]) -> None:
        """Forget all but the first lengths[b] positions of row b."""
        if len(lengths) != len(self.lengths) or any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot truncate rows of {self.lengths} positions to {lengths}. Give shorter lengths")
        self.lengths = list(lengths)

    def take_rows(self, rows: list[int]) -> KVCache:
        """A new cache holding copies of these rows; a row may be named several times, to branch from it."""
        taken = KVCache.__new__(KVCache)
        taken.max_length, taken.lengths = self.max_length, [self.lengths[row] for row in rows]
        taken.memory = self.memory[:, :, torch.tensor(rows, device=self.memory.device)]
        return taken

    def put_rows(self, rows: list[int], source: KVCache) -> None:
        """Replace these rows, one each, by the rows of `source`, which are no longer than max_length."""
        index, end = torch.tensor(rows, device=self.memory.device), max(source.lengths)
        self.memory[:, :, index, :, :end] = source.memory[..., :end, :]
        for row, length in zip(rows, source.lengths, strict=True):
            self.lengths[row] = length

    def start(self, new: int) -> int | Tensor:
        """Make ready to write `new` positions; returns where: a number, or (B, 1) when the rows differ."""
        end = max(self.lengths) + new
        if end > self.max_length:
            fit = f"{end - new} + {new} positions do not fit into {self.max_length}"
            raise ValueError(f"the context is full: {fit}. Drop the oldest tokens and fill a new cache")
        self.end, self.ragged = end, min(self.lengths) != max(self.lengths)
        return torch.tensor(self.lengths, device=self.memory.device)[:, None] if self.ragged else self.lengths[0]

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, T, D) at `positions`, (T,) or (B, T); return all keys and values, (B, K, S, D)."""
        keys, values = self.memory[:, layer, :, :, : self.end].unbind(0)
        for held, new in ((keys, k.detach()), (values, v.detach())):
            if self.ragged:  # advanced indexing puts (B, T) in front
                row = torch.arange(len(self.lengths), device=k.device)[:, None]
                held[row, :, positions] = new.transpose(1, 2).to(held.dtype)
            else:
                held[:, :, self.end - new.shape[2] :] = new
        return keys, values

    def advance(self, new: int) -> None:
        self.lengths = [length + new for length in self.lengths]


class Attention(nn.Module):
    """Causal self-attention with H query heads and K key/value heads (arXiv 1706.03762, 2305.13245)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_size, self.dropout = config.head_size, config.dropout
        self.heads = [config.n_head, config.n_kv_head, config.n_kv_head]  # of queries, keys and values
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * config.head_size, bias=config.bias)
        self.out = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = qkv.split_with_sizes(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotation is not None:
            q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)
        if context.cache is not None:
            k, v = context.cache.update(layer, context.positions, k, v)
        dropout = self.dropout if self.training else 0.0
        causal = True if context.mask is None and T > 1 else False  # noqa: SIM210  torch.compile needs a bool
        shared = self.heads[0] != self.heads[1]
        y = F.scaled_dot_product_attention(q, k, v, context.mask, dropout, causal, enable_gqa=shared)
        return dropped(self.out(y.transpose(1, 2).reshape(B, T, -1)), self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward layer: up-projection, activation, down-projection; swiglu: arXiv 2002.05202."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind, self.dropout = config.mlp, config.dropout
        widths = 2 if config.mlp == "swiglu" else 1
        self.up = nn.Linear(config.n_embd, widths * config.mlp_hidden, bias=config.bias)
        self.down = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        elif self.kind.startswith("gelu"):
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        else:
            x = F.relu(x) if self.kind == "relu" else F.relu(x).square()  # relu2: arXiv 2109.08668
        return dropped(self.down(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then the feed-forward layer, each on the normalised residual stream and added to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.n_embd, config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config.n_embd, config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), context, layer)
        return x + self.mlp(self.mlp_norm(x))


@dataclass
class Context:
    """What one forward pass gives to every block."""

    positions: Tensor  # (T,), or (B, T) when the rows of a cache differ in length
    mask: Tensor | None  # (T, S) or (B, 1, T, S), true where a query sees a key; None: all before it
    rotation: tuple[Tensor, Tensor] | None  # cos and sin for `rotate`
    cache: KVCache | None


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(x W^T)[target], with only `rows` rows of logits in memory at a time.

    The gradient of the logits is known as soon as the logits are, so the forward pass already turns each chunk
    into the gradients of x and W, and no logits are kept or computed twice. Targets of -1 count nothing, nor do the
    rows of W beyond the vocabulary.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, rows: int, needs_grad: bool
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if needs_grad else None
        grad_weight = torch.zeros_like(weight) if needs_grad else None
        for begin in range(0, x.shape[0], rows):
            part, target = x[begin : begin + rows], targets[begin : begin + rows]
            logits = F.linear(part, weight)  # (rows, V)
            logits[:, vocab_size:] = -math.inf
            kept = (target >= 0)[:, None]
            index = target.clamp_min(0)[:, None]
            log_probs = F.log_softmax(logits.float(), dim=-1)
            total = total - (log_probs.gather(1, index) * kept).sum()  # in place, torch 2.11 would compile no gradient
            if grad_x is not None and grad_weight is not None:  # softmax - one_hot, zero where nothing is counted
                if torch.compiler.is_compiling():  # one pass where scatter_add_ would make three
                    grad = log_probs.exp() - (torch.arange(weight.shape[0], device=x.device) == index).float()
                else:
                    grad = log_probs.exp_()
                    grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
                grad = grad.mul_(kept).to(logits.dtype)
                grad_x[begin : begin + rows] = grad @ weight.to(grad.dtype)
                grad_weight += grad.t() @ part.to(grad.dtype)
        if grad_x is not None and grad_weight is not None:
            ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):  # type: ignore[no-untyped-def]
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_total, grad_weight * grad_total, None, None, None, None


class GPT(nn.Module):
    """The language model: token ids in, next-token logits or the loss out."""

    # The most logits to have at once, in elements: 64 MB in float32. Beyond that the loss goes in chunks.
    max_logits = 2**24
    vocab_multiple = 1  # the loss pads the head with zeros to a multiple of this: nib/training/placement.py
    sinusoid: Tensor
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute each block in the backward pass instead of keeping it
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        elif config.position == "sinusoidal":  # arXiv 1706.03762, section 3.5
            turn = angles(config.block_size, config.n_embd, 10000.0)
            table = torch.stack((turn.sin(), turn.cos()), dim=-1).flatten(1)
            self.register_buffer("sinusoid", table, persistent=False)
        elif config.position == "rope":
            turn = angles(config.block_size, config.head_size, config.rope_base)
            sin = turn.sin()
            self.register_buffer("rope_cos", turn.cos().repeat(1, 2), persistent=False)  # (block_size, D)
            self.register_buffer("rope_sin", torch.cat((-sin, sin), dim=1), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config.n_embd, config)
        self.head = None if config.tie_weights else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights from torch's default generator.

        With layernorm: GPT-2's, normal with deviation 0.02, divided by sqrt(2 n_layer) in the matrices that write to
        the residual stream. With rmsnorm: deviation 1/sqrt(inputs), so that activations keep their size at any width;
        zero in the matrices that write to the residual stream, so that every block starts as the identity, and in an
        untied head, beside which embeddings start at 0.3 (measured: bench/NOTES.md), else at 0.02. Biases are zero.
        """
        modern = self.config.norm == "rmsnorm"
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3 if modern and not self.config.tie_weights else 0.02)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5 if modern else 0.02
                if name.endswith(("attention.out", "mlp.down")):
                    std = 0.0 if modern else std / math.sqrt(2 * self.config.n_layer)
                std = 0.0 if modern and name == "head" else std
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokens (B, T) int64 to (logits (B, T, V), None), or with targets (B, T) to (None, loss).

        The loss is the mean in nats over the targets that are not -1, float32; the logits behind it are not kept.
        With a cache the tokens continue its rows. Raises ValueError when they do not fit into block_size.
        """
        x = self.hidden(tokens, cache)
        return (self.logits(x), None) if targets is None else (None, self.loss(x, targets))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Tokens (B, T) to the normalised hidden states (B, T, C) that `logits` and `loss` read."""
        context = self.context(tokens, cache)
        x = self.wte(tokens)  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.wpe(context.positions)
        elif self.config.position == "sinusoidal":  # embeddings scaled as in arXiv 1706.03762, section 3.4
            x = x * math.sqrt(self.config.n_embd) + self.sinusoid[context.positions].to(x.dtype)
        x = dropped(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            recompute = self.activation_checkpointing and self.training
            x = checkpoint(block, x, context, layer, use_reentrant=False) if recompute else block(x, context, layer)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def context(self, tokens: Tensor, cache: KVCache | None) -> Context:
        """Positions, mask and rotation for these tokens; the mask is None where plain causality says it all."""
        T, window, device = tokens.shape[1], self.config.window, tokens.device
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit into block_size {self.config.block_size}. Pass fewer")
        start = 0 if cache is None else cache.start(T)
        S = T if cache is None else cache.end
        positions = start + torch.arange(T, device=device)  # (T,) or (B, T)
        ragged = isinstance(start, Tensor)
        mask = None
        if ragged or (T > 1 and S > T) or 0 < window < S:
            query, key = positions[..., None], torch.arange(S, device=device)
            mask = key <= query if not window else (key <= query) & (key > query - window)
            mask = mask[:, None] if ragged else mask  # (B, 1, T, S) or (T, S)
        rotation = None
        if self.config.position == "rope":
            at = positions[:, None] if ragged else positions
            rotation = self.rope_cos[at], self.rope_sin[at]  # (T, D) or (B, 1, T, D)
        return Context(positions, mask, rotation, cache)

    @property
    def head_weight(self) -> Tensor:
        return self.wte.weight if self.head is None else self.head.weight

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) to logits (..., V)."""
        return F.linear(x, self.wte.weight) if self.head is None else self.head(x)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of hidden states (B, T, C) against targets (B, T); targets of -1 are ignored."""
        x, targets = x.flatten(0, 1), targets.flatten()
        count = (targets >= 0).sum().clamp_min(1)
        rows, padding = max(1, self.max_logits // self.config.vocab_size), -self.config.vocab_size % self.vocab_multiple
        if x.shape[0] <= rows and not padding:
            logits = self.logits(x).float()
            return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / count
        weight = F.pad(self.head_weight, (0, 0, 0, padding)) if padding else self.head_weight
        rows -= rows % 128 if rows > 128 else 0
        total = ChunkedCrossEntropy.apply(x, weight, targets, self.config.vocab_size, rows, torch.is_grad_enabled())
        return total / count

    def num_parameters(self) -> int:
        """The number of trained parameters; a tied head is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, length: int = 0) -> int:
        """Floating-point operations to train on one token within `length` (default block_size) positions.

        6N for the N weights that multiply it, which leaves out tables that are only looked up, plus 12 n_layer H D
        length for attention, by convention without the causal half (arXiv 2204.02311, appendix B).
        """
        config = self.config
        looked_up = 0 if config.tie_weights else self.wte.weight.numel()
        looked_up += self.wpe.weight.numel() if config.position == "learned" else 0
        seen = min(length or config.block_size, config.window or config.block_size)
        attention = 12 * config.n_layer * config.n_head * config.head_size * seen
        return 6 * (self.num_parameters() - looked_up) + attention
