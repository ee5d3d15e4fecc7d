"""The modules of a base model that an adapter may take, and PEFT's rules by which names match them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from .kinds import LayerKind, kind_of
from .name_rules import ends_so, fits, named
from .storage import Storage, storage_of

__all__ = ["Candidate", "candidates", "inside", "matches_names", "saved_whole"]

HINTS = 20  # faults whose nearest names are looked for; an error shows no more


@final
@dataclass(frozen=True)
class Candidate:
    """A module of the base model by its dotted name; ``parent`` is the class that holds it.

    gained: its bias is not the base's, but came with an adapter that is merged now.
    """

    name: str
    module: nn.Module
    parent: type[nn.Module]
    kind: LayerKind | None
    storage: Storage | None
    gained: bool = False


def candidates(modules: Iterable[tuple[str, nn.Module, type[nn.Module]]]) -> list[Candidate]:
    """Look up kind and storage of each (name, module, class of its parent)."""
    return [Candidate(name, m, parent, kind_of(m), storage_of(m)) for name, m, parent in modules]


def matches_names(names: Sequence[str] | str | None, name: str, field: str = "target_modules") -> bool:
    """PEFT's rule: a string is a regular expression for the whole name; a list holds names or their ends.

    Raises:
        ConfigError: the expression takes too long (patterns.py); with the field that it is in.

    """
    if not names:
        return False
    if isinstance(names, str):
        return fits(field, names, name)
    return named(names, name)


def saved_whole(names: Sequence[str] | None, name: str) -> bool:
    """PEFT's rule for modules_to_save: any name that ends so, with no dot before it ('norm': 'input_layernorm' too)."""
    return ends_so(names or (), name)


def inside(names: Sequence[str] | None, name: str) -> bool:
    """Whether modules_to_save takes ``name`` or a module that it lies in."""
    parts = name.split(".")
    return any(saved_whole(names, ".".join(parts[:i])) for i in range(1, len(parts) + 1))
