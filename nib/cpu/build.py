"""Compile the C code of this directory on first use, for this processor and with the machine's own compiler.

kernels.c multiplies a few rows by a matrix, and blocks.c computes all blocks with it. Compiling takes three seconds,
once: the result is kept in the user's cache directory. Without a compiler, or if the compiled code gives wrong results,
there are no kernels, and sampling uses torch, which is slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nib.common.files import fsync
from nib.common.signals import stop_signals_raise
from nib.cpu.threads import free_threads

SOURCES = [Path(__file__).with_name(name) for name in ("blocks.c", "kernels.c")]  # the first includes the second
FLAGS = ["-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
SECONDS = 60  # time limit for the compiler
# With more rows than these a matmul is compute-bound, and torch is faster (bench/NOTES.md).
MOST_ROWS = {torch.float32: 48, torch.bfloat16: 256, torch.int8: 256}


class Matrix(ctypes.Structure):
    """The addresses of a matrix (N, K) of float32, bfloat16 or int8, and of the scale and bias (N,) of its output."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_long) for name in ("n", "k", "size")),
    ]

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        """`weight` is contiguous, and is not copied."""
        # Keeps the tensors alive whose addresses are used.
        self.kept = [weight, *(None if each is None else each.detach().float().contiguous() for each in (scale, bias))]
        super().__init__(
            *(None if each is None else each.data_ptr() for each in self.kept), *weight.shape, weight.itemsize
        )


def check_factor(x: Tensor, channels: int) -> None:
    """Raise RuntimeError for a wrong number of channels or dtype, with which C would read beyond the tensor."""
    if x.shape[-1] != channels or x.dtype != torch.float32:
        found = f"{str(x.dtype).removeprefix('torch.')} of {x.shape[-1]}"
        raise RuntimeError(f"a linear layer of {channels} channels in float32 was given {found} channels")


class Linear:
    """Multiplies float32 x (..., K) by a matrix: (..., N). For x of at most `few` numbers this is faster than torch."""

    def __init__(
        self, function: Callable[..., None], weight: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> None:
        self.function, self.matrix = function, Matrix(weight, scale, bias)
        self.address = ctypes.addressof(self.matrix)
        self.few = MOST_ROWS[weight.dtype] * weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        x, N, K = x.contiguous(), self.matrix.n, self.matrix.k
        check_factor(x, K)
        y = x.new_empty((*x.shape[:-1], N))
        self.function(self.address, x.data_ptr(), y.data_ptr(), x.numel() // K, free_threads(torch.get_num_threads()))
        return y


class Kernels:
    """Matmul with matrices of float32, bfloat16 or int8, on torch's own threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.linear.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_long, ctypes.c_int]
        library.linear.restype = None
        library.blocks.argtypes = [*[ctypes.c_void_p] * 5, ctypes.c_int]
        library.blocks.restype = None
        library.scratch.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_int]
        library.scratch.restype = ctypes.c_long

    def linear(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Linear:
        return Linear(self.library.linear, weight, scale, bias)

    def agree(self) -> bool:
        """Whether the results agree with torch's, for sizes that are and are not multiples of the vector length."""
        for N, K in ((3, 64), (29, 67), (5, 200)):
            generator = torch.Generator().manual_seed(K)
            x, bias = torch.randn(15, K, generator=generator), torch.randn(N, generator=generator)
            integers = torch.randint(-127, 128, (N, K), generator=generator).to(torch.int8)
            scale = torch.rand(N, generator=generator) / 127
            weight = integers * scale[:, None]
            rounded = weight.bfloat16()
            for product, exact in (
                (self.linear(weight, None, bias), weight),
                (self.linear(rounded, None, bias), rounded.float()),
                (self.linear(integers, scale, bias), weight),
            ):
                if not torch.allclose(product(x), F.linear(x, exact, bias), rtol=1e-4, atol=1e-3):
                    return False
        return True


def kernels() -> Kernels | None:
    """The kernels of this machine, or None."""
    return made_kernels()[0]


@functools.cache
def made_kernels() -> tuple[Kernels | None, str]:
    """The kernels, or None and why there are none."""
    try:
        with stop_signals_raise(), cache_directory() as directory:
            made = Kernels(load(directory))
        return (made, "") if made.agree() else (None, "kernels.c gives other results than torch on this machine")
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.decode(errors="replace").splitlines() if "error" in line]
        return None, f"{error.cmd[0]} cannot compile blocks.c: {(lines or ['it failed'])[0]}"
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return None, f"blocks.c cannot be compiled: {error}"


def load(directory: Path) -> ctypes.CDLL:
    """The compiled library, compiled again if it is damaged. Raises OSError or SubprocessError if that fails."""
    path = compiled(directory)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink()
        return ctypes.CDLL(str(compiled(directory)))


def compiled(directory: Path) -> Path:
    """The path of the library for these sources, processor and torch. Raises OSError or SubprocessError."""
    path = directory / f"kernels-{fingerprint()}.so"
    if path.exists():
        return path
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise FileNotFoundError("no C compiler")
    with tempfile.TemporaryDirectory(dir=directory) as name:
        code, library = Path(name, "kernels.o"), Path(name, "kernels.so")
        # Linked without an OpenMP library: the symbols resolve to the one that torch has loaded, so that both share
        # their threads.
        for command in (
            [compiler, *FLAGS, "-fopenmp", "-c", str(SOURCES[0]), "-o", str(code)],
            [compiler, "-shared", str(code), "-o", str(library), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        fsync(library)  # so that a power cut cannot leave a partial file under its name
        os.replace(library, path)
    return path


def fingerprint() -> str:
    """A hash of the sources, the processor and torch's version, since machines may share a home directory."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "F")))
    except (OSError, StopIteration):
        flags = platform.processor()
    parts = [*(source.read_text() for source in SOURCES), " ".join(FLAGS), platform.machine(), flags, torch.__version__]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@contextmanager
def cache_directory() -> Iterator[Path]:
    """The user's directory for compiled code, or a temporary one if that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(home, "nib")
    mine = False
    with suppress(OSError):
        if directory.is_absolute():  # ~ is not expanded for a user without HOME and without an entry in passwd
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            mine = directory.stat().st_uid == os.getuid() and os.access(directory, os.W_OK)
    if mine:
        yield directory
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
