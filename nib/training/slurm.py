"""Slurm: give processes that srun started torchrun's environment, so that one command starts a run on many machines.

srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 python train.py config/modern_124m.py
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from nib.common.exits import InputError

PORT = 29500


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in a process of an srun with several tasks.

    Nothing is set under torchrun, in an interactive shell that srun started, or in a batch script without srun.
    Raises InputError for an incomplete Slurm environment.
    """
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "sh", "zsh", "interactive")
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or interactive:
        return
    names = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
    try:
        tasks, rank, local, job = (int(environment[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise InputError(f"srun's environment lacks a number: {error}. Start with srun, or with torchrun") from None
    if tasks == 1:
        return
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    environment.update(RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(tasks))
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(PORT + job % 1000))


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm writes it: "gpu[003-005,9],login1" begins with gpu003. Raises InputError."""
    found = re.match(r"([\w.-]+)(?:\[(\w+)[\w,-]*\]([\w.-]*))?(?:,|$)", nodes)
    if not found:
        raise InputError(f"Slurm's list of nodes is {nodes!r}. Set MASTER_ADDR to the name of the first one")
    return found[1] + (found[2] or "") + (found[3] or "")
