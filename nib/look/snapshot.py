"""The numbers of the page: what a model does with a text, at one checkpoint.

Letters: T tokens, L calls of blocks, H heads, C channels, V vocabulary, N candidates whose logits are kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nib.common.exits import InputError, RunError
from nib.look.trace import TOLERANCE, BlockCall, Trace
from nib.tokenizer.tokenizer import Tokenizer

CANDIDATES = 256  # logits kept for each position; the others only as a sum at each temperature of the slider
TEMPERATURES = [step / 20 for step in range(1, 41)]
NAMED, LENS_NAMED, NEIGHBOURS = 10, 3, 8  # tokens shown as text: next tokens, in the lens, nearest embeddings
POSITIONS = 128  # rows of the position table, and most of its channels
MAP_BYTES = 32 << 20  # of all attention maps together
# The kinds of position that a head may attend to. Queries count from the third token on: before that, these kinds
# coincide. The kinds with "same token" need at least FEWEST_QUERIES queries that have such a position.
HABITS = ("previous token", "itself", "first token", "same token", "after the same token")
FEWEST_QUERIES = 3


class CannotFollow(Exception):
    """Why a panel cannot be made for this model."""


def check_length(config: Any, tokens: int) -> None:
    """Raise InputError if there are too many tokens for the attention maps of one page."""
    heads = getattr(config, "n_layer", 1) * getattr(config, "n_head", 1)
    most = int(math.sqrt(2 * MAP_BYTES / heads))
    if tokens > most:
        raise InputError(f"{tokens} tokens are too many for a page of {heads} heads. Give at most {most}")


def take_snapshot(model: Any, ids: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Arrays by name, and in `missing` why a panel has none. The model is float32 and in evaluation mode."""
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    with torch.no_grad():
        with Trace(model) as trace:
            hidden = model.hidden(tokens)
        logits = model.logits(hidden)[0]  # (T, V)
        if not logits.isfinite().all():
            raise RunError("the model's logits are not finite: its training diverged. Use an earlier checkpoint")
        after = tokens[0, 1:]
        log_probs = logits[:-1].float().log_softmax(-1).gather(1, after[:, None])[:, 0]
        found: dict[str, Any] = {"surprise": -log_probs}
        found |= next_token(logits[:, : tokenizer.vocab_size].float(), after)
    missing = found["missing"] = {}
    panels = {
        "attention": lambda: attention(trace.calls, ids),
        "lens": lambda: lens(model, trace.calls, logits, after),
        "shares": lambda: shares(model, trace, hidden, logits, after),
        "positions": lambda: positions(model),
        "neighbours": lambda: neighbours(model, ids, tokenizer.vocab_size),
    }
    for name, panel in panels.items():
        try:
            found |= panel()
        except CannotFollow as reason:
            missing[name] = str(reason)
    return found


def next_token(logits: Tensor, after: Tensor) -> dict[str, Any]:
    """What the page needs to compute sample.py's probabilities: the largest logits, and the sums of the others.

    Of equal logits the lowest id comes first, as in sampling.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)  # (T, V)
    rank = (ids[:-1] == after[:, None]).int().argmax(-1)
    rest = ordered[:, CANDIDATES:] - ordered[:, :1]
    before = rest[:-1].masked_fill(
        torch.arange(CANDIDATES, CANDIDATES + rest.shape[1], device=rest.device) >= rank[:, None], -math.inf
    )

    def sums(x: Tensor) -> Tensor:  # log-sum-exp of logit / temperature, relative to the largest logit
        return torch.stack([(x / each).logsumexp(-1) for each in TEMPERATURES], dim=1).clamp_min(-1e30)

    return {
        "logits": ordered[:, :CANDIDATES], "ids": ids[:, :NAMED].int(), "rest": sums(rest),
        "came_rank": rank.int(), "came_logit": logits[:-1].gather(1, after[:, None])[:, 0],
        "came_before": sums(before),  # of the other logits that are larger than the actual next token's
    }  # fmt: skip


def attention(calls: list[BlockCall], ids: list[int]) -> dict[str, Any]:
    size = (len(ids), len(ids))
    if not any(call.maps for call in calls):
        raise CannotFollow("its blocks do not call scaled_dot_product_attention, where attention is recorded")
    if any(each.shape[1:] != size for call in calls for each in call.maps):
        raise CannotFollow("its attention is not from all tokens to all tokens, as the maps need")
    if (error := max(call.error for call in calls)) > TOLERANCE:
        raise CannotFollow(f"weights times values differ from what attention returned, by {error:.1e} of it")
    layers = [torch.cat(call.maps) if call.maps else torch.zeros(0, *size) for call in calls]
    if any(bool(layer.triu(1).any()) for layer in layers):
        raise CannotFollow("it attends to later tokens, which the maps do not show")
    maps = torch.cat(layers)  # (L H, T, T)
    row, column = torch.tril_indices(*size)
    # The square root gives small weights, which the logarithmic scale shows, more of the 256 steps.
    return {
        "maps": (255 * maps[:, row, column].sqrt()).round().to(torch.uint8),
        "heads": [len(layer) for layer in layers], "habits": habits(maps, torch.tensor(ids)),
        "first_share": float(maps[:, 1:, 0].mean()) if len(ids) > 1 and len(maps) else 0.0,
    }  # fmt: skip


def habits(maps: Tensor, ids: Tensor) -> Tensor:
    """The share of its attention that each head gives to each kind in HABITS: (heads, 5), NaN if unknown."""
    query, key = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    same = (ids[:, None] == ids) & (key < query)
    after_same = F.pad(same[:, :-1], (1, 0)) & (key < query)
    scores = []
    for name, marked in zip(HABITS, (key == query - 1, key == query, key == 0, same, after_same), strict=True):
        counted = marked.expand(same.shape).any(1) & (query[:, 0] >= 2)
        enough = counted.sum() >= (FEWEST_QUERIES if "same" in name else 1)
        score = (maps * marked).sum(-1)[:, counted].mean(-1)
        scores.append(score if enough else torch.full_like(score, math.nan))
    return torch.stack(scores, dim=1)


def states(calls: list[BlockCall]) -> list[Tensor]:
    """The residual stream (T, C) before the first block and after each."""
    after = [call.after for call in calls if call.after is not None]
    if not calls or len(after) < len(calls):
        raise CannotFollow("it did not call model.blocks, so no hidden states were recorded")
    return [calls[0].before, *after]


def lens(model: Any, calls: list[BlockCall], logits: Tensor, after: Tensor) -> dict[str, Any]:
    """The logit lens: the last norm and the head applied to the residual stream after each layer (arXiv 2303.08112)."""
    if not hasattr(model, "norm"):
        raise CannotFollow("there is no model.norm to read the layers with")
    found: dict[str, list[Tensor]] = {"lens_ids": [], "lens_probs": [], "lens_came": [], "lens_rank": []}
    with torch.no_grad():
        for x in states(calls):
            guess = model.logits(model.norm(x.to(logits)[None]))[0].float()  # (T, V)
            probs = guess.softmax(-1)
            best = probs.topk(min(LENS_NAMED, probs.shape[-1]))
            came = probs[:-1].gather(1, after[:, None])
            found["lens_ids"].append(best.indices.int())
            found["lens_probs"].append(best.values)
            found["lens_came"].append(came[:, 0])
            found["lens_rank"].append((probs[:-1] > came).sum(-1).int())
    if not agrees(guess, logits):
        raise CannotFollow("it computes more than model.norm and model.logits after its last block")
    return {name: torch.stack(each) for name, each in found.items()}


def shares(model: Any, trace: Trace, hidden: Tensor, logits: Tensor, after: Tensor) -> dict[str, Any]:
    """What each part adds to three logits of each position: of the actual next token, the best and the second best.

    A logit is linear in the normalised residual stream, which is the sum of the embedding and of what each layer adds.
    With the statistics of the last norm held fixed, each summand has a share in each logit.
    """
    stream = states(trace.calls)
    if trace.final is None or trace.final[1].shape != hidden[0].shape:
        raise CannotFollow("there is no model.norm between the last block and the logits")
    written, names = [stream[0]], ["embedding"]
    for layer, (call, before, x) in enumerate(zip(trace.calls, stream, stream[1:], strict=False), start=1):
        if not agrees(call.before, before):
            written.append(call.before - before)
            names.append(f"before {layer}")
        total, part = x - call.before, call.parts
        if len(part) == 2 and agrees(part["attention"] + part["mlp"], total):
            written += [part["attention"], total - part["attention"]]  # mlp, including float32's rounding
            names += [f"attention {layer}", f"mlp {layer}"]
        else:
            written.append(total)
            names.append(f"block {layer}")
    last, normed = trace.final
    if not agrees(last, stream[-1]):
        written.append(last - stream[-1])
        names.append("after the blocks")
    centred, scale, offset = last_norm(model.norm, last, normed)
    best = logits.float().topk(2).indices.T  # (2, T)
    targets = torch.stack((torch.cat((after, best[0, -1:])), best[0], best[1]))  # (3, T)
    with torch.enable_grad():
        h = hidden.detach().clone().requires_grad_()
        sums = model.logits(h)[0].gather(1, targets.T).sum(0)  # (3,)
        direction = torch.stack([torch.autograd.grad(each, h, retain_graph=True)[0][0] for each in sums])
    direction = direction.cpu().double()  # (3, T, C): the gradient of each logit
    parts = torch.stack(written)  # (parts, T, C)
    parts = (parts - parts.mean(-1, keepdim=True) if centred else parts) * scale
    found = torch.einsum("ptc,ktc->kpt", parts, direction)
    # The part that does not depend on the text: the biases of the norm and of the head.
    with torch.no_grad():
        of_offset = model.logits(offset.float().to(hidden).expand_as(hidden[0])[None])[0]
        fixed = of_offset.gather(1, targets.T).T.cpu().double()
    if bool(fixed.any()):
        found, names = torch.cat((found, fixed[:, None]), dim=1), [*names, "bias"]
    target_logits = logits.gather(1, targets.T).T
    if not agrees(found.sum(1), target_logits):
        raise CannotFollow("its logits are not linear in what model.norm returns")
    return {"shares": found, "share_names": names, "share_logits": target_logits, "share_ids": targets.int()}


def last_norm(norm: Any, x: Tensor, normed: Tensor) -> tuple[bool, Tensor, Tensor]:
    """Recover what a LayerNorm or RMSNorm did to x (T, C): whether it centred, its factors (T, C), its bias (C,)."""
    weight, bias, eps = (getattr(norm, name, None) for name in ("weight", "bias", "eps"))
    gain = torch.ones(x.shape[-1]) if weight is None else weight.detach().cpu()
    offset = torch.zeros(x.shape[-1]) if bias is None else bias.detach().cpu()
    for centred in (False, True):
        y = x - x.mean(-1, keepdim=True) if centred else x
        scale = gain.double() * (y.square().mean(-1, keepdim=True) + (eps or 0.0)).rsqrt()
        if agrees(y * scale + offset.double(), normed):
            return centred, scale, offset.double()
    raise CannotFollow("model.norm is neither a LayerNorm nor an RMSNorm, so its input has no shares in its output")


def agrees(a: Tensor, b: Tensor) -> bool:
    a, b = a.cpu().double(), b.cpu().double()
    return a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * max(float(b.abs().max()), 1e-30)


def positions(model: Any) -> dict[str, Any]:
    """The position table (P, C), and the cosine between the rows of any two positions (P, P)."""
    table, kind = None, ""
    if isinstance(getattr(model, "wpe", None), torch.nn.Embedding):
        table, kind = model.wpe.weight.detach(), "learned"
    elif isinstance(getattr(model, "sinusoid", None), Tensor):
        table, kind = model.sinusoid, "sinusoidal"
    elif isinstance(getattr(model, "rope_cos", None), Tensor):  # cos and -sin of each pair of channels
        half = model.rope_cos.shape[-1] // 2
        table, kind = torch.cat((model.rope_cos[:, :half], model.rope_sin[:, :half]), dim=1), "rope"
    if table is None:
        raise CannotFollow("it has no position table: only the causal mask tells it the order of tokens")
    table = table[:POSITIONS].float().cpu()
    product = F.normalize(table, dim=-1) @ F.normalize(table, dim=-1).T
    channels = torch.linspace(0, table.shape[1] - 1, min(table.shape[1], POSITIONS)).round().long()
    shown = table[:, channels] / table.abs().max().clamp_min(1e-30)
    return {
        "table": (127 * shown).round().to(torch.int8), "product": (127 * product).round().to(torch.int8),
        "position_kind": kind,
    }  # fmt: skip


def neighbours(model: Any, ids: list[int], vocab_size: int) -> dict[str, Any]:
    """For each token of the text, the tokens whose embeddings have the largest cosine with its embedding."""
    if not isinstance(getattr(model, "wte", None), torch.nn.Embedding):
        raise CannotFollow("there is no embedding model.wte")
    unique = sorted(set(ids))
    vectors = F.normalize(model.wte.weight.detach()[:vocab_size].float(), dim=-1)
    cosine = vectors[unique] @ vectors.T
    cosine[torch.arange(len(unique)), unique] = -2.0
    best = cosine.topk(min(NEIGHBOURS, max(1, vocab_size - 1)))
    return {"near_of": unique, "near_ids": best.indices.int(), "near_cosine": best.values}
