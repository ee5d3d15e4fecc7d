"""AdaptedLayer: the one class around a layer with deltas. Forward, merge, disable, dtype and dropout live here.

::

    AdaptedLayer
      base_layer            the module that was there; its weight is never copied
      adapters[name]: Slot  one adapter's trained parameters here; asks its method for the delta
      _kind, _storage       how the weight is seen, and how it is read
      _state: ActiveState   shared by all layers of a model: which adapters are on
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deltas import Delta, Full, LowRank, Rescale, Residual, Shift
from .errors import MergeError, gather
from .kernels.lowrank import accumulate_dtype, scale_features
from .kinds import LayerKind
from .methods import Method, Shared, Site
from .storage import Kept, Storage

__all__ = ["ActiveState", "AdaptedLayer", "MergePrecisionWarning", "SavedModule", "Slot", "slot_key", "warn_of_loss"]

BIAS = "bias"
LOST_BOUND = 0.05


class MergePrecisionWarning(UserWarning):
    """Merging rounded a good part of the adapter away, because the weights' dtype is narrow (16-bit) for it."""


_TAKEN = frozenset(dir(nn.ModuleDict()))  # of an instance: those that __init__ sets as well


def slot_key(name: str) -> str:
    """An adapter's name as a key of ModuleDict, which allows no dots and no names of its own attributes."""
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"{key}%" if key in _TAKEN else key


@final
class ActiveState:
    """Which adapters of a model are on; one object, read by all its layers."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.disabled = False

    @property
    def live(self) -> tuple[str, ...]:
        return () if self.disabled else self.active

    def __getstate__(self) -> dict[str, Any]:
        if self.disabled:  # the copy would be disabled for good, its weights those of the moment
            raise MergeError("cannot copy or save a model inside disable_adapter(); leave its context first")
        return self.__dict__


@final
class Slot(nn.Module):
    """One adapter's part of one layer: its trained parameters, and the method that reads them.

    ``method`` is None where only the bias is trained. The trained bias is kept as the bias's full value,
    as PEFT writes it; its delta is the difference to the base's.
    """

    def __init__(self, site: Site, method: Method[Any] | None, shared: Shared, params: Mapping[str, nn.Parameter]):
        super().__init__()
        self.site, self.method, self.shared = site, method, shared
        for name, parameter in params.items():
            self.register_parameter(name, parameter)

    @property
    def trained_bias(self) -> Tensor | None:
        return self._parameters.get(BIAS)

    def own(self) -> dict[str, nn.Parameter]:
        """The method's parameters, without the trained bias."""
        return {name: p for name, p in self._parameters.items() if name != BIAS and p is not None}

    def delta(self) -> Delta | None:
        return None if self.method is None else self.method.delta(self.site, self.own(), self.shared)

    def drop(self, x: Tensor) -> Tensor:
        rate = 0.0 if self.method is None else self.method.config.dropout
        return F.dropout(x, rate, training=True) if rate > 0.0 and self.training else x


@final
@dataclass(frozen=True)
class Merged:
    """What merging one layer would write: weight and bias (None: unchanged), and the rounding error.

    ``lost``: the norm of the part of the change that the weight's dtype rounds away, over the change's.
    """

    weight: Tensor | None
    bias: Tensor | None
    lost: float


@final
class AdaptedLayer(nn.Module):
    """A base layer with any number of adapters; joins a kind, a storage and methods.

    Attributes of the base layer (``in_features``, ``weight``) are passed through, and assigning ``weight``
    or ``bias`` (as transformers does when it ties weights) reaches the base layer.
    """

    def __init__(self, base_layer: nn.Module, kind: LayerKind, storage: Storage, state: ActiveState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict().train(base_layer.training)
        self._kind, self._storage, self._state = kind, storage, state
        self._input_name = next(iter(inspect.signature(base_layer.forward).parameters), "input")
        self._merged: tuple[str, ...] = ()
        self._kept: Kept = {}
        self._suspended: Kept = {}
        self.training = base_layer.training

    # -- slots -----------------------------------------------------------------------------------

    @property
    def kind(self) -> LayerKind:
        return self._kind

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters whose deltas are in the weight now."""
        return self._merged

    def site(self, name: str) -> Site:
        """What a method may know of this layer, under the dotted name ``name``."""
        out, inn = self._kind.features(self.base_layer)
        return Site(name, out, inn, self.base_matrix, self.compute_dtype, self.compute_device)

    def slot(self, adapter: str) -> Slot | None:
        """The slot of ``adapter`` in this layer, or None."""
        return cast("Slot | None", self.adapters._modules.get(slot_key(adapter)))

    def add(self, adapter: str, slot: Slot) -> None:
        slot.train(self.training)
        self.adapters[slot_key(adapter)] = slot

    def remove(self, adapter: str) -> None:
        del self.adapters[slot_key(adapter)]

    # -- what a Site reads -----------------------------------------------------------------------

    def base_matrix(self) -> Tensor:
        """The base weight as the canonical matrix (out, in), whether adapters are merged or not."""
        return self._kind.canonical(self.base_layer, self._storage.read(self.base_layer, self._kept or None))

    def base_bias(self) -> Tensor | None:
        """The base bias (out,), whether adapters are merged or not."""
        return self._kept[BIAS] if BIAS in self._kept else self.base_layer._parameters.get(BIAS)

    def compute_dtype(self) -> torch.dtype:
        return self._storage.dtype(self.base_layer)

    def compute_device(self) -> torch.device:
        return self._storage.device(self.base_layer)

    # -- forward ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output and the changes of all live adapters."""
        slots = self._live()
        if not slots:
            return self._kind.call(self.base_layer, None, args, kwargs)
        deltas: list[tuple[Slot, Delta]] = []  # plain loops: torch.compile follows them
        for slot in slots:
            delta = slot.delta()
            if delta is not None:
                deltas.append((slot, delta))
        shift = self._total_shift(slots, deltas)
        y = self._kind.call(self.base_layer, shift, args, kwargs)
        base = None if shift is not None or self._merged else y
        if deltas:
            x = args[0] if args else kwargs[self._input_name]
            for last in (False, True):  # what is not linear comes after what is
                for slot, delta in deltas:
                    if isinstance(delta, Residual) is last:
                        y = _RUN[type(delta)](self, slot, delta, x, base, y)
        return y

    def _live(self) -> list[Slot]:
        live = []
        for name in self._state.live:
            slot = None if name in self._merged else self.slot(name)
            if slot is not None:
                live.append(slot)
        return live

    def _total_shift(self, slots: Sequence[Slot], deltas: Sequence[tuple[Slot, Delta]]) -> Tensor | None:
        total: Tensor | None = None
        shifts = [delta.bias for _, delta in deltas if isinstance(delta, Shift)]
        bias = self.base_bias()
        for slot in slots:
            if slot.trained_bias is not None and bias is not None:
                shifts.append(slot.trained_bias - bias)
        for shift in shifts:
            total = shift if total is None else total + shift
        return total

    def _through(self, delta: LowRank | Full, x: Tensor) -> Tensor:
        """The change's matrix times x: (..., in) -> (..., out), never building the matrix of a low rank."""
        kind, module = self._kind, self.base_layer
        if isinstance(delta, Full):
            return kind.project(module, x, delta.delta.to(self.compute_dtype()))
        h = kind.project(module, x, delta.a)  # (..., r)
        mid = None if delta.mid is None else kind.spread(delta.mid, h)
        h = kind.lift(module, scale_features(h, mid, delta.scale), delta.b)  # (..., out)
        return h if delta.out is None else scale_features(h, kind.spread(delta.out, h), 1.0)

    def _run_linear(self, slot: Slot, delta: Delta, x: Tensor, base: Tensor | None, y: Tensor) -> Tensor:
        assert isinstance(delta, (LowRank, Full))
        return y + self._through(delta, slot.drop(x)).to(y.dtype)

    def _run_shift(self, slot: Slot, delta: Delta, x: Tensor, base: Tensor | None, y: Tensor) -> Tensor:
        return y  # the base layer ran with the shifted bias

    def _run_rescale(self, slot: Slot, delta: Delta, x: Tensor, base: Tensor | None, y: Tensor) -> Tensor:
        """Y + [rows (W + inner)(cols x) - W x] + change of the bias; ``base`` is W x + bias, where it is at hand."""
        assert isinstance(delta, Rescale)
        kind, bias = self._kind, self.base_bias()
        linear = (
            kind.project(self.base_layer, x, self.base_matrix()) if base is None else self._without_bias(base, bias)
        )
        scaled = x if delta.cols is None else scale_features(x, kind.spread(delta.cols, x), 1.0)
        new = linear if delta.cols is None else kind.project(self.base_layer, scaled, self.base_matrix())
        if delta.inner is not None:
            new = new + self._through(delta.inner, slot.drop(scaled)).to(new.dtype)
        if delta.rows is not None:
            new = scale_features(new, kind.spread(delta.rows, new), 1.0)
        y = y + (new - linear)
        shift = delta.bias_change(bias)
        return y if shift is None else y + kind.spread(shift, y).to(y.dtype)

    def _without_bias(self, base: Tensor, bias: Tensor | None) -> Tensor:
        return base if bias is None else base - self._kind.spread(bias, base).to(base.dtype)

    def _run_residual(self, slot: Slot, delta: Delta, x: Tensor, base: Tensor | None, y: Tensor) -> Tensor:
        assert isinstance(delta, Residual)
        source = slot.drop(y if delta.source == "output" else x)
        h = F.linear(source, delta.down.to(source.dtype))
        return y + F.linear(delta.activation(h), delta.up.to(source.dtype)).to(y.dtype)

    # -- merge -----------------------------------------------------------------------------------

    @torch.no_grad()
    def merged_with(self, names: Sequence[str]) -> Merged:
        """Weight and bias with the deltas of ``names`` in them, from the base's own bits; changes nothing."""
        slots = [slot for name in names if (slot := self.slot(name)) is not None]
        deltas = [delta for slot in slots if (delta := slot.delta()) is not None]
        bias = self.base_bias()
        wide_bias = None if bias is None else bias.to(accumulate_dtype(bias.dtype))
        shifts = [change for delta in deltas if (change := delta.bias_change(wide_bias)) is not None]
        shifts += [s.trained_bias - bias for s in slots if s.trained_bias is not None and bias is not None]
        new_bias = None if not shifts else sum(shifts, torch.zeros_like(shifts[0]) if wide_bias is None else wide_bias)
        weight, lost = self._merged_weight([d for d in deltas if not isinstance(d, Shift)])
        return Merged(weight, new_bias if isinstance(new_bias, Tensor) else None, lost)

    def _merged_weight(self, deltas: Sequence[Delta]) -> tuple[Tensor | None, float]:
        if not deltas:
            return None, 0.0
        dtype = self.compute_dtype()
        base = self.base_matrix().to(accumulate_dtype(dtype))  # (out, in)
        change = torch.zeros_like(base)
        for delta in deltas:
            part = delta.weight_change(base)
            if part is not None:
                change += part
        total = base + change
        rounded = total.to(dtype).to(total.dtype)
        norm = float(change.norm()) if change.device.type != "meta" else 0.0
        lost = float((rounded - base - change).norm()) / norm if norm > 0 else 0.0
        return self._kind.native(self.base_layer, total), lost

    def kept_parameters(self) -> Iterator[nn.Parameter]:
        """The base's own parameters that are put aside while adapters are merged."""
        return (p for p in self._kept.values() if p is not None)

    @torch.inference_mode(False)  # weights made in inference mode could never be trained against
    def merge(self, names: Sequence[str]) -> float:
        """Put the deltas of ``names`` into the weight, beside those merged already; returns the part lost."""
        own = [name for name in names if self.slot(name) is not None]
        if not own:
            return 0.0
        merged = self.merged_with([*self._merged, *own])
        if not self._kept:
            self._kept = self._storage.keep(self.base_layer)
        self._storage.write(self.base_layer, merged.weight, merged.bias)
        self._merged = (*self._merged, *own)
        return merged.lost

    def unmerge(self) -> None:
        """Give back the very bits of the base."""
        if self._kept:
            self._storage.restore(self.base_layer, self._kept)
        self._kept, self._merged = {}, ()

    def snapshot(self) -> tuple[Kept, tuple[str, ...], Kept]:
        """What :meth:`restore` needs to bring back what is merged now; copies nothing."""
        return self._storage.keep(self.base_layer), self._merged, self._kept

    def restore(self, before: tuple[Kept, tuple[str, ...], Kept]) -> None:
        """Bring back what was merged when ``before`` was taken; allocates nothing."""
        held, self._merged, self._kept = before
        self._storage.restore(self.base_layer, held)

    def suspend_merge(self) -> None:
        """Run with the base's weights until :meth:`resume_merge`."""
        self._suspended = self._storage.keep(self.base_layer)
        self._storage.restore(self.base_layer, self._kept)

    def resume_merge(self) -> None:
        """Put the merged weights back."""
        self._storage.restore(self.base_layer, self._suspended)
        self._suspended = {}

    def check_mergeable(self, names: Sequence[str], where: str) -> None:
        """Raise MergeError for a delta that cannot be merged."""
        for name in names:
            slot = self.slot(name)
            if slot is not None and slot.method is not None and not slot.method.makes.mergeable:
                raise MergeError(f"{where}: adapter {name!r} ({slot.method.name}) is not linear and cannot be merged")

    # -- nn.Module -------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in (*self._kept.values(), *self._suspended.values()):
            if parameter is not None:  # kept out of the module tree while merged, yet it must follow
                parameter.data = fn(parameter.data)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", BIAS):
            super().__setattr__(name, value)
        elif self._kept:
            raise MergeError(
                f"cannot set {name!r} of a layer while {list(self._merged)} are merged into it; unmerge first"
            )
        else:
            setattr(self.base_layer, name, value)


_RUN: dict[type[Delta], Callable[[AdaptedLayer, Slot, Delta, Tensor, Tensor | None, Tensor], Tensor]] = {
    LowRank: AdaptedLayer._run_linear,
    Full: AdaptedLayer._run_linear,
    Rescale: AdaptedLayer._run_rescale,
    Shift: AdaptedLayer._run_shift,
    Residual: AdaptedLayer._run_residual,
}


@final
class SavedModule(nn.Module):
    """A module of which each adapter has a whole trained copy of its own (``modules_to_save``).

    With no live adapter that has a copy, the original runs.
    """

    def __init__(self, original: nn.Module, state: ActiveState) -> None:
        super().__init__()
        self.original_module = original
        self.copies = nn.ModuleDict().train(original.training)
        self._state = state
        self.training = original.training

    def current(self) -> nn.Module:
        """The module that runs now."""
        merged = () if self._state.disabled else self._state.merged
        for name in reversed((*merged, *self._state.live)):
            if (key := slot_key(name)) in self.copies:
                return self.copies[key]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "copies", "_state"):
                raise
            return getattr(self.current(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", BIAS):  # as transformers does when it ties weights
            setattr(self.original_module, name, value)
        else:
            super().__setattr__(name, value)

    # A base model may go through a list of modules by itself; truth is not length, as for any module.
    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(cast(Sized, self.current()))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(cast(Iterable[nn.Module], self.current()))

    def __getitem__(self, index: Any) -> Any:
        return cast(nn.ModuleList, self.current())[index]


def check_finite(layers: Mapping[str, AdaptedLayer], names: Sequence[str]) -> None:
    """Raise MergeError if merging ``names`` would give a value that is not finite; changes nothing."""
    broken = []
    for where, layer in layers.items():
        result = layer.merged_with([*layer.merged, *names])
        values = [v.to(layer.compute_dtype()) for v in (result.weight, result.bias) if v is not None]
        if not all(bool(torch.isfinite(v).all()) for v in values if v.device.type != "meta"):
            broken.append(f"{where}: the merged weight would hold values that are not finite")
    if broken:
        raise MergeError(gather(f"safe_merge refused adapters {list(names)}; nothing was changed:", broken))


def warn_of_loss(lost: Mapping[str, float]) -> None:
    """Warn when merging lost more than a twentieth of a change; ``lost``: by layer, see :class:`Merged`."""
    worst = max(lost, key=lambda name: lost[name], default=None)
    if worst is not None and lost[worst] > LOST_BOUND:
        warnings.warn(
            f"merging rounded {lost[worst]:.0%} of the adapter's change in {worst!r} away: it is too small for the "
            "dtype of the weights; merge into wider weights, or leave the adapter unmerged",
            MergePrecisionWarning,
            stacklevel=4,
        )
