"""Train, validation and test: read from their sources, or held out of train with a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from ...errors import ConfigError, faults_of, gather
from .columns import Groups, labels, resolve
from .readers import HUB, read
from .tables import Numbers, Table

if TYPE_CHECKING:
    from ..settings.sections import DataSettings

__all__ = ["SPLITS", "Part", "load_splits", "shown"]

SPLITS = ("train", "validation", "test")


@final
@dataclass(frozen=True)
class Part:
    """One split of the data.

    Attributes:
        name: train, validation or test.
        table: its rows.
        columns: role -> column.
    """

    name: str
    table: Table
    columns: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.table)


def load_splits(data: DataSettings, groups: Groups, task: str, seed: int, stratify: bool = False) -> dict[str, Part]:
    """The splits that there are, each with its columns' roles; train is always among them, without rows if need be.

    Args:
        data: where they are.
        groups: the roles that the task takes.
        task: its name, for messages.
        seed: decides which rows are held out.
        stratify: held-out rows keep the shares of the classes in the role ``label``, and no class leaves train.

    Raises:
        ConfigError: a split cannot be read, is empty, or lacks a column; the faults of all splits at once.

    """
    tables = _tables(data)
    faults: list[str] = []
    columns: dict[str, dict[str, str]] = {}
    for name, table in tables.items():
        try:
            columns[name] = resolve(table, data.columns, groups, task, f"data.{name}")
        except ConfigError as error:
            faults += faults_of(error)
    faults += [] if faults else _different(columns)
    if faults:
        raise ConfigError(gather("the data cannot be used:", faults))
    parts = {name: Part(name, table, columns[name]) for name, table in tables.items()}
    if "train" not in parts:  # what is trained already can be scored without it
        some = next(iter(parts.values()))
        parts = {"train": Part("train", some.table.take(np.zeros(0, np.int64)), some.columns), **parts}
    return _held_out(parts, data, seed, stratify)


def shown(parts: Mapping[str, Part]) -> Part:
    """The first split that has rows: train, if there is one."""
    return next(part for part in parts.values() if len(part))


def _tables(data: DataSettings) -> dict[str, Table]:
    """The splits that have a source of their own."""
    faults = _unused(data)
    tables: dict[str, Table] = {}
    for name in SPLITS:
        try:
            if (table := _source(data, name)) is not None:
                tables[name] = table
        except ConfigError as error:
            faults += faults_of(error)
    if not tables and not faults:
        faults.append("data.train: no data is given; set a file, a folder or hub:NAME")
    faults += [f"data.{name}: {_where(data, name)} has no rows" for name, table in tables.items() if not len(table)]
    if faults:
        raise ConfigError(gather("the data cannot be used:", faults))
    if data.limit is not None and "train" in tables:
        tables["train"] = tables["train"].take(np.arange(min(data.limit, len(tables["train"]))))
    return tables


def _listed(source: str | Sequence[str] | None) -> list[str]:
    return [source] if isinstance(source, str) else list(source or ())


def _where(data: DataSettings, name: str) -> str:
    return ", ".join(_listed(getattr(data, name))) or "what data.splits names"


def _from_hub(data: DataSettings, name: str) -> bool:
    return data.format == "hub" or any(item.startswith(HUB) for item in _listed(getattr(data, name)))


def _unused(data: DataSettings) -> list[str]:
    """Settings that would have no effect."""
    faults = []
    if not any(_from_hub(data, name) for name in SPLITS if getattr(data, name) is not None):
        given = [name for name in ("subset", "splits") if getattr(data, name)]
        faults += [f"data.{name}: has no effect without a data set of the hub (hub:NAME)" for name in given]
    for name in ("validation", "test"):
        if getattr(data, f"{name}_fraction") and data.train is None:
            faults.append(f"data.{name}_fraction: there is no data.train to hold rows out of")
        if getattr(data, f"{name}_fraction") and name in data.splits:
            faults.append(f"data.{name}_fraction: has no effect beside data.splits.{name}; give one of them")
    return faults


def _source(data: DataSettings, name: str) -> Table | None:
    """The table of a split: of its own source, or another split of train's hub data set."""
    source = getattr(data, name)
    if source is None and name in data.splits and data.train is not None:
        source = data.train
    if source is None:
        return None
    split = data.splits.get(name, name)
    return read(source, name=f"data.{name}", kind=data.format, subset=data.subset, split=split)


def _different(columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    first, *others = columns.items()
    return [
        f"data.{name} has {', '.join(roles)}, and data.{first[0]} has {', '.join(first[1])}"
        for name, roles in others
        if roles != first[1]
    ]


# -- holding out ---------------------------------------------------------------------------------------


def _held_out(parts: dict[str, Part], data: DataSettings, seed: int, stratify: bool) -> dict[str, Part]:
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    wanted = {name: fraction for name, fraction in fractions.items() if fraction and name not in parts}
    if not wanted:
        return parts
    train = parts["train"]
    counts = {name: max(1, round(fraction * len(train))) for name, fraction in wanted.items()}
    groups = _groups(train) if stratify else np.zeros(len(train), np.int64)
    left, chosen = _choose(groups, list(counts.values()), seed, keep_one=stratify)
    if len(left) == 0 or any(len(rows) < count for rows, count in zip(chosen, counts.values())):
        asked = " and ".join(f"{count} for {name}" for name, count in counts.items())
        raise ConfigError(f"data.train has {len(train)} rows, too few to hold out {asked}; give data.validation a file")
    split = {name: Part(name, train.table.take(rows), train.columns) for name, rows in zip(wanted, chosen)}
    kept = {**parts, "train": Part("train", train.table.take(left), train.columns), **split}
    return {name: kept[name] for name in SPLITS if name in kept}


def _groups(part: Part) -> Numbers:
    """The class of each row as a number; rows whose class cannot be read are reported later, with the others."""
    names: Any = [name or "" for name in labels(part.table, part.columns["label"], [])]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _choose(groups: Numbers, counts: Sequence[int], seed: int, keep_one: bool) -> tuple[Numbers, list[Numbers]]:
    """(rows left, rows of each part), each in the rows' own order.

    The rows are shuffled, put in order of their group, and every so manieth is taken, so that each part has every
    group's share to within one row. With ``keep_one`` the first row of each group is never taken.
    """
    order = np.random.default_rng(seed).permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    if keep_one:
        first = np.unique(groups[order], return_index=True)[1]
        kept, order = order[first], np.delete(order, first)
    else:
        kept = order[:0]
    chosen = []
    for count in counts:
        at = np.unique(((np.arange(count) + 0.5) * len(order) / count).astype(np.int64)) if len(order) else order[:0]
        chosen.append(np.sort(order[at]))
        order = np.delete(order, at)
    return np.sort(np.concatenate([kept, order])), chosen
