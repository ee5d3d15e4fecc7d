"""What PEFT makes of targets before it looks for them, as options of ours.

- ``target_parameters`` may name a linear layer's own weight. Its change is then that of an adapter on the layer, which
  ``target_modules`` names here. Where the two are not the same thing, the name is left, and refused with a reason.
- ``target_modules=None`` beside ``target_parameters`` still means the architecture's own targets, where there are any.
- A long list of names becomes the few endings that take the same modules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, final

from torch import nn

from ..adapter_files.reading import AdapterFile, parse
from ..candidates import matches_names
from ..config import AdapterConfig
from ..errors import ConfigError
from ..injection.targets import resolve_targets
from ..injection.tree import is_parameter, unwrapped, walk
from ..kinds import kind_of
from ..methods import make_method
from ..name_rules import ends, first_at_end, named
from ..storage.dense import Dense

__all__ = ["MANY", "Settled", "minimal", "settled", "settled_file"]

MANY = 20  # names in a list of targets, from which on it is made shorter
OWN = "weight"
INSIDE_ATTENTION = "NonDynamicallyQuantizableLinear"  # whose attention reads the weight itself
PATTERNS = ("rank_pattern", "alpha_pattern")


@final
class Settled(NamedTuple):
    """weights: the names of the layers' own weights that were among ``target_parameters``."""

    config: AdapterConfig
    weights: list[str]


def settled(model: nn.Module, config: AdapterConfig) -> Settled:
    """A configuration as it is meant for a model.

    Args:
        model: the base, adapters in it or not.
        config: of the adapter, as one of ours.

    """
    modules = {name: unwrapped(module) for name, module, _ in walk(model, aliases=True) if not is_parameter(module)}
    if not config.target_parameters:
        return Settled(_condensed(config, modules), [])
    config = _with_defaults(model, config)
    names: list[str] = []
    taken: list[str] = []
    left: list[str] = []
    for target in config.target_parameters or ():
        owners = _owners(target, modules)
        if not owners or not all(_same(config, modules[name], name) for name in owners):
            left.append(target)
            continue
        short = target.removesuffix(f".{OWN}")
        names += [short] if short != target and {n for n in modules if named((short,), n)} == owners else sorted(owners)
        taken += [f"{name}.{OWN}" for name in modules if name in owners]
    if not names:
        return Settled(config, [])
    together = dict.fromkeys([*(config.target_modules or ()), *names])
    return Settled(config.replace(target_modules=tuple(together), target_parameters=tuple(left) or None), taken)


def settled_file(model: nn.Module, file: AdapterFile) -> tuple[AdapterFile, list[str]]:
    """A file whose configuration is settled, and the layers' own weights that it names."""
    if not file.config.target_parameters:
        return file, []
    config, weights = settled(model, file.config)
    if not weights:
        return file, []
    said: dict[str, Any] = {**file.files.config, "target_modules": list(config.target_modules or ())}
    said["target_parameters"] = list(config.target_parameters) if config.target_parameters else None
    header = {key: value for key, value in file.files.header.items() if key != "kilotune_config_sha256"}
    return parse(replace(file.files, config=said, header=header)), weights


# -- weights of layers -----------------------------------------------------------------------------------------


def _owners(target: str, modules: Mapping[str, nn.Module]) -> set[str]:
    """The names of the linear layers whose weights an entry takes; none where it takes anything else as well."""
    found = {
        (name, own)
        for name, module in modules.items()
        for own in module._parameters
        if named((target,), f"{name}.{own}" if name else own)
    }
    return {name for name, _ in found} if all(_is_own(modules[name], own) for name, own in found) else set()


def _is_own(module: nn.Module, own: str) -> bool:
    kind = kind_of(module)
    plain = kind is not None and kind.name == "linear" and type(module).__name__ != INSIDE_ATTENTION
    return own == OWN and plain and Dense().matches(module)


def _same(config: AdapterConfig, module: nn.Module, name: str) -> bool:
    """Whether an adapter on a layer's weight and one on the layer are the same thing, with these options."""
    listed = config.target_modules is None or isinstance(config.target_modules, tuple)
    plain = config.dropout == 0 and config.bias in ("none", "all")
    for option in ("use_dora", "fan_in_fan_out"):
        plain = plain and not getattr(config, option, False)
    elsewhere = matches_names(config.target_modules, name) if listed else True
    out = any(matches_names(config.exclude_modules, n, "exclude_modules") for n in (name, f"{name}.{OWN}"))
    return plain and not elsewhere and not out and all(_same_pattern(config, option, name) for option in PATTERNS)


def _same_pattern(config: AdapterConfig, option: str, name: str) -> bool:
    patterns: Mapping[str, Any] = getattr(config, option, None) or {}
    return bool(first_at_end(option, patterns, name, None) == first_at_end(option, patterns, f"{name}.{OWN}", None))


def _with_defaults(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    if config.target_modules is not None:
        return config
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        alone = config.replace(target_parameters=None)
        found = resolve_targets(alone, kind if isinstance(kind, str) else None, make_method(alone).default_targets)
    except ConfigError:  # no defaults for this architecture: the parameters alone
        return config
    return config.replace(target_modules=found.target_modules)


# -- long lists ------------------------------------------------------------------------------------------------


def minimal(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """The shortest endings of names that no other module's name ends with.

    Args:
        target_modules: whole names of modules.
        other_module_names: those of all others.

    Raises:
        ConfigError: no list of names, an empty name, or one that stands in both.

    """
    if isinstance(target_modules, str) or not target_modules or "" in target_modules:
        raise ConfigError(f"target_modules: expected names of modules, got {target_modules!r:.200}")
    if both := sorted({*target_modules} & {*other_module_names}):
        raise ConfigError(f"modules that are targets and are not: {', '.join(both[:5])}")
    taken = {end for name in other_module_names for end in ends(name)}
    return {min((end for end in ends(name) if end not in taken), key=len, default=name) for name in target_modules}


def _condensed(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> AdapterConfig:
    """The same targets in fewer words; as it was where it is short, or names what is not there."""
    listed = config.target_modules
    if not isinstance(listed, tuple) or len(listed) < MANY or getattr(config, "feedforward_modules", None):
        return config
    taken = [name for name in modules if name and matches_names(listed, name)]
    met = {end for name in taken for end in ends(name)}
    if not taken or not met >= {*listed}:
        return config
    short = minimal(taken, [name for name in modules if name and name not in set(taken)])
    return config.replace(target_modules=tuple(sorted(short))) if len(short) < len(listed) else config
