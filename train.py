"""Train a GPT: on a CPU, on one GPU, or on many by torchrun. `python train.py --help` lists the settings.

`train` is the whole run, with its loop; `optimizer_step` is what happens in one step; `build_model` is where the
weights come from.
"""

from __future__ import annotations

from nib.common.signals import exit_on_interrupt

if __name__ == "__main__":  # before the other imports, so that Ctrl-C during them leaves no traceback
    exit_on_interrupt()

import sys
from pathlib import Path

from nib.common.exits import InputError, RunError, leave, script_errors
from nib.common.options import Parsed, parse
from nib.training.settings import TrainSettings, as_dict
from nib.training.slurm import adopt_slurm


def read_settings(argv: list[str]) -> Parsed[TrainSettings]:
    """The settings from the config file and the command line, checked. Raises InputError."""
    usage = "python train.py [CONFIG.py] [--name=value ...]"
    about = "Train a GPT language model. CONFIG.py is plain Python that assigns settings; options override it."
    parsed = parse(TrainSettings, argv, usage=usage, about=about, config_file=True)
    parsed.settings.check()
    if not parsed.settings.out_dir:
        name = Path((parsed.arguments or ["run"])[0]).stem
        # Without bytes that are not UTF-8: from such a directory safetensors reads no checkpoint.
        parsed.settings.out_dir = str(Path("out") / name.encode("utf-8", "ignore").decode("utf-8"))
    return parsed


if __name__ == "__main__":  # before torch is imported, so that --help and a typing error answer at once
    with script_errors():
        adopt_slurm()
        PARSED = read_settings(sys.argv[1:])

import hashlib
import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig
from nib.common.device import Precision, device_name, peak_flops, peak_memory
from nib.common.memory import memory_errors
from nib.common.wording import counted, typed
from nib.cpu.process import tune_for_training
from nib.data.dataset import BatchesAhead, Dataset, WindowOrder, training_batch
from nib.formats.checkpoint import Checkpoint
from nib.formats.load import build, open_source, read_config, take_vocabulary
from nib.generation.engine import generate_text
from nib.generation.request import SamplingSettings
from nib.training.cost import flops_per_token, num_parameters
from nib.training.distributed import Cluster, is_sharded, lost_processes, start_cluster, whole
from nib.training.optimizer import make_optimizers, set_learning_rate
from nib.training.placement import fit_to_device, micro_batch_sizes, place
from nib.training.report import Reporter, command_line
from nib.training.run import Run, StopSignal, due, open_dataset
from nib.training.schedule import finished, rate_factor
from nib.training.state import lock_run
from nib.training.validation import Evaluation, evaluate


def train(parsed: Parsed[TrainSettings]) -> int:
    """The whole run. Returns the exit status: 0 done and saved; 129, 130 or 143 stopped by a signal.

    Raises InputError, and RunError for a run that failed or whose end is not saved.
    """
    settings, out_dir = parsed.settings, Path(parsed.settings.out_dir)
    dataset = open_dataset(settings.dataset)
    cluster = start_cluster(settings.device)
    micro_batch_sizes(settings.batch_size, settings.micro_batch_size, cluster.world)

    # model, optimizers, and the state to go on from; nothing is written before all that is known to fit
    tune_for_training(cluster.device)
    precision = Precision(settings.dtype, cluster.device)
    run = Run(settings, dataset, cluster, precision)
    checkpoint = run.checkpoint(parsed.given)
    if settings.eval_only and dataset.val.tokens < 2:
        raise InputError(f"{dataset.directory} has no validation split. Prepare it with a larger --val-fraction")
    if settings.eval_only and checkpoint is None and settings.init_from == "scratch":
        raise InputError(f"there is no checkpoint in {out_dir} to validate. Train first, or give --init_from")
    model = build_model(parsed, dataset, checkpoint)
    order = WindowOrder(dataset.train.tokens, settings.block_size, settings.seed)
    lock = lock_run(out_dir) if cluster.first and not settings.eval_only else None  # held until the process ends
    report = Reporter(out_dir, cluster.first, record=not settings.eval_only)
    stop = StopSignal(at_once=settings.eval_only)  # a validation has nothing to save
    place(model, settings, precision, cluster)
    optimizers = make_optimizers(
        model, kind=settings.optimizer, learning_rate=settings.learning_rate, betas=(settings.beta1, settings.beta2),
        muon_learning_rate=settings.muon_learning_rate, muon_momentum=settings.muon_momentum,
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    if checkpoint is not None:
        run.restore(checkpoint, model, optimizers)
    run.micro_batch_size, ready = fit_to_device(model, settings, precision, cluster, report)
    progress = run.progress
    byte_lengths = dataset.tokenizer.byte_lengths()

    def validate() -> Evaluation:
        return evaluate(  # uncompiled: a pass without gradients, and its last batch, would each be compiled anew
            model, dataset.val, byte_lengths, block_size=settings.block_size, batch=run.micro_batch_size,
            cluster=cluster, autocast=precision.autocast(), limit=settings.eval_tokens,
        )  # fmt: skip

    if settings.eval_only:
        report.say(f"step {progress.step}: {describe(validate())}")
        cluster.stop()
        stop.restore()
        return 0
    announce(report, run, model)
    report.resume_metrics(progress.step)
    if settings.wandb_log:
        shape = {"model_config": asdict(model.config), "parameters": num_parameters(model)}
        report.start_wandb(
            settings.wandb_project, settings.wandb_run_name or out_dir.name, as_dict(settings) | shape
        )  # fmt: skip

    # the loop
    steps, local = settings.steps(), settings.batch_size // cluster.world
    tokens_per_step = settings.batch_size * settings.block_size

    def load(step: int) -> tuple[Tensor, Tensor]:
        return training_batch(dataset.train, order, step * settings.batch_size + cluster.rank * local, local)

    batch_of = BatchesAhead(load, cluster.device).take if cluster.device.type == "cuda" else load
    flops = flops_per_token(model, settings.block_size)
    peak = peak_flops(cluster.device, precision.dtype) * cluster.world
    logged_step, logged_seconds, rate = progress.step, progress.seconds, 0.0
    stopped_by = 0  # agreed on: a signal that comes later in a step counts in the next one, for all processes
    report.start_bar(progress.step, steps, settings.max_seconds)
    while not finished(progress.step, steps, progress.seconds, settings.max_seconds):
        began = time.perf_counter()
        factor = rate_factor(
            progress.step, steps, progress.seconds, settings.max_seconds, schedule=settings.schedule,
            warmup_iters=settings.warmup_iters, decay_fraction=settings.decay_fraction,
            floor=settings.min_lr / settings.learning_rate,
        )  # fmt: skip
        set_learning_rate(optimizers, factor)
        inputs, targets = batch_of(progress.step)
        loss, grad_norm = optimizer_step(
            ready, optimizers, precision, cluster, inputs, targets,
            micro=run.micro_batch_size, draw=(settings.seed, progress.step), grad_clip=settings.grad_clip,
        )  # fmt: skip
        progress.tokens += tokens_per_step
        progress.seconds += time.perf_counter() - began
        progress.seconds, stopped_by = cluster.agree(progress.seconds, stop.number)
        run.count_step(loss, grad_norm, model, optimizers, report)
        done = finished(progress.step, steps, progress.seconds, settings.max_seconds)

        report.progress(progress.step, steps, progress.seconds, settings.max_seconds, loss, rate, rate * flops / peak)

        best, measured = False, {}
        if dataset.val.tokens > 1 and (done or due(progress.step, settings.eval_interval)):
            found = validate()
            best = found.loss < progress.best_val_loss
            progress.best_val_loss = min(found.loss, progress.best_val_loss)
            report.say(f"step {progress.step}: {describe(found)}")
            measured = {"val_loss": found.loss, "val_bits_per_byte": found.bits_per_byte}
        if done or measured or due(progress.step, settings.log_interval):
            rate = (progress.step - logged_step) * tokens_per_step / max(1e-9, progress.seconds - logged_seconds)
            logged_step, logged_seconds = progress.step, progress.seconds
            mfu = {"mfu": round(rate * flops / peak, 4)} if peak < math.inf else {}
            report.metrics(
                step=progress.step, tokens=progress.tokens, loss=loss, lr=factor * settings.learning_rate,
                grad_norm=grad_norm, tokens_per_second=round(rate, 1), seconds=round(progress.seconds, 3),
                memory_bytes=peak_memory(cluster.device), **mfu, **measured,
            )  # fmt: skip
        if due(progress.step, settings.sample_interval):
            report.sample(progress.step, sample_text(model, dataset, settings.seed))
        if best or run.checkpoint_due():
            run.save(model, optimizers, report, best)
        if stopped_by:
            break

    if run.saved_step != progress.step:
        run.save(model, optimizers, report)
    run.saver.finish()
    report.close()
    farewell(report, run, stopped_by)
    cluster.stop()
    stop.restore()
    if lock:
        lock.close()
    if stopped_by:
        return 128 + stopped_by
    if run.saved_step == progress.step:
        return 0
    if not cluster.first:
        return 1
    raise RunError(f"the run's end, step {progress.step}, is not saved. {run.way_back()}")


def optimizer_step(
    ready: nn.Module, optimizers: list[torch.optim.Optimizer], precision: Precision, cluster: Cluster,
    inputs: Tensor, targets: Tensor, *, micro: int, draw: tuple[int, int], grad_clip: float,
) -> tuple[float, float]:  # fmt: skip
    """One update from this process's share (sequences, T) of the global batch, `micro` sequences at a time.

    Returns the loss, in nats, the mean over all counted targets of the global batch, and the norm of its gradient
    before clipping to `grad_clip` (0: no clipping); where one of them is not finite, no optimizer updates anything,
    and float16's loss scale falls. `draw` is (seed, step): with the process and the micro-batch it decides every
    random number, so that a resumed run draws what an unbroken one would have.
    """
    device, scaler = cluster.device, precision.scaler
    (counted,) = cluster.total([float((targets >= 0).sum())])
    total = torch.zeros((), device=device)
    parts = list(zip(inputs.split(micro), targets.split(micro), strict=True))
    for index, (part, target) in enumerate(parts):
        torch.manual_seed(seed_for(*draw, cluster.rank, index))
        # Gradients are exchanged in the last backward pass of a step only, and divided by the processes.
        with exchanging(ready, index == len(parts) - 1):
            with precision.autocast():
                _, loss = ready(to_device(part, device), to_device(target, device))
            share = loss * (float((target >= 0).sum()) / counted)
            scaler.scale(share * cluster.world).backward()
        total += share.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = float(whole(nn.utils.clip_grad_norm_(ready.parameters(), grad_clip or math.inf)))
    loss_sum, unfit = cluster.total([float(total), float(not math.isfinite(grad_norm))])
    grad_norm += math.inf if unfit else 0.0  # all processes decide alike
    for optimizer in optimizers:
        if math.isfinite(loss_sum + grad_norm):  # scaler.step would decide for each optimizer by its own gradients
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return loss_sum, grad_norm


def exchanging(ready: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Whether the processes exchange gradients in the backward pass of the body: in the last one of a step."""
    if is_sharded(ready):
        ready.set_requires_gradient_sync(last)  # type: ignore[operator]
    elif isinstance(ready, DistributedDataParallel) and not last:
        return ready.no_sync()
    return nullcontext()


def seed_for(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def build_model(parsed: Parsed[TrainSettings], dataset: Dataset, checkpoint: Checkpoint | None) -> GPT:
    """A model of the shape that the settings say, drawn from the seed, or with weights of `checkpoint` or init_from.

    Raises InputError for a shape that cannot be, or that is not the one init_from has.
    """
    settings = parsed.settings
    torch.manual_seed(settings.seed)
    if settings.init_from == "scratch":
        # Before a model with a table of that many positions is built.
        WindowOrder(dataset.train.tokens, settings.block_size, settings.seed)
        config = GPTConfig(vocab_size=dataset.vocab_size, **settings.model_options())
        return build(checkpoint, lambda: GPT(config)) if checkpoint else GPT(config)
    source = checkpoint or open_source(settings.init_from)
    options = settings.model_options()
    added = {name: options[name] for name in parsed.given & {*options} - {*source.model_config}}  # to model.py since
    config = read_config(source, GPTConfig, **{"dropout": settings.dropout, **added})
    take_vocabulary(source, dataset, settings.init_from)
    if "init" in parsed.given and checkpoint is None:
        raise InputError(f"init is {options['init']!r}, but the weights come from {settings.init_from}. Leave init out")
    for name, wanted in options.items():
        has = getattr(config, name)
        automatic = wanted == getattr(TrainSettings, name) != getattr(GPTConfig(), name)  # as mlp_hidden=0
        if name in parsed.given - {"block_size", "init"} and wanted != has and not automatic:
            raise InputError(f"{name} is {wanted!r} but {settings.init_from} has {has!r}. Leave {name} out")
    if "block_size" not in parsed.given and checkpoint is None:
        settings.block_size = config.block_size
    elif settings.block_size > config.block_size:
        raise InputError(
            f"block_size {settings.block_size} is above the {config.block_size} of {settings.init_from}. Lower it"
        )
    return build(source, lambda: GPT(config))


def announce(report: Reporter, run: Run, model: GPT) -> None:
    """Say what is about to be trained on what, and write config.json."""
    settings, cluster, dataset = run.settings, run.cluster, run.dataset
    config = {"settings": as_dict(settings), "model_config": asdict(model.config), "command": command_line()}
    report.write("config.json", json.dumps(config, indent=1))
    processes = f"{cluster.world} processes, " if cluster.world > 1 else ""
    micro, steps = run.micro_batch_size, settings.steps()
    tokens = steps * settings.batch_size * settings.block_size
    budget = counted(f"{settings.max_seconds:g}", "second")
    if steps:
        budget = f"{counted(steps, 'step')}, {tokens / 1e6:.1f}M tokens"
    report.say(
        f"model:  {num_parameters(model) / 1e6:.2f}M parameters, {flops_per_token(model) / 1e6:.1f} MFLOP a token"
    )
    report.say(
        f"data:   {dataset.directory}, {dataset.train.tokens / 1e6:.2f}M training and "
        f"{dataset.val.tokens / 1e6:.2f}M validation tokens ({dataset.meta['tokenizer']}, "
        f"{counted(dataset.vocab_size, 'id')})"
    )
    report.say(
        f"run:    {budget}, {settings.batch_size} x {settings.block_size} tokens a step "
        f"(micro-batches of {micro}), {processes}{device_name(cluster.device)}, "
        f"{str(run.precision.dtype).removeprefix('torch.')}"
    )
    if run.progress.step:
        report.say(f"resume: step {run.progress.step} of {run.out_dir}")


def describe(found: Evaluation) -> str:
    return (
        f"validation loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:.2f}"
    )


def sample_text(model: GPT, dataset: Dataset, seed: int) -> str:
    """A short text from the model as it is, drawn without touching the random numbers of training."""
    settings = SamplingSettings(max_new_tokens=120, seed=seed)
    (sample,) = generate_text(model, dataset.tokenizer, [""], settings)
    return sample.text


def farewell(report: Reporter, run: Run, signal_number: int) -> None:
    """Say where the run is and what to type next."""
    if signal_number:
        saved = "which is saved" if run.saved_step == run.progress.step else "which is not saved"
        report.say(f"stopped at step {run.progress.step}, {saved}. Go on with: {command_line()}")
    elif run.saved_step == run.progress.step:
        report.say(
            f"done: step {run.progress.step}, {run.progress.seconds:.0f} s of training; the run is in {run.out_dir}"
        )
        report.say(f"sample from it: python sample.py {typed(run.out_dir)}")


if __name__ == "__main__":
    with script_errors(), lost_processes(), memory_errors("Use a smaller model, block_size or micro_batch_size"):
        leave(train(PARSED))
