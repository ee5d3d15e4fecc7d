"""Sites that hold several matrices (the experts of one parameter): a method sees each as a layer of its own.

A method's tensors for such a site have one dimension more, the experts, in front: LoRA's A is (E, r, in). A method
that ``stacks`` makes the deltas of all experts in one go from these; any other is asked for each expert, and so is one
with numbers of the whole model, which are one for all experts, or with frozen factors of each matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..deltas import Delta, Full, LowRank, Rescale, Shift
from ..errors import UnsupportedError
from ..methods import Export, Method, Shared, Site
from ..projections.matrices import Projections

__all__ = ["by_member", "delta_of", "export", "members", "prepare", "start"]


def members(sites: Iterable[Site]) -> list[Site]:
    """The sites, those of several matrices replaced by one for each: ``<site>.<index>``."""
    return [one for site in sites for one in (_split(site) if site.matrices else [site])]


def _split(site: Site) -> list[Site]:
    return [_member(site, index) for index in range(site.matrices)]


def _member(site: Site, index: int) -> Site:
    def read() -> Tensor:
        return site.read()[index]  # (out, in)

    def gather() -> Tensor:
        return site.whole()[index]

    brought = {key: value[index] for key, value in site.brought.items()}
    alone = replace(site, name=f"{site.name}.{index}", read=read, gather=gather, matrices=0, stack=site.name)
    return replace(alone, brought=brought)


def by_member(site: Site, values: Mapping[str, Tensor]) -> list[tuple[str, dict[str, Tensor]]]:
    """Tensors of a site, by the names of its matrices."""
    if not site.matrices:
        return [(site.name, dict(values))]
    own = _split(replace(site, brought=values))
    return [(one.name, dict(one.brought)) for one in own]


def prepare(method: Method[Any], adapter: str, sites: Iterable[Site], projections: Projections) -> Shared:
    """What an adapter has once for all its layers; what it trains of that, at its start."""
    own = members(sites)
    shared = method.prepare(adapter, own, projections)
    started = method.init_model(own)
    shared.trained = {key: nn.Parameter(value.detach(), requires_grad=False) for key, value in started.items()}
    return shared


def start(method: Method[Any], site: Site, shared: Shared) -> dict[str, Tensor]:
    """A site's trained tensors at their start."""
    if not site.matrices:
        return method.init(site, shared)
    parts = [method.init(one, shared) for one in _split(site)]
    return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}


def delta_of(method: Method[Any], site: Site, params: Mapping[str, Tensor], shared: Shared) -> Delta:
    """What the parameters make of a site's matrix, or of all its matrices."""
    if not site.matrices or (method.stacks and not shared.trained and shared.common is None):
        return method.delta(site, params, shared)
    deltas = []  # plain loops: torch.compile follows them
    for index, one in enumerate(_split(site)):
        deltas.append(method.delta(one, {key: value[index] for key, value in params.items()}, shared))
    return _join(deltas)


def _join(deltas: list[Any]) -> Delta:
    first = deltas[0]
    if isinstance(first, LowRank):
        a, b = torch.stack([d.a for d in deltas]), torch.stack([d.b for d in deltas])
        return LowRank(a, b, _column(deltas, "mid"), _column(deltas, "out"), first.scale)
    if isinstance(first, Full):
        return Full(torch.stack([d.delta for d in deltas]))
    if isinstance(first, Shift):
        return Shift(torch.stack([d.bias for d in deltas]))
    if isinstance(first, Rescale):
        inner = None if first.inner is None else _join([d.inner for d in deltas])
        assert inner is None or isinstance(inner, (LowRank, Full))
        return Rescale(inner, _column(deltas, "rows"), _column(deltas, "cols"), first.scale_bias)
    raise UnsupportedError(f"a {type(first).__name__} of several experts at once is not there")


def _column(deltas: list[Any], name: str) -> Tensor | None:
    values = [getattr(delta, name) for delta in deltas]
    return None if values[0] is None else torch.stack(values)


def export(
    method: Method[Any], sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared
) -> Export:
    """The adapter as it goes to a file; a site of several matrices has one tensor of them all for each key."""
    whole = {name: site for name, site in sites.items() if site.matrices and name in params}
    if not whole:
        return method.export(sites, params, shared)
    apart_sites, apart_params = dict(sites), {name: dict(own) for name, own in params.items()}
    for name, site in whole.items():
        own = apart_params.pop(name)
        for index, one in enumerate(_split(site)):
            apart_sites[one.name] = one
            apart_params[one.name] = {key: value[index] for key, value in own.items()}
    made = method.export(apart_sites, apart_params, shared)
    tensors = dict(made.tensors)
    for name, site in whole.items():
        first = f"{name}.0."
        for key in [full.removeprefix(first) for full in tensors if full.startswith(first)]:
            parts = [tensors.pop(f"{name}.{index}.{key}") for index in range(site.matrices)]
            tensors[f"{name}.{key}"] = _one(parts)
    return replace(made, tensors=tensors)


def _one(parts: list[Tensor]) -> Tensor:
    """One tensor of all; where they are one number in memory, as a plan's are, it stays one number."""
    first = parts[0]
    if not any(first.stride()) and all(part.data_ptr() == first.data_ptr() for part in parts):
        return first.expand(len(parts), *first.shape)
    return torch.stack(parts)
