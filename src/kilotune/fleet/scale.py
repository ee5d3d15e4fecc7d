"""What very many users cost: the store, a device's memory, the time to train all of them. Arithmetic, no run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from ..adapter_files.peft_layout import said_of
from ..config import AdapterConfig
from ..errors import ConfigError, gather
from ..methods import Kept
from ..model.peft_model import get_peft_model
from ..plan import in_file
from .bank.forms import numbers_in_a_bank
from .store.names import PACKINGS
from .store.packing import Layout

__all__ = ["Scale", "scale"]


@final
@dataclass(frozen=True)
class Scale:
    """What ``users`` adapters of one form cost.

    numbers: of one adapter, what it does not train but has for itself included. store: packing -> bytes of all users'
    numbers in a store (beside them it keeps names, metadata and its index: at most a tenth more for adapters of 6 KB,
    less for larger ones). resident: dtype -> how many adapters a bank holds in ``memory`` bytes; None where no memory
    is given, and where such adapters cannot be in a bank. hours: to train all users at ``rate`` users a minute and
    machine; None where no rate is given.
    """

    users: int
    numbers: int
    store: Mapping[str, int]
    memory: int | None = None
    resident: Mapping[str, int] | None = None
    rate: float | None = None
    hours: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        resident = None if self.resident is None else dict(self.resident)
        return {**self.__dict__, "store": dict(self.store), "resident": resident}


def scale(
    model: nn.Module, config: AdapterConfig, users: int, memory: int | None = None, rate: float | None = None
) -> Scale:
    """Count what ``users`` adapters of ``config`` cost on ``model``; the model is as it was afterwards.

    Args:
        model: the base model, best on the meta device.
        config: the configuration that all adapters have.
        users: how many, >= 1.
        memory: bytes of a device that a bank may take.
        rate: users a minute that one machine trains, as ``benchmarks/fleet.py`` measures it.

    Raises:
        ConfigError: numbers that are none. Others: whatever adding the adapter would raise.

    """
    faults = [] if type(users) is int and users >= 1 else [f"users: expected a whole number >= 1, got {users!r}"]
    if memory is not None and memory < 1:
        faults.append(f"memory: expected a number of bytes >= 1, got {memory!r}")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        faults.append(f"rate: expected users a minute above 0, got {rate!r}")
    if faults:
        raise ConfigError(gather("the plan's numbers:", faults) if len(faults) > 1 else faults[0])
    adapted = get_peft_model(model, config.replace(inference_mode=False))
    try:
        installed = adapted.installed("default")
        file, in_a_bank = in_file(adapted), numbers_in_a_bank(installed)
        said = said_of(installed.method, file.tensors)
        own = {key: value for key, value in file.tensors.items() if said[key].kept is not Kept.BROUGHT}
    finally:
        adapted.unload()
    layouts = {packing: Layout.of(own, packing, file.whole) for packing in PACKINGS}
    resident = None
    if memory is not None and in_a_bank is not None:
        resident = {"float32": memory // (4 * in_a_bank), "bfloat16": memory // (2 * in_a_bank)}
    return Scale(
        users=users,
        numbers=layouts["float32"].numbers,
        store={packing: users * layout.size for packing, layout in layouts.items()},
        memory=memory,
        resident=resident,
        rate=rate,
        hours=None if rate is None else users / rate / 60,
    )
