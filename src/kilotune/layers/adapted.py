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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..added_modules import Added
from ..deltas import Delta, Full, LowRank, Rescale, Residual, Shift
from ..errors import MergeError, UnsupportedError
from ..kernels.lowrank import accumulate_dtype, lift, no_autocast, scale_features
from ..kinds import LayerKind, hooked
from ..methods import Site
from ..storage import Kept, Storage
from ..storage.sharded import is_sharded, whole_parts
from . import fusion, in_order
from .active_adapters import ActiveState, Running
from .bare import Bare
from .fusion import leading
from .outside import Shown
from .reading import give, in_forward
from .replicas import settle, with_parameters
from .routing import changed_rows
from .slot import BIAS, Merged, Slot, slot_key
from .substitutes import deltas_of, recipe, substitutes

__all__ = ["AdaptedLayer", "Merged"]


@final
class AdaptedLayer(Shown):
    """A base layer with any number of adapters; joins a kind, a storage and methods.

    Attributes of the base layer (``in_features``, ``weight``) are passed through; in a forward, its weight and bias
    come with the live adapters in them (reading.py). Assigning these two (as transformers does when it ties weights)
    reaches the base layer.
    """

    _unsettled = False

    def __init__(
        self,
        base_layer: nn.Module,
        kind: LayerKind,
        storage: Storage,
        state: ActiveState,
        read_by_parent: bool = False,
    ) -> None:
        super().__init__()
        if kind.parameter is None:
            self.base_layer = base_layer
        else:  # the module belongs to the AdaptedParameters around it
            self.__dict__["base_layer"] = base_layer
        self.adapters: nn.ModuleDict = Added().train(base_layer.training)
        self._kind, self._storage, self._state = kind, storage, state
        self._read_by_parent = read_by_parent
        self._input_name = next(iter(inspect.signature(base_layer.forward).parameters), "input")
        self._merged: tuple[str, ...] = ()
        self._kept: Kept = {}
        self._bare = Bare()
        self._input_dtype: torch.dtype | None = None  # the last input's, where the storage computes in that
        self.training = base_layer.training

    # -- slots -----------------------------------------------------------------------------------

    @property
    def kind(self) -> LayerKind:
        return self._kind

    @property
    def storage(self) -> Storage:
        """How the base layer keeps its weight."""
        return self._storage

    @property
    def state(self) -> ActiveState:
        """Which adapters of the model are on."""
        return self._state

    @property
    def read_by_parent(self) -> bool:
        """Whether the layer's parent reads its weight itself."""
        return self._read_by_parent

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters whose deltas are in the weight now."""
        return self._merged

    @property
    def kept(self) -> Kept:
        """The base's own parameters while adapters are merged; else empty."""
        return self._kept

    def site(self, name: str) -> Site:
        """What a method may know of this layer, under the dotted name ``name``."""
        kind, module = self._kind, self.base_layer
        out, inn = kind.features(module)
        reads = (self.base_matrix, self.compute_dtype, self.compute_device)
        return Site(
            name,
            out,
            inn,
            *reads,
            fan_in=kind.fan_in(module),
            kernel_positions=kind.kernel_positions(module),
            matrices=kind.matrices(module),
            output=kind.output_features(module),
            input=kind.input_features(module),
            held=self.base_tensors,
            gather=partial(self.base_matrix, gather=True),
        )

    def slot(self, adapter: str) -> Slot | None:
        """The slot of ``adapter`` in this layer, or None."""
        return cast("Slot | None", self.adapters._modules.get(slot_key(adapter)))

    def add(self, adapter: str, slot: Slot) -> None:
        slot.train(self.training)
        self.adapters[slot_key(adapter)] = slot

    def remove(self, adapter: str) -> None:
        del self.adapters[slot_key(adapter)]

    # -- what a Site reads -----------------------------------------------------------------------

    def base_matrix(self, dtype: torch.dtype | None = None, gather: bool = False) -> Tensor:
        """The base weight as the canonical matrix (out, in), whether adapters are merged or not.

        Args:
            dtype: in which to give it; by default the one in which the layer computes.
            gather: gather a sharded one, which all processes have to do.

        """
        if dtype is None and not self._storage.lossless:
            dtype = self.compute_dtype()
        kept: Kept | None = self._kept or None
        if gather and any(map(is_sharded, self.base_tensors())):
            kept = whole_parts(self._storage.keep(self.base_layer))
        return self._kind.canonical(self.base_layer, self._storage.read(self.base_layer, kept, dtype))

    def base_tensors(self) -> tuple[Tensor, ...]:
        """The parameters of the base layer, whether adapters are merged or not."""
        held = self._kept or self.base_layer._parameters
        return tuple(tensor for tensor in held.values() if tensor is not None)

    def base_bias(self) -> Tensor | None:
        """The base bias (out,), whether adapters are merged or not."""
        return self._storage.read_bias(self.base_layer, self._kept or None)

    def compute_dtype(self) -> torch.dtype:
        if self._input_dtype is not None and self._storage.follows_input(self.base_layer):
            return self._input_dtype
        return self._storage.dtype(self.base_layer)

    def compute_device(self) -> torch.device:
        return self._storage.device(self.base_layer)

    # -- forward ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output and the changes of all live adapters."""
        now = self._state.now()
        slots = self._live(now) if now.route is None else []
        if not slots and now.route is None:
            base_layer = self.base_layer
            if now.disabled and self._merged:
                base_layer = self._bare.of(base_layer, self._storage, self._kept, self._merged)
            return self._kind.call(base_layer, None, args, kwargs)
        x = given = cast(Tensor, args[0] if args else kwargs.get(self._input_name))
        if not self._storage.lossless:
            x = self._as_computed(x)
        if now.route is not None:
            output = self._kind.call(self.base_layer, None, args, kwargs)
            return self._kind.with_tensor(output, changed_rows(self, now.route, x, self._kind.tensor_of(output)))
        self.ran(slots)
        if not self._kind.substitutes and in_order.ordered(self, slots):
            return in_order.run(self, x, args, kwargs)
        deltas, base = deltas_of(slots), None
        if self._kind.substitutes:
            output = self._kind.run_with(self.base_layer, substitutes(self, slots, deltas), args, kwargs)
            deltas = [(slot, delta) for slot, delta in deltas if isinstance(delta, Residual)]
        else:
            shift = self._total_shift(slots, deltas)
            alone = len(args) + len(kwargs) == 1 and x is given
            fused = self._fused(deltas, shift, x) if alone else None
            if fused is not None:
                output, deltas = fused
            else:
                output = self._kind.call(self.base_layer, shift, args, kwargs)
                other = shift is not None or self._merged or hooked(self.base_layer)  # its output is not W x + bias
                base = None if other else self._kind.tensor_of(output)
        if not deltas:
            return output
        return self._kind.with_tensor(output, self.run_deltas(deltas, x, base, self._kind.tensor_of(output)))

    def run_deltas(self, deltas: Sequence[tuple[Slot, Delta]], x: Tensor, base: Tensor | None, y: Tensor) -> Tensor:
        """Y with changes of the layer in it, but for those of its bias. base: its own output, where it is at hand."""
        for last in (False, True):  # what is not linear comes after what is
            for slot, delta in deltas:
                if isinstance(delta, Residual) is last:
                    y = _RUN[type(delta)](self, slot, delta, x, base, y)
        return y

    def _fused(
        self, deltas: list[tuple[Slot, Delta]], shift: Tensor | None, x: Tensor
    ) -> tuple[Tensor, list[tuple[Slot, Delta]]] | None:
        """The output of the layer and one change in one function, and the changes that are left to add to it."""
        lead = None if self._merged else leading(deltas)
        if lead is None or (lead[0].drops and self._kind.takes_dropout):
            return None
        y = fusion.run(self._kind, self._storage, self.base_layer, *lead, x, self._state.way)
        if y is None:
            return None
        if shift is not None:
            y = y + self._kind.spread(shift, y).to(y.dtype)
        return y, [(slot, delta) for slot, delta in deltas if slot is not lead[0]]

    def _as_computed(self, x: Tensor) -> Tensor:
        """The input in the dtype in which a quantised layer computes, whatever the model around it runs in."""
        if x.dtype != self._input_dtype and self._storage.follows_input(self.base_layer):
            self._input_dtype = x.dtype
        return x.to(self.compute_dtype())

    def given(self) -> dict[str, Any]:
        """What a module that this layer is a parameter of is to use in place of its own, by their names."""
        now, storage, module = self._state.now(), self._storage, self.base_layer
        if now.disabled:
            return {name: self._kept[name] for name in (storage.weight_name, storage.bias_name) if name in self._kept}
        slots = self._live(now)
        if not slots:
            return {}
        if self._kind.matrices(module):
            return substitutes(self, slots, deltas_of(slots))
        found = {}
        for bias, name in ((False, storage.weight_name), (True, storage.bias_name)):
            held, own = getattr(module, name, None), [slot for slot in slots if slot.changes(bias)]
            if own and held is not None:
                found[name] = give(recipe(self, held, own, bias, routed=False))
        return found

    def ran(self, slots: Sequence[Slot] | None = None) -> None:
        """Tell who watches that ``slots``, by default the live ones, have acted."""
        if not torch.compiler.is_compiling() and self._state.watch is not None:
            self._state.watch.ran(self._live(self._state.now()) if slots is None else slots)

    def _live(self, now: Running) -> list[Slot]:
        live = []
        for name in now.live:
            if name not in self._merged and (slot := self.slot(name)) is not None:
                live.append(slot)
        return live

    def _total_shift(self, slots: Sequence[Slot], deltas: Sequence[tuple[Slot, Delta]]) -> Tensor | None:
        total: Tensor | None = None
        shifts = [delta.bias for _, delta in deltas if isinstance(delta, Shift)]
        bias = self.base_bias()
        for slot in slots:
            if slot.trained_bias is not None and bias is not None:
                shifts.append(self.flat(slot.trained_bias - bias))
        for shift in shifts:
            total = shift if total is None else total + shift
        return total

    def flat(self, bias: Tensor) -> Tensor:
        """A stored bias as (out,), or (E, out) for several matrices."""
        return bias if self._kind.matrices(self.base_layer) else bias.flatten()

    def _drop(self, slot: Slot, x: Tensor) -> Tensor:
        return slot.drop(x) if self._kind.takes_dropout else x

    def added(self, slot: Slot, delta: LowRank | Full, x: Tensor, y: Tensor, cols: Tensor | None = None) -> Tensor:
        """Y and the change's matrix (or it times diag(cols)) times x (..., out); a low rank stays factored."""
        kind, module = self._kind, self.base_layer
        if isinstance(delta, Full):
            return y + kind.run_full(module, delta, x, cols, y, self.compute_dtype()).to(y.dtype)
        if cols is not None:
            h = kind.project_scaled(module, x, delta.a, cols)  # (..., r)
        else:
            h = slot.first_product(x, delta.a, lambda: kind.project(module, x, delta.a))
        if (axis := kind.feature_axis(module, y)) is not None:
            return lift(y, h, fusion.factors_of(delta), axis)
        mid = None if delta.mid is None else kind.spread(delta.mid, h)
        h = kind.lift(module, scale_features(h, mid, delta.scale), delta.b)  # (..., out)
        return y + (h if delta.out is None else scale_features(h, kind.spread(delta.out, h), 1.0)).to(y.dtype)

    def _run_linear(self, slot: Slot, delta: Delta, x: Tensor, base: Tensor | None, y: Tensor) -> Tensor:
        assert isinstance(delta, (LowRank, Full))
        return self.added(slot, delta, self._drop(slot, x), y)

    def _run_shift(self, slot: Slot, delta: Delta, x: Tensor, base: Tensor | None, y: Tensor) -> Tensor:
        return y  # the base layer ran with the shifted bias

    def _run_rescale(self, slot: Slot, delta: Delta, x: Tensor, base: Tensor | None, y: Tensor) -> Tensor:
        """Y + [rows (W + inner)(cols x) - W x] + change of the bias; ``base`` is W x + bias, where it is at hand."""
        assert isinstance(delta, Rescale)
        kind, bias, module = self._kind, self.base_bias(), self.base_layer
        if delta.inner is not None and (dropped := self._drop(slot, x)) is not x:
            x, base = dropped, None  # as in PEFT's DoRA, the whole change takes the input after dropout
        if base is not None and delta.scale_bias and delta.rows is not None and delta.cols is None is delta.inner:
            return y + scale_features(base, kind.spread(delta.rows - 1.0, base), 1.0).to(y.dtype)  # rounds once
        alone = y is base and delta.cols is not None  # then W x is not needed
        linear = None
        if not alone:
            linear = kind.run(module, x, self.base_matrix()) if base is None else self._without_bias(base, bias)
        if linear is None or delta.cols is not None:
            new = kind.run(module, x, self.base_matrix(), delta.cols)
        else:
            new = linear
        if delta.inner is not None:
            new = self.added(slot, delta.inner, x, new, delta.cols)
        if delta.rows is not None:
            new = scale_features(new, kind.spread(delta.rows, new), 1.0)
        y = new.to(y.dtype) if linear is None else y + (new - linear).to(y.dtype)
        for vector in (bias if alone else None, delta.bias_change(bias)):
            y = y if vector is None else y + kind.spread(vector, y).to(y.dtype)
        return y

    def _without_bias(self, base: Tensor, bias: Tensor | None) -> Tensor:
        return base if bias is None else base - self._kind.spread(bias, base).to(base.dtype)

    def _run_residual(self, slot: Slot, delta: Delta, x: Tensor, base: Tensor | None, y: Tensor) -> Tensor:
        assert isinstance(delta, Residual)
        kind, module = self._kind, self.base_layer
        source = slot.drop(kind.features_last(module, y if delta.source == "output" else x))  # (..., features)
        features = delta.down.shape[1]
        if source.shape[-1] != features:
            raise UnsupportedError(
                f"{slot.site.name}: the adapter reads {features} features, as the linear layers inside a "
                f"{type(self.base_layer).__name__} have, and its {delta.source} has {source.shape[-1]}; name a layer "
                "inside it instead"
            )
        down_bias, up_bias = (None if b is None else b.to(source.dtype) for b in (delta.down_bias, delta.up_bias))
        h = delta.activation(F.linear(source, delta.down.to(source.dtype), down_bias))  # (..., width)
        change = F.linear(h, delta.up.to(source.dtype), up_bias)  # (..., out)
        change = change if delta.scale == 1.0 else change * delta.scale
        return y + kind.features_back(module, change).to(y.dtype)

    # -- merge -----------------------------------------------------------------------------------

    @torch.no_grad()
    def merged_with(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Merged:
        """Weight and bias with the deltas of ``names`` in them, from the base's own bits; changes nothing.

        Args:
            names: adapters, in the order in which they act with ``dtype``, else in that of activation; those that are
                not in this layer are passed over.
            dtype: measure what rounding to this dtype takes; by default, what writing into the base takes.

        """
        with no_autocast(self.compute_device()):
            return self._merged_with(names, dtype)

    def _merged_with(self, names: Sequence[str], dtype: torch.dtype | None) -> Merged:
        pairs = in_order.pairs(self, names, self._state.active if dtype is None else ())
        deltas = [delta for _, delta in pairs if delta is not None]
        bias = self.base_bias()
        wide = None if bias is None else bias.to(accumulate_dtype(bias.dtype))
        total = in_order.bias_with(wide, pairs, self.flat)
        same = total is None or (wide is not None and torch.equal(total, self.flat(wide)))
        new_bias = None if same or total is None else self._kind.native_bias(self.base_layer, total)
        weight, lost, error = self._merged_weight([d for d in deltas if not isinstance(d, Shift)], dtype)
        return Merged(weight, new_bias, lost, error)

    def _merged_weight(self, deltas: Sequence[Delta], dtype: torch.dtype | None) -> tuple[Tensor | None, float, float]:
        if not deltas:
            return None, 0.0, 0.0
        kind, module = self._kind, self.base_layer
        base = self.base_matrix(accumulate_dtype(self.compute_dtype()))  # (out, in)
        total = in_order.weight_with(base, deltas)
        change = total - base
        weight = kind.native(module, total)
        if change.device.type == "meta":
            return weight, 0.0, 0.0
        stored = self._storage.rounded(module, weight) if dtype is None else weight.to(dtype).to(weight.dtype)
        off = float((kind.canonical(module, stored) - base - change).norm())
        lost, error = (off / norm if (norm := float(of.norm())) > 0 else 0.0 for of in (change, total))
        return weight, lost, error

    def kept_parameters(self) -> Iterator[nn.Parameter]:
        """The base's own parameters that are put aside while adapters are merged."""
        own = (self._storage.weight_name, self._storage.bias_name)
        return (p for name, p in self._kept.items() if p is not None and name in own)

    @torch.inference_mode(False)  # weights made in inference mode could never be trained against
    def merge(self, names: Sequence[str]) -> Merged | None:
        """Put the deltas of ``names`` into the weight, beside those merged already; None where there are none here."""
        own = [name for name in names if self.slot(name) is not None]
        if not own:
            return None
        merged = self.merged_with([*self._merged, *own])
        if not self._kept:
            self._kept = self._storage.keep(self.base_layer)
        self._storage.write(self.base_layer, merged.weight, merged.bias)
        self._merged = (*self._merged, *own)
        return merged

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

    def check_mergeable(self, names: Sequence[str], where: str) -> None:
        """Raise MergeError for a delta that cannot be merged."""
        for name in names:
            slot = self.slot(name)
            if slot is not None and slot.method is not None and not slot.method.makes.mergeable:
                raise MergeError(f"{where}: adapter {name!r} ({slot.method.name}) is not linear and cannot be merged")
            shifts = slot is not None and slot.method is not None and slot.method.makes is Shift
            if shifts and not self._kind.bias_slot(self.base_layer):
                raise MergeError(
                    f"{where}: adapter {name!r} changes the bias, but a {type(self.base_layer).__name__} has no place "
                    "for one, so it cannot be merged; leave the adapter unmerged, or exclude such layers with "
                    "exclude_modules"
                )

    # -- nn.Module -------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._storage.move(self._kept, fn)  # kept out of the module tree while merged, yet it must follow
        self._bare.forget()
        return self

    def _replicate_for_data_parallel(self) -> nn.Module:
        return with_parameters(super()._replicate_for_data_parallel(), self._state)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
        own = name in (self._storage.weight_name, self._storage.bias_name)
        if own and self._unsettled:
            settle(self)
        found = self.foreign(self.base_layer, name)
        if own and (found is None or isinstance(found, Tensor)):
            return self._read(name == self._storage.bias_name, found)
        return found

    def _read(self, bias: bool, held: Tensor | None) -> Tensor | None:
        """The weight or bias for code outside of the layer: in a forward with all changes in it (reading.py)."""
        now = self._state.now()
        if now.disabled:
            return (
                self._kept.get(self._storage.bias_name if bias else self._storage.weight_name) if self._kept else held
            )
        slots = self._live(now) if now.route is None else now.route.slots(self)
        slots = [slot for slot in slots if slot.changes(bias)]
        # Attention asks outside, too, whether its out_proj has a bias, which an adapter may have brought.
        gained = held is None and self._read_by_parent
        if not slots or not (gained or in_forward()):
            return held
        how = recipe(self, held, slots, bias, now.route is not None)
        return how.build() if held is None or self._read_by_parent else give(how)

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
