"""Settings from plain values, from a YAML file, and from ``a.b=c``; and the commented file of ``kilotune init``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...config import AdapterConfig
from ...errors import ConfigError, MissingExtraError, gather, nearest
from ...known_names import METHOD_OPTIONS, may_be_option
from .fields import Section, freeze, plain
from .sections import SECTIONS, AdapterSettings, TrainSettings, between

__all__ = ["load_settings", "merged", "read_config", "settings_from", "settings_text", "starting_text"]

WIDTH = 116


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
    if section is AdapterSettings and _is_option(name):
        hint = f" It is an option of the method: {section.key('options')}.{name}"
    elif homes:
        hint = f" Did you mean {homes[0].key(name)!r}?"
    elif close := nearest(name, section.known(), 1):
        hint = f" Did you mean {section.key(close[0])!r}?"
    else:
        hint = f" All: {', '.join(section.known())}"
    return f"{section.key(str(key))}: there is no such setting.{hint}"


def _is_option(name: str) -> bool:
    """Whether any method has this option."""
    if name in AdapterConfig.option_names() or any(name in own for own in METHOD_OPTIONS.values()):
        return True
    if not may_be_option(name):
        return False
    from ...methods import METHODS  # needs torch, which a wrong key does without

    return any(name in method.config_cls.option_names() for method in METHODS.values())


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


# -- YAML ------------------------------------------------------------------------------------------------


def load_settings(path: Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Settings from a YAML file, with ``a.b=c`` overrides.

    Raises:
        ConfigError: it cannot be read, is no YAML, or holds something wrong; all of it at once, with the place.
        MissingExtraError: PyYAML is not installed.

    """
    return settings_from(merged(read_config(path), overrides), str(path))


def read_config(path: Path) -> dict[str, Any]:
    """The nested values of a YAML file.

    Raises:
        ConfigError: it cannot be read, or is no YAML mapping; names the line.

    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"cannot read the config file {path}: {reason}") from error
    values = _parsed(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings with values (key: value), got {type(values).__name__}")
    return values


def _parsed(text: str, where: str) -> Any:
    yaml = _yaml()
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}{place}: no valid YAML: {problem}") from error
    except (ValueError, RecursionError) as error:  # a date that is none; nested too deep
        raise ConfigError(f"{where}: no valid YAML: {error}") from error


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("pyyaml", "train", "reading a config file") from error
    return yaml


def _loader() -> Any:
    """YAML's safe types, with numbers as everybody writes them (1e-3 is one), and no key twice."""
    yaml = _yaml()
    from .yaml_loader import loader_class

    return loader_class(yaml)


def merged(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``values`` with ``a.b=c`` put in; c is read as YAML, so ``[q_proj, v_proj]`` is a list and ``null`` is None.

    Raises:
        ConfigError: an override without ``=``, or one that goes through something that has no settings inside.

    """
    result: dict[str, Any] = {key: dict(v) if isinstance(v, Mapping) else v for key, v in values.items()}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set: expected KEY=VALUE, such as training.epochs=5, got {override!r}")
        put(result, name.strip(), _parsed(text, f"--set {override}"))
    return result


def put(values: dict[str, Any], name: str, value: Any) -> None:
    """Put one value at a dotted name into nested values.

    Raises:
        ConfigError: on the way there is something that has no settings inside.

    """
    *path, last = name.split(".")
    place = values
    for depth, key in enumerate(path, 1):
        inner = place.get(key)
        if inner is not None and not isinstance(inner, Mapping):
            raise ConfigError(f"{name}: {'.'.join(path[:depth])} is {inner!r}, and has no settings inside")
        place[key] = place = dict(inner or {})
    place[last] = value


# -- out -------------------------------------------------------------------------------------------------


def settings_text(settings: TrainSettings) -> str:
    """The settings as YAML, every one of them; :func:`load_settings` gives the same settings back."""
    return str(_yaml().safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True, width=WIDTH))


def starting_text(values: Mapping[str, Any]) -> str:
    """A config file to begin with: every setting with its help text; those that are not in ``values`` at their default.

    Args:
        values: nested, as in :func:`settings_from`.

    """
    lines = ["# kilotune train THIS_FILE; every setting and its default. docs/training.md tells more.", ""]
    lines += _entries(TrainSettings, values, "")
    for name, section in SECTIONS.items():
        inner = values.get(name) or {}
        lines += ["", f"# {(section.__doc__ or '').strip()}", f"{name}:", *_entries(section, inner, "  ")]
    return "\n".join(lines) + "\n"


def _entries(section: type[Section], values: Mapping[str, Any], indent: str) -> Iterable[str]:
    for name, default in section.defaults().items():
        yield from textwrap.wrap(
            section.help_of(name), WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        value = values.get(name, default)
        text = _yaml().safe_dump(plain(value), default_flow_style=True, width=10**6, allow_unicode=True)
        yield f"{indent}{name}: {text.removesuffix('...' + chr(10)).strip()}"  # a document's end, after a plain word
