"""Train a GPT: on a CPU, on one GPU, or on many by torchrun. `python train.py --help` lists the settings.

`train` is the whole run, with its loop. The forward and backward pass and the update are in nib/training/step.py,
saving is in nib/training/saving.py, and the other methods that the loop calls are in nib/training/run.py.
"""

from __future__ import annotations

from nib.common.signals import exit_on_interrupt

if __name__ == "__main__":  # before the other imports, so that Ctrl-C during them leaves no traceback
    exit_on_interrupt()

import sys
from pathlib import Path

from nib.common.exits import memory_errors, run_script
from nib.common.options import Parsed, parse
from nib.training.settings import TrainSettings
from nib.training.slurm import adopt_slurm

USAGE = "python train.py [CONFIG.py] [--name=value ...]"
ABOUT = "Train a GPT language model. CONFIG.py is plain Python that assigns settings; options override it."


def main() -> int:
    adopt_slurm()
    parsed = read_settings(sys.argv[1:])
    # Here, not at the top, so that --help and usage errors answer at once.
    from nib.cpu.threads import choose_threads

    choose_threads()
    from nib.training.distributed import lost_processes

    with lost_processes(), memory_errors("Use a smaller model, block_size or micro_batch_size"):
        return train(parsed)


def read_settings(argv: list[str]) -> Parsed[TrainSettings]:
    """The settings from the config file and the command line, checked. Raises InputError."""
    parsed = parse(TrainSettings, argv, usage=USAGE, about=ABOUT, config_file=True)
    parsed.settings.check()
    if not parsed.settings.out_dir:
        name = Path((parsed.arguments or ["run"])[0]).stem
        # Without bytes that are not UTF-8: safetensors cannot read a checkpoint from such a directory.
        parsed.settings.out_dir = str(Path("out") / name.encode("utf-8", "ignore").decode("utf-8"))
    return parsed


def train(parsed: Parsed[TrainSettings]) -> int:
    """The whole run. Returns the exit status: 0 done and saved; 129, 130 or 143 stopped by a signal.

    Raises InputError, and RunError if the run fails or its last checkpoint cannot be saved.
    """
    from nib.cpu.threads import choose_threads

    choose_threads()  # `main` did so before torch was imported; a notebook calls only this function
    from model import GPT, GPTConfig

    if parsed.settings.dry_run:
        from nib.training.account import print_account

        return print_account(parsed, GPT, GPTConfig)
    from nib.training.saving import save, save_due
    from nib.training.start import start
    from nib.training.step import optimizer_step

    with start(parsed, GPT, GPTConfig) as run:
        if run.settings.eval_only:
            return run.validate_only()
        run.announce()
        while not run.finished():
            run.begin_step()
            run.set_learning_rate()
            loss, grad_norm = optimizer_step(run, run.next_batch())
            run.count_step(loss, grad_norm)
            validation = run.validate() if run.validation_due() else None
            run.log(validation)
            if run.sample_due():
                run.sample()
            if save_due(run, validation):
                save(run)
            if run.stopped_by:
                break
        return run.end()


if __name__ == "__main__":
    run_script(main)
