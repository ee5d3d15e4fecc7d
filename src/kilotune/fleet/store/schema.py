"""The tables, and the connection that all statements go through: the same SQL for SQLite and PostgreSQL.

What repeats is kept once: a base's fingerprint, a form, a frozen tensor, a name. What is left of an adapter is a narrow
row in ``versions``, which listings read, and its numbers in ``payloads``, which they pass over.

Rows of namespaces, names and forms keep their number for ever (AUTOINCREMENT, a sequence), so what a handle remembers
by number never becomes somebody else's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

__all__ = ["FORMAT", "FORMATS", "Link", "statements", "upgrades"]

FORMAT = 2
FORMATS = (1, 2)
"""Those that are read. An older one becomes :data:`FORMAT` with the first change that is made in the store."""

# {serial}: a number that is never given twice, {row}: one that may be. {blob}: bytes. {word}: text that is compared
# byte by byte. {narrow}: a table that is the index of its primary key. The indices are for what refers to a row that is
# deleted.
SCHEMA = """
CREATE TABLE kilotune_store (key {word} PRIMARY KEY, value {word} NOT NULL) {narrow};

CREATE TABLE kilotune_namespaces (id {serial}, name {word} NOT NULL UNIQUE) {wide};

CREATE TABLE kilotune_bases (id {serial}, sha256 {blob} NOT NULL UNIQUE, data {blob} NOT NULL) {wide};

CREATE TABLE kilotune_frozen (id {serial}, sha256 {blob} NOT NULL UNIQUE, data {blob} NOT NULL) {wide};

CREATE TABLE kilotune_forms (
    id {serial}, sha256 {blob} NOT NULL UNIQUE, base {number} REFERENCES kilotune_bases (id), data {blob} NOT NULL
) {wide};

CREATE INDEX kilotune_forms_base ON kilotune_forms (base);

CREATE TABLE kilotune_form_frozen (
    form {number} NOT NULL REFERENCES kilotune_forms (id) ON DELETE CASCADE,
    frozen {number} NOT NULL REFERENCES kilotune_frozen (id),
    PRIMARY KEY (form, frozen)
) {narrow};

CREATE INDEX kilotune_form_frozen_frozen ON kilotune_form_frozen (frozen);

CREATE TABLE kilotune_names (
    id {serial}, namespace {number} NOT NULL REFERENCES kilotune_namespaces (id), name {word} NOT NULL,
    next {number} NOT NULL, UNIQUE (namespace, name)
) {wide};

CREATE TABLE kilotune_payloads (id {row}, data {blob} NOT NULL) {wide};

CREATE TABLE kilotune_versions (
    name {number} NOT NULL REFERENCES kilotune_names (id), version {number} NOT NULL,
    form {number} NOT NULL REFERENCES kilotune_forms (id), payload {number} NOT NULL, size {number} NOT NULL,
    created {number} NOT NULL, used {number}, sha256 {blob} NOT NULL, metadata {word} NOT NULL, tags {word} NOT NULL,
    PRIMARY KEY (name, version)
) {narrow};

CREATE INDEX kilotune_versions_form ON kilotune_versions (form);

CREATE TABLE kilotune_aliases (
    name {number} NOT NULL, alias {word} NOT NULL, version {number} NOT NULL, previous {number},
    PRIMARY KEY (name, alias), FOREIGN KEY (name, version) REFERENCES kilotune_versions (name, version)
) {narrow};

CREATE TABLE kilotune_tags (
    namespace {number} NOT NULL, tag {word} NOT NULL, name {word} NOT NULL, version {number} NOT NULL,
    PRIMARY KEY (namespace, tag, name, version)
) {narrow};
"""


# What a version stands on: another version. The reference stays where that one is removed by force.
STACKS = """
ALTER TABLE kilotune_versions ADD COLUMN shared_name {number} REFERENCES kilotune_names (id);

ALTER TABLE kilotune_versions ADD COLUMN shared_version {number};

CREATE INDEX kilotune_versions_shared ON kilotune_versions (shared_name, shared_version) WHERE shared_name IS NOT NULL;
"""


def statements(words: Mapping[str, str]) -> list[str]:
    """The schema's statements in a database's own words."""
    return _parts(SCHEMA + STACKS, words)


def upgrades(words: Mapping[str, str]) -> list[str]:
    """What makes tables of format 1 those of :data:`FORMAT`."""
    return _parts(STACKS, words)


def _parts(text: str, words: Mapping[str, str]) -> list[str]:
    return [part.strip() for part in text.format(**words).split(";") if part.strip()]


class Link(ABC):
    """One connection inside one transaction. Places for values are ``?``.

    locking, sharing: what is put behind a SELECT so that its rows stay as they are (or stay at all) until the
    transaction ends; nothing where a transaction that writes has the whole store to itself.
    stacks: whether the tables say what a version stands on, as those of format 1 do not.
    """

    locking: ClassVar[str]
    sharing: ClassVar[str]
    stacks: bool

    @abstractmethod
    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a statement."""

    @abstractmethod
    def run(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Run a statement; how many rows it changed."""

    @abstractmethod
    def many(self, sql: str, values: Iterable[Sequence[Any]]) -> None:
        """Run a statement once for each of ``values``."""

    @abstractmethod
    def many_rows(self, sql: str, values: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """The one row that a statement gives for each of ``values``, in their order."""

    @abstractmethod
    def payload_ids(self, count: int) -> list[int]:
        """New numbers for ``count`` payloads, ascending."""

    @abstractmethod
    def hold_shared(self) -> None:
        """Keep everybody else from using a form, a base or a frozen tensor anew until the transaction ends."""

    @abstractmethod
    def hold(self, word: str) -> None:
        """Keep everybody else who holds this word waiting until the transaction ends."""

    @abstractmethod
    def octets(self, column: str) -> str:
        """An expression for the bytes of a text column."""

    def one(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row, or None."""
        found = self.rows(sql, values)
        return found[0] if found else None
