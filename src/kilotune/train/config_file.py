"""Settings from plain values, from a YAML file, and from ``a.b=c``; and the commented file of ``kilotune init``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, gather, nearest
from ..methods import METHODS
from .fields import Section, freeze
from .settings import SECTIONS, AdapterSettings, TrainSettings, between

__all__ = ["settings_from"]


def settings_from(values: Mapping[str, Any], where: str = "settings") -> TrainSettings:
    """Settings from nested plain values, as a config file has them; absent ones have their defaults.

    Args:
        values: ``{"task": ..., "model": {"base": ...}, ...}``.
        where: what the values are from, for the headline of the message.

    Raises:
        ConfigError: for everything that is wrong in any section, at once, with the nearest valid names.

    """
    faults = [_unknown(TrainSettings, key) for key in values if key not in TrainSettings.known()]
    own = {key: values[key] for key in TrainSettings.names() if key in values}
    faults += TrainSettings.faults({**TrainSettings.defaults(), **own})
    parts: dict[str, dict[str, Any]] = {}
    for name, section in SECTIONS.items():
        given = values.get(name)
        if given is not None and not isinstance(given, Mapping):
            faults.append(f"{name}: expected settings with values, got {given!r}")
            continue
        parts[name] = {key: freeze(value) for key, value in (given or {}).items()}
        faults += [_unknown(section, key) for key in parts[name] if key not in section.known()]
        known = {key: value for key, value in parts[name].items() if key in section.known()}
        faults += section.faults({**section.defaults(), **known})
    if faults:
        raise ConfigError(gather(f"{where}:", faults))
    built = {name: section(**parts[name]) for name, section in SECTIONS.items()}
    if faults := between({**TrainSettings.defaults(), **own, **built}):
        raise ConfigError(gather(f"{where}:", faults))
    return TrainSettings(**own, **built)


def _unknown(section: type[Section], key: Any) -> str:
    """The line for a key that is not there: the nearest name of the same section, or where the key stands."""
    name = SYNONYMS.get(str(key), str(key))
    homes = [other for other in SECTIONS.values() if other is not section and name in other.known()]
    if section is AdapterSettings and any(name in method.config_cls.option_names() for method in METHODS.values()):
        hint = f" It is an option of the method: {section.key('options')}.{name}"
    elif homes:
        hint = f" Did you mean {homes[0].key(name)!r}?"
    elif close := nearest(name, section.known(), 1):
        hint = f" Did you mean {section.key(close[0])!r}?"
    else:
        hint = f" All: {', '.join(section.known())}"
    return f"{section.key(str(key))}: there is no such setting.{hint}"


# What people write for a setting whose name looks different.
SYNONYMS = {
    "lr": "learning_rate",
    "rank": "r",
    "targets": "target_modules",
    "output_dir": "output",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "gradient_accumulation_steps": "accumulation",
    "per_device_train_batch_size": "batch_size",
    "lr_scheduler_type": "schedule",
    "bf16": "precision",
    "base_model": "base",
    "load_in_4bit": "quantization",
}
