"""Direct preference optimization (DPO, arXiv 2305.18290): make the chosen answer more likely than the rejected one.

Both are measured relative to the reference, the model at the start of the run. Its log-probabilities are computed
once, before the first step, and stored in the run's directory, so that no second model is in memory.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from nib.common.exits import InputError, RunError
from nib.common.files import plain_file, write_whole
from nib.data.dataset import Dataset
from nib.data.sequences import PairBatch, Pairs
from nib.formats.checkpoint import Checkpoint
from nib.training.settings import TrainSettings

if TYPE_CHECKING:
    from nib.training.run import Run

REFERENCE_FILE = "reference.safetensors"  # for train and val: (pairs, 2) float64, chosen and rejected
MEASURED = ("chosen", "rejected", "margin", "accuracy")  # metrics of the rewards
PORTION = 1024  # pairs that are read at a time


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The loss of each pair, (n,), and the rewards, (2, n), from log-probabilities (2, n) of chosen and rejected."""
    rewards = beta * (policy - reference)
    return -F.logsigmoid(rewards[0] - rewards[1]), rewards


def log_likelihoods(model: Any, x: Tensor, targets: Tensor) -> Tensor:
    """The sum of the log-probabilities of each row's targets that are not -1: (B, T, C), (B, T) to (B,).

    It replaces the model's loss. The logits are recomputed in the backward pass, so only one row's are in memory.
    """

    def of_row(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(x, weight).float(), target, ignore_index=-1, reduction="sum")

    weight = (model.head or model.wte).weight
    rows = [recomputed(of_row, *row, use_reentrant=False) for row in zip(x, [weight] * len(x), targets, strict=True)]
    return torch.stack(rows)


@dataclass
class PreferenceValidation:
    """Means over the pairs of the validation split."""

    loss: float
    rewards: dict[str, float]

    def __str__(self) -> str:
        return f"validation loss {self.loss:.4f}, " + ", ".join(f"{key} {it:.4f}" for key, it in self.rewards.items())

    def metrics(self) -> dict[str, float]:
        return {"val_loss": self.loss} | {f"val_{key}": value for key, value in self.rewards.items()}


class Preferences:
    """The DPO objective; a sequence is a pair. Raises InputError for a pair that is longer than the context."""

    rows = 2
    reads_ahead = False

    def __init__(self, settings: TrainSettings, dataset: Dataset) -> None:
        self.beta, self.block_size = settings.dpo_beta, settings.block_size
        name = str(dataset.directory)
        if not dataset.train.tokens:
            raise InputError(f"{name} has no pair to train on. Prepare more of them")
        self.training = Pairs(dataset.train, settings.block_size, settings.seed, name)
        self.held_out = Pairs(dataset.val, settings.block_size, settings.seed, name)
        self.validation = [name] if self.held_out.size else []
        self.corpus = dataset.fingerprint()
        self.sums = torch.zeros(len(MEASURED))
        self.reference: dict[str, np.ndarray] = {}
        self.checksum = ""

    def prepare(self, model: Any) -> None:
        model.loss = functools.partial(log_likelihoods, model)

    def begin(self, run: Run, checkpoint: Checkpoint | None) -> None:
        """Compute the reference's log-probabilities, or read them if the run is resumed. Raises InputError."""
        path = run.out_dir / REFERENCE_FILE
        if checkpoint is not None:
            run.report.say(f"reference: {path}")
            found = self.read(path, checkpoint.state.get("reference")) if run.cluster.first else None
            self.reference = run.cluster.from_first(found)
            self.checksum = checkpoint.state["reference"]
            return
        run.report.say(f"reference: log-probabilities of {self.training.size} and {self.held_out.size} pairs")
        for name, pairs in (("train", self.training), ("val", self.held_out)):
            self.reference[name] = self.log_probabilities(run, pairs)
        data = save(self.reference)
        self.checksum = hashlib.sha256(data).hexdigest()
        if run.cluster.first and not run.settings.eval_only:
            try:
                write_whole(path, data)
            except OSError as error:
                raise RunError(f"cannot write {path}: {error.strerror}. Make room, and run again") from None

    def read(self, path: Path, checksum: Any) -> dict[str, np.ndarray]:
        try:
            data = plain_file(path).read_bytes()
            if hashlib.sha256(data).hexdigest() == checksum:
                return load_file(path)
            reason = "it is not the file of this run"
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {path}: {reason}. Put it back, or start again with another --out_dir")

    def state(self) -> dict[str, Any]:
        return {"reference": self.checksum}

    def batches(self, sequences: np.ndarray, size: int, widths: int) -> list[PairBatch]:
        return self.training.batches(self.training.index(sequences), size, self.block_size, widths)

    def weight(self, part: PairBatch) -> float:
        return float(len(part.numbers))

    def loss(self, run: Run, part: PairBatch) -> Tensor:
        """The mean over the pairs of a micro-batch."""
        reference = torch.from_numpy(self.reference["train"][part.numbers].T.astype(np.float32))
        _, policy = run.ready(run.to_device(part.inputs), run.to_device(part.targets))
        losses, rewards = dpo_loss(policy.view(2, -1), run.to_device(reference), self.beta)
        self.sums = self.sums.to(rewards.device) + summed(rewards)
        return losses.mean()

    def take(self) -> Tensor:
        sums, self.sums = self.sums, torch.zeros(len(MEASURED))
        return sums

    def measured(self, sums: Iterable[Tensor], counted: float) -> dict[str, Tensor]:
        return {name: value / counted for name, value in zip(MEASURED, sums, strict=True)}

    def validate(self, run: Run) -> PreferenceValidation:
        policy = torch.from_numpy(self.log_probabilities(run, self.held_out).T)
        losses, rewards = dpo_loss(policy, torch.from_numpy(self.reference["val"].T), self.beta)
        found = self.measured(summed(rewards), self.held_out.size)
        return PreferenceValidation(float(losses.mean()), {name: float(value) for name, value in found.items()})

    @torch.no_grad()
    def log_probabilities(self, run: Run, pairs: Pairs) -> np.ndarray:
        """The log-probabilities of all pairs under the current model: (pairs, 2) float64, computed by all processes."""
        model, cluster = run.model, run.cluster
        was_training = model.training
        model.eval()
        found = np.zeros((pairs.size, 2))
        for first in range(0, pairs.size, PORTION):
            numbers = np.arange(first, min(first + PORTION, pairs.size))
            batches = pairs.batches(numbers, run.micro_batch_size, self.block_size)
            for turn in range(math.ceil(len(batches) / cluster.world)):  # the same number of passes on every process
                own = turn * cluster.world + cluster.rank
                part = batches[own] if own < len(batches) else pairs.empty()
                with run.precision.autocast():
                    _, sums = model(run.to_device(part.inputs), run.to_device(part.targets))
                if len(part.numbers):
                    found[part.numbers] = sums.view(2, -1).T.double().cpu().numpy()
        model.train(was_training)
        return np.array(cluster.total(found.ravel().tolist())).reshape(found.shape)


def summed(rewards: Tensor) -> Tensor:
    """The metrics in MEASURED, summed over the pairs of rewards (2, n)."""
    rewards = rewards.detach()
    margin = rewards[0] - rewards[1]
    return torch.stack((*rewards.sum(dim=1), margin.sum(), (margin > 0).sum().to(margin.dtype)))
