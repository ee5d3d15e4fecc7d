"""Methods. To add one: write one file with its config and its mathematics, and list it here."""

from __future__ import annotations

from typing import Any

from ..config import AdapterConfig
from ..errors import ConfigError, did_you_mean
from ._base import Export, LowRankConfig, Method, Shared, Site
from .lora import Lora, LoraConfig
from .vera import Vera, VeraConfig

__all__ = [
    "METHODS",
    "PRESETS",
    "Export",
    "LoraConfig",
    "LowRankConfig",
    "Method",
    "Shared",
    "Site",
    "VeraConfig",
    "get_config",
    "make_method",
    "method_by_name",
    "method_of",
]

METHODS: dict[str, type[Method[Any]]] = {method.name: method for method in (Lora, Vera)}

# Other names that a method can be picked by: the method, and the options that the name stands for.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {}


def method_by_name(name: str) -> type[Method[Any]]:
    """The method called ``name`` (any case, so PEFT's ``peft_type`` serves as well).

    Raises:
        ConfigError: for an unknown name, with the nearest one.

    """
    method = METHODS.get(str(name).lower())
    if method is None:
        known = sorted({*METHODS, *PRESETS})
        raise ConfigError(f"unknown method {name!r}.{did_you_mean(str(name), known)} Methods: {', '.join(known)}")
    return method


def method_of(config: AdapterConfig) -> type[Method[Any]]:
    """The method that ``config`` belongs to."""
    for method in METHODS.values():
        if method.config_cls is type(config):
            return method
    raise ConfigError(
        f"expected a configuration of kilotune ({', '.join(m.config_cls.__name__ for m in METHODS.values())}), "
        f"got {type(config).__module__}.{type(config).__name__}"
    )


def make_method(config: AdapterConfig) -> Method[Any]:
    """The method that ``config`` asks for."""
    return method_of(config)(config)


def get_config(method: str, **options: Any) -> AdapterConfig:
    """The configuration of a method picked by name: ``get_config("vera", r=64)``, ``get_config("dora", r=8)``.

    Raises:
        ConfigError: an unknown name, or options that are wrong.

    """
    if str(method).lower() in PRESETS:
        method, preset = PRESETS[str(method).lower()]
        options = {**preset, **options}
    return method_by_name(method).config_cls(**options)
