"""A handle that is bound to one namespace reaches nothing of another one, whatever it is given.

Every method is called with every hostile name that we could think of, and afterwards the victim's adapters are as they
were and none of their contents came out. That the check would notice is shown on planted bugs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune import AdapterError, KilotuneError
from kilotune.errors import ConfigError
from kilotune.fleet.store import AdapterStore, Item, open_store, postgres, sqlite
from tests.support.store_support import KINDS, Opener, contents, new_url, opener

SECRET, TAG, NAME = "secret-of-the-victim", "tag-of-the-victim", "zebra"


class Liar(str):
    """A text that is one thing to a check and another to a database's driver."""

    lie = "ann"

    def __conform__(self, protocol: object) -> str:
        return self.lie

    def __str__(self) -> str:
        return self.lie

    def encode(self, *args: Any, **kwargs: Any) -> bytes:
        return self.lie.encode()


class Impostor(Liar):
    lie = "victim"


class LyingNumber(int):
    def __conform__(self, protocol: object) -> int:
        return 1

    def __int__(self) -> int:
        return 1

    def __index__(self) -> int:
        return 1


HOSTILE: tuple[Any, ...] = (
    "ann",
    TAG,
    "zebr",
    "zebr*",
    "z?bra",
    "victim/ann",
    "victim.ann",
    "victim:ann",
    "victim\\ann",
    "../victim/ann",
    "..",
    ".",
    "",
    " ann",
    "ann ",
    "ANN",
    "ann\0",
    "\0ann",
    "victim\0ann",
    "ann\n",
    "ann'",
    'ann"',
    "ann' OR '1'='1",
    "' OR 1=1 --",
    "'; DELETE FROM kilotune_versions; --",
    "x' UNION SELECT * FROM kilotune_names n JOIN kilotune_versions v ON v.name = n.id --",
    '"; DROP TABLE kilotune_names; --',
    "ann; --",
    "ann%",
    "%",
    "%s",
    "%(name)s",
    "{name}",
    "$1",
    "?",
    ":name",
    "_nn",
    "*",
    "a*",
    "[a-z]nn",
    "\\x616e6e",
    "1",
    "2",
    "-1",
    "ａｎｎ",
    "a\u0308nn",
    "ann\u200b",
    "\u202eann",
    "ann\udcff",
    "a" * 5000,
    "ann\U0010ffff",
    Liar("zzz"),
    Liar("ann"),
    b"ann",
    Path("ann"),
    ("ann",),
    ["ann"],
    {"name": "ann"},
    None,
    0,
    1,
    2,
    1.0,
    True,
    LyingNumber(5),
    object(),
)


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    stores: list[AdapterStore] = []
    yield opener(new_url(request.param, request, tmp_path), stores)
    for store in stores:
        store.close()


def fill(opened: Opener) -> tuple[AdapterStore, AdapterStore]:
    """(the victim's handle, with adapters; the intruder's, with one of its own)."""
    victim, intruder = opened(namespace="victim"), opened(namespace="intruder")
    for i in (1, 2):
        victim.put("ann", contents(i), metadata={SECRET: i}, tags=[TAG], alias="live")
    victim.put(NAME, contents(3), metadata={SECRET: 3}, tags=[TAG])
    intruder.put("own", contents(4), tags=["t"])
    return victim, intruder


def everything(store: AdapterStore) -> dict[str, Any]:
    """All that can be seen of a namespace, the time of use left out."""
    infos = list(store.ls(versions=True))
    return {
        f"{v.name} {v.version}": (
            v.sha256,
            v.metadata,
            v.tags,
            store.get(v.name, v.version).packed,
            store.aliases(v.name),
        )
        for v in infos
    }


def calls(store: AdapterStore, x: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every method with ``x`` in every place that takes a word or a number of the caller's."""
    one = contents(5)
    yield "get", lambda: store.get(x)
    yield "get a version", lambda: store.get("own", x)
    yield "get both", lambda: store.get(x, x)
    yield "get by alias", lambda: store.get(x, "live")
    yield "vectors", lambda: store.vectors(x)
    yield "info", lambda: store.info(x)
    yield "versions", lambda: store.versions(x)
    yield "aliases", lambda: store.aliases(x)
    yield "get_many", lambda: list(store.get_many([x]))
    yield "get_many by version", lambda: list(store.get_many(["own"], x))
    yield "names", lambda: list(store.names(x))
    yield "ls", lambda: list(store.ls(x, versions=True))
    yield "ls after", lambda: list(store.ls(after=x, versions=True))
    yield "ls tags", lambda: list(store.ls(tags=[x], versions=True))
    yield "ls two tags", lambda: list(store.ls(tags=["t", x], versions=True))
    yield "verify", lambda: list(store.verify([x]))
    yield "alias", lambda: store.alias(x, "live", 1)
    yield "alias word", lambda: store.alias("own", x, 1)
    yield "alias version", lambda: store.alias("own", "w", x)
    yield "roll_out", lambda: store.roll_out("live", {x: 1})
    yield "roll_out version", lambda: store.roll_out("w", {"own": x})
    yield "roll_back", lambda: store.roll_back("live", [x])
    yield "roll_back word", lambda: store.roll_back(x, ["own"])
    yield "unalias", lambda: store.unalias(x, "live")
    yield "unalias word", lambda: store.unalias("own", x)
    yield "put", lambda: store.put(x, one, tags=["t"])
    yield "put tags", lambda: store.put("own", one, tags=[x])
    yield "put alias", lambda: store.put("own", one, alias=x)
    yield "put_many", lambda: store.put_many([Item(x, one)], alias="live")
    yield "rm version", lambda: store.rm("own", x)
    yield "rm", lambda: store.rm(x)
    yield "rm one", lambda: store.rm(x, 1, force=True)
    yield "gc", lambda: store.gc(keep=1)


def texts_of(result: Any) -> str:
    """All that a caller can read off a result."""
    if isinstance(result, (list, tuple)):
        return " ".join(map(texts_of, result))
    packed = getattr(result, "packed", b"")
    return f"{result!r} {getattr(result, 'info', '')!r} {packed!r}"


def intrude(victim: AdapterStore, intruder: AdapterStore, words: tuple[Any, ...] = HOSTILE) -> None:
    """Try everything; AssertionError where something of the victim's was read or changed."""
    before = everything(victim)
    secrets = [SECRET, NAME, *{repr(value[3]) for value in before.values()}, *{value[0] for value in before.values()}]
    turn = itertools.count()
    for word in words:
        for what, call in calls(intruder, word):
            try:
                told = texts_of(call())
            except (KilotuneError, TypeError) as error:  # TypeError: what cannot be a key of a dictionary
                told = str(error)
            found = [secret for secret in secrets if secret in told]
            assert not found, f"{what}({word!r:.60}) told of the victim: {told[:300]}"
        if word is words[-1] or next(turn) % 8 == 0:  # to read everything takes longer than to try everything
            assert everything(victim) == before, f"the victim's adapters changed after {word!r:.60}, or shortly before"
        intruder.put("own", contents(4), tags=["t"])  # what was removed


def test_no_input_reaches_another_namespace(opened: Opener) -> None:
    intrude(*fill(opened))


def test_namespaces_are_as_hostile_as_names(opened: Opener) -> None:
    victim, _ = fill(opened)
    before = everything(victim)
    for word in (*HOSTILE, Impostor("zzz")):
        try:
            handle = opened(namespace=word)
        except (AdapterError, ConfigError):
            continue
        assert type(handle.namespace) is str
        assert list(handle.names()) == [], repr(word)  # "victim" itself is not among them
        if word == "\u202eann":  # it shows as another: only one from before is written to
            with pytest.raises(AdapterError, match="shows as another"):
                handle.put("ann", contents(6))
            continue
        handle.put("ann", contents(6))
        handle.rm("ann")
        handle.gc(keep=1)
        handle.close()
    assert everything(victim) == before


PLANTED = {
    "reading forgets the namespace": ("s.name = ? AND", "(s.name = ? OR TRUE) AND"),
    "locking forgets the namespace": (
        "n.namespace = (SELECT s.id FROM kilotune_namespaces s WHERE s.name = ?)",
        "(SELECT s.id FROM kilotune_namespaces s WHERE s.name = ?) IS NOT NULL",
    ),
    "tags forget the namespace": ("s.id = t.namespace WHERE s.name = ?", "TRUE WHERE s.name = ?"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_noticed(bug: str, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, intruder = fill(opened)
    right, wrong = PLANTED[bug]
    changed = []
    for link in (sqlite.SqliteLink, postgres.PostgresLink):
        for method in ("rows", "run"):
            original = getattr(link, method)

            def planted(self: Any, sql: str, values: Any = (), original: Any = original) -> Any:
                if right in sql and "intruder" in values:
                    changed.append(sql)
                    sql = sql.replace(right, wrong)
                return original(self, sql, values)

            monkeypatch.setattr(link, method, planted)
    with pytest.raises(AssertionError, match="told of the victim|adapters changed"):
        intrude(victim, intruder, ("ann", "zebr", TAG))
    assert changed


def test_a_record_of_one_namespace_gives_no_way_into_it(opened: Opener) -> None:
    """Objects carry numbers and names only; what is done with them happens in the handle's own namespace."""
    victim, intruder = fill(opened)
    record = victim.get("ann")
    put = intruder.put(record.info.name, record)
    assert (put.name, put.version, put.metadata, put.tags) == ("ann", 1, {}, ())
    intruder.rm(record.info.name, record.info.version) if record.info.version == 1 else intruder.rm(record.info.name)
    assert [v.version for v in victim.versions("ann")] == [1, 2]


def test_a_store_full_of_others_looks_empty(opened: Opener) -> None:
    fill(opened)
    third = opened(namespace="third", read_only=True)
    assert list(third.names()) == list(third.ls(versions=True)) == list(third.verify()) == []
    stats = third.stats()
    assert (stats.names, stats.versions, stats.aliases, stats.forms, stats.payload_bytes) == (0, 0, 0, 0, 0)
    with pytest.raises(AdapterError, match=r"there is no adapter 'anm' in this namespace\.$"):
        third.get("anm")


def test_a_base_of_another_namespace_is_not_told(opened: Opener, tmp_path: Path) -> None:
    """Forms are shared in the tables, so the check is that the handle's cache is not asked for others'."""
    victim, intruder = fill(opened)
    assert victim.get("ann").form.sha256 == intruder.get("own").form.sha256
    assert torch.equal(intruder.vectors("own")[1], intruder.get("own").vector())
    assert {info.form for info in intruder.ls()} == {intruder.info("own").form}


def test_a_folder_has_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        store.put("ann", contents(1))
        store.get("ann").save(tmp_path / "outside" / "ann")
        store.get("ann").save(tmp_path / "root" / "own")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside" / "ann")
    (tmp_path / "root" / "half").mkdir()
    (tmp_path / "root" / "half" / "adapter_config.json").write_bytes(
        (tmp_path / "outside" / "ann" / "adapter_config.json").read_bytes()
    )
    (tmp_path / "root" / "half" / "adapter_model.safetensors").symlink_to(
        tmp_path / "outside" / "ann" / "adapter_model.safetensors"
    )
    with open_store(tmp_path / "root") as folder:
        for word in ("../outside/ann", str(tmp_path / "outside" / "ann"), "..", "own/../../outside/ann", *HOSTILE):
            with pytest.raises(KilotuneError):
                folder.get(word)
        for word in ("link", "half"):
            with pytest.raises(KilotuneError, match="leads out of"):
                folder.get(word)
        assert folder.get("own").info.name == "own"
