"""Walk the model, match, refuse, and only then put adapters in.

Everything that can go wrong is found in :func:`plan`, which changes nothing; :func:`apply` then cannot
fail half-way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from ..added_modules import base_modules
from ..candidates import HINTS, Candidate, candidates, inside, saved_whole
from ..config import AdapterConfig
from ..deltas import Need
from ..errors import TargetError, UnsupportedError, did_you_mean, gather
from ..kernels.lowrank import accumulate_dtype
from ..kinds import LayerKind
from ..layers.active_adapters import ActiveState
from ..layers.adapted import AdaptedLayer
from ..layers.adapted_parameters import (
    AdaptedParameters,
    check_apart,
    layer_in,
    select_parameters,
    trains_bias,
    warn_of_untrained,
)
from ..layers.saved_module import SavedModule, check_trainable
from ..layers.shared_inputs import join
from ..layers.slot import BIAS, Slot, slot_key, weakly
from ..layers.stacked_sites import prepare, start
from ..methods import Method, Shared, Site, make_method
from ..patterns import matching
from ..projections.matrices import Projections
from ..storage import Storage
from ..storage.sharded import whole, whole_copy
from .base_mark import mark_of
from .held_modules import check_calls
from .installed_adapter import Installed, check_compatible
from .option_checks import check_dropout, check_layout, check_patterns, part_of
from .targets import HEADS, read_by_parent, resolve_targets, select
from .tree import (
    bare_copy,
    check_base,
    every_wrapper,
    find,
    is_parameter,
    layer_around,
    put_in_place,
    saved_around,
    unwrapped,
    walk,
    wrappers,
)

__all__ = ["Installed", "Plan", "SavedModule", "apply", "check_base", "check_compatible", "plan", "remove", "walk"]


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
    of_model: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of what is trained once for all layers
    carries: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)  # what files may have besides
    tied: dict[str, str] = field(default_factory=dict)  # module -> the one inside it that has the same bias
    base: str | None = None  # the base's mark (base_mark.py), None where it cannot be told


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
    with matching(names=lambda: [name for name, _, _ in walk(root, aliases=True)]):
        return _planned(root, adapter, config, method, strict)


def _planned(root: nn.Module, adapter: str, config: AdapterConfig, method: Method[Any] | None, strict: bool) -> Plan:
    method = make_method(config) if method is None else method
    config = method.completed(config, _model_type(root))
    config = resolve_targets(config, _model_type(root), method.default_targets)
    config = _with_heads(root, config)
    every = _candidates(root)
    saved = _saved_modules(root, config, strict)
    needs = method.makes.needs
    modules = _modules(root)
    chosen = select_parameters(modules, config, needs)
    if config.target_modules or not chosen:
        chosen = [*select(every, config, needs, _output_names(root), strict), *chosen]
    layers = {c.name: c for c in chosen}
    found = _once(every)
    tied = _tied_biases(found)
    bias_only = _bias_only(found, config, layers, tied)
    _check_saved_overlap(saved, {**layers, **bias_only})
    check_apart(modules, {**layers, **bias_only})
    wrapped = {c.module: name for name, c in {**layers, **bias_only}.items()}
    wrapped.update({unwrapped(module): name for name, module in saved.items()})
    check_calls([(name, unwrapped(module)) for name, module, _ in modules], wrapped)
    check_layout(config, chosen, strict)
    if strict:  # PEFT's files may have it: it leaves it out there without a word
        check_dropout(config, chosen, needs)
    method.config = config
    result = Plan(adapter, config, method, layers, bias_only, saved, tied=tied, base=mark_of(root, saved))
    result.shapes, result.of_model, result.carries = _expected_shapes(root, result)
    check_patterns(config, layers, strict)
    if strict:
        warn_of_untrained(modules, config, layers)
    return result


def _modules(root: nn.Module) -> list[tuple[str, nn.Module, type[nn.Module]]]:
    """The modules of the base model, or what adapts them, under all their names; no adapted parameters."""
    every = [item for item in walk(root, aliases=True) if not is_parameter(item[1])]
    return [(n, m.original_module if isinstance(m, SavedModule) else m, parent) for n, m, parent in every]


def _candidates(root: nn.Module) -> list[Candidate]:
    """The modules inside the base model, under all their names."""
    modules = [item for item in walk(root, aliases=True) if item[0] and not is_parameter(item[1])]
    layers = [layer for _, module, _ in modules if (layer := layer_around(module)) is not None]
    gained = {id(layer.base_layer) for layer in layers if layer.merged and layer.base_bias() is None}
    found = ((name, unwrapped(module), parent) for name, module, parent in modules)
    made = candidates(item for item in found if not isinstance(item[1], torch.jit.ScriptModule))
    return [replace(c, gained=True) if id(c.module) in gained else c for c in made]


def _once(every: Sequence[Candidate]) -> list[Candidate]:
    """Each module under its first name."""
    first: dict[int, Candidate] = {}
    for c in every:
        first.setdefault(id(c.module), c)
    return list(first.values())


def with_base_name(root: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The config with the name of a transformers model filled in, where it has no ``base_model_name_or_path``."""
    if config.base_model_name_or_path is not None:
        return config
    name = base_name(root)
    return config.replace(base_model_name_or_path=name) if name else config


def base_name(root: nn.Module) -> str:
    """What a transformers model says that it was loaded from; "" where it does not."""
    inner = getattr(root, "config", None)
    name = getattr(inner, "_name_or_path", None) or getattr(root, "name_or_path", None)
    return name if isinstance(name, str) else ""


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
    modules = [(name, module) for name, module, _ in _modules(root) if name]
    saved = {name: module for name, module in modules if saved_whole(names, name)}
    endings = {name[at:] for name in saved for at in range(len(name))} if strict else set()
    missing = [n for n in names if n not in endings] if strict else []
    if missing:
        last = {name.rpartition(".")[2] for name, _ in modules}
        faults = [
            f"modules_to_save: no module is called {n!r}.{did_you_mean(n, last) if at < HINTS else ''}"
            for at, n in enumerate(missing)
        ]
        raise TargetError(gather("some modules are not there:", faults))
    inner = {name for name in saved if any(name[:at] in saved for at, c in enumerate(name) if c == ".")}
    once = {id(module): name for name, module in reversed(saved.items())}  # one that has several names, by the first
    outer = {name: module for name, module in saved.items() if name not in inner and once[id(module)] == name}
    whole = {name: unwrapped(module) for name, module in outer.items()}
    check_trainable({f"{name}.{i}".removesuffix("."): unwrapped(m) for name, w in whole.items() for i, m, _ in walk(w)})
    return whole


def _check_saved_overlap(saved: Mapping[str, nn.Module], adapted: Mapping[str, Candidate]) -> None:
    """An adapter cannot both adapt a module and replace it whole."""
    owners = {id(inner): name for name, module in saved.items() for inner in base_modules(module)}
    faults = [
        f"{name!r} is to be adapted, and to be trained whole as {owners[id(c.module)]!r}, which is the same object"
        for name, c in adapted.items()
        if id(c.module) in owners
    ]
    if faults:
        raise UnsupportedError(gather("the adapter excludes itself:", faults))


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
        if c.module._modules:  # a wrapper around it would hide the layers inside
            faults.append(f"{c.name!r}: a {type(c.module).__name__} has other modules inside; only a layer's bias fits")
        elif c.kind is None or Need.BIAS not in c.kind.offers or c.storage is None:
            faults.append(f"{c.name!r}: a {type(c.module).__name__}'s bias cannot be trained")
        else:
            chosen[c.name] = c
    if faults:
        raise UnsupportedError(gather("bias='all' asks for biases that cannot be trained:", faults))
    return chosen


Shapes = dict[str, dict[str, tuple[int, ...]]]


def _expected_shapes(root: nn.Module, made: Plan) -> tuple[Shapes, dict[str, tuple[int, ...]], Shapes]:
    """The shapes of all trained tensors, by layer and of the whole model, found on the meta device; and of what files
    may have of layers besides."""
    sites = {name: _sketch(site_in(made, name, _layer_at(root, c, ActiveState()))) for name, c in made.layers.items()}
    shared = prepare(made.method, made.adapter, sites.values(), Projections())
    shapes = {
        name: {k: tuple(v.shape) for k, v in start(made.method, site, shared).items()} for name, site in sites.items()
    }
    for name, c in {**made.layers, **made.bias_only}.items():
        if made.config.bias != "none" and _has_bias(c) and trains_bias(c, made.config):
            shapes.setdefault(name, {})[BIAS] = tuple(cast(Tensor, _bias(c)).shape)
    front = {name: (site.matrices,) if site.matrices else () for name, site in sites.items()}
    carries = {
        name: {key: (*front[name], *shape) for key, shape in made.method.carries(site).items()}
        for name, site in sites.items()
    }
    return shapes, {key: tuple(value.shape) for key, value in shared.trained.items()}, carries


def brought_by(made: Plan, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What ``tensors``, by ``<layer>.<name>``, have of what files may have besides parameters, by layer and name."""
    return {
        name: {key: tensors[f"{name}.{key}"] for key in own if f"{name}.{key}" in tensors}
        for name, own in made.carries.items()
    }


def _bias(c: Candidate) -> Tensor | None:
    if c.gained:
        return None
    return c.module._parameters.get(BIAS) if c.storage is None else c.storage.read_bias(c.module)


def _has_bias(candidate: Candidate) -> bool:
    """Whether the option ``bias`` reaches it: only what is called so, as in PEFT (no in_proj_bias of attention)."""
    named = candidate.kind is None or candidate.kind.named_bias
    return named and _bias(candidate) is not None


def site_in(made: Plan, name: str, layer: AdaptedLayer) -> Site:
    """The site of one of the plan's layers; a part of an adapted module says which."""
    return replace(layer.site(name), pattern_name=part_of(name, made.layers) or name)


def _wrapper(c: Candidate, state: ActiveState) -> AdaptedLayer:
    """A wrapper around a candidate; it is not put into the model."""
    return AdaptedLayer(c.module, cast(LayerKind, c.kind), cast(Storage, c.storage), state, read_by_parent(c))


def _sketch(site: Site) -> Site:
    """The same site on the meta device: shapes without memory, for checks before anything is changed."""
    return replace(site, device=_meta_device, read=_no_read, gather=_no_read)


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
    sites = {name: site_in(made, name, layers[name]) for name in made.layers}
    try:
        brought = brought_by(made, tensors or {})
        bringing = [replace(site, brought=brought[name]) for name, site in sites.items()]
        shared = prepare(made.method, made.adapter, bringing, projections)
        made.method.verify(shared)
        starts = {name: _start(made, name, layer, shared, tensors) for name, layer in layers.items()}
        twins = {name: _twin(root, name, tensors) for name in made.saved}
    except BaseException:
        projections.release(made.adapter)
        raise
    for name, layer in layers.items():
        method = made.method if name in made.layers else None
        site = sites[name] if name in sites else site_in(made, name, layer)
        layer.add(made.adapter, Slot(weakly(site, layer), method, shared, starts[name]))
    _share_inputs(made, layers, sites, shared)
    saved = {name: _saved_at(root, name, state) for name in made.saved}
    for name, wrapper in saved.items():
        wrapper.modules_to_save[slot_key(made.adapter)] = twins[name]
    new: dict[nn.Module, nn.Module] = {m.base_layer: m for m in layers.values() if not is_parameter(m)}
    new.update({host.base_layer: host for host in _hosts(root, made, layers)})
    new.update({find(root, name): wrapper for name, wrapper in saved.items() if find(root, name) is not wrapper})
    put_in_place(root, new)
    return Installed(made.adapter, made.config, made.method, shared, layers, saved, made.base)


def _share_inputs(made: Plan, layers: Mapping[str, AdaptedLayer], sites: Mapping[str, Site], shared: Shared) -> None:
    """Find the layers that may be fed by one tensor, so that they multiply it by their common first factor once."""
    firsts = [(name, site, made.method.first_factor(site, shared)) for name, site in sites.items()]
    alike = [
        (n, s.out, (f, type(layers[n].kind))) for n, s, f in firsts if f is not None and layers[n].kind.shares_input
    ]
    for name, place in join(alike).items():
        cast(Slot, layers[name].slot(made.adapter)).inputs = place


def _layer_at(root: nn.Module, c: Candidate, state: ActiveState) -> AdaptedLayer:
    """The wrapper that stands at the candidate's name, which knows the base's bits while adapters are merged, or a
    new one."""
    if cast(LayerKind, c.kind).parameter is not None:
        return layer_in(_host_at(root, c), c, state)
    return layer_around(find(root, c.name)) or _wrapper(c, state)


def _host_at(root: nn.Module, c: Candidate) -> AdaptedParameters:
    """The wrapper that stands at a parameter's module, or a new one; it is not put into the model."""
    around = wrappers(find(root, c.name.rpartition(".")[0]))
    return next((m for m in around if isinstance(m, AdaptedParameters)), None) or AdaptedParameters(c.module)


def _hosts(root: nn.Module, made: Plan, layers: Mapping[str, AdaptedLayer]) -> list[AdaptedParameters]:
    """The wrappers around the modules of adapted parameters, with the layers in them."""
    hosts: dict[nn.Module, AdaptedParameters] = {}
    for name, layer in layers.items():
        if is_parameter(layer):
            host = hosts.setdefault(layer.base_layer, _host_at(root, made.layers[name]))
            host.put(layer)
    return list(hosts.values())


def _saved_at(root: nn.Module, name: str, state: ActiveState) -> SavedModule:
    module = find(root, name)
    return saved_around(module) or SavedModule(module, state)


def _start(
    made: Plan, name: str, base: AdaptedLayer, shared: Shared, tensors: Mapping[str, Tensor] | None
) -> dict[str, nn.Parameter]:
    """The frozen parameters of one layer: from the file, or as the method starts them."""
    if tensors is not None:
        device = base.compute_device()
        # Float32 whatever the dtype in the file, bfloat16 rounds small steps away; contiguous for the same bits.
        given = {k: tensors[f"{name}.{k}"].contiguous() for k in made.shapes[name]}
        values = {k: t.to(device, accumulate_dtype(t.dtype), copy=True) for k, t in given.items()}
    else:
        values = start(made.method, site_in(made, name, base), shared) if name in made.layers else {}
        bias = base.base_bias()
        if bias is not None and BIAS in made.shapes[name]:
            values[BIAS] = whole(bias).detach().to(torch.promote_types(bias.dtype, torch.float32), copy=True)
    return {key: nn.Parameter(value.detach(), requires_grad=False) for key, value in values.items()}


def _twin(root: nn.Module, name: str, tensors: Mapping[str, Tensor] | None) -> nn.Module:
    """An adapter's own copy of a module that it trains whole."""
    twin = whole_copy(bare_copy(find(root, name)).requires_grad_(False))
    if tensors is not None:
        own = {key: tensors[f"{name}.{key}"] for key in twin.state_dict()}
        twin.load_state_dict(own, assign=any(t.device.type == "meta" for t in twin.state_dict().values()))
    return twin


def remove(root: nn.Module, adapter: str, installed: Installed, projections: Projections) -> None:
    """Take one adapter out; a layer without adapters becomes the base layer again."""
    bare: dict[nn.Module, nn.Module] = {}
    for layer in set(installed.layers.values()):
        layer.remove(adapter)
        if not layer.adapters and not is_parameter(layer):
            bare[layer] = layer.base_layer
    for host in every_wrapper(root):
        if isinstance(host, AdaptedParameters):
            host.prune()
            if not host.layers:
                bare[host] = host.base_layer
    for saved in set(installed.saved.values()):
        del saved.modules_to_save[slot_key(adapter)]
        if not saved.modules_to_save:
            bare[saved] = saved.original_module
    put_in_place(root, bare)
    projections.release(adapter)


def strip(
    root: nn.Module, choose: Callable[[SavedModule], nn.Module], new: Mapping[nn.Module, nn.Module] | None = None
) -> None:
    """Take every wrapper out; ``choose`` says what stays of a module that was replaced whole, ``new`` what comes for
    modules of the base."""
    bare: dict[nn.Module, nn.Module] = dict(new or {})
    for module in every_wrapper(root):
        if isinstance(module, (AdaptedLayer, AdaptedParameters)):
            bare[module] = module.base_layer
        elif isinstance(module, SavedModule):
            bare[module] = choose(module)
    put_in_place(root, bare)
