"""Open a model: a run or checkpoint of nib, a Hugging Face directory or hub name, nanoGPT's ckpt.pt, an adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from nib.common.device import is_out_of_memory
from nib.common.exits import InputError
from nib.common.hub import MODEL_FILES, download, is_hub_name
from nib.common.wording import counted
from nib.formats.adapter import AdaptedModel
from nib.formats.checkpoint import RUNS, BrokenCheckpoint, Checkpoint, newest_run, open_checkpoint
from nib.formats.huggingface import HuggingFaceModel, find_config
from nib.formats.nanogpt import CHECKPOINT_FILE, NanoGPTCheckpoint
from nib.formats.peft import PeftAdapter, is_peft
from nib.formats.places import Shapes

if TYPE_CHECKING:
    from nib.data.dataset import Dataset

Source = Checkpoint | HuggingFaceModel | NanoGPTCheckpoint | AdaptedModel
Model = TypeVar("Model", bound=Any)
Config = TypeVar("Config")
KINDS = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}  # accepted types, by annotation


def open_source(target: str | None, adapter: str = "") -> Source:
    """The source that `target` names: a path, a run's name, or a hub name; None: the newest run.

    A LoRA run or a peft directory is opened together with its base. `adapter` names an adapter to merge into the
    target. Sources have `directory`, `model_config` (fields of model.GPTConfig) and `tokenizer()`. Raises InputError.
    """
    if adapter:
        merged = open_adapter(adapter)
        return with_base(merged) if target is None else AdaptedModel(open_source(target), merged)
    if target is None:
        target = str(newest_run())
    for path in (Path(target), RUNS / target):
        pickled = path if path.suffix == ".pt" else path / CHECKPOINT_FILE
        if pickled.is_file() and not (path / "checkpoints").exists():
            return NanoGPTCheckpoint(pickled)
        # A directory with config.json but without weights does not hide a run of the same name.
        if (config := find_config(path)) and any(map(is_weights, path.iterdir())):
            return HuggingFaceModel(path, config)
        if is_peft(path):
            return with_base(PeftAdapter(path))
        if checkpoint := open_checkpoint(path):
            return with_base(checkpoint)
    if is_hub_name(target):
        return HuggingFaceModel(download(target, MODEL_FILES))
    found = existing(target)
    if found is None:
        raise InputError(f"there is no run or checkpoint {target}. Give a directory such as {RUNS}/small")
    if find_config(found):
        return HuggingFaceModel(found)  # says which of its files are missing
    raise InputError(f"{found} is neither a run nor a checkpoint of nib. Give a directory such as {RUNS}/small")


def is_weights(path: Path) -> bool:
    """Whether a file of a Hugging Face directory holds weights of a model, not of an adapter."""
    return path.suffix in (".safetensors", ".bin") and not path.name.startswith("adapter_model.")


def existing(name: str) -> Path | None:
    """The path `name`, or the run of that name; None if there is neither."""
    return next((path for path in (Path(name), RUNS / name) if path.exists()), None)


def open_adapter(name: str) -> Checkpoint | PeftAdapter:
    """A peft directory, or a LoRA run or one of its checkpoints. Raises InputError."""
    path = existing(name)
    if path is None:
        raise InputError(f"there is no adapter {name}. Give a peft directory, or a LoRA run")
    checkpoint = open_checkpoint(path)
    if checkpoint and "adapter" not in checkpoint.state:
        raise InputError(f"{name} holds a whole model, not an adapter. Give it as the model, without --adapter")
    return checkpoint or PeftAdapter(path)


def base_name(adapter: Checkpoint | PeftAdapter) -> str:
    """The path or name of an adapter's base: its recorded directory if that exists, else the recorded name."""
    if isinstance(adapter, PeftAdapter):
        return adapter.base
    try:
        directory, name = (str(adapter.state["adapter"][key]) for key in ("base_directory", "base"))
    except (KeyError, TypeError):
        raise BrokenCheckpoint(f"{adapter.directory} does not name its base. Use another checkpoint") from None
    return directory if Path(directory).exists() else name


def with_base(found: Checkpoint | PeftAdapter) -> Checkpoint | AdaptedModel:
    """An adapter with the base it names; a checkpoint of a whole model is returned as it is. Raises InputError."""
    if isinstance(found, Checkpoint) and "adapter" not in found.state:
        return found
    try:
        return AdaptedModel(open_source(base_name(found)), found)
    except InputError as error:
        way = f"Give the base first: BASE --adapter {shlex.quote(str(found.directory))}"
        raise InputError(f"the base of {found.directory} cannot be opened: {str(error).rstrip('.')}. {way}") from None


def read_config(source: Source, kind: type[Config], **changes: Any) -> Config:
    """The settings of a source's model as `kind`, model.GPTConfig. Raises InputError if they do not fit it."""
    settings = source.model_config | changes
    try:
        inspect.signature(kind).bind(**settings)
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            kinds = KINDS.get(str(getattr(field.type, "__name__", field.type)))
            if kinds and field.name in settings and type(settings[field.name]) not in kinds:
                raise TypeError(f"its {field.name} is {settings[field.name]!r}")
    except TypeError as error:
        raise does_not_fit(source, error) from None
    try:
        return kind(**settings)
    except ValueError as error:  # any other is a bug in model.py
        raise does_not_fit(source, error) from None


def does_not_fit(source: Source, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"{source.directory} does not fit this model.py: {reason}. Use the one that trained it")


def build(source: Source, make_model: Callable[[], Model], sampling: bool = False) -> Model:
    """A model with the source's weights; `make_model` makes it with the source's settings.

    For `sampling` the weights stay memory-mapped until they are quantised or copied. Raises InputError if they do not
    fit the model.
    """
    model = without_drawing(make_model)
    weights = read_weights(source, make_model if model is None else lambda: model)
    assign = sampling or model is not None
    if model is None:
        model = make_model()
    elif not sampling:
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        weights = {
            name: tensor.to(dtypes.get(name), copy=True, memory_format=torch.contiguous_format)
            for name, tensor in weights.items()
        }
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise does_not_fit(source, error) from None
    return model


def read_weights(source: Source, make_model: Callable[[], Model]) -> dict[str, Tensor]:
    """The source's weights under the names of the model that `make_model` makes. Raises InputError."""
    return source.weights() if isinstance(source, Checkpoint) else source.weights(parameter_shapes(make_model))


def parameter_shapes(make_model: Callable[[], Model]) -> Shapes:
    """The shapes of a model's state dict. The model is made on the meta device if its constructor allows that."""
    model = None
    with torch.random.fork_rng([]):
        for buffers in ("cpu", "meta"):  # buffers on meta only for sizes beyond memory: torch's imports take a second
            with contextlib.suppress(Exception), torch.device(buffers), parameters_on_meta():
                model = model or make_model()
        model = model or make_model()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def without_drawing(make_model: Callable[[], Model]) -> Model | None:
    """A model with parameters on the meta device, to be loaded; None if it has to be made with real values.

    Drawing 1.5 B random weights takes 14 seconds. But a changed constructor may compute something that is not saved,
    such as a buffer, from random numbers or parameters, and two modules may share a parameter.
    """
    state, model = torch.get_rng_state(), None
    try:
        with parameters_on_meta():
            model = make_model()
    except Exception:  # it reads a parameter, or has a bug, which is raised again when it is made with real values
        pass
    drawn = not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    if model is None or drawn or any(buffer.is_meta for buffer in model.buffers()):
        return None
    parameters = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    shared = len(set(parameters)) < len(parameters)
    return None if shared or not all(parameter.is_meta for parameter in parameters) else model


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register in the body are moved to the meta device; buffers are computed as usual."""
    register, normal = nn.Module.register_parameter, nn.init.normal_

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if type(parameter) is nn.Parameter and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    def unless_meta(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        # On the meta device it would do nothing, but torch would import modules for a second.
        return tensor if tensor.is_meta else normal(tensor, *arguments, **options)

    nn.Module.register_parameter, nn.init.normal_ = on_meta, unless_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.init.normal_ = register, normal  # type: ignore[method-assign]


def take_vocabulary(source: Source, dataset: Dataset, name: str) -> None:
    """Check that the dataset's tokenizer is the source's, and add the source's stop ids to it.

    A dataset may have more special tokens, such as those of a chat template, if the source is a run of nib: the model
    then gets embeddings for them. Raises InputError if any other id differs.
    """
    size = source.model_config["vocab_size"]
    try:
        tokenizer = source.tokenizer()
    except InputError:
        if not isinstance(source, NanoGPTCheckpoint):  # whose directory may lack the tokenizer
            raise
        tokenizer = dataset.tokenizer
    known = len(tokenizer.token_bytes)
    added = dataset.tokenizer.token_bytes[known:]
    grows = isinstance(source, Checkpoint) and known == size and not any(added)
    if tokenizer.token_bytes != dataset.tokenizer.token_bytes[:known] or (added and not grows):
        what = f"{name} has {counted(size, 'token id')}, {dataset.directory} {dataset.vocab_size}"
        if size == dataset.vocab_size:
            what = f"{name} has another tokenizer than {dataset.directory}"
        raise InputError(f"{what}. Prepare the data with {shlex.quote('--tokenizer=' + name)}")
    if size < dataset.vocab_size and not added:  # the tokenizer has more ids than the model, mostly unused ones
        for split in (dataset.train, dataset.val):
            for begin in range(0, split.tokens, 1 << 22):
                largest = split.read(begin, begin + (1 << 22)).max()
                put = [dataset.tokenizer.end_of_text]
                tokenizer.check_ids([int(largest)], size, f"a text in {dataset.directory}", put)
    ends = {tokenizer.end_of_text, *tokenizer.stop_ids} - {dataset.tokenizer.end_of_text}
    dataset.tokenizer.stop_ids |= {end for end in ends if end is not None}
