"""Parameters as layers of their own: the option ``target_parameters``.

::

    AdaptedParameters               in the place of a module, such as the experts of a block
      base_layer                    the module
      layers[parameter]             an AdaptedLayer for each adapted parameter; its base layer is the module as well

The module runs as it is, with stand-ins in the place of the adapted parameters (kinds/experts.py). The name of such a
layer is ``<module>.<parameter>``.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast, final

import torch
from torch import nn

from ..candidates import HINTS, Candidate, matches_names
from ..config import ALL_BIASED, ALL_LINEAR, AdapterConfig
from ..deltas import Need
from ..errors import MergeError, TargetError, UnsupportedError, gather, nearest
from ..kinds import LayerKind, kind_of
from ..kinds.experts import READ_ELSEWHERE, Experts, run_with
from ..name_rules import ends
from ..storage import Storage
from ..storage.dense import Dense
from .active_adapters import ActiveState
from .adapted import AdaptedLayer
from .reading import in_forward
from .slot import BIAS, slot_key

__all__ = [
    "AdaptedParameters",
    "TiedTableWarning",
    "UntrainedExpertsWarning",
    "check_apart",
    "file_names",
    "layer_in",
    "select_parameters",
    "trains_bias",
    "warn_of_untrained",
]

Named = tuple[str, nn.Module, type[nn.Module]]


class TiedTableWarning(UserWarning):
    """An adapted embedding shares its table with others that are not adapted, and may itself never be run."""


class UntrainedExpertsWarning(UserWarning):
    """The targets leave the experts of a mixture-of-experts model out, because they are parameters, not modules."""


@final
class AdaptedParameters(nn.Module):
    """A module with adapters on parameters of its own.

    Attributes of the module are passed through, but for an adapted parameter while a forward runs: that is given with
    its adapters in it, where it is one of several matrices as a stand-in that multiplies and does nothing else.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layers = nn.ModuleDict()
        self.training = base_layer.training
        self._untraced = isinstance(base_layer, nn.RNNBase)  # torch.compile leaves these out

    def layer(self, parameter: str) -> AdaptedLayer | None:
        """The layer that is this parameter, or None."""
        return cast("AdaptedLayer | None", self.layers._modules.get(slot_key(parameter)))

    def adapted(self) -> Iterator[tuple[str, AdaptedLayer]]:
        """(parameter, its layer)."""
        for layer in self.layers.children():
            assert isinstance(layer, AdaptedLayer)
            yield str(layer.kind.parameter), layer

    def put(self, layer: AdaptedLayer) -> None:
        """Take a layer in, where it is not there yet."""
        self.layers[slot_key(str(layer.kind.parameter))] = layer

    def prune(self) -> None:
        """Let go of the layers without adapters."""
        for key in [slot_key(name) for name, layer in self.adapted() if not layer.adapters]:
            del self.layers[key]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, with the live adapters."""
        if self._untraced and torch.compiler.is_compiling():
            return self._apart(args, kwargs)
        values: dict[str, Any] = {}
        for layer in self.layers.children():  # a plain loop: torch.compile follows it
            values.update(cast(AdaptedLayer, layer).given())
        if not values:
            return self.base_layer(*args, **kwargs)
        return run_with(self.base_layer, values, args, kwargs, self._read)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.forward(*args, **kwargs)

    def _read(self, name: str) -> None:
        """Note that a forward has read an adapted parameter."""
        for _, layer in self.adapted():
            if name in (layer.storage.weight_name, layer.storage.bias_name):
                layer.ran()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "layers"):
                raise
        found = getattr(self.base_layer, name)
        for _, layer in self.adapted():
            if name in (layer.storage.weight_name, layer.storage.bias_name) and in_forward():
                layer.ran()
                return layer.given().get(name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if "layers" not in self.__dict__.get("_modules", {}) or name not in self.base_layer._parameters:
            super().__setattr__(name, value)
            return
        for _, layer in self.adapted():
            if layer.merged and name in (layer.storage.weight_name, layer.storage.bias_name):
                raise MergeError(f"cannot set {name!r} while {list(layer.merged)} are merged into it; unmerge first")
        setattr(self.base_layer, name, value)


def layer_in(host: AdaptedParameters, candidate: Candidate, state: ActiveState) -> AdaptedLayer:
    """The layer that is the candidate's parameter, or a new one; it is not put into the host."""
    kind = cast(LayerKind, candidate.kind)
    there = host.layer(str(kind.parameter))
    return AdaptedLayer(candidate.module, kind, cast(Storage, candidate.storage), state) if there is None else there


# -- which parameters ------------------------------------------------------------------------------


def select_parameters(modules: Sequence[Named], config: AdapterConfig, needs: frozenset[Need]) -> list[Candidate]:
    """The parameters that ``config.target_parameters`` names, in the model's order.

    Args:
        modules: (dotted name, the base model's module or its wrapper, class of the parent), the root included.
        config: its names are whole names of parameters or their ends after a dot, as in PEFT.
        needs: what the method's delta needs of a layer.

    Raises:
        TargetError: a name that fits nothing, or something that cannot be adapted; says why, and what is near.

    """
    targets = config.target_parameters or ()
    if not targets:
        return []
    once: dict[tuple[int, str], Candidate] = {}
    faults: list[str] = []
    met: set[str] = set()
    for name, wrapped, parent in modules:
        module = wrapped.base_layer if isinstance(wrapped, (AdaptedLayer, AdaptedParameters)) else wrapped
        for own in module._parameters:
            whole = f"{name}.{own}" if name else own
            if not matches_names(targets, whole, "target_parameters"):
                continue
            met.update(ends(whole))
            if (reason := _refusal(name, wrapped, module, own, config, needs)) is not None:
                faults.append(f"{whole!r}: {reason}")
            storage = Dense(own, _bias_name(own))
            once.setdefault((id(module), own), Candidate(whole, module, parent, Experts(own), storage))
    unmet = [target for target in targets if target not in met]
    faults += [
        f"no parameter is called {target!r}, or ends with it.{_near(target, modules) if at < HINTS else ''}"
        for at, target in enumerate(unmet)
    ]
    if faults:
        raise TargetError(gather("target_parameters:", faults))
    if config.dropout > 0:
        raise UnsupportedError(
            f"{_dropout_name(config)}={config.dropout!r}: there is no dropout on the input of a parameter "
            f"({next(iter(once.values())).name!r}): what a module feeds to it goes to the frozen weight and to the "
            "adapter alike, as in PEFT. Set it to 0, or name modules in target_modules instead"
        )
    return list(once.values())


def _dropout_name(config: AdapterConfig) -> str:
    return next((name for name in config.option_names() if name.endswith("dropout")), "dropout")


def _bias_name(parameter: str) -> str:
    """What transformers calls the bias of an expert parameter."""
    return "bias" if parameter == "weight" else f"{parameter}_bias"


def _refusal(
    name: str, wrapped: nn.Module, module: nn.Module, own: str, config: AdapterConfig, needs: frozenset[Need]
) -> str | None:
    if not name:
        return "is a parameter of the whole model itself, which cannot be wrapped"
    held = module._parameters[own]
    return (
        _unfit_module(name, wrapped, module)
        or _unfit_parameter(module, held, own, needs)
        or _left_out(name, own, config)
    )


def _unfit_module(name: str, wrapped: nn.Module, module: nn.Module) -> str | None:
    kind = kind_of(module)
    if isinstance(wrapped, AdaptedLayer):
        return f"the whole of {name!r} is adapted already; a module and one of its parameters cannot both be"
    if kind is not None and Need.LINEAR in kind.offers:
        return f"belongs to a {type(module).__name__}, which is a layer: name {name!r} in target_modules"
    if type(module).__name__ in READ_ELSEWHERE:
        return f"its {type(module).__name__} does not use it; another module cuts it into experts by itself"
    return None


def _unfit_parameter(module: nn.Module, held: nn.Parameter | None, own: str, needs: frozenset[Need]) -> str | None:
    if held is None or held.ndim not in (2, 3):
        return f"has the shape {None if held is None else tuple(held.shape)}; expected a matrix, or one for each expert"
    if not Dense(own, _bias_name(own)).matches(module):
        return f"is no plain floating-point parameter ({held.dtype})"
    if own.endswith("_bias"):
        return f"is a bias; name {own.removesuffix('_bias')!r}, whose bias it is, and a method that trains biases"
    if not needs <= Experts.offers:
        return "is multiplied inside its module; this method needs the output of a layer"
    if Need.BIAS in needs and module._parameters.get(_bias_name(own)) is None:
        return f"has no bias: {type(module).__name__} has no parameter {_bias_name(own)!r}"
    return None


def _left_out(name: str, own: str, config: AdapterConfig) -> str | None:
    if any(matches_names(config.exclude_modules, each, "exclude_modules") for each in (name, f"{name}.{own}")):
        return "is left out by exclude_modules, which is for modules; leave it out of target_parameters"
    return None


def _near(target: str, modules: Sequence[Named]) -> str:
    last = {own: f"{name}.{own}" for name, module, _ in modules for own in _inner(module)._parameters if name}
    close = nearest(target.rpartition(".")[2], last)
    stacked = sorted({name.rpartition(".")[2] for name in expert_parameters(modules)})
    shown = close or stacked
    return f" Nearest: {', '.join(map(repr, shown))}." if shown else " This model has no parameters of experts."


def _inner(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, (AdaptedLayer, AdaptedParameters)) else module


def check_apart(modules: Sequence[Named], layers: Mapping[str, Candidate]) -> None:
    """Refuse a module that is to be adapted as a whole while parameters of its own are."""
    owners = {id(m.base_layer): name for name, m, _ in modules if isinstance(m, AdaptedParameters)}
    for name, c in layers.items():
        if cast(LayerKind, c.kind).parameter is not None:
            owners[id(c.module)] = name
    faults = [
        f"{name!r} is to be adapted as a whole, and has an adapter on a parameter of its own ({owners[id(c.module)]!r})"
        for name, c in layers.items()
        if cast(LayerKind, c.kind).parameter is None and id(c.module) in owners
    ]
    if faults:
        raise UnsupportedError(gather("adapters that exclude each other:", faults))


def trains_bias(candidate: Candidate, config: AdapterConfig) -> bool:
    """Whether the option ``bias`` reaches a layer's bias. As in PEFT it is for what is called ``bias``, so not for the
    biases of experts, and a parameter is no layer whose bias is trained because the layer is adapted."""
    if cast(LayerKind, candidate.kind).parameter is None:
        return True
    return config.bias == "all" and cast(Storage, candidate.storage).bias_name == BIAS


# -- experts that no target reaches ----------------------------------------------------------------


def expert_parameters(modules: Iterable[Named], biased: bool = False) -> list[str]:
    """The names of all parameters (E, ..., ...) of modules of experts; with ``biased`` those that have biases."""
    found = []
    for name, wrapped, _ in modules:
        module = _inner(wrapped)
        if name and "Expert" in type(module).__name__:
            stacked = [own for own, p in module._parameters.items() if p is not None and p.ndim == 3]
            found += [f"{name}.{own}" for own in stacked if not biased or _bias_name(own) in module._parameters]
    return list(dict.fromkeys(found))


def warn_of_untrained(modules: Iterable[Named], config: AdapterConfig, layers: Mapping[str, Candidate]) -> None:
    """Warn where 'all-linear' or 'all-biased' leaves experts out; ``target_parameters=[]`` says that this is meant.

    And where a table's first holder is adapted, which in T5 and BART (``shared``) is never run.
    """
    modules = list(modules)
    _warn_of_tables(modules, layers)
    word = config.target_modules
    if word not in (ALL_LINEAR, ALL_BIASED) or config.target_parameters is not None:
        return
    if left := expert_parameters(modules, biased=word == ALL_BIASED):
        last = sorted({name.rpartition(".")[2] for name in left})
        warnings.warn(
            f"{word!r} takes modules, and the experts of this model are parameters ({len(left)}, such as "
            f"{left[0]!r}): they stay untrained. To train them too, add target_parameters={last}; to leave them, "
            "target_parameters=[]",
            UntrainedExpertsWarning,
            stacklevel=5,
        )


def _warn_of_tables(modules: Sequence[Named], layers: Mapping[str, Candidate]) -> None:
    bare = [(name, m.base_layer if isinstance(m, AdaptedLayer) else m) for name, m, _ in modules]
    tables = [(name, m, m._parameters.get("weight")) for name, m in bare if isinstance(m, nn.Embedding)]
    for name, c in layers.items():
        weight = c.module._parameters.get("weight") if isinstance(c.module, nn.Embedding) else None
        same = [(n, m) for n, m, other in tables if weight is not None and other is weight]
        others = [n for n, m in same if m is not c.module]
        if others and same[0][1] is c.module and not any(other in layers for other in others):
            warnings.warn(
                f"{name!r} has the same table as {', '.join(map(repr, others))}, which are not adapted: an adapter "
                f"changes what its own layer looks up, and some models never run {name!r} itself. Name the layers that "
                "are run",
                TiedTableWarning,
                stacklevel=6,
            )


# -- files -----------------------------------------------------------------------------------------


def file_names(layers: Mapping[str, tuple[LayerKind, nn.Module]], config: AdapterConfig) -> dict[str, str]:
    """A layer's name -> the name that its tensors have in a file.

    PEFT nests a wrapper for each parameter of a module around the one before it, in the module's order, and names
    them by how deep they lie: the last is the module, the one before it ``<module>.base_layer``.
    """
    if "target_parameters" in config.ours():  # PEFT has the option for LoRA only
        return {name: name for name in layers}
    modules = {name for name, (kind, _) in layers.items() if kind.parameter is None}
    orders: dict[str, list[str]] = {}
    for name, (kind, module) in layers.items():
        if kind.parameter is not None:
            place = name.rpartition(".")[0]
            orders[place] = [f"{place}.{own}" for own in module._parameters if f"{place}.{own}" in layers]
    return {
        name: _nested(name, orders) if kind.parameter else _below(name, modules) for name, (kind, _) in layers.items()
    }


def _below(name: str, modules: Collection[str]) -> str:
    """A layer inside an adapted module hangs below that module's base layer."""
    parts = name.split(".")
    places = (".".join(parts[: i + 1]) for i in range(len(parts) - 1))
    around = [f"{part}.base_layer" if place in modules else part for part, place in zip(parts, places, strict=False)]
    return ".".join([*around, parts[-1]])


def _nested(name: str, orders: Mapping[str, Sequence[str]]) -> str:
    place = name.rpartition(".")[0]
    order = orders[place]
    return place + ".base_layer" * (len(order) - 1 - order.index(name))
