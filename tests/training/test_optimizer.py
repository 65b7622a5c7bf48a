"""Muon against a plain reading of its definition, which parameters go where, and the learning rate over a run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from model_helpers import GPT2
from torch import Tensor

from model import GPT, GPTConfig
from nib.training.optimizer import Muon, make_optimizers, orthogonalise, set_learning_rate
from nib.training.schedule import decay_factor, finished, rate_factor, warmup_factor

torch.set_num_threads(1)


def make_model(**changes: Any) -> GPT:
    torch.manual_seed(0)
    settings: dict[str, Any] = GPT2 | dict(vocab_size=40, block_size=16, n_layer=2, n_head=4, n_embd=32)
    return GPT(GPTConfig(**{**settings, **changes}))


def optimizers_of(model: GPT, kind: str = "muon", weight_decay: float = 0.1) -> list[torch.optim.Optimizer]:
    return make_optimizers(
        model, kind=kind, learning_rate=1e-3, muon_learning_rate=0.02, weight_decay=weight_decay, betas=(0.9, 0.95)
    )


def give_gradients(model: GPT, seed: int) -> None:
    """Gradients with a wide range of singular values, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if drawn.ndim == 2:
            drawn *= torch.logspace(0, -2, drawn.shape[1])
        parameter.grad = drawn


# ---- orthogonalisation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32), (1, 8), (8, 1), (2, 300)], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_singular_values_come_near_one(shape: tuple[int, int], size: float) -> None:
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    singular = torch.logspace(0, -2, u.shape[1]) * size  # from 1 to 1/100 of the largest
    matrix = u * singular @ vt
    found = orthogonalise(matrix[None])[0]
    assert found.shape == shape and found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    # The polynomial overshoots: Jordan (2024) gives 0.7 to 1.2 for what is not very small at the start.
    assert values.max() < 1.25 and values.min() > 0.6
    # The singular directions stay: in their basis the result is diagonal.
    diagonal = u.T @ found @ vt.T
    assert (diagonal - diagonal.diag().diag()).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_take_gradients_that_are_too_small_for_float16(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    found = orthogonalise(1e-9 * torch.randn(1, 32, 96), dtype)[0]
    values = torch.linalg.svdvals(found.float())
    assert found.dtype == dtype and values.max() < 1.25 and values.min() > 0.6


def test_zero_gradient_stays_zero() -> None:
    assert not orthogonalise(torch.zeros(2, 4, 6)).any()


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (130, 128), (128, 260)], ids=str)
def test_a_batch_is_orthogonalised_one_by_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(5, *shape) * torch.logspace(-3, 3, 5)[:, None, None]
    one_by_one = torch.stack([orthogonalise(matrix[None])[0] for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), one_by_one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(128, 128), (160, 130), (130, 199), (128, 256), (400, 130)], ids=str)
def test_one_by_one_and_batched_agree(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Square, nearly square, and wide enough for the iteration on the Gram matrix."""
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.logspace(0, -2, shape[1])
    single = orthogonalise(matrices)
    monkeypatch.setattr("nib.training.optimizer.SINGLE_ROWS", 1000)
    # Float32 rounding of ten products of matrices whose largest singular value is about 1.
    torch.testing.assert_close(single, orthogonalise(matrices), rtol=0, atol=1e-5)


def test_processes_share_the_work_and_agree(tmp_path: Path) -> None:
    """Two real processes, for counts that do not divide evenly; each ends with what one would have made."""
    script = """
import sys, torch
import torch.distributed as dist
from nib.training.optimizer import orthogonalise, shared_orthogonalise
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
shapes = [(6, 10), (10, 6), (8, 8), (128, 140), (260, 128)]
for given in ([(6, 10)], [(8, 8)] * 5, shapes, [shapes[i % 5] for i in range(17)]):
    torch.manual_seed(len(given))
    matrices = [torch.randn(*shape) for shape in given]
    found = shared_orthogonalise(matrices)
    for matrix, result in zip(matrices, found, strict=True):
        # A product over a smaller batch may round otherwise, and five steps pass that on.
        torch.testing.assert_close(result, orthogonalise(matrix[None])[0], rtol=0, atol=1e-5)
        both = [torch.empty_like(matrix) for _ in range(2)]
        dist.all_gather(both, result.contiguous())
        assert torch.equal(*both), "the processes differ"
print("agreed", flush=True)
dist.barrier()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", script, str(rank), str(tmp_path / "store")] for rank in range(2)]
    options: dict[str, Any] = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes = [subprocess.Popen(command, **options) for command in commands]
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert "agreed" in output, output


# ---- Muon --------------------------------------------------------------------------------------------------------


def reference_orthogonalise(matrix: Tensor) -> Tensor:
    """The quintic iteration as written in Jordan (2024), in float64, on the wide side."""
    x = matrix.double() / matrix.double().norm()
    if x.shape[0] > x.shape[1]:
        return reference_orthogonalise(matrix.T).T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def reference_step(weight: Tensor, gradients: list[Tensor], cuts: list[int], lr: float, decay: float) -> Tensor:
    """Muon over `gradients`, one part of the rows at a time, in float64."""
    done = []
    for begin, end in zip([0, *cuts], [*cuts, len(weight)], strict=True):
        part, momentum = weight[begin:end].double(), torch.zeros_like(weight[begin:end]).double()
        for gradient in gradients:
            g = gradient[begin:end].double()
            momentum = 0.95 * momentum + 0.05 * g
            update = reference_orthogonalise(0.05 * g + 0.95 * momentum)
            part = part * (1 - lr * decay) - lr * max(1, part.shape[0] / part.shape[1]) ** 0.5 * update
        done.append(part)
    return torch.cat(done).float()


SHAPES: dict[str, dict[str, Any]] = {
    "heads of their own": dict(),
    "grouped heads": dict(n_kv_head=2),
    "one key/value head": dict(n_kv_head=1, head_size=16),
    "swiglu": dict(mlp="swiglu", mlp_hidden=40),
    "qkv of the shape of relu's up": dict(mlp="relu", mlp_hidden=96),
    "qkv of the shape of swiglu's up": dict(mlp="swiglu", mlp_hidden=48),
    "square everything": dict(mlp="relu", mlp_hidden=32),
}


def expected_cuts(name: str, config: GPTConfig) -> list[int]:
    """Where queries end and keys end; where swiglu's gate ends."""
    if name.endswith("qkv.weight"):
        queries, keys = config.n_head * config.head_size, config.n_kv_head * config.head_size
        return [queries, queries + keys]
    return [config.mlp_hidden] if name.endswith("up.weight") and config.mlp == "swiglu" else []


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_is_the_plain_reference(shape: str) -> None:
    """Every matrix of the blocks, its parts each by themselves, for steps enough that momentum matters."""
    model = make_model(**SHAPES[shape])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in before}
    optimizers = optimizers_of(model)
    set_learning_rate(optimizers, 0.5)
    for step in range(3):
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name].append(parameter.grad.clone())
        for optimizer in optimizers:
            optimizer.step()
    hidden = [name for name in before if name.startswith("blocks.") and before[name].ndim == 2]
    assert len(hidden) == 8
    for name in hidden:
        cuts = expected_cuts(name, model.config)
        expected = reference_step(before[name], gradients[name], cuts, lr=0.01, decay=0.1)
        # Three updates of size lr = 0.01, each known to some 1e-5 after 15 products of float32 matrices.
        actual = model.get_parameter(name)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    give_gradients(model, 0)
    model.blocks[0].mlp.up.weight.grad = None
    for optimizer in optimizers_of(model):
        optimizer.step()
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert sorted(set(before) - set(changed)) == ["blocks.0.mlp.up.weight"]


# ---- which parameters go where -----------------------------------------------------------------------------------


def groups_of(model: GPT, kind: str) -> dict[str, tuple[str, float, float]]:
    """For each parameter: its optimizer, its peak rate and its decay. Each is in one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[str, float, float]] = {}
    for optimizer in optimizers_of(model, kind):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert names[parameter] not in found, "twice"
                found[names[parameter]] = (type(optimizer).__name__, group["peak_lr"], group["weight_decay"])
    assert found.keys() == set(names.values())
    return found


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_decay_on_matrices_only_and_muon_on_those_of_the_blocks(kind: str, tied: bool) -> None:
    model = make_model(tie_weights=tied, qk_norm=True)
    for name, where in groups_of(model, kind).items():
        parameter = model.get_parameter(name)
        if parameter.ndim < 2:
            assert where == ("AdamW", 1e-3, 0.0), name
        elif kind == "muon" and name.startswith("blocks."):
            assert where == ("Muon", 0.02, 0.1), name
        else:
            assert where == ("AdamW", 1e-3, 0.1), name


def test_a_model_without_vectors_has_no_empty_group() -> None:
    model = make_model()
    for parameter in model.parameters():
        parameter.requires_grad = parameter.ndim == 2
    for kind in ("adamw", "muon"):
        assert all(group["params"] for optimizer in optimizers_of(model, kind) for group in optimizer.param_groups)


def test_adamw_takes_the_betas_and_decays_by_the_rate() -> None:
    model = make_model()
    (adamw,) = optimizers_of(model, "adamw")
    assert all(group["betas"] == (0.9, 0.95) for group in adamw.param_groups)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate([adamw], 0.5)
    adamw.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.5e-3 * 0.1) if parameter.ndim == 2 else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=2e-7, atol=0)


def test_set_learning_rate_is_a_share_of_each_peak() -> None:
    optimizers = optimizers_of(make_model())
    for factor in (0.25, 0.0, 1.0):
        set_learning_rate(optimizers, factor)
        for optimizer in optimizers:
            peak = 0.02 if isinstance(optimizer, Muon) else 1e-3
            assert [group["lr"] for group in optimizer.param_groups] == [factor * peak] * len(optimizer.param_groups)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_learns_one_batch(kind: str) -> None:
    model = make_model(norm="rmsnorm", position="rope", mlp="swiglu")
    tokens = torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = torch.arange(4)
    optimizers = make_optimizers(
        model, kind=kind, learning_rate=1e-2, muon_learning_rate=0.05, weight_decay=0.0, betas=(0.9, 0.95)
    )
    losses = []
    for _ in range(80):
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 0.1


# ---- the learning rate over a run --------------------------------------------------------------------------------


def factor_at(step: int, schedule: str, **changes: Any) -> float:
    settings: dict[str, Any] = dict(
        steps=1000, seconds=0.0, max_seconds=0.0, warmup_iters=100, decay_fraction=0.4, floor=0.1
    )
    return rate_factor(step, schedule=schedule, **{**settings, **changes})


# At the start, in the warm-up, at its end, a quarter, half, three quarters of the rest, the last step, the end, beyond.
STEPS = [0, 49, 100, 325, 550, 775, 999, 1000, 2000]
SCHEDULES = {
    "cosine": [1 / 101, 50 / 101, 1, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5), None, 0.1, 0.1],
    "linear": [1 / 101, 50 / 101, 1, 0.1 + 0.9 * 0.75, 0.55, 0.1 + 0.9 * 0.25, 0.101, 0.1, 0.1],
    "wsd": [1 / 101, 50 / 101, 1, 1, 1, 0.1 + 0.9 * 0.225 / 0.4, 0.1 + 0.9 / 1000 / 0.4, 0.1, 0.1],
    "constant": [1 / 101, 50 / 101, 1, 1, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule: str) -> None:
    for step, expected in zip(STEPS, SCHEDULES[schedule], strict=True):
        if expected is not None:
            # In the warm-up, decay has not begun.
            assert factor_at(step, schedule) == pytest.approx(expected, rel=1e-9), step
    values = [factor_at(step, schedule) for step in range(1001)]
    assert values.index(max(values)) == 100 and values[:101] == sorted(values[:101])
    assert values[100:] == sorted(values[100:], reverse=True), "it never rises again"


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.75])
@pytest.mark.parametrize("warmup_iters", [0, 7, 200])
def test_decay_fraction_is_the_share_of_the_whole_run(warmup_iters: int, fraction: float) -> None:
    """Whatever the warm-up, and whether steps, seconds or both end the run."""
    whole = dict(warmup_iters=warmup_iters, decay_fraction=fraction, floor=0.0)
    for budget in ("steps", "seconds", "both"):
        values = [
            factor_at(
                step, "wsd", steps=0 if budget == "seconds" else 1000, seconds=step / 10,
                max_seconds=0.0 if budget == "steps" else 100.0, **whole,
            )
            for step in range(1001)
        ]  # fmt: skip
        falls = [step for step in range(1000) if values[step + 1] < values[step] - 1e-9]
        begin = round(1000 * (1 - fraction))
        assert falls == list(range(begin, 1000)) and values[1000] == 0, budget
        assert values[begin] == pytest.approx(1, rel=1e-12)


def test_cosine_is_nanogpts() -> None:
    """lr, min_lr, warm-up and decay steps as its train.py names them."""
    learning_rate, min_lr, warmup_iters, lr_decay_iters = 6e-4, 6e-5, 200, 5000

    def nanogpt(it: int) -> float:
        if it < warmup_iters:
            return learning_rate * (it + 1) / (warmup_iters + 1)
        if it > lr_decay_iters:
            return min_lr
        ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
        return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)

    for step in range(0, 5100, 7):
        ours = learning_rate * factor_at(step, "cosine", steps=5000, warmup_iters=200, floor=min_lr / learning_rate)
        assert ours == pytest.approx(nanogpt(step), rel=1e-12), step


def test_no_warmup_starts_at_the_peak() -> None:
    for schedule in SCHEDULES:
        assert factor_at(0, schedule, warmup_iters=0) == 1


def test_warmup_longer_than_the_run_only_rises() -> None:
    values = [factor_at(step, "cosine", steps=50) for step in range(50)]
    assert values == sorted(values) and values[-1] == 50 / 101


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_seconds_alone_bring_the_rate_down(schedule: str) -> None:
    for share, through in ((0.0, 0.0), (0.5, 0.5), (0.9, 0.9), (1.0, 1.0), (1.5, 1.0)):
        found = factor_at(500, schedule, steps=0, seconds=60 * share, max_seconds=60.0)
        assert found == pytest.approx(decay_factor(schedule, through, 0.4, 0.1))
    assert factor_at(10**6, schedule, steps=0) == 1, "no end, no decay"


def test_the_budget_that_is_further_along_decides() -> None:
    late_steps = factor_at(775, "linear", seconds=10, max_seconds=100.0)
    late_seconds = factor_at(325, "linear", seconds=75, max_seconds=100.0)
    assert late_steps == late_seconds == pytest.approx(0.1 + 0.9 * 0.25)


def test_warmup_counts_under_a_budget_of_seconds() -> None:
    assert factor_at(0, "constant", steps=0, max_seconds=60.0) == warmup_factor(0, 100) == 1 / 101


@pytest.mark.parametrize(
    ("step", "steps", "seconds", "max_seconds", "done"),
    [
        (0, 10, 0, 0, False), (9, 10, 0, 0, False), (10, 10, 0, 0, True), (11, 10, 0, 0, True),
        (99, 0, 9.9, 10, False), (99, 0, 10, 10, True), (10, 10, 1, 10, True), (9, 10, 10.5, 10, True),
        (10**9, 0, 10**9, 0, False),
    ],
)  # fmt: skip
def test_a_run_ends_with_the_first_budget(
    step: int, steps: int, seconds: float, max_seconds: float, done: bool
) -> None:
    assert finished(step, steps, seconds, max_seconds) is done
