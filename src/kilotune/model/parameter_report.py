"""Parameter counts by memory location, so that what is shared counts once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, cast, final

from torch import Tensor, nn

from .._ui.sizes import readable_bytes
from ..injection.tree import every_wrapper
from ..layers.adapted import AdaptedLayer
from ..layers.saved_module import SavedModule
from ..layers.slot import Slot
from ..projections.matrices import Projections
from ..storage import size_of

__all__ = ["ParameterReport", "count_parameters", "readable_bytes"]


@final
@dataclass(frozen=True)
class ParameterReport:
    """How many numbers a model holds, and in how many bytes.

    trainable: what gets gradients. frozen_base: the base's parameters that do not. frozen_adapters:
    parameters of adapters that are not being trained. frozen_shared: the projection matrices, each copy
    once. pairs: how many pairs of them. The bytes are of the tensors as they are held, in their dtypes;
    base_bytes are those of frozen_base. Buffers (running means, rotary tables) are not counted.
    """

    trainable: int
    frozen_base: int
    frozen_adapters: int
    frozen_shared: int
    pairs: int
    trainable_bytes: int
    base_bytes: int
    shared_bytes: int
    total_bytes: int

    @property
    def total(self) -> int:
        """All numbers, each memory location once."""
        return self.trainable + self.frozen_base + self.frozen_adapters + self.frozen_shared

    @property
    def percent(self) -> float:
        """Trainable numbers in percent of all."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    @property
    def percent_of_parameters(self) -> float:
        """Trainable numbers in percent of all parameters, the projections left out, as PEFT and tutorials count."""
        parameters = self.total - self.frozen_shared
        return 100.0 * self.trainable / parameters if parameters else 0.0

    def line(self) -> str:
        """One line in PEFT's form, and the shared projections after it."""
        text = (
            f"trainable params: {self.trainable:,} || all params: {self.total - self.frozen_shared:,} || "
            f"trainable%: {self.percent_of_parameters:.4f}"
        )
        return f"{text} || shared frozen projections: {self.frozen_shared:,}" if self.frozen_shared else text

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, the derived ones included."""
        derived = {
            "total": self.total,
            "percent": self.percent,
            "percent_of_parameters": self.percent_of_parameters,
        }
        return {**asdict(self), **derived}


def count_parameters(model: nn.Module) -> ParameterReport:
    """Count ``model``'s parameters and projections by memory location.

    Args:
        model: any module, with adapters or without; meta tensors are counted by object.

    """
    holders = [module for module in model.modules() if isinstance(module, Projections)]
    seen: set[tuple[object, ...]] = set()
    own = {id(p) for p in _adapter_parameters(model)}
    kept = (p for m in model.modules() if isinstance(m, AdaptedLayer) for p in m.kept_parameters())
    parameters = list(_unseen(chain(model.parameters(), kept), seen))
    trainable = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    base = [p for p in frozen if id(p) not in own]
    shared = list(_unseen((t for holder in holders for t in holder.tensors()), seen))
    return ParameterReport(
        trainable=_numbers(trainable),
        frozen_base=_numbers(base),
        frozen_adapters=_numbers(p for p in frozen if id(p) in own),
        frozen_shared=_numbers(shared),
        pairs=sum(len(holder.extents()) for holder in holders),
        trainable_bytes=_bytes(trainable),
        base_bytes=_bytes(base),
        shared_bytes=_bytes(shared),
        total_bytes=_bytes([*parameters, *shared]),
    )


def _adapter_parameters(model: nn.Module) -> Iterator[Tensor]:
    for module in every_wrapper(model):
        if isinstance(module, AdaptedLayer):
            yield from module.adapters.parameters()
            for slot in module.adapters.children():
                yield from cast(Slot, slot).shared.trained.values()
        elif isinstance(module, SavedModule):
            yield from module.modules_to_save.parameters()


def _unseen(tensors: Iterable[Tensor], seen: set[tuple[object, ...]]) -> Iterator[Tensor]:
    for tensor in tensors:
        place = _location(tensor)
        if place not in seen:
            seen.add(place)
            yield tensor


def _location(tensor: Tensor) -> tuple[object, ...]:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return (id(tensor),)
    if type(tensor.data) is not Tensor:  # of several parts, as torchao's: the whole has no place of its own
        return (id(tensor),)
    # Not the shape: a tied weight may be held transposed, or flattened.
    return (tensor.device, tensor.data_ptr(), tensor.numel())


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(size_of(t)[0] for t in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(size_of(t)[1] for t in tensors)
