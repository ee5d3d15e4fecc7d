"""What adapters bring beside their two files: kept with the version, told, and given back as it came."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from kilotune.adapter_files.own_files import OWN_FILES, check_own, own_template
from kilotune.errors import CheckpointError, ConfigError
from kilotune.fleet.store import copy_adapters, export_adapters, open_store
from tests.support.cli_helpers import as_json, kilotune
from tests.support.http_support import adapter_folder
from tests.support.store_support import KINDS, new_url

FILES = {
    "chat_template.jinja": "{% for m in messages %}é{{ m.content }}\r\n{% endfor %}\n".encode(),
    "tokenizer.json": json.dumps({"model": {"vocab": {f"t{i}": i for i in range(5000)}}}).encode(),
    "tokenizer_config.json": b'{"eos_token": "</s>"}',
}


def folder_with(tmp_path: Path, files: dict[str, bytes], seed: int = 1, name: str = "made") -> Path:
    made = tmp_path / name
    shutil.copytree(adapter_folder(seed), made)
    for file, data in files.items():
        (made / file).write_bytes(data)
    return made


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_url(request.param, request, tmp_path)


def test_they_are_kept_with_the_version_and_come_back(url: str, tmp_path: Path) -> None:
    plain, whole = adapter_folder(1), folder_with(tmp_path, FILES)
    with open_store(url) as store:
        bare, version = store.put("bare", plain), store.put("ann", whole)
        assert (bare.files, bare.own) == ({}, None)
        assert sorted(version.files) == sorted(FILES)
        assert version.sha256 != bare.sha256, "they are a part of the contents"
        assert store.put_once("ann", whole)[1] is False
        assert dict(store.get("ann").files) == FILES
        other = folder_with(tmp_path, {**FILES, "chat_template.jinja": b"another"}, name="other")
        changed, made = store.put_once("ann", other)
        assert (made, changed.version) == (True, 2)
        assert changed.sha256 != version.sha256
        assert store.get("ann", 1).files["chat_template.jinja"] == FILES["chat_template.jinja"]
        assert [info.files for info in store.ls()] == [changed.files, {}]
        store.get("ann", 1).save(tmp_path / "saved")
        assert {name: (tmp_path / "saved" / name).read_bytes() for name in FILES} == FILES
        assert not [*store.verify()]
        export_adapters(store, tmp_path / "out")
    assert (tmp_path / "out" / "ann" / "chat_template.jinja").read_bytes() == b"another"
    assert sorted(path.name for path in (tmp_path / "out" / "bare").iterdir()) == sorted(
        path.name for path in plain.iterdir()
    )


def test_copies_have_them_and_many_of_one_kind_share_them(tmp_path: Path) -> None:
    folder = tmp_path / "folders"
    folder.mkdir()
    with (
        open_store(f"sqlite:///{tmp_path / 'a.db'}") as store,
        open_store(f"sqlite:///{tmp_path / 'b.db'}") as target,
        open_store(folder) as folders,
    ):
        for seed in (1, 2, 3):
            store.put(f"a{seed}", folder_with(folder, FILES, seed, f"a{seed}"))
        assert not copy_adapters(store, target).faults
        assert not copy_adapters(folders, target).faults
        assert {dict(target.get(f"a{seed}").files) == FILES for seed in (1, 2, 3)} == {True}
        assert [target.get(f"a{seed}").info.sha256 for seed in (1, 2, 3)] == [
            store.info(f"a{seed}").sha256 for seed in (1, 2, 3)
        ]
        assert folders.info("a1").files == store.info("a1").files
    with sqlite3.connect(tmp_path / "a.db") as raw:
        assert raw.execute("SELECT COUNT(*) FROM kilotune_frozen").fetchone()[0] == len(FILES)
    raw.close()


def test_gc_takes_them_away_with_the_last_that_has_them(url: str, tmp_path: Path) -> None:
    with open_store(url) as store:
        store.put("ann", folder_with(tmp_path, FILES))
        store.put("bob", adapter_folder(2))
        store.rm("ann")
        assert store.gc().frozen == len(FILES)


def test_damage_is_told(tmp_path: Path) -> None:
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        store.put("ann", folder_with(tmp_path, {"chat_template.jinja": b"damaged one"}))
    with sqlite3.connect(tmp_path / "a.db") as raw:
        raw.execute("UPDATE kilotune_frozen SET data = ?", (b"x",))
    raw.close()
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        assert [str(fault) for fault in store.verify()] == [
            "ann (version 1): the store is damaged: chat_template.jinja is not what was kept"
        ]
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not what was kept"):
            store.get("ann").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_replaces_an_adapter_leaves_nothing_of_it(tmp_path: Path) -> None:
    place = folder_with(tmp_path, FILES)
    (place / "README.md").write_text("mine")
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        store.put("bare", adapter_folder(2))
        store.get("bare").save(place)
    left = {path.name for path in place.iterdir()}
    assert not left & {*OWN_FILES}
    assert "README.md" in left
    models = tmp_path / "a-model"
    models.mkdir()
    (models / "tokenizer.json").write_text("the model's")
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        store.get("bare").save(models)
    assert (models / "tokenizer.json").read_text() == "the model's"


def test_sizes_and_names_are_bounded(tmp_path: Path) -> None:
    large = folder_with(tmp_path, {"chat_template.jinja": b"x" * (2**17 + 1)})
    with (
        open_store(f"sqlite:///{tmp_path / 'a.db'}") as store,
        pytest.raises(CheckpointError, match=r"chat_template\.jinja has more than 131,072 bytes"),
    ):
        store.put("ann", large)
    with pytest.raises(CheckpointError, match=r"'\.\./x' is none of the files that an adapter may bring"):
        check_own({"../x": b""})


def test_links_that_lead_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    place = folder_with(tmp_path / "store", {}, name="ann")
    (place / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with open_store(tmp_path / "store") as store, pytest.raises(CheckpointError, match="leads out of"):
        store.get("ann")


def test_the_template_in_them() -> None:
    config = json.dumps({"chat_template": "b"}).encode()
    assert own_template({}) is None
    assert own_template({"tokenizer_config.json": config}) == "b"
    assert own_template({"tokenizer_config.json": config, "chat_template.jinja": b"a"}) == "a"
    several = json.dumps({"chat_template": [{"name": "default", "template": "x"}]}).encode()
    for files, told in (
        ({"tokenizer_config.json": several}, "expected one text"),
        ({"tokenizer_config.json": json.dumps({"chat_template": "x" * (2**17 + 1)}).encode()}, "more than 131,072"),
        ({"tokenizer_config.json": b"{"}, "is no JSON"),
        ({"tokenizer_config.json": b"[" * 100_000}, "is no JSON"),
        ({"chat_template.jinja": b"\xff"}, "no text in UTF-8"),
    ):
        with pytest.raises(ConfigError, match=told):
            own_template(files)


def test_show_and_inspect_name_them(tmp_path: Path) -> None:
    url, place = f"sqlite:///{tmp_path / 'a.db'}", folder_with(tmp_path, FILES)
    as_json("store", "put", url, "ann", place)
    assert sorted(as_json("store", "show", url, "ann")["files"]) == sorted(FILES)
    told = "chat_template.jinja, tokenizer.json, tokenizer_config.json"
    assert told in " ".join(kilotune("store", "show", url, "ann").output.split())
    assert {*FILES} <= {*as_json("inspect", place)["files"]}
    as_json("store", "get", url, "ann", tmp_path / "got")
    assert (tmp_path / "got" / "chat_template.jinja").read_bytes() == FILES["chat_template.jinja"]
