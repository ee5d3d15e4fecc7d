"""Which optional packages are here, under PEFT's names."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

__all__ = [
    "is_bnb_4bit_available",
    "is_bnb_available",
    "is_torchao_available",
    "is_torchao_ge_v0_18_0",
    "is_transformers_ge_v5",
    "is_transformers_ge_v5_1_0",
    "is_transformers_ge_v5_6_0",
    "is_xpu_available",
]


def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed; all versions that are supported have 4 bits."""
    return is_bnb_available()


def is_torchao_available() -> bool:
    """Whether torchao is installed."""
    return importlib.util.find_spec("torchao") is not None


def is_xpu_available() -> bool:
    """Whether an Intel GPU is here."""
    return bool(torch.xpu.is_available())


def _at_least(package: str, *wanted: int) -> bool:
    """Whether a package is installed in this version or a later one."""
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    numbers = [int(part) for part in text.split("+")[0].split(".") if part.isdigit()]
    return numbers >= list(wanted)


is_transformers_ge_v5 = _at_least("transformers", 5)
is_transformers_ge_v5_1_0 = _at_least("transformers", 5, 1, 0)
is_transformers_ge_v5_6_0 = _at_least("transformers", 5, 6, 0)


def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao is installed in this version or a later one."""
    return _at_least("torchao", 0, 18, 0)
