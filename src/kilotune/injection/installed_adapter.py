"""An adapter that is in a model, and what holds of several of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import nn

from ..added_modules import base_modules
from ..config import AdapterConfig
from ..deltas import Delta
from ..errors import UnsupportedError, gather
from ..layers.adapted import AdaptedLayer
from ..layers.saved_module import SavedModule
from ..layers.slot import Slot, slot_key
from ..methods import Method, Shared

__all__ = ["MODEL", "Installed", "check_compatible", "conflicts", "let_train", "set_requires_grad"]

MODEL = ""
"""In the place of a layer's name: of what an adapter trains once for the whole model."""


@final
@dataclass
class Installed:
    """An adapter that is in the model.

    base: the mark of the base that it came to (base_mark.py), or of its file where that base has none; None: neither.
    marks: what else the header of its file is to say of it, on what it stands for one.
    """

    adapter: str
    config: AdapterConfig
    method: Method[Any]
    shared: Shared
    layers: dict[str, AdaptedLayer]
    saved: dict[str, SavedModule]
    base: str | None = None
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The adapter's key in its layers and saved modules."""
        return slot_key(self.adapter)

    def slots(self) -> dict[str, Slot]:
        """The adapter's slots by the name of the layer."""
        found = {name: layer.slot(self.adapter) for name, layer in self.layers.items()}
        return {name: slot for name, slot in found.items() if slot is not None}

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All that the adapter trains, by ``<layer>.<parameter>``, modules saved whole included."""
        for name, slot in self.slots().items():
            for key, parameter in slot.named_parameters():
                if key not in self.method.frozen:
                    yield f"{name}.{key}", parameter
        yield from self.shared.trained.items()
        for name, saved in self.saved.items():
            for key, parameter in saved.modules_to_save[self.key].named_parameters():
                yield f"{name}.{key}", parameter

    def modules(self) -> Iterator[nn.Module]:
        """The modules that hold these parameters, each its own, and the adapter's frozen ones."""
        yield from self.slots().values()
        if isinstance(self.shared.trained, nn.ParameterDict):
            yield self.shared.trained
        for saved in self.saved.values():
            yield from saved.modules_to_save[self.key].modules()

    def freeze_others(self, root: nn.Module) -> None:
        """Freeze all of a model's parameters but these."""
        own = {id(parameter) for _, parameter in self.parameters()}
        for parameter in root.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)


def set_requires_grad(
    adapters: Mapping[str, Installed], perhaps_trained: set[str], active: Sequence[str], trained: Sequence[str]
) -> None:
    """Let active adapters train, and take all gradients from the others, and from what does not run.

    Args:
        adapters: all of a model's, by name.
        perhaps_trained: those that may have gradients now; the active ones afterwards. The others are not looked at,
            so that a change among thousands of adapters costs no more than one among two.
        active: the names of the active ones.
        trained: those of them that have gradients.

    """
    for name in {*(name for name in perhaps_trained if name in adapters), *active}:
        let_train(adapters[name], name in trained)
    _freeze_overruled({name: adapters[name] for name in active})
    perhaps_trained.clear()
    perhaps_trained.update(active)


def let_train(installed: Installed, train: bool) -> None:
    """Let one adapter train, unless it cannot, or freeze it and drop its gradients."""
    train = train and installed.method.untrainable is None
    for _, parameter in installed.parameters():
        parameter.requires_grad_(train)
        if not train:
            parameter.grad = None


def _freeze_overruled(active: Mapping[str, Installed]) -> None:
    """Take the gradients from copies of modules in whose place the copy of an adapter above runs."""
    seen: set[str] = set()
    for installed in reversed(list(active.values())):
        for module, saved in installed.saved.items():
            if module in seen:
                for parameter in saved.modules_to_save[installed.key].parameters():
                    parameter.requires_grad_(False)
                    parameter.grad = None
            seen.add(module)


def _overlaps(active: Mapping[str, Installed]) -> Iterator[str]:
    """Where one adapter changes something inside a module of which another has a copy of its own."""
    for name, installed in active.items():
        for module, saved in installed.saved.items():
            inside = {id(inner) for inner in base_modules(saved.original_module)}
            for other, its in active.items():
                parts: dict[str, AdaptedLayer | SavedModule] = {**its.layers, **its.saved}
                changed = [part for part, wrapper in parts.items() if other != name and id(wrapper) in inside]
                if changed:
                    yield f"module {module!r}: {name!r} replaces it whole, and {other!r} changes {changed[0]!r} in it"


def conflicts(active: Mapping[str, Installed]) -> list[str]:
    """Why adapters cannot act together, in this order: two that are not linear in one layer, or one that changes
    something inside a module that another replaces. Of two that replace one module, the last one's copy runs.
    """
    faults: list[str] = []
    rigid: dict[str, str] = {}
    for name, installed in active.items():
        makes: type[Delta] = installed.method.makes
        for layer in installed.layers if not (makes.additive or makes.mergeable) else ():
            if layer in rigid:
                faults.append(f"layer {layer!r}: {rigid[layer]!r} and {name!r} are both not linear")
            rigid[layer] = name
    return [*faults, *_overlaps(active)]


def check_compatible(active: Mapping[str, Installed]) -> None:
    """Refuse adapters that cannot be active together; see :func:`conflicts`."""
    if faults := conflicts(active):
        raise UnsupportedError(gather("these adapters cannot be active together:", faults))
