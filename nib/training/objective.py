"""Training objectives: `LanguageModelling`, to predict the next token; preferences (DPO) are in nib/training/dpo.py.

An objective has the run's sequences, and computes the weight and the loss of a micro-batch. The loop, the optimizer
step and checkpoints are the same for all objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nib.common.exits import InputError
from nib.data.dataset import Dataset
from nib.data.mixture import Mixture
from nib.data.sequences import Batch, micro_batches, training_sequences, validation_sequences
from nib.formats.checkpoint import Checkpoint
from nib.training.settings import TrainSettings
from nib.training.validation import Validation, mean_of, validate

if TYPE_CHECKING:
    from nib.training.dpo import Preferences
    from nib.training.run import Run


class LanguageModelling:
    """The loss is the mean over all targets that are not -1, in nats. Raises InputError if the data are too short."""

    rows = 1  # rows of a batch for each sequence
    reads_ahead = True  # batches may be loaded by another thread

    def __init__(self, settings: TrainSettings, dataset: Dataset | Mixture | None) -> None:
        """Without a dataset it can only compute steps on given batches."""
        self.block_size = settings.block_size
        if dataset is None:
            return
        self.training = training_sequences(dataset, settings.block_size, settings.seed)
        self.validation = validation_sequences(dataset, settings.block_size, settings.eval_tokens)

    def prepare(self, model: Any) -> None:
        """Change what the model computes as its loss, before it is compiled."""

    def begin(self, run: Run, checkpoint: Checkpoint | None) -> None:
        """Compute what is needed before the first step."""

    def state(self) -> dict[str, Any]:
        """What checkpoints store for the objective."""
        return {}

    def batches(self, sequences: np.ndarray, size: int, widths: int) -> list[Batch]:
        return micro_batches(self.training.rows(sequences), size, self.block_size, widths)

    def weight(self, part: Batch) -> float:
        """The weight of a micro-batch in the mean over the global batch."""
        return float((part[1] >= 0).sum())

    def loss(self, run: Run, part: Batch) -> Tensor:
        """The mean loss of a micro-batch."""
        _, loss = run.ready(run.to_device(part[0]), run.to_device(part[1]))
        return loss

    def take(self) -> Tensor:
        """Metrics of this process's micro-batches since the last call, summed."""
        return torch.zeros(0)

    def measured(self, sums: Sequence[Tensor], counted: float) -> dict[str, Tensor]:
        """The metrics of a step, from the sums of all processes."""
        return {}

    def validate(self, run: Run) -> Validation:
        """Validate on the validation split; for a mixture on each dataset's, with the mean weighted by share."""
        # Uses the uncompiled model: a pass without gradients, and its last, smaller batch, would compile again.
        return mean_of([
            (name, share, validate(
                run.model, sequences, run.dataset.tokenizer.byte_lengths(), batch=run.micro_batch_size,
                cluster=run.cluster, autocast=run.precision.autocast(),
            ))
            for name, share, sequences in self.validation
        ])  # fmt: skip


def settle_objective(settings: TrainSettings, dataset: Dataset | Mixture) -> None:
    """Set the dataset's objective if objective is auto. Raises InputError if the dataset does not fit the objective."""
    fits = "dpo" if dataset.kind == "preference" else "lm"
    if settings.objective not in ("auto", fits):
        needs = "rows of chosen and rejected: prepare_data.py --format=preference" if fits == "lm" else "texts or chats"
        raise InputError(f"objective={settings.objective} needs {needs}. {dataset.directory} holds {dataset.kind}")
    settings.objective = fits
    if fits == "dpo" and len(dataset.parts) > 1:
        raise InputError("objective=dpo takes one dataset, not several. Prepare them as one")
    if fits == "dpo" and settings.init_from == "scratch":
        raise InputError("objective=dpo needs a trained model to start from. Give --init_from")


def make_objective(settings: TrainSettings, dataset: Dataset | Mixture) -> LanguageModelling | Preferences:
    if settings.objective != "dpo":
        return LanguageModelling(settings, dataset)
    from nib.training.dpo import Preferences

    return Preferences(settings, dataset.parts[0])
