"""export.py: what is written opens in transformers with the same logits, ids and text, or nothing is written."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Call, run_script
from data_helpers import TORTURE
from hf_helpers import MODELS, exported, greedy, load_ours, make_model, their_logits, weights_of
from model_helpers import LLAMA, random_model, random_tokens
from test_huggingface_tokenizer import CODE, gpt2_files
from test_huggingface_tokenizer import trained as trained_tokenizer
from test_load import hf_bytes
from test_sample import make_run

import evaluate
import export as script
import sample
from model import GPT, GPTConfig
from nib.common.exits import InputError
from nib.data.chat import Chat, fit_tokenizer
from nib.formats.checkpoint import write_checkpoint
from nib.formats.export import export
from nib.formats.huggingface import HuggingFaceModel
from nib.formats.load import open_source
from nib.tokenizer.huggingface import read_tokenizer, write_tokenizer
from nib.tokenizer.load import make_tokenizer
from nib.tokenizer.tokenizer import CharTokenizer, Tokenizer, train_bpe

BYTE = make_tokenizer("byte")
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 2 + 2? <|end|>"},
    {"role": "assistant", "content": "4, é."},
    {"role": "user", "content": "Sure?\n"},
]


def save_run(directory: Path, model: GPT, tokenizer: Tokenizer = BYTE, **state: Any) -> Path:
    from dataclasses import asdict

    state = {"step": 3, "model_config": asdict(model.config), **state}
    write_checkpoint(directory / "checkpoints", model.state_dict(), {}, state, tokenizer)
    return directory


def open_theirs(directory: Path, **options: Any) -> Any:
    """As a user opens it: every weight found, none left over."""
    import transformers

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return theirs.eval()


def check_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # As in test_huggingface.py.
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_comes_back(name: str, tmp_path: Path) -> None:
    kind, settings = MODELS[name]
    theirs = make_model(kind, **settings)
    theirs.save_pretrained(tmp_path / "in")
    write_tokenizer(CharTokenizer("".join(map(chr, range(40, 80)))), tmp_path / "in", 64)
    found = exported(tmp_path / "in", tmp_path / "out")
    expected = "LlamaForCausalLM" if kind == "Qwen2" else type(theirs).__name__
    assert found == expected
    again, tokens = open_theirs(tmp_path / "out"), random_tokens(2, 64)
    check_same_logits(their_logits(again, tokens), their_logits(theirs, tokens))
    prompt = random_tokens(1, 10, seed=1)
    assert greedy(lambda x: again(x).logits, prompt, 50) == greedy(lambda x: theirs(x).logits, prompt, 50)
    if kind != "Qwen2" and "attention" not in name and "no biases" not in name:  # which say the same in other words
        before, after = theirs.state_dict(), again.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


RMS = {**LLAMA, "vocab_size": 257, "tie_weights": True}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", {}),
    "GPT-2 without biases": ("GPT2", dict(bias=False, mlp="gelu")),
    "GPT-2, relu2, untied": ("GPT2", dict(mlp="relu2", tie_weights=False)),
    "small.py": ("Qwen3", dict(RMS, qk_norm=True)),
    "Llama": ("Llama", dict(RMS, n_kv_head=2, rope_base=500.0)),
    "Llama with biases": ("Llama", dict(RMS, bias=True, tie_weights=False)),
    "window": ("Mistral", dict(RMS, window=5, n_kv_head=1)),
    "Qwen3, window": ("Qwen3", dict(RMS, window=5, qk_norm=True)),
    "relu2": ("Arcee", dict(RMS, mlp="relu2")),
    "exact gelu and rmsnorm": ("Arcee", dict(RMS, mlp="gelu", bias=True)),
    "layernorm and rope": ("Starcoder2", dict(position="rope", n_kv_head=2)),
    "layernorm and rope without biases": ("Starcoder2", dict(position="rope", bias=False, window=6, mlp="gelu")),
}


@pytest.mark.parametrize("name", OURS)
def test_a_model_of_ours_opens_in_transformers_and_comes_back(name: str, tmp_path: Path) -> None:
    kind, settings = OURS[name]
    model = random_model(**{"vocab_size": 257, **settings})
    save_run(tmp_path / "run", model)
    assert exported(tmp_path / "run", tmp_path / "out").startswith(kind)
    theirs, tokens = open_theirs(tmp_path / "out"), random_tokens(3, 24, vocab_size=257)
    with torch.no_grad():
        check_same_logits(their_logits(theirs, tokens), model(tokens)[0])
    prompt = random_tokens(1, 4, seed=1)
    assert greedy(lambda x: theirs(x).logits, prompt, 20) == greedy(lambda x: model(x)[0], prompt, 20)
    again = load_ours(tmp_path / "out")
    for key, tensor in again.state_dict().items():
        before = model.state_dict().get(key)  # zero biases are what GPT-2 has for none
        assert torch.equal(tensor, before) if before is not None else not tensor.any(), key


def test_sixteen_bits_and_shards(tmp_path: Path) -> None:
    model = random_model(**RMS, qk_norm=True)
    run = save_run(tmp_path / "run", model)
    exported(run, tmp_path / "out", dtype="bfloat16", max_shard_bytes=20_000)
    shards = sorted(tmp_path.glob("out/model-*.safetensors"))
    assert len(shards) > 3 and all(path.stat().st_size < 23_000 for path in shards[1:])
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    tokens = random_tokens(2, 24, vocab_size=257)
    with torch.no_grad():  # the rounding of the weights is all that may differ
        check_same_logits(their_logits(open_theirs(tmp_path / "out", dtype=torch.float32), tokens), model(tokens)[0])
        # Computed in 16 bits: 8 bits of a number, lost some ten times on the way.
        low = their_logits(open_theirs(tmp_path / "out"), tokens).float()
        assert (low - model(tokens)[0]).abs().mean() < 0.05 * model(tokens)[0].abs().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(position="none"),
            r"has position=none with .*GPT2LMHeadModel, for a model trained with position=learned",
        ),
        (dict(position="sinusoidal"), "position=sinusoidal"),
        (dict(n_kv_head=2), "n_kv_head=2.* trained with n_kv_head=4"),
        (dict(qk_norm=True), "qk_norm=True"),
        (dict(RMS, mlp="relu2", qk_norm=True), "mlp=relu2 with|qk_norm=True with"),
        (dict(RMS, bias=True, qk_norm=True), "bias=True|qk_norm=True"),
        (dict(RMS, mlp="relu2", window=4), "mlp=relu2 with .* MistralForCausalLM"),
    ],
)
def test_options_that_no_architecture_has_are_named_with_the_nearest(
    options: dict, message: str, tmp_path: Path
) -> None:
    save_run(tmp_path / "run", random_model(**{"vocab_size": 257, **options}))
    with pytest.raises(InputError, match=message):
        exported(tmp_path / "run", tmp_path / "new/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with out/run: the options of small.py, a BPE of its own, trained until it says something."""
    place = tmp_path_factory.mktemp("trained")
    (place / "text.txt").write_text("".join(f"the number {n} and {n + 1} make {2 * n + 1}.\n" for n in range(3000)))
    arguments = "text.txt --out=data/sums --tokenizer=bpe:300 --val-fraction=0.1 --workers=1"
    assert run_script("prepare_data.py", *arguments.split(), cwd=place).returncode == 0
    options = (
        "--dataset=sums --n_layer=2 --n_head=2 --n_embd=64 --block_size=128 --batch_size=8 --max_iters=60 "
        "--warmup_iters=5 --eval_interval=30 --learning_rate=3e-3 --device=cpu"
    )
    done = run_script("train.py", *options.split(), cwd=place)
    assert done.returncode == 0, done.stderr
    return place


def test_a_trained_model_answers_in_a_pipeline_as_in_sample_py(trained: Path, tmp_path: Path) -> None:
    import transformers

    done = run_script("export.py", "run", str(tmp_path / "out"), cwd=trained)
    assert done.returncode == 0 and "as Qwen3ForCausalLM" in done.stdout, done.stderr
    options = "--prompt=the number 7 and --temperature=0 --max-new-tokens=60 --json".split(" --")
    options = [options[0], *(f"--{option}" for option in options[1:])]
    ours, again = (
        json.loads(run_script("sample.py", target, *options, cwd=trained).stdout)
        for target in ("run", tmp_path / "out")
    )
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "out"))
    text = pipeline("the number 7 and", max_new_tokens=60, do_sample=False)[0]["generated_text"]
    assert text == "the number 7 and" + ours["text"] and len(ours["tokens"]) == 60
    assert again["tokens"] == ours["tokens"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = open_source(str(trained / "out/run")).tokenizer().encode(TORTURE)
    assert tokenizer.encode(TORTURE, split_special_tokens=True) == expected and tokenizer.decode(expected) == TORTURE


def test_the_model_card_says_data_settings_and_result(trained: Path, tmp_path: Path) -> None:
    exported(trained / "out/run", tmp_path / "sums")
    card = (tmp_path / "sums/README.md").read_text()
    last = json.loads((trained / "out/run/metrics.jsonl").read_text().splitlines()[-1])
    result = f"step 60: {last['val_loss']:.4f} nats a token, {last['val_bits_per_byte']:.4f} bits per byte"
    for said in ("| dataset | sums |", "| optimizer | muon |", "| step | 60 |", "Qwen3ForCausalLM", "bpe:300", result):
        assert said in card, card
    theirs = open_theirs(tmp_path / "sums")
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 299


def test_an_exported_model_is_fine_tuned_and_exports_as_the_same(trained: Path, tmp_path: Path) -> None:
    hf_bytes(tmp_path / "hf", "Arcee")
    (tmp_path / "text.txt").write_text("abcabcabc\n" * 2000)
    assert run_script("prepare_data.py", "text.txt", "--tokenizer=hf", "--out=data/abc", cwd=tmp_path).returncode == 0
    options = "--init_from=hf --dataset=abc --batch_size=4 --max_iters=8 --log_interval=1 --learning_rate=1e-2"
    done = run_script("train.py", *options.split(), "--schedule=constant", "--warmup_iters=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/run/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 1
    assert exported(tmp_path / "out/run", tmp_path / "new") == "ArceeForCausalLM"
    before, after = (HuggingFaceModel(tmp_path / name) for name in ("hf", "new"))
    assert before.model_config == after.model_config and before.tokenizer().content == after.tokenizer().content
    open_theirs(tmp_path / "new")


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run", "takes a model and a new directory"),
        ("run run", "run exists. Give a new directory"),
        ("none new", "there is no run or checkpoint none"),
        ("run new --max-shard-size=big", "--max-shard-size is 'big', not a size"),
        ("run new --dtype=int8", "--dtype must be one of"),
        ("run file/new", "cannot write file/new"),
        ("chars new --format=gguf", "llama.cpp has no tokenizer like char"),
        ("exact new --format=gguf", "not for GPT2LMHeadModel with mlp=gelu. Use --format=hf"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(call: Call, command: str, message: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run", BYTE)
    make_run(tmp_path / "chars", CharTokenizer("\n abc"))
    save_run(tmp_path / "exact", random_model(vocab_size=257, mlp="gelu"))
    (tmp_path / "file").write_text("")
    done = call(script.main, *command.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chars", "exact", "file", "run"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    save_run(tmp_path / "run", random_model(vocab_size=257))

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, str(ROOT / "export.py"), "run", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: cannot write out: "), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# ---- GGUF ----------------------------------------------------------------------------------------------------------

IN_GGUF = {
    "GPT-2": {},
    "GPT-2, untied": dict(tie_weights=False),
    "Llama": dict(RMS, n_kv_head=2),
    "Llama with biases, untied": dict(RMS, bias=True, tie_weights=False),
    "Qwen3, small.py": dict(RMS, qk_norm=True),
    "Qwen3, grouped": dict(RMS, qk_norm=True, n_kv_head=2, rope_base=500.0),
    "Arcee": dict(RMS, mlp="relu2", n_kv_head=2),
}


def chat_run(directory: Path, kind: str) -> tuple[Path, Chat, GPT]:
    """A run whose tokenizer has a chat template, the template at work, and the model."""
    made = {"byte": make_tokenizer, "bpe": lambda _: train_bpe([TORTURE], 300)}
    characters = "".join(sorted(set("".join(message["content"] for message in MESSAGES))))
    tokenizer = made.get(kind, lambda _: CharTokenizer(characters))(kind)
    fit_tokenizer(tokenizer)
    model = random_model(**{**RMS, "vocab_size": tokenizer.vocab_size}, qk_norm=True, block_size=128, mlp_hidden=64)
    save_run(directory, model, tokenizer)
    return directory, Chat(tokenizer), model


@pytest.mark.parametrize("kind", ["byte", "bpe", "char"])
def test_a_chat_is_asked_and_ended_in_transformers_as_in_nib(kind: str, tmp_path: Path) -> None:
    import transformers

    run, chat, model = chat_run(tmp_path / "run", kind)
    exported(run, tmp_path / "out")
    end = chat.tokenizer.special_tokens["<|end|>"]
    ends = [id for id in (chat.tokenizer.end_of_text, end) if id is not None]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == (ends if len(ends) > 1 else end)
    assert (tmp_path / "out/chat_template.jinja").read_text("utf-8") == chat.tokenizer.chat_template
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = [{**message, "content": message["content"].replace("<|end|>", "")} for message in MESSAGES]
    ids = theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert ids == chat.prompt_ids(plain)
    assert theirs.apply_chat_template(MESSAGES, tokenize=False) == chat.render(MESSAGES)
    found = open_theirs(tmp_path / "out").generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0].tolist()
    expected = greedy(lambda x: model(x)[0], torch.tensor([ids]), 30)
    stops = [place for place, id in enumerate(expected) if id in ends]
    assert found[len(ids) :] == (expected[: stops[0] + 1] if stops else expected)
    again = read_tokenizer(tmp_path / "out")
    assert Chat(again).prompt_ids(MESSAGES) == chat.prompt_ids(MESSAGES)
    assert {again.end_of_text, *again.stop_ids} - {None} == set(ends)


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_numbers_too_large_for_float16_are_refused(kind: str, call: Call, tmp_path: Path) -> None:
    if kind == "gguf":
        pytest.importorskip("gguf")
    model = random_model(vocab_size=257, **LLAMA)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight[1, 1] = -7e4
    save_run(tmp_path / "run", model)
    with pytest.raises(InputError, match=r"mlp\.down_proj\.weight has numbers above 65504, the largest of float16"):
        exported(tmp_path / "run", tmp_path / "out", kind=kind, dtype="float16")
    assert not (tmp_path / "out").exists()
    exported(tmp_path / "run", tmp_path / "out", kind=kind, dtype="bfloat16")
    (tmp_path / "a.txt").write_text("a text")
    for main, arguments in ((sample.main, ["--prompt=a"]), (evaluate.main, ["--data=a.txt"])):
        done = call(main, "run", *arguments, "--device=cpu", "--dtype=float16", cwd=tmp_path)
        assert done.returncode == 2 and "blocks.0.mlp.down.weight has numbers above 65504" in done.stderr


def test_what_llama_cpp_does_otherwise_is_refused(tmp_path: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing

    relu2 = dict(LLAMA, mlp="relu2", bias=True, vocab_size=257)
    save_run(tmp_path / "biases", random_model(**relu2))
    models = {"biases": r"llama\.cpp has no biases in ArceeForCausalLM"}
    for name in ("before", "after"):
        made, directory = trained_tokenizer("smollm"), tmp_path / f"{name} files"
        if name == "before":
            made.pre_tokenizer = ByteLevel(add_prefix_space=True)
        else:
            tokens = [("<|begin|>", made.token_to_id("<|begin|>"))]
            made.post_processor = TemplateProcessing(single="$A <|begin|>", special_tokens=tokens)
        directory.mkdir()
        made.save(str(directory / "tokenizer.json"))
        tokenizer = read_tokenizer(directory)
        save_run(tmp_path / name, random_model(vocab_size=tokenizer.vocab_size, **LLAMA), tokenizer)
        models[name] = {"before": "puts no space before a text", "after": "puts nothing after a text"}[name]
    for name, message in models.items():
        with pytest.raises(InputError, match=message):
            exported(tmp_path / name, tmp_path / "out", kind="gguf")
        exported(tmp_path / name, tmp_path / f"{name} out")


def test_gguf_of_a_tokenizer_with_more_ids_than_the_model_and_an_end_after_each_text(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from tokenizers.processors import TemplateProcessing

    made = trained_tokenizer("smollm")
    end = made.token_to_id("<|endoftext|>")
    made.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)])
    size = made.get_vocab_size()
    made.add_special_tokens(["<pad>"])
    made.save(str(tmp_path / "tokenizer.json"))
    save_run(tmp_path / "run", random_model(vocab_size=size, **LLAMA), read_tokenizer(tmp_path))
    exported(tmp_path / "run", tmp_path / "out", kind="gguf")
    fields = gguf.GGUFReader(tmp_path / "out/out.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"].contents()) == size
    added = [fields[f"tokenizer.ggml.add_{side}_token"].contents() for side in ("bos", "eos")]
    assert added == [False, True]


def test_a_model_py_without_an_option_that_decides_the_architecture(tmp_path: Path) -> None:
    save_run(tmp_path / "run", random_model(vocab_size=257, **LLAMA))
    source = open_source(str(tmp_path / "run"))
    config = GPTConfig(**source.model_config)
    weights = source.weights()  # type: ignore[call-arg]
    for name in ("rope_attention", "window", "mlp"):
        del config.__dict__[name]
        if name != "mlp":
            export(source, config, weights, tmp_path / name)
            assert (tmp_path / name / "config.json").read_text() == (
                tmp_path / "rope_attention/config.json"
            ).read_text()
    with pytest.raises(InputError, match=r"this model\.py has no option mlp, which decides the architecture"):
        export(source, config, weights, tmp_path / "out")


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_gguf_has_the_chat_template_and_the_end_of_a_turn(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    run, chat, _ = chat_run(tmp_path / "run", kind)
    exported(run, tmp_path / "out", kind="gguf")
    fields = gguf.GGUFReader(tmp_path / "out/out.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == chat.tokenizer.chat_template
    assert fields["tokenizer.ggml.eot_token_id"].contents() == chat.tokenizer.special_tokens["<|end|>"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == chat.tokenizer.end_of_text


def llama_cpp_model(path: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python, which is compiled for minutes")
    kind = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(path), n_ctx=24, n_threads=1, verbose=False, logits_all=True, type_k=kind, type_v=kind, n_gpu_layers=0
    )


@pytest.mark.parametrize("name", IN_GGUF)
def test_llama_cpp_gives_the_same_logits_and_ids(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    source = Path(__file__).read_text(encoding="utf-8")
    tokenizer = train_bpe([source, TORTURE], 400) if "Qwen3" in name else BYTE
    model = random_model(**{**IN_GGUF[name], "vocab_size": tokenizer.vocab_size + 3, "mlp_hidden": 64})
    save_run(tmp_path / "run", model, tokenizer)
    exported(tmp_path / "run", tmp_path / "out", kind="gguf")
    theirs = llama_cpp_model(tmp_path / "out/out.gguf")
    text = TORTURE.replace("\x00", "")  # which ends a text of C
    assert theirs.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text)
    tokens = random_tokens(1, 20, vocab_size=tokenizer.vocab_size)
    theirs.eval(tokens[0].tolist())
    actual = torch.tensor(theirs.scores[:20])
    with torch.no_grad():
        expected = model(tokens)[0][0]
    # Its products are summed in other orders, its gelu is a table of float16, and its softmax approximates exp.
    limit = 2e-3 if "GPT-2" in name else 1e-4
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["qwen", "llama", "smollm", "gpt2"])
def test_llama_cpp_gives_the_ids_of_a_tokenizer_that_was_read(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    if kind == "gpt2":
        tokenizer = read_tokenizer(gpt2_files(tmp_path))
    else:
        trained_tokenizer(kind).save(str(tmp_path / "tokenizer.json"))
        tokenizer = read_tokenizer(tmp_path)
    save_run(tmp_path / "run", random_model(vocab_size=tokenizer.vocab_size, **LLAMA), tokenizer)
    exported(tmp_path / "run", tmp_path / "out", kind="gguf")
    theirs = llama_cpp_model(tmp_path / "out/out.gguf")
    for text in (
        "Plain words, it's 12345.67!\r\n\r\n\ttabs  and   runs  \n\n\n",
        CODE,
        "中文分词，没有空格。",
        "a<|im_end|>b",
    ):
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode_prompt(text), text


def test_llama_cpp_writes_the_text_of_sample_py(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    assert run_script("export.py", "run", str(tmp_path / "out"), "--format=gguf", cwd=trained).returncode == 0
    options = ["--prompt=the number 7 and", "--temperature=0", "--max-new-tokens=60", "--json"]
    ours = json.loads(run_script("sample.py", "run", *options, cwd=trained).stdout)["text"]
    theirs = llama_cpp.Llama(str(tmp_path / "out/out.gguf"), n_ctx=128, n_threads=1, verbose=False)
    text = theirs.create_completion("the number 7 and", max_tokens=60, temperature=0)["choices"][0]["text"]
    assert text == ours


@dataclass
class OwnConfig(GPTConfig):
    gate: str = "none"


def test_an_option_of_ones_own_is_exported_only_at_its_default(tmp_path: Path) -> None:
    source = open_source(str(save_run(tmp_path / "run", random_model(vocab_size=257))))
    config = OwnConfig(**source.model_config, gate="all")
    with pytest.raises(InputError, match=r"transformers has gate=all\. Export a model with gate=none"):
        export(source, config, source.weights(), tmp_path / "out")
    config.gate = "none"
    assert export(source, config, source.weights(), tmp_path / "out") == "GPT2LMHeadModel"
