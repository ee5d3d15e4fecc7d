"""Which adapters of a model are active, and which of them train."""

from __future__ import annotations

import warnings
from abc import ABC
from collections.abc import Sequence
from typing import Self

from ..adapter_files.content import content_sha256, file_of
from ..adapter_files.stands_on import StandsOn, StandsOnWarning
from ..errors import AdapterError, ConfigError, MergeError, did_you_mean
from ..injection.installed_adapter import check_compatible, let_train, set_requires_grad
from ..storage.sharded import is_sharded
from .routed_model import RoutedModel
from .unused_layers import watch

__all__ = ["ActiveModel"]


class ActiveModel(RoutedModel, ABC):
    """What a model with adapters needs so that some of them run, and some of these train."""

    _perhaps_trained: set[str]  # no other adapter's parameters have gradients

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(self._state.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list of names where it is not exactly one."""
        return self._state.active[0] if len(self._state.active) == 1 else self.active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that are merged into the weights now."""
        merged = self._state.merged
        return [name for name in self._installed if name in merged] if merged else []

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several at once, the active ones; the others get no gradient at all.

        As in PEFT they train, whatever they were loaded for. Several act in the order in which they are named, each on
        what those before it have left; of modules that several replace whole (``modules_to_save``) the last one's copy
        runs. A stack, of which the top one alone is trained::

            model.set_adapter(["house-style", "ann"], inference_mode=True)
            model.set_requires_grad("ann")  # from here on its file says that it stands on the house style
            ...
            model.save_pretrained("ann", selected_adapters=["ann"])

        An adapter whose file says what it stands on, without that beneath it, is told of by a :class:`StandsOnWarning`.

        Args:
            adapter_name: a name, or several, the lowest first.
            inference_mode: True: their parameters are frozen.

        Raises:
            AdapterError: an unknown name. UnsupportedError: adapters that cannot be active together.

        """
        if not isinstance(adapter_name, (str, Sequence)):
            raise AdapterError(f"set_adapter: expected a name or a list of names, got {adapter_name!r}")
        if inference_mode not in (True, False):
            raise ConfigError(f"set_adapter: inference_mode: expected True or False, got {inference_mode!r}")
        self._activate(tuple(self._named(adapter_name)), train=not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them, whether they are active or not; the next :meth:`set_adapter` says anew.

        One that trains on top of a single frozen one, both active, stands on that one: its file will say so.

        Args:
            adapter_names: a name, or several.
            requires_grad: False: they are frozen, and their gradients dropped.

        Raises:
            AdapterError: an unknown name.

        """
        if not isinstance(adapter_names, (str, Sequence)):
            raise AdapterError(f"set_requires_grad: expected a name or a list of names, got {adapter_names!r}")
        if requires_grad not in (True, False):
            raise ConfigError(f"set_requires_grad: requires_grad: expected True or False, got {requires_grad!r}")
        for name in self._named(adapter_names):
            let_train(self._installed[name], requires_grad)
            if requires_grad:
                self._perhaps_trained.add(name)
                self._note_beneath(name)

    def _activate(self, names: tuple[str, ...], train: bool) -> None:
        if merged := self.merged_adapters:
            raise MergeError(
                f"cannot change the active adapters while {merged} are merged; call unmerge_adapter() first"
            )
        check_compatible({name: self._installed[name] for name in names})
        self._tell_of_lacking(names)
        self._state.change(active=names)
        self._set_requires_grad(train)

    def _note_beneath(self, name: str) -> None:
        """Note what an adapter stands on that trains from now on; and that what trains, nobody stands on."""
        for other in self._state.active:
            if (on := StandsOn.of_header(self._installed[other].marks)) is not None and on.name == name:
                self._installed[other].marks = {}
        if name not in self._state.active:
            return
        below = self._state.active[: self._state.active.index(name)]
        if len(below) == 1 and self._is_whole(below[0]) and below[0] not in self._trained():
            on = StandsOn(below[0], None, content_sha256(file_of(self._installed[below[0]])))
            self._installed[name].marks = on.header()

    def _tell_of_lacking(self, names: Sequence[str]) -> None:
        for i, name in enumerate(names):
            on = StandsOn.of_header(self._installed[name].marks)
            if on is None:
                continue
            below = [file_of(self._installed[one]) for one in names[:i] if self._is_whole(one)]
            if on.sha256 not in map(content_sha256, below):
                warnings.warn(
                    f"adapter {name!r} was trained on top of {on}, and runs without it now, which is another thing; "
                    f"load that one too, and set_adapter([{on.name!r}, {name!r}])",
                    StandsOnWarning,
                    stacklevel=4,
                )

    def _is_whole(self, name: str) -> bool:
        """Whether all numbers of an adapter are here."""
        held = [parameter for _, parameter in self._installed[name].parameters()]
        return not any(parameter.is_meta or is_sharded(parameter) for parameter in held)

    def _set_requires_grad(self, train: bool) -> None:
        self._train(self._state.active if train else ())

    def _train(self, names: Sequence[str]) -> None:
        set_requires_grad(self._installed, self._perhaps_trained, self._state.active, names)
        watch(self.model, self._state)

    def _trained(self) -> list[str]:
        """The active adapters that have gradients."""
        active = [name for name in self._state.active if name in self._perhaps_trained]
        return [name for name in active if any(p.requires_grad for _, p in self._installed[name].parameters())]

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of any module: all parameters, the base's too; the next :meth:`set_adapter` sees to the adapters'."""
        self._perhaps_trained.update(self._installed)
        return super().requires_grad_(requires_grad)

    def _known(self, name: str) -> str:
        if not isinstance(name, str) or name not in self._installed:
            have = ", ".join(map(repr, self._installed)) or "none"
            raise AdapterError(f"there is no adapter {name!r}.{did_you_mean(str(name), self._installed)} There: {have}")
        return name

    def _named(self, names: str | Sequence[str]) -> list[str]:
        listed = [names] if isinstance(names, str) else names
        return list(dict.fromkeys(self._known(name) for name in listed))  # a name given twice counts once
