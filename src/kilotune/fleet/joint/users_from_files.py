"""Users of a causal language model from files: one file with a column that names the user, or a file for each user.

The rows are read and made into tokens by :mod:`kilotune.train`, for each user when it is its turn, so that what is
broken in a user's rows is that user's fault alone.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor, nn

from ...adapter_files.names import composed
from ...errors import ConfigError, KilotuneError, did_you_mean, gather
from ...train.data.readers import read
from ...train.data.tables import Table
from ...train.running.base_model import device_of, limits_of, load_base, load_config, set_padding
from ...train.running.held_dtype import held_dtype
from ...train.settings.sections import DataSettings, ModelSettings
from ...train.tasks import TASKS, Limits
from .users import User

__all__ = ["TextUsers", "text_users"]


@final
class _Unreadable(Sequence[Any]):
    """The data of a user whose rows cannot be read: it says so when it is asked."""

    def __init__(self, error: str) -> None:
        self.error = error

    def __len__(self) -> int:
        raise ConfigError(self.error)

    def __getitem__(self, i: Any) -> Any:
        raise ConfigError(self.error)


@final
@dataclass(frozen=True)
class _Source:
    """Where a user's rows are. prepare: reads them."""

    name: str
    prepare: Callable[[], Any]


@final
class TextUsers(Sequence[User]):
    """Users whose rows are read when they are asked for.

    Attributes:
        model: the base.
        collate: what makes batches of their rows.
        notes: what to tell of the base.

    """

    def __init__(
        self,
        model: nn.Module,
        collate: Callable[[list[Any]], Mapping[str, Tensor]],
        sources: list[_Source],
        notes: Sequence[str] = (),
    ) -> None:
        self.model, self.collate, self._sources, self.notes = model, collate, sources, tuple(notes)

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        source = self._sources[i]
        try:
            prepared = source.prepare()
        except KilotuneError as error:
            return User(source.name, _Unreadable(" ".join(str(error).split())))
        return User(source.name, prepared.train, prepared.validation)

    def __iter__(self) -> Iterator[User]:
        return (self[i] for i in range(len(self)))


def text_users(
    base: str,
    data: str | Path,
    *,
    user_column: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    plain: bool = False,
    fraction: float = 0.0,
    seed: int = 0,
    device: str = "auto",
) -> TextUsers:
    """Users of a causal language model.

    Args:
        base: the model's folder, or a hub id.
        data: a file with ``user_column``, or a folder with a file for each user, whose name without its ending is the
            user's.
        user_column: see ``data``.
        columns: role -> column, where the columns are not called text, or prompt and completion, or messages.
        max_length: rows are cut to so many tokens.
        plain: prompts and completions are taken as they stand, where the tokenizer has a chat template too.
        fraction: of each user's rows that are held out for validation.
        seed: decides which.
        device: where the model runs: auto, cpu or cuda.

    Raises:
        ConfigError: the model or the data cannot be had; a single user's fault is told when it is that user's turn.

    """
    settings, task = ModelSettings(base=base), TASKS["causal-lm"]()
    place = device_of(device)
    limits = limits_of(load_config(settings))
    processor = task.load_processor(base)
    common = DataSettings(columns=columns or {}, max_length=max_length, plain=plain, validation_fraction=fraction)

    def prepare(path: str) -> Any:
        return task.prepare(common.replace(train=path), processor, limits, seed)

    sources = _sources(Path(data), user_column, common.columns, prepare)
    model = load_base(settings, task, None, place).model
    held = held_dtype(model, settings.dtype, place, backward=True)
    model = held.apply(model).to(place)
    set_padding(model, processor)
    return TextUsers(model, _collator(processor, limits), sources, [held.note] if held.note else [])


def _collator(processor: Any, limits: Limits) -> Callable[[list[Any]], Mapping[str, Tensor]]:
    from ...train.data.batches import IGNORED, PaddedBatch
    from ...train.data.token_limits import pad_token

    return PaddedBatch({"input_ids": pad_token(processor, limits), "labels": IGNORED})


def _sources(
    data: Path, user_column: str | None, columns: Mapping[str, str], prepare: Callable[[str], Any]
) -> list[_Source]:
    if not data.exists():
        near = did_you_mean(data.name, (item.name for item in data.parent.iterdir())) if data.parent.is_dir() else ""
        raise ConfigError(f"data: {data} is not there.{near}")
    if data.is_dir():
        if user_column is not None:
            raise ConfigError(f"user_column: {data} is a folder with a file for each user, so there is no such column")
        files = sorted(path for path in data.iterdir() if path.is_file() and not path.name.startswith("."))
        if not files:
            raise ConfigError(f"data: {data} holds no files")
        _refuse_doubles(data, files)
        return [_Source(_user_of(path), _bound(prepare, str(path))) for path in files]
    if user_column is None:
        raise ConfigError(f"user_column: {data} is one file, so say which of its columns names the user")
    table = read(str(data), name="data")
    if not len(table):
        raise ConfigError(f"data: {data} holds no rows")
    if user_column not in table.columns:
        hint = did_you_mean(user_column, table.columns)
        raise ConfigError(f"user_column: {data} has no column {user_column!r}.{hint} There: {', '.join(table.columns)}")
    if lacking := [name for name in columns.values() if name not in table.columns]:
        hint = did_you_mean(lacking[0], table.columns)
        raise ConfigError(f"columns: {data} has no column {lacking[0]!r}.{hint} There: {', '.join(table.columns)}")
    return _of_table(table, user_column, prepare)


def _refuse_doubles(data: Path, files: Sequence[Path]) -> None:
    """Two files of one user: only one of them could be trained, and nobody has said which."""
    named: dict[str, list[str]] = {}
    for path in files:
        named.setdefault(_user_of(path), []).append(path.name)
    faults = [f"{user!r}: {', '.join(names)}" for user, names in named.items() if len(names) > 1]
    if faults:
        raise ConfigError(gather(f"data: {data} has several files for one user; keep one of each:", faults))


def _bound(prepare: Callable[[str], Any], path: str) -> Callable[[], Any]:
    return lambda: prepare(path)


def _user_of(path: Path) -> str:
    """The file's name without its endings: ``ann.jsonl.gz`` is ann's."""
    inner = path.with_suffix("") if path.suffix == ".gz" else path
    return composed(inner.stem)


def _of_table(table: Table, column: str, prepare: Callable[[str], Any]) -> list[_Source]:
    """The users of one table in the order in which they come; rows without a user are refused."""
    rows: dict[str, list[int]] = {}
    nobody = []
    for number, user in enumerate(table.values(column)):
        named = isinstance(user, str | int | np.integer) and not isinstance(user, bool)
        if not named or not str(user).strip():
            what = (
                "" if user is None or isinstance(user, str) else f" (it has {user!r:.60}, expected a text or a number)"
            )
            nobody.append(f"{table.places[number]}{what}")
        else:
            rows.setdefault(composed(str(user)), []).append(number)
    if nobody:
        raise ConfigError(f"user_column: {len(nobody)} rows name no user in {column!r}; the first is {nobody[0]}")
    return [_Source(name, _of_rows(table, column, numbers, prepare)) for name, numbers in rows.items()]


def _of_rows(table: Table, column: str, numbers: list[int], prepare: Callable[[str], Any]) -> Callable[[], Any]:
    """A user's rows as a file of their own, for the readers that know files; faults name the row's own place."""

    def own() -> Any:
        part = table.take(np.array(numbers))
        lines = [{key: value for key, value in dict(part.rows[i]).items() if key != column} for i in range(len(part))]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            try:
                return prepare(str(path))
            except KilotuneError as error:
                place = re.compile(re.escape(str(path)) + r":(\d+)")
                raise type(error)(place.sub(lambda found: part.places[int(found.group(1)) - 1], str(error))) from error

    return own
