"""Runs scripts in forks of one process that has loaded torch: `python forks.py`, jobs in and results out as JSON lines.

A fork gets real descriptors in the state that its job names, the stream objects that Python makes of them when it
starts, and Python's own end. A job is [script, arguments, {descriptor: state}]; a result [status, stdout, stderr].
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def descriptor(number: int, state: str, kept: str) -> tuple[int, int | None]:
    """A new descriptor in that state, and the other end of its pipe where the parent has to read from it."""
    if state in ("left", "line", "busy"):
        reader, writer = os.pipe()
        if number == 0:
            os.write(writer, b"one line\n" * (state == "line"))
            os.close(writer)
            return reader, None
        os.set_blocking(writer, state != "busy")
        if state != "left":
            return writer, reader
        os.close(reader)
        return writer, None
    if number == 0 and state == "ascii":  # what is there is not UTF-8
        Path(kept).write_bytes(b"\xff\xfe")
        return os.open(kept, os.O_RDONLY), None
    if number == 0 and state != "full":
        return os.open(os.devnull, os.O_RDONLY), None
    return os.open("/dev/full" if state == "full" else kept, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), None


def become(script: str, arguments: list[str], states: dict[str, str], ends: list[int]) -> None:
    """The fork: its standard streams as Python makes them, then the script, then what Python does with them at its end.

    The rest of Python's end is left out: it takes 0.4 seconds.
    """
    for number, end in enumerate(ends):
        os.dup2(end, number)
        os.close(end)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        state = states.get(str(number), "")
        if state == "closed":
            os.close(number)
            stream = None
        else:
            how = "strict" if number < 2 else "backslashreplace"
            encoding = "ascii" if state == "ascii" and number else "utf-8"
            stream = open(number, "w" if number else "r", encoding=encoding, errors=how, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = [script, *arguments]
    status = 0
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as left:
        status = left.code  # type: ignore[assignment]
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = 120
    os._exit(status)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import torch
    import torch._dynamo  # loaded at the first step of an optimizer: half a second

    import nib.data.prepare
    import nib.formats.export
    import nib.formats.load  # noqa: F401
    import sample  # noqa: F401
    import train  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # or each fork would copy what the collector touches
    for line in sys.stdin:
        script, arguments, states = json.loads(line)
        kept = [os.path.abspath(f".stream{number}") for number in range(3)]
        made = [descriptor(number, states.get(str(number), ""), kept[number]) for number in range(3)]
        pid = os.fork()
        if pid == 0:
            for _, reader in made:
                if reader is not None:
                    os.close(reader)
            return become(script, arguments, states, [end for end, _ in made])
        for number, (end, reader) in enumerate(made):
            os.close(end)
            if reader is not None:
                with open(reader, "rb", buffering=0) as pipe:
                    if states[str(number)] == "busy":
                        time.sleep(1)  # until the pipe is full
                        Path(kept[number]).write_bytes(pipe.read())
                    else:
                        pipe.readline()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        shown = [Path(path).read_text("utf-8", "replace") if os.path.exists(path) else "" for path in kept[1:]]
        for path in kept:
            Path(path).unlink(missing_ok=True)
        print(json.dumps([status, *shown]), flush=True)


if __name__ == "__main__":
    main()
