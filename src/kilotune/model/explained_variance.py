"""EVA (Paischer et al. 2024, arXiv 2410.07170): what the inputs of layers vary in most, and how many ranks each gets.

Batches run through the model until the components that are wanted stay where they are. The ranks of all layers are one
budget: they go to the components that explain most of their layers' variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.running_pca import RunningPca

__all__ = ["Component", "Watched", "explained", "shares"]


@final
@dataclass(frozen=True)
class Watched:
    """A layer whose inputs count: the module that is called, its rank without redistribution, its input features."""

    module: nn.Module
    rank: int
    features: int


@final
@dataclass(frozen=True)
class Component:
    """One layer's result: (rank, features) and (rank,) singular values; no rows where it got no rank."""

    vectors: Tensor
    values: Tensor


def shares(ratios: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """How many ranks each layer gets of ``budget``, by how much of its variance each component explains.

    Of equal ones those of layers that come first are taken.
    """
    every = [(ratio, name) for name, own in ratios.items() for ratio in own]
    every.sort(key=lambda item: -item[0])  # stable
    counts = dict.fromkeys(ratios, 0)
    for _, name in every[:budget]:
        counts[name] += 1
    return counts


@torch.no_grad()
def explained(
    layers: Mapping[str, Watched],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    rows: Callable[[str, tuple[Any, ...], Any], Tensor],
    rho: float = 2.0,
    tau: float = 0.99,
) -> dict[str, Component]:
    """The components of the inputs of layers, as many for each as it gets of all their ranks.

    Args:
        layers: by name.
        batches: run through as often as is needed.
        run: runs the model on one.
        rows: (name, positional inputs, batch) -> the rows (n, features) that count.
        rho: a layer gets at most this many times its rank; 1: each gets its own.
        tau: a component stays where it is when its cosine with the one before is at least this.

    Raises:
        ConfigError: no batches, or none of them has as many rows as a layer has ranks.

    """
    leads = _alike(layers, batches, run)
    groups: dict[str, list[str]] = {}
    for name, lead in leads.items():
        groups.setdefault(lead, []).append(name)
    most = {
        lead: min(max(round(layers[name].rank * rho) for name in names), layers[lead].features)
        for lead, names in groups.items()
    }
    found = {lead: RunningPca(rank) for lead, rank in most.items()}
    wanted = {name: most[lead] for name, lead in leads.items()}
    budget = sum(layer.rank for layer in layers.values())
    while True:
        moved = False
        for batch in batches:
            open_ = [lead for lead, names in groups.items() if not _settled(found[lead], names, wanted, tau)]
            if not open_:
                return {name: _component(found[lead], wanted[name]) for name, lead in leads.items()}
            for lead, own in _watched({lead: layers[lead] for lead in open_}, batch, run, rows).items():
                if own.shape[0] >= most[lead]:
                    found[lead].add(own)
                    moved = True
            if all(pca.components is not None for pca in found.values()):
                wanted = shares({name: found[lead].ratios.tolist() for name, lead in leads.items()}, budget)
        if not moved:
            need = max(most.values())
            raise ConfigError(f"EVA: {need} components need {need} inputs (tokens) in a batch; take larger batches")


def _settled(pca: RunningPca, names: Sequence[str], wanted: Mapping[str, int], tau: float) -> bool:
    rank = max(wanted[name] for name in names)
    return pca.likeness is not None and bool((pca.likeness[:rank] >= tau).all())


def _component(pca: RunningPca, rank: int) -> Component:
    assert pca.components is not None
    return Component(pca.components[:rank].clone(), pca.values[:rank].clone())


def _alike(layers: Mapping[str, Watched], batches: Iterable[Any], run: Callable[[Any], Any]) -> dict[str, str]:
    """By layer, the first of those that are fed by the same tensor."""
    seen: dict[str, Any] = {}
    batch = next(iter(batches), seen)
    if batch is seen:
        raise ConfigError("EVA: there are no batches")
    _hooked(layers, run, batch, lambda name, given: seen.__setitem__(name, given[0]))
    if missing := [name for name in layers if name not in seen]:
        raise ConfigError(f"EVA: the model does not call {', '.join(missing)}; leave them out of the targets")
    first: dict[int, str] = {}
    return {name: first.setdefault(id(seen[name]), name) for name in layers}


def _watched(
    layers: Mapping[str, Watched],
    batch: Any,
    run: Callable[[Any], Any],
    rows: Callable[[str, tuple[Any, ...], Any], Tensor],
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    _hooked(layers, run, batch, lambda name, given: found.setdefault(name, []).append(rows(name, given, batch)))
    return {name: own[0] if len(own) == 1 else torch.cat(own) for name, own in found.items()}


def _hooked(
    layers: Mapping[str, Watched],
    run: Callable[[Any], Any],
    batch: Any,
    see: Callable[[str, tuple[Any, ...]], Any],
) -> None:
    """Run a batch, and have ``see`` told of the positional inputs of each layer."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: see(name, args or tuple(kwargs.values())) and None

    handles = [w.module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, w in layers.items()]
    try:
        run(batch)
    finally:
        for handle in handles:
            handle.remove()
