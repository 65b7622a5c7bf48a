"""One text on a CUDA GPU, plain and with sample.py --compile, against the speed of the GPU's memory.

    python bench/decode_cuda.py [--rounds 5] [--check]

GPT-2 of 124 M and of 1558 M random weights in bfloat16, sampled with sample.py's defaults. Each token needs all weights
but the table of positions, so tokens a second are at most the speed of reading that many bytes, which is measured by
a sum over 4 GB. The target is for the larger model; a kernel of the smaller one reads so little that what it takes to
start one is expected to show. Prints a table and one JSON line last.
"""

from __future__ import annotations

import torch
from common import GPT2, alternate, finish, parser_for
from decode import Numbers, prompt_of

from model import GPT, GPTConfig
from nib.common.exits import InputError, run_script
from nib.generation.cuda_graph import CompiledRows
from nib.generation.engine import Rows, stream_text
from nib.generation.request import Sample, SamplingSettings

TARGET = 0.70
SHAPES = {"124 M": (12, 12, 768), "1558 M": (48, 25, 1600)}  # layers, heads, width
TOKENS = 256


def make_model(shape: tuple[int, int, int]) -> GPT:
    with torch.device("cuda"):
        model = GPT(GPTConfig(**GPT2 | dict(n_layer=shape[0], n_head=shape[1], n_embd=shape[2]))).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def tokens_per_second(model: GPT, make_rows: type[Rows]) -> float:
    """After the first token, as sample.py writes a text."""
    settings = SamplingSettings(max_new_tokens=TOKENS)
    sample = Sample("", 0, 0, prompt_of(64), Numbers(), settings)
    for _ in stream_text(model, [sample], settings, make_rows):
        pass
    return sample.tokens_per_second or 0.0


def read_speed(memory: torch.Tensor) -> float:
    """Bytes a second of the best of ten sums."""
    seconds = []
    for _ in range(10):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        memory.sum()
        ended.record()
        ended.synchronize()
        seconds.append(began.elapsed_time(ended) / 1000)
    return memory.nbytes / min(seconds)


def main() -> None:
    arguments = parser_for(__doc__, peer=False).parse_args()
    if not torch.cuda.is_available():
        raise InputError("this benchmark needs a CUDA GPU, and torch finds none. Run it on a machine with one")
    speed = read_speed(torch.ones(2**30, device="cuda"))
    result: dict[str, object] = {"device": torch.cuda.get_device_name(), "gigabytes_per_second": round(speed / 1e9)}
    print(f"{result['device']}, {speed / 1e9:.0f} GB/s")
    print("model    plain tokens/s   --compile   at most   share")
    for name, shape in SHAPES.items():
        model = make_model(shape)
        most = speed / sum(p.nbytes for key, p in model.named_parameters() if key != "wpe.weight")
        turns = {  # the defaults bind this round's model
            "plain": lambda model=model: tokens_per_second(model, Rows),
            "compiled": lambda model=model: tokens_per_second(model, CompiledRows),
        }
        found = alternate(turns, arguments.rounds)
        share = found["compiled"] / most
        print(f"{name:8} {found['plain']:14.1f} {found['compiled']:11.1f} {most:9.1f} {share:7.3f}")
        result[name] = {**found, "at_most": most, "share": share}
    finish(result, share >= TARGET, arguments.check)


if __name__ == "__main__":
    run_script(main)
