"""The training settings: every key that a config file or the command line of train.py may set."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from nib.common.exits import InputError
from nib.common.options import option
from nib.training.model_options import load_config, model_settings

GPTConfig, COMMENTS = load_config()

if TYPE_CHECKING:

    @dataclass
    class ModelSettings:
        """The model's options, for type checkers: only those that the training code reads."""

        block_size: int = 256
        dropout: float = 0.0
else:
    ModelSettings = model_settings(GPTConfig, COMMENTS)

MODEL_KEYS = [field.name for field in fields(ModelSettings)]
LORA_KEYS = ["lora_rank", "lora_alpha", "lora_targets", "lora_dropout"]
# The defaults of peft's users: the learning rate of TRL's LoRA recipes, the weight decay of transformers' Trainer.
LORA_DEFAULTS = {"learning_rate": 2e-4, "weight_decay": 0.0}
DPO_DEFAULTS = {"learning_rate": 1e-6, "weight_decay": 0.0, "optimizer": "adamw"}  # TRL's; with LoRA ten times the rate
# The settings that decide the resulting model. A resumed run must have the same values; others may change.
IDENTITY_KEYS = [
    *MODEL_KEYS,
    *LORA_KEYS,
    *"objective dpo_beta seed init_from dataset batch_size optimizer learning_rate muon_learning_rate".split(),
    *"muon_momentum weight_decay beta1 beta2".split(),
    *"grad_clip warmup_iters schedule decay_fraction min_lr dtype".split(),
]


@dataclass(repr=False, eq=False)  # which would add 1 ms to --help
class TrainSettings(ModelSettings):
    """Names as in nanoGPT wherever the meaning is the same. `nib.common.options.parse` fills and checks it."""

    # fmt: off
    out_dir: str = option("", "where the run is written; empty: out/NAME after the config file", group="run")
    seed: int = option(1337, "decides weights, data order and dropout", at_least=0, below=2**31, group="run")
    init_from: str = option("scratch", "scratch, or whose weights to start from: a run or checkpoint, a Hugging Face "
                            "directory or hub name, nanoGPT's ckpt.pt", group="run")
    resume: str = option("auto", "resume from the newest checkpoint in out_dir; auto: if there is one; must: else "
                         "fail; never: fail if there is one", choices=("auto", "never", "must"), group="run")

    dry_run: bool = option(False, "estimate what the run would cost, and exit; writes nothing to out_dir", group="run")
    json: bool = option(False, "with dry_run: print a JSON object", group="run")

    objective: str = option("auto", "lm: predict the next token; dpo: prefer the chosen answer (arXiv 2305.18290); "
                            "auto: by the kind of dataset", choices=("auto", "lm", "dpo"), group="run")
    dpo_beta: float = option(0.1, "dpo: strength of the penalty for moving away from the initial model", above=0,
                             group="run")

    lora_rank: int = option(0, "freeze init_from's weights and train a LoRA adapter of this rank (arXiv 2106.09685); "
                            "0: train all weights", at_least=0, group="adapter")
    lora_alpha: float = option(0.0, "the adapter's update is multiplied by lora_alpha / lora_rank; 0: twice the rank",
                               at_least=0, group="adapter")
    lora_targets: str = option("all", "layers to adapt, a list from q,k,v,o,gate,up,down; all: every linear layer",
                               group="adapter")
    lora_dropout: float = option(0.0, "probability of dropout on the adapter's inputs", at_least=0, below=1,
                                 group="adapter")

    dataset: str = option("stdlib", "a name under data/, a directory made by prepare_data.py, or a mixture with shares "
                          "of the sequences, such as a:0.7,b:0.3", group="data")
    batch_size: int = option(32, "sequences in an optimizer step, over all processes", at_least=1, at_most=2**20,
                             group="data")
    micro_batch_size: int = option(0, "sequences in one forward pass of one process; 0: the largest that fits",
                                   at_least=0, group="data")

    optimizer: str = option("muon", "muon: Muon for the matrices of the blocks, AdamW for the rest",
                            choices=("adamw", "muon"), group="optimizer")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW; the default is 2e-4 with lora_rank, "
                                  "1e-6 with dpo, 1e-5 with both", above=0,
                                  group="optimizer")
    muon_learning_rate: float = option(0.02, "peak learning rate of Muon", above=0, group="optimizer")
    muon_momentum: float = option(0.95, "Muon's momentum; lower for runs of a few hundred steps", at_least=0, below=1,
                                  group="optimizer")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices; the default is 0 with lora_rank or dpo",
                                 at_least=0, group="optimizer")
    beta1: float = option(0.9, "AdamW's decay of the first moment", at_least=0, below=1, group="optimizer")
    beta2: float = option(0.95, "AdamW's decay of the second moment", at_least=0, below=1, group="optimizer")
    grad_clip: float = option(1.0, "clip the gradient norm to this; 0: no clipping", at_least=0, group="optimizer")

    max_skipped_steps: int = option(20, "end the run after this many skipped steps in a row (loss or gradient not "
                                    "finite); 0: never", at_least=0, group="optimizer")

    max_iters: int = option(2000, "stop after this many optimizer steps; 0: no limit", at_least=0, group="schedule")
    max_tokens: int = option(0, "stop after this many tokens; 0: no limit", at_least=0, group="schedule")
    max_seconds: float = option(0.0, "stop after this many seconds of training; 0: no limit",
                                at_least=0, group="schedule")
    max_epochs: float = option(0.0, "stop after this many passes over the training data; 0: no limit",
                               at_least=0, group="schedule")
    warmup_iters: int = option(100, "steps over which the learning rate rises from 0", at_least=0, group="schedule")
    schedule: str = option("cosine", "decay of the learning rate after warm-up",
                           choices=("cosine", "linear", "wsd", "constant"), group="schedule")
    decay_fraction: float = option(0.4, "wsd: share of the run, at its end, in which the learning rate falls",
                                   above=0, at_most=1, group="schedule")
    min_lr: float = option(0.0, "final learning rate of AdamW; Muon's falls by the same factor",
                           at_least=0, group="schedule")

    eval_interval: int = option(250, "steps between validations; 0: only at the end", at_least=0, group="evaluation")
    eval_tokens: int = option(0, "tokens of the validation split to use; 0: all of it", at_least=0, group="evaluation")
    eval_only: bool = option(False, "validate the newest checkpoint (or init_from) and exit", group="evaluation")
    sample_interval: int = option(0, "steps between printed samples; 0: none", at_least=0, group="evaluation")

    checkpoint_interval: int = option(500, "steps between checkpoints; 0: only at the end",
                                      at_least=0, group="checkpoint")
    checkpoint_seconds: float = option(0.0, "also save if this many seconds have passed since the last save; 0: never",
                                       at_least=0, group="checkpoint")
    keep_checkpoints: int = option(2, "checkpoints to keep, besides the best; 0: all", at_least=0, group="checkpoint")

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", group="system")
    dtype: str = option("auto", "dtype of matmuls; weights stay float32. auto: 16 bits on GPUs, bfloat16 "
                        "on CPUs with instructions for it if n_embd is at least 512, otherwise float32",
                        choices=("auto", "float32", "bfloat16", "float16"), group="system")
    compile: str = option("auto", "torch.compile; auto: on CUDA", choices=("auto", "true", "false"), group="system")
    parallel: str = option("ddp", "how several processes (torchrun) share the work", choices=("ddp", "fsdp"),
                           group="system")
    activation_checkpointing: bool = option(False, "recompute blocks in the backward pass: less memory, slower",
                                            group="system")

    log_interval: int = option(10, "steps between lines of metrics.jsonl", at_least=1, group="logging")
    wandb_log: bool = option(False, "also log to Weights & Biases", group="logging")
    wandb_project: str = option("nib", "project on wandb.ai", group="logging")
    wandb_run_name: str = option("", "run on wandb.ai; empty: the name of out_dir", group="logging")
    # fmt: on

    def model_options(self) -> dict[str, Any]:
        """The arguments of model.GPTConfig, without vocab_size, which the dataset decides."""
        return {name: getattr(self, name) for name in MODEL_KEYS}

    def complete(self, given: set[str]) -> None:
        """Set the defaults that depend on other settings, unless the user gave them (`given`)."""
        dpo, lora = self.objective == "dpo", bool(self.lora_rank)
        values: dict[str, Any] = (LORA_DEFAULTS if lora else {}) | (DPO_DEFAULTS if dpo else {})
        if dpo and lora:
            values["learning_rate"] = 1e-5
        for name, value in values.items():
            if name not in given:
                setattr(self, name, value)
        self.lora_alpha = self.lora_alpha or 2.0 * self.lora_rank

    def check(self) -> None:
        """Raise InputError for settings that do not fit together."""
        if self.json and not self.dry_run:
            raise InputError("json is an option of dry_run. Add --dry-run, or leave out --json")
        own = {"block_size": self.block_size, "dropout": self.dropout}  # the other options come from init_from's model
        try:
            GPTConfig(**(self.model_options() if self.init_from == "scratch" else own))
        except ValueError as error:  # any other is a bug in model.py
            raise InputError(str(error)) from None
        if not (self.max_iters or self.max_tokens or self.max_seconds or self.max_epochs):
            limits = "max_iters, max_tokens, max_seconds and max_epochs"
            raise InputError(f"{limits} are all 0: the run has no end. Set one of them")
        if self.lora_rank and self.init_from == "scratch":
            raise InputError("lora_rank adapts an existing model, but init_from is scratch. Give --init_from")
        for name in LORA_KEYS:
            if not self.lora_rank and getattr(self, name) != getattr(TrainSettings, name):
                raise InputError(f"{name} is set, but lora_rank is 0. Set lora_rank, 16 for example, or leave it out")
        if self.min_lr > self.learning_rate:
            raise InputError(f"min_lr {self.min_lr:g} is above learning_rate {self.learning_rate:g}. Lower min_lr")
        if self.micro_batch_size > self.batch_size:
            raise InputError(
                f"micro_batch_size {self.micro_batch_size} is above batch_size {self.batch_size}. Lower it or use 0"
            )

    def steps(self, epoch: int, sequence_tokens: float) -> int:
        """The optimizer steps of the run, for `epoch` sequences of `sequence_tokens` each; 0: only max_seconds ends it.

        max_tokens uses the mean length of conversations; max_epochs is rounded up to a whole step.
        """
        from fractions import Fraction  # not at the top: --help does without it

        limits = [self.max_iters] if self.max_iters else []
        if self.max_tokens:
            limits.append(math.ceil(self.max_tokens / (self.batch_size * sequence_tokens)))
        if self.max_epochs:
            limits.append(math.ceil(Fraction(str(self.max_epochs)) * epoch / self.batch_size))
        return min(limits, default=0)


if clash := sorted(set(MODEL_KEYS) & vars(TrainSettings).keys()):
    raise TypeError(f"GPTConfig.{clash[0]} has the name of a setting of training. Rename it")


def same_run(settings: TrainSettings, saved: dict[str, Any], where: str) -> None:
    """Raise InputError if `saved`, the settings of the run in `where`, would make another model than `settings`."""
    # Options that a checkpoint lacks were added later and had their defaults, except init, which had no fixed value.
    added = {name: getattr(TrainSettings, name) for name in (*MODEL_KEYS, *LORA_KEYS) if name != "init"}
    added["objective"] = "lm"
    for name, before in {**added, **saved}.items():
        if name in IDENTITY_KEYS and before != getattr(settings, name):
            raise InputError(
                f"{name} is {getattr(settings, name)!r} but the run in {where} was made with {before!r}. "
                f"Set {name} back to resume, or give another --out_dir to start a new run"
            )
