"""DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) over any low-rank method: W' = m (W + dW) / ||W + dW||.

The norm is that of each row of the canonical matrix (out, in); m (out,) is trained and starts as the norm at the
start, so that a new adapter whose dW is zero changes nothing. The gradient takes the norm for a constant (section
4.3 of the paper), as PEFT does. Over VeRA this is the paper's DVoRA (section 5.5).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..deltas import Delta, LowRank, Rescale, Role
from ..errors import ConfigError
from ..kernels.lowrank import accumulate_dtype, no_autocast
from ..projections.matrices import Projections
from ..storage.sharded import processes
from ._base import Export, Kept, LowRankConfig, Method, Shared, Site

__all__ = ["MAGNITUDE", "Dora", "row_norms"]

MAGNITUDE = "lora_magnitude_vector"
BLOCK = 2**24  # numbers of the adapted matrix that exist at once while its norms are taken


@torch.no_grad()
def row_norms(weight: Tensor, change: LowRank) -> Tensor:
    """The length of each row of ``weight + change``, without gradient: float32, or float64 for float64.

    Rows of length zero get 0; :func:`_divisor` makes ones of those.

    Args:
        weight: (out, in).
        change: of the same shape; built for some rows at a time, so that no second matrix is in memory.

    """
    out, inn = weight.shape
    step, parts = max(1, BLOCK // max(inn, 1)), []
    for first in range(0, out, step):
        rows = slice(first, first + step)
        own = weight[rows].to(accumulate_dtype(weight.dtype))  # (step, in)
        part = replace(change, b=change.b[rows], out=None if change.out is None else change.out[rows])
        with no_autocast(weight.device):
            parts.append(torch.linalg.vector_norm(own + part.weight_change(own), dim=-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _divisor(norms: Tensor) -> Tensor:
    """Ones for the norms that are zero: what is divided is then zero too, and no value is undefined."""
    return torch.where(norms > 0, norms, torch.ones_like(norms))


@final
class Dora(Method[LowRankConfig]):
    """Parameters per layer: those of the method inside, and lora_magnitude_vector (out,).

    Each forward takes the norms of the whole adapted matrix: a product of out x r x in, without a gradient, and at
    most BLOCK numbers of memory. Without gradients (``torch.no_grad()``) they are kept, until a parameter of the
    layer, the base weight, the dtype or the device is another one; a forward with gradients drops them. What is
    written through ``.data`` of a tensor that is not trained is hidden from PyTorch's version counters: run a forward
    with gradients after it, or write under ``torch.no_grad()`` instead. Trained ones are compared by their values.
    """

    name: ClassVar[str] = "dora"
    makes: type[Delta] = Rescale
    minds_strength: bool = True  # the norms are those of the change as strong as it is

    def __init__(self, inner: Method[Any]) -> None:
        self.inner = inner
        self.keys = {**inner.keys, MAGNITUDE: MAGNITUDE}
        self.roles = {**inner.roles, MAGNITUDE: Role.ROWS}
        self.default_targets = inner.default_targets
        self._kept: dict[str, tuple[_Stamp, Tensor]] = {}

    @property
    def config(self) -> LowRankConfig:
        """The configuration of the method inside, which is the adapter's."""
        held: LowRankConfig = self.inner.config
        return held

    @config.setter
    def config(self, value: LowRankConfig) -> None:
        self.inner.config = value

    @property
    def frozen(self) -> frozenset[str]:
        return self.inner.frozen

    @property
    def carried(self) -> frozenset[str]:
        return self.inner.carried

    def carries(self, site: Site) -> dict[str, tuple[int, ...]]:
        return self.inner.carries(site)

    def check_brought(self, shared: Shared, brought: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.inner.check_brought(shared, brought)

    @property
    def needs_out_in(self) -> bool:
        return self.inner.needs_out_in

    @property
    def untrainable(self) -> str | None:
        return self.inner.untrainable

    def completed(self, config: LowRankConfig, model_type: str | None) -> LowRankConfig:
        filled: LowRankConfig = self.inner.completed(config, model_type)
        return filled

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        return self.inner.prepare(adapter, sites, projections)

    def init_model(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return self.inner.init_model(sites)

    def verify(self, shared: Shared) -> None:
        self.inner.verify(shared)

    def count(self, sites: Sequence[Site]) -> int:
        return self.inner.count(sites) + sum(site.out for site in sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        params = self.inner.init(site, shared)
        if site.device().type == "meta":  # a plan: no weight may be read
            magnitude = torch.empty(site.out, device="meta", dtype=torch.float32)
        else:
            magnitude = row_norms(site.whole().detach(), self._change(site, params, shared)).float()
            if not magnitude.any():
                raise ConfigError(
                    f"use_dora: {site.name!r} is all zeros, so its rows have no direction whose length could be "
                    "trained, and the adapter would stay zero; use the method without DoRA there"
                )
        return {**params, MAGNITUDE: magnitude}

    def first_factor(self, site: Site, shared: Shared) -> Hashable | None:
        return self.inner.first_factor(site, shared)

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Rescale:
        own = {name: value for name, value in params.items() if name != MAGNITUDE}
        change = self._change(site, own, shared)
        return Rescale(change, rows=params[MAGNITUDE] / _divisor(self._norms(site, own, shared, change)))

    def _change(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        change = self.inner.delta(site, params, shared)
        assert isinstance(change, LowRank)
        strength = site.strength
        return change if not isinstance(strength, Tensor) and strength == 1.0 else change.times(strength)

    # -- the norms, kept where they cannot have changed --------------------------------------------

    def _norms(self, site: Site, params: Mapping[str, Tensor], shared: Shared, change: LowRank) -> Tensor:
        if torch.compiler.is_compiling():  # compiled code takes them anew each time
            return row_norms(site.read(), change)
        if processes() > 1:  # what FSDP2 gathers does not tell whether it has changed
            return row_norms(site.read(), change)
        if torch.is_grad_enabled():
            self._kept.pop(site.name, None)
            return row_norms(site.read(), change)
        stamp = _Stamp.of(site, [*params.values(), *shared.trained.values()])
        kept = self._kept.get(site.name)
        if stamp is not None and kept is not None and kept[0].same(stamp):
            return kept[1]
        norms = row_norms(site.read(), change)
        if stamp is not None:
            self._kept[site.name] = stamp.with_values(), norms
        return norms

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # a copy has other tensors

    # -- files -------------------------------------------------------------------------------------

    def kept(self, key: str) -> Kept | None:
        return Kept.TRAINED if key == MAGNITUDE else self.inner.kept(key)

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        inner = {module: {k: v for k, v in own.items() if k != MAGNITUDE} for module, own in params.items()}
        made = self.inner.export(sites, inner, shared)
        lengths = {f"{module}.{MAGNITUDE}": own[MAGNITUDE] for module, own in params.items()}
        # PEFT has DoRA for some methods only, and would leave the magnitudes of the others out without a word.
        known = "use_dora" not in self.config.ours()
        return replace(made, tensors={**made.tensors, **lengths}, peft=made.peft and known)


@final
class _Stamp:
    """What tells whether tensors are still the same: which they are, their versions, and where they lie.

    Those that are trained are held against a copy too: a fused optimizer does not raise their versions.
    """

    def __init__(
        self, place: tuple[torch.dtype, torch.device, float], seen: list[tuple[weakref.ref[Tensor], int, int]]
    ):
        self.place, self.seen = place, seen
        self.values: list[Tensor | None] = [None] * len(seen)

    @classmethod
    def of(cls, site: Site, own: Iterable[Tensor]) -> _Stamp | None:
        """Of a layer's weight and the adapter's ``own`` tensors; None where it cannot be told."""
        held = site.held()
        if not held or any(tensor.requires_grad for tensor in held):  # no copy of a weight that is trained as well
            return None
        seen = []
        for tensor in (*held, *own):
            # A view is made anew for each call; what it is a view of stays.
            owner = tensor if tensor._base is None else tensor._base
            if owner.is_inference():  # has no version
                return None
            try:
                seen.append((weakref.ref(owner), owner._version, tensor.data_ptr()))
            except RuntimeError:  # a tensor without storage
                return None
        return cls((site.dtype(), site.device(), float(site.strength)), seen)

    def with_values(self) -> _Stamp:
        """With the copies, which are made only where something is kept."""
        owners = [ref() for ref, _, _ in self.seen]
        self.values = [t.detach().clone() if t is not None and t.requires_grad else None for t in owners]
        return self

    def same(self, other: _Stamp) -> bool:
        """Whether ``other``, of now, is of what this one was taken of."""
        if self.place != other.place or len(self.seen) != len(other.seen):
            return False
        for mine, theirs, value in zip(self.seen, other.seen, self.values, strict=True):
            owner = theirs[0]()
            if owner is None or mine[0]() is not owner or mine[1:] != theirs[1:]:
                return False
            if (value is None and owner.requires_grad) or (value is not None and not torch.equal(value, owner)):
                return False
        return True
