"""Sizes and costs of fine-tunes before any of them runs.

The base model is built on the meta device, where tensors have shapes and no memory; adapters are put in
as in earnest, and what is then there is counted. So there is no formula here that could disagree with
what a run does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from .adapter_files.files import REPO_ID
from .adapter_files.peft_layout import PREFIX, header_metadata
from .adapter_files.writing import bias_place, in_file_form
from .bases import located
from .config import AdapterConfig
from .errors import ConfigError, KilotuneError, MissingExtraError, did_you_mean, first_line, without_network
from .injection.base_mark import LETTERS
from .known_names import DTYPE_NAMES
from .layers import stacked_sites as stacks
from .layers.adapted import AdaptedLayer
from .methods import method_of
from .model.parameter_report import ParameterReport, count_parameters
from .model.peft_model import PeftModel, get_peft_model

__all__ = [
    "BUILT_IN",
    "DTYPES",
    "AdapterCosts",
    "Base",
    "BuiltIn",
    "Head",
    "costs",
    "file_bytes",
    "load_base",
]

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
"""The dtypes that base weights can be planned in."""

CONFIG_NAME = "config.json"
TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
CHECKSUM = "0" * 64


# -- built-in models -------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Head:
    """Which head a transformers model gets.

    task: a TaskType for that task's head; None for the architecture that the configuration names. labels:
    of a classifier; None for the configuration's own number.
    """

    task: str | None = None
    labels: int | None = None


@final
@dataclass(frozen=True)
class BuiltIn:
    """A model that needs no file and no network.

    text: what it is. build: makes it, with a head (see :class:`Head`), on whatever device is the default
    then. notes: method -> a remark that belongs to its numbers.
    """

    text: str
    build: Callable[[Head], nn.Module]
    notes: Mapping[str, str] = field(default_factory=dict)


def _transformers(text: str, architecture: str, notes: Mapping[str, str] | None = None, /, **config: Any) -> BuiltIn:
    values = {"architectures": [architecture], **config}
    return BuiltIn(text, lambda head: _build(values, text, head), notes or {})


def _four_layer(head: Head) -> nn.Module:
    widths = (80, 120, 120, 120, 10)
    return nn.Sequential(*(nn.Linear(inn, out) for inn, out in pairwise(widths)))


def _llama(text: str, hidden: int, inner: int, layers: int, heads: int, **more: Any) -> BuiltIn:
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    values = {"model_type": "llama", "vocab_size": 32000, **shape, "num_attention_heads": heads, **more}
    return _transformers(text, "LlamaForCausalLM", **values)


def _gpt2(text: str, width: int, layers: int, heads: int) -> BuiltIn:
    return _transformers(text, "GPT2LMHeadModel", model_type="gpt2", n_embd=width, n_layer=layers, n_head=heads)


def _bert(text: str, kind: str, width: int, layers: int, heads: int, **more: Any) -> BuiltIn:
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    architecture = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM", "vit": "ViTModel"}[kind]
    return _transformers(text, architecture, model_type=kind, **shape, num_attention_heads=heads, **more)


def _gpt3() -> BuiltIn:
    # The sizes of Brown et al. 2020, Table 2.1. OPT has GPT-3's layers with query and value apart; its table
    # of positions has two rows more than positions, hence 2046.
    width, layers, heads = 12288, 96, 96
    shape = {"hidden_size": width, "ffn_dim": 4 * width, "word_embed_proj_dim": width, "num_hidden_layers": layers}
    note = (
        "GPT-3 in Table 1 of the VeRA paper: it prints 2.8M at r 16 and 8.7M at r 256. That is not what its own "
        "formula, L_tuned * (d_model + r), gives: 2.36M and 2.41M, as counted here."
    )
    return _transformers(
        "GPT-3 175B, in OPT's layout",
        "OPTForCausalLM",
        {"vera": note},
        model_type="opt",
        vocab_size=50257,
        max_position_embeddings=2046,
        num_attention_heads=heads,
        **shape,
    )


_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8}
_TIED = {**_LLAMA3, "tie_word_embeddings": True}

_SMOLLM2 = {"vocab_size": 49152, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192}

BUILT_IN: dict[str, BuiltIn] = {
    "four-layer": BuiltIn("linear layers 80-120-120-120-10, a textbook example", _four_layer),
    "bert-base": _bert("google-bert/bert-base-uncased", "bert", 768, 12, 12),
    "bert-large": _bert("google-bert/bert-large-uncased", "bert", 1024, 24, 16),
    "roberta-base": _bert("FacebookAI/roberta-base", "roberta", 768, 12, 12, **_ROBERTA),
    "roberta-large": _bert("FacebookAI/roberta-large", "roberta", 1024, 24, 16, **_ROBERTA),
    "smollm2": _llama("SmolLM2-135M-Instruct, which kilotune fetch brings", 576, 1536, 30, 9, **_SMOLLM2),
    "vit-base": _bert("google/vit-base-patch16-224-in21k", "vit", 768, 12, 12),
    "vit-large": _bert("google/vit-large-patch16-224-in21k", "vit", 1024, 24, 16),
    "gpt2": _gpt2("openai-community/gpt2", 768, 12, 12),
    "gpt2-medium": _gpt2("openai-community/gpt2-medium", 1024, 24, 16),
    "gpt2-large": _gpt2("openai-community/gpt2-large", 1280, 36, 20),
    "gpt2-xl": _gpt2("openai-community/gpt2-xl", 1600, 48, 25),
    "gpt3": _gpt3(),
    "llama-7b": _llama("Llama 7B and Llama 2 7B", 4096, 11008, 32, 32),
    "llama-13b": _llama("Llama 13B and Llama 2 13B", 5120, 13824, 40, 40),
    "llama-3.1-8b": _llama("meta-llama/Llama-3.1-8B", 4096, 14336, 32, 32, **_LLAMA3),
    "llama-3.2-1b": _llama("meta-llama/Llama-3.2-1B", 2048, 8192, 16, 32, head_dim=64, **_TIED),
    "llama-3.2-3b": _llama("meta-llama/Llama-3.2-3B", 3072, 8192, 28, 24, head_dim=128, **_TIED),
}
"""The built-in models by name; sizes from their public configurations."""


# -- the base model --------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Base:
    """A base model on the meta device: no weights, but all shapes.

    name: as the user gave it. origin: where the shapes come from. notes: as in :class:`BuiltIn`.
    """

    name: str
    origin: str
    model: nn.Module
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def report(self) -> ParameterReport:
        """The base's own counts, without adapters."""
        return count_parameters(self.model)

    @property
    def parameters(self) -> int:
        """The number of its parameters; tied ones count once."""
        return self.report.total

    def bytes_by_dtype(self) -> dict[str, int]:
        """The bytes of its weights in each of :data:`DTYPES`."""
        return {name: self.parameters * dtype.itemsize for name, dtype in DTYPES.items()}


def load_base(
    source: str,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    head: Head = Head(),
    built_in: Mapping[str, BuiltIn] = BUILT_IN,
) -> Base:
    """Build a base model on the meta device.

    Args:
        source: a config.json or its folder, a GGUF file, a built-in name, the name of a packaged model, or a hub id
            (the last two may need the network), tried in this order.
        dtype: a name of :data:`DTYPES`; by default what the configuration says, else float32.
        revision: a hub id's revision.
        head: which head a transformers model gets.
        built_in: the built-in models.

    Raises:
        ConfigError: no such source, or one that transformers cannot build.
        MissingExtraError: transformers is needed and not installed.

    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {list(DTYPES)}, got {dtype!r}.{did_you_mean(dtype, DTYPES)}")
    path = Path(source if source in built_in else located(source))
    file = path / CONFIG_NAME if path.is_dir() else path
    if source in built_in and not file.is_file():
        _refuse_revision(revision, source)
        found = built_in[source]
        base = Base(source, f"built in: {found.text}", _on_meta(lambda: found.build(head)), found.notes)
    elif path.exists() or source.endswith(".json"):
        _refuse_revision(revision, source)
        values = _read_json(file)
        base = Base(source, f"file: {file}", _on_meta(lambda: _build(values, str(file), head)))
    else:
        base = _from_hub(source, revision, head, built_in)
    if dtype is not None:
        base.model.to(DTYPES[dtype])
    return base


def _refuse_revision(revision: str | None, source: str) -> None:
    if revision is not None:
        raise ConfigError(f"revision {revision!r}: {source!r} is not on the hub, so it has none")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        where = f"{path.parent} holds no {path.name}" if path.parent.is_dir() else f"{path} is not there"
        raise ConfigError(where) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ConfigError(f"{path}: expected the configuration of a transformers model, with a 'model_type'")
    return values


def _from_hub(source: str, revision: str | None, head: Head, built_in: Mapping[str, BuiltIn]) -> Base:
    hint = did_you_mean(source, built_in)
    if not REPO_ID.fullmatch(source):
        raise ConfigError(f"{source!r} is no file, folder, built-in model or hub id (owner/name).{hint}")
    transformers = _need_transformers(f"{source!r} is not built in; reading it from the hub")
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers and the hub raise a dozen unrelated kinds
        raise ConfigError(
            f"{source!r} is no file, folder or built-in model here.{hint} Taken as a hub id, its configuration cannot "
            f"be had: {without_network(error, source)}"
        ) from error
    return Base(source, f"hub: {source}", _on_meta(lambda: _instance(config, source, head)))


def _need_transformers(purpose: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers", purpose) from error
    return transformers


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().eval()


def _build(values: Mapping[str, Any], where: str, head: Head) -> nn.Module:
    """A transformers model from the keys of its config.json."""
    transformers = _need_transformers(f"{where}: building a model of transformers")
    model_type = values["model_type"]
    if model_type not in transformers.CONFIG_MAPPING:
        hint = did_you_mean(model_type, transformers.CONFIG_MAPPING.keys())
        raise ConfigError(f"{where}: transformers {transformers.__version__} knows no model_type {model_type!r}.{hint}")
    rest = {key: value for key, value in values.items() if key not in ("model_type", "transformers_version")}
    try:
        config = transformers.AutoConfig.for_model(model_type, **rest)
    except Exception as error:  # transformers checks values with errors of several libraries
        raise ConfigError(f"{where}: {_all_lines(error)}") from error
    return _instance(config, where, head)


def _instance(config: Any, where: str, head: Head) -> nn.Module:
    """The model that ``config`` describes, with the head that is asked for."""
    if head.labels is not None:
        config.num_labels = head.labels
    try:
        model = _class_of(config, head.task)(config)
    except KilotuneError:
        raise
    except Exception as error:  # whatever a model's constructor does with wrong sizes
        raise ConfigError(f"{where}: transformers cannot build this model: {_all_lines(error)}") from error
    assert isinstance(model, nn.Module)
    dtype = getattr(config, "dtype", None)
    dtype = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    return model.to(dtype) if dtype is not None else model


def _class_of(config: Any, task: str | None) -> Callable[[Any], nn.Module]:
    """The first class that ``config.architectures`` names and transformers has, or the task's, or the headless."""
    transformers = _need_transformers("building a model of transformers")
    if task is not None and task not in TASK_CLASSES:
        raise ConfigError(
            f"task: expected one of {list(TASK_CLASSES)}, got {task!r}.{did_you_mean(task, TASK_CLASSES)}"
        )
    for name in config.architectures or () if task is None else ():
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    auto: Callable[[Any], nn.Module] = getattr(transformers, TASK_CLASSES[task or "FEATURE_EXTRACTION"]).from_config
    return auto


def _all_lines(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# -- costs -----------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class AdapterCosts:
    """What one configuration costs on one base model.

    method: its name. config: with the targets filled in. layers: how many are adapted. shapes: (out, in)
    -> how many of them. parameters: counts and bytes with one adapter in the model. file_bytes: of its
    adapter_model.safetensors, exactly. users: how many adapters of this kind there will be.
    """

    method: str
    config: AdapterConfig
    layers: int
    shapes: Mapping[tuple[int, int], int]
    parameters: ParameterReport
    file_bytes: int
    users: int = 1

    @property
    def adapter_bytes(self) -> int:
        """One adapter in memory: what it trains, in float32, and frozen factors that no other adapter shares."""
        counts = self.parameters
        return counts.total_bytes - counts.base_bytes - counts.shared_bytes

    @property
    def users_bytes(self) -> int:
        """All users' adapters in memory; the base and the projections are there once, beside them."""
        return self.users * self.adapter_bytes

    @property
    def users_file_bytes(self) -> int:
        """All users' adapter_model.safetensors on disk."""
        return self.users * self.file_bytes

    @property
    def training_bytes(self) -> int:
        """Training one adapter with AdamW, without activations: all weights, one gradient, two moments."""
        return self.parameters.total_bytes + 3 * self.parameters.trainable_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the derived numbers included."""
        values = {**self.config.to_dict(), **self.config.ours()}
        return {
            "method": self.method,
            "options": {key: value for key, value in values.items() if value not in (None, False, {}, [])},
            "layers": self.layers,
            "shapes": [{"out": out, "in": inn, "count": n} for (out, inn), n in self.shapes.items()],
            "parameters": self.parameters.to_dict(),
            "adapter_bytes": self.adapter_bytes,
            "file_bytes": self.file_bytes,
            "training_bytes": self.training_bytes,
            "users": self.users,
            "users_bytes": self.users_bytes,
            "users_file_bytes": self.users_file_bytes,
        }


def costs(model: nn.Module, config: AdapterConfig, users: int = 1) -> AdapterCosts:
    """Count what ``config`` costs on ``model``; the model is as it was afterwards.

    Args:
        model: the base model, best on the meta device (any other works, and takes the adapter's memory).
        config: the configuration.
        users: how many adapters of this kind there will be, >= 1.

    Raises:
        KilotuneError: whatever adding the adapter would raise.

    """
    if isinstance(users, bool) or not isinstance(users, int) or users < 1:
        raise ConfigError(f"users: expected a whole number >= 1, got {users!r}")
    adapted = get_peft_model(model, config.replace(inference_mode=False))  # counted as it is while it trains
    try:
        layers = adapted.adapted_layers()
        sites = [layer.site(name) for name, layer in layers.items() if layer.slot("default") is not None]
        own = [site for site in sites if _slot(layers[site.name]).method is not None]
        return AdapterCosts(
            method=method_of(config).name,
            config=adapted.peft_config["default"],
            layers=len(own),
            shapes=dict(Counter((site.out, site.inn) for site in own).most_common()),
            parameters=adapted.report(),
            file_bytes=file_bytes(adapted),
            users=users,
        )
    finally:
        adapted.unload()


def _slot(layer: AdaptedLayer) -> Any:
    return layer.slot("default")


def file_bytes(adapted: PeftModel) -> int:
    """The size that the adapter's adapter_model.safetensors would have, from its real export with no data."""
    file = in_file(adapted)
    return _safetensors_bytes(file.tensors, file.metadata)


@final
class InFile(NamedTuple):
    """A file's tensors with no data, by key; of these the biases and modules saved whole; its header's metadata."""

    tensors: Mapping[str, Tensor]
    whole: frozenset[str]
    metadata: Mapping[str, str]


def in_file(adapted: PeftModel) -> InFile:
    """What the file of the model's one adapter would hold."""
    slots = {name: _slot(layer) for name, layer in adapted.adapted_layers().items()}
    own = {name: slot for name, slot in slots.items() if slot.method is not None}
    params = {name: {key: _blank(p) for key, p in slot.own().items()} for name, slot in own.items()}
    some = next(iter(own.values()))
    installed = adapted.installed("default")
    export = stacks.export(some.method, {name: slot.site for name, slot in own.items()}, params, some.shared)
    tensors = in_file_form(export.tensors, installed, params)
    whole: dict[str, Tensor] = {}
    for name, slot in slots.items():
        if slot.trained_bias is not None:
            whole[bias_place(name, installed)] = slot.trained_bias
    for name, saved in installed.saved.items():
        twin = saved.modules_to_save[installed.key]
        whole.update({f"{PREFIX}{name}.{key}": value for key, value in twin.state_dict().items()})
    metadata = header_metadata(CHECKSUM, CHECKSUM, export.checksum, export.header, installed.base or "1" * LETTERS)
    return InFile({**tensors, **whole}, frozenset(whole), metadata)


def _blank(like: Tensor) -> Tensor:
    """Zeros of ``like``'s shape and dtype on the CPU that take no memory."""
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """The size of a safetensors file: 8 bytes, a JSON header padded to a multiple of 8, the data."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # The format's writer puts wide dtypes first, then goes by name.
    for key, value in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + value.numel() * value.element_size()
        name = SAFETENSORS_NAMES.get(value.dtype)
        if name is None:
            raise KilotuneError(f"{key}: {value.dtype} cannot be written to a safetensors file")
        header[key] = {"dtype": name, "shape": list(value.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (length + 7) // 8 * 8 + end
