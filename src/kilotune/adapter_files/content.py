"""What an adapter computes, in one hash, wherever it is kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..injection.installed_adapter import Installed
from .files import TwoFiles, tensors_checksum
from .peft_layout import BOOKKEEPING, SELECTION
from .reading import AdapterFile, parse
from .writing import state_of

__all__ = ["content_sha256", "file_of"]

# Options that choose where the adapter is, which the keys of its tensors say, or that matter before and in training.
FREE = BOOKKEEPING | SELECTION
FREE |= {
    "strict_targets",
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "bias",
    "fan_in_fan_out",
    "save_projection",
}
FREE |= {"init_weights", "init_lora_weights", "init_ia3_weights", "lora_fa", "save_indices", "save_factors"}
FREE |= {"strict_targets"}


def file_of(installed: Installed) -> AdapterFile:
    """An adapter in a model as if it had been saved and read."""
    return parse(TwoFiles(Path(installed.adapter), *state_of(installed)))


def content_sha256(file: AdapterFile) -> str:
    """SHA-256 (hexadecimal) of the method, the options that decide what it computes, and all tensors as float32.

    An adapter that was saved, put into a store in float32, or loaded into a model has the same. What training alone
    asks for (dropout, starts) does not matter, nor does the base. A start from which the change is counted does.
    """
    names = [name for name in file.config.option_names() if name not in FREE and not name.endswith("dropout")]
    options = {name: _plain(getattr(file.config, name)) for name in names}
    if file.config.part_of_base is not None:
        options["part_of_base"] = file.config.part_of_base
    wide = {key: value.float() if value.is_floating_point() else value for key, value in file.files.tensors.items()}
    text = json.dumps([type(file.config).__name__, options, tensors_checksum(wide)], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, (list, tuple, set, frozenset)) else value
