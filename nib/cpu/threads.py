"""The number of threads of a process, the cores they run on, and how they wait for each other. Does not import torch.

The number of threads can change how sums are rounded, so it depends on the hardware, the number of processes and the
user's OMP_NUM_THREADS, never on the load. The load only decides where threads run and how they wait, which changes no
result. libgomp's threads spin at every barrier: if one shares its core with another process, all others spin until the
kernel runs it (measured: bench/NOTES.md). So while other processes use some cores, the threads move to the other cores,
several on a core if needed, and sleep at barriers instead of spinning.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

PERIOD = 0.25  # seconds between two measurements of the load
LOST, GAINED = 0.35, 0.75  # free cores fewer or more than the number in use, at which that number changes
BETTER = 0.3  # of a core: how much more loaded by others the cores in use must be than another core to move there
BINDING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


def choose_threads() -> None:
    """Set OMP_NUM_THREADS. Call this before torch is imported, which reads it when it is loaded.

    It is set where torch would start more threads than this process has cores: with a CPU quota, as in a container, and
    with several processes on the machine. A value that the user has set stays.
    """
    global watch
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    count = int(processes) if processes.isdigit() else 1
    if "OMP_NUM_THREADS" not in os.environ or (count > 1 and torchrun_chose()):
        cores, quota = physical_cores(), cpu_quota()
        if count > 1 or quota < cores:
            os.environ["OMP_NUM_THREADS"] = str(max(1, int(min(cores, quota)) // max(1, count)))
    watch = watch or (LoadWatch() if can_move() else None)


def torchrun_chose() -> bool:
    """Whether OMP_NUM_THREADS is the 1 that torchrun sets if the user has not set it."""
    with suppress(OSError):
        return os.environ["OMP_NUM_THREADS"] == "1" and not any(
            line.startswith(b"OMP_NUM_THREADS=")
            for line in Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        )
    return False


def physical_cores() -> int:
    """The number of physical cores that this process may use, without hyperthreads, as torch counts them."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    places = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology") for cpu in os.sched_getaffinity(0)]
    with suppress(OSError):
        return len({(place / "thread_siblings_list").read_text() for place in places})
    return len(places)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """The CPU quota of this process's control groups (version 1 or 2), in cores; infinity if there is none."""
    limits = [math.inf]
    with suppress(OSError):
        for _, controllers, path in (line.split(":", 2) for line in membership.read_text().splitlines()):
            top = root / controllers if controllers else root
            if controllers and "cpu" not in controllers.split(","):
                continue
            for group in [top / path.strip("/"), *(top / path.strip("/")).parents]:
                with suppress(OSError, ValueError):
                    limits.append(quota_of(group, version=1 if controllers else 2))
                if group == root:
                    break
    return min(limits)


def quota_of(group: Path, version: int) -> float:
    if version == 2:
        quota, period = (group / "cpu.max").read_text().split()
    else:
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)


def can_move() -> bool:
    """Whether the threads may be moved and stopped from spinning: on Linux, unless the user has set that."""
    return (
        sys.platform == "linux" and os.access("/proc/stat", os.R_OK) and not any(name in os.environ for name in BINDING)
    )


def usage(cores: Iterable[int]) -> tuple[float, float, dict[int, float]]:
    """The time, this process's CPU seconds, and each core's busy seconds, all since fixed starting points."""
    wanted, busy, tick = set(cores), {}, os.sysconf("SC_CLK_TCK")
    with open("/proc/stat") as file:
        for line in file:
            name, *fields = line.split()
            if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in wanted:
                user, nice, system, _, _, irq, softirq = map(int, fields[:7])
                busy[int(name[3:])] = (user + nice + system + irq + softirq) / tick
    return time.monotonic(), time.process_time(), busy


def cores_to_use(busy: dict[int, float], own: float, taken: list[int], threads: int) -> list[int]:
    """The cores to use, out of those in `busy`, which gives the share of time that each was busy.

    `own` is this process's part of that, in cores, on the cores `taken` until now.
    """
    wanted = min(threads, len(busy))
    free = len(busy) - max(0.0, sum(busy.values()) - own)
    count = min(wanted, len(taken))
    if free < count - LOST:
        count = max(1, math.floor(free + 0.5))
    elif free >= count + GAINED:
        count = math.floor(free + 1 - GAINED)
    if count >= wanted:
        return list(busy)
    outside = sorted((core for core in busy if core not in taken), key=lambda core: busy[core])
    chosen = [*taken, *outside][:count]
    crowd = sum(busy[core] for core in taken) - own  # load of others on the taken cores together
    # Random, since two processes on one core must not both move to the same other core.
    if outside and count <= len(taken) and crowd > busy[outside[0]] + BETTER and random.random() < 0.5:
        chosen[random.randrange(count)] = outside[0]
    return chosen


class LoadWatch(threading.Thread):
    """Measures the load of this process's cores every PERIOD, and keeps its threads off cores that others use."""

    def __init__(self) -> None:
        super().__init__(name="load", daemon=True)
        self.cores = sorted(os.sched_getaffinity(0))
        self.taken, self.threads = self.cores, 0
        self.before = usage(self.cores)
        self.sleepers: Sleepers | None = None

    def watch(self, threads: int) -> None:
        """Start, for so many threads. The load since this object was made already counts."""
        self.threads = threads
        if threads > 1 and len(self.cores) > 1 and has_libgomp() and not self.is_alive():
            self.look()
            self.start()

    def run(self) -> None:
        while True:
            time.sleep(PERIOD)
            self.look()

    def look(self) -> None:
        now, own, busy = usage(self.cores)
        began, own_before, busy_before = self.before
        seconds = now - began
        complete = busy.keys() == busy_before.keys() == set(self.cores)  # a container may hide some
        if seconds < PERIOD / 2 or not complete:
            return
        self.before = now, own, busy
        shares = {core: min(1.0, (busy[core] - busy_before[core]) / seconds) for core in busy}
        self.keep_to(cores_to_use(shares, (own - own_before) / seconds, self.by_nearness(), self.threads))

    def by_nearness(self) -> list[int]:
        """The cores in use, the main thread's first: the kernel has put it on a free core."""
        with suppress(OSError, ValueError):
            here = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[36])
            return sorted(self.taken, key=lambda core: core != here)
        return self.taken

    def keep_to(self, cores: list[int]) -> None:
        """Move all threads of this process to these cores. They sleep at barriers unless these are all its cores."""
        if set(cores) == set(self.taken):
            return
        self.taken = sorted(cores)
        for task in os.listdir("/proc/self/task"):
            with suppress(OSError):  # one that has ended
                os.sched_setaffinity(int(task), self.taken)
        if len(cores) < len(self.cores):
            self.sleepers = self.sleepers or Sleepers(len(self.cores))
        elif self.sleepers:
            self.sleepers.end()
            self.sleepers = None


class Sleepers:
    """While this exists, libgomp counts more threads than cores, and so lets waiting threads sleep after 100 spins.

    Its spin count cannot be changed once it is loaded. The threads added here never get any work.
    """

    def __init__(self, cores: int) -> None:
        self.ended, counted = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.hold, args=(cores, counted.set), name="sleepers", daemon=True)
        self.thread.start()
        counted.wait()

    def hold(self, cores: int, counted: Callable[[], None]) -> None:
        gomp = ctypes.CDLL(None)
        gomp.GOMP_parallel(gomp.omp_get_thread_num, None, cores + 1, 0)  # any function that does nothing
        counted()
        self.ended.wait()

    def end(self) -> None:
        self.ended.set()
        self.thread.join()


def has_libgomp() -> bool:
    """Whether torch has loaded GNU's OpenMP; LLVM's has some of the same symbols."""
    process = ctypes.CDLL(None)
    return all(hasattr(process, name) == (name[0] != "k") for name in ("GOMP_parallel", "kmp_set_blocktime"))


watch: LoadWatch | None = None  # made by choose_threads


def free_threads(threads: int) -> int:
    """The number of threads that have a core now, for work whose result does not depend on it."""
    return threads if watch is None else min(threads, len(watch.taken))
