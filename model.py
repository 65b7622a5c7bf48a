"""A decoder-only transformer language model in one file that needs nothing but torch. Letters in shape comments:

B batch   T new positions   S positions attended to (cached and new)   C channels (n_embd)
H heads   K key/value heads   D head size   V vocabulary   N = B T, positions in the loss
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_FLOAT_LOGITS = 2**24  # the most logits that the loss computes at once in float32: 64 MB


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError. All but vocab_size are settings of train.py, the comments their help."""

    vocab_size: int = 50257
    block_size: int = 256  # context length: the most tokens that the model sees at once
    n_layer: int = 6  # blocks
    n_head: int = 6  # attention heads
    n_kv_head: int = 0  # key/value heads, each shared by n_head / n_kv_head heads (arXiv 2305.13245); 0: n_head
    n_embd: int = 384  # width: channels of the residual stream
    head_size: int = 0  # channels of a head; 0: n_embd / n_head
    mlp_hidden: int = 0  # width of the feed-forward layer; 0: 4 n_embd, for swiglu 8/3 n_embd in multiples of 64
    dropout: float = 0.0  # probability of dropout in training
    bias: bool = False  # biases in linear layers and LayerNorm
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"  # normalisation
    norm_eps: float = 1e-5  # added to the variance for numerical stability
    position: Literal["learned", "sinusoidal", "rope", "none"] = "rope"  # position encoding
    rope_base: float = 10000.0  # base of the rotary frequencies
    rope_scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"  # slower rotation, longer context
    rope_factor: float = 1.0  # how many times longer rope_scaling makes the context
    rope_original: int = 0  # the context length before rope_scaling; 0: block_size
    rope_slow: float = 0.0  # llama3, yarn: rope_factor slows channel pairs with fewer turns in rope_original; 0: 1
    rope_fast: float = 0.0  # llama3, yarn: pairs with more turns are not slowed; 0: 4 for llama3, 32 for yarn
    rope_attention: float = 0.0  # factor on rotated queries and keys; 0: 1, for yarn 1 + ln(rope_factor) / 10
    mlp: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"] = "swiglu"  # feed-forward layer
    qk_norm: bool = True  # RMSNorm on each query and key head before the rotation (arXiv 2302.05442)
    window: int = 0  # sliding-window attention to this many positions, the current one included; 0: to all
    init: Literal["modern", "gpt2"] = "modern"  # initial weights: std 1/sqrt(inputs), output layers 0; or std 0.02
    tie_weights: bool = True  # use the token embedding as the output head (arXiv 1608.05859)

    def __post_init__(self) -> None:
        least = dict.fromkeys("vocab_size block_size n_layer n_head n_embd rope_base rope_factor".split(), 1)
        rope = "rope_original rope_slow rope_fast rope_attention"
        least |= dict.fromkeys(f"n_kv_head head_size mlp_hidden window dropout norm_eps {rope}".split(), 0)
        for name, low in least.items():
            if not getattr(self, name) >= low:  # also refuses NaN
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}. Correct it")
        for name, kind in get_type_hints(GPTConfig).items():
            if get_args(kind) and getattr(self, name) not in get_args(kind):
                kinds = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {kinds}, not {getattr(self, name)!r}. Choose one")
        if not self.dropout < 1:
            raise ValueError(f"dropout must be below 1, not {self.dropout}. Correct it")
        if not self.head_size and self.n_embd % self.n_head:
            near = self.n_head * max(1, round(self.n_embd / self.n_head))
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}. Use n_embd={near}")
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}. Use a divisor")
        self.head_size = self.head_size or self.n_embd // self.n_head
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(f"position=rope needs an even head size, not {self.head_size}. Change n_embd or n_head")
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"position=sinusoidal needs an even n_embd, not {self.n_embd}. Change n_embd")
        scaled = self.rope_scaling != "none"
        if scaled != (self.rope_factor > 1) or (scaled and (self.position != "rope" or self.rope_base == 1)):
            needs = "position=rope, rope_factor and rope_base above 1"
            raise ValueError(f"rope_scaling takes {needs}. Set all of them, or rope_scaling=none and rope_factor=1")
        hidden = 64 * math.ceil(self.n_embd * 8 / 3 / 64) if self.mlp == "swiglu" else 4 * self.n_embd
        self.mlp_hidden = self.mlp_hidden or hidden


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation (arXiv 1910.07467), in the dtype of its input even under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


def make_norm(size: int, config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


def rotary_frequencies(config: GPTConfig) -> Tensor:
    """Radians per position for each pair of channels (D / 2,), as in transformers (arXiv 2306.15595, 2309.00071)."""
    D, base, original = config.head_size, config.rope_base, config.rope_original or config.block_size
    factor, slow = config.rope_factor, config.rope_slow or 1.0
    inverse = base ** (torch.arange(0, D, 2).float() / D)
    frequency = 1.0 / inverse
    if config.rope_scaling == "llama3":
        kept = ((original / (math.tau / frequency) - slow) / ((config.rope_fast or 4.0) - slow)).clamp(0, 1)
        return (1 - kept) * frequency / factor + kept * frequency
    if config.rope_scaling == "yarn":  # a ramp from the pair with rope_fast turns to the one with rope_slow
        low, high = (D / 2 * math.log(original / (turns * math.tau), base) for turns in (config.rope_fast or 32, slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), D - 1)
        kept = 1 - ((torch.arange(D // 2) - low) / (high - low or 0.001)).clamp(0, 1)
        return 1.0 / (factor * inverse) * (1 - kept) + frequency * kept
    return frequency / factor if config.rope_scaling == "linear" else frequency  # dynamic acts beyond block_size


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (B, heads, T, D); cos, sin (..., T, D), the first half of sin negated.

    Channels i and i + D / 2 form a pair, as in Hugging Face transformers, so weights need no permutation.
    """
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).type_as(x)


class KVCache:
    """Keys and values of all positions so far, in one buffer that is allocated once. It is not differentiable.

    For sequences of different lengths, run one right-padded batch, then set `lengths` to the true lengths: padding is
    never attended to, and later tokens overwrite it. A full cache cannot drop its oldest positions, since cached keys
    contain theirs: fill a new one. If `lengths` is a tensor (B,), for CUDA graphs, all shapes are constant: each step
    attends to the whole buffer under a mask, and a full sequence overwrites its last position.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, weight: Tensor) -> None:
        """Room for max_length positions (0: block_size), on the device and in the dtype of `weight`."""
        self.max_length = min(max_length or config.block_size, config.block_size)
        shape = (2, config.n_layer, batch_size, config.n_kv_head, self.max_length, config.head_size)
        # Zeros, not uninitialised memory: an attention weight of 0 times NaN would be NaN.
        self.memory = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self.lengths: Any = [0] * batch_size

    def start(self, new: int) -> int | Tensor:
        """Prepare to append `new` positions. Returns where they begin: an int, or (B, 1) if the rows differ."""
        if isinstance(self.lengths, Tensor):
            self.end, self.ragged = self.max_length, True
            return self.lengths.clamp(max=self.end - new)[:, None]
        end = max(self.lengths) + new
        if end > self.max_length:
            raise ValueError(f"the context is full: {end - new} + {new} positions exceed {self.max_length}. Pass fewer")
        self.end, self.ragged = end, min(self.lengths) != max(self.lengths)
        return torch.tensor(self.lengths, device=self.memory.device)[:, None] if self.ragged else self.lengths[0]

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, T, D) at `positions`, (T,) or (B, T); return all keys and values, (B, K, S, D)."""
        new = torch.stack((k, v)).detach()  # (2, B, K, T, D)
        if self.ragged:  # in one write to the whole buffer: torch.compile would copy it to write to a view
            row = torch.arange(len(self.lengths), device=k.device)[:, None]
            at = torch.full_like(row, layer)
            self.memory[:, at, row, :, positions] = new.permute(1, 3, 0, 2, 4).to(self.memory.dtype)  # (B, T, 2, K, D)
        else:
            self.memory[:, layer, :, :, self.end - k.shape[2] : self.end] = new
        return self.memory[0, layer, :, :, : self.end], self.memory[1, layer, :, :, : self.end]

    def advance(self, new: int) -> None:
        lengths = self.lengths
        self.lengths = lengths.add_(new) if isinstance(lengths, Tensor) else [length + new for length in lengths]


class Attention(nn.Module):
    """Causal self-attention with H query heads and K key/value heads (arXiv 1706.03762, 2305.13245)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size, self.dropout = layer, config.head_size, config.dropout
        self.heads = [config.n_head, config.n_kv_head, config.n_kv_head]  # of queries, keys and values
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * config.head_size, bias=config.bias)
        self.out = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, rotation: list[Tensor], cache: Any) -> Tensor:
        """x (B, T, C) to (B, T, C); see `GPT.attention_inputs` for the other arguments."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = qkv.split_with_sizes(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(self.layer, positions, k, v)
        dropout = self.dropout if self.training else 0.0
        causal = True if mask is None and T > 1 else False  # noqa: SIM210  torch.compile needs a bool
        shared = self.heads[0] // self.heads[1]
        if shared > 1 and x.device.type != "cpu" and (mask is not None or q.dtype != torch.bfloat16):
            k, v = (each.repeat_interleave(shared, 1) for each in (k, v))  # no fused kernel supports shared heads here
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=k.shape[1] < q.shape[1])
        return F.dropout(self.out(y.transpose(1, 2).reshape(B, T, -1)), self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward layer: up-projection, activation, down-projection; swiglu: arXiv 2002.05202."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind, self.dropout = config.mlp, config.dropout
        width = config.mlp_hidden * (2 if config.mlp == "swiglu" else 1)
        self.up = nn.Linear(config.n_embd, width, bias=config.bias)
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
        return F.dropout(self.down(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention and the feed-forward layer, each applied to the normalised residual stream and added to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.n_embd, config)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config.n_embd, config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *attention_inputs: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *attention_inputs)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """The language model: token ids in, next-token logits or the loss out."""

    max_logits = MAX_FLOAT_LOGITS  # in a chunk of the loss; 0: a number that suits torch.compile
    vocab_multiple = 1  # the loss pads the head with zero rows to a multiple of this, for GPUs
    sinusoid: Tensor
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute each block's activations in the backward pass
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        elif config.position == "sinusoidal":  # arXiv 1706.03762, section 3.5
            frequency = 10000.0 ** (-torch.arange(0, config.n_embd, 2).double() / config.n_embd)
            angle = torch.outer(torch.arange(config.block_size).double(), frequency).float()
            table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
            self.register_buffer("sinusoid", table, persistent=False)
        elif config.position == "rope":
            angle = torch.outer(torch.arange(config.block_size).float(), rotary_frequencies(config))
            by_kind = 0.1 * math.log(config.rope_factor) + 1.0 if config.rope_scaling == "yarn" else 1.0
            cos, sin = (table * (config.rope_attention or by_kind) for table in (angle.cos(), angle.sin()))
            self.register_buffer("rope_cos", cos.repeat(1, 2), persistent=False)  # (block_size, D)
            self.register_buffer("rope_sin", torch.cat((-sin, sin), dim=1), persistent=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config.n_embd, config)
        self.head = None if config.tie_weights else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw normal weights from torch's default generator; biases are zero.

        Standard deviations. gpt2: 0.02, divided by sqrt(2 n_layer) in matrices that write to the residual stream.
        modern: 1/sqrt(inputs) in linear layers, but 0 in those that write to the residual stream, so that each block
        starts as the identity, and in an untied head; in embeddings 0.02, or 0.3 with an untied head (bench/NOTES.md).
        """
        modern, untied = self.config.init == "modern", not self.config.tie_weights
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3 if modern and untied else 0.02)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5 if modern else 0.02
                if name.endswith(("attention.out", "mlp.down")):
                    std = 0.0 if modern else std / math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(module.weight, std=0.0 if modern and name == "head" else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> tuple[Any, Any]:
        """Tokens (B, T) int64 to (logits (B, T, V), None), or with targets (B, T) to (None, loss).

        The loss is the mean in nats over the targets that are not -1, in float32; its logits are not kept.
        With a cache the tokens continue its rows. Raises ValueError if they do not fit into block_size.
        """
        x = self.hidden(tokens, cache)
        return (self.logits(x), None) if targets is None else (None, self.loss(x, targets))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Tokens (B, T) to the normalised hidden states (B, T, C), the input of `logits` and `loss`."""
        inputs = self.attention_inputs(tokens, cache)
        x = self.wte(tokens)  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.wpe(inputs[0])
        elif self.config.position == "sinusoidal":  # embeddings scaled as in arXiv 1706.03762, section 3.4
            x = x * math.sqrt(self.config.n_embd) + self.sinusoid[inputs[0]].to(x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        recompute = self.activation_checkpointing and self.training
        for block in self.blocks:
            x = checkpoint(block, x, *inputs, use_reentrant=False) if recompute else block(x, *inputs)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def attention_inputs(self, tokens: Tensor, cache: KVCache | None) -> tuple[Any, ...]:
        """The inputs of attention besides x: the positions of the tokens, the mask, the rotation, and the cache.

        positions: (T,), or (B, T) if rows of the cache differ in length. mask: (T, S) or (B, 1, T, S), true where a
        query sees a key; None for plain causal attention. rotation: cos and sin for `rotate`, or an empty list.
        """
        T, window, device = tokens.shape[1], self.config.window, tokens.device
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit into block_size {self.config.block_size}. Pass fewer")
        start = 0 if cache is None else cache.start(T)
        S = T if cache is None else cache.end
        positions = start + torch.arange(T, device=device)
        ragged = isinstance(start, Tensor)
        mask = None
        if ragged or (T > 1 and S > T) or 0 < window < S:
            query, key = positions[..., None], torch.arange(S, device=device)
            mask = key <= query if not window else (key <= query) & (key > query - window)
            mask = mask[:, None] if ragged else mask
        at = positions[:, None] if ragged else positions
        rotation = [self.rope_cos[at], self.rope_sin[at]] if self.config.position == "rope" else []
        return positions, mask, rotation, cache  # cos and sin (T, D) or (B, 1, T, D)

    def make_cache(self, batch_size: int, max_length: int = 0) -> KVCache:
        """An empty cache for at most max_length positions per row (0: block_size), in the weights' dtype and device."""
        return KVCache(self.config, batch_size, max_length, next(self.parameters()))

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0) -> Tensor:
        """Continue tokens (B, T) to (B, T + max_new_tokens), drawing from torch's default generator.

        temperature 0: take the most probable token; top_k 0: draw from all tokens. A full context keeps its newer half.
        """
        was_training, context = self.training, self.config.block_size
        self.eval()
        cache, new = self.make_cache(len(tokens)), tokens[:, -context:]
        for _ in range(max_new_tokens):
            if cache.lengths[0] + new.shape[1] > context:
                cache, new = self.make_cache(len(tokens)), tokens[:, -(context - context // 2) :]
            logits = self.logits(self.hidden(new, cache)[:, -1]).float()  # (B, V)
            if top_k:
                smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            new = logits.argmax(-1, keepdim=True)
            if temperature:
                new = torch.multinomial((logits / temperature).softmax(-1), 1)
            tokens = torch.cat((tokens, new), dim=1)
        self.train(was_training)
        return tokens

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) to logits (..., V). The loss of many logits computes them itself: change both."""
        return F.linear(x, self.wte.weight) if self.head is None else self.head(x)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of hidden states (B, T, C) against targets (B, T); targets of -1 are ignored."""
        x, targets = x.flatten(0, 1), targets.flatten()
        count = (targets >= 0).sum().clamp_min(1)
        V = self.config.vocab_size
        # With max_logits 0, sqrt(N C) rows: compiled code holds the logits (rows, V) of one chunk and the head's
        # gradients of all N / rows chunks.
        rows, padding = self.max_logits // V or math.isqrt(x.numel()), -V % self.vocab_multiple
        if x.shape[0] <= min(rows, MAX_FLOAT_LOGITS // V) and not padding:
            return F.cross_entropy(self.logits(x).float(), targets, ignore_index=-1, reduction="sum") / count
        weight = (self.head or self.wte).weight
        weight = F.pad(weight, (0, 0, 0, padding)) if padding else weight
        rows -= rows % 128 if rows > 128 else 0
        return ChunkedCrossEntropy.apply(x, weight, targets, V, rows, torch.is_grad_enabled()) / count


# The loss for large vocabularies


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(x W^T)[target] over x (N, C), with the logits of only `rows` positions in memory at a time.

    The forward pass also computes the gradients of x and W, chunk by chunk, so logits are never kept or recomputed.
    Targets of -1 and rows of W beyond V contribute nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, V: int, rows: int, needs_grad: bool) -> Tensor:
        ctx.dtype, trained = weight.dtype, needs_grad and weight.requires_grad
        weight = weight.detach()  # so that autocast does not cache this cast, which has no gradient, for other layers
        dtype = F.linear(x[:0], weight[:0]).dtype  # autocast's, if it is on
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x if needs_grad else x[:0])
        grad_weight = torch.empty_like(weight if trained else weight[:0], dtype=torch.float32)
        for begin in range(0, x.shape[0], rows):
            part, target = x[begin : begin + rows], targets[begin : begin + rows]
            cast = weight.to(dtype)  # anew in each chunk: freed before grad.t() @ part takes as much memory
            logits = F.linear(part, cast)  # (rows, V)
            logits[:, V:] = -math.inf
            loss, grad = cross_entropy(logits, target, needs_grad)
            total = total + loss  # not in place: torch 2.11 cannot compile that
            if needs_grad:
                kept = (target >= 0)[:, None]
                grad_x[begin : begin + rows] = (grad @ cast).mul_(kept)
            del cast
            if trained:
                product = grad.t() @ (part * kept).to(grad.dtype)
                grad_weight = grad_weight.add_(product) if begin else grad_weight.copy_(product)
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        if torch.compiler.is_compiling():
            grad_x, grad_weight = grad_x * grad_total, grad_weight * grad_total
        else:  # in place, since they may be large; torch refuses a second backward pass
            grad_x, grad_weight = grad_x.mul_(grad_total), grad_weight.mul_(grad_total)
        return grad_x, grad_weight.to(ctx.dtype) if ctx.needs_input_grad[1] else None, None, None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """The loss summed over the rows of logits (rows, V), and its gradient, softmax(logits) - one_hot(targets).

    Uncompiled, the gradient overwrites the logits, and only a few rows are in float32 at a time. Targets of -1 add
    nothing to the sum; their rows of the gradient are not zeroed.
    """
    kept, index = targets >= 0, targets.clamp_min(0)[:, None]
    if torch.compiler.is_compiling():
        log_probs = F.log_softmax(logits.float(), dim=-1)
        loss = -(log_probs.gather(1, index)[:, 0] * kept).sum()
        hot = torch.arange(logits.shape[1], device=logits.device) == index  # one pass; scatter_add_ would need three
        return loss, (log_probs.exp() - hot.float()).to(logits.dtype) if needs_grad else logits
    chosen, rows = [], max(1, min(len(logits), MAX_FLOAT_LOGITS // 8 // logits.shape[1]))
    as_float, log_probs = torch.empty(2, rows, logits.shape[1], device=logits.device)
    for part, target in zip(logits.split(rows), index.split(rows), strict=True):
        as_float, log_probs = as_float[: len(part)], log_probs[: len(part)]
        torch.log_softmax(as_float.copy_(part), dim=-1, out=log_probs)
        chosen.append(log_probs.gather(1, target))
        if needs_grad:  # p, and p - 1 at the target
            part.copy_(log_probs.exp_().scatter_(1, target, chosen[-1].expm1()))
    return -(torch.cat(chosen)[:, 0] * kept).sum(), logits
