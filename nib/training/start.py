"""How a run begins: its dataset, its processes, the checkpoint from which it resumes, and its model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nib.common.exits import InputError
from nib.common.options import Parsed
from nib.cpu.process import tune_for_training
from nib.data.dataset import Dataset
from nib.data.mixture import Mixture
from nib.data.open import open_mixture
from nib.formats.checkpoint import BrokenCheckpoint, Checkpoint, newest_good
from nib.formats.load import Source, base_name, build, open_source, read_config, take_vocabulary
from nib.training.distributed import own_place, start_cluster
from nib.training.lora import adapt
from nib.training.objective import make_objective, settle_objective
from nib.training.placement import micro_batch_sizes
from nib.training.run import Run
from nib.training.settings import TrainSettings, same_run

SCALING = {f"rope_{part}" for part in ("scaling", "factor", "original", "slow", "fast", "attention")}


@contextmanager
def start(parsed: Parsed[TrainSettings], GPT: type, GPTConfig: type) -> Iterator[Run]:
    """A run that is ready for its next step, or with eval_only for validation; it is closed after the body.

    `GPT` and `GPTConfig` are model.py's. Nothing is written before all inputs are known to fit together. Raises
    InputError and RunError.
    """
    settings = parsed.settings
    # Before the processes connect, since preparing a corpus may take longer than they wait for each other.
    dataset = open_mixture(settings.dataset, first=own_place().rank == 0)
    settle_objective(settings, dataset)
    settings.complete(parsed.given)
    settings.check()  # again, with the defaults that `complete` filled in
    cluster = start_cluster(settings.device)
    micro_batch_sizes(settings.batch_size, settings.micro_batch_size, cluster.world)
    tune_for_training(cluster.device)
    run = Run(settings, dataset, cluster)
    checkpoint = find_checkpoint(run, parsed.given)
    source, config = choose_shape(parsed, dataset, checkpoint, GPTConfig)
    run.objective = make_objective(settings, dataset)  # refuses a too large block_size before a model is built
    if settings.eval_only and not run.objective.validation:
        raise InputError(f"{dataset.directory} has no validation split. Prepare it with a larger --val-fraction")
    if settings.eval_only and source is None:
        raise InputError(f"there is no checkpoint in {run.out_dir} to validate. Train first, or give --init_from")
    model = build_model(settings, source, config, GPT)
    if settings.lora_rank:
        run.adapter = adapt(model, source, settings, checkpoint)
    del source  # closes the files that it has mapped
    try:
        run.open()
        run.take(model, checkpoint)
        yield run
    finally:
        run.close()


def find_checkpoint(run: Run, given: set[str]) -> Checkpoint | None:
    """The newest undamaged checkpoint, the same on all processes, or None for a new run.

    Raises InputError, also if the settings (the user gave those named in `given`) do not fit the checkpoint's run.
    """
    settings = run.settings
    resume = not settings.eval_only  # eval_only needs no optimizer state
    found = newest_good(run.out_dir / "checkpoints", optimizer=resume) if run.cluster.first else None
    path = run.cluster.from_first(found.directory if found else None)
    if path is None:
        if settings.resume == "must":
            raise InputError(f"there is no checkpoint in {run.out_dir} to resume. Use --resume=auto to start a run")
        return None
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # by torchrun: the checkpoint is this run's
    if settings.resume == "never" and not restarted:
        raise InputError(f"{run.out_dir} already holds a run. Give another --out_dir, or remove it to start again")
    checkpoint = found or Checkpoint(path, optimizer=resume)
    try:
        saved, corpus = dict(checkpoint.state["settings"]), checkpoint.state["corpus"]
    except (KeyError, TypeError, ValueError):
        raise BrokenCheckpoint(f"{path} lacks the settings of its run. Use another checkpoint") from None
    if settings.init_from != "scratch" and "block_size" not in given:  # it came from init_from
        settings.block_size = saved.get("block_size", settings.block_size)
    same_run(settings, saved, str(run.out_dir))
    if corpus != run.dataset.fingerprint():
        what = f"{run.dataset.directory} is not the corpus that the run in {run.out_dir} began with"
        raise InputError(f"{what}. Give another --out_dir to train on it")
    return checkpoint


def build_model(settings: TrainSettings, source: Source | None, config: Any, GPT: type) -> Any:
    """A model with the weights of `source`, or without one initialised from the seed. Raises InputError."""
    torch.manual_seed(settings.seed)
    if source is None:
        return GPT(config)
    known = source.model_config["vocab_size"]
    if known != config.vocab_size and settings.lora_rank:
        what = f"the data has ids for which {settings.init_from} has no embeddings, and an adapter trains none"
        raise InputError(f"{what}. Train without lora_rank first, or prepare the data with another template")
    model = build(source, lambda: GPT(dataclasses.replace(config, vocab_size=known)))
    return model if known == config.vocab_size else with_more_ids(model, GPT(config))


def with_more_ids(model: Any, grown: Any) -> Any:
    """`grown`, whose vocabulary is larger, with the weights of `model`; new embeddings start as the mean of the old."""
    weights = model.state_dict()
    for name, weight in grown.state_dict().items():
        if weight.shape != weights[name].shape:
            mean = weights[name].mean(0, keepdim=True)
            weights[name] = torch.cat([weights[name], mean.expand(len(weight) - len(weights[name]), -1)])
    grown.load_state_dict(weights)
    return grown


def choose_shape(
    parsed: Parsed[TrainSettings], dataset: Dataset | Mixture, checkpoint: Checkpoint | None, GPTConfig: type
) -> tuple[Source | None, Any]:
    """The source of the model's weights, or None to initialise them, and its GPTConfig.

    With lora_rank the source is always the base. Raises InputError for a shape that is invalid or not init_from's.
    """
    settings = parsed.settings
    if checkpoint is not None and not settings.lora_rank:
        read_config(checkpoint, GPTConfig)  # refuses a model with an option that this model.py lacks
    if settings.init_from == "scratch":
        return checkpoint, GPTConfig(vocab_size=dataset.vocab_size, **settings.model_options())
    source = checkpoint or open_source(settings.init_from)
    options = settings.model_options()
    since = parsed.given & {*options} - {*source.model_config} - SCALING  # added to model.py since the source was saved
    added = {name: options[name] for name in since}
    config: Any = read_config(source, GPTConfig, **{"dropout": settings.dropout, **added})
    for part in dataset.parts:
        take_vocabulary(source, part, settings.init_from)
    if checkpoint is None and dataset.vocab_size > config.vocab_size and isinstance(source, Checkpoint):
        config = dataclasses.replace(config, vocab_size=dataset.vocab_size)  # adds the chat template's special tokens
    if "init" in parsed.given and checkpoint is None:
        raise InputError(f"init is {options['init']!r}, but the weights come from {settings.init_from}. Leave init out")
    longer = checkpoint is None and "block_size" in parsed.given and settings.block_size > config.block_size
    free = {"block_size", "init"} | (SCALING if longer else set()) | ({*SCALING, "rope_base"} if checkpoint else set())
    for name, wanted in options.items():
        has = getattr(config, name)
        automatic = wanted == getattr(TrainSettings, name) != getattr(GPTConfig(), name)  # such as mlp_hidden=0
        if name in parsed.given - free and wanted != has and not automatic:
            raise InputError(f"{name} is {wanted!r} but {settings.init_from} has {has!r}. Leave {name} out")
    if longer:
        asked = {name: options[name] for name in parsed.given & SCALING}
        try:
            config = dataclasses.replace(config, **lengthen(config, settings.block_size, asked, settings.init_from))
        except ValueError as error:
            raise InputError(str(error)) from None
    elif "block_size" not in parsed.given and checkpoint is None:
        settings.block_size = config.block_size
    if checkpoint and settings.lora_rank:  # the checkpoint has the shape, but only the adapter's weights
        source = open_source(base_name(checkpoint))
    return source, config


def lengthen(config: Any, block_size: int, asked: dict[str, Any], name: str) -> dict[str, Any]:
    """The changes to the GPTConfig of the model `name` for a longer context; `asked` are the given options of scaling.

    Raises InputError if the model has no RoPE, or has and gets no rope_scaling, or is to get another kind of it.
    """
    kind = asked.get("rope_scaling", config.rope_scaling)
    if config.position != "rope" or kind == "none":
        fix = "Lower it, or give a --rope_scaling such as yarn" if config.position == "rope" else "Lower it"
        raise InputError(f"block_size {block_size} is above the {config.block_size} of {name}. {fix}")
    if config.rope_scaling not in ("none", kind):
        raise InputError(f"rope_scaling is {kind!r} but {name} has {config.rope_scaling!r}. Leave rope_scaling out")
    original = asked.get("rope_original") or config.rope_original or config.block_size
    factor = asked.get("rope_factor") or max(config.rope_factor, block_size / original)
    changes = {**asked, "block_size": block_size, "rope_scaling": kind, "rope_factor": factor}
    if kind == "dynamic":  # as in transformers for a text of block_size tokens, but here for shorter texts too
        growth, D = factor * block_size / original - (factor - 1), config.head_size
        return changes | {"rope_base": config.rope_base * growth ** (D / max(1, D - 2)), "rope_original": 0}
    return changes | {"rope_original": original}
