"""A shared adapter of a store, merged into the base that vLLM loads: personal ones that stand on it are rows on top.

One a process: what is merged is in the weights, which all requests run. The merged model is a folder in kilotune's
cache, whose manifest says what is in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from ..adapter_files.content import content_sha256
from ..adapter_files.stands_on import StandsOn
from ..bases.cache import cache_folder, made, manifest_of
from ..errors import CheckpointError, ConfigError, UnsupportedError, first_line
from ..fleet.store import Fingerprint, Record
from ..model.peft_model import PeftModel
from .base_fingerprint import check_base, fingerprint_of_files, folder_of_model

__all__ = ["Merged", "check_merged", "merged_base", "merged_of"]

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"})
LARGEST = 100_000_000  # bytes of a file beside the weights
KEY = "merged"


@final
@dataclass(frozen=True)
class Merged:
    """What a merged folder is made of. on: the shared adapter. base: of the model before it was merged in."""

    on: StandsOn
    base: Fingerprint


def merged_of(model: str) -> Merged | None:
    """What is merged into an engine's model; None where it is no folder of :func:`merged_base`.

    Raises:
        CheckpointError: its manifest is damaged.

    """
    folder = Path(model)
    known = manifest_of(folder) if folder.is_dir() else None
    if known is None or KEY not in known:
        return None
    try:
        told = known[KEY]
        return Merged(StandsOn.from_dict(told["on"]), Fingerprint.from_json(json.dumps(told["base"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: what is merged into it cannot be read: {error}") from error


def check_merged(on: str | None, model: str) -> Merged | None:
    """Hold the setting ``on`` (NAME/3, or None) against what is merged into the engine's model.

    Raises:
        ConfigError: they differ; with what to do.

    """
    merged = merged_of(model)
    there = None if merged is None else f"{merged.on.name}/{merged.on.version}"
    if on == there:
        return merged
    how = "start it with python -m kilotune.vllm --on, or give the folder of merged_base() as the model"
    if on is None:
        raise ConfigError(f"on: is not set, and the model {model!r} has {there!r} merged into it; {how}")
    raise ConfigError(f"on: {on!r}, and the model {model!r} has {there or 'nothing'} merged into it; {how}")


def merged_base(model: str, record: Record) -> Path:
    """A base with a shared adapter merged into it, as a folder that vLLM loads; made once, in kilotune's cache.

    Args:
        model: the base's folder, or a hub id.
        record: the shared adapter, out of a store.

    Raises:
        CheckpointError: it is of another base, or the base has no safetensors files. UnsupportedError, MergeError: it
            cannot be merged (bottlenecks, a quantised base). ResourceError: there is no room in the cache.

    """
    what = f"on: the adapter {record.info.name!r} (version {record.info.version})"
    if record.info.stands_on is not None:
        raise ConfigError(f"{what} stands on {record.info.stands_on} itself, and a stack has two levels")
    base, file = fingerprint_of_files(model), record.file()
    if record.form.base is not None:
        check_base(record.form.base, base, what)
    on = StandsOn(record.info.name, record.info.version, content_sha256(file))
    name = f"{Path(model).name[:40]}-{base.sha256[:12]}-{on.sha256[:12]}-{on.version}"
    folder = cache_folder() / "merged" / name

    def make(place: Path) -> Mapping[str, Any]:
        _write(model, record, what, place)
        return {KEY: {"on": on.to_dict(), "base": json.loads(base.to_json())}}

    made(folder, make)
    return folder


def _write(model: str, record: Record, what: str, place: Path) -> None:
    from transformers import AutoModelForCausalLM

    try:
        plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto", use_safetensors=True)
    except Exception as error:  # of a dozen unrelated kinds
        raise CheckpointError(f"cannot load the base {model!r}: {first_line(error)}") from error
    if getattr(plain.config, "quantization_config", None) is not None:
        raise UnsupportedError(f"{what} cannot be merged into {model!r}, which is quantised: merging would round it")
    tied = getattr(plain.config, "tie_word_embeddings", False)
    adapted = PeftModel.from_pretrained(plain, record.file(), strict_base=True)
    with torch.no_grad():
        whole: Any = adapted.merge_and_unload(safe_merge=True)
    if tied and not whole.config.tie_word_embeddings:
        raise UnsupportedError(f"{what} changes one of two tied weights, which vLLM loads as one")
    whole.save_pretrained(place)
    for path in sorted(folder_of_model(model).iterdir()):
        beside = path.is_file() and path.suffix not in WEIGHTS and ".safetensors" not in path.name
        if beside and path.stat().st_size <= LARGEST and not (place / path.name).exists():
            shutil.copyfile(path, place / path.name)
