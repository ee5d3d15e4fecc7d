"""SavedModule: the wrapper around a module that adapters train whole (``modules_to_save``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, cast, final

from torch import Tensor, nn

from ..added_modules import Added
from ..errors import TargetError, gather
from ..storage import storage_of
from ..storage.sharded import is_unit
from .active_adapters import ActiveState, Running
from .outside import Shown
from .reading import Recipe, give, in_forward
from .replicas import with_parameters
from .routing import run_saved
from .slot import BIAS, slot_key

__all__ = ["SavedModule", "check_trainable"]


def check_trainable(parts: Mapping[str, nn.Module]) -> None:
    """Raise TargetError where a copy of one of the base's modules could not be trained: its weights are quantised.

    torchao's tensors even claim to want a gradient, and get none.

    Args:
        parts: the modules to be copied and those inside them, by name.

    """
    faults = [
        f"{name}: {type(module).__name__} ({why})" for name, module in parts.items() if (why := _untrainable(module))
    ]
    if faults:
        what = "modules_to_save: quantised weights cannot be trained; name these in target_modules instead, or load "
        what += "the base with them left out of the quantisation:"
        if all("sharded by itself" in fault for fault in faults):
            what = "modules_to_save: these cannot be copied:"
        raise TargetError(gather(what, faults))


def _untrainable(module: nn.Module) -> str:
    """Why a copy of a module's own weights cannot be trained; '' where it can."""
    if is_unit(module):
        return "sharded by itself; add the adapter first, and shard afterwards"
    storage = storage_of(module)
    if storage is not None and not storage.lossless:
        return storage.refusal(module) or storage.scheme(module)
    codes = [f"{name} is {p.dtype}" for name, p in module._parameters.items() if p is not None and not _trains(p)]
    return ", ".join(codes)


def _trains(parameter: nn.Parameter) -> bool:
    return parameter.is_complex() or (parameter.is_floating_point() and parameter.element_size() > 1)


@final
class SavedModule(Shown):
    """A module of which each adapter has a whole trained copy of its own (``modules_to_save``).

    Of several live adapters that have one, the last one's runs, which stands on the others. With none, the original
    runs, which may have wrappers of other adapters around and in it.
    """

    def __init__(self, original: nn.Module, state: ActiveState) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save: nn.ModuleDict = Added().train(original.training)
        self._state = state
        self.training = original.training

    @property
    def state(self) -> ActiveState:
        """Which adapters of the model are on."""
        return self._state

    def current(self) -> nn.Module:
        """The module that runs now."""
        return self._current(self._state.now())

    def _current(self, now: Running) -> nn.Module:
        merged = () if now.disabled else self._state.merged
        for name in reversed((*merged, *now.live)):  # the live ones, merged or not, are above what is only merged
            if (key := slot_key(name)) in self.modules_to_save:
                return self.modules_to_save[key]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        now = self._state.now()
        if now.route is not None:
            return run_saved(now.route, self.modules_to_save, self.original_module, args, kwargs)
        return self._current(now)(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> nn.Module:
        return with_parameters(super()._replicate_for_data_parallel(), self._state)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save", "_state"):
                raise
        found = self.foreign(self.current(), name)
        return self._read(name, found) if isinstance(found, Tensor) and in_forward() else found

    def _read(self, name: str, held: Tensor) -> Tensor:
        """What a forward outside gets that reads a tensor of the module."""
        route = self._state.now().route
        if route is None:
            return held
        held = getattr(self.original_module, name)
        if not any(slot_key(adapter) in self.modules_to_save for adapter in route.names):
            return held
        what = f"the code around this {type(self.original_module).__name__}, which adapters replace whole, computes "
        why = f"with its {name!r} itself, which is one for all rows of a batch; run one adapter at a time"
        return give(Recipe.refused(held, what + why))

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
