"""Adapters that are there before a joint training: one beneath all users' own (``on``), or their ``start``."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from ...adapter_files.content import content_sha256, file_of
from ...adapter_files.reading import AdapterFile, open_adapter
from ...errors import AdapterError, ConfigError, UnsupportedError, did_you_mean, gather, type_name
from ...injection.installed_adapter import Installed, conflicts
from ...layers.route import Cohort, Stacked
from ...model.adapter_model import AdapterModel
from ...model.routed_model import unroutable
from ..bank.forms import ResidentForm
from ..store import AdapterStore, Record, StandsOn
from ..store.names import check_on

__all__ = ["Beneath", "Existing", "Given", "beneath", "existing", "start_of", "stored"]

Existing = str | os.PathLike[str] | AdapterFile | Record
"""An adapter that is there already: its name in the model, its folder, its name in the store that the training writes
to (NAME, NAME/3, NAME/alias), or read already."""


@final
@dataclass(frozen=True, eq=False)
class Given:
    """An adapter that was given. file: its two files. known: what others call it. inside: it is in the model."""

    file: AdapterFile
    known: StandsOn
    inside: bool = False


def existing(model: AdapterModel, given: object, option: str, store: AdapterStore | None = None) -> Given:
    """The adapter that an option names; a name in the model goes before a folder, and that before one in ``store``.

    Raises:
        ConfigError: it is none, or there is none. CheckpointError: its files are damaged.

    """
    if isinstance(given, Record):
        file = given.file()
        return Given(file, StandsOn(given.info.name, given.info.version, content_sha256(file)))
    if isinstance(given, AdapterFile):
        return Given(given, StandsOn(given.folder.name, None, content_sha256(given)))
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigError(
            f"{option}: expected the name of an adapter in the model, a folder, or an adapter that was read "
            f"(store.get(name)), got {type_name(given)}"
        )
    if given in model.peft_config:
        file = file_of(model.installed(str(given)))
        return Given(file, StandsOn(str(given), None, content_sha256(file)), inside=True)
    folder = Path(given)
    if not folder.is_dir():
        if store is not None and isinstance(given, str):
            return existing(model, stored(store, given, option), option)
        there = ", ".join(map(repr, model.peft_config)) or "none"
        raise ConfigError(
            f"{option}: there is no folder {str(given)!r}, and no such adapter in the model."
            f"{did_you_mean(str(given), model.peft_config)} In the model: {there}"
        )
    file = open_adapter(folder)
    return Given(file, StandsOn(folder.resolve().name, None, content_sha256(file)))


def stored(store: AdapterStore, name: str, option: str) -> Record:
    """What a name (NAME, NAME/3, NAME/alias) means in a store, for an option that is neither in a model nor a folder.

    Raises:
        ConfigError: there is none.

    """
    try:
        return store.find_shared(name) if option == "on" else store.get(*check_on(name))
    except AdapterError as error:
        raise ConfigError(f"{option}: {name!r} is no folder, and in the store: {error}") from error


# -- beneath ---------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False)
class Beneath:
    """The adapter beneath all users' own, frozen. installed: its parts in the model. known: what they stand on.

    file: what it is saved as.
    """

    installed: Installed
    known: StandsOn
    file: AdapterFile

    def cohort(self, rows: Tensor, device: torch.device) -> Cohort:
        """Some rows of a batch through it. rows: (n,) their numbers, rising."""
        return Stacked((self.installed.adapter,), rows.to(device), torch.zeros_like(rows, device=device))


def beneath(
    model: AdapterModel, on: object, form: ResidentForm, held: ExitStack, store: AdapterStore | None = None
) -> Beneath:
    """The adapter that ``on`` names, in the model until ``held`` is left, and frozen for so long.

    Args:
        model: prepared for a joint training.
        on: see :data:`Existing`.
        form: of the users' adapters.
        held: takes it out again, if it was not there.
        store: where a name may be looked for.

    Raises:
        ConfigError, CheckpointError: see :func:`existing`. UnsupportedError: rows cannot go through it, or the users'
            adapters cannot stand on it.

    """
    given = existing(model, on, "on", store)
    if (lower := StandsOn.of_header(given.file.metadata)) is not None:
        raise UnsupportedError(
            f"on: {given.known.name!r} stands on {lower} itself; merge that into the base first (merge_and_unload()), "
            "or name an adapter that stands on the base alone"
        )
    name = given.known.name
    if not given.inside:
        name = _free_name(model, name)
        model.load_adapter(given.file, name)
        held.callback(model.delete_adapter, name)
    installed = model.installed(name)
    faults = unroutable(installed) or conflicts({name: installed, "the users' own": form.installed})
    if faults:
        raise UnsupportedError(gather(f"on: users' adapters cannot stand on {given.known.name!r}:", faults))
    for _, parameter in installed.parameters():
        parameter.requires_grad_(False)
    return Beneath(installed, given.known, given.file)


def _free_name(model: AdapterModel, name: str) -> str:
    number = 0
    free = f"beneath-{name}".replace("/", "-").replace("\\", "-")[:100]
    while free in model.peft_config:
        number += 1
        free = f"beneath-{number}"
    return free


# -- starts ------------------------------------------------------------------------------------------------


def start_of(
    model: AdapterModel,
    form: ResidentForm,
    start: object,
    on: StandsOn | None,
    store: AdapterStore | None = None,
) -> tuple[Tensor, StandsOn]:
    """(the row (length,) that a user's adapter starts from, which adapter that is).

    Args:
        model: prepared for a joint training.
        form: of the users' adapters; the one that is given has to be of it.
        start: see :data:`Existing`.
        on: what the users' adapters stand on.
        store: where a name may be looked for.

    Raises:
        ConfigError: there is none, or it is of another method or configuration, or stands on something else.
        CheckpointError: its files are damaged, or do not fit the model. UnsupportedError: it cannot be trained on.

    """
    given = existing(model, start, "start", store)
    stood = StandsOn.of_header(given.file.metadata)
    if stood is not None and (on is None or on.sha256 != stood.sha256):
        there = "the base alone" if on is None else str(on)
        raise ConfigError(
            f"start: {given.known.name!r} stands on {stood}, and this training is on {there}; give the same as on, or "
            "start from an adapter that stands on nothing"
        )
    what = f"start: the adapter {given.known.name!r}"
    if (why := given.file.method.untrainable) is not None:
        raise UnsupportedError(f"{what} cannot be trained on: {why}")
    return form.row_of_file(given.file, what, whose=("the users' adapters", "theirs have")), given.known
