"""A training run: what it is made of, and what its loop does besides the optimizer step and saving."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from nib.common.device import Copied, Precision, device_name, peak_flops, peak_memory
from nib.common.exits import RunError
from nib.common.signals import StopSignal
from nib.common.wording import amount, counted, typed
from nib.cpu.bfloat16 import has_bfloat16
from nib.data.dataset import Dataset
from nib.data.mixture import Mixture
from nib.data.sequences import BatchesAhead, describe
from nib.formats.checkpoint import Checkpoint
from nib.generation.engine import generate_text
from nib.generation.request import SamplingSettings
from nib.training.cost import flops_per_token, num_parameters
from nib.training.distributed import Cluster
from nib.training.optimizer import make_optimizers, set_learning_rate
from nib.training.placement import COMPILED_WIDTHS, fit_to_device, is_compiled, place, training_precision
from nib.training.report import Reporter, command_line, way_back
from nib.training.saving import Saver, finish_saving, lock_run, save, unchanged
from nib.training.schedule import finished, rate_factor
from nib.training.settings import TrainSettings
from nib.training.state import Progress, restore
from nib.training.validation import Validation

if TYPE_CHECKING:
    from nib.training.dpo import Preferences, PreferenceValidation
    from nib.training.objective import LanguageModelling


class Run:
    """One run while it is trained. `start` in nib/training/start.py makes it; train.py's loop calls its methods."""

    adapter: dict[str, Any] | None = None  # with lora_rank: the description of adapter and base for checkpoints
    lock: IO[str] | None = None
    stop: StopSignal | None = None
    objective: LanguageModelling | Preferences
    model: Any  # model.GPT
    precision: Precision
    ready: nn.Module  # the model wrapped in DDP and compiled, if asked
    optimizers: list[torch.optim.Optimizer]
    micro_batch_size: int

    def __init__(self, settings: TrainSettings, dataset: Dataset | Mixture, cluster: Cluster) -> None:
        self.settings, self.dataset, self.cluster = settings, dataset, cluster
        self.out_dir = Path(settings.out_dir)
        self.report = Reporter(self.out_dir, cluster.first, record=not settings.eval_only)
        self.progress = Progress()
        self.stopped_by = 0  # the signal on which all processes agreed; one that arrives later counts in the next step
        self.measured: dict[str, Tensor] = {}  # metrics of the last step besides loss and gradient norm
        self.rate_factor = 1.0  # of the peak learning rates
        self.queued = cluster.device.type == "cuda"  # steps are queued: the device may be one step behind the loop
        self.unread: deque[tuple[int, Copied]] = deque()  # loss and gradient norm of steps that were not read yet
        self.loss = self.grad_norm = math.nan  # of the last step that was read
        self.saved_step, self.saved_at, self.best = -1, time.monotonic(), False

    # ---- the beginning and the end

    def open(self) -> None:
        """Lock the directory and install signal handlers. Raises InputError."""
        self.training = self.objective.training
        self.steps = self.settings.steps(self.training.size, self.training.mean_tokens)
        if self.cluster.first and not self.settings.eval_only:
            self.lock = lock_run(self.out_dir)
        self.stop = StopSignal(at_once=self.settings.eval_only)  # a validation has nothing to save
        self.saver = Saver(self.out_dir, self.settings.keep_checkpoints, self.dataset.tokenizer)
        self.batch_of = self.load_batch
        if self.cluster.device.type == "cuda" and self.objective.reads_ahead:
            self.batch_of = BatchesAhead(self.load_batch, self.cluster.device).take

    def close(self) -> None:
        """Undo `open`."""
        if self.stop and self.cluster.world == 1:  # torchrun's SIGTERM must not cut the traceback of one of several
            self.stop.restore()
        if self.lock:
            self.saver.wait()  # a checkpoint may still be written to the directory
            self.lock.close()

    def take(self, model: nn.Module, checkpoint: Checkpoint | None = None) -> None:
        """Move the model to its device, make its optimizers, and restore the checkpoint.

        Raises InputError, and RunError if the model does not fit into memory.
        """
        settings, cluster = self.settings, self.cluster
        shape: Any = model.config
        self.precision = training_precision(settings, shape.n_embd, cluster, checkpoint)
        if cluster.device.type == "cpu" and self.precision.dtype == torch.bfloat16 and not has_bfloat16():
            slow = "training in bfloat16 is slow on this CPU, which has no instructions for it"
            self.report.say(
                f"warning: {slow}. A new run with --dtype=float32 --init_from={self.out_dir} goes on faster"
            )
        self.model = place(model, settings, self.precision, cluster)
        self.objective.prepare(model)
        self.optimizers = [] if settings.eval_only else make_optimizers(
            model, kind=settings.optimizer, learning_rate=settings.learning_rate,
            betas=(settings.beta1, settings.beta2), muon_learning_rate=settings.muon_learning_rate,
            muon_momentum=settings.muon_momentum, weight_decay=settings.weight_decay, dtype=self.precision.dtype,
        )  # fmt: skip
        if checkpoint is not None:
            restore(self, checkpoint)
        self.micro_batch_size, self.ready = fit_to_device(
            model, settings, self.precision, cluster, self.report, self.objective.rows
        )
        self.objective.begin(self, checkpoint)
        self.flops = flops_per_token(model, settings.block_size)
        self.peak = peak_flops(cluster.device, self.precision.dtype) * cluster.world
        self.logged_tokens, self.logged_seconds = self.progress.tokens, self.progress.seconds
        self.tokens_per_second = 0.0

    def announce(self) -> None:
        """Print what will be trained on what, and write config.json."""
        settings, cluster, dataset, model = self.settings, self.cluster, self.dataset, self.model
        made = {"settings": asdict(settings), "model_config": asdict(model.config)}
        parameters = num_parameters(model)
        self.report.write("config.json", json.dumps(made | {"command": command_line()}, indent=1))
        budget = counted(f"{settings.max_seconds:g}", "second")
        if self.steps:
            tokens = self.steps * settings.batch_size * self.training.mean_tokens
            passes = counted(f"{self.epoch(self.steps):.3g}", "epoch")
            budget = f"{counted(self.steps, 'step')}, {passes}, {amount(tokens)} tokens"
        up_to = "up to " if any(part.chat for part in dataset.parts) else ""
        processes = f"{cluster.world} processes, " if cluster.world > 1 else ""
        trained = f"{num_parameters(model, trained=True) / 1e6:.2f}M of them trained, " if self.adapter else ""
        self.report.say(f"model:  {parameters / 1e6:.2f}M parameters, {trained}{self.flops / 1e6:.1f} MFLOP a token")
        for line in describe(dataset, settings.block_size):
            self.report.say(line)
        self.report.say(
            f"run:    {budget}, {settings.batch_size} x {up_to}{settings.block_size} tokens a step "
            f"(micro-batches of {self.micro_batch_size}), {processes}{device_name(cluster.device)}, "
            f"{str(self.precision.dtype).removeprefix('torch.')}"
        )
        if self.progress.step:
            self.report.say(f"resume: step {self.progress.step} of {self.out_dir}")
        self.report.resume_metrics(self.progress.step)
        if settings.wandb_log:
            name = settings.wandb_run_name or self.out_dir.resolve().name
            config = made["settings"] | {"model_config": made["model_config"], "parameters": parameters}
            self.report.start_wandb(settings.wandb_project, name, config)
        self.report.start_bar(self.progress.step, self.steps, settings.max_seconds)

    def validate_only(self) -> int:
        """Validate only. Returns the exit status."""
        self.report.say(f"step {self.progress.step}: {self.validate()}")
        self.cluster.stop()
        return 0

    def end(self) -> int:
        """Save the end of the run, and print the next command. Returns the exit status.

        Raises RunError if the end of the run could not be saved.
        """
        progress, report = self.progress, self.report
        if self.saved_step != progress.step:
            save(self)
        self.saver.finish()
        report.close()
        saved = self.saved_step == progress.step
        if self.stopped_by:
            which = "which is saved" if saved else "which is not saved"
            report.say(f"stopped at step {progress.step}, {which}. Resume with: {command_line()}")
        elif saved:
            report.say(
                f"done: step {progress.step}, {progress.seconds:.0f} s of training; the run is in {self.out_dir}"
            )
            is_chat = any(part.chat for part in self.dataset.parts) and bool(self.dataset.tokenizer.chat_template)
            report.say(f"sample from it: python sample.py {typed(self.out_dir)}{' --chat' * is_chat}")
        self.cluster.stop()
        if self.stopped_by:
            return 128 + self.stopped_by
        if self.cluster.first and not saved:
            raise RunError(
                f"the run's end, step {progress.step}, is not saved. {way_back(self.settings, self.progress)}"
            )
        return 0 if saved else 1

    # ---- the loop's verbs, in their order

    def finished(self) -> bool:
        return finished(self.progress.step, self.steps, self.progress.seconds, self.settings.max_seconds)

    def due(self, interval: int) -> bool:
        """Whether something comes after this step that does so every `interval` steps, or never with 0."""
        return bool(interval) and self.progress.step % interval == 0

    def begin_step(self) -> None:
        self.began, self.best = time.perf_counter(), False

    def set_learning_rate(self) -> None:
        settings, progress = self.settings, self.progress
        self.rate_factor = rate_factor(
            progress.step, self.steps, progress.seconds, settings.max_seconds, schedule=settings.schedule,
            warmup_iters=settings.warmup_iters, decay_fraction=settings.decay_fraction,
            floor=settings.min_lr / settings.learning_rate,
        )  # fmt: skip
        set_learning_rate(self.optimizers, self.rate_factor)

    def next_batch(self) -> list[Any]:
        """This process's share of the global batch, in micro-batches: inputs and targets, each (sequences, T)."""
        return self.batch_of(self.progress.step)

    def load_batch(self, step: int) -> list[Any]:
        own = np.array_split(self.sequences(step), self.cluster.world)[self.cluster.rank]
        widths = COMPILED_WIDTHS if is_compiled(self.settings, self.cluster.device) else 0
        return self.objective.batches(own, self.micro_batch_size, widths)

    def to_device(self, tensor: Tensor) -> Tensor:
        device = self.cluster.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    def sequences(self, step: int) -> np.ndarray:
        """The numbers of the sequences in the global batch of a step."""
        return np.arange(step * self.settings.batch_size, (step + 1) * self.settings.batch_size)

    def epoch(self, step: int) -> float:
        """The number of passes over the training data before `step`."""
        return step * self.settings.batch_size / self.training.size

    def count_step(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Count a step. How it came out is read a step later on a device that works ahead, unless it is asked for now.

        Raises RunError after max_skipped_steps in a row, with all that was learned before them saved.
        """
        progress, settings = self.progress, self.settings
        progress.tokens += self.training.tokens(self.sequences(progress.step))
        progress.step += 1
        self.unread.append((progress.step, Copied(torch.stack((loss, grad_norm)))))
        intervals = (settings.log_interval, settings.sample_interval, settings.checkpoint_interval)
        asked = self.finished() or self.validation_due() or any(self.due(each) for each in intervals)
        ahead = int(self.queued and not asked)
        if len(self.unread) > ahead:
            self.unread[-1 - ahead][1].read()  # waits for the device, so that its time is counted
        progress.seconds += time.perf_counter() - self.began
        sent = self.stop.number if self.stop else 0
        progress.seconds, self.stopped_by = self.cluster.agree(progress.seconds, sent)
        if self.read_steps(ahead) and 0 < settings.max_skipped_steps <= progress.skipped_in_a_row:
            self.give_up(progress.step - len(self.unread))

    def read_steps(self, ahead: int = 0) -> bool:
        """See which steps, but the newest `ahead`, were done, and which skipped since their numbers were not finite.

        Returns whether there were any to see.
        """
        found = len(self.unread) > ahead
        while len(self.unread) > ahead:
            step, copied = self.unread.popleft()
            self.loss, self.grad_norm = copied.read()
            if math.isfinite(self.loss + self.grad_norm):
                self.progress.skipped_in_a_row = 0
                continue
            self.progress.skipped_in_a_row += 1
            numbers = f"loss {self.loss:g}, gradient norm {self.grad_norm:g}"
            self.report.say(f"warning: step {step} is skipped: {numbers}")
        return found

    def give_up(self, step: int) -> NoReturn:
        """Save what was learned before the steps that were skipped, up to `step`, and raise RunError."""
        self.saver.keep = 0  # keep all older checkpoints: the user may want to go back to one
        if not unchanged(self):
            save(self)
        finish_saving(self)
        self.cluster.stop()  # torchrun ends all processes when one ends, so the others wait for the first to write
        in_a_row = counted(self.settings.max_skipped_steps, "step")
        raise RunError(
            f"loss or gradient was not finite in {in_a_row} in a row, the last of them step {step}. "
            f"{way_back(self.settings, self.progress)}"
        )

    def validation_due(self) -> bool:
        due_now = self.finished() or self.due(self.settings.eval_interval)
        return due_now and bool(self.objective.validation)

    def validate(self) -> Validation | PreferenceValidation:
        return self.objective.validate(self)

    def log(self, validation: Validation | PreferenceValidation | None) -> None:
        """Update the progress bar, and write a line of metrics if one is due."""
        progress, settings = self.progress, self.settings
        rate, loss = self.tokens_per_second, self.loss
        self.report.progress(progress, self.epoch(progress.step), loss, rate, rate * self.flops / self.peak)
        if validation:
            self.report.say(f"step {progress.step}: {validation}")
        if not (validation or self.finished() or self.due(settings.log_interval)):
            return
        seconds = max(1e-9, progress.seconds - self.logged_seconds)
        rate = self.tokens_per_second = (progress.tokens - self.logged_tokens) / seconds
        self.logged_tokens, self.logged_seconds = progress.tokens, progress.seconds
        known = {"mfu": round(rate * self.flops / self.peak, 4)} if self.peak < math.inf else {}
        if validation:
            known |= validation.metrics()
        measured = {name: float(value) for name, value in self.measured.items()}
        self.report.metrics(
            step=progress.step, epoch=round(self.epoch(progress.step), 4), tokens=progress.tokens, loss=loss,
            lr=self.rate_factor * settings.learning_rate, grad_norm=self.grad_norm, tokens_per_second=round(rate, 1),
            seconds=round(progress.seconds, 3), memory_bytes=peak_memory(self.cluster.device), **measured, **known,
        )  # fmt: skip

    def sample_due(self) -> bool:
        return self.due(self.settings.sample_interval)

    def sample(self) -> None:
        """Print a short sample of the current model, without changing training's random numbers."""
        settings = SamplingSettings(max_new_tokens=120, seed=self.settings.seed)
        (sample,) = generate_text(self.model, self.dataset.tokenizer, [""], settings)
        self.report.sample(self.progress.step, sample.text)
