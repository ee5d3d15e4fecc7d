"""The form that all adapters of a bank have: which layers they change, and where each of their numbers stands in a row.

A form's layers are wrapped in the model as those of an adapter are, with a slot that has no parameters of its own: it
says what method, site and frozen factors there are. The numbers of an adapter are one row::

    [ the model's: unilora_theta_d | layer 0: vera_lambda_b | vera_lambda_d | layer 1: ... ]

    Place: layer (MODEL: of all), parameter, shape, where it begins
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from ... import storage
from ...adapter_files.fitting import Wanted, check_base, match_tensors, wanted_of
from ...adapter_files.reading import AdapterFile
from ...config import AdapterConfig
from ...errors import CheckpointError, ConfigError, UnsupportedError, gather, type_name
from ...injection.inject import Plan, apply, base_name, brought_by, plan, remove, with_base_name
from ...injection.installed_adapter import MODEL, Installed
from ...injection.tree import own_modules
from ...layers.route import RoutedLayer
from ...layers.slot import Slot
from ...layers.stacked_sites import by_member
from ...methods import Method, Shared, Site
from ...model.adapter_model import AdapterModel
from ...model.routed_model import unroutable

__all__ = ["Place", "ResidentForm", "check_bankable", "form_values", "numbers_in_a_bank"]

# Options that say where an adapter comes from or what is done with it, and not what it computes.
NO_MATTER = frozenset(
    {
        "base_model_name_or_path",
        "fan_in_fan_out",
        "inference_mode",
        "init_weights",
        "lora_fa",
        "revision",
        "save_factors",
        "save_projection",
        "task_type",
    }
)

ORDER = "site_order"  # of the layers, where they share one vector; None: the model's


@final
@dataclass(frozen=True)
class Place:
    """One parameter of one layer, or of the whole model (MODEL), in an adapter's row."""

    layer: str
    key: str
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.begin + torch.Size(self.shape).numel()

    @property
    def name(self) -> str:
        """``<layer>.<parameter>``; of the whole model ``<parameter>``."""
        return self.key if self.layer == MODEL else f"{self.layer}.{self.key}"

    def of(self, rows: Tensor) -> Tensor:
        """The parameter in each of ``rows`` (..., row length): (..., *shape); a view."""
        part = rows[..., self.begin : self.end]
        return part if len(self.shape) == 1 else part.view(*rows.shape[:-1], *self.shape)


@final
class ResidentForm:
    """What a model needs to run adapters of ``config`` that live outside of it.

    Args:
        model: the model with adapters; its layers are wrapped where they are not yet.
        config: the configuration that all these adapters have.
        key: an adapter name that nobody else takes.

    Attributes:
        places: by layer, the model first, the parameters in their order in a row. length: how many numbers a row has.

    Raises:
        TargetError, ConfigError: as for adding such an adapter.
        UnsupportedError: adapters of this form are not a row of numbers, or cannot be routed; with why.

    """

    def __init__(self, model: AdapterModel, config: AdapterConfig, key: str) -> None:
        base = model.get_base_model()
        self.made: Plan = plan(base, key, with_base_name(base, config))
        self._model, self._key = model, key
        _check_form(self.made)
        storage.prepare(own_modules(base))
        self.installed: Installed = apply(base, self.made, model._state, model.projections, None)
        try:
            if faults := unroutable(self.installed):
                raise UnsupportedError(gather("such adapters cannot be in a bank:", faults))
        except BaseException:
            self.release()
            raise
        self.slots = self.installed.slots()
        held = {MODEL: dict(self.installed.shared.trained)}
        held.update((layer, dict(slot.named_parameters())) for layer, slot in self.slots.items())
        self.places: dict[str, list[Place]] = {}
        at = 0
        for layer, parameters in held.items():
            self.places[layer] = []
            for name, parameter in parameters.items():
                self.places[layer].append(Place(layer, name, tuple(parameter.shape), at))
                at = self.places[layer][-1].end
        self.length = at
        self.installed.shared.trained = {}  # a row brings them
        for slot in self.slots.values():
            slot._parameters.clear()
        self._wanted = {place.name: place.shape for own in self.places.values() for place in own}
        self._by_layer: dict[RoutedLayer, str] = {layer: name for name, layer in self.installed.layers.items()}
        self._verified: set[str] = set()
        self._in_file: dict[frozenset[str], Wanted] = {}  # by what a file has besides an adapter's own numbers

    @property
    def config(self) -> AdapterConfig:
        """With targets filled in."""
        return self.made.config

    def slot_of(self, layer: RoutedLayer) -> Slot | None:
        """The slot in ``layer``; None where the form does not change it."""
        name = self._by_layer.get(layer)
        return None if name is None else self.slots.get(name)

    def params(self, layer: RoutedLayer, rows: Tensor) -> dict[str, Tensor]:
        """The parameters in ``layer`` of the adapters whose rows (n, length) these are, stacked in front; views."""
        return {place.key: place.of(rows) for place in self.places[self._by_layer[layer]]}

    def shared(self, rows: Tensor) -> Shared:
        """What the adapters whose rows (..., length) these are have once for all their layers; views, stacked alike."""
        if not self.places[MODEL]:
            return self.installed.shared
        return self.installed.shared.holding({place.key: place.of(rows) for place in self.places[MODEL]})

    def all_places(self) -> list[Place]:
        """All parameters, in their order in a row."""
        return [place for own in self.places.values() for place in own]

    # -- rows ------------------------------------------------------------------------------------

    def row(self, tensors: Mapping[str, Tensor], what: str) -> Tensor:
        """An adapter's numbers as one float32 row (length,) on the CPU.

        Args:
            tensors: by :attr:`Place.name`.
            what: the adapter, for the error.

        Raises:
            CheckpointError: what is missing, too much, of another shape, or not finite; all of it.

        """
        faults = [f"unexpected: {name}" for name in tensors if name not in self._wanted]
        parts = []
        for name, shape in self._wanted.items():
            given = tensors.get(name)
            if given is None:
                faults.append(f"missing: {name} {shape}")
            elif (fault := _no_numbers(given)) is not None:
                faults.append(f"{name}: expected a tensor of real numbers, got {fault}")
            elif given.shape != shape:
                faults.append(f"shape of {name}: expected {shape}, got {tuple(given.shape)}")
            else:
                flat = given if given.ndim == 1 else given.reshape(-1)
                parts.append(flat if flat.dtype.itemsize > 1 else flat.float())  # 8-bit floats cannot be joined
        if faults:
            raise CheckpointError(gather(f"{what} is not of this bank's form:", faults, len(faults)))
        with torch.no_grad():
            row = torch.cat(parts).to("cpu", torch.float32)
        self.check_finite(row, what)
        return row

    def check_finite(self, row: Tensor, what: str) -> None:
        """Refuse a row with values that are not finite; says where."""
        if bool(torch.isfinite(row).all()):
            return
        wrong = [place.name for place in self.all_places() if not torch.isfinite(row[place.begin : place.end]).all()]
        raise CheckpointError(gather(f"{what} holds values that are not finite:", wrong))

    def tensors(self, row: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`row`: copies, by :attr:`Place.name`."""
        return {place.name: place.of(row).clone() for place in self.all_places()}

    def row_of_file(
        self,
        file: AdapterFile,
        what: str,
        strict_base: bool = False,
        whose: tuple[str, str] = ("this bank's adapters", "the bank has"),
    ) -> Tensor:
        """The row of an adapter that was read from a folder or a store; warns of another base, or refuses it.

        Args:
            file: the adapter.
            what: what errors call it.
            strict_base: refuse another base.
            whose: what errors call adapters of this form, and say before what these have.

        Raises:
            ConfigError: its configuration is another one. CheckpointError: its tensors or projections do not fit.
            UnsupportedError: see :func:`check_bankable`.

        """
        check_bankable(file, what)
        self._check_config(file, what, whose)
        method: Any = file.method
        expected = getattr(method, "expected_checksum", None)
        if expected is not None and expected not in self._verified:
            method.verify(self.installed.shared)
            self._verified.add(expected)
        base = self._model.get_base_model()
        carried = file.method.carried
        if carried not in self._in_file:
            self._in_file[carried] = wanted_of(self.made, carried)
        found = match_tensors(file, self.made, type(base).__name__, self._in_file[carried])
        self._check_brought(method, found, what)
        check_base(file, self.made, base_name(base) or type(base).__name__, strict_base)
        if self.places[MODEL]:
            found.update(file.method.init_model(self._sites()))
        return self.row(found, what)

    def _check_brought(self, method: Method[Any], found: dict[str, Tensor], what: str) -> None:
        """Hold what a file brought of the frozen tensors that a bank's adapters share against those of the bank, and
        take it out of ``found``."""
        brought = {
            place: values
            for name, own in brought_by(self.made, found).items()
            for place, values in by_member(self.slots[name].site, own)
        }
        try:
            method.check_brought(self.installed.shared, brought)
        except CheckpointError as error:
            raise CheckpointError(f"{what} cannot be in a bank: {error}") from None
        for name, own in self.made.carries.items():
            for key in own:
                found.pop(f"{name}.{key}", None)

    def _check_config(self, file: AdapterFile, what: str, whose: tuple[str, str]) -> None:
        mine, theirs = (self._in_order(form_values(config)) for config in (self.config, file.config))
        faults = (
            []
            if type(self.config) is type(file.config)
            else [f"method: {whose[1]} {type(self.config).__name__}, the adapter {type(file.config).__name__}"]
        )
        if not faults:
            for key, value in mine.items():
                if value != theirs[key]:
                    faults.append(f"{key}: {whose[1]} {value!r}, the adapter {theirs[key]!r}")
        if faults:
            raise ConfigError(gather(f"{what} is of another configuration than {whose[0]}:", faults))

    def _in_order(self, values: dict[str, Any]) -> dict[str, Any]:
        """With the order of the layers said, where no other is."""
        if ORDER not in values or values[ORDER] is not None:
            return values
        return {**values, ORDER: [site.name for site in self._sites()]}

    def _sites(self) -> list[Site]:
        """The layers that the method adapts, for numbers that are to come to the CPU."""
        own = (slot.site for slot in self.slots.values() if slot.method is not None)
        return [replace(site, device=_cpu) for site in own]

    def release(self) -> None:
        """Take the form out of the model; layers without other adapters become what they were."""
        remove(self._model.get_base_model(), self._key, self.installed, self._model.projections)


def form_values(config: AdapterConfig) -> dict[str, Any]:
    """The options that decide what an adapter computes, by name."""
    names = [name for name in config.option_names() if name not in NO_MATTER and not name.endswith("dropout")]
    return {name: _plain(getattr(config, name), name == ORDER) for name in names}


def check_bankable(file: AdapterFile, what: str) -> None:
    """Refuse an adapter that brings its frozen tensors along: a row has no place for them, and a bank has its own.

    Those that can be held against the bank's are not refused here.

    Raises:
        UnsupportedError: which they are.

    """
    method = file.method
    compared = tuple(f".{method.keys[name]}" for name in method.carried)
    if brought := [key for key in file.brought if not key.endswith(compared)]:
        name = method.name
        raise UnsupportedError(
            gather(
                f"{what} brings frozen tensors of its own along, and the adapters of a bank share one {name}'s; add "
                "it to the model by itself, or convert it (kilotune convert --to kilotune) where a seed gives them:",
                brought,
                3,
            )
        )


def numbers_in_a_bank(installed: Installed) -> int | None:
    """How many numbers a row of a bank of such adapters has; None where they cannot be in one."""
    if installed.config.part_of_base is not None:
        return None
    if installed.saved or unroutable(installed):
        return None
    held = [installed.shared.trained, *(slot.values() for slot in installed.slots().values())]
    return sum(int(parameter.numel()) for own in held for parameter in own.values())


def _cpu() -> torch.device:
    return torch.device("cpu")


def _no_numbers(given: Any) -> str | None:
    if not isinstance(given, Tensor):
        return type_name(given)
    if given.is_complex():
        return str(given.dtype)
    if given.is_quantized or given.is_nested or given.layout is not torch.strided:
        return f"one that is {'quantized' if given.is_quantized else 'nested' if given.is_nested else 'sparse'}"
    return "one without data (meta)" if given.is_meta else None


def _plain(value: Any, ordered: bool) -> Any:
    """ordered: the order of a list says something."""
    if not isinstance(value, (list, tuple, set, frozenset)):
        return value
    return list(value) if ordered else sorted(value)


def _check_form(made: Plan) -> None:
    if (part := made.config.part_of_base) is not None:
        raise UnsupportedError(
            f"{made.method.name} that counts its change from a part of the base ({part!r}), which is in no row of a "
            "bank; convert such adapters (kilotune convert --to lora), or add them to the model one by one"
        )
    if made.saved:
        raise UnsupportedError(
            f"modules_to_save ({', '.join(made.saved)}): a bank holds vectors, not whole modules; add such adapters to "
            "the model one by one"
        )
