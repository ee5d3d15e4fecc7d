"""``kilotune fleet train``: users from a file or a folder, adapters into a folder or a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune.fleet import open_store
from tests.support.cli_helpers import as_json, error, kilotune
from tests.support.train_support import model_folder, sentence, write_jsonl

QUICK = ["--set", "epochs=1", "--set", "batch_size=2", "--option", "r=4", "--progress", "quiet"]


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder("llama")


def rows(user: str, first: int, count: int = 4) -> list[dict[str, Any]]:
    return [{"user": user, "text": sentence(first + i)} for i in range(count)]


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    """Rows of three users, mixed; bob's second is broken."""
    mixed = [row for three in zip(rows("ann", 0), rows("bob", 10), rows("cy", 20)) for row in three]
    mixed[4]["text"] = 7
    return write_jsonl(tmp_path / "rows.jsonl", mixed)


def test_it_says_by_which_rate_it_trains(model: Path, one_file: Path, tmp_path: Path) -> None:
    words = ["fleet", "train", "-m", model, "-d", one_file, "--user-column", "user", *QUICK[:-2]]
    assert "learning rate: by the rule for vera, 0.08 for 100 steps" in kilotune(*words, "-o", tmp_path / "a").stderr
    given = kilotune(*words, "-o", tmp_path / "b", "--set", "learning_rate=0.01")
    assert "learning rate" not in given.stderr


def test_one_file_into_a_store(model: Path, one_file: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    done = kilotune("fleet", "train", "-m", model, "-d", one_file, "--user-column", "user", "--store", url,
                    "--alias", "live", "--state", tmp_path / "state", *QUICK, "--json")  # fmt: skip
    assert done.exit_code == 1, done.output
    report = json.loads(done.stdout)
    told = {user["name"]: user for user in report["users"]}
    assert {name: user["ended"] for name, user in told.items()} == {"ann": "done", "bob": "failed", "cy": "done"}
    assert f"{one_file}:5" in told["bob"]["error"], "the line of the user's own file"
    assert told["ann"]["steps"] == 2
    with open_store(url, read_only=True) as store:
        assert [version.name for version in store.ls()] == ["ann", "cy"]
        assert store.aliases("ann") == {"live": 1}
    again = kilotune("fleet", "train", "-m", model, "-d", one_file, "--user-column", "user", "--store", url,
                     "--alias", "live", "--state", tmp_path / "state", "--resume", *QUICK, "--json")  # fmt: skip
    assert len(json.loads(again.stdout)["users"]) == 3
    with open_store(url, read_only=True) as store:
        assert len(store.versions("ann")) == 1, "trained twice"


def test_a_folder_of_files_into_a_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for user, first in (("ann", 0), ("bob", 30)):
        write_jsonl(tmp_path / "data" / f"{user}.jsonl", [{"text": row["text"]} for row in rows(user, first, 6)])
    more = ["--validation-fraction", "0.3", "--set", "learning_rate=0.01", "--max-length", "16"]
    more += ["--set", "only_gains=false"]
    found = as_json("fleet", "train", "-m", model, "-d", tmp_path / "data", "-o", tmp_path / "out", *QUICK, *more)
    assert [len(user["validation"]) for user in found["users"]] == [1, 1]
    config = json.loads((tmp_path / "out" / "bob" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["task_type"] == "CAUSAL_LM"


def test_progress_and_the_table(model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows("ann", 0), *rows("bob", 9)])
    words = ["fleet", "train", "-m", model, "-d", data, "--user-column", "user", "-o", tmp_path / "out", *QUICK[:6]]
    plain = kilotune(*words)
    assert plain.exit_code == 0, plain.output
    assert "0 of 2 users done, 2 in training; step 1, mean loss" in plain.stderr
    assert "done" in plain.stdout
    lines = kilotune(*words, "--progress", "json")
    first = json.loads(lines.stdout.splitlines()[0])
    assert first["event"] == "step"
    assert set(first["losses"]) == {"ann", "bob"}
    assert first["rows"] == 4


def test_what_is_wrong_is_said(model: Path, one_file: Path, tmp_path: Path) -> None:
    start = ["fleet", "train", "-m", model, "-d", one_file]
    out = ["-o", tmp_path / "out"]
    assert "give --output FOLDER or --store URL" in error(*start)
    assert "say which of its columns names the user" in error(*start, *out)
    assert "Did you mean 'user'?" in error(*start, *out, "--user-column", "users")
    assert "Did you mean 'epochs'?" in error(*start, *out, "--set", "epoch=2")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "holds no rows" in error("fleet", "train", "-m", model, "-d", empty, *out, "--user-column", "user")
    assert "expected KEY=VALUE" in error(*start, *out, "--set", "epochs")
    assert "are of a store" in error(*start, *out, "--alias", "live")
    assert "is not there" in error("fleet", "train", "-m", model, "-d", tmp_path / "rows.json", *out)
    assert "expected one of plain, json, quiet" in error(*start, *out, "--progress", "bars")


def test_personal_on_a_shared_one_by_its_name_and_by_its_folder(model: Path, tmp_path: Path) -> None:
    """Trained on everybody's rows, put into the store; then each user's own on top of it, and started from it."""
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows("ann", 0, 6), *rows("bob", 9, 6)])
    everybody = write_jsonl(tmp_path / "all.jsonl", [{**row, "user": "house-style"} for row in rows("", 0, 8)])
    url = f"sqlite:///{tmp_path / 'a.db'}"
    words = [
        "fleet",
        "train",
        "-m",
        model,
        "--user-column",
        "user",
        "--store",
        url,
        *QUICK,
        "--set",
        "learning_rate=0.05",
    ]
    for seed in (0, 1):  # two versions, of which the older one is taken
        assert kilotune(*words, "-d", everybody, "--set", f"seed={seed}").exit_code == 0
    kept = ["--validation-fraction", "0.34", "--set", "only_gains=false"]
    found = as_json(*words, "-d", data, "--on", "house-style/1", *kept)
    assert {user["name"]: user["ended"] for user in found["users"]} == {"ann": "done", "bob": "done"}
    assert all(user["without"] > 0 and user["with_own"] > 0 for user in found["users"])
    with open_store(url, read_only=True) as store:
        stands = store.get("ann").info.metadata["stands_on"]
        assert (stands["name"], stands["version"], len(stands["sha256"])) == ("house-style", 1, 64)
        store.get("house-style", 1).save(tmp_path / "folder")
    again = kilotune(*words, "-d", data, "--on", tmp_path / "folder", "--start", "ann", "--set", "learning_rate=1e-12")
    assert again.exit_code == 0, again.output
    with open_store(url, read_only=True) as store:
        newest = store.get("bob")
        assert newest.info.metadata["stands_on"] == {**stands, "name": "folder", "version": None}
        torch.testing.assert_close(newest.vector(), store.get("ann", 1).vector())


def test_nothing_is_kept_where_it_is_no_gain(model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows("ann", 0, 6), *rows("bob", 9, 6)])
    words = ["fleet", "train", "-m", model, "-d", data, "--user-column", "user", "-o", tmp_path / "out", *QUICK]
    done = kilotune(*words, "--validation-fraction", "0.34", "--set", "learning_rate=1e-30")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out").exists()
    assert "nothing kept: no gain" in done.stdout
    assert "validation loss without their own, mean" in done.stdout
    assert "ann" in done.stdout
    assert "loss without" in done.stdout


def test_what_on_and_start_cannot_name(tmp_path: Path) -> None:
    """It is said before a model is loaded."""
    (tmp_path / "no-model").mkdir()
    (tmp_path / "no-model" / "config.json").write_text("{}")
    words = ["fleet", "train", "-m", tmp_path / "no-model", "-d", tmp_path / "rows.jsonl", "--user-column", "user"]
    assert "--on: there is no folder 'house'; names are of a store" in error(
        *words, "-o", tmp_path / "out", "--on", "house"
    )
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with open_store(url):
        pass
    told = error(*words, "--store", url, "--start", "house")
    assert "start: 'house' is no folder, and in the store:" in told
