"""What the options of a configuration need of the layers that they reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..candidates import Candidate
from ..config import AdapterConfig
from ..deltas import Need
from ..errors import TargetError, UnsupportedError, gather
from ..layers.adapted import AdaptedLayer
from ..name_rules import at_end, fits
from .targets import read_by_parent

__all__ = ["check_dropout", "check_layout", "check_patterns", "part_of"]


def check_layout(config: AdapterConfig, chosen: Sequence[Candidate], strict: bool) -> None:
    """Refuse ``fan_in_fan_out`` where no layer is so."""
    transposed = any(c.kind is not None and c.kind.stores_in_out for c in chosen)
    if strict and config.fan_in_fan_out and not transposed:
        raise UnsupportedError(
            "fan_in_fan_out=True, but no targeted layer stores its weight as (in, out); layers are recognised by "
            "themselves, so leave it False"
        )


def check_dropout(config: AdapterConfig, chosen: Sequence[Candidate], needs: frozenset[Need]) -> None:
    """Refuse dropout where no input of the adapter's own is: the layer runs with a weight that is built for it."""
    if config.dropout == 0 or Need.OUTPUT in needs:
        return
    built = [c for c in chosen if c.kind is not None and (c.kind.substitutes or read_by_parent(c))]
    if built and (plain := [c for c in built if c.kind is None or c.kind.parameter is None]):
        names = [name for name in config.option_names() if name.endswith("dropout")]
        raise UnsupportedError(
            f"{names[0] if names else 'dropout'}={config.dropout!r}: {plain[0].name!r} runs with the adapter in its "
            "weight, so there is no input of the adapter's own that dropout could act on; set it to 0, or leave such "
            "layers out with exclude_modules"
        )


def part_of(name: str, layers: Mapping[str, Candidate] | Mapping[str, AdaptedLayer]) -> str:
    """The adapted module whose part ``name`` is, which PEFT's patterns are held against; '' where there is none."""
    parent, _, own = name.rpartition(".")
    kind = layers[parent].kind if parent in layers else None
    return parent if kind is not None and own in kind.with_it else ""


def check_patterns(config: AdapterConfig, layers: Mapping[str, Candidate], strict: bool) -> None:
    """rank_pattern and alpha_pattern entries that fit no adapted layer have no effect: refuse them."""
    if not strict:
        return
    values = config.to_dict()
    faults = []
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in values.get(key, {}):
            if not any(at_end(key, pattern, part_of(name, layers) or name) for name in layers):
                faults.append(f"{key}: {pattern!r} fits no adapted layer")
    inputs = values.get("feedforward_modules")
    if isinstance(inputs, str) and not any(fits("feedforward_modules", inputs, name) for name in layers):
        faults.append(f"feedforward_modules: {inputs!r} fits no adapted layer")
    if faults:
        raise TargetError(gather("patterns that fit nothing:", faults))
