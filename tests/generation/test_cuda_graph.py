"""sample.py --compile without its GPU: the compiled step writes what the plain path writes, from one compilation.

aot_eager traces a step as the GPU's compiler is given it, and then runs it with torch's own operations, so the numbers
are the plain ones. What only a GPU can show, the recording, is in tests/test_gpu.py.
"""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest
import torch
from model_helpers import GPT2, LLAMA, random_tokens, randomise
from test_engine import BYTES, PROMPTS, make_model, make_settings
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from model import GPT, GPTConfig, KVCache
from nib.common.exits import RunError
from nib.cpu.int8 import Int8Linear, quantize
from nib.generation import terminal
from nib.generation.cuda_graph import SHORTEST, CompiledRows, Step, static_length
from nib.generation.engine import DRAWN, Rows, stream_text
from nib.generation.request import Sample, SamplingSettings, make_samples


@pytest.fixture
def counter(monkeypatch):
    """Counts compilations; CompiledRows compiles by it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(CompiledRows, "compiling", dict(backend=counter))
    yield counter
    torch._dynamo.reset()


def written(model: GPT, prompts: list[str], settings: SamplingSettings, make_rows: Any = Rows) -> list[Sample]:
    samples = make_samples(prompts, BYTES, settings)
    for _ in stream_text(model, samples, settings, make_rows):
        pass
    return samples


def static_cache(model: GPT, rows: int) -> KVCache:
    cache = model.make_cache(rows, 16)
    cache.lengths = torch.zeros(rows, dtype=torch.int64, device=cache.memory.device)
    return cache


def same_text(model: GPT, prompts: list[str], settings: SamplingSettings) -> list[Sample]:
    """The samples of the compiled path, which must be those of the plain one."""
    expected, samples = written(model, prompts, settings), written(model, prompts, settings, CompiledRows)
    for one, other in zip(samples, expected, strict=True):
        assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
    return samples


SHAPES = [
    *(dict(position=position) for position in ("learned", "sinusoidal", "rope", "none")),
    dict(n_kv_head=2, qk_norm=True),
    dict(position="rope", n_kv_head=1, window=5),
    dict(position="rope", rope_scaling="yarn", rope_factor=4.0, rope_original=8),
    *(dict(block_size=size, position="rope") for size in (1, 2, 3, 5)),
    dict(vocab_size=320, tie_weights=False),  # padded beyond the tokenizer's
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_compiled_step_writes_what_the_plain_path_writes(counter, shape):
    """Rows of different lengths, past the context several times, some of which end early."""
    samples = same_text(make_model(**shape), PROMPTS, make_settings(num_samples=2))
    assert counter.frame_count == 1, "the step was compiled again"
    assert max(len(sample.tokens) for sample in samples) == 50


FILTERS = [
    dict(repetition_penalty=1.7),
    dict(top_k=20, top_p=0.9, min_p=0.02),
    dict(top_p=0.8),
    dict(temperature=0.0),
    dict(top_k=1, repetition_penalty=1.3),
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_act_alike_in_the_compiled_step(counter, filters):
    same_text(make_model(), PROMPTS, make_settings(**filters))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_int8_and_16_bits_compile_too(counter, dtype, int8):
    model = make_model(norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=True, tie_weights=False)
    if int8:
        quantize(model, dtype)  # not packed, as on a GPU
        assert isinstance(model.head, Int8Linear)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if dtype == torch.float32:
        same_text(model, PROMPTS, make_settings())
    else:  # attention rounds otherwise under a mask, so some token may be another
        samples = written(model, PROMPTS, make_settings(), CompiledRows)
        first = [sample.tokens[0] for sample in written(model, PROMPTS, make_settings(max_new_tokens=1))]
        assert [sample.tokens[0] for sample in samples] == first and all(sample.finish_reason for sample in samples)
    assert counter.frame_count == 1


def test_stop_texts_end_rows_whose_next_step_is_under_way(counter):
    model = make_model(vocab_size=256, block_size=64)
    options = make_settings(num_samples=4, max_new_tokens=40)
    free = written(model, ["a prompt", "another one"], options)
    options.stop = [text[10:12] for text in (free[2].text.replace("\ufffd", ""), free[5].text.replace("\ufffd", ""))]
    samples = same_text(model, ["a prompt", "another one"], options)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    assert len({len(sample.tokens) for sample in samples}) > 2
    assert all((sample.tokens_per_second or 0) > 0 for sample in samples)


def test_texts_of_other_lengths_take_the_same_compiled_step(counter):
    """Past the block of uniform numbers; only another number of rows, or a much longer text, compiles anew."""
    model = make_model(vocab_size=256, block_size=2 * SHORTEST + 100)
    same_text(model, ["x", "yy"], make_settings(max_new_tokens=10))
    same_text(model, ["a prompt" * 9, "another"], make_settings(max_new_tokens=150))
    assert counter.frame_count == 1
    same_text(model, ["x", "yy"], make_settings(max_new_tokens=DRAWN + 20))
    assert counter.frame_count == 2


@torch._dynamo.config.patch(cache_size_limit=2)  # by itself it is 8
def test_a_process_compiles_more_shapes_than_torch_allows():
    torch._dynamo.reset()
    model = make_model(n_layer=1)
    for rows in range(1, 4):
        cache = static_cache(model, rows)
        with torch.no_grad():
            Step(model, make_settings(temperature=0.0), cache, 257, dict(backend="eager"))


def test_the_static_cache_has_a_power_of_two_of_positions():
    for room, block_size, length in [(1, 1024, 256), (256, 1024, 256), (257, 1024, 512), (700, 800, 800), (9, 16, 16)]:
        assert static_length(room, block_size) == length


def test_one_step_is_queued_while_the_text_is_read_and_none_past_a_full_context(counter):
    model, options = make_model(vocab_size=256, block_size=16), make_settings(max_new_tokens=30)
    rows: list[CompiledRows] = []

    def make_rows(*arguments: Any) -> CompiledRows:
        rows.append(CompiledRows(*arguments))
        return rows[0]

    samples = make_samples(["nine byte"], BYTES, options)
    ahead = [len(rows[0].unread) for _ in stream_text(model, samples, options, make_rows)]
    # 9 of 16 positions are taken, so token 8 does not fit; the row goes on with 8, of which it is one. 30 is the last.
    assert [number for number, steps in enumerate(ahead, 1) if not steps] == [8, 17, 26, 30]
    assert set(ahead) == {0, 1}


def test_the_speed_that_is_told_holds_the_time_in_which_a_step_ran_unwatched(counter):
    model, options = make_model(vocab_size=256), make_settings(max_new_tokens=10)
    samples = make_samples(["x"], BYTES, options)
    for _ in stream_text(model, samples, options, CompiledRows):
        time.sleep(0.01)
    assert samples[0].tokens_per_second and samples[0].tokens_per_second <= 100


@pytest.mark.parametrize("filters", [{}, *FILTERS], ids=str)
def test_nothing_in_a_step_reads_a_value(filters):
    """On the meta device tensors have no values: whatever would wait for them raises."""
    model, options = make_model(position="rope", window=5).to("meta"), make_settings(**filters)
    cache = static_cache(model, 3)
    with torch.no_grad():
        Step(model, options, cache, 257, dict(backend="eager")).forward()


def test_a_graph_break_is_a_bug_and_a_machine_that_cannot_compile_one_line(counter, monkeypatch):
    model = make_model()

    def refuse(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler found")

    monkeypatch.setattr(CompiledRows, "compiling", dict(backend=refuse))
    with pytest.raises(RunError, match=r"torch.compile failed: .*no compiler found\. Leave out --compile"):
        written(model, ["x"], make_settings(), CompiledRows)
    monkeypatch.setattr(CompiledRows, "compiling", dict(backend="eager"))
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: logits(x) * float(x.sum().tolist() != 7))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        written(model, ["x"], make_settings(), CompiledRows)


def test_sample_prints_the_compiled_text_and_ctrl_c_ends_it(counter, capsys, monkeypatch):
    model, settings = make_model(vocab_size=256), make_settings(max_new_tokens=40, temperature=1.0)

    def write(make_rows: Any) -> int:
        return terminal.write(model, make_samples(["a prompt"], BYTES, settings), settings, make_rows=make_rows)

    shown = {}
    for make_rows in (Rows, CompiledRows):
        assert write(make_rows) == 0
        shown[make_rows] = capsys.readouterr().out
    assert shown[CompiledRows] == shown[Rows] and counter.frame_count == 1
    show = terminal.Printer.show

    def interrupt(printer: Any, sample: Sample, text: str) -> None:
        if len(sample.tokens) == 20 and not sample.finish_reason:
            raise KeyboardInterrupt
        show(printer, sample, text)

    monkeypatch.setattr(terminal.Printer, "show", interrupt)
    assert write(CompiledRows) == terminal.INTERRUPTED
    out = capsys.readouterr().out
    assert len(out) > 20 and shown[CompiledRows].startswith(out[:20])


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_the_real_compiler_writes_the_same_text(monkeypatch):
    """With all that a step can hold, on the CPU: ten seconds, most of them g++'s; less when torch has kept its work."""
    torch._dynamo.reset()
    model = make_model(position="rope", n_kv_head=2, n_layer=2)
    settings = make_settings(top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.1)
    _, code = run_and_get_code(lambda: same_text(model, PROMPTS[:3], settings))
    shape = model.make_cache(len(PROMPTS[:3])).memory.shape
    assert code and not any(f"empty_strided_cpu({tuple(shape)}" in each for each in code), "the cache is copied"


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recompute", "chunked"), [(False, True), (True, False)])
@pytest.mark.parametrize("changes", [{}, LLAMA, dict(norm="rmsnorm", window=5, n_kv_head=2, qk_norm=True)], ids=str)
def test_training_compiles_once_and_whole_to_the_same_gradients(changes, recompute, chunked):
    torch._dynamo.reset()
    model = GPT(GPTConfig(**(GPT2 | dict(vocab_size=40, block_size=24, n_layer=2, n_head=4, n_embd=32) | changes)))
    randomise(model)
    model.activation_checkpointing = recompute
    if chunked:
        model.max_logits, model.vocab_multiple = 10 * 40, 64  # 10 rows of logits at a time, padded
    counter = CompileCounterWithBackend("aot_eager")
    ready = torch.compile(model, backend=counter, fullgraph=True)  # a graph break raises
    for step in range(3):
        tokens, targets = random_tokens(2, 24, seed=step), random_tokens(2, 24, seed=step + 9)
        gradients = []
        for network in (ready, model):
            model.zero_grad()
            _, loss = network(tokens, targets)
            loss.backward()
            gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        for ours, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
