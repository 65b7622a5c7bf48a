"""sample.py as a user meets it: what it prints where, how it ends, and what it says about mistakes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from model_helpers import GPT2

import sample
from model import GPT, GPTConfig
from nib.common import exits as errors
from nib.data.chat import fit_tokenizer
from nib.formats.checkpoint import write_checkpoint
from nib.generation.chat import open_chat
from nib.tokenizer.load import make_tokenizer
from nib.tokenizer.tokenizer import CharTokenizer


def make_run(directory: Path, tokenizer, position: str = "learned", block_size: int = 16, **changes) -> Path:
    """A run directory with one checkpoint of an untrained model of some contrast; `changes` falsify its settings."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=tokenizer.vocab_size, block_size=block_size, n_layer=1, n_head=2, n_embd=16)
    shape = GPT2 | sizes | dict(position=position)
    model = GPT(GPTConfig(**shape))
    with torch.no_grad():
        model.wte.weight.mul_(20)
        model.wte.weight[257:] = 0  # the special tokens of a chat, which it does not write then
    state = {"step": 3, "model_config": asdict(model.config) | changes}
    write_checkpoint(directory / "checkpoints", model.state_dict(), {}, state, tokenizer)
    return directory


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working directory with out/bytes and out/chars, and all sorts of things that are no prompt and no run."""
    place = tmp_path_factory.mktemp("place")
    make_run(place / "out/chars", CharTokenizer("\n abcdefgh"))
    make_run(place / "out/bytes", make_tokenizer("byte"))  # the newest
    make_run(place / "odd/rope", make_tokenizer("byte"), position="rope")
    make_run(place / "odd/changed", make_tokenizer("byte"), n_embd=32)
    make_run(place / "odd/future", make_tokenizer("byte"), sparkle=1)
    make_run(place / "odd/cut", make_tokenizer("byte"))
    chat = make_tokenizer("byte")
    fit_tokenizer(chat)
    make_run(place / "odd/chat", chat, block_size=64)
    weights = place / "odd/cut/checkpoints/step-00000003/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    (place / "odd/empty").mkdir()
    (place / "odd/hf").mkdir()
    (place / "odd/hf/config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    (place / "prompt.txt").write_bytes("two\r\nlines é\n".encode())
    (place / "binary").write_bytes(b"\x80\x81\xff")
    return place


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Call main() in `place`; gives (exit status, standard output, standard error), as run_script leaves them."""

    def run(*arguments: str, stdin: bytes = b"") -> tuple[object, str, str]:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            errors.run_script(lambda: sample.main(list(arguments)))
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return run


def test_one_sample_is_the_prompt_and_its_continuation(run):
    code, out, err = run("bytes", "--prompt=abc", "--max-new-tokens=5", "--temperature=0")
    assert code == 0 and out.startswith("abc") and out.endswith("\n")
    assert err == "out/bytes/checkpoints/step-00000003 on cpu, float32\n"
    (line,) = run("bytes", "--prompt=abc", "--max-new-tokens=5", "--temperature=0", "--json")[1].splitlines()
    assert out == "abc" + json.loads(line)["text"] + "\n"


def test_no_argument_takes_the_newest_run_and_no_prompt_starts_from_nothing(run):
    assert "out/bytes/" in run("--max-new-tokens=3")[2]
    for target in ("chars", "out/chars", "out/chars/checkpoints/latest", "out/chars/checkpoints/step-00000003"):
        code, out, err = run(target, "--max-new-tokens=9", "--json")
        assert code == 0 and "out/chars/" in err
        found = json.loads(out)
        assert found["prompt"] == "" and len(found["text"]) == len(found["tokens"]) == 9


def test_json_is_one_object_a_sample_and_nothing_else(run):
    code, out, _ = run("--prompt=a", "--prompt", "FILE:prompt.txt", "--num-samples=2", "--json", "--max-new-tokens=7")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["prompt"] for line in lines] == ["a", "a", "two\r\nlines é\n", "two\r\nlines é\n"]
    for line in lines:
        assert list(line) == ["prompt", "text", "tokens", "finish_reason", "tokens_per_second"]
        assert line["text"] == bytes(line["tokens"]).decode("utf-8", errors="replace")
        assert line["finish_reason"] in ("length", "end_of_text") and line["tokens_per_second"] > 0
    assert lines[0]["tokens"] != lines[1]["tokens"]
    assert json.loads(run("--json", "--max-new-tokens=1")[1])["tokens_per_second"] is None


def test_top_logprobs_are_the_models_own(run, place):
    from nib.formats.load import build, open_source

    arguments = ["bytes", "--prompt=abc", "--prompt=b", "--num-samples=2", "--max-new-tokens=9", "--json"]
    code, out, _ = run(*arguments, "--top-logprobs=3", "--temperature=1.7", "--top-k=40", "--repetition-penalty=1.2")
    source = open_source(str(place / "out/bytes"))
    model = build(source, lambda: GPT(GPTConfig(**source.model_config))).eval()
    for found in map(json.loads, out.splitlines()):
        ids = [*found["prompt"].encode(), *found["tokens"]]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids]))[0][0].log_softmax(-1)[len(found["prompt"]) - 1 :]
        assert code == 0 and [each["id"] for each in found["logprobs"]] == found["tokens"]
        for token, expected in zip(found["logprobs"], log_probs[:-1], strict=True):
            best = expected.topk(3)
            assert abs(token["logprob"] - expected[token["id"]]) < 1e-4
            assert [each["id"] for each in token["top"]] == best.indices.tolist()
            assert (
                max(abs(each["logprob"] - value) for each, value in zip(token["top"], best.values, strict=True)) < 1e-4
            )
            assert token["text"] == bytes([token["id"]]).decode("utf-8", errors="replace")
    plain = [json.loads(line) for line in run(*arguments)[1].splitlines()]
    asked = [json.loads(line) for line in run(*arguments, "--top-logprobs=1")[1].splitlines()]
    assert [each["tokens"] for each in plain] == [each["tokens"] for each in asked] and "logprobs" not in plain[0]
    assert run("--prompt=a", "--top-logprobs=2")[0] == 2
    assert "Add --json" in run("--prompt=a", "--top-logprobs=2")[2]
    assert "Leave out --compile" in run("--prompt=a", "--json", "--compile", "--top-logprobs=2")[2]


def test_several_samples_are_printed_in_order_under_headers(run):
    arguments = ["chars", "--prompt=abba", "--prompt=c", "--num-samples=2", "--max-new-tokens=30", "--stop=a"]
    samples = [json.loads(line) for line in run(*arguments, "--json")[1].splitlines()]
    assert len({len(one["tokens"]) for one in samples}) > 1, "they should end at different steps"
    expected = ""
    for place, one in enumerate(samples):
        expected += f"--- prompt {place // 2 + 1}, sample {place % 2 + 1} ---\n{one['prompt']}{one['text']}\n"
    assert run(*arguments)[1] == expected
    out = run("chars", "--num-samples=3", "--max-new-tokens=4")[1]
    assert [line for line in out.splitlines() if line.startswith("---")] == [f"--- sample {n} ---" for n in (1, 2, 3)]


def test_the_same_command_writes_the_same_with_and_without_cache_and_another_seed_does_not(run):
    arguments = ["--prompt=abc", "--max-new-tokens=60", "--top-k=0", "--temperature=1"]
    first = run(*arguments)[1]
    assert run(*arguments)[1] == first and run(*arguments, "--no-cache")[1] == first
    assert run(*arguments, "--seed=2")[1] != first


def test_a_stop_text_ends_the_text_before_it(run):
    arguments = ["chars", "--prompt=abc", "--max-new-tokens=40", "--top-k=0", "--temperature=1", "--json"]
    text = json.loads(run(*arguments)[1])["text"]
    stop = text[20:23]
    found = json.loads(run(*arguments, "--stop", stop, "--stop=not there")[1])
    assert found["text"] == text[: text.index(stop)] and found["finish_reason"] == "stop"


def test_standard_input_is_a_prompt(run):
    code, out, _ = run("--prompt", "-", "--max-new-tokens=0", stdin="from a pipe 🙂\n".encode())
    assert (code, out) == (0, "from a pipe 🙂\n\n")


def test_a_byte_order_mark_is_no_part_of_a_prompt(run, place):
    mark = b"\xef\xbb\xbf"
    (place / "marked").write_bytes(mark + "é\r\n\ufeff".encode())
    assert run("--prompt=FILE:marked", "--max-new-tokens=0")[1] == "é\r\n\ufeff\n"
    assert run("--prompt=-", "--max-new-tokens=0", stdin=mark + b"a")[1] == "a\n"
    assert run("--interactive", "--max-new-tokens=0", stdin=mark + b"a\nb\n")[1] == "a\nb\n"


def test_a_prompt_longer_than_the_context_is_said_once_and_its_end_is_used(run):
    _, out, err = run("--prompt", "x" * 5 + "y" * 20, "--num-samples=2", "--json", "--max-new-tokens=9")
    assert err.count("\n") == 2 and "the prompt has 25 tokens; the model sees its last 16" in err
    _, end, err = run("--prompt", "y" * 16, "--num-samples=2", "--json", "--max-new-tokens=9")
    assert "sees" not in err
    assert [json.loads(line)["tokens"] for line in out.splitlines()] == [
        json.loads(line)["tokens"] for line in end.splitlines()
    ]


def test_each_line_of_a_conversation_is_continued_and_a_bad_one_is_said(run):
    arguments = ["chars", "--temperature=0", "--max-new-tokens=4"]
    code, out, err = run(*arguments, "--interactive", stdin=b"abc\nnot these\n\ndef")
    assert code == 0 and "error: the character 'n'" in err and err.count("error") == 1
    assert out == run(*arguments, "--prompt=abc")[1] + run(*arguments)[1] + run(*arguments, "--prompt=def")[1]
    lines = run(*arguments, "--interactive", "--json", stdin=b"abc\ndef\n")[1].splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["abc", "def"]


CHAT = ["odd/chat", "--chat", "--temperature=0", "--max-new-tokens=4"]


def test_a_chat_answers_each_line_in_view_of_what_was_said(run, place):
    code, out, err = run(*CHAT, "--json", "--system=Be.", stdin=b"one\n\ntwo\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err.count("\n") == 3 and err.count("the answer was cut off at 4 tokens") == 2
    said = [{"role": "system", "content": "Be."}]
    for line, question in zip(lines, ["one", "two"], strict=True):
        said.append({"role": "user", "content": question})
        assert list(line) == ["prompt", "text", "tokens", "finish_reason", "tokens_per_second"]
        assert line["prompt"] == said and len(line["tokens"]) == 4
        # The same asked as one prompt, whose ids are those of the chat template.
        asked = run(*CHAT, "--prompt", json.dumps(said), "--json")[1]
        assert json.loads(asked)["tokens"] == line["tokens"]
        said.append({"role": "assistant", "content": line["text"]})
    assert run(*CHAT, "--system=Be.", stdin=b"one\ntwo\n")[1] == "".join(line["text"] + "\n" for line in lines)


def test_a_prompt_of_a_chat_is_a_question_or_the_json_of_messages(run, place):
    messages = [{"role": "user", "content": "one"}]
    code, out, _ = run(*CHAT, "--prompt=one")
    assert code == 0 and out and not out.startswith("one")
    for prompt in (json.dumps(messages), json.dumps({"messages": messages})):
        assert run(*CHAT, "--prompt", prompt)[1] == out
    (place / "messages.json").write_text(json.dumps(messages, indent=2))
    assert run(*CHAT, "--prompt=FILE:messages.json")[1] == out
    with_system = json.dumps([{"role": "system", "content": "Be."}, *messages])
    assert run(*CHAT, "--prompt", with_system)[1] == run(*CHAT, "--prompt=one", "--system=Be.")[1]
    both = run(*CHAT, "--prompt=one", "--prompt=two", "--num-samples=2")[1]
    assert both.startswith("--- prompt 1, sample 1 ---\n" + out) and both.count("---\n") == 4


def test_an_answer_ends_with_the_token_that_ends_a_turn_by_the_template(place, monkeypatch):
    monkeypatch.chdir(place)
    _, tokenizer, _ = sample.load_model(["odd/chat"], "cpu", "float32")
    tokenizer.stop_ids = frozenset()  # as in a model whose settings do not name it
    open_chat(tokenizer)
    assert tokenizer.special_tokens["<|end|>"] in tokenizer.stop_ids


def test_a_chat_that_is_too_long_goes_on_without_its_beginning(run):
    code, out, err = run(*CHAT, stdin=b"0123456789abcd\n" * 6)
    assert code == 0 and len(out) > 6
    assert "the context is full: left out 2 turns from the beginning" in err and "sees its last" not in err
    code, _, err = run(*CHAT, stdin=b"x" * 100)
    assert code == 0 and "the prompt has 103 tokens; the model sees its last 64" in err


def test_dtype_is_that_of_the_weights_and_the_angles_of_rope_stay_exact(place, monkeypatch):
    monkeypatch.chdir(place)
    model, _, origin = sample.load_model(["odd/rope"], "cpu", "bfloat16")
    matrices = {layer.weight.dtype for block in model.blocks for layer in block.modules() if hasattr(layer, "few_rows")}
    others = {parameter.dtype for parameter in model.parameters()}
    # kernels.c reads matrices in 16 bits and computes in float32; without it all is in 16 bits.
    assert (matrices, others) in [({torch.bfloat16}, {torch.float32}), (set(), {torch.bfloat16})]
    assert model.rope_cos.dtype == torch.float32 and origin.endswith("on cpu, bfloat16") and not model.training


BAD = [
    (["--temprature=1"], "--temperature"),
    (["--temperature=-0.1"], "at least 0"),
    (["--temperature=nan"], "finite"),
    (["--temperature=inf"], "finite"),
    (["--temperature=warm"], "a number"),
    (["--top-k=-1"], "at least 0"),
    (["--top-k=2.5"], "whole"),
    (["--top-p=1.5"], "at most 1"),
    (["--top-p=nan"], "finite"),
    (["--min-p=-0.1"], "at least 0"),
    (["--min-p=2"], "at most 1"),
    (["--repetition-penalty=0"], "above 0"),
    (["--num-samples=0"], "at least 1"),
    (["--max-new-tokens=-1"], "at least 0"),
    (["--seed=-1"], "at least 0"),
    (["--stop="], "stop text"),
    (["--json=maybe"], "true or false"),
    (["--prompt"], "needs a value"),
    (["--prompt=FILE:missing.txt"], "missing.txt"),
    (["--prompt=FILE:out"], "out"),
    (["--prompt=FILE:binary"], "UTF-8"),
    (["--prompt=-", "--prompt=-"], "twice"),
    (["--prompt=\udcff"], "U+DCFF"),
    (["chars", "--prompt=xyz"], "'x'"),
    (["--interactive", "--prompt=x"], "--interactive"),
    (["--system=x"], "Add --chat"),
    (["--chat", "--num-samples=2"], "Leave out --num-samples"),
    (["--chat", "--compile"], "Leave out --compile"),
    (["--chat", "--prompt=[1"], "begins like JSON"),
    (["--chat", "--prompt=" + "[" * 99_999], "begins like JSON"),
    (["--chat", "--prompt=[]"], "not a list of messages"),
    (["--chat", "--prompt={}"], "not a list of messages"),
    (["--chat", '--prompt=[{"content": "x"}]'], "not a list of messages"),
    (["--chat", '--prompt=[{"role": "assistant", "content": "x"}]'], "is the assistant's"),
    (["--chat", "--system=x", '--prompt=[{"role": "system", "content": "x"}]'], "has a system message"),
    (["bytes", "--chat", "--prompt=x"], "no chat template"),
    (["odd/chat", "--chat", '--prompt=[{"role": "user"}]'], "message 1 is no text. Give other messages"),
    (["odd/chat", "--chat", '--prompt=[{"role": "tool", "content": "x"}]'], "message 1 is of the role tool"),
    (["--device=cuda:99"], "cuda:99"),
    (["--device=toaster"], "toaster"),
    (
        ["--compile", "--device=cpu"],
        "--compile is for CUDA; it is slower on a CPU (measured in bench/NOTES.md). Leave it out",
    ),
    (["--compile", "--no-cache"], "--no-cache"),
    (["--dtype=int8"], "float32"),
    (["bytes", "chars"], "chars"),
    (["nowhere"], "nowhere"),
    (["odd/empty"], "odd/empty"),
    (["prompt.txt"], "prompt.txt"),
    (["odd/cut"], "odd/cut"),
    (["odd/cut/checkpoints/step-00000003"], "damaged"),
    (["odd/changed"], "does not fit"),
    (["odd/future"], "does not fit"),
    (["odd/hf"], "config.json lacks vocab_size"),
]


@pytest.mark.parametrize("arguments, named", BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_a_mistake_is_one_line_and_exit_2(run, arguments, named):
    code, out, err = run(*arguments)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("error: ") and named in last
    others = [line for line in err.splitlines()[:-1] if not line.startswith("warning: ")]
    assert not others


def test_no_run_at_all_is_said(run, place, tmp_path, monkeypatch):
    done = run_script("sample.py", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no run under out/") and done.stderr.count("\n") == 1


def test_help_and_usage_errors_do_not_wait_for_torch(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import sample
from nib.common.exits import InputError
for arguments in (["--help"], ["--temprature=1"], ["--prompt=FILE:missing"], ["--stop="]):
    try:
        sample.main(arguments)
    except (SystemExit, InputError) as error:
        print(type(error).__name__)
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.endswith("SystemExit\nInputError\nInputError\nInputError\n")
        and "--repetition-penalty" in done.stdout
        and "--compile" in done.stdout
    )


@pytest.mark.parametrize("arguments", [["--num-samples=2"], ["--json"]])
def test_ctrl_c_prints_what_there_is_and_exits_130(place, arguments):
    # The char tokenizer has no end-of-text: this ends by the signal only. It comes once text is on its way.
    command = [sys.executable, str(ROOT / "sample.py"), "chars", "--max-new-tokens=1e9", *arguments]
    process = subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout and process.stderr
    try:
        process.stderr.readline()  # the model is loaded
        if "--json" in arguments:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)
        else:
            assert process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and err == b""
    if "--json" in arguments:
        found = json.loads(out)
        assert found["finish_reason"] == "interrupted" and len(found["text"]) > 0
        # The signal may fall between a token and its text.
        assert 0 <= len(found["tokens"]) - len(found["text"]) <= 1
    else:
        header, _, text = out.decode().rpartition("--- sample 2 ---\n")
        assert header and len(text) > 1 and text.endswith("\n")


def test_ctrl_c_gives_what_was_held_back_and_leads_back_to_the_prompt(run, monkeypatch):
    def interrupted(model, samples, options, make_rows):
        for letter in "abc":
            yield samples[0], samples[0].append("\n abc".index(letter))
        raise KeyboardInterrupt

    monkeypatch.setattr("nib.generation.terminal.stream_text", interrupted)
    code, out, _ = run("chars", "--prompt=h", "--stop=bcd", "--num-samples=2")
    assert (code, out) == (130, "--- sample 1 ---\nhabc\n--- sample 2 ---\nh\n")
    code, out, _ = run("chars", "--interactive", "--stop=bcd", stdin=b"a\nb\n")
    assert (code, out) == (0, "aabc\nbabc\n")


def test_a_reader_that_goes_away_ends_the_text_without_a_word(place):
    command = f"{sys.executable} {ROOT / 'sample.py'} chars --max-new-tokens=2e3 | head -c 20"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=place, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout)) == (1, 20) and done.stderr.count("\n") == 1, "not its model alone"


def test_a_run_that_was_moved_is_all_that_sampling_needs(place, tmp_path):
    shutil.copytree(place / "out/bytes/checkpoints/step-00000003", tmp_path / "alone")
    done = run_script("sample.py", "alone", "--prompt=abc", "--max-new-tokens=3", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("abc"), done.stderr
