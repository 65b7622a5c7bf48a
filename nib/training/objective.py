"""What a run learns from its data: `LanguageModelling` here, the next token; preferences in nib/training/dpo.py.

An objective has the run's sequences, and says what a micro-batch of them counts and costs; the loop, the optimizer step
and checkpoints are the same for all.
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
    """The loss is the mean over all targets that count, in nats. Raises InputError for data that are too short."""

    rows = 1  # that a sequence has in a batch
    reads_ahead = True  # its batches may be loaded by another thread

    def __init__(self, settings: TrainSettings, dataset: Dataset | Mixture | None) -> None:
        """Of no dataset only steps can be made, on batches of one's own."""
        self.block_size = settings.block_size
        if dataset is None:
            return
        self.training = training_sequences(dataset, settings.block_size, settings.seed)
        self.validation = validation_sequences(dataset, settings.block_size, settings.eval_tokens)

    def prepare(self, model: Any) -> None:
        """Change what the model computes as its loss, before it is compiled."""

    def begin(self, run: Run, checkpoint: Checkpoint | None) -> None:
        """What is to be computed before the first step."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to know of it."""
        return {}

    def batches(self, sequences: np.ndarray, size: int, widths: int) -> list[Batch]:
        return micro_batches(self.training.rows(sequences), size, self.block_size, widths)

    def weight(self, part: Batch) -> float:
        """How much a micro-batch counts in the mean over the global batch."""
        return float((part[1] >= 0).sum())

    def loss(self, run: Run, part: Batch) -> Tensor:
        """The mean over a micro-batch."""
        _, loss = run.ready(run.to_device(part[0]), run.to_device(part[1]))
        return loss

    def take(self) -> Tensor:
        """What was measured of this process's micro-batches since the last call, summed."""
        return torch.zeros(0)

    def measured(self, sums: Sequence[Tensor], counted: float) -> dict[str, Tensor]:
        """The same of all processes, for the metrics of a step."""
        return {}

    def validate(self, run: Run) -> Validation:
        """Over the validation split; of a mixture over that of each dataset, and their mean by the shares."""
        # The model is not compiled here: a pass without gradients, and its last batch, would each be compiled anew.
        return mean_of([
            (name, share, validate(
                run.model, sequences, run.dataset.tokenizer.byte_lengths(), batch=run.micro_batch_size,
                cluster=run.cluster, autocast=run.precision.autocast(),
            ))
            for name, share, sequences in self.validation
        ])  # fmt: skip


def settle_objective(settings: TrainSettings, dataset: Dataset | Mixture) -> None:
    """Put what the dataset says in the place of objective=auto. Raises InputError where it does not serve another."""
    fits = "dpo" if dataset.kind == "preference" else "lm"
    if settings.objective not in ("auto", fits):
        needs = "rows of chosen and rejected: prepare_data.py --format=preference" if fits == "lm" else "texts or chats"
        raise InputError(f"objective={settings.objective} needs {needs}. {dataset.directory} holds {dataset.kind}")
    settings.objective = fits
    if fits == "dpo" and len(dataset.parts) > 1:
        raise InputError("objective=dpo takes one dataset, not several. Prepare them as one")
    if fits == "dpo" and settings.init_from == "scratch":
        raise InputError("objective=dpo prefers among the answers of a model that is there. Give --init_from")


def make_objective(settings: TrainSettings, dataset: Dataset | Mixture) -> LanguageModelling | Preferences:
    if settings.objective != "dpo":
        return LanguageModelling(settings, dataset)
    from nib.training.dpo import Preferences

    return Preferences(settings, dataset.parts[0])
