"""AdapterBank: thousands of adapters of one form on the model's device, a row of numbers each.

::

    arena (slots, length)      one tensor, made once; a slot is a row           on the model's device
    _slot_of: name -> slot     which row an adapter has now, the one used longest ago first
    host: name -> row          what does not fit on the device, by last use     in main memory, within a budget
    load(name)                 what is nowhere: from a store

A row is written while no name points to it, and a name is then pointed at it in one step. A route copies its rows when
it begins, which are pinned until then: so a batch never sees half of an adapter, nor another's, whatever other threads
put, replace or evict meanwhile. Nothing moves when an adapter comes or goes, so there is nothing that could fragment.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import final

import numpy as np
import torch
from torch import Tensor

from ...adapter_files.names import check_adapter_name
from ...adapter_files.reading import AdapterFile, open_adapter
from ...config import AdapterConfig
from ...errors import AdapterError, ConfigError, ResourceError, did_you_mean
from ...layers.route import Cohort, RoutedLayer
from ...layers.slot import Slot
from ...methods import Shared
from ...model.adapter_model import AdapterModel
from ...model.parameter_report import readable_bytes
from ...model.routed_model import Group, Source
from .forms import ResidentForm

__all__ = ["AdapterBank", "Resident", "free_key"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Given = str | PathLike[str] | AdapterFile | Mapping[str, Tensor]


@final
class Resident(Cohort):
    """Adapters of one bank: ``values`` (n, length) are their rows, in float32.

    aligned: there is a row of ``values`` (and a name) for each row of the cohort, in their order.
    """

    def __init__(
        self,
        form: ResidentForm,
        names: tuple[str, ...],
        values: Tensor,
        rows: Tensor,
        index: Tensor,
        aligned: bool = False,
    ) -> None:
        super().__init__(names, rows, index, aligned)
        self.form, self.values = form, values

    def slot(self, layer: RoutedLayer, which: int | None = None) -> Slot | None:
        return self.form.slot_of(layer)

    def params(self, layer: RoutedLayer, which: int | None = None) -> dict[str, Tensor]:
        if which is None:
            return self.form.params(layer, self.values)
        one = self.form.params(layer, self.values[which : which + 1])
        return {key: value[0] for key, value in one.items()}

    def shared(self, layer: RoutedLayer, which: int | None = None) -> Shared:
        if which is None:
            return self.form.shared(self.values)
        return self.form.shared(self.values[which])


@final
class AdapterBank(Source):
    """Many adapters of one form beside a model; ``model.route(names)`` finds them by name.

    Args:
        model: the model of :func:`kilotune.get_peft_model` or of :func:`kilotune.fleet.wrap`.
        config: the configuration that all adapters of this bank have. A model may have several banks.
        slots: how many adapters the device holds at once. The arena takes slots * length * bytes of dtype, at once.
        dtype: of the arena: float32, or bfloat16 (or float16) for half the memory; what that rounding costs is measured
            in docs/routing.md. Adapters compute in float32 whatever it is.
        host_bytes: how much main memory those that the device has no room for may take.
        load: gives an adapter that is nowhere here, by its name; raises AdapterError where there is none. For example
            ``lambda name: store.get(name, "live").file()``.

    Raises:
        ConfigError: the options. UnsupportedError, TargetError: see :class:`~.forms.ResidentForm`.
        ResourceError: the device has not got the memory.

    """

    def __init__(
        self,
        model: AdapterModel,
        config: AdapterConfig,
        *,
        slots: int = 1024,
        dtype: torch.dtype = torch.float32,
        host_bytes: int = 0,
        load: Callable[[str], Given] | None = None,
    ) -> None:
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise ConfigError(f"slots: expected a whole number, at least 1, got {slots!r}")
        if isinstance(host_bytes, bool) or not isinstance(host_bytes, int) or host_bytes < 0:
            raise ConfigError(f"host_bytes: expected a whole number of bytes, at least 0, got {host_bytes!r}")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {[str(d) for d in DTYPES]}, got {dtype!r}")
        self.model = model
        with torch.inference_mode(False):  # what is made in that mode could be neither written nor trained through
            self.form = ResidentForm(model, config, free_key(model))
        device = next(model.get_base_model().parameters()).device
        try:
            with torch.inference_mode(False):
                self.arena = _zeros(slots, self.form.length, dtype, device)
        except RuntimeError as error:
            self.form.release()
            size = readable_bytes(slots * self.form.length * dtype.itemsize)
            raise ResourceError(
                f"slots: {slots} adapters of {dtype} take {size}, and {device} has not got it"
            ) from error
        self.host_bytes, self._load = host_bytes, load
        self._lock = threading.RLock()
        self._loading: dict[str, threading.Event] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._pins: Counter[int] = Counter()
        self._left: set[int] = set()  # slots that no name has any more, but a route is reading
        self._mine: set[str] = set()  # put in, not loaded: nothing else has them
        self._host: OrderedDict[str, Tensor] = OrderedDict()
        model.attach(self)

    # -- looking ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many adapters are here, on the device and on the host."""
        with self._lock:
            return len(self._slot_of) + len(self._host)

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._slot_of or name in self._host

    def names(self) -> list[str]:
        with self._lock:
            return [*self._slot_of, *self._host]

    def resident(self) -> list[str]:
        """The adapters that are on the device, the least recently used first."""
        with self._lock:
            return list(self._slot_of)

    def has(self, name: str) -> bool:
        return name in self or self._load is not None

    @property
    def slots(self) -> int:
        """How many adapters the device holds at once."""
        return self.arena.shape[0]

    @property
    def bytes_per_adapter(self) -> int:
        """The numbers of an adapter times the bytes of each: what it takes on the device."""
        return self.form.length * self.arena.element_size()

    def get(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors by :attr:`Place.name`, float32 copies on the CPU.

        Raises:
            AdapterError: it is not here (and is not loaded for this).

        """
        with self._lock:
            slot = self._slot_of.get(name)
            row = self._host.get(name) if slot is None else self.arena[slot]
            if row is None:
                raise self._unknown([name])
            return self.form.tensors(row.to("cpu", torch.float32))

    # -- coming and going ------------------------------------------------------------------------

    def put(self, name: str, adapter: Given) -> None:
        """Put an adapter in, or replace the one of this name; the next route has it, and running ones keep the old.

        Args:
            name: the name to route to.
            adapter: a folder, an adapter that was read (:class:`AdapterFile`, as ``record.file()`` gives), or its
                tensors by ``<layer>.<parameter>``, those of the whole model by ``<parameter>``.

        Raises:
            CheckpointError, ConfigError: it is not of the bank's form, or broken; nothing has changed then.
            AdapterError: the name is that of an adapter in the model, or there is no room.

        """
        check_adapter_name(name)
        if not self.slots:
            raise AdapterError(f"put({name!r}): the bank is closed")
        if name in self.model.peft_config:
            raise AdapterError(f"the adapter name {name!r} is taken by an adapter in the model; take another")
        row = self._row(name, adapter)
        with self._lock:
            self._place(name, row)
            self._mine.add(name)

    def _row(self, name: str, adapter: Given) -> Tensor:
        what = f"adapter {name!r}"
        if isinstance(adapter, AdapterFile):
            return self.form.row_of_file(adapter, what)
        if isinstance(adapter, Mapping):
            return self.form.row(adapter, what)
        return self.form.row_of_file(open_adapter(adapter), what)

    def _place(self, name: str, row: Tensor) -> int:
        """Write a row into a slot that nobody reads, then let the name point to it."""
        narrow = row.to(self.arena.dtype)
        if self.arena.dtype != torch.float32:
            self.form.check_finite(narrow, f"adapter {name!r} in {self.arena.dtype}")
        with self._lock:
            slot = self._take_slot(name)
            self.arena[slot].copy_(narrow)
            old = self._slot_of.pop(name, None)
            self._slot_of[name] = slot
            self._host.pop(name, None)
            if old is not None:
                self._give_back(old)
            return slot

    def _take_slot(self, name: str) -> int:
        """A slot that is free, or that of the adapter used longest ago, which goes to the host."""
        if self._free:
            return self._free.pop()
        if name in self._slot_of and not self._pins[self._slot_of[name]]:  # its own: there is no other
            return self._slot_of.pop(name)
        for victim in list(self._slot_of):
            if not self._pins[self._slot_of[victim]] and self._room_for(victim):
                self._demote(victim)
                return self._free.pop()
        raise AdapterError(
            f"there is no room for adapter {name!r}: all {self.slots} slots are taken by adapters that are in use, or "
            f"that the host's {readable_bytes(self.host_bytes)} cannot take and nothing could load again; evict() one, "
            "or make the bank with more slots or host_bytes"
        )

    def _room_for(self, victim: str) -> bool:
        """Whether an adapter may leave the device: it can be loaded again, or the host can take it."""
        return victim not in self._mine or self._host_room() > 0 or any(name not in self._mine for name in self._host)

    def _host_room(self) -> int:
        """How many more adapters the host may take."""
        return self.host_bytes // (self.form.length * 4) - len(self._host)

    def _demote(self, name: str) -> None:
        """From the device to the host, or nowhere if it can be loaded again and the host takes none."""
        slot = self._slot_of.pop(name)
        if self._host_room() < 1 and (lost := next((n for n in self._host if n not in self._mine), None)) is not None:
            del self._host[lost]
        if self._host_room() > 0:
            self._host[name] = self.arena[slot].to("cpu", torch.float32, copy=True)
        self._give_back(slot)

    def _promote(self, name: str) -> int:
        """From the host to the device; its room on the host may take the one that makes way."""
        row = self._host.pop(name)
        try:
            return self._place(name, row)
        except AdapterError:
            self._host[name] = row
            raise

    def _give_back(self, slot: int) -> None:
        if self._pins[slot]:
            self._left.add(slot)
        else:
            del self._pins[slot]
            self._free.append(slot)

    def evict(self, name: str) -> None:
        """Take an adapter out, from device and host; routes that run now keep it to their end.

        Raises:
            AdapterError: it is not here.

        """
        with self._lock:
            if name not in self:
                raise self._unknown([name])
            self._host.pop(name, None)
            self._mine.discard(name)
            if (slot := self._slot_of.pop(name, None)) is not None:
                self._give_back(slot)

    def _unknown(self, names: Sequence[str]) -> AdapterError:
        return AdapterError(f"the bank has no adapter {names[0]!r}.{did_you_mean(str(names[0]), self.names())}")

    # -- routes ----------------------------------------------------------------------------------

    @contextmanager
    def pinned(self, names: Sequence[str]) -> Iterator[list[Group]]:
        if len(names) > self.slots:
            raise AdapterError(f"a batch names {len(names)} adapters, and the bank has {self.slots} slots")
        slots: dict[str, int] = {}
        try:
            there = set(self.resident())  # these first, so that what is loaded does not push them out
            for name in sorted(names, key=lambda name: name not in there):
                slots[name] = self._pin(name)
            places = torch.tensor([slots[name] for name in names], device=self.arena.device)
            values = self.arena.index_select(0, places).float()  # (n, length)
        finally:
            with self._lock:
                for slot in slots.values():
                    self._unpin(slot)
        own = tuple(names)
        yield [Group(own, lambda rows, index: Resident(self.form, own, values, rows, index), self.form.installed)]

    def hold(self, name: str, row: Tensor) -> int | None:
        """The adapter's slot in the arena, which stays its until :meth:`release`; None where no slot is free of use.

        Args:
            name: the adapter's; where it is on the device already, ``row`` is not looked at.
            row: its numbers (form.length,), as :meth:`ResidentForm.row` gives them. Nothing else keeps them here: once
                released, it may be dropped to make room.

        """
        with self._lock:
            slot = self._slot_of.get(name)
            if slot is None:
                if not self._free and all(self._pins[taken] for taken in self._slot_of.values()):
                    return None
                slot = self._place(name, row)
            self._slot_of.move_to_end(name)
            self._pins[slot] += 1
            return slot

    def release(self, slot: int) -> None:
        """Give back what :meth:`hold` gave, once."""
        with self._lock:
            self._unpin(slot)

    def _unpin(self, slot: int) -> None:
        self._pins[slot] -= 1
        if not self._pins[slot]:
            del self._pins[slot]
            if slot in self._left:
                self._left.remove(slot)
                self._free.append(slot)

    def _pin(self, name: str) -> int:
        """The adapter's slot, which stays its until it is unpinned; brought to the device where it is not there."""
        while True:
            with self._lock:
                if name in self._slot_of:
                    slot = self._slot_of[name]
                elif name in self._host:
                    slot = self._promote(name)
                elif name not in self._loading:
                    if self._load is None:
                        raise self._unknown([name])
                    self._loading[name] = threading.Event()
                    break
                else:
                    slot = -1
                    waiting = self._loading[name]
                if slot >= 0:
                    self._slot_of.move_to_end(name)
                    self._pins[slot] += 1
                    return slot
            waiting.wait()
        return self._pin_loaded(name)

    def _pin_loaded(self, name: str) -> int:
        assert self._load is not None
        try:
            row = self._row(name, self._load(name))  # not under the lock: others go on meanwhile
            with self._lock:
                slot = self._slot_of[name] if name in self._slot_of else self._place(name, row)  # put in meanwhile?
                self._slot_of.move_to_end(name)
                self._pins[slot] += 1
                return slot
        finally:
            with self._lock:
                self._loading.pop(name).set()

    def close(self) -> None:
        """Take the bank out of the model and free its memory; closed once more, nothing happens.

        Raises:
            AdapterError: a route that runs its adapters is open.

        """
        with self._lock:
            if not self.slots:
                return
            open_routes = self.model._state.open_routes()
            if any(isinstance(c, Resident) and c.form is self.form for route in open_routes for c in route.cohorts):
                raise AdapterError("close(): a route that runs this bank's adapters is open; leave its context first")
            self.model.detach(self)
            self.form.release()
            self._slot_of.clear()
            self._host.clear()
            self._free.clear()
            self.arena = self.arena.new_zeros(0, self.form.length)


def _zeros(rows: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, length) of zeros. On a CPU the system gives the memory when it is written to: the model may wait for
    this, and to write gigabytes of zeros takes seconds."""
    if device.type != "cpu":
        return torch.zeros(rows, length, dtype=dtype, device=device)
    try:
        bits = np.zeros(rows * length * dtype.itemsize, dtype=np.uint8)
    except (MemoryError, ValueError) as error:
        raise RuntimeError(str(error)) from error
    return torch.from_numpy(bits).view(dtype).view(rows, length)


def free_key(model: AdapterModel) -> str:
    """An adapter name for a form, which nobody else takes."""
    taken = {key for layer in model.adapted_layers().values() for key in layer.adapters}
    number = 0
    while f"bank-form-{number}" in taken or f"bank-form-{number}" in model.peft_config:
        number += 1
    return f"bank-form-{number}"
