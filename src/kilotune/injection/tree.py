"""The base model as a tree: walking it by its own names, and putting wrappers in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..added_modules import Added, base_modules
from ..errors import UnsupportedError
from ..layers.adapted import AdaptedLayer
from ..layers.adapted_parameters import AdaptedParameters
from ..layers.saved_module import SavedModule
from ..projections.matrices import Projections

__all__ = ["check_base", "is_parameter", "own_modules", "put_in_place", "unwrapped", "walk"]


def walk(root: nn.Module, aliases: bool = False) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """(dotted name in the base model, module or its wrapper, class of the parent), the root included.

    Names are those of the base model: what wrappers hold inside is passed over. An adapted parameter comes as a layer
    of its own, ``<module>.<parameter>``. With ``aliases`` a module
    that hangs at several places is given once for each of them.
    """
    seen: set[int] = set()

    def visit(
        name: str, module: nn.Module, parent: type[nn.Module]
    ) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
        if id(module) in seen and not aliases:
            return
        seen.add(id(module))
        yield name, module, parent
        if isinstance(module, (SavedModule, torch.jit.ScriptModule)) or is_parameter(module):
            return
        if isinstance(module, AdaptedParameters):
            for own, layer in module.adapted():
                yield from visit(f"{name}.{own}", layer, type(module.base_layer))
        for child_name, child in holder(module)._modules.items():
            if child is not None and not isinstance(child, Added):
                yield from visit(f"{name}.{child_name}" if name else child_name, child, type(holder(module)))

    yield from visit("", root, nn.Module)


def holder(module: nn.Module) -> nn.Module:
    """The module that holds the children: a wrapper's base."""
    return module.base_layer if isinstance(module, (AdaptedLayer, AdaptedParameters)) else module


def is_parameter(module: nn.Module) -> bool:
    """Whether this is an adapted parameter, which has its name and no module of its own."""
    return isinstance(module, AdaptedLayer) and module.kind.parameter is not None


def unwrapped(module: nn.Module) -> nn.Module:
    """The base model's own module behind a wrapper."""
    if isinstance(module, (AdaptedLayer, AdaptedParameters)):
        return module.base_layer
    return module.original_module if isinstance(module, SavedModule) else module


def own_modules(root: nn.Module) -> Iterator[nn.Module]:
    """The base model's own modules, each once: no wrappers, and nothing that adapters added."""
    wrappers = (AdaptedLayer, AdaptedParameters, SavedModule)
    return (module for module in base_modules(root) if not isinstance(module, wrappers))


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
    """Put ``new[module]`` wherever ``module`` hangs, in one pass over the model."""
    for parent in [holder(module) for _, module, _ in walk(root) if not is_parameter(module)]:
        if not isinstance(parent, (SavedModule, torch.jit.ScriptModule)):
            parent._modules.update({key: new[m] for key, m in parent._modules.items() if m is not None and m in new})
    for _, module, _ in walk(root):
        _set_fast_path(holder(module))


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
