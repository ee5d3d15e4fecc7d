"""Personal adapters on top of shared ones, in every kind of store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kilotune import AdapterError, CheckpointError, ConfigError, LoraConfig
from kilotune.adapter_files.content import content_sha256
from kilotune.adapter_files.reading import open_adapter
from kilotune.adapter_files.stands_on import HEADER, StandsOn, with_mark
from kilotune.errors import StoreError
from kilotune.fleet.store import AdapterStore, Contents, Item, SharedVersion, copy_adapters, export_adapters, open_store
from kilotune.fleet.store.schema import FORMAT
from kilotune.fleet.store.transfer import bring
from tests.support.cli_helpers import as_json, error, kilotune
from tests.support.models import mlp
from tests.support.store_support import Opener, adapted, contents, lora, same

SHARED = "@shared"


@pytest.fixture
def store(opened: Opener) -> AdapterStore:
    return opened()


def stacked(store: AdapterStore) -> AdapterStore:
    """Two versions of a shared adapter, and people on both."""
    store.put("house-style", lora(1), metadata={"rows": 9}, tags=["shared"], alias="live")
    store.put("ann", contents(1), on="house-style")
    store.put("house-style", lora(2))
    store.put("bob", contents(2), on="house-style")
    store.put("cid", contents(3), on="house-style/live")
    store.put("dot", contents(4))
    return store


# -- put and get ----------------------------------------------------------------------------------------


def test_a_version_names_what_it_stands_on_by_its_contents(store: AdapterStore, opened: Opener) -> None:
    stacked(store)
    first, second = store.versions("house-style")
    for handle in (store, opened(), opened(read_only=True)):
        on = {info.name: info.stands_on for info in handle.ls()}
        assert on == {
            "ann": SharedVersion("house-style", 1, first.sha256, "default"),
            "bob": SharedVersion("house-style", 2, second.sha256, "default"),
            "cid": SharedVersion("house-style", 1, first.sha256, "default"),
            "dot": None,
            "house-style": None,
        }
        assert handle.get("ann").info == handle.info("ann") == handle.versions("ann")[0]
        assert handle.shared_of(handle.info("bob")).info == second
        assert same(handle.shared_of(handle.info("bob")).tensors(), handle.get("house-style", 2).tensors())
    document = store.info("ann").to_dict()
    assert document["stands_on"]["version"] == 1
    assert store.info("dot").to_dict()["stands_on"] is None
    with pytest.raises(AdapterError, match="'dot' \\(version 1\\) stands on no other adapter"):
        store.shared_of(store.info("dot"))


def test_aliases_move_and_stacks_stay(store: AdapterStore) -> None:
    stacked(store)
    before = store.info("cid").stands_on
    store.alias("house-style", "live", 2)
    store.roll_back("live", ["house-style"])
    store.alias("house-style", "live", 2)
    store.put("house-style", lora(3), alias="live")
    assert store.info("cid").stands_on == before


def test_the_hash_of_a_personal_version_is_of_both(store: AdapterStore) -> None:
    stacked(store)
    alone = store.put("x", contents(1))
    assert alone.sha256 != store.info("ann").sha256 != store.put("x", contents(1), on="house-style/2").sha256
    assert store.put("x", contents(1), on="house-style/1").sha256 == store.info("ann").sha256


def test_the_same_on_the_same_is_put_once(store: AdapterStore) -> None:
    stacked(store)
    ann = store.info("ann")
    assert store.put_once("ann", contents(1), on="house-style/1") == (ann, False)
    other, made = store.put_once("ann", contents(1), on="house-style/2")
    assert (other.version, made) == (2, True)
    assert store.put_once("ann", contents(1))[1], "and on nothing it is another one again"
    assert store.info("ann").stands_on is None


def test_what_on_means_is_settled_once_for_many(store: AdapterStore) -> None:
    store.put("house-style", lora(1))
    failed: list[str] = []

    def items() -> Iterator[Item]:
        yield Item("ann", contents(1), on="house-style")
        store.put("house-style", lora(2))
        yield Item("bob", contents(2), on="house-style")
        yield Item("cid", contents(3), on="huose-style")
        yield Item("dot", contents(4))

    assert store.put_many(items(), batch=1, failed=lambda item, error: failed.append(str(error))) == 3
    assert {info.name: info.stands_on.version for info in store.ls() if info.stands_on} == {"ann": 1, "bob": 1}
    assert len(failed) == 1
    assert "on='huose-style': there is no such adapter" in failed[0]
    assert "Did you mean 'house-style'" in failed[0]


def test_what_nobody_can_stand_on_is_refused(store: AdapterStore, opened: Opener, tmp_path: Path) -> None:
    stacked(store)
    for on, kind, text in (
        ("huose-style", AdapterError, "nor in '@shared'. Did you mean 'house-style'?"),
        ("house-style@2", AdapterError, "A version is written house-style/3."),
        ("house-style/7", AdapterError, "'house-style' has no version 7; it has 1, 2"),
        ("house-style/lvie", AdapterError, "no alias 'lvie'. Did you mean 'live'"),
        ("house-style/0", AdapterError, "a number from 1"),
        ("", AdapterError, "non-empty"),
        (7, AdapterError, "on: expected the name of a shared adapter"),
        ("ann", ConfigError, "stands on 'house-style' (version 1) itself, and a stack has two levels"),
    ):
        with pytest.raises(kind) as caught:
            store.put("x", contents(5), on=on)  # type: ignore[arg-type]
        assert text in str(caught.value), on
    with pytest.raises(ConfigError, match="trained on top of 'house-style', and is another adapter without it"):
        store.put("x", store.get("ann"))
    assert store.versions("x") == []
    with pytest.raises(ConfigError, match="two levels"):
        store.find_shared("ann")
    assert store.find_shared("house-style/live").info.version == 1


def test_what_is_of_another_base_is_refused(opened: Opener) -> None:
    store = opened()
    store.put("house-style", adapted(1, base=0))
    with pytest.raises(CheckpointError, match="'house-style' \\(version 1\\), below it, is of another base model"):
        store.put("ann", adapted(2, base=1), on="house-style")
    store.put("ann", adapted(2, base=0), on="house-style")


def test_heads_of_their_own_are_no_other_base(opened: Opener, tmp_path: Path) -> None:
    """Out of models and out of folders, whose files' marks leave such a head out."""
    store = opened()
    head = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    plain = LoraConfig(r=2, target_modules=["0"])
    for name, config in (("head", head), ("plain", plain)):
        adapted(1, config).save_pretrained(tmp_path / name)
        store.put(f"model-{name}", adapted(1, config))
        store.put(f"folder-{name}", tmp_path / name)
    for on in ("model-head", "folder-head", "model-plain", "folder-plain"):
        for name, config in (("head", head), ("plain", plain)):
            store.put("a", adapted(2, config), on=on)
            store.put("b", tmp_path / name, on=on)


# -- namespaces -----------------------------------------------------------------------------------------


def test_a_tenant_stands_on_its_own_or_on_shared_ones_and_on_nothing_else(opened: Opener) -> None:
    ann, bob, shared = opened(namespace="ann"), opened(namespace="bob"), opened(namespace=SHARED)
    bob.put("private", lora(1))
    shared.put("house-style", lora(2))
    for on in ("private", "private/1", "bob/private"):
        with pytest.raises(AdapterError) as caught:
            ann.put("me", contents(1), on=on)
        assert "Did you mean" not in str(caught.value), "names of others are not told"
    made = ann.put("me", contents(1), on="house-style")
    assert made.stands_on == SharedVersion("house-style", 1, shared.info("house-style").sha256, SHARED)
    assert ann.shared_of(made).info == shared.info("house-style")
    ann.put("house-style", lora(3))  # its own comes first from now on, and what is there stays
    assert ann.put("you", contents(1), on="house-style").stands_on.namespace == "ann"  # type: ignore[union-attr]
    assert ann.info("me").stands_on == made.stands_on
    with pytest.raises(AdapterError, match="of another namespace"):
        bob.shared_of(ann.info("you"))
    assert (ann.standing_on("house-style").names, ann.standing_on("house-style").elsewhere) == (("you",), 0)
    bob.put("me", contents(1), on="house-style")
    found = shared.standing_on("house-style")
    assert (found.names, found.count, found.elsewhere) == ((), 0, 2)
    with pytest.raises(AdapterError) as caught:
        shared.rm("house-style")
    assert "'house-style': 2 adapters of other namespaces stand on version 1 of it" in str(caught.value)
    assert "'me'" not in str(caught.value)


# -- removing -------------------------------------------------------------------------------------------


def test_what_is_stood_on_is_removed_by_force_alone(store: AdapterStore) -> None:
    stacked(store)
    store.unalias("house-style", "live")
    for i in range(8):
        store.put(f"more-{i}", contents(i), on="house-style/1")
    found = store.standing_on("house-style", 1)
    assert (found.count, found.elsewhere, len(found.names)) == (10, 0, 5)
    for which in (1, None):
        with pytest.raises(AdapterError) as caught:
            store.rm("house-style", which)
        first = "10 adapters ('ann', 'cid', 'more-0'" if which else "11 adapters ('ann', 'bob', 'cid'"
        assert first in str(caught.value)
        assert "would answer no more" in str(caught.value)
    assert len(store.versions("house-style")) == 2
    on = store.info("ann").stands_on
    assert store.rm("house-style", 1, force=True) == 1
    assert on is not None
    assert not on.removed
    after = store.info("ann").stands_on
    assert after == on, "what it stood on is known still"
    assert after.removed
    assert not store.info("bob").stands_on.removed  # type: ignore[union-attr]
    again, new = store.put_once("house-style", lora(1))
    assert (again.version, new) == (3, True), "the same contents are another version"
    with pytest.raises(AdapterError, match="has no version 1"):
        store.put_once("ann", contents(1), on="house-style/1")
    moved, new = store.put_once("ann", contents(1), on="house-style/3")
    assert (moved.version, new) == (2, True)
    assert store.rm("ann", 2) == 1
    with pytest.raises(
        AdapterError, match="'ann' \\(version 1\\) stands on 'house-style' \\(version 1\\), which was rem"
    ):
        store.shared_of(store.info("ann"))
    faults = {fault.name: fault.what for fault in store.verify()}
    assert set(faults) == {"ann", "cid", *(f"more-{i}" for i in range(8))}
    assert faults["ann"] == "stands on 'house-style' (version 1), which was removed"
    assert store.rm("bob") == 1
    assert store.rm("house-style") == 2, "nobody stands on what is left"


def test_versions_of_one_name_that_stand_on_each_other_go_together(store: AdapterStore) -> None:
    store.put("ann", lora(1))
    store.put("ann", contents(1), on="ann/1")
    with pytest.raises(AdapterError, match="1 adapter \\('ann'\\) stand"):
        store.rm("ann", 1)
    assert store.rm("ann") == 2


def test_gc_keeps_what_is_stood_on(store: AdapterStore) -> None:
    for i in range(4):
        store.put("house-style", lora(i))
    store.put("ann", contents(1), on="house-style/1")
    store.put("ann", contents(2), on="house-style/2")
    assert store.gc(keep=1, dry_run=True).versions == 2
    assert store.gc(keep=1).versions == 2, "ann's first, and the third that nobody stands on"
    assert [info.version for info in store.versions("house-style")] in ([1, 2, 4], [2, 4]), "as ann's came before"
    store.gc(keep=1)
    assert [info.version for info in store.versions("house-style")] == [2, 4]
    assert list(store.verify()) == []


def test_what_is_removed_while_it_is_put_on_is_noticed(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("house-style", lora(1))
    settle = store._below  # type: ignore[attr-defined]

    def late(on: str | None) -> Any:
        found = settle(on)
        if on is not None:
            store.rm("house-style")
        return found

    monkeypatch.setattr(store, "_below", late)
    for put in (store.put, store.put_once):
        with pytest.raises(AdapterError, match="on='house-style': version [12] was removed meanwhile"):
            put("ann", contents(1), on="house-style")
        assert store.versions("ann") == []
        store.put("house-style", lora(1))


# -- older stores ---------------------------------------------------------------------------------------


def made_older(store: AdapterStore) -> None:
    """Take away what format 2 has more than format 1."""
    postgres = store.url.startswith("postgres")
    drop = ["DROP INDEX kilotune_versions_shared"]
    drop += [f"ALTER TABLE kilotune_versions DROP COLUMN {name}" for name in ("shared_name", "shared_version")]
    drop += ["UPDATE kilotune_store SET value = '1' WHERE key = 'format'" if postgres else "PRAGMA user_version = 1"]
    for statement in drop:
        store._write(lambda link, statement=statement: link.run(statement))  # type: ignore[attr-defined]


def test_an_older_store_is_read_as_it_is_and_upgraded_by_the_first_change(opened: Opener) -> None:
    new = opened()
    kept = new.put("house-style", lora(1), alias="live")
    made_older(new)
    reader, writer, other = opened(read_only=True), opened(), opened()
    for handle in (reader, writer):
        assert handle.info("house-style") == kept
        assert handle.get("house-style", "live").info == kept
        assert [info.name for info in handle.ls()] == ["house-style"]
        assert list(handle.verify()) == []
        assert not handle.standing_on("house-style")
        assert handle.gc(keep=1, dry_run=True).versions == 0
    on = writer.put("ann", contents(1), on="house-style").stands_on
    assert on is not None
    for handle in (reader, other, opened(), opened(read_only=True)):
        assert handle.info("ann").stands_on == on
        assert handle.standing_on("house-style").names == ("ann",)
    assert other.put("bob", contents(1), on="house-style").stands_on == on
    assert list(reader.verify()) == []


def test_a_change_that_fails_upgrades_nothing(opened: Opener) -> None:
    new = opened()
    new.put("house-style", lora(1))
    made_older(new)
    store = opened()
    with pytest.raises(AdapterError):
        store.rm("nobody")
    assert opened(read_only=True).info("house-style").stands_on is None
    assert store.put("ann", contents(1), on="house-style").version == 1
    assert FORMAT == 2


# -- copies, folders ------------------------------------------------------------------------------------


def stands(store: AdapterStore) -> dict[str, tuple[str, int] | None]:
    found = {}
    for info in store.ls():
        found[info.name] = None if info.stands_on is None else (info.stands_on.name, info.stands_on.version)
        if info.stands_on is not None:
            store.shared_of(info)  # it is there, and is what it was
    return found


@pytest.mark.parametrize("packing", ["float32", "int8"])
def test_a_copy_takes_along_what_is_stood_on(store: AdapterStore, tmp_path: Path, packing: str) -> None:
    stacked(store)
    with open_store(f"sqlite:///{tmp_path}/copy.db") as copy:
        moved = copy_adapters(store, copy, "ann", packing=packing)
        assert (moved.count, moved.faults) == (2, ())
        assert stands(copy) == {"ann": ("house-style", 1), "house-style": None}
        assert copy.info("house-style").metadata == {"rows": 9}
        moved = copy_adapters(store, copy, packing=packing, alias="here")
        assert moved.faults == ()
        assert stands(copy)["bob"] == ("house-style", 2)
        assert content_sha256(copy.shared_of(copy.info("bob")).file()) == content_sha256(
            copy.get("house-style", 2).file()
        )
        assert copy.aliases("house-style") == {"here": 2}
        if packing == "float32":
            for name, which in (("ann", 1), ("bob", 2), ("cid", 1)):
                there = copy.shared_of(copy.info(name)).tensors()
                assert same(there, store.get("house-style", which).tensors()), name
        assert list(copy.verify()) == []


def test_a_history_keeps_who_stands_on_which(store: AdapterStore, tmp_path: Path) -> None:
    stacked(store)
    store.put("ann", contents(5), on="house-style/2", alias="live")
    store.put("zed", contents(6), on="house-style/1")
    with open_store(f"sqlite:///{tmp_path}/copy.db") as copy:
        copy.put("house-style", lora(7))  # so that numbers move
        moved = copy_adapters(store, copy, history=True)
        assert moved.faults == ()
        assert moved.count == 8
        assert [info.version for info in copy.versions("house-style")] == [1, 2, 3]
        assert copy.aliases("house-style") == {"live": 2}
        on = {(i.name, i.version): i.stands_on.version for i in copy.ls(versions=True) if i.stands_on}
        assert on == {("ann", 1): 2, ("ann", 2): 3, ("bob", 1): 3, ("cid", 1): 2, ("zed", 1): 2}
        assert list(copy.verify()) == []


def test_a_copy_stands_on_the_shared_one_that_is_there(opened: Opener, tmp_path: Path) -> None:
    source, shared = opened(namespace="ann"), opened(namespace=SHARED)
    shared.put("house-style", lora(1))
    source.put("me", contents(1), on="house-style")
    other = opened(namespace="bob")
    assert copy_adapters(source, other).count == 1
    assert other.info("me").stands_on == source.info("me").stands_on
    with open_store(f"sqlite:///{tmp_path}/copy.db") as copy:
        assert copy_adapters(source, copy).count == 2
        assert stands(copy) == {"house-style": None, "me": ("house-style", 1)}


def test_folders_say_what_they_stand_on(store: AdapterStore, tmp_path: Path) -> None:
    stacked(store)
    out = tmp_path / "out"
    moved = export_adapters(store, out)
    assert (moved.count, moved.faults) == (6, ())
    assert {path.name for path in out.iterdir()} == {"ann", "bob", "cid", "dot", "house-style", "house-style.1"}
    mark = StandsOn.of_header(open_adapter(out / "ann").metadata)
    assert mark == StandsOn("house-style.1", None, content_sha256(open_adapter(out / "house-style.1")))
    assert StandsOn.of_header(open_adapter(out / "dot").metadata) is None
    with open_store(out) as folder:
        assert stands(folder) == {
            "ann": ("house-style.1", 1),
            "bob": ("house-style", 1),
            "cid": ("house-style.1", 1),
            "dot": None,
            "house-style": None,
            "house-style.1": None,
        }
        assert list(folder.verify()) == []
        assert folder.standing_on("house-style.1").names == ("ann", "cid")
        assert folder.find_shared("house-style").info.name == "house-style"
        with pytest.raises(ConfigError, match="two levels"):
            folder.find_shared("ann")
        with open_store(f"sqlite:///{tmp_path}/back.db") as back:
            moved = copy_adapters(folder, back)
            assert (moved.count, moved.faults) == (6, ())
            assert stands(back) == stands(folder)
            assert same(back.get("ann").tensors(), store.get("ann").tensors())
    # A second export says that it is there, and not of what all stand on.
    again = export_adapters(store, out, "ann")
    assert [fault.name for fault in again.faults] == ["ann"]
    shutil.rmtree(out / "ann")
    assert export_adapters(store, out, "ann").faults == ()


def test_a_folder_whose_shared_one_is_another_is_found(store: AdapterStore, tmp_path: Path) -> None:
    stacked(store)
    export_adapters(store, tmp_path / "out", "bob")
    lora(9).save_pretrained(tmp_path / "out" / "house-style")
    with open_store(tmp_path / "out") as folder:
        (fault,) = folder.verify()
        assert "it was changed since" in fault.what
        shutil.rmtree(tmp_path / "out" / "house-style")
        (fault,) = folder.verify()
        assert "stands on 'house-style', which is not there" in fault.what


def test_a_folder_is_put_on_what_its_file_says(store: AdapterStore, tmp_path: Path) -> None:
    stacked(store)
    store.get("ann").save(tmp_path / "ann")
    assert StandsOn.of_header(open_adapter(tmp_path / "ann").metadata) == StandsOn(
        "house-style", None, content_sha256(store.get("house-style", 1).file())
    )
    with pytest.raises(ConfigError, match="on='house-style'"):
        store.put("eve", tmp_path / "ann")
    with pytest.raises(CheckpointError, match="other numbers"):
        store.put("eve", tmp_path / "ann", on="house-style")
    made = store.put("eve", tmp_path / "ann", on="house-style/1")
    assert made.stands_on == store.info("ann").stands_on


def test_a_mark_that_is_none_is_refused(store: AdapterStore) -> None:
    given = contents(1)
    for text in ("", "[]", '{"name": "x"}', '{"name": 1, "sha256": "y"}', '{"name": "", "sha256": "y"}', "{" * 10_000):
        with pytest.raises(CheckpointError, match="kilotune_stands_on in the header|stands_on: expected"):
            store.put("ann", Contents(given.config, given.tensors, {**given.header, HEADER: text}))
    assert with_mark({HEADER: "x", "a": "b"}, None) == {"a": "b"}


def test_a_shared_adapter_is_brought_once(store: AdapterStore, tmp_path: Path) -> None:
    model = lora(1)
    model.save_pretrained(tmp_path / "shared")
    assert bring(store, "house-style", tmp_path / "shared", tags=["shared"]) == "house-style/1"
    assert bring(store, "house-style", model) == "house-style/1"
    store.put("house-style", lora(2))
    assert bring(store, "house-style", tmp_path / "shared") == "house-style/3"
    assert store.info("house-style", 1).tags == ("shared",)


# -- the command line -----------------------------------------------------------------------------------


def test_stacks_by_command(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    lora(1).save_pretrained(tmp_path / "shared")
    adapted(2).save_pretrained(tmp_path / "ann")
    kilotune("store", "put", url, "house-style", tmp_path / "shared")
    assert "stands on" not in kilotune("store", "ls", url).stdout
    told = kilotune("store", "put", url, "ann", tmp_path / "ann", "--on", "house-style").stdout
    assert "ann: version 1, on house-style (version 1), " in told
    (ann, shared) = as_json("store", "ls", url)["adapters"]
    assert ann["stands_on"] == {
        "name": "house-style",
        "version": 1,
        "sha256": shared["sha256"],
        "namespace": "default",
        "removed": False,
    }
    assert shared["stands_on"] is None
    listed = kilotune("store", "ls", url).stdout
    assert "stands on" in listed
    assert "house-style (version 1)" in " ".join(listed.split())
    assert "stands on" in kilotune("store", "show", url, "ann").stdout
    shown = as_json("store", "show", url, "house-style")
    assert shown["stood_on_by"] == {"names": ["ann"], "count": 1, "elsewhere": 0}
    assert "1 adapter ('ann')" in kilotune("store", "show", url, "house-style").stdout
    assert "without which it is another adapter" in kilotune("store", "get", url, "ann", tmp_path / "out").stdout
    assert "1 adapter ('ann') stand on version 1 of it" in error("store", "rm", url, "house-style", "--all")
    result = kilotune("store", "rm", url, "house-style", "--all", "--force")
    assert "1 adapter ('ann') stood on it" in result.stderr
    assert "there is no such adapter" in error("store", "put", url, "x", tmp_path / "ann", "--on", "nobody")
    assert "which was removed" in kilotune("store", "verify", url).stderr


def test_a_folder_cannot_be_written_to(tmp_path: Path) -> None:
    lora(1).save_pretrained(tmp_path / "in" / "a")
    with open_store(tmp_path / "in") as folder, pytest.raises(StoreError, match="only reads"):
        folder.put("b", mlp(), on="a")  # type: ignore[arg-type]
