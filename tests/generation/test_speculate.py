"""Guessing ahead from repetitions: never another text, and fewer steps where a text repeats."""

from __future__ import annotations

import pytest
from model_helpers import LLAMA, random_model

from model import KVCache
from nib.generation.engine import generate_text
from nib.generation.request import SamplingSettings
from nib.generation.speculation import Repetitions
from nib.tokenizer.load import make_tokenizer

BYTES = make_tokenizer("byte")
PROMPTS = ["abcabcabcabcab", "x", "for i in range(3): for i in ra"]


def write(model, prompts=PROMPTS, **settings):
    samples = generate_text(model, KVCache, BYTES, prompts, SamplingSettings(**settings))
    return [(sample.tokens, sample.finish_reason) for sample in samples]


@pytest.mark.parametrize("temperature", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("shape", [{}, LLAMA, dict(window=5, n_kv_head=2)])
def test_guesses_change_no_token(shape, temperature):
    model = random_model(vocab_size=BYTES.vocab_size, block_size=40, **shape)
    settings = dict(max_new_tokens=90, num_samples=2, temperature=temperature)  # 90: beyond the context, twice
    assert write(model, **settings) == write(model, **settings, speculate=5)


def test_fewer_steps_are_taken_where_the_text_repeats():
    model, widths = random_model(vocab_size=BYTES.vocab_size, block_size=200, position="none", window=1), []
    hidden = model.hidden
    model.hidden = lambda tokens, cache=None: widths.append(tokens.shape[1]) or hidden(tokens, cache)
    settings = dict(prompts=PROMPTS[:1], max_new_tokens=150, temperature=0.0)  # each byte has its successor
    plain = write(model, **settings)
    steps, widths[:] = len(widths), []
    assert write(model, **settings, speculate=4) == plain
    assert steps == 150 and len(widths) < 100 and max(widths[1:]) == 5


def test_no_more_is_guessed_than_is_wanted_and_fits():
    model, widths = random_model(vocab_size=BYTES.vocab_size, block_size=18), []
    hidden = model.hidden
    model.hidden = lambda tokens, cache=None: widths.append(tokens.shape[1]) or hidden(tokens, cache)
    write(model, prompts=PROMPTS[:1], max_new_tokens=4, temperature=0.0, speculate=50)
    assert max(widths[1:]) <= 3  # the newest token, and two guesses before the last of four


def test_the_repetition_penalty_turns_guessing_off():
    model, widths = random_model(vocab_size=BYTES.vocab_size, block_size=64), []
    hidden = model.hidden
    model.hidden = lambda tokens, cache=None: widths.append(tokens.shape[1]) or hidden(tokens, cache)
    write(model, prompts=PROMPTS[:1], max_new_tokens=20, repetition_penalty=1.2, speculate=4)
    assert set(widths[1:]) == {1}


def test_the_newest_and_longest_repetition_is_taken():
    assert Repetitions([1, 2, 3, 9, 8, 7, 1, 2, 3]).guess(2) == [9, 8]
    assert Repetitions([1, 2, 5, 9, 1, 2, 6, 9, 1, 2]).guess(1) == [6]  # newest
    assert Repetitions([4, 1, 2, 5, 3, 1, 2, 6, 4, 1, 2]).guess(1) == [5]  # longest
    assert Repetitions([1, 2, 3]).guess(3) == [] and Repetitions([]).guess(1) == []
    growing = Repetitions([])
    growing.extend([7, 7, 7])
    assert growing.guess(5) == [7] * 5
