"""What may happen to a run: signals, kills, full disks, damaged and hostile files, lost and changing processes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import HAS_FSDP, ROOT, needs_fsdp, run_script
from test_train import TINY, assert_same_run, in_corpus, losses, metrics, tensors, torchrun, train

from nib.common.exits import InputError
from nib.formats.checkpoint import FILES, Checkpoint, list_checkpoints, newest_good, open_checkpoint

__all__ = ["in_corpus"]  # the fixture that gives each test a directory with data/


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "missing": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "a file of something else": lambda path: path.write_bytes(pickle.dumps({"weights": list(range(99))})),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("file", [*FILES, "checksums.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    kind: str, file: str, capsys: pytest.CaptureFixture[str], once: Path, tmp_path: Path
) -> None:
    shutil.copytree(once / "out", tmp_path / "out")
    run = Path("out/run")
    newest = run / "checkpoints/step-00000006"
    DAMAGE[kind](newest / file)
    # A changed sum cannot be told from a changed file.
    with pytest.raises(InputError, match="step-00000006" if file == "checksums.json" else file):
        Checkpoint(newest, optimizer=True)
    assert train("--max_iters=6", "--checkpoint_interval=3") == 0
    assert "warning: step-00000006 is skipped" in capsys.readouterr().err
    assert_same_run(str(once / "out/run"), "out/run")


@pytest.fixture(scope="module")
def once(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run of checkpoints 3 and 6, to be copied."""
    root = tmp_path_factory.mktemp("once")
    (root / "data").symlink_to(corpus / "data")
    done = run_script("train.py", *TINY, "--max_iters=6", "--checkpoint_interval=3", "--out_dir=out/run", cwd=root)
    assert done.returncode == 0, done.stderr
    return root


def test_a_checkpoint_that_carries_code_does_not_run_it(once: Path, tmp_path: Path) -> None:
    """A pickle in place of the weights, with checksums that agree: it is refused as what it is."""
    shutil.copytree(once / "out", tmp_path / "out")
    checkpoint = tmp_path / "out/run/checkpoints/step-00000006"

    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.system, (f"touch {tmp_path}/it-ran",)

    for file in ("model.safetensors", "nib_tokenizer.json", "state.json"):
        kept = (checkpoint / file).read_bytes()
        (checkpoint / file).write_bytes(pickle.dumps(Hostile()))
        sums = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in FILES}
        (checkpoint / "checksums.json").write_text(json.dumps(sums))
        done = run_script("sample.py", str(checkpoint), "--prompt=x", cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
        (checkpoint / file).write_bytes(kept)
    assert not (tmp_path / "it-ran").exists()


def test_latest_names_a_checkpoint_and_no_path(once: Path, tmp_path: Path) -> None:
    shutil.copytree(once / "out", tmp_path / "out")
    (tmp_path / "out/run/checkpoints/latest").write_text("../../../elsewhere")
    done = run_script("sample.py", "out/run/checkpoints/latest", cwd=tmp_path)
    assert done.returncode == 2


def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint_good(once: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writing fails in the middle of the weights."""
    shutil.copytree(once / "out", tmp_path / "out")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    settings = [*TINY, "--max_iters=20", "--checkpoint_interval=3", "--log_interval=5", "--out_dir=out/run"]
    done = run_script("train.py", *settings, cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert "warning: the checkpoint could not be written" in done.stdout, "training goes on"
    assert "error: the checkpoint could not be written" in done.stderr
    assert [path.name for path in list_checkpoints(Path("out/run/checkpoints"))] == ["step-00000006", "step-00000003"]
    assert newest_good(Path("out/run/checkpoints"), optimizer=True).state["step"] == 6
    assert train("--max_iters=20", "--checkpoint_interval=3", "--log_interval=5") == 0


def can_mount() -> bool:
    """Mounting takes root; in a mount namespace of its own it ends with the process."""
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs root and unshare to mount a small file system")
@pytest.mark.parametrize("full", [False, True], ids=["filling up", "full from the start"])
def test_a_full_file_system_leaves_the_last_checkpoint_good(full: bool, once: Path, tmp_path: Path) -> None:
    """A small file system that has room for one or two checkpoints more, or for nothing at all."""
    shutil.copytree(once / "out/run", tmp_path / "before")
    (tmp_path / "out").mkdir()
    settings = [*TINY, "--max_iters=20", "--checkpoint_interval=3", "--log_interval=5", "--keep_checkpoints=0"]
    kilobytes = sum(path.stat().st_size for path in (tmp_path / "before").rglob("*")) // 1024 + 900
    prepare = f"mount -t tmpfs -o size={kilobytes}k none out && cp -r before out/run && "
    prepare += "cat /dev/zero > out/fill 2> told; " if full else ""
    command = [sys.executable, str(ROOT / "train.py"), *settings, "--out_dir=out/run"]
    script = f'{prepare} "$@"; status=$?; cp -r out/run after; exit $status'
    inside = ["unshare", "--mount", "sh", "-c", script, "sh", *command]
    done = subprocess.run(inside, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert "No space left on device" in done.stderr
    if not full:
        assert "warning: the checkpoint could not be written" in done.stdout, "training goes on"
    assert not list(Path("after/checkpoints").glob(".*")), "nothing half-written is left"
    kept = newest_good(Path("after/checkpoints"), optimizer=True).state["step"]
    assert kept == 6 if full else 6 < kept < 18
    for run in ("before", "after"):  # both now with room
        assert train(*settings[len(TINY) :], f"--out_dir={run}") == 0
    assert_same_run("before", "after")


def test_a_process_that_fails_writes_its_last_checkpoint_to_the_end(tmp_path: Path) -> None:
    """One of several leaves without teardown, which must not cut the write that is under way in the background."""
    script = """
import torch
from pathlib import Path
from nib.common.exits import RunError, run_script
from nib.training.saving import Saver
from nib.tokenizer.load import make_tokenizer
def main():
    saver = Saver(Path("run"), keep=1, tokenizer=make_tokenizer("byte"))
    saver.save({"weights": torch.zeros(2**26)}, {}, {"step": 5, "model_config": {}}, best=True)
    raise RunError("the others are gone")
run_script(main)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (1, "error: the others are gone\n")
    assert open_checkpoint(Path("run")).weights()["weights"].shape == (2**26,)
    assert Path("run/checkpoints/best").read_text() == "step-00000005\n"


def test_a_checkpoint_gets_its_names_when_a_kill_came_before_them(once: Path, tmp_path: Path) -> None:
    train("--max_iters=6", "--eval_interval=3")
    checkpoints = Path("out/run/checkpoints")
    assert (checkpoints / "best").read_text() == "step-00000006\n"
    for label in ("latest", "best"):
        (checkpoints / label).write_text("step-00000003\n")
    assert train("--max_iters=6", "--eval_interval=3") == 0
    assert [(checkpoints / label).read_text() for label in ("latest", "best")] == ["step-00000006\n"] * 2


def test_a_changed_corpus_is_not_resumed_on(once: Path, tmp_path: Path) -> None:
    shutil.copytree(once / "out", tmp_path / "out")
    prepared = run_script(
        "prepare_data.py",
        str(ROOT / "nib"),
        "--glob=*.py",
        "--out=other",
        "--tokenizer=byte",
        "--workers=1",
        cwd=tmp_path,
    )
    assert prepared.returncode == 0, prepared.stderr
    (tmp_path / "data").unlink()
    (tmp_path / "data").mkdir()
    (tmp_path / "other").rename(tmp_path / "data/words")
    with pytest.raises(InputError, match="not the corpus that the run in out/run began with"):
        train("--max_iters=9")


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    slow = ["--n_layer=8", "--n_embd=256", "--batch_size=64", "--micro_batch_size=4", "--block_size=128"]
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *slow, "--out_dir=out/slow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(lambda: (tmp_path / "out/slow/config.json").exists() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "is saved" not in output


def start_torchrun(root: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *launcher]
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), *TINY, *arguments], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


# Long enough to be interrupted, and the same in every test that compares with `whole`.
SHARED = ["--max_iters=200", "--checkpoint_interval=20", "--dropout=0.1", "--micro_batch_size=2"]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two processes."""
    root = tmp_path_factory.mktemp("whole")
    (root / "data").symlink_to(corpus / "data")
    done = torchrun(2, *SHARED, "--out_dir=out/whole", cwd=root)
    assert done.returncode == 0, done.stderr
    return root / "out/whole"


def test_sigterm_under_torchrun_saves_one_step_of_all(whole: Path, tmp_path: Path) -> None:
    with start_torchrun(tmp_path, *SHARED, "--out_dir=out/told") as process:
        wait_for(lambda: (tmp_path / "out/told/metrics.jsonl").exists())
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert "is saved. Resume with: torchrun --standalone --nproc_per_node=2" in output, output
    assert len(losses("out/told")) < 200
    assert torchrun(2, *SHARED, "--out_dir=out/told", cwd=tmp_path).returncode == 0
    assert_same_run(str(whole), "out/told")


def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path: Path) -> None:
    """Most of this run's time is validation: what comes between two steps' agreements waits for the next."""
    settings = [*SHARED, "--eval_interval=1", "--micro_batch_size=1", "--out_dir=out/one"]
    with start_torchrun(tmp_path, *settings) as process:
        wait_for(lambda: (tmp_path / "out/one/metrics.jsonl").exists())
        time.sleep(0.1)  # past the next step's own work
        for _ in range(2):  # a second SIGHUP is no hurry
            os.kill(workers_of(process)[-1], signal.SIGHUP)
        output, _ = process.communicate(timeout=60)
    assert "is saved. Resume with" in output and "lost the others" not in output, output
    assert open_checkpoint(Path("out/one")).state["step"] == metrics("out/one")[-1]["step"]


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_process_that_dies_is_noticed_and_torchrun_brings_the_run_back(
    whole: Path, tmp_path: Path, restarts: int
) -> None:
    path = tmp_path / "out/hit/metrics.jsonl"
    with start_torchrun(
        tmp_path, *SHARED, "--out_dir=out/hit", launcher=(f"--max-restarts={restarts}", "--monitor-interval=0.5")
    ) as process:
        wait_for(lambda: path.exists() and len(path.read_text().splitlines()) > 30)
        os.kill(workers_of(process)[-1], signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert "error: process 0 lost the others" in output, output
    assert (process.returncode == 0) == bool(restarts), output
    if restarts:
        assert_same_run(str(whole), "out/hit")


JOIN = """
import sys, time
from nib.training.distributed import start_cluster
from nib.common.exits import leave
time.sleep(float(sys.argv[1]))
cluster = start_cluster("cpu")
print(cluster.total([1.0 + cluster.rank]), flush=True)
leave(0)
"""


def test_a_restarted_run_does_not_call_the_dead(tmp_path: Path) -> None:
    """After a restart torchrun's store still has the addresses of the processes before; the second comes late."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment = {**os.environ, **place, "WORLD_SIZE": "2"}
    for _ in range(2):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", JOIN, str(rank)], env={**environment, "RANK": str(rank)},
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        for process in processes:
            output, errors = process.communicate(timeout=60)
            assert (process.returncode, output) == (0, "[3.0]\n"), errors


def test_the_number_of_processes_may_change(tmp_path: Path) -> None:
    """1 -> 2 -> 1 processes: the same sums in another order, so the losses agree to float32 rounding, grown."""
    settings = ["--schedule=constant", "--micro_batch_size=2", f"--parallel={'fsdp' if HAS_FSDP else 'ddp'}"]
    train(*settings, "--max_iters=45", "--out_dir=out/one")
    train(*settings, "--max_iters=15", "--out_dir=out/mixed")
    done = torchrun(2, *settings, "--max_iters=30", "--out_dir=out/mixed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train(*settings, "--max_iters=45", "--out_dir=out/mixed")
    assert losses("out/mixed")[:15] == losses("out/one")[:15]
    assert losses("out/mixed") == pytest.approx(losses("out/one"), rel=1e-3)
    assert tensors("out/mixed").keys() == tensors("out/one").keys()


@needs_fsdp
def test_fsdp_follows_one_process(tmp_path: Path) -> None:
    settings = ["--max_iters=30", "--micro_batch_size=2", "--eval_interval=20", "--activation_checkpointing"]
    train(*settings, "--out_dir=out/one")
    done = torchrun(2, *settings, "--parallel=fsdp", "--sample_interval=20", "--out_dir=out/two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses("out/two") == pytest.approx(losses("out/one"), rel=2e-3)
    assert metrics("out/two")[-1]["val_loss"] == pytest.approx(metrics("out/one")[-1]["val_loss"], rel=2e-3)


def test_the_soak_in_short(tmp_path: Path) -> None:
    """Random kills and damage, as bench/soak.py does by the hundred, of a run on conversations and a text."""
    mixture = "--dataset=chats:0.3,words:0.7"
    done = run_script("bench/soak.py", mixture, "--kills=2", "--steps=60", "--damage=0.9", cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= 2 and result["bytes_compared"] > 500_000 and result["differences"] == 0


def have_namespaces() -> bool:
    """Network namespaces take root and iproute2; without them the machine cannot play two."""
    name = f"nib-probe-{os.getpid()}"  # every test process asks, at the same time
    made = shutil.which("ip") and subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return bool(made)


@pytest.mark.skipif(not have_namespaces(), reason="needs root and iproute2 to make network namespaces")
def test_two_machines_train_one_model(tmp_path: Path) -> None:
    """Two network namespaces joined by a cable stand for two machines; one is lost, and comes back."""
    names = [f"nib-{os.getpid()}-{index}" for index in range(2)]
    script = [str(ROOT / "train.py"), *TINY, "--max_iters=150", "--checkpoint_interval=20", "--micro_batch_size=2"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def start(index: int) -> subprocess.Popen[str]:
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={index}", "--nproc_per_node=1"]
        launcher += ["--rdzv_backend=static", "--master_addr=10.77.0.1", "--master_port=29512"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
        return subprocess.Popen(
            ["ip", "netns", "exec", names[index], sys.executable, *launcher, *script, "--out_dir=out/two"],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for index, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        machines = [start(0), start(1)]
        path = tmp_path / "out/two/metrics.jsonl"
        wait_for(lambda: path.exists() and len(path.read_text().splitlines()) > 30)
        inside = subprocess.run(["ip", "netns", "pids", names[1]], capture_output=True, text=True).stdout.split()
        for pid in inside:  # power off: nothing on that machine says good-bye
            os.kill(int(pid), signal.SIGKILL)
        output, _ = machines[0].communicate(timeout=90)
        assert machines[0].returncode != 0
        assert "lost the others" in output, output
        machines[1].communicate()
        for machine in [start(0), start(1)]:
            output, _ = machine.communicate(timeout=90)
            assert machine.returncode == 0, output
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
    train("--max_iters=150", "--micro_batch_size=2", "--out_dir=out/one")
    assert losses("out/two") == pytest.approx(losses("out/one"), rel=5e-3)
