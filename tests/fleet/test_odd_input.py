"""Hostile input to the store, to plans for many users, to joint training and to routes: one clear error each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune import AdapterError, ConfigError, MergeError, VeraConfig, get_config, get_peft_model
from kilotune._ui.sizes import parse_bytes, parse_count
from kilotune.errors import CheckpointError
from kilotune.fleet import AdapterBank, open_store, wrap
from kilotune.fleet.joint.users_from_files import text_users
from kilotune.fleet.scale import scale
from kilotune.fleet.store import export_adapters
from kilotune.fleet.store.names import PACKINGS
from tests.support.cli_helpers import error, kilotune, llama
from tests.support.models import mlp
from tests.support.store_support import adapted, contents, shake
from tests.support.train_support import model_folder, write_jsonl

# -- plans ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("lora", {"bias": "all"}),
        ("lora", {"modules_to_save": ["lm_head"]}),
        ("lora_fa", {}),
        ("loraxs", {"r": 4}),
        ("vera", {"bias": "all", "save_projection": True}),
        ("dora", {}),
        ("unilora", {}),
        ("intrinsic", {}),
    ],
    ids=str,
)
def test_a_plan_is_what_a_store_and_a_bank_take(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    def base() -> Any:
        return llama(attention_bias="bias" in options)

    config = get_config(method, target_modules=["q_proj", "v_proj"], **options)
    planned = scale(base(), config, users=3, memory=2**20)
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        model = get_peft_model(base(), config)
        taken = {packing: store.put("a", model, packing=packing).size for packing in PACKINGS}
    assert {packing: size // 3 for packing, size in planned.store.items()} == taken
    assert planned.numbers * 4 == taken["float32"]
    if "modules_to_save" in options:
        assert planned.resident is None, "no bank takes such adapters"
        return
    each = AdapterBank(wrap(base()), config, slots=1).bytes_per_adapter
    assert planned.resident == {"float32": 2**20 // each, "bfloat16": 2**20 // (each // 2)}


def test_a_plan_says_what_is_not_in_a_bank(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    head = ("--set", 'modules_to_save=["norm"]')
    words = ("plan", tmp_path, "-m", "vera", "-m", "lora", "--memory", "1MiB", *head)
    assert "not in a bank" in kilotune(*words).stdout
    assert json.loads(kilotune(*words, "--json").stdout)["plans"][0]["scale"]["resident"] is None


def test_counts_and_sizes_that_mean_something_else() -> None:
    for text in ("1,5", "1_0", "1,0000", ",100", "1,,000"):
        with pytest.raises(ConfigError, match="users: expected a whole number"):
            parse_count(text, "users")
    assert parse_count("1,000,000", "users") == parse_count("1_000_000", "users") == 10**6
    with pytest.raises(ConfigError, match="more than any machine has"):
        parse_bytes("9" * 400, "memory")


# -- the store ------------------------------------------------------------------------------------------


def test_urls_of_nothing() -> None:
    for url in ("", "file://", 5):
        with pytest.raises(ConfigError, match="names no store"):
            open_store(url)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        open_store("postgresql://u:secret@[::1/x")
    assert "secret" not in str(caught.value)


def test_a_scheme_in_capitals(tmp_path: Path) -> None:
    with open_store(f"SQLITE:///{tmp_path}/a.db") as store:
        store.put("ann", contents(0))
    assert (tmp_path / "a.db").is_file()


def test_numbers_that_are_too_large(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    adapted().save_pretrained(tmp_path / "in" / "ann")
    deep = "x=" + "[" * 100_000
    assert kilotune("store", "put", url, "ann", tmp_path / "in" / "ann", "--metadata", deep).exit_code == 2  # too long
    assert kilotune("store", "put", url, "ann", tmp_path / "in" / "ann").exit_code == 0
    for place in (url, tmp_path / "in"):
        assert kilotune("store", "ls", place, "--limit", 2**70).exit_code == 0
        with open_store(place) as store, pytest.raises(ConfigError, match="limit: expected a whole number from 1"):
            store.ls(limit=-1)
        with open_store(place) as store, pytest.raises(AdapterError, match="must not be a path"):
            store.ls(after="../")
    for days in ("inf", "1e12"):
        assert "number of days below" in error("store", "gc", url, "--keep", 1, "--unused-days", days)


def test_an_export_to_a_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        for name in ("ann", "bob"):
            store.put(name, contents(0))
        with pytest.raises(ConfigError, match="it is a file"):
            export_adapters(store, tmp_path / "out")


@pytest.mark.parametrize("bad", ["a\x7f", "a\x9b31m"])
def test_what_steers_a_terminal_is_no_name(bad: str, tmp_path: Path) -> None:
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        with pytest.raises(AdapterError, match="no control characters"):
            store.put(bad, contents(0))
        with pytest.raises(AdapterError, match="no control characters"):
            store.put("ann", contents(0), tags=[bad])
        with pytest.raises(AdapterError, match="no control characters"):
            list(store.names(bad))


# -- users from files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["  ", [1], {"a": 1}, True, 1.5], ids=str)
def test_what_names_no_user(user: object, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"user": "ann", "text": "a b"}, {"user": user, "text": "a b"}])
    with pytest.raises(ConfigError, match=r"1 rows name no user in 'user'; the first is .*rows\.jsonl:2"):
        text_users(str(model_folder("llama")), data, user_column="user")


def test_numbers_may_name_users(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"user": user, "text": "a b"} for user in (7, "7", "ann")])
    assert len(text_users(str(model_folder("llama")), data, user_column="user")) == 2


def test_a_column_that_nobody_has_is_one_error(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"user": "ann", "body": "a b"}])
    with pytest.raises(ConfigError, match="has no column 'bodi'. Did you mean 'body'?"):
        text_users(str(model_folder("llama")), data, user_column="user", columns={"text": "bodi"})


def test_two_files_for_one_user(tmp_path: Path) -> None:
    for name in ("ann.jsonl", "ann.json", "bob.jsonl"):
        write_jsonl(tmp_path / name, [{"text": "a b"}])
    with pytest.raises(ConfigError, match=r"'ann': ann\.json, ann\.jsonl"):
        text_users(str(model_folder("llama")), tmp_path)


def test_a_users_name_is_one_in_both_forms_of_its_letters(tmp_path: Path) -> None:
    """Some systems split the letters of files' names; stores keep them in NFC."""
    split, whole = "Jose\u0301", "Jos\u00e9"
    data = write_jsonl(tmp_path / "rows.jsonl", [{"user": user, "text": "a b"} for user in (split, whole)])
    (user,) = text_users(str(model_folder("llama")), data, user_column="user")
    assert (user.name, len(user.data)) == (whole, 2)
    folder = tmp_path / "users"
    folder.mkdir()
    write_jsonl(folder / f"{split}.jsonl", [{"text": "a b"}])
    assert [user.name for user in text_users(str(model_folder("llama")), folder)] == [whole]
    write_jsonl(folder / f"{whole}.jsonl", [{"text": "a b"}])
    with pytest.raises(ConfigError, match="several files for one user"):
        text_users(str(model_folder("llama")), folder)


# -- routes ---------------------------------------------------------------------------------------------


def two() -> Any:
    model = adapted(0)
    model.add_adapter("bob", VeraConfig(r=4, target_modules="all-linear"))
    shake(model, 3)
    return model.eval()


@pytest.mark.parametrize("names", [["default", "bob", None], ["bob"], [None] * 7], ids=str)
def test_too_few_names_are_no_names_for_several_rows(names: list[str | None]) -> None:
    with pytest.raises(AdapterError, match=rf"for each of 6 rows, got {len(names)}"):
        two()(torch.randn(6, 6), adapter_names=names)


@pytest.mark.parametrize("lengths", [5, {0: 3}, iter([3])], ids=["number", "mapping", "iterator"])
def test_lengths_that_are_no_list(lengths: Any) -> None:
    with pytest.raises(AdapterError, match="lengths: expected a list"), two().route(["bob"], lengths=lengths):
        pass


def test_what_a_route_runs_stays() -> None:
    """Else it would go on with the base alone, or with an adapter twice."""
    model, x = two(), torch.randn(2, 6)
    expected = model(x, adapter_names=["default", "bob"])
    with model.route(["default", "bob"]):
        for change in (lambda: model.delete_adapter("bob"), model.merge_adapter, model.unload):
            with pytest.raises((AdapterError, MergeError), match="while a route is open"):
                change()
        assert torch.equal(model(x), expected)
    with model.route(["default", None]):
        model.delete_adapter("bob")
    assert list(model.peft_config) == ["default"]
    model.merge_adapter()


def test_a_bank_stays_open_under_its_route() -> None:
    bank = AdapterBank(wrap(mlp()), VeraConfig(r=4, target_modules="all-linear"), slots=1)
    bank.put("ann", {place.name: torch.randn(place.shape) for place in bank.form.all_places()})
    with bank.model.route(["ann"]), pytest.raises(AdapterError, match="a route that runs this bank's adapters is open"):
        bank.close()
    bank.close()


def test_tensors_that_are_no_plain_numbers() -> None:
    bank = AdapterBank(wrap(mlp()), VeraConfig(r=4, target_modules="all-linear"), slots=1)
    tensors = {place.name: torch.ones(place.shape) for place in bank.form.all_places()}
    first = next(iter(tensors))
    for bad, what in (
        (tensors[first].to_sparse(), "sparse"),
        (torch.nested.nested_tensor([tensors[first]], layout=torch.jagged), "nested"),
    ):
        with pytest.raises(
            CheckpointError, match=rf"{first}: expected a tensor of real numbers, got one that is {what}"
        ):
            bank.put("ann", {**tensors, first: bad})
    bank.put("ann", {**tensors, first: tensors[first].to(torch.float8_e4m3fn)})
    assert torch.equal(bank.get("ann")[first], tensors[first])
    with pytest.raises(AdapterError, match="no adapter None"):
        bank.evict(None)  # type: ignore[arg-type]
