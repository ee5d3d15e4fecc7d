"""Which adapters of a model are active, and whether they are switched off: for all its layers, and all threads."""

from __future__ import annotations

from collections.abc import Sequence

from ..layers.active_adapters import ActiveState

__all__ = ["active", "is_off", "set_active", "switch"]


def switch(state: ActiveState, on: bool) -> None:
    """Switch all adapters of a model off, for all threads, or on again: those that were active."""
    if on and state.switched_off is not None:
        names, state.switched_off = state.switched_off, None
        state.change(active=names)
    elif not on and state.switched_off is None:
        state.switched_off = state.active
        state.change(active=())


def active(state: ActiveState) -> list[str]:
    """The names of the active adapters, whether they are switched off or not."""
    return list(state.active if state.switched_off is None else state.switched_off)


def is_off(state: ActiveState) -> bool:
    """Whether adapters are switched off, or disabled here."""
    return state.switched_off is not None or state.now().disabled


def set_active(state: ActiveState, names: Sequence[str]) -> None:
    """Make other adapters the active ones; where all are switched off, as soon as they are switched on again."""
    if state.switched_off is None:
        state.change(active=tuple(names))
    else:
        state.switched_off = tuple(names)
