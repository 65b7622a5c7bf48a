"""The products of kernels.c, compiled for this processor by the machine's own C compiler when first wanted.

It takes a second, once: the result is kept in the user's cache directory. Where there is no compiler, or what it
makes does not compute rightly, there are no kernels and sampling goes the slower way through torch.
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
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ["-O3", "-march=native", "-fPIC"]
SECONDS = 60  # the compiler may take
# With more rows than these a product is bound by arithmetic, and torch is faster (bench/NOTES.md).
MOST_ROWS = {torch.float32: 12, torch.int8: 96}


class Kernels:
    """Products with matrices (N, K) of float32 or int8, by threads of torch's own pool."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.by_dtype = {torch.float32: library.linear_float32, torch.int8: library.linear_int8}
        for function in self.by_dtype.values():
            function.argtypes = [*[ctypes.c_void_p] * 5, *[ctypes.c_long] * 3, ctypes.c_int]
            function.restype = None

    def linear(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What multiplies float32 x (..., K) by `weight`, then by `scale` (N,), and adds `bias` (N,): (..., N).

        `weight` is contiguous and stays where it is: its address is looked up once, here.
        """
        N, K = weight.shape
        function, w = self.by_dtype[weight.dtype], weight.data_ptr()
        kept = [None if each is None else each.detach().float().contiguous() for each in (scale, bias)]
        s, b = (None if each is None else each.data_ptr() for each in kept)

        def product(x: Tensor, kept: object = (weight, kept)) -> Tensor:  # holds what the addresses point to
            x = x.contiguous()
            y = x.new_empty((*x.shape[:-1], N))
            function(x.data_ptr(), w, s, b, y.data_ptr(), x.numel() // K, N, K, torch.get_num_threads())
            return y

        return product

    def agree(self) -> bool:
        """Whether they compute what torch does, for sizes that do and do not fill the processor's vectors."""
        for N, K in ((3, 64), (29, 67), (5, 200)):
            generator = torch.Generator().manual_seed(K)
            x, bias = torch.randn(15, K, generator=generator), torch.randn(N, generator=generator)
            integers = torch.randint(-127, 128, (N, K), generator=generator).to(torch.int8)
            scale = torch.rand(N, generator=generator) / 127
            weight = integers * scale[:, None]
            expected = F.linear(x, weight, bias)
            for product in (self.linear(weight, None, bias), self.linear(integers, scale, bias)):
                if not torch.allclose(product(x), expected, rtol=1e-4, atol=1e-3):
                    return False
        return True


@functools.cache
def kernels() -> Kernels | None:
    """What multiplies few rows fast on this machine, or None."""
    try:
        with cache_directory() as directory:
            library = ctypes.CDLL(str(compiled(directory)))
        made = Kernels(library)
        return made if made.agree() else None
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None


def compiled(directory: Path) -> Path:
    """The shared library for this source, processor and torch. Raises OSError or SubprocessError without one."""
    path = directory / f"kernels-{fingerprint()}.so"
    if path.exists():
        return path
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise FileNotFoundError("no C compiler")
    with tempfile.TemporaryDirectory(dir=directory) as name:
        code, library = Path(name, "kernels.o"), Path(name, "kernels.so")
        # Linked without OpenMP's library: its names are found in the one that torch has loaded, so that both use
        # the same threads.
        for command in (
            [compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", str(code)],
            [compiler, "-shared", str(code), "-o", str(library)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        os.replace(library, path)
    return path


def fingerprint() -> str:
    """Changes with the source, the processor and torch, since a home directory may be shared between machines."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "F")))
    except (OSError, StopIteration):
        flags = platform.processor()
    parts = [SOURCE.read_text(), " ".join(FLAGS), platform.machine(), flags, torch.__version__]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@contextmanager
def cache_directory() -> Iterator[Path]:
    """Where compiled code is kept, of this user alone; for this process only where that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(home, "nib")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = directory.stat().st_uid == os.getuid() and os.access(directory, os.W_OK)
    except (OSError, AttributeError):
        mine = False
    if mine:
        yield directory
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
