"""Generation: what a model writes is the plain loop's result, whatever the cache, the batch and the stream do."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_helpers import GPT2
from torch import Tensor

from model import GPT, GPTConfig, KVCache
from nib.common.exits import RunError
from nib.generation.engine import DRAWN, generate_text, stream_text
from nib.generation.request import SamplingSettings, make_samples
from nib.generation.sampling import choose, row_generator
from nib.tokenizer.load import make_tokenizer

BYTES = make_tokenizer("byte")


def make_model(**changes) -> GPT:
    """A model of a few thousand parameters with weights large enough that what comes before matters."""
    shape = GPT2 | dict(vocab_size=257, block_size=16, n_layer=2, n_head=4, n_embd=16) | changes
    model = GPT(GPTConfig(**shape)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return model


def make_settings(**changes) -> SamplingSettings:
    """Wide sampling, so that a wrong logit shows as another token."""
    return SamplingSettings(**(dict(max_new_tokens=50, temperature=1.0, top_k=0) | changes))


def plain_loop(model: GPT, prompt: str, options: SamplingSettings, number: int = 0) -> list[int]:
    """The contract word by word: one row, no cache, no batch, every position computed for every token."""
    block_size = model.config.block_size
    sees, written = BYTES.encode(prompt)[-block_size:], []
    generator = row_generator(options.seed, number, sees)
    seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
    seen[0, sees] = True
    while len(written) < options.max_new_tokens:
        with torch.no_grad():
            logits, _ = model(torch.tensor([sees]))
        uniform = torch.tensor([generator.random(dtype=np.float32)])
        token = int(choose(logits[:, -1], uniform, options, seen))
        if token == BYTES.end_of_text:
            break
        written.append(token)
        seen[0, token] = True
        sees = [*sees, token]
        if len(sees) > block_size:
            sees = sees[-(block_size - block_size // 2) :]
    return written


def watch_hidden(model: GPT, monkeypatch) -> list[tuple[int, ...]]:
    """A list that gets the shape of the tokens of each call of model.hidden."""
    calls: list[tuple[int, ...]] = []
    hidden = model.hidden

    def watched(tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        calls.append(tuple(tokens.shape))
        return hidden(tokens, cache)

    monkeypatch.setattr(model, "hidden", watched)
    return calls


PROMPTS = ["a", "nine byte", "exactly 16 bytes", "a text of more than the context of 16", ""]


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope", "none"])
@pytest.mark.parametrize("shape", [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "window": 5}, {"qk_norm": True}])
def test_cached_and_uncached_batches_write_what_the_plain_loop_writes(position, shape):
    model = make_model(vocab_size=256, position=position, **shape)  # no end-of-text: all go past the context
    prompts = PROMPTS[:4]
    expected = [plain_loop(model, prompt, make_settings(), number) for prompt in prompts for number in range(2)]
    for cache in (True, False):
        samples = generate_text(model, BYTES, prompts, make_settings(cache=cache, num_samples=2))
        assert [sample.tokens for sample in samples] == expected, f"cache={cache}"


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_contexts_of_a_few_tokens_slide_as_the_plain_loop_does(block_size):
    model = make_model(block_size=block_size, position="rope")
    for cache in (True, False):
        samples = generate_text(model, BYTES, PROMPTS[:3], make_settings(cache=cache))
        assert [sample.tokens for sample in samples] == [plain_loop(model, p, make_settings()) for p in PROMPTS[:3]]


@pytest.mark.parametrize(
    "filters",
    [dict(repetition_penalty=1.7), dict(top_k=20, top_p=0.9, min_p=0.02), dict(temperature=0, repetition_penalty=1.3)],
)
def test_filters_act_alike_in_a_batch_and_in_the_plain_loop(filters):
    model, options = make_model(), make_settings(**filters)
    samples = generate_text(model, BYTES, PROMPTS[:4], options)
    assert [sample.tokens for sample in samples] == [plain_loop(model, prompt, options) for prompt in PROMPTS[:4]]


def test_a_row_does_not_depend_on_the_rest_of_the_batch():
    model, options = make_model(position="rope"), make_settings(num_samples=3)
    together = generate_text(model, BYTES, PROMPTS, options)
    backwards = generate_text(model, BYTES, PROMPTS[::-1], options)
    for place, prompt in enumerate(PROMPTS):
        alone = [sample.tokens for sample in generate_text(model, BYTES, [prompt], options)]
        assert [sample.tokens for sample in together[3 * place : 3 * place + 3]] == alone
        there = len(PROMPTS) - 1 - place
        assert [sample.tokens for sample in backwards[3 * there : 3 * there + 3]] == alone


def test_samples_differ_by_number_and_seed_and_a_longer_one_begins_with_the_shorter():
    model = make_model()
    short = generate_text(model, BYTES, ["x"], make_settings(num_samples=3))
    assert len({tuple(sample.tokens) for sample in short}) == 3
    for seed in (1338, 1337 + 2**32):
        other = generate_text(model, BYTES, ["x"], make_settings(seed=seed))
        assert other[0].tokens != short[0].tokens, f"seed {seed}"
    # Without end-of-text in reach, past the first block of uniform numbers.
    model = make_model(vocab_size=256)
    short = generate_text(model, BYTES, ["x"], make_settings(num_samples=2))
    long = generate_text(model, BYTES, ["x"], make_settings(num_samples=2, max_new_tokens=DRAWN + 50))
    assert [sample.tokens[:50] for sample in long] == [sample.tokens for sample in short]
    assert long[1].tokens == plain_loop(model, "x", make_settings(max_new_tokens=DRAWN + 50), 1)


def test_samples_of_a_prompt_share_one_prefill_and_finished_rows_leave_the_batch(monkeypatch):
    model = make_model(vocab_size=256, block_size=64)
    options = make_settings(num_samples=4, max_new_tokens=30)
    free = generate_text(model, BYTES, ["a prompt", "another one"], options)
    options.stop = [free[2].text[10]]
    calls = watch_hidden(model, monkeypatch)
    samples = generate_text(model, BYTES, ["a prompt", "another one"], options)
    assert calls[0] == (2, 11), "one prefill with a row for each prompt"
    assert calls[1][1] == 1 and calls[1][0] <= 8
    assert [shape[0] for shape in calls[1:]] == [
        sum(len(sample.tokens) > step for sample in samples) for step in range(1, len(calls))
    ]
    assert samples[2].finish_reason == "stop" and len(samples[2].tokens) < 30
    for sample, before in zip(samples, free, strict=True):
        assert sample.tokens == before.tokens[: len(sample.tokens)], "a row changed when another one left"


def test_rows_that_stay_keep_their_own_numbers_and_penalties_when_others_leave():
    model, number = make_model(), 4
    with torch.no_grad():
        model.wte.weight[256] *= 0.7  # end-of-text comes after some hundred tokens
    options = make_settings(num_samples=number, max_new_tokens=DRAWN + 30, repetition_penalty=1.05)
    expected = [plain_loop(model, "y", options, row) for row in range(number)]
    lengths = [len(tokens) for tokens in expected]
    assert lengths[0] < DRAWN < max(lengths) and len(set(lengths)) > 2, "the first should leave and others stay"
    samples = generate_text(model, BYTES, ["y"], options)
    assert [sample.tokens for sample in samples] == expected


def test_samples_of_different_prompts_draw_different_numbers():
    model = make_model()
    with torch.no_grad():
        model.norm.weight.zero_()  # no prompt makes a difference: all logits are equal
        model.norm.bias.zero_()
    one, other, same = generate_text(model, BYTES, ["a", "b", "a"], make_settings())
    assert one.tokens != other.tokens and one.tokens == same.tokens


def test_going_past_the_context_costs_about_one_more_token_a_token(monkeypatch):
    model = make_model(vocab_size=256, block_size=32)
    calls = watch_hidden(model, monkeypatch)
    generate_text(model, BYTES, ["x" * 32, "y"], make_settings(max_new_tokens=320))
    assert sum(rows * length for rows, length in calls) < 32 * 2 + 2.1 * 320 * 2


def test_the_last_positions_logits_are_the_only_ones_computed(monkeypatch):
    model, shapes = make_model(), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: shapes.append(tuple(x.shape)) or logits(x))
    generate_text(model, BYTES, PROMPTS[:3], make_settings(max_new_tokens=3))
    assert shapes[0] == (3, 16) and all(len(shape) == 2 for shape in shapes)


def test_greedy_is_argmax_and_equals_transformers_generate():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = make_model(vocab_size=256, block_size=64)
    shape = dict(vocab_size=256, n_positions=64, n_embd=16, n_layer=2, n_head=4)
    reference = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=None)).eval()
    names = {
        "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
    }  # fmt: skip
    weights = {"transformer.wte.weight": model.wte.weight, "transformer.wpe.weight": model.wpe.weight}
    weights |= {f"transformer.ln_f.{part}": value for part, value in model.norm.named_parameters()}
    for layer, block in enumerate(model.blocks):
        for ours, theirs in names.items():
            for part, value in block.get_submodule(ours).named_parameters():
                weights[f"transformer.h.{layer}.{theirs}.{part}"] = value.T if value.dim() == 2 else value
    reference.load_state_dict(weights | {"lm_head.weight": model.wte.weight})
    prompt = "def greedy"
    for options in (make_settings(temperature=0.0), make_settings(top_k=1, temperature=2.0)):
        (sample,) = generate_text(model, BYTES, [prompt], options)
        tokens = torch.tensor([BYTES.encode(prompt)])
        expected = reference.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=50, pad_token_id=0
        )
        assert sample.tokens == expected[0, len(prompt) :].tolist()


def test_generating_leaves_random_state_mode_and_training_as_they_were():
    model = make_model(dropout=0.5).train()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = generate_text(model, BYTES, ["x"], make_settings())
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    _, loss = model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    loss.backward()
    assert generate_text(model.eval(), BYTES, ["x"], make_settings())[0].tokens == first[0].tokens
    assert not model.training
    model.train()
    stream = stream_text(model, make_samples(["x"], BYTES, make_settings()), make_settings())
    next(stream)
    stream.close()
    assert model.training, "the mode must come back when the reader goes away in the middle"


def test_ids_beyond_the_tokenizer_are_never_written():
    model = make_model(vocab_size=320, tie_weights=False)
    with torch.no_grad():
        model.head.weight[257:] = 100 * model.head.weight[:63]
    samples = generate_text(model, BYTES, PROMPTS, make_settings(repetition_penalty=1.1))
    assert max(max(sample.tokens, default=0) for sample in samples) < 257


def test_a_model_that_diverged_is_an_error():
    model = make_model()
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        generate_text(model, BYTES, ["x"], make_settings())
    assert not model.training


def test_no_new_tokens_need_no_pass_of_the_model():
    shape = SimpleNamespace(config=SimpleNamespace(vocab_size=257))
    samples = generate_text(shape, BYTES, ["x"], make_settings(max_new_tokens=0))  # type: ignore[arg-type]
    assert [(s.text, s.tokens, s.finish_reason, s.tokens_per_second) for s in samples] == [("", [], "length", None)]


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope", "none"])
def test_bfloat16_weights_make_a_bfloat16_cache(position, monkeypatch):
    model, dtypes = make_model(position=position), []
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    update = KVCache.update
    monkeypatch.setattr(KVCache, "update", lambda self, *rest: dtypes.append(self.memory.dtype) or update(self, *rest))
    samples = generate_text(model, BYTES, PROMPTS, make_settings())
    assert all(sample.finish_reason for sample in samples) and set(dtypes) == {torch.bfloat16}


def test_the_streamed_pieces_are_the_text_and_end_of_text_ends_it():
    model = make_model()
    with torch.no_grad():
        model.wte.weight[256] *= 4  # end-of-text comes now and then
    options = make_settings(num_samples=8, max_new_tokens=200, stop=["a"])
    samples = make_samples(["x"], BYTES, options)
    pieces = {sample.number: "" for sample in samples}
    for sample, text in stream_text(model, samples, options):
        pieces[sample.number] += text
        assert pieces[sample.number] == sample.text
    assert {sample.finish_reason for sample in samples} >= {"end_of_text"}
    for sample in samples:
        assert 256 not in sample.tokens and "a" not in sample.text
        if sample.finish_reason != "stop":
            assert sample.text == BYTES.decode(sample.tokens)
        assert sample.tokens_per_second is None or sample.tokens_per_second > 0
