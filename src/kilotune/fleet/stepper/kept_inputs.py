"""What enters the first block that a form adapts, kept row by row: the blocks before it run once for each row."""

from __future__ import annotations

from ...errors import TargetError
from ...model.adapter_model import AdapterModel
from ...model.frozen_inputs import FrozenInputs
from ...model.kept_rows import KeptRows
from ...model.last_blocks import blocks_of
from ..bank.forms import ResidentForm

__all__ = ["kept_inputs"]


def kept_inputs(model: AdapterModel, form: ResidentForm, kept: float | KeptRows) -> FrozenInputs | None:
    """A context for passes of one adapter; None where there is nothing to keep: its form adapts the first block too.

    It is one adapter's, for what it stands on may change what enters. kept: megabytes, or where it is kept.
    """
    rows = kept if isinstance(kept, KeptRows) else KeptRows(kept)
    if not rows.limit:
        return None
    try:
        blocks = blocks_of(model.get_base_model())
    except TargetError:
        return None
    names = blocks.names(0)
    within = [next((i for i, block in enumerate(names) if name.startswith(f"{block}.")), -1) for name in form.slots]
    first = min(within)
    return FrozenInputs(model, len(names) - first, rows) if first > 0 else None
