"""Adapters on the device: which forms there are, who uses which row, and the route of a step.

::

    Row      an adapter in main memory, checked against the model: its numbers, or the adapter itself
    Held     an adapter on the device that stays there until it is given back: one running request has one
    route    (Held or None, tokens) of a step -> what the layers of the model run

A personal adapter stands on a shared one: its row and what is held for it have that one ``below``, and the shared one
is on the device once, for as long as one that stands on it is.

Adapters of one form (method, options, layers) are rows of one bank; how many forms there are at once is bounded, and a
form that nobody uses makes way. What cannot be a row (a head that is trained whole) is put into the model itself, and
of those only few.

The model's modules change only between steps: :class:`Turns`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from ...adapter_files.files import not_finite
from ...adapter_files.fitting import check_base, match_tensors
from ...adapter_files.reading import AdapterFile
from ...config import AdapterConfig
from ...errors import AdapterError, CheckpointError, ConfigError, ResourceError, UnsupportedError, gather
from ...fleet.bank.adapter_bank import AdapterBank, Resident
from ...fleet.bank.forms import ResidentForm, check_bankable, form_values
from ...injection import inject
from ...injection.installed_adapter import MODEL, Installed, conflicts
from ...layers.route import Cohort, Route, Stacked, levels_of
from ...model.parameter_report import readable_bytes
from ...model.peft_model import PeftModel
from ...model.routed_model import unroutable

__all__ = ["GoneError", "Held", "Residents", "Row", "Turns"]

# Rows of a step are gathered into one matrix, once for as long as the same requests run, where that takes no more.
GATHERED = 64 * 2**20  # bytes
UNBANKED = 1024  # forms of which it is remembered that no bank takes them


@final
class GoneError(AdapterError):
    """The form of a row made way for another one: read the adapter again."""


@final
class Turns:
    """Steps of the model, and changes of its modules: one at a time. Where both wait they take turns."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._busy = False
        self._steps = self._changes = 0  # that wait
        self._changed = False  # what ran last was a change

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Run the model."""
        with self._condition:
            self._steps += 1
            self._condition.wait_for(lambda: not self._busy and (self._changed or self._changes == 0))
            self._steps -= 1
            self._busy, self._changed = True, False
        try:
            yield
        finally:
            self._free()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change the model."""
        with self._condition:
            self._changes += 1
            self._condition.wait_for(lambda: not self._busy and not (self._changed and self._steps))
            self._changes -= 1
            self._busy = self._changed = True
        try:
            yield
        finally:
            self._free()

    def _free(self) -> None:
        with self._condition:
            self._busy = False
            self._condition.notify_all()


@final
class _Home:
    """Where adapters of one form live: a bank; or the model itself, for one adapter that no bank can take."""

    def __init__(self, bank: AdapterBank | None) -> None:
        self.bank = bank
        self.users = 0  # rows that are held
        self.closed = False


@final
class Row:
    """An adapter in main memory that fits the model. name: unique to its contents and tenant. bytes: what it takes.

    below: the shared adapter that it stands on, which stands on none.
    """

    def __init__(self, name: str, home: _Home, values: Tensor | None, size: int, below: Row | None = None) -> None:
        self.name, self.home, self.values, self.bytes, self.below = name, home, values, size, below

    @property
    def chain(self) -> tuple[Row, ...]:
        """What a request for it runs, the shared one first."""
        return (self,) if self.below is None else (self.below, self)

    @property
    def homes(self) -> tuple[_Home, ...]:
        """Where these live."""
        return tuple(row.home for row in self.chain)

    @property
    def closed(self) -> bool:
        """Whether a form of these made way, so that it has to be read again."""
        return any(home.closed for home in self.homes)


@final
class Held:
    """An adapter on the device; stays until :meth:`Residents.release`. below: what it stands on, held for it."""

    def __init__(self, row: Row, slot: int, below: Held | None = None) -> None:
        self.row, self.slot, self.below = row, slot, below

    @property
    def chain(self) -> tuple[Held, ...]:
        """What its rows run, the shared one first."""
        return (self,) if self.below is None else (self.below, self)


@final
class Residents:
    """The adapters of one model that are on its device. From any thread, but for :meth:`route`.

    Args:
        model: wrapped, without an adapter of its own.
        slots: rows of each form's bank.
        forms: how many forms there may be at once.
        whole: how many adapters that no bank can take there may be at once.
        dtype: of the banks.
        max_norm: the largest L2 norm that a tensor of an adapter may have.
        max_rank: the largest rank. form_bytes: what the rows of one form may take; large ones get fewer slots.

    """

    def __init__(
        self,
        model: PeftModel,
        *,
        slots: int,
        forms: int,
        whole: int,
        dtype: torch.dtype,
        max_norm: float,
        max_rank: int,
        form_bytes: int,
    ) -> None:
        self.model, self.turns = model, Turns()
        self.slots, self.forms, self.whole, self.dtype, self.max_norm = slots, forms, whole, dtype, max_norm
        self.max_rank, self.form_bytes = max_rank, form_bytes
        self._lock = threading.RLock()
        self._changing = threading.Lock()
        self._banks: OrderedDict[str, _Home] = OrderedDict()  # the least recently used first
        self._wholes: OrderedDict[str, _Home] = OrderedDict()
        self._unbanked: OrderedDict[str, None] = OrderedDict()  # forms that no bank takes, the latest last
        self._last: tuple[tuple[tuple[Held | None, int], ...], Route | None] | None = None

    # -- rows ------------------------------------------------------------------------------------

    def row(self, name: str, file: AdapterFile, what: str) -> Row:
        """Check an adapter against the model, and make room for its form where it is a new one.

        Args:
            name: unique to its contents and its tenant.
            file: the adapter.
            what: what to call it in errors.

        Raises:
            CheckpointError, ConfigError, TargetError, UnsupportedError: it does not fit this model.
            ResourceError: all forms are in use.

        """
        self._check_rank(file.config, what)
        key = form_key(file.config)
        if key not in self._unbanked:
            try:
                return self._banked(name, key, file, what)
            except UnsupportedError:
                self._note_unbanked(key)
        return self._in_model(name, file, what)

    def check(self, file: AdapterFile, what: str) -> None:
        """Check an adapter as :meth:`row` does, and keep nothing of it but its form."""
        self._check_rank(file.config, what)
        key = form_key(file.config)
        if key not in self._unbanked:
            try:
                self._banked("", key, file, what)
            except UnsupportedError:
                self._note_unbanked(key)
            else:
                return
        self._check_whole(file, what)
        self._planned(file)

    def _note_unbanked(self, key: str) -> None:
        with self._lock:
            self._unbanked[key] = None
            while len(self._unbanked) > UNBANKED:
                self._unbanked.popitem(last=False)  # to be found out again

    def _planned(self, file: AdapterFile, strict: bool = False) -> inject.Plan:
        """What the adapter would be in the model, its shapes checked; nothing is made for it, and nobody waits."""
        base = self.model.get_base_model()
        config = file.config.replace(inference_mode=True, strict_targets=True)  # a warning would be told to nobody
        made = inject.plan(base, "trial", config, file.method, strict=strict)
        match_tensors(file, made, type(base).__name__)
        check_base(file, made, inject.base_name(base) or type(base).__name__, strict=True)
        return made

    def _check_rank(self, config: AdapterConfig, what: str) -> None:
        values = config.to_dict()
        ranks = [values.get("r"), *dict(values.get("rank_pattern") or {}).values()]
        largest = max((rank for rank in ranks if isinstance(rank, int)), default=0)
        if largest > self.max_rank:
            raise ConfigError(f"{what} has rank {largest}; this server takes at most {self.max_rank} (max_rank)")

    def _slots_of(self, file: AdapterFile, what: str) -> int:
        """How many rows the bank of a new form gets; its file is seen to fit before memory is taken for it."""
        planned = self._planned(file, strict=True)  # as a bank does, while the model waits
        shapes = [shape for own in (*planned.shapes.values(), planned.of_model) for shape in own.values()]
        size = sum(torch.Size(shape).numel() for shape in shapes) * self.dtype.itemsize
        slots = min(self.slots, self.form_bytes // max(size, 1))
        if slots < 1:
            raise ConfigError(
                f"{what} takes {readable_bytes(size)} on the device; all adapters of a form together may take "
                f"{readable_bytes(self.form_bytes)} (form_bytes)"
            )
        return slots

    def _check_whole(self, file: AdapterFile, what: str) -> None:
        if bad := not_finite(file.tensors):
            raise CheckpointError(gather(f"{what} holds values that are not finite:", bad))
        self._check_norms(file.tensors, what)

    def _banked(self, name: str, key: str, file: AdapterFile, what: str) -> Row:
        check_bankable(file, what)
        home = self._home(key, file, what)
        assert home.bank is not None
        values = home.bank.form.row_of_file(file, what, strict_base=True)
        self._check_norms_of_row(home.bank.form, values, what)
        return Row(name, home, values, values.numel() * values.element_size())

    def _check_norms_of_row(self, form: ResidentForm, values: Tensor, what: str) -> None:
        """All norms in one go, for this is done for each adapter that is read; one by one where one is too large."""
        places = form.all_places()
        lengths = torch.tensor([place.end - place.begin for place in places])
        squares = torch.segment_reduce(values.square(), "sum", lengths=lengths)
        if not bool((squares <= self.max_norm**2).all()):
            self._check_norms({place.name: values[place.begin : place.end] for place in places}, what)

    def _check_norms(self, tensors: Mapping[str, Tensor], what: str) -> None:
        wrong = []
        for key, value in tensors.items():
            if value.is_floating_point() and not float(value.float().norm()) <= self.max_norm:
                wrong.append(f"{key}: {float(value.float().norm()):.3g}")
        if wrong:
            raise CheckpointError(gather(f"{what}: norms above the bound of {self.max_norm:g}:", wrong, 5))

    def _home(self, key: str, file: AdapterFile, what: str) -> _Home:
        with self._lock:
            if key in self._banks:
                self._banks.move_to_end(key)
                return self._banks[key]
        slots = self._slots_of(file, what)
        with self._changing:
            with self._lock:
                if key in self._banks:
                    return self._banks[key]
                full = len(self._banks) >= self.forms
                idle = self._idle(self._banks, "forms of adapters", self.forms) if full else None
                if idle is not None:
                    self._banks.pop(idle[0])
            try:
                with self.turns.changing():
                    plain = file.config.replace(inference_mode=True)
                    home = _Home(AdapterBank(self.model, plain, slots=slots, dtype=self.dtype))
                    self.model.eval()
                    if idle is not None and idle[1].bank is not None:
                        idle[1].bank.close()
            except BaseException:
                if idle is not None:  # it makes way for no form that cannot be served
                    with self._lock:
                        idle[1].closed = False
                        self._banks[idle[0]] = idle[1]
                raise
            with self._lock:
                self._banks[key] = home
            return home

    def _idle(self, homes: OrderedDict[str, _Home], what: str, limit: int) -> tuple[str, _Home]:
        """The one used longest ago that nobody uses; it is closed to newcomers."""
        for key, home in homes.items():
            if home.users == 0:
                home.closed = True
                return key, home
        raise ResourceError(f"all {limit} {what} that the server keeps at once are in use; try again later")

    def _in_model(self, name: str, file: AdapterFile, what: str) -> Row:
        with self._lock:
            if name in self._wholes:
                self._wholes.move_to_end(name)
                return Row(name, self._wholes[name], None, 0)
        self._check_whole(file, what)
        self._planned(file)  # what does not fit, or takes long to match, is seen before the model waits
        with self._changing:
            with self._lock:
                full = len(self._wholes) >= self.whole
                idle = self._idle(self._wholes, "adapters outside of banks", self.whole) if full else None
                if idle is not None:
                    self._wholes.pop(idle[0])
            with self.turns.changing():
                if idle is not None:
                    self.model.delete_adapter(idle[0])
                self.model.load_adapter(file, name, strict_base=True)
                if faults := unroutable(self.model.installed(name)):
                    self.model.delete_adapter(name)
                    raise UnsupportedError(gather(f"{what} cannot be served beside others:", faults))
                self.model.eval()
            with self._lock:
                home = self._wholes[name] = _Home(None)
            return Row(name, home, None, 0)

    def stacked(self, row: Row, below: Row, what: str) -> Row:
        """``row`` on top of ``below``, seen to go together.

        Raises:
            UnsupportedError: adapters that cannot act together. ConfigError: one bank for both, of a single slot.

        """
        homes = row.home, below.home
        if homes[0] is homes[1] and homes[0].bank is not None and homes[0].bank.slots < 2:
            raise ConfigError(f"{what} and what it stands on are of one form, of which the device takes one adapter")
        if faults := conflicts(
            {"the shared adapter": self._installed(below), "the personal one": self._installed(row)}
        ):
            raise UnsupportedError(gather(f"{what} cannot be served on top of the adapter that it stands on:", faults))
        return Row(row.name, row.home, row.values, row.bytes, below)

    def _installed(self, row: Row) -> Installed:
        bank = row.home.bank
        return self.model.installed(row.name) if bank is None else bank.form.installed

    # -- holding ---------------------------------------------------------------------------------

    def hold(self, row: Row) -> Held | None:
        """Bring a row, and what it stands on, to the device and keep them there; None where there is no slot for one.

        Raises:
            GoneError: a form made way meanwhile.

        """
        with self._lock:
            if row.closed:
                raise GoneError(f"the form of adapter {row.name!r} made way for another one")
            held: Held | None = None
            for each in row.chain:
                slot: int | None = 0
                if each.home.bank is not None:
                    assert each.values is not None
                    slot = each.home.bank.hold(each.name, each.values)
                if slot is None:
                    if held is not None:
                        self.release(held)
                    return None
                each.home.users += 1
                held = Held(each, slot, held)
            return held

    def release(self, held: Held) -> None:
        """Let the adapter go, once, and what it stands on."""
        with self._lock:
            for each in held.chain:
                home = each.row.home
                home.users -= 1
                if home.bank is not None:
                    home.bank.release(each.slot)

    def take_out(self, home: _Home) -> None:
        """Take out what failed when it ran: a form's bank, or an adapter that is in the model; nobody may hold it now.

        Who asks for an adapter of that form later has it made anew.
        """
        with self._changing, self.turns.changing():
            with self._lock:
                home.closed = True
                banks = [key for key, other in self._banks.items() if other is home]
                wholes = [name for name, other in self._wholes.items() if other is home]
                for key in banks:
                    del self._banks[key]
                for name in wholes:
                    del self._wholes[name]
            if banks and home.bank is not None:
                home.bank.close()
            for name in wholes:
                self.model.delete_adapter(name)

    @property
    def resident(self) -> int:
        """How many adapters are on the device."""
        with self._lock:
            return sum(len(home.bank) for home in self._banks.values() if home.bank is not None) + len(self._wholes)

    @property
    def room(self) -> int:
        """How many adapters the device can hold with the forms that there are."""
        with self._lock:
            banks = [home.bank.slots for home in self._banks.values() if home.bank is not None]
            return (sum(banks) or self.slots) + self.whole

    # -- routes ----------------------------------------------------------------------------------

    def route(self, parts: Sequence[tuple[Held | None, int]], tokens: bool = True) -> Route | None:
        """Who each token (or row) of a step goes to; None where all are of the base alone.

        Shared adapters are on a level beneath those that stand on them, once for all their rows.

        Args:
            parts: whose, and how many tokens (or rows), in their order.
            tokens: the rows of the model's inputs are tokens that are packed.

        """
        key = tuple(parts)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        levels = levels_of({held.row.homes for held, _ in parts if held is not None})
        homes: dict[tuple[int, _Home], list[tuple[Held, int, int]]] = {}
        at = 0
        for held, count in parts:
            for place, each in enumerate(() if held is None else held.chain):
                home = each.row.home
                homes.setdefault((place if levels is None else levels[home], home), []).append((each, at, at + count))
            at += count
        made: list[list[Cohort]] = [[] for _ in range(1 + max((level for level, _ in homes), default=0))]
        for (level, home), own in homes.items():
            made[level].append(self._cohort(home, own))
        route = Route(at, made[0], tokens=tokens, above=made[1:]) if homes else None
        self._last = (key, route)
        return route

    def _cohort(self, home: _Home, own: Sequence[tuple[Held, int, int]]) -> Cohort:
        device = next(self.model.get_base_model().parameters()).device
        rows = torch.cat([torch.arange(begin, end) for _, begin, end in own]).to(device)
        if home.bank is None:
            index = torch.zeros(rows.shape[0], dtype=torch.int64, device=device)
            return Stacked((own[0][0].row.name,), rows, index)
        bank = home.bank
        count = rows.shape[0]
        distinct = {slot: i for i, slot in enumerate(dict.fromkeys(held.slot for held, _, _ in own))}
        # Not where factors are made of the model's numbers: they would be made for each token.
        stacks = bank.form.made.method.stacks and not bank.form.places[MODEL]
        if stacks and count * bank.form.length * 4 <= GATHERED and len(distinct) > 1:  # one alone is nothing to gather
            slots = torch.tensor([held.slot for held, begin, end in own for _ in range(end - begin)], device=device)
            values = bank.arena.index_select(0, slots).float()
            names = tuple(held.row.name for held, begin, end in own for _ in range(end - begin))
            return Resident(bank.form, names, values, rows, torch.arange(count, device=device), aligned=True)
        names = tuple({held.slot: held.row.name for held, _, _ in own}[slot] for slot in distinct)
        values = bank.arena.index_select(0, torch.tensor(list(distinct), device=device)).float()
        index = torch.cat([torch.full((end - begin,), distinct[held.slot]) for held, begin, end in own])
        return Resident(bank.form, names, values, rows, index.to(device))


def form_key(config: AdapterConfig) -> str:
    """Equal for configurations whose adapters can be rows of one bank; short, however long their lists are."""
    values = json.dumps([type(config).__name__, form_values(config)], sort_keys=True, default=_text)
    return hashlib.sha256(values.encode()).hexdigest()


def _text(value: Any) -> str:
    return repr(value)
