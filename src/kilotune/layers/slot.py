"""One adapter's part of one layer: its trained parameters there, and what merging them would write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from ..deltas import Delta, Rescale, Shift
from ..methods import Method, Shared, Site
from ..weak import Weak, call
from .shared_inputs import SharedInput
from .stacked_sites import delta_of

__all__ = ["BIAS", "Merged", "Slot", "slot_key", "weakly"]

BIAS = "bias"
_TAKEN = frozenset(dir(nn.ModuleDict()))  # of an instance: those that __init__ sets as well


def slot_key(name: str) -> str:
    """An adapter's name as a key of ModuleDict, which allows no dots and no names of its own attributes."""
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"{key}%" if key in _TAKEN else key


@final
class Slot(nn.Module):
    """One adapter's part of one layer: its trained parameters, and the method that reads them.

    ``method`` is None where only the bias is trained. The trained bias is kept as the bias's full value,
    as PEFT writes it; its delta is the difference to the base's. ``inputs``: with whom the layer may share the
    product of its input and the first factor, and its place there. ``dropout``: a module, as in PEFT, so that what
    turns a model's dropout off, as TRL does, finds it. ``dropper``: what drops from an input in its place, where it is
    to draw from streams of its own. ``said``: what the adapter's options say of ``strength`` where that is a tensor.
    """

    def __init__(self, site: Site, method: Method[Any] | None, shared: Shared, params: Mapping[str, nn.Parameter]):
        super().__init__()
        self.site, self.method, self.shared = site, method, shared
        self.inputs: tuple[SharedInput, int] | None = None
        self.dropper: Callable[[Tensor], Tensor] | None = None
        self.said = 1.0
        dropout = 0.0 if method is None else method.config.dropout
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else None
        for name, parameter in params.items():
            self.register_parameter(name, parameter)

    @property
    def strength(self) -> float | Tensor:
        """How strongly the delta acts; a tensor (), where compiled code is to read it anew each time."""
        return self.site.strength

    @strength.setter
    def strength(self, value: float | Tensor) -> None:
        self.site = replace(self.site, strength=value)

    @property
    def trained_bias(self) -> Tensor | None:
        return self._parameters.get(BIAS)

    def values(self) -> dict[str, nn.Parameter]:
        """All its parameters."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    def own(self) -> dict[str, nn.Parameter]:
        """The method's parameters, without the trained bias."""
        return {name: p for name, p in self._parameters.items() if name != BIAS and p is not None}

    def changes(self, bias: bool) -> bool:
        """Whether it changes the layer's bias, or else what the layer makes of its input without it."""
        makes = None if self.method is None else self.method.makes
        if bias:
            return self.trained_bias is not None or makes in (Rescale, Shift)
        return makes not in (None, Shift)

    def delta(self) -> Delta | None:
        return self.delta_with(self.own(), self.shared)

    def delta_with(self, params: Mapping[str, Tensor], shared: Shared) -> Delta | None:
        """Its delta, with other values of its parameters and of the model's; None where only the bias is trained."""
        if self.method is None:
            return None
        delta = delta_of(self.method, self.site, params, shared)
        strength = self.strength
        plain = self.method.minds_strength or (not isinstance(strength, Tensor) and strength == 1.0)
        return delta if plain else delta.times(strength)

    def first_product(self, x: Tensor, a: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Z = a x as ``make`` computes it, or as it was made for another layer with the same input and ``a``."""
        if self.inputs is None:
            return make()
        shared, place = self.inputs
        return shared.z(place, x, a, make)

    @property
    def drops(self) -> bool:
        """Whether there is dropout on the adapter's input now."""
        return self.dropout is not None and self.dropout.training and self.dropout.p > 0.0

    def drop(self, x: Tensor) -> Tensor:
        if not self.drops or self.dropout is None:
            return x
        dropped: Tensor = self.dropout(x) if self.dropper is None else self.dropper(x)
        return dropped


def weakly(site: Site, layer: nn.Module) -> Site:
    """The site of ``layer`` for a slot in it, which does not keep it alive."""
    own = Weak(layer)
    return replace(
        site,
        read=partial(call, own, "base_matrix"),
        dtype=partial(call, own, "compute_dtype"),
        device=partial(call, own, "compute_device"),
        held=partial(call, own, "base_tensors"),
        gather=partial(call, own, "base_matrix", gather=True),
    )


@final
@dataclass(frozen=True)
class Merged:
    """What merging one layer would write: weight and bias (None: unchanged), and the rounding error.

    ``lost``: the norm of the part of the change that is rounded away when the weight is stored, over the
    change's. ``error``: the norm of the difference of the stored weight and the wanted one, over the wanted one's.
    """

    weight: Tensor | None
    bias: Tensor | None
    lost: float
    error: float
