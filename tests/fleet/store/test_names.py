"""Names in Unicode: one name that people see is one name in the store, and none shows as another."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from kilotune.errors import AdapterError
from kilotune.fleet.store import AdapterStore, Item, copy_adapters, export_adapters, open_store
from tests.support.store_support import Opener, contents

NFC, NFD = "Jos\u00e9", "Jose\u0301"
BIDI = ["\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))]


@pytest.fixture
def store(opened: Opener) -> AdapterStore:
    return opened()


def put_before(store: Any, name: str, seed: int = 1) -> None:
    """As a store has a name that was put when names were kept as they came."""
    store.put("before", contents(seed))
    store._changing(lambda link: link.run("UPDATE kilotune_names SET name = ? WHERE name = 'before'", (name,)))


def test_the_bidirectional_characters_are_unicodes_own() -> None:
    """Its property Bidi_Control: what has one of these classes, and the three marks."""
    classes = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    marks = {"LEFT-TO-RIGHT MARK", "RIGHT-TO-LEFT MARK", "ARABIC LETTER MARK"}
    every = map(chr, range(0x110000))
    found = {c for c in every if unicodedata.bidirectional(c) in classes or unicodedata.name(c, "") in marks}
    assert found == {*BIDI}


def test_a_name_is_one_in_both_forms(store: AdapterStore) -> None:
    made = store.put(NFD, contents(1), alias="live")
    assert made.name == NFC
    assert list(store.names()) == [NFC]
    assert store.put(NFC, contents(2)).version == 2
    assert store.put_many([Item(NFD, contents(3)), Item(NFC, contents(4))]) == 2
    for name in (NFC, NFD):
        assert store.info(name).version == 4
        assert store.get(name, 1).info == store.info(name, "live")
        assert [info.version for info in store.versions(name)] == [1, 2, 3, 4]
        assert store.aliases(name) == {"live": 1}
        assert [record.info.version for record in store.get_many([name, name])] == [4, 4]
        assert list(store.verify([name])) == []
    assert store.alias(NFD, "live", 2) == 2
    assert store.roll_out("live", {NFD: 3}) == {NFC: 3}
    assert store.roll_back("live", [NFD]) == {NFC: 2}
    store.unalias(NFD, "live")
    assert store.rm(NFD, 4) == 1
    assert store.rm(NFD) == 3
    assert list(store.names()) == []


def test_a_name_from_before_keeps_working_as_it_is(store: AdapterStore) -> None:
    put_before(store, NFD)
    assert list(store.names()) == [NFD]
    assert store.info(NFD).name == NFD
    assert store.put(NFD, contents(2)).to_dict()["name"] == NFD
    assert store.get(NFD).info.version == 2
    assert store.alias(NFD, "live", 1) == 1
    with pytest.raises(AdapterError, match=r"'Jos\\xe9': the store has it as 'Jose\\u0301', from before"):
        store.put(NFC, contents(3))
    failed: list[Any] = []
    items = [Item(NFC, contents(3)), Item("ann", contents(4))]
    assert store.put_many(items, failed=lambda *one: failed.append(one)) == 1
    assert "from before names were kept" in str(failed[0][1])
    with pytest.raises(AdapterError, match="there is no adapter"):
        store.get(NFC)
    assert store.rm(NFD) == 2  # its name is free now
    assert store.put(NFD, contents(3)).name == NFC


def test_two_names_from_before_stay_two(store: AdapterStore) -> None:
    put_before(store, NFD, 1)
    put_before(store, NFC, 2)
    for name, seed in ((NFD, 3), (NFC, 4)):
        assert store.put(name, contents(seed)).name == name
        assert store.info(name).version == 2
    assert store.info(NFD).sha256 != store.info(NFC).sha256


@pytest.mark.parametrize("character", [*BIDI, "\u2028", "\u2029"], ids=ascii)
def test_what_turns_a_line_about_or_breaks_it_is_no_new_name(tmp_path: Path, character: str) -> None:
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        bad = f"ann{character}x"
        shown = rf"U\+{ord(character):04X}\), with which it shows as another"
        with pytest.raises(AdapterError, match=f"adapter name .*{shown}"):
            store.put(bad, contents(1))
        with pytest.raises(AdapterError, match=f"tag .*{shown}"):
            store.put("ann", contents(1), tags=[bad])
        with pytest.raises(AdapterError, match=f"alias .*{shown}"):
            store.put("ann", contents(1), alias=bad)
        store.put("ann", contents(1))
        for move in (lambda: store.alias("ann", bad), lambda: store.roll_out(bad, {"ann": 1})):
            with pytest.raises(AdapterError, match=f"alias .*{shown}"):
                move()
        with open_store(store.url, namespace=bad) as other, pytest.raises(AdapterError, match=f"namespace .*{shown}"):
            other.put("ann", contents(1))
        assert list(store.names()) == ["ann"]
        put_before(store, bad)
        assert store.get(bad).info.name == bad
        assert store.put(bad, contents(2)).version == 2
        assert store.rm(bad) == 2


def test_words_in_two_forms(store: AdapterStore) -> None:
    for kind in ({"alias": NFD}, {"tags": [NFD]}):
        with pytest.raises(AdapterError, match=r"is not in Unicode's form NFC; write it as 'Jos\\xe9'"):
            store.put("ann", contents(1), **kind)
    assert store.put("ann", contents(1), alias=NFC, tags=[NFC]).tags == (NFC,)


def test_names_of_one_spelling_are_as_they_were(store: AdapterStore) -> None:
    for name in ("ann", "a b", "\u05d0\u05d1", "\u0646\u0627\u0645\u200c\u0647\u0627", "\U0001f469\u200d\U0001f680"):
        assert store.put(name, contents(1)).name == name
        assert store.info(name).name == name


def test_a_copy_tells_of_names_that_become_one(opened: Opener, tmp_path: Path) -> None:
    source = opened()
    put_before(source, NFD, 1)
    put_before(source, NFC, 2)
    source.put("ann", contents(3))
    for history in (False, True):
        with open_store(f"sqlite:///{tmp_path / f'to{history}.db'}") as target:
            moved = copy_adapters(source, target, history=history)
            assert moved.count == 2
            (fault,) = moved.faults
            assert fault.name in (NFC, NFD)
            assert "is the same name as" in fault.what
            assert sorted(target.names()) == sorted([NFC, "ann"])
            assert [info.version for info in target.versions(NFC)] == [1]


def test_a_folder_is_read_in_both_forms(store: AdapterStore, tmp_path: Path) -> None:
    """Some systems split the letters of files' names."""
    store.put(NFC, contents(1))
    export_adapters(store, tmp_path / "out")
    (tmp_path / "out" / NFC).rename(tmp_path / "out" / NFD)
    with open_store(tmp_path / "out") as folder:
        for name in (NFC, NFD):
            assert folder.get(name).info.sha256 == store.info(NFC).sha256
