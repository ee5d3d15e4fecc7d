"""PEFT's layout: how an adapter's tensors are called in its file, and what of ours stands beside PEFT's keys.

::

    folder/                      adapter "default"; others in folder/<name>/
      adapter_config.json        PEFT's keys; where PEFT is not to read the adapter, a peft_type that it does not know
                                 (``KILOTUNE_VERA``), and our options in a section "kilotune"
      adapter_model.safetensors  PEFT's key names; checksums in the header's metadata
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

from ..config import FORMAT_VERSION, SECTION
from ..errors import CheckpointError
from ..kinds import KINDS, LayerKind
from ..methods import Kept, Method
from ..storage import Storage

__all__ = [
    "BASE",
    "BOOKKEEPING",
    "EXTRA_PREFIX",
    "FACTORS",
    "PREFIX",
    "PROJECTIONS",
    "SELECTION",
    "Said",
    "bias_key",
    "bias_name_in_file",
    "config_checksum",
    "full_key",
    "header_metadata",
    "header_options",
    "said_of",
]

PREFIX = "base_model.model."
EXTRA_PREFIX = "base_model."
# Options that choose among the layers that target_modules names.
SELECTION = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
OPTIONS = "kilotune_options"  # in the weights' header
BASE = "kilotune_base"  # in the weights' header
PROJECTIONS = "projections_sha256"  # in the config's section of ours; in the weights' header with kilotune_ before it
FACTORS = "factors"  # there too: a fingerprint of factors of the base's weights
# Options that may be edited in a file, for they change no result.
BOOKKEEPING = frozenset({"base_model_name_or_path", "inference_mode", "revision", "task_type"})


def header_metadata(
    tensors: str,
    config: str,
    projections: str | None,
    options: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> dict[str, str]:
    """What the header of adapter_model.safetensors says of ours: up to three checksums (SHA-256, hexadecimal), options
    that PEFT can do without, and the base's mark."""
    metadata = {
        "format": "pt",
        "kilotune_format": str(FORMAT_VERSION),
        "kilotune_config_sha256": config,
        "kilotune_sha256": tensors,
    }
    if base is not None:
        metadata[BASE] = base
    if options:
        metadata[OPTIONS] = json.dumps(options, sort_keys=True)
    return metadata if projections is None else {**metadata, f"kilotune_{PROJECTIONS}": projections}


def header_options(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The options of ours in the weights' header."""
    try:
        options = json.loads(metadata.get(OPTIONS, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {OPTIONS} in its header is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise CheckpointError(f"{path}: {OPTIONS} in its header: expected an object, got {options!r}")
    return options


def config_checksum(config: Mapping[str, Any], options: Sequence[str]) -> str:
    """SHA-256 of the values in an adapter_config.json that change results; it ties the config to its weights."""
    decisive = {key: config[key] for key in options if key in config and key not in BOOKKEEPING}
    section = {key: value for key, value in config.get(SECTION, {}).items() if key != "weights"}
    text = json.dumps([decisive, section], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@final
class Said(NamedTuple):
    """What a method says of a key in its file.

    layer: the layer that the tensor is of; "" where it is of the whole model, or none of the method's.
    kept: what it is; None where it is none of the method's: a trained bias, or of a module saved whole.
    """

    layer: str
    kept: Kept | None


NOT_THE_METHODS = Said("", None)


def said_of(method: Method[Any], keys: Iterable[str]) -> dict[str, Said]:
    """What ``method`` says of each of a file's keys (``base_model.model.fc1.lora_A.weight``)."""
    ends: dict[str, Kept | None] = {}  # the layers of a file end alike
    found = {}
    for key in keys:
        if not key.startswith(PREFIX):
            found[key] = Said("", method.kept(key.removeprefix(EXTRA_PREFIX)))
            continue
        found[key] = NOT_THE_METHODS
        cut = len(key)
        while (cut := key.rfind(".", len(PREFIX), cut)) >= 0:
            end = key[cut + 1 :]
            if end not in ends:
                ends[end] = method.kept(_PLAIN.get(end, end))
            if (kept := ends[end]) is not None:
                found[key] = Said(key[len(PREFIX) : cut], kept)
                break
    return found


# How some kinds of layers call a method's tensors in a file -> how the method does.
_PLAIN = {theirs: own for kind in KINDS for own, theirs in kind.file_keys.items()}


def bias_name_in_file(name: str, kind: LayerKind, names: Mapping[str, str]) -> str:
    """The bias of a parameter stands in the module itself, inside all wrappers: the deepest name."""
    if kind.parameter is None or names[name] == name:
        return names[name]
    place = name.rpartition(".")[0]
    return max((n for whole, n in names.items() if whole.rpartition(".")[0] == place), key=len)


def bias_key(method: Method[Any] | None, storage: Storage) -> str:
    """The key of a layer's trained bias; of one that a method adapts too, it lies in the wrapped layer."""
    return storage.bias_name if method is None else f"base_layer.{storage.bias_name}"


def full_key(key: str, params: Mapping[str, Any]) -> str:
    """A method's key in the file, below the model if it is of one of the layers ``params``, else beside it."""
    place = key
    while place := place.rpartition(".")[0]:
        if place in params:
            return PREFIX + key
    return EXTRA_PREFIX + key
