"""Threads: how many by the hardware and the user's word, where by the load, and the same bits wherever they run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from nib.cpu.threads import can_move, cores_to_use, cpu_quota, physical_cores

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux's /proc and affinity")
NAMES = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "LOCAL_WORLD_SIZE")


def quota(root: Path, membership: str, **files: str) -> float:
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    (root / "membership").write_text(membership)
    return cpu_quota(root, root / "membership")


def test_the_narrowest_quota_of_all_groups_above_counts(tmp_path):
    found = quota(
        tmp_path, "0::/pod/box\n", cpu_dot_max="max 100000", pod__cpu_dot_max="150000 100000",
        pod__box__cpu_dot_max="400000 100000",
    )  # fmt: skip
    assert found == 1.5


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_version_1_of_control_groups_is_read_too(tmp_path, controllers):
    names = {
        f"{controllers}__box__cpu_dot_cfs_{name}_us": text
        for name, text in dict(quota="200000", period="50000").items()
    }
    above = {f"{controllers}__cpu_dot_cfs_{name}_us": text for name, text in dict(quota="-1", period="100000").items()}
    assert quota(tmp_path, f"3:memory:/box\n2:{controllers}:/box\n0::/\n", **names, **above) == 4.0


def test_a_group_that_is_not_seen_from_within_a_container_is_that_of_the_mount(tmp_path):
    assert quota(tmp_path, "0::/docker/0123\n", cpu_dot_max="200000 100000") == 2.0


@pytest.mark.parametrize("text", ["", "max", "max 100000", "many few", "1 2 3"])
def test_what_is_no_quota_limits_nothing(tmp_path, text):
    assert quota(tmp_path, "0::/\n", cpu_dot_max=text) == math.inf


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what says how many threads there are, and with the changes."""
    return {name: value for name, value in os.environ.items() if name not in NAMES} | changes


def chosen(**changes: str) -> list[str]:
    """The threads of torch in a process that calls choose_threads, and OMP_NUM_THREADS there."""
    script = "from nib.cpu.threads import choose_threads; choose_threads(); import torch, os; "
    script += "print(torch.get_num_threads(), os.environ.get('OMP_NUM_THREADS'))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(**changes), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_users_number_of_threads_wins():
    assert chosen(OMP_NUM_THREADS="1") == ["1", "1"]
    assert chosen(OMP_NUM_THREADS="3")[1] == chosen(OMP_NUM_THREADS="3", LOCAL_WORLD_SIZE="2")[1] == "3"
    # A shell that gives the number to this command alone does not have it itself.
    script = "import nib.cpu.threads as t, os; t.choose_threads(); print(os.environ['OMP_NUM_THREADS'])"
    command = f'LOCAL_WORLD_SIZE=2 OMP_NUM_THREADS=3 {sys.executable} -c "{script}"; exit $?'
    assert subprocess.check_output(["sh", "-c", command], cwd=ROOT, env=environment(), text=True) == "3\n"


def test_alone_there_are_as_many_threads_as_torch_has_by_itself_and_of_several_processes_each_has_its_share():
    cores = min(physical_cores(), int(min(cpu_quota(), 2**20)))
    assert chosen()[0] == str(cores)
    assert chosen(LOCAL_WORLD_SIZE="2") == [str(max(1, cores // 2))] * 2
    assert chosen(LOCAL_WORLD_SIZE=str(2 * cores)) == ["1", "1"]


@LINUX
def test_affinity_limits_the_threads():
    here = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(here)])
    try:
        assert chosen()[0] == "1"
    finally:
        os.sched_setaffinity(0, here)


@LINUX
def test_torchrun_that_got_no_number_gives_each_process_its_share_and_one_that_got_one_passes_it_on(tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import nib.cpu.threads as t; t.physical_cores = lambda: 6\n"
        "t.choose_threads(); import os; sys.stdout.write(f\"threads {os.environ['OMP_NUM_THREADS']}\\n\")  # at once\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    for given, expected in (({}, "3"), ({"OMP_NUM_THREADS": "1"}, "1")):
        done = subprocess.run(command, env=environment(**given), capture_output=True, text=True)
        assert done.stdout.split().count(expected) == 2, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND"])
def test_threads_stay_where_and_as_a_user_has_put_them(monkeypatch, name):
    for each in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"):
        monkeypatch.delenv(each, raising=False)
    assert can_move() == (sys.platform == "linux")
    monkeypatch.setenv(name, "active")
    assert not can_move()


def settle(
    others: dict[int, float], threads: int, taken: list[int] | None = None, own_spread: float = 1.0
) -> list[int]:
    """Where threads end up that are beside others which keep to their cores, after some looks."""
    cores, taken = list(others), list(taken or others)
    for _ in range(300):
        share = {core: min(1 - others[core] / 2, own_spread) if core in taken else 0.0 for core in cores}
        busy = {core: min(1.0, others[core] * (1 - share[core] / 2) + share[core]) for core in cores}
        own = sum(busy[core] - others[core] * (1 - share[core] / 2) for core in cores)
        taken = cores_to_use(busy, own, taken, threads)
    return sorted(taken)


def test_threads_keep_to_the_cores_that_others_leave():
    idle = dict.fromkeys(range(4), 0.0)
    assert settle(idle, 4) == [0, 1, 2, 3]
    assert settle(idle | {2: 1.0}, 4) == [0, 1, 3]
    assert settle(idle | {0: 1.0, 1: 1.0}, 4) == [2, 3]
    assert settle({0: 1.0, 1: 0.0}, 2) == [1]
    assert settle({0: 1.0, 1: 0.0}, 2, taken=[0]) == [1]
    assert len(settle(dict.fromkeys(range(4), 1.0), 4)) >= 1


def test_threads_come_back_when_the_others_are_gone_and_little_load_moves_none():
    idle = dict.fromkeys(range(4), 0.0)
    assert settle(idle, 4, taken=[1]) == [0, 1, 2, 3]
    assert settle(idle | {2: 0.1}, 4) == [0, 1, 2, 3]
    assert settle(idle | {0: 1.0, 1: 1.0}, 2) == [0, 1, 2, 3]  # two threads have room beside two others on four cores


TRAINS = """
import os, sys, hashlib
from nib.cpu import threads
threads.choose_threads()
import torch
from model import GPT, GPTConfig
from nib.cpu.process import tune_for_training
torch.manual_seed(0)
tune_for_training(torch.device("cpu"))
watch = threads.watch
watch.look = lambda: None  # it is this script that says when and where to
shape = dict(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=128)
model = GPT(GPTConfig(**shape, norm=sys.argv[2], bias=sys.argv[2] == "layernorm"))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
tokens = torch.randint(300, (8, 65))
for step in range(6):
    if sys.argv[1] == "moved":
        watch.keep_to([watch.cores[step // 2 % 2]] if step % 2 else watch.cores)
        assert (watch.sleepers is not None) == bool(step % 2)
        assert os.sched_getaffinity(0) == set(watch.taken)
    model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    optimizer.step()
    optimizer.zero_grad()

print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""


def weights(*arguments: str, threads: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", TRAINS, *arguments], cwd=ROOT, capture_output=True, text=True,
        env=environment(OMP_NUM_THREADS=str(threads), PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@LINUX
@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="one core")
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_training_has_the_same_bits_wherever_its_threads_run_and_however_they_wait(norm):
    assert weights("moved", norm, threads=2) == weights("still", norm, threads=2)


def test_without_layernorm_the_weights_do_not_depend_on_the_number_of_threads_either():
    """A LayerNorm's gradient is a sum over rows, made in as many parts as there are threads."""
    assert weights("still", "rmsnorm", threads=1) == weights("still", "rmsnorm", threads=2)


LOOP = "while True: pass"
WATCHES = """
import time
from nib.cpu import threads
threads.choose_threads()
import torch
watch, end = threads.watch, time.monotonic() + 100
watch.watch(2)
while len(watch.taken) == len(watch.cores) and time.monotonic() < end:
    time.sleep(0.1)
print(len(watch.taken) < len(watch.cores), threads.free_threads(2), watch.sleepers is not None)
"""


@LINUX
@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="one core")
def test_beside_a_busy_loop_a_process_keeps_to_the_cores_that_are_left():
    here = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, here[:2])  # for both of what is started
    try:
        with subprocess.Popen([sys.executable, "-c", LOOP]) as loop:
            done = subprocess.run(
                [sys.executable, "-c", WATCHES], cwd=ROOT, env=environment(), capture_output=True, text=True
            )
            loop.kill()
    finally:
        os.sched_setaffinity(0, here)
    assert done.stdout.split() == ["True", "1", "True"], done.stderr


def test_a_run_that_goes_on_with_other_threads_says_so_in_one_line(corpus, tmp_path):
    shape = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --eval_interval=0 --eval_tokens=100"
    options = [*shape.split(), f"--dataset={corpus / 'data/words'}", f"--out_dir={tmp_path / 'run'}", "--device=cpu"]
    for steps, threads in ((2, "1"), (3, "1"), (4, "2")):
        limited = os.environ | {"OMP_NUM_THREADS": threads}
        done = run_script("train.py", *options, f"--max_iters={steps}", cwd=tmp_path, env=limited)
        assert done.returncode == 0, done.stderr
        said = [line for line in (done.stdout + done.stderr).splitlines() if "thread" in line and "warning" in line]
        assert len(said) == (threads == "2") and all("OMP_NUM_THREADS=1" in line for line in said)
