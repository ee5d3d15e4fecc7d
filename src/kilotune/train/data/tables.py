"""Rows of data with the place that each came from, so that an error can name file and line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np

from ...errors import ConfigError, gather

__all__ = ["Places", "Table", "together"]

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@final
@dataclass(frozen=True)
class Places:
    """Where rows stand.

    Attributes:
        sources: files or data sets.
        unit: what joins a source and a number: ``:`` for lines of a file, `` row ``; empty where a source is one row.
        source: (rows,), which of the sources.
        number: (rows,), the line or row in it, counted from 1.
    """

    sources: tuple[str, ...]
    unit: str
    source: Numbers
    number: Numbers

    @staticmethod
    def of(source: str, unit: str, numbers: Sequence[int] | Numbers) -> Places:
        """All rows of one source."""
        return Places((source,), unit, np.zeros(len(numbers), np.int64), np.asarray(numbers, np.int64))

    @staticmethod
    def files(paths: tuple[str, ...]) -> Places:
        """Each row is a file by itself."""
        return Places(paths, "", np.arange(len(paths)), np.zeros(len(paths), np.int64))

    def __getitem__(self, row: int) -> str:
        if not self.unit:
            return self.source_of(row)
        return f"{self.source_of(row)}{self.unit}{self.number[row]}"

    def source_of(self, row: int) -> str:
        """The file or data set that a row is from."""
        return self.sources[int(self.source[row])]

    def folder_of(self, row: int) -> Path | None:
        """What a path in this row is relative to; None: the working directory."""
        source = Path(self.source_of(row))
        return source.parent if self.unit and source.is_file() else None

    def take(self, rows: Numbers) -> Places:
        """The places of these rows."""
        return Places(self.sources, self.unit, self.source[rows], self.number[rows])


@final
@dataclass(frozen=True)
class Table:
    """Rows of one split.

    Attributes:
        rows: of known length; row i is a mapping from column to value. A list, or a ``datasets.Dataset``.
        columns: the names, in order.
        places: where each row stands.
        classes: column -> class names, where numbers in it stand for classes.
    """

    rows: Any
    columns: tuple[str, ...]
    places: Places
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Numbers) -> Table:
        """These rows, in this order."""
        held = [self.rows[i] for i in rows] if isinstance(self.rows, list) else self.rows.select(rows)
        return Table(held, self.columns, self.places.take(rows), self.classes)

    def values(self, column: str) -> Iterator[Any]:
        """One column, row by row; None where a row lacks it."""
        if isinstance(self.rows, list):
            return (row.get(column) for row in self.rows)
        return self._stored(column)

    def _stored(self, column: str) -> Iterator[Any]:
        for batch in self.rows.select_columns([column]).iter(1000):
            yield from batch[column]


def together(tables: Sequence[Table]) -> Table:
    """The rows of several sources, one after the other.

    Raises:
        ConfigError: what the sources hold cannot stand in one table.

    """
    if len(tables) == 1:
        return tables[0]
    units = {table.places.unit for table in tables}
    if len({isinstance(table.rows, list) for table in tables}) > 1 or len(units) > 1:
        names = ", ".join(source for table in tables for source in table.places.sources)
        raise ConfigError(f"these are of several formats, and cannot be read as one split: {names}")
    sizes = [len(table.places.sources) for table in tables]
    firsts = np.cumsum([0, *sizes[:-1]])
    places = Places(
        tuple(source for table in tables for source in table.places.sources),
        units.pop(),
        np.concatenate([table.places.source + first for table, first in zip(tables, firsts)]),
        np.concatenate([table.places.number for table in tables]),
    )
    columns = tuple(dict.fromkeys(column for table in tables for column in table.columns))
    classes = {column: names for table in tables for column, names in table.classes.items()}
    _same_classes(tables)
    return Table(_joined([table.rows for table in tables], places.sources), columns, places, classes)


def _joined(parts: Sequence[Any], sources: Iterable[str]) -> Any:
    if isinstance(parts[0], list):
        return [row for part in parts for row in part]
    from datasets import concatenate_datasets

    try:
        return concatenate_datasets(list(parts))
    except (ValueError, TypeError) as error:
        message = f"the columns of {', '.join(sources)} are of different types: {error}"
        raise ConfigError(message) from error


def _same_classes(tables: Sequence[Table]) -> None:
    faults = []
    for column in {column for table in tables for column in table.classes}:
        if len({table.classes.get(column) for table in tables}) > 1:
            faults.append(f"column {column!r} numbers its classes differently from file to file")
    if faults:
        raise ConfigError(gather("these files cannot be read as one split:", faults))
