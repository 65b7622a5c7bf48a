"""Estimate what a run will cost before it is trained: train.py --dry-run. Start at `account`.

Parameters and FLOPs are counted on the model. Memory comes from a step on torch's fake tensors (shapes without data),
time from a few real steps. Nothing is written to out_dir and no lock is taken.
"""

from __future__ import annotations

import json
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nib.common.device import device_name, free_memory, is_out_of_memory, pick_device, pick_dtype
from nib.common.exits import InputError, RunError
from nib.common.options import Parsed
from nib.common.streams import write_result
from nib.common.wording import counted, duration, size
from nib.cpu.process import tune_for_training
from nib.data.dataset import Dataset
from nib.data.mixture import Mixture
from nib.data.open import open_mixture
from nib.data.paths import find_dataset
from nib.data.prepare import BUILTIN_DATASETS
from nib.data.sequences import training_sequences
from nib.training.cost import flops_by_part, num_parameters, parameters_by_part
from nib.training.distributed import Cluster, own_place
from nib.training.lora import MARK, add_adapter
from nib.training.objective import LanguageModelling, settle_objective
from nib.training.optimizer import Muon, make_optimizers
from nib.training.placement import large_enough, micro_batch_sizes, set_limits, training_precision
from nib.training.report import Reporter
from nib.training.run import Run
from nib.training.settings import TrainSettings
from nib.training.start import choose_shape
from nib.training.step import optimizer_step

GPT2_VOCABULARY = 50257
TOKENS_A_PARAMETER = 20  # compute-optimal by arXiv 2203.15556
# Peak memory on a CPU over that of the tensors, from fragmentation of glibc's heap; measured 1.00 to 1.22
# (bench/account.py).
HEAP = 1.1
TRIAL_SECONDS = 5.0  # after this no further step is timed


def print_account(parsed: Parsed[TrainSettings], GPT: type, GPTConfig: type) -> int:
    """Print the account of a run, as text or as JSON. Returns the exit status. Raises InputError."""
    found = account(parsed, GPT, GPTConfig)
    write_result(json.dumps(found) if parsed.settings.json else "\n".join(lines(found)))
    return 0


def account(parsed: Parsed[TrainSettings], GPT: Callable[[Any], Any], GPTConfig: type) -> dict[str, Any]:
    """The account as plain numbers: bytes, FLOPs, tokens, seconds. None means that a number cannot be known."""
    if own_place().world > 1:
        raise InputError("dry_run works with one process. Start it with python instead of torchrun")
    settings = parsed.settings
    config, dataset = shape_of(parsed, GPTConfig)
    if dataset:
        settle_objective(settings, dataset)
    if settings.objective == "dpo":
        raise InputError("dry_run does not support objective=dpo. Leave it out")
    settings.complete(parsed.given)
    training = training_sequences(dataset, settings.block_size, settings.seed) if dataset else None

    def make() -> Any:
        model = GPT(config)
        if settings.lora_rank:
            add_adapter(model, settings)
        return model

    cluster = Cluster(0, 1, device := pick_device(settings.device))
    tune_for_training(device)
    with torch.device("meta"):
        model = make()
    trained = MARK if settings.lora_rank else ""
    saved = sum(tensor.nbytes for name, tensor in model.state_dict().items() if trained in name)
    total, parts, flops = num_parameters(model), parameters_by_part(model), flops_by_part(model, settings.block_size)
    sizes = micro_batch_sizes(settings.batch_size, settings.micro_batch_size, 1)
    free = free_memory(device)
    for micro in large_enough(sizes, settings.block_size, config, device):
        memory = memory_of_step(make, settings, cluster, micro)
        if fits := (memory["peak"] or 0) < free:
            break
    trial = timed_steps(make, settings, cluster, micro) if fits else None
    epoch, mean_tokens = (training.size, training.mean_tokens) if training else (0, float(settings.block_size))
    steps = (settings if training else replace(settings, max_epochs=0.0)).steps(epoch, mean_tokens)
    if settings.max_seconds and trial:
        within = max(1, round(settings.max_seconds / trial["seconds_per_step"]))
        steps = min(steps or within, within)
    tokens = round(steps * settings.batch_size * mean_tokens)
    cache, full = (model.make_cache(1, length).memory.numel() for length in (1, 0))
    itemsize = pick_dtype("auto", device).itemsize
    return {
        "parameters": {**parts, "total": total, "without_embeddings": total - parts["embeddings"]},
        "flops_per_token": {**flops, "total": sum(flops.values())},
        "run": {
            "steps": steps, "tokens": tokens, "tokens_per_parameter": tokens / total,
            "epochs": steps * settings.batch_size / epoch if epoch else None,
            "flops": tokens * sum(flops.values()), "flops_6nd": 6 * total * tokens,
        },
        "micro_batch_size": micro,
        "memory": {**memory, "free": free},
        "cache": {"bytes_per_token": cache * itemsize, "tokens": config.block_size, "bytes_full": full * itemsize},
        "checkpoint_bytes": saved + sum(memory["optimizer"].values()),
        "trial": {**trial, "seconds": trial["seconds_per_step"] * steps} if trial else None,
        "device": device_name(device),
    }  # fmt: skip


def shape_of(parsed: Parsed[TrainSettings], GPTConfig: type) -> tuple[Any, Dataset | Mixture | None]:
    """The model's config, and the dataset, which is prepared if it is missing. A built-in corpus of gigabytes is not
    prepared (None): only its vocabulary is needed.
    """
    settings = parsed.settings
    large = BUILTIN_DATASETS.get(settings.dataset, {}).get("tokenizer") == "gpt2" and settings.init_from == "scratch"
    if large and not find_dataset(settings.dataset).exists():
        return GPTConfig(vocab_size=GPT2_VOCABULARY, **settings.model_options()), None
    dataset = open_mixture(settings.dataset)
    return choose_shape(parsed, dataset, None, GPTConfig)[1], dataset


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors made in the body: `now`, and their maximum, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def memory_of_step(make: Callable[[], Any], settings: TrainSettings, cluster: Cluster, micro: int) -> dict[str, Any]:
    """Bytes of tensors: the weights, gradients and each kind of optimizer state, the activations that a micro-batch
    keeps for its backward pass, and the peak of an uncompiled step.

    The memory of Python, torch and their libraries is not included. If the model's operations depend on values,
    activations and peak are None.
    """
    with FakeTensorMode(), LiveBytes() as live:
        with torch.device(cluster.device):
            model = make()
        precision = training_precision(settings, model.config.n_embd, cluster, None)
        set_limits(model, settings, precision)
        weights = live.now
        optimizers = make_optimizers(
            model, kind=settings.optimizer, learning_rate=1.0, muon_learning_rate=1.0, weight_decay=0.0,
            betas=(0.9, 0.95), fused=False, dtype=precision.dtype,
        )  # fmt: skip
        kinds: dict[str, int] = {}
        for state in (each for optimizer in optimizers for each in optimizer.state.values()):
            for kind, value in state.items():
                if value.ndim:  # without the number of the step
                    kinds[kind] = kinds.get(kind, 0) + value.nbytes
        gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        found = dict(weights=weights, gradients=gradients, optimizer=kinds, activations=None, peak=None)
        tokens = torch.zeros(2, micro, settings.block_size, dtype=torch.int64, device=cluster.device)
        try:
            for _ in range(min(2, settings.batch_size // micro)):  # the second micro-batch begins with gradients
                before = live.now
                with precision.autocast():
                    _, loss = model(tokens[0], tokens[1])
                activations = live.now - before
                loss.backward()
                del loss
            for optimizer in optimizers:
                if isinstance(optimizer, Muon):  # AdamW updates in place
                    optimizer.step()
        except (DataDependentOutputException, DynamicOutputShapeException):
            return found
        return found | dict(
            activations=activations, peak=round(live.peak * (HEAP if cluster.device.type == "cpu" else 1))
        )


def timed_steps(
    make: Callable[[], Any], settings: TrainSettings, cluster: Cluster, micro: int
) -> dict[str, float] | None:
    """Seconds of an optimizer step, from real steps on random tokens; None if they do not fit into memory.

    For a step of many micro-batches, steps of one and of two are timed: the difference is the cost of each further one.
    """
    counts = (1, 2) if settings.batch_size > micro else (1,)
    no_dataset: Any = None
    run = Run(replace(settings, batch_size=micro, micro_batch_size=micro), no_dataset, cluster)
    run.report, run.objective = Reporter(run.out_dir, active=False), LanguageModelling(settings, None)
    torch.manual_seed(settings.seed)

    def step(count: int) -> float:
        began = time.perf_counter()
        parts = [(rows[:, :-1], rows[:, 1:]) for rows in tokens[: count * micro].split(micro)]
        float(optimizer_step(run, parts)[0])  # reading the loss synchronises with a GPU
        return time.perf_counter() - began

    try:
        run.take(make())
        tokens = torch.randint(run.model.config.vocab_size, (2 * micro, settings.block_size + 1))
        step(1)  # the first one warms up
        rounds: list[list[float]] = []
        began = time.perf_counter()
        while not rounds or time.perf_counter() - began < TRIAL_SECONDS:
            rounds.append([step(count) for count in counts])
    except (RunError, RuntimeError, MemoryError) as error:
        if not isinstance(error, RunError) and not is_out_of_memory(error):
            raise
        return None
    first, last = (statistics.median(each[index] for each in rounds) for index in (0, -1))
    seconds = first + (settings.batch_size // micro - 1) * max(0.0, last - first)
    return {"seconds_per_step": seconds, "tokens_per_second": settings.batch_size * settings.block_size / seconds}


def lines(found: dict[str, Any]) -> list[str]:
    """The account as text."""
    parameters, flops, run = found["parameters"], found["flops_per_token"], found["run"]
    memory, cache, trial = found["memory"], found["cache"], found["trial"]
    text = [f"{'part':14}{'parameters':>16}{'':>7}{'FLOP a token':>18}"]
    parts = [part for part in {**parameters, **flops} if part not in ("total", "without_embeddings")]
    for part in (part for part in parts if parameters.get(part) or flops.get(part)):
        text.append(f"{part.replace('_', '-'):14}" + "".join(
            f"{each.get(part, 0):>{width},}{100 * each.get(part, 0) / each['total']:5.0f} %"
            for each, width in ((parameters, 16), (flops, 18))
        ))  # fmt: skip
    epochs = f", {run['epochs']:.2g} epochs" if run["epochs"] is not None else ""
    text += [
        f"{'total':14}{parameters['total']:>16,}{'':7}{flops['total']:>18,}",
        f"{'':14}{parameters['without_embeddings']:>16,} without embeddings",
        f"run:        {counted(run['steps'], 'step')}, {run['tokens']:,} tokens{epochs}, "
        f"{run['tokens_per_parameter']:.1f} tokens a parameter ({TOKENS_A_PARAMETER}: arXiv 2203.15556)",
        f"compute:    {run['flops']:.3g} FLOP; by the rule 6ND {run['flops_6nd']:.3g}",
    ]
    state = ", ".join(f"{kind} {size(each)}" for kind, each in memory["optimizer"].items())
    most = "activations not known: the model's operations depend on values"
    if memory["peak"] is not None:
        most = f"activations {size(memory['activations'])}; peak {size(memory['peak'])}"
    text += [
        f"memory:     weights {size(memory['weights'])}, gradients {size(memory['gradients'])}, {state},",
        f"            {most}, in micro-batches of {found['micro_batch_size']}; {size(memory['free'])} free",
        f"cache:      {size(cache['bytes_per_token'])} a token, {size(cache['bytes_full'])} for {cache['tokens']}",
        f"checkpoint: {size(found['checkpoint_bytes'])}; as much memory while it is written",
    ]
    if trial is None:
        return [*text, f"time:       not known: a step does not fit into the memory of {found['device']}"]
    return [*text, f"time:       {duration(trial['seconds'])}, without validation: {trial['seconds_per_step']:.3g} s a "
            f"step, {trial['tokens_per_second']:,.0f} tokens/s in a short trial on {found['device']}"]  # fmt: skip
