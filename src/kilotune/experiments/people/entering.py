"""What enters the last blocks, for every row: computed once, and kept beside the adapters for the next run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...fleet import Fingerprint
from ...model.frozen_inputs import FrozenInputs
from ...model.kept_rows import KeptRows
from ...whole_file import replacing
from .answers_only import AnswersOnly
from .bases import IGNORED, Base
from .meter import Tick
from .training import Encoded

__all__ = ["fill", "recalled", "remember"]

ROWS = 32
LIMIT = 2_000.0  # megabytes
MARK = "base"


def recalled(file: Path, base: Base) -> KeptRows:
    """What an earlier run has kept there for this very base; nothing where there is no such file."""
    kept = KeptRows(LIMIT)
    try:
        with safe_open(file, "pt") as held:
            if (held.metadata() or {}).get(MARK) == Fingerprint.of(base.model).sha256:
                for key in held.keys():  # noqa: SIM118  # it is no mapping
                    kept.put(bytes.fromhex(key), held.get_tensor(key))
    except (OSError, SafetensorError, ValueError):
        kept.clear()
    return kept


def remember(file: Path, base: Base, kept: KeptRows) -> None:
    """Write it for :func:`recalled`."""
    tensors = {key.hex(): value for key, value in kept.places.items() if isinstance(value, Tensor)}
    with replacing(file) as fresh:
        save_file(tensors, fresh, {MARK: Fingerprint.of(base.model).sha256})


@torch.no_grad()
def fill(base: Base, rows: Mapping[str, Encoded], frozen: FrozenInputs, answers: AnswersOnly, tick: Tick) -> bool:
    """Run all rows through the frozen blocks, those of one length together; whether there was anything to compute.

    Args:
        base: inside ``frozen``, which keeps what enters the last blocks.
        rows: everybody's.
        frozen: what it keeps stays.
        answers: makes the batches.
        tick: hears how far it is.

    """
    before = frozen.usage.rows
    if before >= len({tuple(row["input_ids"]) for own in rows.values() for row in own.all}):
        return False
    each = [row for own in rows.values() for row in own.all]
    each.sort(key=lambda row: len(row["input_ids"]))
    for begin in range(0, len(each), ROWS):
        batch: list[Mapping[str, list[int]]] = [
            {**row, "labels": [IGNORED] * len(row["input_ids"])} for row in each[begin : begin + ROWS]
        ]
        given = answers.collate(batch)  # no label, so nothing goes through the head
        base.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False)
        tick(min(1.0, (begin + ROWS) / len(each)))
    return True
