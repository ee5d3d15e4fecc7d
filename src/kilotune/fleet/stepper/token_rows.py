"""Rows of tokens: seen to when they come in, and made into batches.

A row is a mapping of lists of one length (``input_ids``, ``labels``, and whatever its objective needs for each token)
and of single numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, gather
from .objectives import Objective
from .objectives._base import IGNORED

__all__ = ["INPUTS", "TokenRow", "checked", "collate"]

TokenRow = Mapping[str, Any]
INPUTS = frozenset({"input_ids", "attention_mask"})
WHOLE = frozenset({"input_ids", "labels"})
FILL = {"labels": IGNORED}  # everything else is filled up with 0


def collate(rows: Sequence[TokenRow]) -> dict[str, Tensor]:
    """A batch, filled up on the right: lists are (rows, tokens), numbers (rows,); with an ``attention_mask``."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, Tensor] = {}
    for key, first in rows[0].items():
        dtype = torch.int64 if key in WHOLE else torch.float64
        if isinstance(first, Sequence):
            fill = FILL.get(key, 0)
            padded = [[*row[key], *[fill] * (longest - len(row[key]))] for row in rows]
            batch[key] = torch.tensor(padded, dtype=dtype)
        else:
            batch[key] = torch.tensor([row[key] for row in rows], dtype=dtype)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    return batch


def checked(rows: Sequence[TokenRow], objective: Objective, vocabulary: int | None) -> list[TokenRow]:
    """The rows, if the objective can be taken of them.

    Raises:
        ConfigError: what is missing, of another length, or no number; by row, all of it.

    """
    if not rows or len(rows) % objective.rows_each:
        many = "at least one" if objective.rows_each == 1 else f"a multiple of {objective.rows_each}, and at least one"
        raise ConfigError(f"{objective.name}: expected {many} row, got {len(rows)}")
    faults = [f"row {i}: {fault}" for i, row in enumerate(rows) for fault in _faults(row, objective, vocabulary)]
    if faults:
        raise ConfigError(gather(f"{objective.name}: these rows cannot be taken:", faults))
    keys = {frozenset(row) for row in rows}
    if len(keys) > 1:
        differ = sorted(frozenset.union(*keys) - frozenset.intersection(*keys))
        raise ConfigError(f"{objective.name}: some rows have {', '.join(differ)} and others do not")
    return list(rows)


def _faults(row: TokenRow, objective: Objective, vocabulary: int | None) -> list[str]:
    lists, numbers = ("input_ids", "labels", *objective.lists), objective.numbers
    missing = [name for name in (*lists, *numbers) if name not in row]
    if missing:
        return [f"it has no {name}" for name in missing]
    if not isinstance(row["input_ids"], Sequence) or not row["input_ids"]:
        return [f"input_ids: expected a list of tokens, got {row['input_ids']!r}"]
    length = len(row["input_ids"])
    found = [f"{name}: expected a finite number, got {row[name]!r}" for name in numbers if not _number(row[name])]
    for name in row.keys() - set(numbers):
        found += _list_faults(name, row[name], length)
    return found or _id_faults(row, vocabulary)


def _list_faults(name: str, value: object, length: int) -> list[str]:
    if not isinstance(value, Sequence) or len(value) != length:
        what = f"{len(value)}" if isinstance(value, Sequence) else type(value).__name__
        return [f"{name}: expected a list of {length}, as input_ids has, got {what}"]
    wrong = [item for item in value if not _number(item)]
    return [f"{name}: expected finite numbers, got {wrong[0]!r}"] if wrong else []


def _id_faults(row: TokenRow, vocabulary: int | None) -> list[str]:
    found = []
    for name in ("input_ids", "labels"):
        ids = [number for number in row[name] if name == "input_ids" or number != IGNORED]
        if wrong := [number for number in ids if not isinstance(number, int)]:
            found.append(f"{name}: expected whole numbers, got {wrong[0]!r}")
        elif vocabulary is not None and (outside := [number for number in ids if not 0 <= number < vocabulary]):
            found.append(f"{name}: {outside[0]} is not in 0 ... {vocabulary - 1}, the model's vocabulary")
    return found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
