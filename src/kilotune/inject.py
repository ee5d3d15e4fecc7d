"""Walk the model, match, refuse, and only then put adapters in.

Everything that can go wrong is found in :func:`plan`, which changes nothing; :func:`apply` then cannot
fail half-way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from .config import AdapterConfig
from .deltas import Delta, Need
from .errors import TargetError, UnsupportedError, did_you_mean, gather
from .kinds import LayerKind
from .layer import AdaptedLayer
from .methods import Method, Shared, Site, make_method
from .projections import Projections
from .saved import SavedModule
from .slots import BIAS, ActiveState, Slot, slot_key
from .storage import Storage
from .targets import HEADS, Candidate, candidates, inside, matches_names, resolve_targets, saved_whole, select

__all__ = ["Plan", "SavedModule", "apply", "plan", "remove", "walk"]


@final
@dataclass
class Plan:
    """What adding one adapter will do; made by :func:`plan`, carried out by :func:`apply`."""

    adapter: str
    config: AdapterConfig
    method: Method[Any]
    layers: dict[str, Candidate]
    bias_only: dict[str, Candidate]
    saved: dict[str, nn.Module]
    shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # module -> the one inside it that has the same bias


@final
@dataclass
class Installed:
    """An adapter that is in the model."""

    adapter: str
    config: AdapterConfig
    method: Method[Any]
    shared: Shared
    layers: dict[str, AdaptedLayer]
    saved: dict[str, SavedModule]

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
            for key, parameter in saved.copies[self.key].named_parameters():
                yield f"{name}.{key}", parameter


def walk(root: nn.Module, aliases: bool = False) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """(dotted name in the base model, module or its wrapper, class of the parent), the root included.

    Names are those of the base model: what wrappers hold inside is passed over. With ``aliases`` a module
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
        if isinstance(module, (SavedModule, torch.jit.ScriptModule)):
            return
        for child_name, child in _holder(module)._modules.items():
            if child is not None:
                yield from visit(f"{name}.{child_name}" if name else child_name, child, type(_holder(module)))

    yield from visit("", root, nn.Module)


def _holder(module: nn.Module) -> nn.Module:
    """The module that holds the children: an adapted layer's base."""
    return module.base_layer if isinstance(module, AdaptedLayer) else module


def unwrapped(module: nn.Module) -> nn.Module:
    """The base model's own module behind a wrapper."""
    if isinstance(module, AdaptedLayer):
        return module.base_layer
    return module.original_module if isinstance(module, SavedModule) else module


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


# -- plan ------------------------------------------------------------------------------------------


def plan(
    root: nn.Module,
    adapter: str,
    config: AdapterConfig,
    method: Method[Any] | None = None,
    strict: bool = True,
) -> Plan:
    """Find what ``config`` adapts in ``root``, and everything that is wrong with it; changes nothing.

    Args:
        root: the base model, adapters in it or not.
        adapter: the new adapter's name.
        config: the configuration as the user gave it.
        method: the method, when a checkpoint brought more than a config; made from ``config`` otherwise.
        strict: names that match nothing are errors.

    Raises:
        TargetError, ConfigError, UnsupportedError: what cannot be done, and why.

    """
    method = make_method(config) if method is None else method
    config = resolve_targets(config, _model_type(root), method.default_targets)
    config = _with_heads(root, config)
    found = _candidates(root, aliases=False)
    saved = _saved_modules(root, config, strict)
    needs = method.makes.needs
    chosen = select(_candidates(root, aliases=True), config, needs, _output_names(root), strict)
    layers = {c.name: c for c in chosen}
    tied = _tied_biases(found)
    bias_only = _bias_only(found, config, layers, tied)
    _check_saved_overlap(root, saved, {**layers, **bias_only})
    _check_layout(config, chosen, strict)
    method.config = config
    result = Plan(adapter, config, method, layers, bias_only, saved, tied=tied)
    result.shapes = _expected_shapes(result)
    _check_patterns(config, layers, strict)
    return result


def _candidates(root: nn.Module, aliases: bool) -> list[Candidate]:
    found = ((name, unwrapped(module), parent) for name, module, parent in walk(root, aliases) if name)
    return candidates(item for item in found if not isinstance(item[1], torch.jit.ScriptModule))


def _model_type(root: nn.Module) -> str | None:
    found = getattr(getattr(root, "config", None), "model_type", None)
    return found if isinstance(found, str) else None


def _with_heads(root: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """For classification tasks the model's head is trained whole, as in PEFT."""
    heads = HEADS.get(config.task_type or "", ())
    present = [name for name in heads if isinstance(getattr(root, name, None), nn.Module)]
    names = tuple(dict.fromkeys([*(config.modules_to_save or ()), *present]))
    return config.replace(modules_to_save=names) if names else config


def _output_names(root: nn.Module) -> frozenset[str]:
    """The names of the output embedding of a transformers model; 'all-linear' leaves them out."""
    getter = getattr(root, "get_output_embeddings", None)
    try:
        output = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError, TypeError):  # transformers raises where a model has none
        output = None
    return (
        frozenset(name for name, module, _ in walk(root, aliases=True) if module is output) if output else frozenset()
    )


def _saved_modules(root: nn.Module, config: AdapterConfig, strict: bool) -> dict[str, nn.Module]:
    names = config.modules_to_save or ()
    modules = [(name, module) for name, module, _ in walk(root, aliases=True) if name]
    saved = {name: module for name, module in modules if saved_whole(names, name)}
    missing = [n for n in names if not any(saved_whole((n,), name) for name in saved)]
    if missing and strict:
        last = {name.rpartition(".")[2] for name, _ in modules}
        faults = [f"modules_to_save: no module is called {n!r}.{did_you_mean(n, last)}" for n in missing]
        raise TargetError(gather("some modules are not there:", faults))
    inner = [a for a in saved for b in saved if a != b and a.startswith(f"{b}.")]
    once = {id(module): name for name, module in reversed(saved.items())}  # one that has several names, by the first
    outer = {name: module for name, module in saved.items() if name not in inner and once[id(module)] == name}
    return {name: unwrapped(module) for name, module in outer.items()}


def _check_saved_overlap(root: nn.Module, saved: Mapping[str, nn.Module], adapted: Mapping[str, Candidate]) -> None:
    """A module cannot be adapted by one adapter and replaced whole by another."""
    wrapped = [name for name, module, _ in walk(root) if isinstance(module, AdaptedLayer)]
    whole = [name for name, module, _ in walk(root) if isinstance(module, SavedModule)]
    faults = [
        f"modules_to_save: inside {s!r} the layer {w!r} has an adapter already"
        for s in saved
        for w in wrapped
        if w == s or w.startswith(f"{s}.")
    ]
    faults += [f"{name!r} is replaced whole by another adapter's modules_to_save" for name in adapted if name in whole]
    owners = {id(inner): name for name, module in saved.items() for inner in module.modules()}
    faults += [
        f"{name!r} is to be adapted, and to be trained whole as {owners[id(c.module)]!r}, which is the same object"
        for name, c in adapted.items()
        if id(c.module) in owners
    ]
    if faults:
        raise UnsupportedError(gather("adapters that exclude each other:", faults))


def _tied_biases(found: Sequence[Candidate]) -> dict[str, str]:
    """Modules whose bias is that of a layer inside them, which uses it: {module: layer}, as in BERT's LM head."""
    biased = [c for c in found if _has_bias(c)]
    return {
        c.name: leaf.name
        for c in biased
        if c.module._modules
        for leaf in biased
        if leaf.name.startswith(f"{c.name}.") and _bias(leaf) is _bias(c)
    }


def _bias_only(
    found: Sequence[Candidate], config: AdapterConfig, layers: Mapping[str, Candidate], tied: Mapping[str, str]
) -> dict[str, Candidate]:
    """With bias='all', the modules besides the adapted ones whose bias is trained."""
    if config.bias != "all":
        return {}
    chosen, faults = {}, []
    adapted = {id(c.module) for c in layers.values()}  # by object: a layer may be targeted under another of its names
    for c in found:
        if id(c.module) in adapted or inside(config.modules_to_save, c.name) or not _has_bias(c):
            continue
        if c.name in tied:  # trained once, at the layer that uses it
            continue
        if issubclass(c.parent, nn.MultiheadAttention):
            faults.append(f"{c.name!r}: torch's MultiheadAttention reads this bias itself")
        elif c.module._modules:  # a wrapper around it would hide the layers inside
            faults.append(f"{c.name!r}: a {type(c.module).__name__} has other modules inside; only a layer's bias fits")
        elif c.kind is None or Need.BIAS not in c.kind.offers or c.storage is None:
            faults.append(f"{c.name!r}: a {type(c.module).__name__}'s bias cannot be trained")
        else:
            chosen[c.name] = c
    if faults:
        raise UnsupportedError(gather("bias='all' asks for biases that cannot be trained:", faults))
    return chosen


def _check_layout(config: AdapterConfig, chosen: Sequence[Candidate], strict: bool) -> None:
    transposed = any(c.kind is not None and c.kind.stores_in_out for c in chosen)
    if strict and config.fan_in_fan_out and not transposed:
        raise UnsupportedError(
            "fan_in_fan_out=True, but no targeted layer stores its weight as (in, out); layers are recognised by "
            "themselves, so leave it False"
        )


def _check_patterns(config: AdapterConfig, layers: Mapping[str, Candidate], strict: bool) -> None:
    """rank_pattern and alpha_pattern entries that fit no adapted layer have no effect: refuse them."""
    values = config.to_dict()
    faults = []
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in values.get(key, {}):
            if not any(matches_names(rf"(.*\.)?({pattern})", name) for name in layers):
                faults.append(f"{key}: {pattern!r} fits no adapted layer")
    if faults and strict:
        raise TargetError(gather("patterns that fit nothing:", faults))


def _expected_shapes(made: Plan) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of all trained tensors by layer, found on the meta device."""
    sites = {name: _sketch(_site(c)) for name, c in made.layers.items()}
    shared = made.method.prepare(made.adapter, list(sites.values()), Projections())
    shapes = {
        name: {k: tuple(v.shape) for k, v in made.method.init(site, shared).items()} for name, site in sites.items()
    }
    for name, c in {**made.layers, **made.bias_only}.items():
        if made.config.bias != "none" and _has_bias(c):
            shapes.setdefault(name, {})[BIAS] = tuple(cast(Tensor, _bias(c)).shape)
    return shapes


def _bias(c: Candidate) -> Tensor | None:
    return c.module._parameters.get(BIAS) if c.storage is None else c.storage.read_bias(c.module)


def _has_bias(candidate: Candidate) -> bool:
    return _bias(candidate) is not None


def _site(c: Candidate) -> Site:
    return _wrapper(c, ActiveState()).site(c.name)


def _wrapper(c: Candidate, state: ActiveState) -> AdaptedLayer:
    """A wrapper around a candidate; it is not put into the model."""
    return AdaptedLayer(c.module, cast(LayerKind, c.kind), cast(Storage, c.storage), state)


def _sketch(site: Site) -> Site:
    """The same site on the meta device: shapes without memory, for checks before anything is changed."""
    return replace(site, device=_meta_device, read=_no_read)


def _meta_device() -> torch.device:
    return torch.device("meta")


def _no_read() -> Tensor:
    raise UnsupportedError("a sketched site has no weight to read")


# -- apply -----------------------------------------------------------------------------------------


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
def apply(
    root: nn.Module,
    made: Plan,
    state: ActiveState,
    projections: Projections,
    tensors: Mapping[str, Tensor] | None = None,
) -> Installed:
    """Carry out ``made``: wrap layers, make or take over parameters. Parameters start frozen.

    Args:
        tensors: for a loaded adapter, the values by ``<layer>.<parameter>`` and, for modules saved whole,
            by ``<module>.<name in it>``; already checked against the plan.

    """
    layers = {name: _layer_at(root, c, state) for name, c in {**made.layers, **made.bias_only}.items()}
    sites = {name: layers[name].site(name) for name in made.layers}
    try:
        shared = made.method.prepare(made.adapter, list(sites.values()), projections)
        made.method.verify(shared)
        starts = {name: _start(made, name, layer, shared, tensors) for name, layer in layers.items()}
        twins = {name: _twin(root, name, tensors) for name in made.saved}
    except BaseException:
        projections.release(made.adapter)
        raise
    for name, layer in layers.items():
        method = made.method if name in made.layers else None
        layer.add(made.adapter, Slot(layer.site(name), method, shared, starts[name]))
    saved = {name: _saved_at(root, name, state) for name in made.saved}
    for name, wrapper in saved.items():
        wrapper.copies[slot_key(made.adapter)] = twins[name]
    wrappers: list[AdaptedLayer | SavedModule] = [*layers.values(), *saved.values()]
    _replace(root, {unwrapped(wrapper): wrapper for wrapper in wrappers})
    return Installed(made.adapter, made.config, made.method, shared, layers, saved)


def _layer_at(root: nn.Module, c: Candidate, state: ActiveState) -> AdaptedLayer:
    """The wrapper that stands at the candidate's name, which knows the base's bits while adapters are merged, or a
    new one."""
    module = root.get_submodule(c.name)
    return module if isinstance(module, AdaptedLayer) else _wrapper(c, state)


def _saved_at(root: nn.Module, name: str, state: ActiveState) -> SavedModule:
    module = root.get_submodule(name)
    return module if isinstance(module, SavedModule) else SavedModule(module, state)


def _start(
    made: Plan, name: str, base: AdaptedLayer, shared: Shared, tensors: Mapping[str, Tensor] | None
) -> dict[str, nn.Parameter]:
    """The frozen parameters of one layer: from the file, or as the method starts them."""
    if tensors is not None:
        device = base.compute_device()
        # Trained tensors are float32 whatever the file's dtype is: bfloat16 would round small steps away.
        given = {key: tensors[f"{name}.{key}"] for key in made.shapes[name] if key not in made.method.rebuilt}
        values = {k: t.to(device, torch.promote_types(t.dtype, torch.float32), copy=True) for k, t in given.items()}
        if made.method.rebuilt and name in made.layers:
            own = made.method.init(base.site(name), shared)
            values.update({key: own[key] for key in made.method.rebuilt})
    else:
        values = made.method.init(base.site(name), shared) if name in made.layers else {}
        bias = base.base_bias()
        if bias is not None and BIAS in made.shapes[name]:
            values[BIAS] = bias.detach().to(torch.promote_types(bias.dtype, torch.float32), copy=True)
    return {key: nn.Parameter(value.detach(), requires_grad=False) for key, value in values.items()}


def _replace(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``new[module]`` wherever ``module`` hangs, in one pass over the model."""
    for parent in [_holder(module) for _, module, _ in walk(root)]:
        if not isinstance(parent, (SavedModule, torch.jit.ScriptModule)):
            parent._modules.update({key: new[m] for key, m in parent._modules.items() if m is not None and m in new})
    for _, module, _ in walk(root):
        _set_fast_path(module)


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


def _twin(root: nn.Module, name: str, tensors: Mapping[str, Tensor] | None) -> nn.Module:
    """An adapter's own copy of a module that it trains whole."""
    twin = copy.deepcopy(unwrapped(root.get_submodule(name))).requires_grad_(False)
    if tensors is not None:
        own = {key: tensors[f"{name}.{key}"] for key in twin.state_dict()}
        twin.load_state_dict(own, assign=any(t.device.type == "meta" for t in twin.state_dict().values()))
    return twin


def remove(root: nn.Module, adapter: str, installed: Installed, projections: Projections) -> None:
    """Take one adapter out; a layer without adapters becomes the base layer again."""
    bare: dict[nn.Module, nn.Module] = {}
    for layer in set(installed.layers.values()):
        layer.remove(adapter)
        if not layer.adapters:
            bare[layer] = layer.base_layer
    for saved in set(installed.saved.values()):
        del saved.copies[slot_key(adapter)]
        if not saved.copies:
            bare[saved] = saved.original_module
    _replace(root, bare)
    projections.release(adapter)


def strip(root: nn.Module, choose: Callable[[SavedModule], nn.Module]) -> None:
    """Take every wrapper out; ``choose`` says what stays of a module that adapters replaced whole."""
    bare: dict[nn.Module, nn.Module] = {}
    for _, module, _ in walk(root):
        if isinstance(module, AdaptedLayer):
            bare[module] = module.base_layer
        elif isinstance(module, SavedModule):
            bare[module] = choose(module)
    _replace(root, bare)


def check_compatible(active: Mapping[str, Installed]) -> None:
    """Refuse adapters that cannot be active together: two that are not additive, or that replace one module."""
    faults: list[str] = []
    owners: dict[str, str] = {}
    rigid: dict[str, str] = {}
    for name, installed in active.items():
        makes: type[Delta] = installed.method.makes
        for layer in installed.layers if not makes.additive else ():
            if layer in rigid:
                faults.append(f"layer {layer!r}: {rigid[layer]!r} and {name!r} are both not additive")
            rigid[layer] = name
        for module in installed.saved:
            if module in owners:
                faults.append(f"module {module!r}: {owners[module]!r} and {name!r} both replace it whole")
            owners[module] = name
    if faults:
        raise UnsupportedError(gather("these adapters cannot be active together:", faults))
