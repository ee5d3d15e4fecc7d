"""The classes of a data set: their names, their order, and the rows that do not fit them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError, did_you_mean, gather
from .splits import Part, shown

__all__ = ["class_names", "counted", "in_order", "numbered"]

SHOWN = 12


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once: by value where all are whole numbers, else by the alphabet."""
    unique = set(names)
    try:
        return tuple(sorted(unique, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(unique))


def class_names(
    parts: Mapping[str, Part], found: Mapping[str, Sequence[Sequence[str]]], role: str, known: Sequence[str] | None
) -> tuple[str, ...]:
    """The classes' names in the order of their numbers.

    Args:
        parts: the splits.
        found: split -> the classes of each of its rows (one, or one per word).
        role: the column's role.
        known: the classes of a head that is there already; None: those of train, or of the data set's own list.

    Raises:
        ConfigError: train has one class only, or another split has classes that train has not; all at once.

    """
    first = shown(parts).name  # train, if there is one
    seen = {name for row in found[first] for name in row}
    own = parts[first].table.classes.get(parts[first].columns[role])
    names = tuple(known) if known is not None else own if own is not None else in_order(seen)
    faults = []
    if first == "train" and len(seen) < 2:
        only = f"has the one class {next(iter(seen))!r} in all its rows" if seen else "has no class"
        faults.append(f"data.train: column {parts[first].columns[role]!r} {only}, so there is nothing to learn")
    where = "of the model's head" if known is not None else "in data.train"
    for split, rows in found.items():
        faults += _strange(parts[split], rows, names, where)
    if faults:
        raise ConfigError(gather("the classes do not fit:", faults))
    return names


def _strange(part: Part, rows: Sequence[Sequence[str]], names: Sequence[str], where: str) -> list[str]:
    """A line for each class that is not among ``names``: where it is first, and how often."""
    known = set(names)
    first: dict[str, int] = {}
    count: dict[str, int] = {}
    for number, row in enumerate(rows):
        for name in row:
            if name not in known:
                first.setdefault(name, number)
                count[name] = count.get(name, 0) + 1
    listed = ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
    return [
        f"{part.table.places[row]}: class {name!r} ({count[name]} times in data.{part.name}) is not {where}."
        f"{did_you_mean(name, names)} Classes: {listed}"
        for name, row in first.items()
    ]


def counted(numbers: Sequence[int], names: Sequence[str]) -> str:
    """``a: 10, b: 12``: rows per class, the first few."""
    counts = [0] * len(names)
    for number in numbers:
        counts[number] += 1
    shown = [f"{name}: {count:,}" for name, count in zip(names, counts)]
    return ", ".join(shown[:SHOWN]) + (f", and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def numbered(rows: Sequence[Any], names: Sequence[str]) -> list[int]:
    """Class numbers for names."""
    number = {name: i for i, name in enumerate(names)}
    return [number[row] for row in rows]
