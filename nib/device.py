"""Which device to use, what it can do, and how much memory is in use on it."""

from __future__ import annotations

import ctypes
import math
import resource
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from nib.errors import InputError
from nib.products import use_onednn
from nib.words import counted

# Dense bfloat16 peaks in FLOP/s, from the vendors' data sheets, by a part of the name that the driver reports.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "A10G": 70e12}
PEAK_FLOPS |= {"L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; "auto" takes CUDA, else MPS, else the CPU. Raises InputError when not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is not known. Use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index if device.index is not None else local_rank
        if index >= count:
            raise InputError(
                f"device {name} is not there: this machine has {counted(count, 'CUDA device')}. Use --device=auto"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if device.type not in ("cpu", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"device {name} is not there. Use --device=auto")
    return torch.device(device.type)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 on a GPU that has it, float16 on an older one, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {counted(threads, 'thread')}" if device.type == "cpu" else device.type


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Dense FLOP/s of the device at 16 bits, or infinity where it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return math.inf
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), math.inf)


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: on the GPU by torch, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Precision:
    """How matrix products are done: autocast to their dtype, float16's scaling of the loss (arXiv 1710.03740)."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.dtype, self.device = pick_dtype(name, device), device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where a product stays float32
        elif device.type == "cpu":
            use_onednn()
            keep_freed_memory()

    def autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, instead of giving it back and having it zeroed again.

    Blocks up to 32 MB, the most it allows, come from its heap, which is not made shorter under 2 GB of free memory.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        for parameter, size in ((-3, 2**25), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, size)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device, or the CPU's allocator, had no memory left."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
