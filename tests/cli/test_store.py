"""``kilotune store``, and what stands behind import and export: folders, copies between stores, what is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from kilotune import AdapterError, ConfigError, LoraConfig, PeftModel
from kilotune.errors import StoreError
from kilotune.fleet.store import copy_adapters, export_adapters, open_store
from tests.support.cli_helpers import as_json, error, kilotune
from tests.support.models import mlp
from tests.support.store_support import adapted, contents, inputs, lora, same


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three adapters as PEFT writes them, one of them broken."""
    for i, name in enumerate(("ann", "bob", "cid")):
        adapted(i).save_pretrained(tmp_path / "in" / name)
    weights = tmp_path / "in" / "bob" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3] + b"\1\2\3")
    return tmp_path / "in"


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder}/a.db"


# -- the command line -----------------------------------------------------------------------------------


def test_an_adapter_goes_in_and_out(folders: Path, tmp_path: Path) -> None:
    url, words = url_in(tmp_path), ["--tag", "eu", "--metadata", "rows=40", "--metadata", "who=Ann A."]
    put = as_json("store", "put", url, "ann", folders / "ann", "--alias", "live", *words)
    assert (put["version"], put["metadata"], put["tags"]) == (1, {"rows": 40, "who": "Ann A."}, ["eu"])
    as_json("store", "put", url, "ann", folders / "cid", "--packing", "int8")
    assert as_json("store", "get", url, "ann", tmp_path / "out", "--version", "live")["version"] == 1
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folders / "ann" / name).read_bytes()
    assert "give another folder, or --force" in error("store", "get", url, "ann", tmp_path / "out")
    assert "wrote" in kilotune("store", "get", url, "ann", tmp_path / "out", "--force").stdout
    listed = as_json("store", "ls", url, "--versions")
    assert [(a["version"], a["aliases"], a["packing"]) for a in listed["adapters"]] == [
        (1, ["live"], "float32"),
        (2, [], "int8"),
    ]
    assert as_json("store", "ls", url, "b*") == {"adapters": [], "more": False}
    assert [a["version"] for a in as_json("store", "ls", url, "--tag", "eu", "--versions")["adapters"]] == [1]
    assert "eu" in kilotune("store", "ls", url, "--versions").stdout


def test_aliases_by_command(folders: Path, tmp_path: Path) -> None:
    url = url_in(tmp_path)
    for name in ("ann", "cid"):
        for _ in range(2):
            kilotune("store", "put", url, name, folders / name)
    assert as_json("store", "alias", url, "live", "ann", "cid", "--version", 1)["versions"] == {"ann": 1, "cid": 1}
    assert as_json("store", "alias", url, "live", "ann", "cid")["versions"] == {"ann": 2, "cid": 2}
    assert "live names version 1" in kilotune("store", "alias", url, "live", "cid", "--back").stdout
    assert "exclude each other" in error("store", "alias", url, "live", "cid", "--back", "--remove")
    assert "version 1 is named by 'live'" in error("store", "rm", url, "cid", "--version", 1)
    assert as_json("store", "alias", url, "live", "cid", "--remove")["versions"] == {"cid": None}
    assert as_json("store", "rm", url, "cid", "--version", 1) == {"name": "cid", "removed": 1, "broken": []}
    assert "say what to remove" in error("store", "rm", url, "cid")
    assert as_json("store", "gc", url, "--keep", 1, "--dry-run")["versions"] == 0  # live rolls back to version 1
    assert as_json("store", "rm", url, "ann", "--all")["removed"] == 2
    assert as_json("store", "gc", url, "--compact")["forms"] == 0
    assert as_json("store", "stats", url)["versions"] == 1
    assert "metadata" in kilotune("store", "stats", url).stdout


def test_import_and_export_by_command(folders: Path, tmp_path: Path) -> None:
    url = url_in(tmp_path)
    result = kilotune("store", "import", url, folders, "--alias", "live")
    assert result.exit_code == 1
    assert result.stderr.startswith("warning: left out bob: ")
    assert "damaged" in result.stderr
    assert "imported 2 adapters" in result.stdout
    assert as_json("store", "export", url, tmp_path / "out") == {"exported": 2, "bytes": 128, "faults": []}
    again = kilotune("store", "export", url, tmp_path / "out", "--json")
    assert again.exit_code == 1
    assert "is there already" in json.loads(again.stdout)["faults"][0]["what"]
    other = f"sqlite:///{tmp_path}/b.db"
    done = as_json("store", "import", other, url, "--namespace", "n", "--history", "--packing", "int8")
    assert done["imported"] == 2
    with open_store(other, namespace="n") as store:
        assert store.aliases("ann") == {"live": 1}
        assert store.info("ann").packing == "int8"
    assert "a store only reads" in error("store", "import", folders, url)


def test_verify_says_no(folders: Path, tmp_path: Path) -> None:
    url = url_in(tmp_path)
    kilotune("store", "put", url, "ann", folders / "ann")
    assert as_json("store", "verify", url) == {"adapters": 1, "faults": []}
    with open_store(url) as store:
        store._write(lambda link: link.run("DELETE FROM kilotune_payloads"))  # type: ignore[attr-defined]
    result = kilotune("store", "verify", url)
    assert result.exit_code == 1
    assert "error: ann (version 1)" in result.stderr
    assert kilotune("store", "verify", folders).exit_code == 1  # bob


def test_wrong_words_are_one_line(folders: Path, tmp_path: Path) -> None:
    url = url_in(tmp_path)
    kilotune("store", "put", url, "ann", folders / "ann")
    for words, text in (
        (("get", url, "an", tmp_path / "x"), "Did you mean 'ann'"),
        (("get", "sqlite:///" + str(tmp_path / "none.db"), "ann", tmp_path / "x"), "there is no store"),
        (("put", url, "a/b", folders / "ann"), "must not be a path"),
        (("put", url, "ann", folders / "nobody"), "is no folder"),
        (("put", url, "ann", folders / "ann", "--packing", "int4"), "expected one of"),
        (("put", url, "ann", folders / "ann", "--metadata", "x"), "expected key=value"),
        (("put", folders, "ann", folders / "ann"), "is a folder, which a store only reads"),
        (("ls", "mysql://x"), "no store of the kind 'mysql'"),
        (("gc", url, "--compact", "--dry-run"), "changes nothing"),
    ):
        assert text in error("store", *words)
    assert [v.version for v in open_and_list(url)] == [1]


def open_and_list(url: str) -> list:
    with open_store(url, read_only=True) as store:
        return list(store.ls(versions=True))


def test_help_lists_the_verbs() -> None:
    shown = kilotune("store", "--help").stdout
    for verb in ("ls", "put", "get", "rm", "verify", "stats", "gc", "alias", "import", "export"):
        assert f" {verb} " in shown


# -- folders --------------------------------------------------------------------------------------------


def test_a_folder_is_read_as_a_store(folders: Path) -> None:
    adapted(7).save_pretrained(folders)  # the adapter "default", in the folder itself
    (folders / "not-an-adapter").mkdir()
    with open_store(folders, base=mlp()) as store:
        assert list(store.names()) == ["ann", "bob", "cid", "default"]
        assert list(store.names("*n*")) == ["ann"]
        for seed, name in ((0, "ann"), (2, "cid"), (7, "default")):
            loaded = PeftModel.from_pretrained(mlp(), store.get(name).file())
            assert torch.equal(loaded(inputs()), adapted(seed)(inputs()))
        assert [fault.name for fault in store.verify()] == ["bob"]
        assert store.aliases("ann") == {}
        assert [v.version for v in store.versions("ann")] == [1]
        assert store.versions("nobody") == []
        shutil.rmtree(folders / "bob")
        assert [v.name for v in store.ls(after="ann", limit=1)] == ["cid"]
        assert store.stats().names == 3
        for call in (
            lambda: store.put("x", contents(1)),
            lambda: store.put_many([]),
            lambda: store.rm("ann"),
            lambda: store.alias("ann", "live"),
            lambda: store.roll_out("live", {}),
            lambda: store.roll_back("live", []),
            lambda: store.unalias("ann", "live"),
            lambda: store.gc(),
        ):
            with pytest.raises(StoreError, match="a folder, which a store only reads"):
                call()
        with pytest.raises(AdapterError, match="Did you mean 'ann'"):
            store.get("anm")
        with pytest.raises(AdapterError, match="have the version 1 only"):
            store.get("ann", 2)
        with pytest.raises(StoreError, match="no tags"):
            list(store.ls(tags=["t"]))
    with pytest.raises(StoreError, match="is closed"):
        store.get("ann")
    with pytest.raises(ConfigError, match="a folder has none"):
        open_store(folders, namespace="ann")
    with pytest.raises(ConfigError, match="packing='int8'"):
        open_store(folders, packing="int8")


# -- copies ---------------------------------------------------------------------------------------------


def test_a_copy_has_the_metadata_and_with_history_all_versions(tmp_path: Path) -> None:
    with open_store(url_in(tmp_path)) as one, open_store(f"sqlite:///{tmp_path}/b.db") as other:
        for i in range(4):
            one.put("ann", contents(i), metadata={"i": i}, tags=[f"t{i}"])
        one.put("bob", lora(), tags=["x"])
        one.alias("ann", "live", 2)
        one.rm("ann", 1)
        counts: list[int] = []
        moved = copy_adapters(one, other, done=counts.append, alias="new")
        assert (moved.count, moved.faults, counts) == (2, (), [2])
        assert (other.info("ann").metadata, other.info("ann").tags) == ({"i": 3}, ("t3",))
        assert other.aliases("ann") == {"new": 1}
        assert same(other.get("bob").tensors(), one.get("bob").tensors())
        assert copy_adapters(one, other, "a*", history=True).count == 3
        assert [v.metadata["i"] for v in other.versions("ann")] == [3, 1, 2, 3]
        assert other.aliases("ann") == {"live": 2, "new": 1}
        with pytest.raises(ConfigError, match="history"):
            copy_adapters(one, other, history=True, alias="x")


def test_what_is_broken_in_a_store_fails_alone(tmp_path: Path) -> None:
    with open_store(url_in(tmp_path)) as one, open_store(f"sqlite:///{tmp_path}/b.db") as other:
        for name in ("ann", "bob", "cid"):
            one.put(name, contents(1), alias="live")
            one.put(name, contents(2))
        one._write(lambda link: link.run("DELETE FROM kilotune_payloads WHERE id = 4"))  # type: ignore[attr-defined]
        for history in (False, True):
            moved = copy_adapters(one, other, history=history)
            assert moved.count == (5 if history else 2)
            assert [fault.name for fault in moved.faults] == ["bob"]
            assert "numbers are not there" in moved.faults[0].what
        assert list(other.verify()) == []
        moved = export_adapters(one, tmp_path / "out")
        assert (moved.count, [fault.name for fault in moved.faults]) == (2, ["bob"])
        moved = export_adapters(one, tmp_path / "out", version="live", force=True)
        assert moved.count == 3
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ann", "bob", "cid"]


def test_a_store_of_another_base_is_not_copied_into_one(tmp_path: Path) -> None:
    with open_store(url_in(tmp_path)) as one, open_store(f"sqlite:///{tmp_path}/b.db", base=mlp(seed=5)) as other:
        one.put("ann", adapted())
        one.put("bob", adapted(1, LoraConfig(r=2, target_modules=["0"]), base=5))
        moved = copy_adapters(one, other)
        assert moved.count == 1
        assert "of another base model" in moved.faults[0].what
