"""Guessing ahead from repetitions (sample.py --speculate) against plain decoding, on code that a model continues.

    python bench/speculate.py [RUN] [--speculate 4] [--temperature 0]

Prompts are pieces of the run's validation split. Both ways write the same tokens; they alternate, one stream at a
time, and medians over the rounds count. Prints a table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import KVCache
from nib.data.dataset import Dataset
from nib.generation.engine import stream_text
from nib.generation.request import Sample, SamplingSettings
from sample import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run or checkpoint (default: the newest run)")
    parser.add_argument("--dataset", type=Path, default=Path("data/stdlib"))
    parser.add_argument("--speculate", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit 1 when it does not pay")
    arguments = parser.parse_args()
    model, tokenizer, origin = load_model([arguments.run] if arguments.run else [], "cpu", "float32")
    stream = Dataset(arguments.dataset).val
    length, apart = model.config.block_size // 2, stream.tokens // (arguments.prompts + 1)
    prompts = [stream.read(i * apart, i * apart + length).tolist() for i in range(arguments.prompts)]
    hidden, steps = model.hidden, [0]

    def counted(tokens, cache=None):  # type: ignore[no-untyped-def]
        steps[0] += 1
        return hidden(tokens, cache)

    model.hidden = counted  # type: ignore[method-assign]
    speeds: dict[int, list[float]] = {0: [], arguments.speculate: []}
    written: dict[int, list[list[int]]] = {}
    calls: dict[int, float] = {}
    for _ in range(arguments.rounds):
        for speculate, found in speeds.items():
            settings = SamplingSettings(
                max_new_tokens=arguments.tokens, temperature=arguments.temperature, speculate=speculate
            )
            samples = [Sample("", i, 0, prompt, tokenizer, settings) for i, prompt in enumerate(prompts)]
            steps[0] = 0
            for sample in samples:
                for _ in stream_text(model, KVCache, [sample], settings):
                    pass
            written[speculate] = [sample.tokens for sample in samples]
            calls[speculate] = sum(map(len, written[speculate])) / steps[0]
            found.append(statistics.mean(sample.tokens_per_second or 0.0 for sample in samples))
    same = sum(a == b for a, b in zip(written[0], written[arguments.speculate], strict=True))
    plain, guessed = (statistics.median(found) for found in speeds.values())
    print(origin)
    print(f"plain         {plain:8.1f} tokens/s   {calls[0]:.2f} tokens a step")
    print(f"speculate {arguments.speculate:3} {guessed:8.1f} tokens/s   {calls[arguments.speculate]:.2f} tokens a step")
    print(f"ratio {guessed / plain:.2f}; {same} of {len(prompts)} texts are the same")
    result = dict(plain=plain, speculate=guessed, ratio=guessed / plain, tokens_a_step=calls[arguments.speculate])
    print(json.dumps({**result, "same": same, "prompts": len(prompts), "temperature": arguments.temperature}))
    if arguments.check and guessed <= plain:
        sys.exit(1)


if __name__ == "__main__":
    main()
