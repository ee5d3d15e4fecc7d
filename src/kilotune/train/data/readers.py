"""Data in: JSON lines, JSON, CSV, Parquet, folders of images, data sets of the hub. What is broken is named by line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ...errors import ConfigError, MissingExtraError, faults_of, first_line, gather
from ..settings.places import HUB, missing_file
from .images import IMAGE_SUFFIXES, image_folder
from .tables import Places, Table, together

__all__ = ["FORMATS", "HUB", "read"]

SUFFIXES: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
MAX_FAULTS = 20  # broken lines of one file before reading it is given up


def read(
    source: str | Sequence[str],
    *,
    name: str = "data.train",
    kind: str = "auto",
    subset: str | None = None,
    split: str = "train",
) -> Table:
    """The rows of a file, several files, a folder of images or of files, or a data set of the hub (``hub:NAME``).

    Args:
        source: paths, or a hub name.
        name: the setting that it stands in, for messages.
        kind: of the files, one of :data:`FORMATS`; ``auto`` goes by the files' names.
        subset: the configuration of a hub data set.
        split: which split of a hub data set.

    Raises:
        ConfigError: what is not there or broken, every fault of all files at once, with file and line.
        MissingExtraError: a package that reads this format is not installed.

    """
    names = [source] if isinstance(source, str) else list(source)
    tables: list[Table] = []
    faults: list[str] = []
    for item in names:
        try:
            tables.append(_read_one(item, kind, subset, split))
        except MissingExtraError:
            raise
        except ConfigError as error:
            faults += faults_of(error)
    if faults:
        raise ConfigError(gather(f"{name} cannot be read:", faults, MAX_FAULTS))
    return together(tables)


def _read_one(source: str, kind: str, subset: str | None, split: str) -> Table:
    if kind == "hub" or (kind == "auto" and source.startswith(HUB)):
        from .hub import read_hub

        return read_hub(source.removeprefix(HUB), subset, split)
    if source.startswith(HUB):
        raise ConfigError(f"{source!r} is a data set of the hub, and data.format is {kind!r}: leave it out")
    path = Path(source).expanduser()
    if (missing := missing_file(source)) is not None:
        raise ConfigError(missing)
    if path.is_dir():
        return _read_folder(path, kind)
    return FORMATS[_format_of(path) if kind == "auto" else kind](path)


def _suffix(path: Path) -> str:
    """The file's ending, without the one of a compressed file."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _format_of(path: Path) -> str:
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise ConfigError(f"{path}: its name does not say what it is (known: {known}); set data.format")
    if suffix == ".json" and _looks_like_lines(path):
        return "jsonl"
    return SUFFIXES[suffix]


def _read_folder(path: Path, kind: str) -> Table:
    held = sorted(item for item in path.iterdir() if not item.name.startswith("."))
    files = [item for item in held if item.is_file()]
    of_rows = [item for item in files if _suffix(item) in SUFFIXES]
    if kind == "images" or (kind == "auto" and not of_rows):
        return image_folder(path)
    if kind != "auto":
        of_rows = [item for item in of_rows if SUFFIXES[_suffix(item)] == kind]
    kinds = {SUFFIXES[_suffix(item)] for item in of_rows}
    pictures = [item for item in held if item.is_dir() or item.suffix.lower() in IMAGE_SUFFIXES]
    if len(kinds) != 1 or pictures:
        found = f"{', '.join(sorted(kinds)) or 'no files of rows'}{' and images or folders' if pictures else ''}"
        raise ConfigError(f"{path}: a folder of files of one format, or of images by class, is expected; found {found}")
    return together([FORMATS[kinds.copy().pop()](item) for item in of_rows])


# -- text files ----------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed if its name ends in .gz; what goes wrong is a ConfigError."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (OSError, EOFError) as error:  # EOFError: a compressed file that was cut off
        raise ConfigError(f"{path}: cannot be read: {first_line(error)}") from error


def _looks_like_lines(path: Path) -> bool:
    """Whether a .json file holds one object per line: the first line is a whole one, and there is more."""
    with _opened(path) as file:
        lines = (line for line in file if line.strip())
        first, second = next(lines, b""), next(lines, b"")
    try:
        return bool(second) and isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _jsonl(path: Path) -> Table:
    """One JSON object per line; empty lines do not count."""
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    faults: list[str] = []
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if not text.strip():
                    continue
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                faults.append(f"{path}:{number}: {_json_fault(error)}{_hint(raw, number)}")
            else:
                if isinstance(row, dict):
                    rows.append(row)
                    lines.append(number)
                else:
                    faults.append(f"{path}:{number}: expected an object {{...}}, got {_kind(row)}{_hint(raw, number)}")
            if faults and _hint(raw, number):
                break
            if len(faults) >= MAX_FAULTS:
                faults[-1] += "; the rest of the file was not read"
                break
    if faults:
        raise ConfigError(gather("broken lines:", faults, MAX_FAULTS))
    return Table(rows, _columns(rows), Places.of(str(path), ":", lines))


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"no UTF-8: byte {error.object[error.start]:#04x} at position {error.start}"
    return f"no valid JSON: {first_line(error)}"


def _hint(raw: bytes, number: int) -> str:
    if number == 1 and raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return "; the file is a JSON list: set data.format to json"
    return ""


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", int: "a number", float: "a number", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "an object")


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(column for row in rows for column in row))


def _json(path: Path) -> Table:
    """A list of objects, or an object with one list of objects in it."""
    with _opened(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
        value = json.loads(text)
    except json.JSONDecodeError as error:
        more = "; for one object per line, set data.format to jsonl" if "Extra data" in error.msg else ""
        message = f"{path}:{error.lineno}: {_json_fault(error)}{more}"
        raise ConfigError(message) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}:{raw[: error.start].count(10) + 1}: {_json_fault(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {_json_fault(error)}") from error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise ConfigError(f"{path}: expected a list of objects, or an object with one list in it, got {_kind(value)}")
    bad = [(number, row) for number, row in enumerate(value, 1) if not isinstance(row, dict)]
    if bad:
        faults = [f"{path} item {number}: expected an object {{...}}, got {_kind(row)}" for number, row in bad]
        raise ConfigError(gather("broken items:", faults, MAX_FAULTS))
    return Table(value, _columns(value), Places.of(str(path), " item ", range(1, len(value) + 1)))


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module refuses fields of over 131,072 characters by default, and texts may be longer."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv(path: Path) -> Table:
    """A header line, then rows; the separator is a comma, or what else the header has: a tab, a semicolon."""
    with _opened(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}:{raw[: error.start].count(10) + 1}: {_json_fault(error)}") from error
    header = text.splitlines()[0] if text.strip() else ""
    separator = next((mark for mark in ",\t;" if mark in header), ",")
    with _long_fields():
        return _csv_table(path, csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))


def _csv_table(path: Path, reader: Any) -> Table:
    columns: list[str] | None = None
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    faults: list[str] = []
    start = 1
    try:
        for fields in reader:
            line, start = start, reader.line_num + 1
            if not fields:  # an empty line
                continue
            if columns is None:
                columns = [field.strip() for field in fields]
                faults += _header_faults(path, columns)
            elif len(fields) != len(columns):
                faults.append(f"{path}:{line}: expected {len(columns)} fields, as in the header, got {len(fields)}")
            else:
                rows.append(dict(zip(columns, fields)))
                lines.append(line)
            if len(faults) >= MAX_FAULTS:
                break
    except csv.Error as error:
        faults.append(f"{path}:{start}: {error}")
    if faults:
        raise ConfigError(gather("broken lines:", faults, MAX_FAULTS))
    return Table(rows, tuple(columns or ()), Places.of(str(path), ":", lines))


def _header_faults(path: Path, columns: Sequence[str]) -> list[str]:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    return [f"{path}:1: the header has the column {column!r} twice" for column in twice]


# -- Parquet -------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
        from datasets import Dataset
    except ImportError as error:
        raise MissingExtraError("datasets", "train", "Reading Parquet") from error
    from .hub import as_table

    try:
        rows = Dataset(pyarrow.parquet.read_table(path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{path}: no Parquet file that can be read: {first_line(error)}") from error
    return as_table(rows, str(path))


FORMATS: Mapping[str, Callable[[Path], Table]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "images": image_folder,
}
