"""From what a caller has (a folder, a model, a record) to what is kept: a form, and packed numbers."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from torch import Tensor

from ...adapter_files.files import fetch_own, locate, read_files, tensors_checksum
from ...adapter_files.own_files import check_own, read_own
from ...adapter_files.peft_layout import BASE
from ...adapter_files.stands_on import StandsOn, with_mark
from ...adapter_files.writing import state_of
from ...config import SECTION
from ...errors import AdapterError, CheckpointError, ConfigError, type_name
from ...injection.base_mark import same_base
from ...injection.fingerprint import Fingerprint
from ...model.adapter_model import AdapterModel
from .names import check_metadata, check_name, check_new_word, check_packing, check_tags
from .packing import Layout
from .records import SUM, Contents, Form, Record, SharedVersion, canonical, saved_whole

__all__ = ["Below", "Preparer", "Ready", "batches", "contents_of", "folder_contents"]

CACHED = 256  # kinds of adapters whose form is remembered


@final
@dataclass(frozen=True, eq=False)
class Below:
    """The shared version that an adapter is put on top of.

    number: of its name, in the store. place: where it is. content: :func:`content_sha256` of it. exact: its numbers are
    kept as they were put. base, base_mark: of which model it is, as far as that is known. saved_whole: modules that it
    brings itself, which do not matter for that.
    """

    number: int
    place: SharedVersion
    content: str
    exact: bool
    base: Fingerprint | None
    base_mark: str | None
    saved_whole: tuple[str, ...]


@final
@dataclass(frozen=True, eq=False)
class Ready:
    """An adapter that can be written: all has been checked. frozen: the form's shared tensors, by key. below: what it
    stands on. files: what it brings beside its two files."""

    name: str
    form: Form
    packed: bytes
    sha256: bytes
    metadata: str
    tags: tuple[str, ...]
    frozen: Mapping[str, Tensor]
    below: Below | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@final
class Preparer:
    """Makes :class:`Ready` adapters for one store; what many have in common is worked out once."""

    def __init__(self, base: Fingerprint | None, packing: str) -> None:
        self.base, self.packing = base, check_packing(packing)
        self._known: dict[Any, tuple[Form, tuple[str, ...]]] = {}
        self._lock = threading.Lock()

    def forked(self) -> None:
        """In a child process: a lock that no thread of the parent's holds."""
        self._lock = threading.Lock()

    def __call__(
        self,
        name: str,
        adapter: object,
        metadata: Mapping[str, Any] | None,
        tags: Sequence[str],
        packing: str | None = None,
        adapter_name: str | None = None,
        below: Below | None = None,
    ) -> Ready:
        """Check everything about one adapter, and pack its numbers.

        Raises:
            AdapterError: the name, metadata or tags. CheckpointError, ConfigError: the adapter itself.

        """
        name, text, words = check_name(name), check_metadata(metadata), check_tags(tags)
        for word in words:
            check_new_word("tag", word)
        packing = self.packing if packing is None else check_packing(packing)
        try:
            contents = _on_top(contents_of(adapter, adapter_name), adapter, below)
            form, shared = self._form(contents, packing)
            frozen = {key: contents.tensors[key] for key in shared}
            form = _with_frozen(form, frozen) if frozen else form
            if contents.files:
                form = replace(form, files=_sums(contents.files))
            packed = form.layout.pack(contents.tensors)
        except (CheckpointError, ConfigError) as error:
            raise type(error)(f"{name!r}: {error}") from error
        return Ready(name, form, packed, form.content_hash(packed), text, words, frozen, below, contents.files)

    def _form(self, contents: Contents, packing: str) -> tuple[Form, tuple[str, ...]]:
        """(the form, without checksums of frozen tensors; their keys)."""
        config = _without_weights(contents.config)
        header = {key: value for key, value in contents.header.items() if key != SUM}
        shapes = tuple((key, tuple(value.shape), value.dtype) for key, value in contents.tensors.items())
        base = contents.base
        kind = (canonical(config), canonical(header), shapes, SUM in contents.header, packing)
        with self._lock:
            known = self._known.get((kind, None if base is None else base.sha256))
        if known is not None:
            return known
        made = _new_form(contents, config, self.base, packing)
        with self._lock:
            if len(self._known) >= CACHED:
                self._known.clear()
            self._known[(kind, None if base is None else base.sha256)] = made
        return made


def contents_of(adapter: object, adapter_name: str | None = None) -> Contents:
    """The two files' contents of what :meth:`AdapterStore.put` takes.

    Raises:
        CheckpointError: the files are damaged. AdapterError: a model has no such adapter.

    """
    if isinstance(adapter, AdapterModel):
        return _of_model(adapter, adapter_name)
    if adapter_name is not None:
        raise AdapterError(f"adapter_name={adapter_name!r}: only for a model; this is {type_name(adapter)}")
    if isinstance(adapter, Contents):
        return adapter
    if isinstance(adapter, Record):
        tensors = adapter.tensors()
        header = adapter.header(tensors)
        return Contents(adapter.config, tensors, header, adapter.form.base, files=dict(adapter.files))
    if isinstance(adapter, (str, os.PathLike)):
        folder = locate(adapter)
        fetch_own(adapter)
        return folder_contents(folder)
    raise ConfigError(
        f"expected an adapter's folder, a kilotune model with adapters or a store's record, got {type_name(adapter)}"
    )


def folder_contents(folder: Path) -> Contents:
    """PEFT's two files, with the checksums in them held against the numbers; and what is beside them."""
    files = read_files(folder)
    return Contents(files.config, files.tensors, files.header, files=read_own(folder))


def _sums(files: Mapping[str, bytes]) -> dict[str, str]:
    check_own(files)
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}


def _of_model(model: AdapterModel, adapter_name: str | None) -> Contents:
    if adapter_name is None:
        if len(active := model.active_adapters) != 1:
            raise AdapterError(f"adapter_name: say which of the model's adapters; active are {active or 'none'}")
        adapter_name = active[0]
    config, tensors, header = state_of(model.installed(adapter_name))
    return Contents(config, tensors, header, Fingerprint.of(model))


def check_said(contents: Contents, on: object) -> None:
    """Refuse an adapter whose file says that it was trained on top of another, where nothing is said of that.

    Raises:
        ConfigError: with what to say.

    """
    if on is None and (mark := StandsOn.of_header(contents.header)) is not None:
        raise ConfigError(
            f"it was trained on top of {mark.name!r}, and is another adapter without it: put that one first, and this "
            f"one with on={mark.name!r}"
        )


def _on_top(contents: Contents, adapter: object, below: Below | None) -> Contents:
    """``contents`` as they stand on ``below``.

    Raises:
        ConfigError: they stand on something, and nobody says on what. CheckpointError: on something else.

    """
    if below is None:
        check_said(contents, None)
        return contents
    mark = (
        None if isinstance(adapter, Record) else StandsOn.of_header(contents.header)
    )  # a record's is of its own store
    on = below.place
    if mark is not None and below.exact and mark.sha256 != below.content:
        raise CheckpointError(
            f"it was trained on top of {mark.name!r} with the contents {mark.sha256[:12]}..., and {on} has "
            f"{below.content[:12]}...: other numbers"
        )
    what = f"{on}, below it,"
    whole = (*saved_whole(contents.config), *below.saved_whole)
    if contents.base is not None and below.base is not None:
        contents.base.check(below.base, what, whole)
    # A head that is saved whole was left out of the file's mark.
    if not whole and same_base(contents.header.get(BASE), below.base_mark) is False:
        raise CheckpointError(f"{what} is of another base model than the adapter")
    return replace(contents, header=with_mark(contents.header, StandsOn(on.name, None, below.content), on.sha256))


def _without_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the name of the weights' file, which is the usual one wherever the adapter is written to."""
    section = config.get(SECTION)
    if not isinstance(section, Mapping) or "weights" not in section:
        return dict(config)
    return {**config, SECTION: {key: value for key, value in section.items() if key != "weights"}}


def _new_form(
    contents: Contents, config: Mapping[str, Any], base: Fingerprint | None, packing: str
) -> tuple[Form, tuple[str, ...]]:
    file = contents.file
    shared = tuple(file.brought)
    own = {key: value for key, value in contents.tensors.items() if key not in shared}
    layout = Layout.of(own, packing, frozenset(key for key in own if file.said[key].kept is None))
    header = {key: value for key, value in contents.header.items() if key != SUM}
    if SUM in contents.header:
        header[SUM] = ""  # there is one, and it is made anew of the numbers
    form = Form(dict(config), header, layout)
    if base is not None and contents.base is not None:
        base.check(contents.base, "the adapter", form.saved_whole)
    elif base is not None and not form.saved_whole:  # those heads were left out of the file's mark
        _check_mark(contents.header.get(BASE), base)
    known = contents.base or base
    return Form(form.config, header, layout, {}, known and known.without(form.saved_whole)), shared


def _check_mark(mark: str | None, base: Fingerprint) -> None:
    """Refuse an adapter out of a folder whose file says that it is of another base than the store's."""
    if mark is not None and base.mark is not None and same_base(mark, base.mark) is False:
        raise CheckpointError(
            f"the adapter is of another base model: the weights that it was trained on ({mark[1:9]} ...) are not those "
            f"of the store's base ({base.mark[1:9]} ...)"
        )


def _with_frozen(form: Form, frozen: Mapping[str, Tensor]) -> Form:
    sums = {key: tensors_checksum({"": value}) for key, value in frozen.items()}
    return Form(form.config, form.header, form.layout, sums, form.base)


def batches(ready: Iterator[Ready], count: int, most: int) -> Iterator[list[Ready]]:
    """In batches of ``count``, or fewer where they have ``most`` bytes by then."""
    part: list[Ready] = []
    size = 0
    for one in ready:
        part.append(one)
        size += len(one.packed)
        if len(part) >= count or size >= most:
            yield part
            part, size = [], 0
    if part:
        yield part
