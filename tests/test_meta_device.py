"""Everything that runs on a GPU, on torch's meta device: tensors without values, which no CPU tensor may meet.

What mixes devices raises here, as it would on a GPU; so does what reads a value inside a training step, where a GPU
would be waited for.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from model_helpers import LLAMA, random_tokens, tiny
from test_engine import BYTES, PROMPTS, make_settings
from torch import Tensor
from torch.nn import functional as F

from model import GPT, RMSNorm
from nib.common.device import Precision, pick_device
from nib.data.sequences import ValidationWindows
from nib.generation.engine import stream_text
from nib.generation.request import make_samples
from nib.generation.scoring import score_texts
from nib.training.distributed import Cluster
from nib.training.objective import LanguageModelling
from nib.training.optimizer import make_optimizers
from nib.training.run import Run
from nib.training.settings import TrainSettings
from nib.training.step import optimizer_step
from nib.training.validation import validate

META = torch.device("meta")
SHAPES: list[dict[str, Any]] = [
    {},
    LLAMA | dict(n_kv_head=2, qk_norm=True),
    dict(window=5, n_kv_head=1, position="sinusoidal", norm="rmsnorm"),
    dict(dropout=0.1, mlp="relu2", position="none"),
]


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused optimizers know the meta device, but do not list it."""
    module = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["meta"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_training_step_mixes_no_devices_and_reads_no_value(
    shape: dict[str, Any], optimizer: str, on_meta: None
) -> None:
    """With micro-batches and the loss in chunks: the step that a GPU runs."""
    settings = TrainSettings(batch_size=4, micro_batch_size=2, block_size=24, optimizer=optimizer)
    dataset: Any = None
    run = Run(settings, dataset, Cluster(0, 1, META))
    run.objective, run.precision = LanguageModelling(settings, None), Precision("float32", META)
    run.queued, run.micro_batch_size = True, 2
    run.model = run.ready = GPT(tiny(**shape)).to(META)
    run.model.max_logits, run.model.vocab_multiple = 5 * 40, 64
    run.optimizers = make_optimizers(
        run.model, kind=optimizer, learning_rate=1e-3, muon_learning_rate=0.02, weight_decay=0.1, betas=(0.9, 0.95)
    )
    for run.progress.step in range(2):
        batch = [(random_tokens(2, 24, seed=part), random_tokens(2, 24)) for part in range(2)]
        loss, grad_norm = optimizer_step(run, batch)
        assert loss.is_meta and grad_norm.is_meta
    states = [value for each in run.optimizers for state in each.state.values() for value in state.values()]
    assert states and all(value.is_meta for value in states)


def read_as_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of a tensor without values is zero, or true."""
    zeros = {"tolist": lambda x: np.zeros(tuple(x.shape), int).tolist(), "__bool__": lambda _: True}
    for name, read in {**zeros, "__float__": lambda _: 0.0}.items():
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, read=read, real=real: read(x) if x.is_meta else real(x))


FILTERS = dict(top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3, top_logprobs=2)


@pytest.mark.parametrize(("shape", "cache"), [(SHAPES[1], True), (SHAPES[2], True), ({}, False)], ids=str)
def test_sampling_mixes_no_devices(shape: dict[str, Any], cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different lengths, some of which end or go past the context, and every filter."""
    model = GPT(tiny(**shape, vocab_size=257, block_size=16)).to(META)
    for options in ({}, FILTERS):
        settings = make_settings(num_samples=2, cache=cache, max_new_tokens=6, **options)
        samples = make_samples(PROMPTS, BYTES, settings)
        samples[0].max_new_tokens = 3
        with monkeypatch.context() as patch:
            read_as_zeros(patch)
            for _ in stream_text(model, samples, settings):
                pass
        assert all(sample.finish_reason for sample in samples)


def test_scoring_and_validation_mix_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(tiny(vocab_size=257)).to(META)
    model.max_logits = 0
    with monkeypatch.context() as patch:
        read_as_zeros(patch)
        score = score_texts(model, BYTES, [[1, 2, 3], list(range(60))], context=24, stride=12, batch=2)
        split: Any = ValidationWindows(Tokens(), 24, 0)  # type: ignore[arg-type]
        loss = validate(model, split, np.ones(257), batch=2, cluster=Cluster(0, 1, META), autocast=nullcontext())
    assert (score.texts, loss.tokens) == (2, 99)


class Tokens:
    """A split of a dataset."""

    tokens = 100

    def read(self, begin: int, end: int) -> Any:
        return np.arange(begin, min(end, self.tokens), dtype=np.int64)


# ---- what CUDA does otherwise --------------------------------------------------------------------------------------


def test_key_value_heads_are_shared_only_where_a_fused_kernel_shares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    real, shared = F.scaled_dot_product_attention, []

    def attention(q: Tensor, k: Tensor, *rest: Any, enable_gqa: bool) -> Tensor:
        assert enable_gqa == (k.shape[1] < q.shape[1])
        shared.append(enable_gqa)
        return real(q, k, *rest, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for changes, dtype, device in (
        ({}, torch.bfloat16, META), ({}, torch.float32, META), (dict(window=5), torch.bfloat16, META),
        (dict(window=5), torch.float32, torch.device("cpu")),
    ):  # fmt: skip
        GPT(tiny(n_layer=1, n_kv_head=2, **changes)).to(device, dtype)(random_tokens(2, 9).to(device))
    assert shared == [True, False, False, True]


def test_rms_norm_keeps_the_dtype_that_autocast_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *given: real(*given).float())
    assert RMSNorm(8)(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("capability", "masked", "cudnn"), [(9, False, True), (9, True, False), (8, False, False)])
def test_cudnn_attends_in_training_on_hopper_alone(
    capability: int, masked: bool, cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (capability, 0))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        precision = Precision("float32", pick_device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        with precision.training(masked):
            assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
