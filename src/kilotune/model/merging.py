"""Merging on the whole model: all layers or none, checks before anything is changed, and what rounding took."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from .._ui.progress import track
from ..errors import MergeError, gather
from ..injection.inject import Installed, check_compatible, strip
from ..layers.active_adapters import ActiveState
from ..layers.adapted import AdaptedLayer, Merged
from ..layers.saved_module import SavedModule
from ..layers.slot import Slot
from ..storage import forget_quantisation, is_pretrained, put_parameter, storage_of, unknown_scheme
from ..storage.sharded import SHARDED, is_sharded, is_unit

__all__ = [
    "LayerError",
    "MergePrecisionWarning",
    "MergeReport",
    "all_or_nothing",
    "check_choice",
    "check_finite",
    "merge",
    "untie",
]

LOST_BOUND = 0.05
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class MergePrecisionWarning(UserWarning):
    """Merging lost a good part of the adapter: the weights' dtype is narrow (16-bit) for it, or they are quantised."""


# -- what was lost ---------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class LayerError:
    """What storing one merged weight took.

    error: the norm of (what was written - what was wanted) over the norm of what was wanted. lost: the same
    norm over that of the adapter's change; 1 means that the error is as large as all that was trained.
    scheme: how the weight is stored now.
    """

    error: float
    lost: float
    scheme: str


@final
@dataclass(frozen=True)
class MergeReport:
    """What the last merge took, by layer; only layers whose weight was written."""

    layers: Mapping[str, LayerError]

    @property
    def worst(self) -> str | None:
        """The layer that lost the largest part of its change."""
        return max(self.layers, key=lambda name: self.layers[name].lost, default=None)

    def table(self) -> str:
        """One line for each layer."""
        width = max([len(name) for name in self.layers] + [len("layer")])
        lines = [f"{'layer':<{width}}  {'error':>9}  {'of change':>9}  stored as"]
        for name, layer in self.layers.items():
            lines.append(f"{name:<{width}}  {layer.error:>9.2e}  {layer.lost:>9.2%}  {layer.scheme}")
        return "\n".join(lines)

    def warn(self) -> None:
        """Warn when a layer lost more than a twentieth of its change."""
        worst = self.worst
        if worst is None or self.layers[worst].lost <= LOST_BOUND:
            return
        layer = self.layers[worst]
        if layer.scheme in {str(dtype).removeprefix("torch.") for dtype in FLOATS}:
            text = (
                f"merging rounded {layer.lost:.0%} of the adapter's change in {worst!r} away: it is too small for the "
                "dtype of the weights; merge into wider weights, or leave the adapter unmerged"
            )
        else:
            text = (
                f"re-quantising moved the merged weight of {worst!r} by {layer.lost:.0%} of the adapter's change "
                f"({layer.scheme}); merge_and_unload(dtype=torch.bfloat16) keeps the change, and so does leaving the "
                "adapter unmerged"
            )
        warnings.warn(text, MergePrecisionWarning, stacklevel=5)


def _report(layers: Mapping[str, AdaptedLayer], made: Mapping[str, Merged | None], scheme: str | None) -> MergeReport:
    found = {}
    for where, merged in made.items():
        if merged is not None and merged.weight is not None:
            layer = layers[where]
            stored = layer.storage.scheme(layer.base_layer) if scheme is None else scheme
            found[where] = LayerError(merged.error, merged.lost, stored)
    return MergeReport(found)


# -- checks and contexts ---------------------------------------------------------------------------


@contextmanager
def all_or_nothing(layers: Mapping[str, AdaptedLayer], state: ActiveState) -> Iterator[None]:
    """Out of memory, or Ctrl-C, in the midst of merging: go back to where it began, allocating nothing."""
    before = [(layer, layer.snapshot()) for layer in layers.values()]
    active, merged = state.active, state.merged
    try:
        yield
    except BaseException:
        for layer, held in before:
            layer.restore(held)
        state.change(active, merged)
        raise


def check_choice(
    layers: Mapping[str, AdaptedLayer], names: Sequence[str], dtype: torch.dtype | None, requantize: bool
) -> None:
    """Into what ``names`` are merged for good must be said where a weight is quantised, and make sense where not.

    Raises:
        MergeError: neither or both of ``dtype`` and ``requantize`` for a quantised base, ``requantize`` for
            another, or no floating-point dtype.

    """
    touched = {where: layer for where, layer in layers.items() if any(layer.slot(name) for name in names)}
    quantised = [where for where, layer in touched.items() if not layer.storage.lossless]
    if dtype is not None and dtype not in FLOATS:
        raise MergeError(f"merge_and_unload: dtype: expected one of {', '.join(map(str, FLOATS))}, got {dtype!r}")
    if requantize not in (True, False):
        raise MergeError(f"merge_and_unload: requantize: expected True or False, got {requantize!r}")
    if dtype is not None and requantize:
        raise MergeError(
            "merge_and_unload: dtype gives a dense model and requantize=True a quantised one; give one of them"
        )
    if requantize and not quantised:
        raise MergeError(
            "merge_and_unload: requantize=True, but no adapted layer is quantised, so there is nothing to go back to; "
            "leave it out (the weights keep their dtype), or give dtype="
        )
    if quantised and dtype is None and not requantize:
        layer = touched[quantised[0]]
        raise MergeError(
            f"merge_and_unload: {len(quantised)} of {len(touched)} adapted layers are quantised ({quantised[0]!r}: "
            f"{layer.storage.scheme(layer.base_layer)}), so you must choose: dtype=torch.bfloat16 gives a dense model "
            "that computes what was trained, in four times the memory of 4-bit weights; requantize=True keeps them "
            "quantised, and rounds the merged weights anew, with the error that merge_report shows"
        )


def check_finite(layers: Mapping[str, AdaptedLayer], names: Sequence[str], dtype: torch.dtype | None = None) -> None:
    """Raise MergeError if merging ``names`` (for good into ``dtype``, where given) would give a value that is not
    finite; changes nothing."""
    broken = []
    for where, layer in layers.items():
        result = layer.merged_with([*(layer.merged if dtype is None else ()), *names])
        values = [v.to(dtype or layer.compute_dtype()) for v in (result.weight, result.bias) if v is not None]
        if not all(bool(torch.isfinite(v).all()) for v in values if v.device.type != "meta"):
            broken.append(f"{where}: the merged weight would hold values that are not finite")
    if broken:
        raise MergeError(gather(f"safe_merge refused adapters {list(names)}; nothing was changed:", broken))


# -- merging ---------------------------------------------------------------------------------------


def merge(
    root: nn.Module,
    dtype: torch.dtype | None,
    layers: Mapping[str, AdaptedLayer],
    installed: Mapping[str, Installed],
    state: ActiveState,
    names: Sequence[str],
    safe: bool,
    show: bool,
) -> MergeReport:
    """Merge ``names`` in all layers or in none, and warn of what is lost.

    Args:
        root: the base model, with its wrappers.
        dtype: None puts them into the weights beside what is merged; a dtype makes ``root`` a dense model in it,
            without wrappers, that has exactly ``names``.
        layers: the adapted layers by name.
        installed: the model's adapters by name.
        state: which are active and merged; changed.
        names: the adapters to merge.
        safe: first compute everything, and refuse if a value is not finite.
        show: show the progress.

    Raises:
        MergeError, UnsupportedError: what cannot be merged, or not together; nothing is changed.

    """
    together = [*names, *state.merged, *state.active] if dtype is None else names
    check_compatible({name: installed[name] for name in dict.fromkeys(together)})
    for where, layer in layers.items():
        layer.check_mergeable(names, where)
    _check_whole(root, layers)
    if safe:
        check_finite(layers, names, dtype)
    if dtype is None:
        with all_or_nothing(layers, state):  # a warning that is an error takes it back, too
            made = {where: layers[where].merge(names) for where in track(list(layers), "merging", show=show)}
            state.change(merged=(*state.merged, *names))
            report = _report(layers, made, None)
            report.warn()
        return report
    dense = DenseModel(root, layers, names, dtype, show)
    if safe:
        dense.check_finite()
    dense.report.warn()
    state.change(tuple(names), ())
    dense.put_in(lambda saved: saved.current())
    return dense.report


def _check_whole(root: nn.Module, layers: Mapping[str, AdaptedLayer]) -> None:
    kept = any(map(is_unit, root.modules()))  # what is gathered now goes back into shards, as it was
    for where, layer in layers.items():
        if kept or any(map(is_sharded, layer.base_tensors())):
            raise MergeError(
                f"{where}: its weight {SHARDED}; save_pretrained() the adapter, and merge where one process holds the "
                "base"
            )


def untie(base: nn.Module) -> None:
    """Where merging for good took tied weights of a transformers model apart, say so in its config, as PEFT does:
    loading and ``tie_weights()`` would tie them again.

    The flag is one for all ties of a model, so those that still hold get values of their own too.
    """
    pairs = dict(getattr(base, "all_tied_weights_keys", None) or {}) if is_pretrained(base) else {}
    named = dict(base.named_parameters(remove_duplicate=False)) if pairs else {}
    pairs = {a: b for a, b in pairs.items() if a in named and b in named}
    if all(named[a] is named[b] for a, b in pairs.items()):
        return
    for name in (a for a, b in pairs.items() if named[a] is named[b]):
        owner, _, key = name.rpartition(".")
        twin = nn.Parameter(named[name].detach().clone(), requires_grad=named[name].requires_grad)
        base.get_submodule(owner).register_parameter(key, twin)
    model: Any = base
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


# -- merging into a dense model --------------------------------------------------------------------


@final
class DenseModel:
    """A merged model whose every float is in one dtype, made ready beside the old one.

    Making it changes nothing, and :meth:`put_in` allocates nothing; so running out of memory leaves the old model.
    Buffers that a transformers model does not save (the frequencies of rotary embeddings) stay as they are:
    loading such a model in a 16-bit dtype leaves them in float32 too.

    Args:
        root: the base model, with its wrappers.
        layers: its adapted layers.
        names: the adapters to merge; those merged now, and not named, are left out.
        dtype: of the dense model. The sums are made in float32 (or float64) and rounded to it once.
        show: show the progress.

    Raises:
        MergeError: a quantised module of a kind that cannot be made dense.

    """

    @torch.no_grad()
    @torch.inference_mode(False)  # weights made in inference mode could never be trained against
    def __init__(
        self, root: nn.Module, layers: Mapping[str, AdaptedLayer], names: Sequence[str], dtype: torch.dtype, show: bool
    ) -> None:
        self._root, self._layers, self._dtype = root, layers, dtype
        self._pretrained = any(is_pretrained(module) for module in root.modules())
        self._new: dict[nn.Module, nn.Module] = {}
        self._written: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}
        made = {}
        for where in track(list(layers), "merging", show=show):
            made[where] = self._merge(layers[where], names)
        self.report = _report(layers, made, str(dtype).removeprefix("torch."))
        self._cast_rest()

    def _merge(self, layer: AdaptedLayer, names: Sequence[str]) -> Merged:
        merged = layer.merged_with(names, self._dtype)
        base, storage = layer.base_layer, layer.storage
        if storage.lossless:
            for name, value in ((storage.weight_name, merged.weight), (storage.bias_name, merged.bias)):
                if value is not None:
                    self._written.append((base, name, nn.Parameter(self._fresh(value), requires_grad=False)))
            for parameter in layer.kept_parameters():
                self._add(parameter)
        else:
            weight = merged.weight
            if weight is None:
                weight = layer.kind.native(base, layer.base_matrix(torch.float32))
            bias = layer.base_bias() if merged.bias is None else merged.bias
            self._new[base] = storage.dense(base, weight, bias, self._dtype)
        return Merged(None if merged.weight is None else torch.empty(0), None, merged.lost, merged.error)

    def _cast_rest(self) -> None:
        faults = []
        written = {(id(module), name) for module, name, _ in self._written}
        for where, module in self._root.named_modules():
            if module in self._new or isinstance(module, (AdaptedLayer, Slot)):
                continue
            storage = storage_of(module)
            if storage is not None and not storage.lossless:
                weight = storage.read(module, None, torch.float32)
                self._new[module] = storage.dense(module, weight, storage.read_bias(module), self._dtype)
                continue
            for name, parameter in module._parameters.items():
                if parameter is None or (id(module), name) in written:
                    continue
                if parameter.dtype not in FLOATS or type(parameter.data) is not Tensor:
                    held = f"{type(parameter.data).__name__} of {str(parameter.dtype).removeprefix('torch.')}"
                    faults.append(f"{where}.{name}".lstrip(".") + f": {held} in a {type(module).__name__}")
                self._add(parameter)
            self._add_buffers(module)
            if (scheme := unknown_scheme(module)) is not None:
                faults.append(f"{where or 'the model'}: transformers has it quantised by {scheme!r}")
        if faults:
            raise MergeError(gather("some quantised parameters cannot be made dense; nothing was changed:", faults))

    def _add_buffers(self, module: nn.Module) -> None:
        for name, buffer in module._buffers.items():
            if buffer is not None and not (self._pretrained and name in module._non_persistent_buffers_set):
                self._add(buffer)

    def _fresh(self, value: Tensor) -> Tensor:
        return value.detach().to(self._dtype, memory_format=torch.contiguous_format, copy=True).contiguous()

    def _add(self, tensor: Tensor) -> None:
        if tensor.is_floating_point() and tensor.dtype != self._dtype:
            self._cast.setdefault(id(tensor), (tensor, tensor.detach().to(self._dtype)))

    def check_finite(self) -> None:
        """Raise MergeError where a value that was finite is not in the new dtype; nothing is changed.

        The adapted layers' weights are :func:`check_finite`'s.
        """
        broken = sum(
            bool((torch.isfinite(old) & ~torch.isfinite(new)).any())
            for old, new in self._cast.values()
            if new.device.type != "meta"
        )
        if broken:
            raise MergeError(
                f"safe_merge refused dtype={self._dtype}: {broken} tensors of the model besides the merged ones hold "
                "values beyond its range; nothing was changed"
            )

    def put_in(self, saved: Callable[[SavedModule], nn.Module]) -> None:
        """Take the wrappers out and put the new weights in; ``saved``: see :func:`~kilotune.injection.inject.strip`."""
        for layer in self._layers.values():
            layer.unmerge()
        for tensor, value in self._cast.values():
            tensor.data, tensor.grad = value, None
        for module, name, parameter in self._written:
            put_parameter(module, name, parameter)
        strip(self._root, saved, self._new)
        forget_quantisation(self._root, self._dtype)
