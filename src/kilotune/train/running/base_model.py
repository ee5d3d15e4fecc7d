"""The base model of a fine-tuning: loaded from a folder or a hub id, its head and padding set, an adapter put in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ...config import AdapterConfig
from ...errors import ConfigError, MissingExtraError, TargetError, UnsupportedError, first_line, without_network
from ...injection.targets import HEADS
from ...model.last_blocks import blocks_of, in_last_blocks
from ...model.peft_model import get_peft_model
from ...plan import DTYPES
from ..settings.places import BASE, base_place
from ..settings.sections import ModelSettings, TrainSettings
from ..tasks import Limits, Prepared, Task
from .held_dtype import fast_dtype

__all__ = [
    "Loaded",
    "adapt",
    "device_of",
    "heads_of",
    "hold_in_float32",
    "limits_of",
    "load_base",
    "load_config",
    "quantised",
    "set_padding",
]

HEAD_NAMES = tuple(dict.fromkeys(name for names in HEADS.values() for name in names))
# Their position numbers begin after the padding's, so that many fewer tokens fit than max_position_embeddings says.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text")
RELATIVE_POSITIONS = ("t5", "mt5", "umt5", "bloom")  # whatever number their configs hold, no position is too far


@final
@dataclass(frozen=True)
class Loaded:
    """A base model in memory.

    fresh: modules whose weights the files do not have, and that were drawn: a new head. notes: what to tell of it.
    """

    model: nn.Module
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def need_transformers(purpose: str) -> Any:
    """The package.

    Raises:
        MissingExtraError: it is not installed.

    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "train", purpose) from error
    return transformers


def device_of(wanted: str, name: str = "training.device") -> torch.device:
    """The device that ``training.device`` names, or what else the user calls it.

    Raises:
        ConfigError: cuda, and there is none.

    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{name}: cuda, but PyTorch sees no GPU here (kilotune doctor says more); use auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


# -- loading -----------------------------------------------------------------------------------------


def load_config(settings: ModelSettings, name: str = BASE) -> Any:
    """The base's transformers configuration, from a folder or a hub id; ``name`` is what the user calls that.

    Raises:
        ConfigError: there is no such folder, it holds no model, or the hub cannot give it; says what to do.

    """
    source = base_place(settings.base, settings.revision, name)
    transformers = need_transformers("training")
    with _told(settings, "configuration", name):
        return transformers.AutoConfig.from_pretrained(source, revision=settings.revision, trust_remote_code=False)


@contextlib.contextmanager
def _told(settings: ModelSettings, what: str, name: str) -> Iterator[None]:
    """What transformers or the hub raise becomes one line of ours; they raise a dozen unrelated kinds."""
    try:
        yield
    except (ConfigError, MissingExtraError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if Path(settings.base).is_dir():
            raise ConfigError(f"{name}: the {what} in {settings.base!r} cannot be had: {first_line(error)}") from error
        raise ConfigError(
            f"{name}: {settings.base!r} is no folder here, and its {what} cannot be had from the hub: "
            f"{without_network(error, settings.base)}"
        ) from error


def limits_of(config: Any) -> Limits:
    """What the model takes, by its configuration."""
    text = config.get_text_config()
    longest = None
    if config.model_type not in RELATIVE_POSITIONS:
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
            if isinstance(value := getattr(text, name, None), int) and value > 0:
                longest = value
                break
    if longest is not None and config.model_type in OFFSET_POSITIONS:
        longest -= (text.pad_token_id or 0) + 1
    return Limits(
        max_length=longest,
        pad_token_id=getattr(text, "pad_token_id", None),
        vocabulary=getattr(text, "vocab_size", None),
    )


def load_base(
    settings: ModelSettings, task: Task, prepared: Prepared | None, device: torch.device, name: str = BASE
) -> Loaded:
    """The base model with the task's head: on the CPU, or quantised on the fly and then on ``device``.

    Args:
        settings: which model, and how it is held.
        task: decides the class of the model.
        prepared: the data, which decides the head's labels; None takes the head as it is.
        device: where quantised weights are made.
        name: what the user calls the base.

    Raises:
        ConfigError: it cannot be had, or its files hold another architecture. MissingExtraError: a package is missing.

    """
    source = base_place(settings.base, settings.revision, name)
    transformers = need_transformers("training")
    options = dict(task.model_options(prepared)) if prepared is not None else {}
    if settings.quantization != "none":
        options["quantization_config"] = quantised(settings, transformers, device)
        options["device_map"] = {"": device}
    if settings.attention is not None:
        options["attn_implementation"] = settings.attention
    auto = getattr(transformers, task.auto_class)
    with _told(settings, "model", name):
        model, info = auto.from_pretrained(
            source,
            revision=settings.revision,
            dtype="auto" if settings.dtype == "auto" else DTYPES[settings.dtype],
            ignore_mismatched_sizes="id2label" in options or "num_labels" in options,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    drawn = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    fresh = _fresh_modules(model, drawn, f"{name}: the weights in {settings.base!r}")
    notes = (f"new, and trained whole: {', '.join(fresh)} (the files have no such weights)",) if fresh else ()
    return Loaded(model, fresh, notes)


def quantised(settings: ModelSettings, transformers: Any, device: torch.device) -> Any:
    """How bitsandbytes is to hold the frozen weights, and in what 4-bit ones are multiplied on ``device``."""
    try:
        import bitsandbytes  # noqa: F401  # transformers' own message is a page
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "quant", f"model.quantization {settings.quantization}") from error
    if settings.quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    compute = DTYPES.get(settings.dtype) or fast_dtype(device)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, bnb_4bit_use_double_quant=True
    )


def _fresh_modules(model: nn.Module, keys: Iterable[str], weights: str) -> tuple[str, ...]:
    """The modules that own the weights which the files lack; outermost heads are named whole."""
    names = model.state_dict()
    missing = sorted(key for key in keys if key in names)
    numbers = sum(names[key].numel() for key in missing)
    if numbers * 2 > sum(tensor.numel() for tensor in names.values()):
        raise ConfigError(
            f"{weights} do not belong to a {type(model).__name__}: {len(missing)} of its "
            f"{len(names)} tensors are not there, such as {missing[0]}"
        )
    owners = dict.fromkeys(key.rpartition(".")[0] for key in missing)
    whole = [name for name in HEAD_NAMES if isinstance(getattr(model, name, None), nn.Module)]
    return tuple(dict.fromkeys(next((w for w in whole if _inside(name, w)), name) for name in owners if name))


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def set_padding(model: nn.Module, processor: Any) -> None:
    """Tell a model that has no padding token which one the tokenizer pads with; a classifier has to skip it."""
    config, token = getattr(model, "config", None), getattr(processor, "pad_token_id", None)
    if config is None or token is None:
        return
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = token


# -- what is trained -----------------------------------------------------------------------------------


def adapt(loaded: Loaded, settings: TrainSettings, task: Task | None) -> nn.Module:
    """The model to train: an adapter in it, or, for ``full`` and ``head``, the model itself with that much unfrozen.

    What the files did not have, a fresh head, is trained whole and saved with the adapter.

    Raises:
        ConfigError, TargetError, UnsupportedError: what the adapter's configuration asks for is not possible.

    """
    method, model = settings.adapter.method, loaded.model
    if method == "full":
        if getattr(model, "is_quantized", False):
            raise UnsupportedError("adapter.method 'full': this model's weights are quantised, and cannot be trained")
        return _whole(nn.Module.float(model), settings.adapter.last_blocks, heads_of(loaded, task))
    heads = heads_of(loaded, task)
    if method == "head":
        return _head_only(model, heads)
    config = _config(settings, task, heads)
    if settings.adapter.last_blocks is not None:
        config = in_last_blocks(model, config, settings.adapter.last_blocks)
    hold_in_float32(model, _saved_names(config))
    return get_peft_model(model, config)


def _whole(model: nn.Module, last_blocks: int | None, heads: tuple[str, ...]) -> nn.Module:
    """``model`` with all weights trained, or those of its last blocks and its new heads."""
    if last_blocks is None:
        return model.requires_grad_(True)
    model.requires_grad_(False)
    blocks = blocks_of(model)
    for name in (*blocks.names(blocks.first_of(last_blocks)), *heads):
        model.get_submodule(name).requires_grad_(True)
    return model


def _config(settings: TrainSettings, task: Task | None, heads: tuple[str, ...]) -> AdapterConfig:
    more: dict[str, Any] = {"base_model_name_or_path": settings.model.base, "revision": settings.model.revision}
    if task is not None and task.task_type is not None:
        more["task_type"] = task.task_type
    config = settings.adapter.config(**more)
    saved = tuple(dict.fromkeys([*_saved_names(config), *heads]))
    return config.replace(modules_to_save=saved) if saved else config


def _saved_names(config: AdapterConfig) -> tuple[str, ...]:
    saved = config.modules_to_save
    return (saved,) if isinstance(saved, str) else tuple(saved or ())


def heads_of(loaded: Loaded, task: Task | None) -> tuple[str, ...]:
    """What is trained whole: what the files lack, and what a classifier ends in, by transformers' names for that."""
    ends = task is not None and task.auto_class not in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    known = [name for name in HEAD_NAMES if isinstance(getattr(loaded.model, name, None), nn.Module)]
    return tuple(dict.fromkeys([*loaded.fresh, *(known if ends else [])]))


def _head_only(model: nn.Module, heads: tuple[str, ...]) -> nn.Module:
    if not heads:
        getter = getattr(model, "get_output_embeddings", None)
        output = getter() if callable(getter) else None
        heads = tuple(name for name, module in model.named_modules() if output is not None and module is output)
    if not heads:
        raise TargetError("adapter.method 'head': this model has no head that is known by its name")
    hold_in_float32(model, heads)
    model.requires_grad_(False)
    for name in heads:
        model.get_submodule(name).requires_grad_(True)
    return model


def hold_in_float32(model: nn.Module, names: Iterable[str]) -> None:
    """Hold modules that are trained whole in float32: 16 bits would swallow the steps. Their input is widened."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    found = [m for name, m in model.named_modules() if any(name == n or name.endswith(f".{n}") for n in names)]
    for module in found:
        narrow = [p for p in module.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
        if narrow and all(users[id(p)] == 1 for p in module.parameters()):
            module.float()
            module.register_forward_pre_hook(_widen, with_kwargs=True)


def _widen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value
