"""What every store that can be written to promises, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune import (
    AdapterError,
    BitfitConfig,
    BottleneckConfig,
    CheckpointError,
    ConfigError,
    Ia3Config,
    IntrinsicConfig,
    LoraConfig,
    LoraXsConfig,
    PeftModel,
    UniLoraConfig,
    VbLoraConfig,
    VeraConfig,
)
from kilotune.errors import StoreError
from kilotune.fleet import Fingerprint
from kilotune.fleet.store import AdapterStore, Contents, Item, open_store
from tests.support.models import mlp
from tests.support.paths import ROOT
from tests.support.store_support import CONFIG, Opener, adapted, contents, inputs, lora, same


@pytest.fixture
def store(opened: Opener) -> AdapterStore:
    return opened()


# -- what goes in comes out -----------------------------------------------------------------------------


def test_an_adapter_comes_back_to_the_bit(store: AdapterStore, opened: Opener) -> None:
    given = contents(1)
    before = datetime.now(UTC) - timedelta(seconds=5)
    put = store.put("ann", given, metadata={"rows": 40, "who": "Ann Ä."}, tags=["b", "a", "b"])
    assert (put.name, put.version, put.packing, put.size) == ("ann", 1, "float32", 4 * 16)
    assert put.tags == ("a", "b")
    assert put.metadata == {"rows": 40, "who": "Ann Ä."}
    assert before < put.created < datetime.now(UTC) + timedelta(seconds=5)
    for handle in (store, opened()):
        record = handle.get("ann")
        assert record.info == put == handle.info("ann")
        assert same(record.tensors(), dict(sorted(given.tensors.items())))
        assert record.config == CONFIG
        # The bank's row: all numbers in the layout's order, which is that of the keys here.
        flat = torch.cat([given.tensors[key] for key in sorted(given.tensors)])
        form, row = handle.vectors("ann")
        assert torch.equal(row, flat)
        assert [entry.key for entry in form.layout.entries] == sorted(given.tensors)
        for key, (begin, end) in form.layout.places.items():
            assert torch.equal(row[begin:end], given.tensors[key])


def test_what_is_given_out_is_the_callers_own(store: AdapterStore) -> None:
    store.put("ann", contents(1))
    record = store.get("ann")
    record.config["r"] = 99
    record.tensors()["base_model.model.0.vera_lambda_b"].zero_()
    record.vector().zero_()
    again = store.get("ann")
    assert again.config == CONFIG
    assert same(again.tensors(), dict(sorted(contents(1).tensors.items())))


METHODS = {
    "vera": VeraConfig(r=4, target_modules="all-linear"),
    "vera by shape": VeraConfig(r=4, target_modules="all-linear", sharing="shape"),
    "vera for peft": VeraConfig(r=4, target_modules="all-linear", generator="peft"),
    "vera with its matrices": VeraConfig(r=4, target_modules="all-linear", save_projection=True),
    "lora": LoraConfig(r=2, target_modules="all-linear"),
    "lora with biases": LoraConfig(r=2, target_modules=["0"], bias="all"),
    "lora and a module saved whole": LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]),
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "ia3": Ia3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    "loraxs": LoraXsConfig(r=2, target_modules="all-linear"),
    "unilora": UniLoraConfig(r=2, target_modules="all-linear"),
    "vblora": VbLoraConfig(r=2, vector_length=1, num_vectors=4, target_modules="all-linear"),
    "bitfit": BitfitConfig(),
    "intrinsic": IntrinsicConfig(d=8, target_modules="all-linear"),
    "bottleneck": BottleneckConfig(target_modules=["0"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_model_from_a_store_is_the_model(method: str, tmp_path: Path) -> None:
    """Every method; the same as through a folder, to the bit."""
    model = adapted(3, METHODS[method])
    with open_store(f"sqlite:///{tmp_path}/a.db", base=mlp()) as store:
        store.put("ann", model)
        record = store.get("ann")
        record.save(tmp_path / "stored")
    model.save_pretrained(tmp_path / "saved")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "stored" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name
    wanted = PeftModel.from_pretrained(mlp(), tmp_path / "saved")(inputs())
    if method != "vera with its matrices":  # there the file is PEFT's form, which is the model's to rounding
        assert torch.equal(wanted, model(inputs()))
    loaded = PeftModel.from_pretrained(mlp(), record.file())
    assert torch.equal(loaded(inputs()), wanted)
    beside = adapted(9, LoraConfig(r=2, target_modules=["0"]))
    assert not torch.equal(beside(inputs()), wanted)
    beside.load_adapter(record.file(), "ann")
    beside.set_adapter("ann")
    assert torch.equal(beside(inputs()), wanted)


def test_an_adapter_from_memory_takes_no_options_of_a_folder(store: AdapterStore) -> None:
    store.put("ann", adapted())
    with pytest.raises(ConfigError, match="revision, token: for a folder or a hub id only"):
        PeftModel.from_pretrained(mlp(), store.get("ann").file(), revision="main", token="secret")


def test_folders_models_and_records_can_be_put(store: AdapterStore, opened: Opener, tmp_path: Path) -> None:
    model = adapted(1)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    store.put("from-model", model)
    store.put("second", model, adapter_name="second")
    store.put("from-folder", tmp_path)
    store.put("from-text", str(tmp_path))
    store.put("from-record", store.get("from-model"))
    other = opened(namespace="other")
    other.put("from-another", store.get("from-model"))
    wanted = store.get("from-model").tensors()
    for name in ("from-folder", "from-text", "from-record"):
        assert same(store.get(name).tensors(), wanted), name
    assert same(other.get("from-another").tensors(), wanted)
    assert store.get("second").config["peft_type"] == "LORA"


def test_what_cannot_be_put_is_refused_and_leaves_nothing(store: AdapterStore, tmp_path: Path) -> None:
    model = adapted()
    for adapter, error, text in (
        (mlp(), ConfigError, "expected an adapter's folder, a kilotune model"),
        (tmp_path / "nothing", CheckpointError, "no folder"),
        (Contents({"peft_type": "NOPE"}, {}, {}), ConfigError, "NOPE"),
        (Contents({**CONFIG, "r": -1}, contents(1).tensors, {}), ConfigError, "r: expected"),
        (Contents(CONFIG, {"strange": torch.zeros(1)}, {}), CheckpointError, "strange"),
        (Contents(CONFIG, {"base_model.model.0.x": torch.zeros(1, dtype=torch.complex64)}, {}), CheckpointError, "x"),
    ):
        with pytest.raises(error, match=text):
            store.put("ann", adapter)
    for options, text in (
        ({"packing": "int4"}, "packing: expected one of"),
        ({"packing": "bfloat6"}, "Did you mean 'bfloat16'"),
        ({"metadata": {"a": float("nan")}}, "JSON"),
        ({"metadata": {"a": torch.zeros(1)}}, "JSON"),
        ({"metadata": [1]}, "expected a mapping"),
        ({"metadata": {"a": "x" * 70_000}}, "at most 65536 bytes"),
        ({"tags": "one"}, "expected a list of words"),
        ({"tags": [""]}, "non-empty"),
        ({"tags": ["a\0b"]}, "control"),
        ({"alias": "7"}, "is a number"),
        ({"alias": "latest"}, "newest"),
        ({"adapter_name": "nobody"}, "there is no adapter 'nobody'"),
    ):
        with pytest.raises((AdapterError, ConfigError), match=text):
            store.put("ann", model, **options)
    assert list(store.ls()) == []
    assert store.stats().store_bytes > 0
    assert store.gc().forms == 0  # and no form was left behind


# -- versions -------------------------------------------------------------------------------------------


def numbers(store: AdapterStore, name: str = "ann") -> list[int]:
    return [version.version for version in store.versions(name)]


def seed_of(store: AdapterStore, which: int | str | None = None, name: str = "ann") -> int:
    """Which of ``contents(0 ... 9)`` the store gives."""
    row = store.get(name, which).tensors()
    return next(i for i in range(10) if same(row, dict(sorted(contents(i).tensors.items()))))


def test_versions_count_up_and_no_number_comes_again(store: AdapterStore) -> None:
    assert [store.put("ann", contents(i)).version for i in (1, 2, 3)] == [1, 2, 3]
    assert numbers(store) == [1, 2, 3]
    assert [seed_of(store, which) for which in (1, 2, 3, None, "latest")] == [1, 2, 3, 3, 3]
    assert store.rm("ann", 3) == 1
    assert numbers(store) == [1, 2]
    assert seed_of(store) == 2
    assert store.put("ann", contents(4)).version == 4
    assert store.rm("ann", "latest") == 1
    assert numbers(store) == [1, 2]
    assert store.rm("ann") == 2
    assert numbers(store) == []
    assert list(store.names()) == []
    assert store.put("ann", contents(5)).version == 5


def test_what_is_not_there_is_named_with_the_nearest(store: AdapterStore) -> None:
    store.put("annabel", contents(1))
    store.put("annabel", contents(2), alias="live")
    for call, text in (
        (lambda: store.get("anabel"), "there is no adapter 'anabel' in this namespace. Did you mean 'annabel'"),
        (lambda: store.info("zzz"), "there is no adapter 'zzz'"),
        (lambda: store.get("annabel", 7), "'annabel' has no version 7; it has 1, 2"),
        (lambda: store.get("annabel", "lvie"), "no alias 'lvie'. Did you mean 'live'? It has aliases: 'live'"),
        (lambda: store.alias("annabel", "live", 9), "no version 9"),
        (lambda: store.alias("bob", "live"), "no adapter 'bob'"),
        (lambda: store.unalias("annabel", "old"), "no alias 'old'"),
        (lambda: store.rm("bob"), "no adapter 'bob'"),
        (lambda: store.rm("annabel", 3), "no version 3"),
        (lambda: store.get("annabel", 0), "a number from 1"),
        (lambda: store.get("annabel", True), "expected a number, an alias or None"),
        (lambda: store.get("annabel", 1.0), "expected a number, an alias or None"),
        (lambda: list(store.get_many(["annabel", "x", "y"])), "2 of 3 are not there"),
        (lambda: list(store.get_many("annabel")), "put it into a list"),
    ):
        with pytest.raises(AdapterError) as caught:
            call()
        assert text in str(caught.value)
    assert store.versions("bob") == []


# -- aliases --------------------------------------------------------------------------------------------


def test_an_alias_moves_and_rolls_back(store: AdapterStore) -> None:
    store.put("ann", contents(1), alias="live")
    store.put("ann", contents(2))
    assert seed_of(store, "live") == 1
    assert store.alias("ann", "live", 2) == 2
    assert seed_of(store, "live") == 2
    assert store.alias("ann", "live", 2) == 2  # no move, so what it rolls back to stays
    assert store.roll_back("live", ["ann"]) == {"ann": 1}
    assert seed_of(store, "live") == 1
    assert store.roll_back("live", ["ann"]) == {"ann": 2}
    store.put("ann", contents(3), alias="live")
    assert store.aliases("ann") == {"live": 3}
    assert store.roll_back("live", ["ann"]) == {"ann": 2}
    assert store.alias("ann", "old", "live") == 2
    assert store.alias("ann", "new") == 3
    assert store.aliases("ann") == {"live": 2, "new": 3, "old": 2}
    store.unalias("ann", "old")
    assert store.aliases("ann") == {"live": 2, "new": 3}


def test_an_alias_moves_only_from_where_it_is_expected(store: AdapterStore) -> None:
    for i in (1, 2, 3):
        store.put("ann", contents(i))
    assert store.alias("ann", "live", 1, expected=0) == 1
    assert store.alias("ann", "live", 2, expected=1) == 2
    for expected, text in ((1, "expected version 1, but 'live' names version 2"), (0, "no such alias")):
        with pytest.raises(AdapterError, match=text):
            store.alias("ann", "live", 3, expected=expected)
    with pytest.raises(AdapterError, match="'other' is not there"):
        store.alias("ann", "other", 3, expected=2)
    assert store.aliases("ann") == {"live": 2}


def test_many_aliases_move_together_or_not_at_all(store: AdapterStore) -> None:
    for name in ("ann", "bob", "cid"):
        store.put(name, contents(1), alias="live")
        store.put(name, contents(2))
    with pytest.raises(AdapterError, match="'cid' has no version 5"):
        store.roll_out("live", {"ann": 2, "bob": None, "cid": 5})
    assert [store.aliases(name)["live"] for name in ("ann", "bob", "cid")] == [1, 1, 1]
    assert store.roll_out("live", {"bob": None, "ann": 2}) == {"ann": 2, "bob": 2}
    with pytest.raises(AdapterError, match="'live' has not been moved") as caught:
        store.roll_back("live", ["ann", "cid", "bob"])
    assert "cid" in str(caught.value)
    assert [store.aliases(name)["live"] for name in ("ann", "bob", "cid")] == [2, 2, 1]
    assert store.roll_back("live", ["ann", "bob", "ann"]) == {"ann": 1, "bob": 1}


def test_what_an_alias_names_is_removed_only_by_force(store: AdapterStore) -> None:
    for i in (1, 2):
        store.put("ann", contents(i), alias="live")
    with pytest.raises(AdapterError, match="version 2 is named by 'live'; move the alias first"):
        store.rm("ann", 2)
    assert store.rm("ann", 1) == 1
    with pytest.raises(AdapterError, match="what it named before was removed"):
        store.roll_back("live", ["ann"])
    assert store.rm("ann", "live", force=True) == 1
    assert store.aliases("ann") == {}
    assert list(store.verify()) == []


# -- many -----------------------------------------------------------------------------------------------


def test_many_are_put_and_read_in_batches(store: AdapterStore) -> None:
    told: list[list[int]] = []
    items = (Item(f"user-{i % 50:02d}", contents(i), {"i": i}) for i in range(120))
    count = store.put_many(items, batch=40, alias="live", done=lambda b: told.append([v.metadata["i"] for v in b]))
    assert count == 120
    assert told == [list(range(40)), list(range(40, 80)), list(range(80, 120))]
    # A name that comes several times, in one batch too, gets a version each time, and the alias names the last.
    assert numbers(store, "user-03") == [1, 2, 3]
    assert numbers(store, "user-30") == [1, 2]
    assert [store.info("user-03", i).metadata["i"] for i in (1, 2, 3)] == [3, 53, 103]
    assert store.aliases("user-03") == {"live": 3}
    names = ["user-49", "user-03", "user-00", "user-03"]
    records = list(store.get_many(names))
    assert [record.info.name for record in records] == names
    assert [record.info.version for record in records] == [2, 3, 3, 3]
    assert [record.info.version for record in store.get_many(["user-03", "user-49"], 2)] == [2, 2]
    for record in records:
        wanted = contents(record.info.metadata["i"]).tensors
        assert same(record.tensors(), dict(sorted(wanted.items())))


def test_one_that_is_not_fit_takes_its_batch_or_is_left_out(store: AdapterStore) -> None:
    def items() -> Iterator[Item]:
        for i in range(10):
            broken = Contents(CONFIG, {"strange": torch.zeros(1)}, {})
            yield Item(f"user-{i}", broken if i == 7 else contents(i))

    with pytest.raises(CheckpointError, match="(?s)'user-7'.*strange"):
        store.put_many(items(), batch=5)
    assert list(store.names()) == [f"user-{i}" for i in range(5)]
    failed: list[str] = []
    assert store.put_many(items(), batch=5, failed=lambda item, error: failed.append(f"{item.name} {error}")) == 9
    assert len(failed) == 1
    assert failed[0].startswith("user-7 ")
    assert len(list(store.names())) == 9


def test_listing(store: AdapterStore) -> None:
    for i, name in enumerate(["bob", "ann", "Ann", "ann-2", "zoë", "a*b", "éa"]):
        store.put(name, contents(i), tags=["all", "even" if i % 2 == 0 else "odd"])
    store.put("ann", contents(9), tags=["all"])
    order = sorted(["bob", "ann", "Ann", "ann-2", "zoë", "a*b", "éa"])
    assert [v.name for v in store.ls()] == list(store.names()) == order
    assert [(v.name, v.version) for v in store.ls("ann", versions=True)] == [("ann", 1), ("ann", 2)]
    assert [v.name for v in store.ls("ann*")] == ["ann", "ann-2"]
    assert [v.name for v in store.ls("?nn")] == ["Ann", "ann"]
    assert [v.name for v in store.ls("a[*]b")] == ["a*b"]
    assert [v.name for v in store.ls("%")] == []
    assert [v.name for v in store.ls("_nn")] == []
    assert [v.name for v in store.ls(after="ann")] == order[order.index("ann") + 1 :]
    assert [v.name for v in store.ls(after="anm", limit=2)] == ["ann", "ann-2"]
    # The newest version of "ann" has not the tag "odd", its first has.
    assert [v.name for v in store.ls(tags=["odd"])] == ["a*b", "ann-2"]
    assert [(v.name, v.version) for v in store.ls(tags=["odd", "all"], versions=True)] == [
        ("a*b", 1),
        ("ann", 1),
        ("ann-2", 1),
    ]
    assert list(store.ls(tags=["none"])) == []
    with pytest.raises(ConfigError, match="limit"):
        store.ls(limit=0)


def test_listing_goes_over_many_pages(store: AdapterStore) -> None:
    one = contents(1)
    wanted = [f"user-{i:05d}" for i in range(1203)]
    store.put_many((Item(name, one, tags=["t"]) for name in reversed(wanted)), batch=400)
    for name in wanted[400:900]:  # a page and more of nothing
        store.rm(name)
    left = wanted[:400] + wanted[900:]
    assert list(store.names()) == left
    assert [v.name for v in store.ls(tags=["t"])] == left
    assert [v.name for v in store.ls("user-009*")] == [name for name in left if name.startswith("user-009")]
    assert [r.info.name for r in store.get_many(left)] == left


def test_the_time_of_use_is_kept(store: AdapterStore, opened: Opener) -> None:
    store.put("ann", contents(1))
    store.put("bob", contents(1))
    assert store.info("ann").used is None
    store.get("ann")
    store.close()
    store = opened()
    used = store.info("ann").used
    assert used is not None
    assert abs((datetime.now(UTC) - used).total_seconds()) < 60
    assert store.info("bob").used is None
    reader = opened(read_only=True)
    reader.get("bob")
    reader.close()
    assert store.info("bob").used is None


# -- packing and bases ----------------------------------------------------------------------------------


def test_packed_records_are_small_and_close(store: AdapterStore, opened: Opener) -> None:
    given = contents(1)
    sizes = {packing: store.put(packing, given, packing=packing).size for packing in ("float32", "bfloat16", "int8")}
    assert sizes == {"float32": 64, "bfloat16": 32, "int8": 16 + 4 * 4}  # four vectors, so four scales
    for name, limit in (("bfloat16", 2.0**-8), ("int8", 0.5 / 127 * 1.0001)):
        for key, value in store.get(name).tensors().items():
            error = (value - given.tensors[key]).abs().max() / given.tensors[key].abs().max()
            assert 0 < error <= limit, (name, key)
    assert opened(namespace="n", packing="int8").put("ann", given).packing == "int8"
    assert store.stats().packed == sizes


def test_a_wrong_base_is_refused(opened: Opener) -> None:
    right, wrong = mlp(seed=0), mlp(seed=1)
    store = opened(base=right)
    put = store.put("ann", adapted())
    assert put.base == Fingerprint.of(right).sha256
    assert store.get("ann").form.base == Fingerprint.of(right)
    with pytest.raises(CheckpointError, match="'bob': the adapter is of another base model:\n  - 0.bias: other values"):
        store.put("bob", adapted(base=1))
    other = opened(base=wrong)
    for call in (lambda: other.get("ann"), lambda: list(other.get_many(["ann"]))):
        with pytest.raises(CheckpointError, match=r"'ann' \(version 1\) is of another base model"):
            call()
    assert opened().get("ann").info == put  # who does not say what the base is, is not asked
    store.put("noted", contents(1))  # not known to be of another one, so it is taken to be of this one
    with pytest.raises(CheckpointError, match="another base"):
        other.get("noted")
    assert opened(base=Fingerprint.of(right)).get("noted").info.base == put.base


def test_frozen_matrices_are_kept_once(store: AdapterStore) -> None:
    config = VeraConfig(r=4, target_modules="all-linear", generator="peft", save_projection=True)
    for seed in range(3):
        put = store.put(f"user-{seed}", adapted(seed, config))
    assert put.size == 64  # the vectors alone
    record = store.get("user-1")
    assert set(record.frozen) == {"base_model.vera_A", "base_model.vera_B"}
    assert torch.equal(PeftModel.from_pretrained(mlp(), record.file())(inputs()), adapted(1, config)(inputs()))
    for seed in range(3):
        store.rm(f"user-{seed}")
    gone = store.gc()
    assert (gone.forms, gone.bases, gone.frozen) == (1, 1, 2)


# -- upkeep ---------------------------------------------------------------------------------------------


def test_stats_count_the_namespace(store: AdapterStore, opened: Opener) -> None:
    other = opened(namespace="other")
    other.put("x", contents(1), alias="live")
    store.put("ann", contents(1), metadata={"a": 1}, tags=["t"], alias="live")
    store.put("ann", contents(2))
    store.put("bob", lora())
    stats = store.stats()
    assert (stats.names, stats.versions, stats.aliases, stats.forms) == (2, 3, 1, 2)
    lora_bytes = 4 * (2 * 6 + 5 * 2 + 2 * 5 + 3 * 2)
    assert stats.packed == {"float32": 64 + 64 + lora_bytes}
    texts = len('{"a":1}') + len("{}") * 2 + len('["t"]') + len("[]") * 2
    assert stats.metadata_bytes == len("annbob") + texts
    assert stats.payload_bytes == stats.packed["float32"] + stats.metadata_bytes
    assert stats.store_bytes > stats.payload_bytes


def test_gc_leaves_what_is_named_and_what_is_new(store: AdapterStore, opened: Opener) -> None:
    other = opened(namespace="other")
    for i in range(1, 7):
        store.put("ann", contents(i))
        other.put("ann", contents(i))
    store.alias("ann", "live", 1)
    store.alias("ann", "live", 3)  # rolls back to 1
    store.put("bob", lora())
    assert store.gc(keep=2, dry_run=True).versions == 2
    assert numbers(store) == [1, 2, 3, 4, 5, 6]
    gone = store.gc(keep=2)
    assert (gone.versions, gone.bytes, gone.forms) == (2, 128, 0)
    assert numbers(store) == [1, 3, 5, 6]
    assert numbers(other) == [1, 2, 3, 4, 5, 6]
    assert store.roll_back("live", ["ann"]) == {"ann": 1}
    assert store.gc(keep=1).versions == 1
    store.unalias("ann", "live")
    assert store.gc(keep=1).versions == 2
    assert numbers(store) == [6]
    store.rm("bob")
    assert store.gc(compact=True).forms == 1
    assert list(store.verify()) == list(other.verify()) == []
    assert seed_of(other, 2) == 2


def test_gc_can_spare_what_was_used(store: AdapterStore) -> None:
    for i in (1, 2, 3):
        store.put("ann", contents(i))
    assert store.gc(keep=1, unused_for=timedelta(hours=1)).versions == 0
    time.sleep(0.3)
    store.get("ann", 1)
    assert store.gc(keep=1, unused_for=timedelta(seconds=0.2)).versions == 1
    assert numbers(store) == [1, 3]
    with pytest.raises(ConfigError, match="give keep as well"):
        store.gc(unused_for=timedelta(days=1))
    with pytest.raises(ConfigError, match="keep"):
        store.gc(keep=0)


def tamper(url_store: AdapterStore, sql: str, values: tuple[Any, ...] = ()) -> None:
    """Change the tables behind the store's back."""
    write = url_store._write  # type: ignore[attr-defined]
    write(lambda link: link.run(sql, values))


DAMAGES = {
    "a flipped bit": ("UPDATE kilotune_payloads SET data = ? WHERE id = 1", (b"\1" * 64,), "its SHA-256 is not"),
    "cut off": ("UPDATE kilotune_payloads SET data = ? WHERE id = 1", (b"",), "its SHA-256 is not"),
    "lost numbers": ("DELETE FROM kilotune_payloads WHERE id = 1", (), "its numbers are not there"),
    "a changed form": ("UPDATE kilotune_forms SET data = ? WHERE id = 1", (b"no zlib",), "form 1 cannot be read"),
    "another hash": ("UPDATE kilotune_versions SET sha256 = ?", (b"\0" * 32,), "its SHA-256 is not"),
    "a cut base": ("UPDATE kilotune_bases SET data = ?", (b"",), "form 1 cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_by_verify_and_by_get(damage: str, store: AdapterStore, opened: Opener) -> None:
    store.put("ann", adapted(1))
    assert list(store.verify()) == []
    sql, values, text = DAMAGES[damage]
    tamper(store, sql, values)
    faults = list(store.verify())
    assert [(fault.name, fault.version) for fault in faults] == [("ann", 1)]
    assert text in faults[0].what
    assert list(store.verify(["ann"])) == faults
    with pytest.raises(CheckpointError, match=text):
        opened().get("ann")


def test_numbers_of_nobody_are_found(store: AdapterStore) -> None:
    store.put("ann", contents(1))
    tamper(store, "INSERT INTO kilotune_payloads (id, data) VALUES (77, ?)", (b"x",))
    assert [str(fault) for fault in store.verify()] == ["(the store): 1 rows of numbers belong to no version"]


def test_verify_names_what_it_was_asked_for_and_is_not_there(store: AdapterStore) -> None:
    store.put("ann", contents(1))
    (fault,) = store.verify(["ann", "bob"])
    assert fault.name == "bob"
    assert "there is no adapter 'bob'" in fault.what


# -- the same once more ---------------------------------------------------------------------------------


def test_the_first_one_stays_the_only_one(store: AdapterStore) -> None:
    """Where one thing is made twice, with numbers that a rounding tells apart."""
    first, made = store.put_once("ann", contents(1), first=True)
    assert made
    assert store.put_once("ann", contents(2), metadata={"other": 1}, first=True) == (first, False)
    assert [one.version for one in store.versions("ann")] == [1]


def test_the_same_once_more_is_the_same_version(store: AdapterStore) -> None:
    given = {"metadata": {"rows": 3}, "tags": ["b", "a"], "alias": "live"}
    first, made = store.put_once("ann", contents(1), **given)  # type: ignore[arg-type]
    assert (first.version, made) == (1, True)
    assert store.put_once("ann", contents(1), **given) == (first, False)  # type: ignore[arg-type]
    assert [info.version for info in store.versions("ann")] == [1]
    assert store.info("ann") == first
    assert store.stats().versions == 1
    second = store.put("ann", contents(1))
    assert second.version == 2, "put makes a new one, whatever there is, and no number was lost"


@pytest.mark.parametrize(
    "other",
    [
        {"adapter": contents(2)},
        {"adapter": contents(1, {**CONFIG, "vera_dropout": 0.5})},
        {"metadata": {"rows": 4}},
        {"tags": ["a", "c"]},
        {"packing": "bfloat16"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_differs_in_anything_is_another_version(store: AdapterStore, other: dict[str, Any]) -> None:
    given: dict[str, Any] = {"adapter": contents(1), "metadata": {"rows": 3}, "tags": ["a", "b"]}
    assert store.put_once("ann", **given)[1]
    info, made = store.put_once("ann", **{**given, **other})
    assert (info.version, made) == (2, True)
    info, made = store.put_once("ann", **given)
    assert (info.version, made) == (3, True), "only the newest counts"
    assert store.put_once("bob", **given)[0].version == 1, "and only of this name"


def test_the_alias_of_what_is_there_is_set_and_can_be_taken_back(store: AdapterStore) -> None:
    store.put("ann", contents(1), alias="live")
    store.put_once("ann", contents(2))
    for _ in range(2):
        assert store.put_once("ann", contents(2), alias="live") == (store.info("ann"), False)
        assert store.aliases("ann") == {"live": 2}
    assert store.roll_back("live", ["ann"]) == {"ann": 1}, "what it named before stays known"


def test_what_was_removed_or_damaged_is_put_anew(store: AdapterStore) -> None:
    store.put("ann", contents(1))
    store.rm("ann")
    assert store.put_once("ann", contents(1))[0].version == 2
    store._write(lambda link: link.run("UPDATE kilotune_payloads SET data = ?", (bytes(64),)))  # type: ignore[attr-defined]
    info, made = store.put_once("ann", contents(1))
    assert (info.version, made) == (3, True)
    assert same(store.get("ann").tensors(), dict(sorted(contents(1).tensors.items())))


# -- opening --------------------------------------------------------------------------------------------


def test_a_store_opened_read_only_changes_nothing(store: AdapterStore, opened: Opener) -> None:
    store.put("ann", contents(1), alias="live")
    store.put("ann", contents(2))
    reader = opened(read_only=True)
    assert seed_of(reader, "live") == 1
    assert list(reader.verify()) == []
    assert reader.gc(keep=1, dry_run=True).versions == 0
    for call in (
        lambda: reader.put("ann", contents(3)),
        lambda: reader.put_once("ann", contents(3)),
        lambda: reader.put_many([Item("ann", contents(3))]),
        lambda: reader.rm("ann"),
        lambda: reader.alias("ann", "live", 2),
        lambda: reader.roll_out("live", {"ann": 2}),
        lambda: reader.roll_back("live", ["ann"]),
        lambda: reader.unalias("ann", "live"),
        lambda: reader.gc(keep=1),
        lambda: reader.gc(compact=True),
    ):
        with pytest.raises(StoreError, match="read-only"):
            call()
    with pytest.raises(StoreError, match="readonly|read-only"):  # and the database itself refuses, were it asked
        reader._write(lambda link: link.run("DELETE FROM kilotune_names"))  # type: ignore[attr-defined]
    assert numbers(store) == [1, 2]
    store.put("bob", contents(4))
    assert list(reader.names()) == ["ann", "bob"]  # what others write is seen


def test_a_store_that_is_not_there_is_not_made_by_reading(opened: Opener) -> None:
    with pytest.raises(StoreError, match="there is no store"):
        opened(read_only=True)
    with pytest.raises(StoreError, match="there is no store"):
        opened(read_only=True)


def test_a_closed_store_refuses(store: AdapterStore) -> None:
    store.put("ann", contents(1))
    store.close()
    store.close()
    for call in (lambda: store.get("ann"), lambda: store.put("ann", contents(1)), lambda: list(store.ls())):
        with pytest.raises(StoreError, match="is closed"):
            call()


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    open_store(url).close()
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(StoreError, match="has format 3, this kilotune reads 2; a newer one is needed"):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "error", "text"),
    [
        ("sqlite://adapters.db", ConfigError, "expected three slashes"),
        ("sqlite:///", ConfigError, "names no file"),
        ("sqlite:///:memory:", ConfigError, "names no file"),
        ("sqlite:///a.db?mode=ro", ConfigError, "takes no options"),
        ("sqlite:///nowhere/a.db", StoreError, "there is no folder nowhere"),
        ("sqllite:///a.db", ConfigError, "Did you mean 'sqlite'"),
        ("mysql://host/x", ConfigError, "no store of the kind 'mysql'"),
        ("adapters.db", ConfigError, "write sqlite:///adapters.db"),
        ("nowhere", ConfigError, "neither a folder that is there nor the URL"),
    ],
)
def test_urls_that_are_none(
    url: str, error: type[Exception], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=text):
        open_store(url)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_stores(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database" * 100)
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE names (x)")
    connection.close()
    for name, text in (("text", "not a database"), ("other", "an SQLite file of another program")):
        before = (tmp_path / f"{name}.db").read_bytes()
        with pytest.raises(StoreError, match=text):
            open_store(f"sqlite:///{tmp_path}/{name}.db")
        assert (tmp_path / f"{name}.db").read_bytes() == before


def test_a_password_is_never_told() -> None:
    from kilotune.fleet.store.urls import _without_password

    url = "postgresql://ann:s3cret@host:5/db?sslpassword=s3cret&sslmode=require&password=s3cret"
    assert _without_password(url) == "postgresql://ann@host:5/db?sslmode=require"
    with pytest.raises(StoreError) as caught:
        open_store("postgresql://ann:s3cret@127.0.0.1:1/db", timeout=2)
    assert "s3cret" not in str(caught.value)
    assert "postgresql://ann@127.0.0.1:1/db" in str(caught.value)


def test_metadata_comes_back_as_it_was(store: AdapterStore) -> None:
    hard = {"nul": "\0", "quote": "'\"", "deep": {"a": [1, 2.5, None, True, {"b": []}]}, "größe": "𝕏", "": 1}
    store.put("ann", contents(1), metadata=hard)
    assert store.info("ann").metadata == json.loads(json.dumps(hard))


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/store.md: its Python blocks, in their order."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "store.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    base, model = mlp(), adapted(1)
    names: dict[str, Any] = {"base": base, "model": model}
    exec(compile(first, "docs/store.md", "exec"), names)
    assert torch.equal(names["tuned"](inputs()), model(inputs()))
    with open_store("sqlite:///adapters.db", base=mlp()) as store:
        for _ in range(3):
            store.put("ann", model)
        for _ in range(2):
            store.put("bob", model, alias="live")
        exec(compile(second, "docs/store.md", "exec"), {"store": store})
        assert (store.aliases("ann"), store.aliases("bob")) == ({"live": 3}, {"live": 1})
