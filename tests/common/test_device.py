"""Which GPU a process takes, how fast it can be at most, and how it says that its memory is full."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nib.common import device as devices
from nib.common.device import cuda_index, is_out_of_memory, peak_flops
from nib.common.exits import InputError
from nib.training.distributed import refuse_shared_gpus

TERA = 1e12
# As the driver names them, and what the data sheets say; None: not known, or not the whole card.
CARDS = {
    "NVIDIA A100-SXM4-80GB": 312, "A100-SXM4-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb": None, "GRID A100-10C": None, "NVIDIA A100X": None, "NVIDIA A30": 165,
    "NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA A10-24Q": None, "NVIDIA A2": 18, "NVIDIA A40": 150,
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989,
    "NVIDIA H20": 148, "NVIDIA GH200 480GB": 989, "NVIDIA GH200 144G HBM3e": 989, "NVIDIA B200": 2250,
    "NVIDIA L4": 121, "NVIDIA L40": 181, "NVIDIA L40S": 362,
    "Tesla T4": 65, "Tesla V100-SXM2-16GB": 125, "Tesla V100-PCIE-32GB": 112, "Tesla V100S-PCIE-32GB": 130,
    "NVIDIA T400": None, "NVIDIA T400 4GB": None, "Quadro T1000": None, "Tesla P100-PCIE-16GB": None,
    "NVIDIA RTX A1000": None, "NVIDIA RTX A1000 Laptop GPU": None, "NVIDIA RTX A6000": 155, "NVIDIA RTX A2000 12GB": 32,
    "NVIDIA RTX 6000 Ada Generation": 364, "Quadro RTX 6000": 130.5, "NVIDIA RTX 4000 SFF Ada Generation": None,
    "NVIDIA GeForce RTX 4090": 165, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 3090": 71, "NVIDIA GeForce RTX 3090 Ti": 80, "GeForce RTX 2080 Ti": 53.8,
    "NVIDIA GeForce RTX 2080 SUPER": 44.6, "GeForce RTX 2080 with Max-Q Design": None,
    "NVIDIA GeForce RTX 5090": 209.5, "NVIDIA GeForce RTX 5070 Ti": 87.9, "NVIDIA GeForce GTX 1650": None,
    "NVIDIA TITAN RTX": 130.5, "NVIDIA Graphics Device": None, "AMD Instinct MI300X": None, "": None,
}  # fmt: skip


def test_a_card_has_the_peak_of_its_data_sheet_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in CARDS.items():
        monkeypatch.setattr("torch.cuda.get_device_name", lambda _, name=name: name)
        found = peak_flops(torch.device("cuda", 0), torch.bfloat16)
        assert found == (math.inf if expected is None else pytest.approx(expected * TERA)), name
        assert peak_flops(torch.device("cuda", 0), torch.float32) == math.inf
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == math.inf
    assert all(devices.card(name) == name for name in devices.PEAK_TFLOPS), "a name that no card can match"


def test_a_process_takes_the_gpu_of_its_rank_or_the_only_one_it_sees() -> None:
    assert [cuda_index(rank, 8) for rank in range(8)] == list(range(8))
    assert [cuda_index(rank, 1) for rank in range(4)] == [0, 0, 0, 0], "Slurm's --gpus-per-task=1"
    for rank, count in ((2, 2), (8, 4)):  # not wrapped around: two processes would share one
        with pytest.raises(InputError, match=rf"there are {count}\. Start {count} processes"):
            cuda_index(rank, count)


def test_two_processes_on_one_gpu_are_refused() -> None:
    refuse_shared_gpus(["a", "b", "c"])
    with pytest.raises(InputError, match="processes 1 and 2 share one GPU"):
        refuse_shared_gpus(["a", "b", "b"])


OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nCUDA kernel errors might be reported"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB). Tried to allocate 1.00 GB"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: 1 bytes"),
    RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("unable to mmap 4096 bytes from file <a.bin>: Cannot allocate memory (12)"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("NCCL error in: NCCLUtils.hpp:77, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:50])
def test_memory_that_is_full_is_known_however_it_is_said(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "message",
    [
        "my cache ran out of memory slots", "out of memory", "Out of memory cells: 4 are not enough memory",
        "the memory bank cannot allocate memory for 3 items", "slot allocation failed", "CUDA is out of memory tokens",
        "the status is CUBLAS_STATUS_NOT_INITIALIZED", "an allocator like std::bad_alloc", "bad_alloc",
    ],
)  # fmt: skip
def test_an_error_of_the_users_own_about_memory_is_none_of_a_full_one(message: str) -> None:
    assert not is_out_of_memory(RuntimeError(message))


def test_memory_that_is_full_on_this_machine_is_known_and_other_errors_are_not() -> None:
    for allocate in (lambda: np.empty(2**57), lambda: torch.empty(2**60)):
        with pytest.raises((MemoryError, RuntimeError)) as found:
            allocate()
        assert is_out_of_memory(found.value)
    with pytest.raises(RuntimeError) as wrong:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(wrong.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory, Required: 180224"))
