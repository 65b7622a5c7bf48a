"""Where a model comes from: a run or checkpoint of nib, a Hugging Face directory or hub name, nanoGPT's ckpt.pt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nib.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from nib.errors import InputError
from nib.hub import MODEL_FILES, download, is_hub_name
from nib.huggingface import HuggingFaceModel, is_hugging_face
from nib.nanogpt import CHECKPOINT_FILE, NanoGPTCheckpoint
from nib.words import counted

if TYPE_CHECKING:
    from nib.dataset import Dataset

Source = Checkpoint | HuggingFaceModel | NanoGPTCheckpoint
Model = TypeVar("Model", bound=Any)


def open_source(target: str | None, root: Path = Path("out")) -> Source:
    """What `target` names: a path, a run's name under `root`, or a hub name; None: the newest run.

    All have `directory`, `model_config` (the fields of model.GPTConfig), `state`, `weights()` and `tokenizer()`.
    Raises InputError.
    """
    if target is None:
        return open_checkpoint(find_checkpoint(None, root))
    path = Path(target) if Path(target).exists() else root / target
    if path.is_file() and path.suffix == ".pt":
        return NanoGPTCheckpoint(path)
    if (path / CHECKPOINT_FILE).is_file() and not (path / "checkpoints").exists():
        return NanoGPTCheckpoint(path / CHECKPOINT_FILE)
    if is_hugging_face(path):
        return HuggingFaceModel(path)
    if not path.exists() and is_hub_name(target):
        return HuggingFaceModel(download(target, MODEL_FILES))
    return open_checkpoint(find_checkpoint(target, root))


def build(source: Source, make_model: Callable[[dict[str, Any]], Model], sampling: bool = False) -> Model:
    """The model of a source; `make_model` makes one from settings of model.GPTConfig.

    For `sampling` weights may be of 8 bits, and stay in their file until they are quantised or copied. Raises
    InputError.
    """
    try:
        model = make_model(source.model_config)
        model.load_state_dict(source.weights(quantized=sampling), assign=sampling)
    except (TypeError, ValueError, RuntimeError) as error:
        fault = f"{source.directory} does not fit this model.py: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{fault}. Use the one that trained it") from None
    return model


def take_vocabulary(source: Source, dataset: Dataset, name: str) -> None:
    """Have the texts of a model trained on the dataset end as the source's do.

    Raises InputError unless the ids in the dataset mean to the model what it has learned.
    """
    size = source.model_config["vocab_size"]
    try:
        tokenizer = source.tokenizer()
    except InputError:
        if not isinstance(source, NanoGPTCheckpoint):  # which has no tokenizer of its own
            raise
        tokenizer = dataset.tokenizer
    if tokenizer.token_bytes != dataset.tokenizer.token_bytes:
        what = f"{name} has {counted(size, 'token id')}, {dataset.directory} {dataset.vocab_size}"
        if size == dataset.vocab_size:
            what = f"{name} has another tokenizer than {dataset.directory}"
        raise InputError(f"{what}. Prepare the data with --tokenizer={name}")
    if size < dataset.vocab_size:  # mostly by special tokens that were added later, and which no text has
        for split in (dataset.train, dataset.val):
            for begin in range(0, split.tokens, 1 << 22):
                largest = split.read(begin, begin + (1 << 22)).max()
                tokenizer.check_ids([int(largest)], size, str(dataset.directory))
    ends = {tokenizer.end_of_text, *tokenizer.stop_ids} - {dataset.tokenizer.end_of_text}
    dataset.tokenizer.stop_ids |= {end for end in ends if end is not None}
