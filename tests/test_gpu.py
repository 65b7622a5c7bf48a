"""The invariants that matter most, on the device given by `pytest --device cuda -m gpu`; bench/gpu.py calls it so.

With `--device cpu` the same lines run here, on what other tests check more closely there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import HAS_FSDP
from hf_helpers import exported, load_ours, their_logits
from hf_helpers import make_model as make_theirs
from model_helpers import LLAMA, random_model, random_tokens
from test_engine import BYTES, PROMPTS, make_model, make_settings
from test_train import assert_same_run, in_corpus, losses, tensors, train
from torch import Tensor
from torch.distributed import device_mesh

from model import GPT
from nib.generation.cuda_graph import CompiledRows
from nib.generation.engine import Rows, stream_text
from nib.generation.request import make_samples
from nib.tokenizer.huggingface import write_tokenizer
from nib.tokenizer.tokenizer import CharTokenizer
from nib.training import step
from nib.training.distributed import Cluster
from nib.training.objective import LanguageModelling
from nib.training.optimizer import set_learning_rate
from nib.training.report import Reporter
from nib.training.run import Run
from nib.training.settings import TrainSettings

__all__ = ["in_corpus"]  # the fixture that gives each test a directory with data/

pytestmark = pytest.mark.gpu
SHAPES: list[dict[str, Any]] = [
    {},
    LLAMA | dict(n_kv_head=2, qk_norm=True),
    dict(window=5, n_kv_head=1, position="rope", norm="rmsnorm"),
]


@pytest.fixture(autouse=True)
def exact(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Float32 products in float32, not TF32; the operations that torch has a reproducible version of."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    precision = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch._dynamo.reset()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)


def compiled(thing: Any, device: torch.device, **options: Any) -> Any:
    """Compiled as on a GPU; on a CPU without the minute that a C++ compiler takes."""
    return torch.compile(thing, dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager", **options)


def near(found: Tensor, expected: Tensor, share: float) -> None:
    """Within a share of the largest number."""
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-9))
    assert error <= share, error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_cached_and_uncached_logits_agree(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Rows of different lengths, filled from a padded batch, go on in steps of several tokens and of one."""
    model, tokens = random_model(**shape).to(device, dtype), random_tokens(3, 24).to(device)
    expected, _ = model(tokens)
    lengths, cache = [3, 9, 1], model.make_cache(3)
    model(tokens[:, :9], cache=cache)
    cache.lengths = list(lengths)
    while max(lengths) < 24:
        count = 4 if max(lengths) == 9 else 1
        new = torch.stack([tokens[row, length : length + count] for row, length in enumerate(lengths)])
        logits, _ = model(new, cache=cache)
        for row, length in enumerate(lengths):
            # Rounding of the dtype, passed on by two layers with weights of 0.3.
            near(logits[row], expected[row, length : length + count], {torch.float32: 1e-5}.get(dtype, 0.1))
        lengths = [length + count for length in lengths]


def gradients(ready: Any, model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    _, loss = ready(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunked_is_plain_and_compiled_is_eager(shape: dict[str, Any], device: torch.device) -> None:
    model, tokens = random_model(**shape).to(device).train(), random_tokens(3, 25).to(device)
    plain = gradients(model, model, tokens)
    model.max_logits, model.vocab_multiple = 10 * 40, 64
    eager = gradients(model, model, tokens)
    found = gradients(compiled(model, device, fullgraph=True), model, tokens)
    assert plain.keys() == eager.keys() == found.keys()
    for name, expected in plain.items():
        near(eager[name], expected, 1e-5)
        near(found[name], expected, 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_is_the_run_bit_for_bit(optimizer: str, dtype: str, device: torch.device) -> None:
    common = [f"--device={device.type}", f"--optimizer={optimizer}", f"--dtype={dtype}", "--compile=false"]
    common += ["--schedule=constant", "--dropout=0.1", "--micro_batch_size=4"]
    for arguments in (["--max_iters=6", "--out_dir=out/whole"], ["--max_iters=3"], ["--max_iters=6"]):
        assert train(*common, *arguments) == 0
    assert_same_run("out/run", "out/whole")
    assert losses()[-1] < losses()[0]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_float16_overflow_is_skipped_by_all_optimizers(
    optimizer: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gradient is infinite at step 3: nothing but the loss scale moves."""
    common = [f"--device={device.type}", f"--optimizer={optimizer}", "--dtype=float16", "--schedule=constant"]
    common += ["--compile=false"]
    assert train(*common, "--max_iters=2") == 0
    before = [tensors("out/run", file) for file in ("model.safetensors", "optimizer.safetensors")]
    real = step.optimizer_step

    def overflow(run: Run, *batch: Tensor) -> Any:
        hook = next(run.model.parameters()).register_hook(lambda grad: grad * torch.inf)
        found = real(run, *batch)
        hook.remove()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(step, "optimizer_step", overflow)
        assert train(*common, "--max_iters=3") == 0
    after = [tensors("out/run", file) for file in ("model.safetensors", "optimizer.safetensors")]
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    state = json.loads(Path("out/run/checkpoints/step-00000003/state.json").read_text())
    assert state["progress"]["skipped_in_a_row"] == 1 and state["scaler"]["scale"] == 2**15


def written(model: GPT, prompts: list[str], make_rows: Any = Rows, **options: Any) -> list[str]:
    settings = make_settings(**options)
    samples = make_samples(prompts, BYTES, settings)
    for _ in stream_text(model, samples, settings, make_rows):
        pass
    return [sample.text for sample in samples]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_text_is_the_same_alone_in_a_batch_and_compiled(
    shape: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where kernels for other shapes round nearly alike; every filter, past the context."""
    if device.type == "cpu":
        monkeypatch.setattr(CompiledRows, "compiling", dict(backend="aot_eager"))
    model = make_model(**shape).to(device)
    for filters in (dict(temperature=0.0), {}, dict(top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.1)):
        options: dict[str, Any] = dict(max_new_tokens=30, **filters)
        batch = written(model, PROMPTS, **options)
        assert [written(model, [prompt], **options)[0] for prompt in PROMPTS] == batch
    assert written(model, PROMPTS, CompiledRows, **options) == batch  # on a GPU, ten seconds of compiling


@pytest.mark.gpu(cpu_too=True)
@pytest.mark.parametrize("compile", ["true", "false"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_process_that_takes_itself_for_one_of_two_trains_as_one(
    parallel: str, compile: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By nccl, on one GPU. It doubles its loss for a mean over two that is one over itself: gradients are double."""
    if parallel == "fsdp" and device.type == "cpu" and not HAS_FSDP:
        pytest.skip("torch 2.6 has no FSDP for CPUs")
    store = f"file://{tmp_path}/store"
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store, rank=0, world_size=1)
    mesh = device_mesh.init_device_mesh
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda kind, _: mesh(kind, (1,)))
    if device.type == "cpu":
        monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    dataset: Any = None
    found = []
    try:
        for world in (1, 2):
            settings = TrainSettings(
                batch_size=4 * world, micro_batch_size=2, block_size=24, parallel=parallel, dtype="float32",
                grad_clip=0.0, optimizer="muon", compile=compile if world == 2 else "false",
            )  # fmt: skip
            run = Run(settings, dataset, Cluster(0, world, device))
            run.report, run.objective = Reporter(tmp_path, active=False), LanguageModelling(settings, None)
            run.take(random_model(norm="rmsnorm", position="rope", n_embd=64).train())
            set_learning_rate(run.optimizers, 1.0)
            for run.progress.step in range(2):
                batch = [(random_tokens(2, 24, seed=part), random_tokens(2, 24, seed=part + 2)) for part in range(2)]
                found.append([float(each) for each in step.optimizer_step(run, batch)])
    finally:
        dist.destroy_process_group()
    if (parallel, compile) == ("ddp", "true"):  # the other way round nothing would be exchanged before all is computed
        assert type(run.ready._orig_mod).__name__ == "DistributedDataParallel"
    (loss, norm), (next_loss, _), (same, doubled), (next_same, _) = found
    assert same == pytest.approx(loss, rel=1e-5) and doubled == pytest.approx(2 * norm, rel=1e-4)
    # The optimizers do not see the size of a gradient, but for AdamW's epsilon.
    assert next_loss != pytest.approx(loss, rel=1e-3) and next_same == pytest.approx(next_loss, rel=1e-3)


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Qwen3"])
def test_logits_are_those_of_transformers_there_and_back(name: str, device: torch.device, tmp_path: Path) -> None:
    theirs = make_theirs(name).to(device)
    theirs.save_pretrained(tmp_path / "theirs")
    write_tokenizer(CharTokenizer("".join(map(chr, range(40, 80)))), tmp_path / "theirs", 64)
    ours, tokens = load_ours(tmp_path / "theirs").to(device), random_tokens(2, 20).to(device)
    expected = their_logits(theirs, tokens)
    with torch.no_grad():
        near(ours(tokens)[0], expected, 2e-5)
    exported(tmp_path / "theirs", tmp_path / "back")
    back = type(theirs).from_pretrained(tmp_path / "back").to(device)
    near(their_logits(back, tokens), expected, 1e-5)


@pytest.mark.gpu(cpu_too=True)
def test_out_of_memory_makes_the_micro_batch_smaller(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device's own error, at first in a trial, and then only in a compiled one."""
    real, compiling = GPT.forward, torch.compile
    limit = [4, 2]  # sequences that fit, uncompiled and compiled

    def hungry(self: GPT, tokens: Tensor, *rest: Any) -> Any:
        if len(tokens) > limit[0]:
            torch.empty(2**45, device=device)
        return real(self, tokens, *rest)

    def compile(model: Any, **options: Any) -> Any:
        limit[0] = limit[1]
        return compiling(model, **options, backend="eager")

    monkeypatch.setattr("nib.training.placement.CPU_ACTIVATIONS", 2**40)
    monkeypatch.setattr(GPT, "forward", torch._dynamo.disable(hungry))
    monkeypatch.setattr("torch.compile", compile)
    for compiled, fits in (("false", 4), ("true", 2)):
        limit[0] = 4
        assert train("--max_iters=1", f"--compile={compiled}", f"--out_dir=out/{fits}", f"--device={device.type}") == 0
        state = json.loads(Path(f"out/{fits}/checkpoints/step-00000001/state.json").read_text())
        assert state["micro_batch_size"] == fits


def test_a_step_waits_for_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises where the host would wait for the GPU; on a CPU there is nothing to wait for."""
    real, skipped = step.optimizer_step, 2  # the first steps make the state of optimizers and allocators

    def watched(run: Run, *batch: Tensor) -> Any:
        if device.type == "cuda" and run.progress.step >= skipped:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return real(run, *batch)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(step, "optimizer_step", watched)
    for optimizer in ("muon", "adamw"):
        for dtype in ("auto", "float16"):
            common = [f"--device={device.type}", f"--optimizer={optimizer}", f"--dtype={dtype}", "--compile=false"]
            assert train(*common, "--max_iters=5", "--micro_batch_size=4", f"--out_dir=out/{optimizer}-{dtype}") == 0
