"""Methods. To add one: write one file with its config and its mathematics, and list it here.

A method says what delta its parameters make of a layer's matrix (out, in). It knows nothing of kinds and storages, and
its file imports `_base.py` and the floors below. Begin in bitfit.py, the shortest, or vera.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..config import CLOSED, AdapterConfig
from ..errors import ConfigError, did_you_mean
from ._base import Export, Kept, LowRankConfig, Method, Shared, Site
from .bitfit import Bitfit, BitfitConfig
from .bottleneck import Bottleneck, BottleneckConfig
from .c3a import C3a, C3aConfig
from .dora import Dora
from .fourierft import FourierFt, FourierFtConfig
from .ia3 import Ia3, Ia3Config
from .intrinsic import Intrinsic, IntrinsicConfig
from .lora import Lora, LoraConfig
from .loraxs import LoraXs, LoraXsConfig
from .miss import Miss, MissConfig
from .randlora import RandLora, RandLoraConfig
from .tinylora import TinyLora, TinyLoraConfig
from .unilora import UniLora, UniLoraConfig
from .vblora import VbLora, VbLoraConfig
from .vera import Vera, VeraConfig
from .waveft import WaveFt, WaveFtConfig

__all__ = [
    "METHODS",
    "PRESETS",
    "BitfitConfig",
    "BottleneckConfig",
    "C3aConfig",
    "Export",
    "FourierFtConfig",
    "Ia3Config",
    "IntrinsicConfig",
    "Kept",
    "LoraConfig",
    "LoraXsConfig",
    "LowRankConfig",
    "Method",
    "MissConfig",
    "RandLoraConfig",
    "Shared",
    "Site",
    "TinyLoraConfig",
    "UniLoraConfig",
    "VbLoraConfig",
    "VeraConfig",
    "WaveFtConfig",
    "get_config",
    "load_method",
    "make_method",
    "method_by_name",
    "method_of",
    "method_of_file",
]

OLD_DORA = "DORA_"  # before a peft_type in older files

METHODS: dict[str, type[Method[Any]]] = {
    method.name: method
    for method in (
        Lora,
        Vera,
        Intrinsic,
        UniLora,
        VbLora,
        Bitfit,
        Ia3,
        LoraXs,
        TinyLora,
        Bottleneck,
        C3a,
        FourierFt,
        Miss,
        RandLora,
        WaveFt,
    )
}

# Other names that a method can be picked by: the method, and the options that the name stands for.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "dvora": ("vera", {"use_dora": True}),
    **{name: ("bottleneck", {"placement": name}) for name in ("houlsby", "pfeiffer", "parallel")},
    "lora_fa": ("lora", {"lora_fa": True}),
}


def method_by_name(name: str) -> type[Method[Any]]:
    """The method called ``name`` (any case, so PEFT's ``peft_type`` serves as well).

    Raises:
        ConfigError: for an unknown name, with the nearest one.

    """
    method = METHODS.get(str(name).lower())
    if method is None:
        raise _unknown(name, METHODS)
    return method


def _unknown(name: str, known: Iterable[str]) -> ConfigError:
    names = sorted(known)
    return ConfigError(f"unknown method {name!r}.{did_you_mean(str(name), names)} Methods: {', '.join(names)}")


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
    return _in_dora(method_of(config)(config))


def load_method(config: AdapterConfig, extra: Mapping[str, Tensor], checksum: str | None) -> Method[Any]:
    """The method of an adapter that is being loaded; see :meth:`Method.from_file`."""
    return _in_dora(method_of(config).from_file(config, extra, checksum))


def method_of_file(peft_type: str) -> type[Method[Any]]:
    """The method that an adapter_config.json names by its ``peft_type``.

    Files that are closed to PEFT say ``KILOTUNE_VERA``; older ones of VeRA inside DoRA said ``DORA_VERA``.
    """
    return method_by_name(re.sub(f"^({CLOSED}|{OLD_DORA})", "", peft_type, flags=re.IGNORECASE))


def _in_dora(method: Method[Any]) -> Method[Any]:
    config = method.config
    return Dora(method) if isinstance(config, LowRankConfig) and config.use_dora else method


def get_config(method: str, **options: Any) -> AdapterConfig:
    """The configuration of a method picked by name: ``get_config("vera", r=64)``, ``get_config("dora", r=8)``.

    Raises:
        ConfigError: an unknown name, options that are wrong, or one that the name decides given another value.

    """
    name = str(method).lower()
    if name not in METHODS and name not in PRESETS:
        raise _unknown(method, {*METHODS, *PRESETS})
    whole, preset = PRESETS.get(name, (name, {}))
    for key, value in preset.items():
        if options.get(key, value) != value:
            raise ConfigError(
                f"{method!r} stands for {key}={value!r}, got {key}={options[key]!r}; take {whole!r} for it"
            )
    return METHODS[whole].config_cls(**{**preset, **options})
