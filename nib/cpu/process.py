"""Changes to the whole process: scripts call these functions explicitly, never an import or a constructor."""

from __future__ import annotations

import ctypes
import sys

import torch

from nib.cpu import threads
from nib.cpu.bfloat16 import replace_autocast_operations
from nib.cpu.onednn_matmul import use_onednn


def tune_for_training(device: torch.device) -> None:
    """Use the device's fastest float32 matmul: TF32 on CUDA, oneDNN on a CPU (for the whole process)."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for matmuls that stay float32
    elif device.type == "cpu":
        use_onednn()
        replace_autocast_operations()
        tune_for_sampling()


def tune_for_sampling() -> None:
    """On a CPU: keep freed memory for the next step, and keep threads off cores that other processes use."""
    keep_freed_memory()
    if threads.watch:
        threads.watch.watch(torch.get_num_threads())


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step, instead of returning it to the kernel, which would zero it again.

    All blocks come from the heap, which is trimmed only above 2 GB of free memory.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        for parameter, size in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, size)
