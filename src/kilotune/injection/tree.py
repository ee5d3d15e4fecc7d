"""The base model as a tree: walking it by its own names, and putting wrappers in and out."""

from __future__ import annotations

import copy
import gc
import weakref
from abc import ABC
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..added_modules import Added, base_modules
from ..errors import UnsupportedError
from ..layers.adapted import AdaptedLayer
from ..layers.adapted_parameters import AdaptedParameters
from ..layers.saved_module import SavedModule
from ..projections.matrices import Projections
from .held_modules import put_into_containers

__all__ = [
    "WRAPPERS",
    "AroundBase",
    "bare_copy",
    "bare_state",
    "check_base",
    "every_wrapper",
    "find",
    "held_tensors",
    "is_parameter",
    "layer_around",
    "merged_into",
    "own_modules",
    "put_in_place",
    "saved_around",
    "unwrapped",
    "walk",
    "wrappers",
]


WRAPPERS = (AdaptedLayer, AdaptedParameters, SavedModule)


class AroundBase(nn.Module, ABC):
    """A model with adapters, and the base in it: ``model``."""

    model: nn.Module


def walk(root: nn.Module, aliases: bool = False) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """(dotted name in the base model, module or its outermost wrapper, class of the parent), the root included.

    Names are those of the base model; :func:`wrappers` gives what lies between a wrapper and the base's module. An
    adapted parameter comes as a layer of its own, ``<module>.<parameter>``. With ``aliases`` a module that hangs at
    several places is given once for each of them.
    """
    seen: set[int] = set()

    def visit(
        name: str, module: nn.Module, parent: type[nn.Module]
    ) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
        if id(module) in seen and not aliases:
            return
        seen.add(id(module))
        yield name, module, parent
        own = unwrapped(module)
        if isinstance(own, torch.jit.ScriptModule) or is_parameter(module):
            return
        for host in wrappers(module):
            if isinstance(host, AdaptedParameters):
                for parameter, layer in host.adapted():
                    yield from visit(f"{name}.{parameter}", layer, type(own))
        for child_name, child in own._modules.items():
            if child is not None and not isinstance(child, Added):
                yield from visit(f"{name}.{child_name}" if name else child_name, child, type(own))

    yield from visit("", root, nn.Module)


def wrappers(module: nn.Module) -> Iterator[nn.Module]:
    """The wrappers at one place, the outermost first, and last the base model's own module.

    Adapters of different users meet here: one adapts a layer, another replaces it whole. What replaces a module lies
    around what adapts it, so that the rows of the others run through that.
    """
    while True:
        yield module
        if isinstance(module, SavedModule):
            module = module.original_module
        elif isinstance(module, (AdaptedLayer, AdaptedParameters)):
            module = module.base_layer
        else:
            return


def every_wrapper(root: nn.Module) -> Iterator[nn.Module]:
    """The wrappers at all places, each followed by what lies in it, and the base's own modules."""
    return (inner for _, module, _ in walk(root) for inner in wrappers(module))


def layer_around(module: nn.Module) -> AdaptedLayer | None:
    """The adapted layer among the wrappers at one place."""
    return next((inner for inner in wrappers(module) if isinstance(inner, AdaptedLayer)), None)


def merged_into(root: nn.Module) -> list[str]:
    """The names of the adapters that are merged into the weights of a base model now."""
    layers = (layer for _, module, _ in walk(root) if (layer := layer_around(module)) is not None)
    return list(dict.fromkeys(name for layer in layers for name in layer.merged))


def saved_around(module: nn.Module) -> SavedModule | None:
    """The wrapper of what adapters replace whole among those at one place."""
    return next((inner for inner in wrappers(module) if isinstance(inner, SavedModule)), None)


def find(root: nn.Module, name: str) -> nn.Module:
    """What hangs at a dotted name of the base model: a module, or its outermost wrapper."""
    module = root
    for part in name.split(".") if name else ():
        module = cast(nn.Module, unwrapped(module)._modules[part])
    return module


def is_parameter(module: nn.Module) -> bool:
    """Whether this is an adapted parameter, which has its name and no module of its own."""
    return isinstance(module, AdaptedLayer) and module.kind.parameter is not None


def unwrapped(module: nn.Module) -> nn.Module:
    """The base model's own module behind the wrappers at one place."""
    *_, own = wrappers(module)
    return own


def bare_copy(module: nn.Module) -> nn.Module:
    """A copy of the base's module behind the wrappers, with the base's weights whatever is merged, and no wrappers."""
    memo: dict[int, Any] = {}
    own = unwrapped(module)
    around = [*base_modules(own)]
    for wrapper in (m for m in reversed(around) if isinstance(m, WRAPPERS)):  # those inside first
        memo[id(wrapper)] = copy.deepcopy(unwrapped(wrapper), memo)
    twin = copy.deepcopy(own, memo)
    for layer in (m for m in (*wrappers(module), *around) if isinstance(m, AdaptedLayer) and m.merged):
        *_, kept = layer.snapshot()
        layer.storage.restore(memo[id(layer.base_layer)], copy.deepcopy(kept, memo))  # what is tied stays tied
    return twin


def bare_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base's module behind the wrappers, by the base's own names; what is merged is in it."""
    if not any(isinstance(inner, WRAPPERS) for inner in base_modules(module)):
        return dict(module.state_dict())
    found: dict[str, Tensor] = {}
    for name, inner, _ in walk(module, aliases=True):
        own, prefix = unwrapped(inner), f"{name}." if name else ""
        if isinstance(own, torch.jit.ScriptModule):  # a walk does not enter it
            own.state_dict(destination=found, prefix=prefix)
        elif not is_parameter(inner):
            own._save_to_state_dict(found, prefix, False)
    return found


def held_tensors(root: nn.Module) -> Iterator[Tensor]:
    """All tensors that a deep copy would copy, those that modules keep beside their parameters too."""
    apart = (type, ModuleType, FunctionType, BuiltinFunctionType, weakref.ref)
    seen: dict[int, Any] = {}
    left: list[Any] = [root]
    while left:
        found = left.pop()
        if id(found) in seen or isinstance(found, apart):
            continue
        seen[id(found)] = found
        if isinstance(found, Tensor):
            yield found
        else:
            left += gc.get_referents(found)


def own_modules(root: nn.Module) -> Iterator[nn.Module]:
    """The base model's own modules, each once: no wrappers, and nothing that adapters added."""
    return (module for module in base_modules(root) if not isinstance(module, WRAPPERS))


def check_base(model: nn.Module) -> None:
    """Refuse a base model that has adapters already, of kilotune or of PEFT, or layers without a shape."""
    if type(model).__name__ == "OptimizedModule":  # by name: importing torch._dynamo takes a second
        raise UnsupportedError("the model is compiled already; add adapters first, then torch.compile the whole")
    for name, module in model.named_modules():
        if isinstance(module, (AdaptedLayer, SavedModule, Projections)):
            raise UnsupportedError(
                f"the model has adapters of kilotune already (at {name or 'its root'!r}); use add_adapter() or "
                "load_adapter() of the wrapped model, or unload() it first"
            )
        if type(module).__module__.partition(".")[0] == "peft":
            raise UnsupportedError(
                f"the model has adapters of PEFT already (at {name or 'its root'!r}); unload() them first"
            )
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            raise UnsupportedError(f"{name!r} has no shape yet; run the base model once, then add adapters")


def put_in_place(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``new[module]`` wherever ``module`` hangs, and where it stands in a plain list, in one pass over the model;
    where that is in ``new`` too, the one after it, as where two wrappers go at once."""
    everywhere = [module for _, module, _ in walk(root) if not is_parameter(module)]
    for place in [place for module in everywhere for place in _places(module)]:
        place.update({key: _last(new, m) for key, m in place.items() if m is not None and m in new})
    for module in everywhere if new else ():
        put_into_containers(unwrapped(module), lambda inner: _last(new, inner))
    for _, module, _ in walk(root):
        _set_fast_path(unwrapped(module))


def _places(module: nn.Module) -> Iterator[dict[str, nn.Module | None]]:
    """Where modules of the base or wrappers hang: below the base's module, and inside what replaces it whole."""
    for inner in wrappers(module):
        if isinstance(inner, SavedModule) or not isinstance(inner, (*WRAPPERS, torch.jit.ScriptModule)):
            yield inner._modules


def _last(new: Mapping[nn.Module, nn.Module], module: nn.Module) -> nn.Module:
    while module in new:
        module = new[module]
    return module


# What turns torch's fast path off, by class. In eval an encoder layer reads the weights of its parts and skips
# wrappers; the encoder around it then hands over nested tensors, which only that path takes.
FAST_PATHS: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def _set_fast_path(module: nn.Module) -> None:
    for cls, switch, off in FAST_PATHS:
        if not isinstance(module, cls):
            continue
        kept = f"_kilotune_{switch}"
        if any(isinstance(inner, (AdaptedLayer, SavedModule)) for inner in module.modules()):
            module.__dict__.setdefault(kept, getattr(module, switch))
            setattr(module, switch, off)
        elif kept in module.__dict__:
            setattr(module, switch, module.__dict__.pop(kept))
