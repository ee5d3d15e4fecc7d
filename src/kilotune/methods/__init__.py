"""Methods. To add one: write one file with its config and its mathematics, and list it here."""

from __future__ import annotations

from typing import Any

from ..config import AdapterConfig
from ..errors import ConfigError, did_you_mean
from ._base import Export, Method, Shared, Site
from .lora import Lora, LoraConfig
from .vera import Vera, VeraConfig

__all__ = [
    "METHODS",
    "Export",
    "LoraConfig",
    "Method",
    "Shared",
    "Site",
    "VeraConfig",
    "get_config",
    "method_by_name",
    "method_of",
]

METHODS: dict[str, type[Method[Any]]] = {method.name: method for method in (Lora, Vera)}


def method_by_name(name: str) -> type[Method[Any]]:
    """The method called ``name`` (any case, so PEFT's ``peft_type`` serves as well).

    Raises:
        ConfigError: for an unknown name, with the nearest one.

    """
    method = METHODS.get(str(name).lower())
    if method is None:
        hint = did_you_mean(str(name), METHODS)
        raise ConfigError(f"unknown method {name!r}.{hint} Methods: {', '.join(sorted(METHODS))}")
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


def get_config(method: str, **options: Any) -> AdapterConfig:
    """The configuration of a method picked by name: ``get_config("vera", r=64)``."""
    return method_by_name(method).config_cls(**options)
