"""What changes the whole process: called by the scripts by name, never by an import or a constructor."""

from __future__ import annotations

import ctypes
import sys

import torch

from nib.cpu import threads
from nib.cpu.onednn_matmul import use_onednn


def tune_for_training(device: torch.device) -> None:
    """Let float32 matrix products go the fastest way that this device has, on a CPU through oneDNN for all of aten."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where a product stays float32
    elif device.type == "cpu":
        use_onednn()
        tune_for_sampling()


def tune_for_sampling() -> None:
    """On a CPU: keep memory from step to step, and threads off the cores that others use."""
    keep_freed_memory()
    if threads.watch:
        threads.watch.watch(torch.get_num_threads())


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, instead of giving it back and having it zeroed again.

    Blocks up to 32 MB, the most it allows, come from its heap, which is not made shorter under 2 GB of free memory.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        for parameter, size in ((-3, 2**25), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, size)
