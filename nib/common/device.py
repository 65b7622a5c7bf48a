"""Which device to use, what it can do, and how much memory is in use on it."""

from __future__ import annotations

import math
import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nib.common.exits import InputError
from nib.common.wording import counted

# Dense 16-bit peaks of the tensor cores with float32 accumulation, in TFLOP/s, from NVIDIA's data sheets (half of the
# figures with sparsity). The keys are what `card` makes of the driver's name. Laptop versions, MIG slices and virtual
# GPUs have other names and peaks, and are not listed.
PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "GB300": 2500,
    "H100": 989, "H100 PCIE": 756, "H100 NVL": 835, "H200": 989, "H200 NVL": 835, "GH200": 989,
    "H800": 989, "H800 PCIE": 756, "H20": 148,
    "A100": 312, "A100 PCIE": 312, "A800": 312, "A800 PCIE": 312, "A30": 165, "A40": 150, "A10": 125, "A10G": 70,
    "A2": 18, "L4": 121, "L20": 119.5, "L40": 181, "L40S": 362,
    "V100": 125, "V100 PCIE": 112, "V100S PCIE": 130, "T4": 65, "T4G": 65, "TITAN V": 110, "TITAN RTX": 130.5,
    "RTX PRO 6000 BLACKWELL WORKSTATION EDITION": 504,
    "RTX 6000 ADA GENERATION": 364, "RTX 5000 ADA GENERATION": 261, "RTX 4500 ADA GENERATION": 158.5,
    "RTX 4000 ADA GENERATION": 107,
    "RTX A6000": 155, "RTX A5000": 111, "RTX A4500": 94.6, "RTX A4000": 76.7, "RTX A2000": 32,
    "QUADRO RTX 8000": 130.5, "QUADRO RTX 6000": 130.5, "QUADRO RTX 5000": 89, "QUADRO RTX 4000": 57,
    "RTX 5090": 209.5, "RTX 5080": 112.6, "RTX 5070 TI": 87.9, "RTX 5070": 61.7, "RTX 5060 TI": 47.4, "RTX 5060": 38.4,
    "RTX 4090": 165, "RTX 4080 SUPER": 104, "RTX 4080": 97.5, "RTX 4070 TI SUPER": 88.2, "RTX 4070 TI": 80.2,
    "RTX 4070 SUPER": 71, "RTX 4070": 58.3, "RTX 4060 TI": 44.1, "RTX 4060": 30.2,
    "RTX 3090 TI": 80, "RTX 3090": 71, "RTX 3080 TI": 68.2, "RTX 3080": 59.5, "RTX 3070 TI": 43.5, "RTX 3070": 40.6,
    "RTX 3060 TI": 32.4, "RTX 3060": 25.5,
    "RTX 2080 TI": 53.8, "RTX 2080 SUPER": 44.6, "RTX 2080": 40.3, "RTX 2070 SUPER": 36.3, "RTX 2070": 29.9,
    "RTX 2060 SUPER": 28.7, "RTX 2060": 25.8,
}  # fmt: skip
# Words of a card's name that do not matter for its peak: the maker, the series, the memory, the socket.
WORDS_WITHOUT_PEAK = re.compile(r"NVIDIA|TESLA|GEFORCE|\d+GB?|HBM\d\w?|SXM\d")
T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cast(tensor: Tensor, dtype: torch.dtype, name: str, copy: bool = False) -> Tensor:
    """The tensor `name` in another dtype. Raises InputError if its numbers are too large for float16."""
    if dtype == torch.float16 and tensor.numel() and tensor.abs().amax() > torch.finfo(dtype).max:
        most = f"{name} has numbers above {torch.finfo(dtype).max:g}, the largest of float16"
        raise InputError(f"{most}. Use --dtype=bfloat16 or float32")
    return tensor.to(dtype, copy=copy)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; "auto" is CUDA, else MPS, else the CPU. Raises InputError if it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is not known. Use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index if device.index is not None else cuda_index(local_rank, count)
        if index >= count:
            raise InputError(
                f"device {name} is not there: this machine has {counted(count, 'CUDA device')}. Use --device=auto"
            )
        torch.cuda.set_device(index)
        torch.backends.cuda.enable_cudnn_sdp(False)  # see Precision.training
        return torch.device("cuda", index)
    if device.type not in ("cpu", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"device {name} is not there. Use --device=auto")
    return torch.device(device.type)


def cuda_index(local_rank: int, count: int) -> int:
    """The index of this process's device among the `count` visible ones. Raises InputError if there are too few.

    A process that sees only one device uses it: its own, as with Slurm's --gpus-per-task, or by mistake another's. Only
    all processes together can tell (nib.training.distributed.refuse_shared_gpus).
    """
    if local_rank >= count > 1:
        have = f"process {local_rank} of this machine needs a GPU of its own, and there are {count}"
        raise InputError(f"{have}. Start {count} processes (torchrun --nproc_per_node={count})")
    return 0 if count == 1 else local_rank


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
    return 1e12 * PEAK_TFLOPS.get(card(torch.cuda.get_device_name(device)), math.inf)


def card(name: str) -> str:
    """A GPU's name without maker and memory: "A100" for "NVIDIA A100-SXM4-80GB"."""
    return " ".join(word for word in re.split(r"[\s-]+", name.upper()) if not WORDS_WITHOUT_PEAK.fullmatch(word))


def peak_memory(device: torch.device) -> int:
    """The peak memory so far in bytes: torch's on a GPU, else this process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int:
    """The free memory of the device in bytes; for a CPU, the available memory of the system."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        (free,) = re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except (OSError, ValueError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1024 * int(free)


class Precision:
    """How matrix products are done: autocast to their dtype, float16's scaling of the loss (arXiv 1710.03740)."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.dtype, self.device = pick_dtype(name, device), device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @contextmanager
    def training(self, masked: bool) -> Iterator[None]:
        """`autocast` for a training forward pass; on Hopper also cuDNN's attention, unless there is a mask.

        There cuDNN takes half of flash attention's time; elsewhere it is slower (transformers pull request 48163).
        It is off otherwise: it plans anew for each length, and wrong results were reported (pytorch 193893, 196678).
        """
        kernels: AbstractContextManager[object] = nullcontext()
        hopper = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] == 9
        if hopper and not masked:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            kernels = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others], set_priority=True)
        with kernels, self.autocast():
            yield

    def casting_once(self, parts: Iterable[T]) -> Iterator[T]:
        """Iterate over `parts`; all autocasts in the loop's body share their casts. No weight may change meanwhile.

        For training in bfloat16 on a CPU, nib.cpu.bfloat16.linear casts at each use instead.
        """
        outer = nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, enabled=False)
        with outer:  # torch forgets the casts at the end of the outermost autocast
            yield from parts


class Copied:
    """An asynchronous copy of a tensor to the CPU; only `read` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.copy = tensor.to("cpu", non_blocking=True, copy=True)  # in pinned memory, if from a GPU
        self.event = torch.cuda.Event() if tensor.is_cuda else None
        if self.event:
            self.event.record()

    def read(self) -> Any:
        if self.event:
            self.event.synchronize()
        return self.copy.tolist()


# The out-of-memory messages of PyTorch's allocators on CPU (also on Windows), CUDA and MPS, the CUDA runtime and
# driver, NCCL, mmap, cuBLAS and cuDNN. They are matched exactly, since an error of a model.py may mention memory too.
# cuBLAS reports "not initialized" if there is no memory for its workspace.
OUT_OF_MEMORY = re.compile(
    r"\b(CUDA|HIP|XPU) out of memory\. |MPS backend out of memory \(MPS allocated: |(CUDA|HIP)( driver)? error: out of "
    r"memory\b|Triton Error \[\w+\]: out of memory|Cuda failure (\d+ )?'out of memory'"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory: |\bmmap\b.*: Cannot allocate memory \(\d+\)"
    r"|^std::bad_alloc$|\b[A-Z]+_(STATUS_)?(\w+_)?ALLOC(ATION)?_FAILED\b|\bCUBLAS_STATUS_NOT_INITIALIZED when calling "
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, a library on it, or the CPU's allocator had no memory left."""
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))
