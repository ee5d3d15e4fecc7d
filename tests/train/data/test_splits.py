"""Roles of columns, values that do not fit them, and rows held out of train."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilotune.errors import ConfigError
from kilotune.train.data import columns
from kilotune.train.data.readers import read
from kilotune.train.data.splits import Part, load_splits, shown
from tests.support.train_data import jsonl, settings

LM = (("messages",), ("prompt", "completion"), ("text",))
PAIRS = (("text", "text_pair?", "label"),)


def split(groups: Any, seed: int = 0, stratify: bool = False, task: str = "some-task", **data: Any) -> dict[str, Part]:
    return load_splits(settings(**data), groups, task, seed, stratify)


def fault(*args: Any, **data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        split(*args, **data)
    return str(caught.value)


def numbers(part: Part, column: str = "n") -> list[int]:
    return list(part.table.values(column))


@pytest.fixture
def hundred(tmp_path: Path) -> str:
    """100 rows: 90 of class a, 9 of b, 1 of c."""
    labels = ["a"] * 90 + ["b"] * 9 + ["c"]
    return jsonl(tmp_path / "rows.jsonl", [{"text": f"t{i}", "label": labels[i], "n": i} for i in range(100)])


# -- columns -------------------------------------------------------------------------------------------


def roles(tmp_path: Path, names: list[str], groups: Any, **given: str) -> dict[str, str]:
    path = jsonl(tmp_path / "rows.jsonl", [dict.fromkeys(names, "x")])
    return columns.resolve(read(path), given, groups, "causal-lm", "data.train")


def test_columns_of_a_role_s_own_name_need_no_telling(tmp_path: Path) -> None:
    assert roles(tmp_path, ["text", "id"], LM) == {"text": "text"}
    assert roles(tmp_path, ["prompt", "completion"], LM) == {"prompt": "prompt", "completion": "completion"}
    assert roles(tmp_path, ["text", "label"], PAIRS) == {"text": "text", "label": "label"}
    assert roles(tmp_path, ["label", "text_pair", "text"], PAIRS) == {
        "text": "text",
        "text_pair": "text_pair",
        "label": "label",
    }


def test_a_mapping_names_other_columns_and_decides_between_groups(tmp_path: Path) -> None:
    names = ["question", "text", "completion"]
    assert roles(tmp_path, names, LM, prompt="question") == {"prompt": "question", "completion": "completion"}
    assert roles(tmp_path, ["prompt", "completion", "text"], LM, text="text") == {"text": "text"}
    assert roles(tmp_path, ["premise", "hypothesis", "label"], PAIRS, text="premise", text_pair="hypothesis") == {
        "text": "premise",
        "text_pair": "hypothesis",
        "label": "label",
    }


def test_columns_of_two_groups_are_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"say which, by data.columns: \{prompt: prompt, completion: completion\}; or \{text"
    ):
        roles(tmp_path, ["prompt", "completion", "text"], LM)


def test_a_missing_column_names_those_there_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        roles(tmp_path, ["instruction", "output", "id"], LM)
    assert str(caught.value) == (
        "data.train: task 'causal-lm' needs the columns messages, or prompt and completion, or text, got "
        "'instruction', 'output', 'id'. If these are they: data.columns: {prompt: instruction, completion: output}"
    )
    with pytest.raises(ConfigError, match=r"got 'txt', 'label'. If these are they: data.columns: \{text: txt\}"):
        roles(tmp_path, ["txt", "label"], PAIRS)
    with pytest.raises(ConfigError) as caught:
        roles(tmp_path, ["question", "answer"], LM, prompt="qestion", target="answer", completion="nothing")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "data.columns.target: task 'causal-lm' has no such role" in lines[1]
    assert "has no column 'qestion'. Did you mean 'question'? It has: 'question', 'answer'" in lines[2]
    assert "has no column 'nothing'. It has" in lines[3]


def test_splits_must_have_the_same_roles(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", [{"text": "a", "text_pair": "b", "label": "c"}])
    test = jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": "c"}])
    assert "data.test has text, label, and data.train has text, text_pair, label" in fault(
        PAIRS, train=train, test=test
    )


# -- values --------------------------------------------------------------------------------------------


def values(tmp_path: Path, read_them: Any, held: list[Any]) -> tuple[list[Any], list[str]]:
    path = jsonl(tmp_path / "rows.jsonl", [{} if value is ... else {"v": value} for value in held])
    faults: list[str] = []
    found = read_them(read(path), "v", faults)
    return found, [line.removeprefix(path) for line in faults]


def test_values_are_checked_and_named_by_line(tmp_path: Path) -> None:
    found, faults = values(tmp_path, columns.texts, ["a", None, 5, "", ...])
    assert found == ["a", None, None, "", None]
    assert faults == [":2: 'v' is missing", ":3: 'v' is 5, and should be text", ":5: 'v' is missing"]
    found, faults = values(tmp_path, columns.numbers, [1, "2.5", -3.5, True, "x", float("nan"), float("inf")])
    assert found[:3] == [1.0, 2.5, -3.5]
    assert [line.split(":")[1] for line in faults] == ["4", "5", "6", "7"]
    assert faults[0] == ":4: 'v' is True, and should be a finite number"
    found, faults = values(tmp_path, columns.labels, ["a", 3, 2.0, True, "", 1.5, [1]])
    assert found[:4] == ["a", "3", "2", "True"]
    assert [line.split(":")[1] for line in faults] == ["5", "6", "7"]
    found, faults = values(tmp_path, columns.words, [["a", "b"], [], "a b", [1], ["a", None]])
    assert found[:2] == [["a", "b"], []]
    assert found[3] == ["1"]
    assert faults == [
        ":3: 'v' is 'a b', and should be a list of words",
        ":5: 'v' has an item 2 that is None, and should be a class: text or a whole number",
    ]


def test_messages_are_checked(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "tool_calls": [{"f": 1}]}]
    held = [good, [], "x", [{"from": "human", "value": "a"}], [{"role": "user"}], [good[0], "x"]]
    found, faults = values(tmp_path, columns.chats, held)
    assert found[0] == [{"role": "user", "content": "a"}, good[1]]
    assert faults[0] == ":2: 'v' is empty, and should be a list of messages"
    assert faults[1] == ":3: 'v' is 'x', and should be a list of messages"
    assert (
        "item 1 that is {'from': 'human', 'value': 'a'} (keys: from, value), and should be an object with" in faults[2]
    )
    assert "item 1 that is {'role': 'user'}, and has no 'content'" in faults[3]
    assert "item 2 that is 'x'" in faults[4]


def test_class_numbers_of_a_data_set_become_names(tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"one": names, "many": datasets.List(names)})
    rows = datasets.Dataset.from_dict({"one": [1, 0], "many": [[1, 1], [0]]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    table = read(str(tmp_path / "rows.parquet"))
    faults: list[str] = []
    assert columns.labels(table, "one", faults) == ["yes", "no"]
    assert columns.words(table, "many", faults) == [["yes", "yes"], ["no"]]
    assert faults == []


# -- holding out ---------------------------------------------------------------------------------------


def test_held_out_rows_are_apart_in_order_and_decided_by_the_seed(hundred: str) -> None:
    parts = split(PAIRS, train=hundred, validation_fraction=0.2, test_fraction=0.1)
    found = {name: numbers(part) for name, part in parts.items()}
    assert {name: len(rows) for name, rows in found.items()} == {"train": 70, "validation": 20, "test": 10}
    assert sorted(row for rows in found.values() for row in rows) == list(range(100))
    assert all(rows == sorted(rows) for rows in found.values())
    again = split(PAIRS, train=hundred, validation_fraction=0.2, test_fraction=0.1)
    other = split(PAIRS, seed=1, train=hundred, validation_fraction=0.2, test_fraction=0.1)
    assert {name: numbers(part) for name, part in again.items()} == found
    assert numbers(other["test"]) != found["test"]
    row = parts["validation"].table
    assert row.places[3] == f"{hundred}:{row.rows[3]['n'] + 1}"  # a fault in it is still found in the file


@pytest.mark.parametrize("seed", range(5))
def test_stratified_splits_keep_shares_and_no_class_leaves_train(hundred: str, seed: int) -> None:
    parts = split(PAIRS, seed, True, train=hundred, validation_fraction=0.3, test_fraction=0.3)
    counts = {name: Counter(part.table.values("label")) for name, part in parts.items()}
    assert {name: sum(count.values()) for name, count in counts.items()} == {"train": 40, "validation": 30, "test": 30}
    assert counts["train"]["c"] == 1
    assert counts["train"]["b"] >= 1
    for name in ("validation", "test"):
        assert abs(counts[name]["a"] - 0.3 * 90) <= 1.5
        assert abs(counts[name]["b"] - 0.3 * 9) <= 1.5


@pytest.mark.parametrize("seed", range(5))
def test_classes_of_one_row_stay_in_train(tmp_path: Path, seed: int) -> None:
    labels = [f"{i:02}" for i in range(40)] + [f"{i:02}" for i in range(20)]
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": label} for label in labels])
    parts = split(PAIRS, seed, True, train=path, validation_fraction=0.2, test_fraction=0.1)
    assert {name: len(part) for name, part in parts.items()} == {"train": 42, "validation": 12, "test": 6}
    assert set(parts["train"].table.values("label")) == set(labels)


def test_which_rows_are_held_out_is_not_decided_by_their_order(hundred: str) -> None:
    """Each row is held out about as often as another, over many seeds."""
    held = np.zeros(100)
    for seed in range(200):
        held[numbers(split((("text",),), seed, train=hundred, validation_fraction=0.25)["validation"])] += 1
    assert abs(held.mean() - 50) < 1e-9
    assert held.min() > 50 - 5 * np.sqrt(200 * 0.25 * 0.75)
    assert held.max() < 50 + 5 * np.sqrt(200 * 0.25 * 0.75)


def test_a_limit_takes_the_first_rows_of_train_before_any_are_held_out(hundred: str) -> None:
    parts = split(PAIRS, train=hundred, limit=10, validation_fraction=0.2, test=hundred)
    assert sorted(numbers(parts["train"]) + numbers(parts["validation"])) == list(range(10))
    assert len(parts["validation"]) == 2
    assert len(parts["test"]) == 100


def test_too_few_rows_to_hold_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "one.jsonl", [{"text": "a", "label": "b"}])
    assert re.search("1 rows, too few to hold out 1 for validation", fault(PAIRS, train=path, validation_fraction=0.1))
    assert re.search("1 rows, too few to hold out", fault(PAIRS, 0, True, train=path, validation_fraction=0.1))


def test_splits_without_train_have_an_empty_one(hundred: str) -> None:
    parts = split(PAIRS, test=hundred)
    assert list(parts) == ["train", "test"]
    assert len(parts["train"]) == 0
    assert shown(parts).name == "test"


# -- what is wrong -------------------------------------------------------------------------------------


def test_the_faults_of_all_splits_come_together(tmp_path: Path, hundred: str) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    text = fault(PAIRS, train=str(tmp_path / "none.jsonl"), validation=str(empty), test=hundred, subset="x")
    first, second, third = text.splitlines()[1:]
    assert first == "  - data.subset: has no effect without a data set of the hub (hub:NAME)"
    assert second.startswith(f"  - {tmp_path}/none.jsonl: there is no such file")
    assert third == f"  - data.validation: {empty} has no rows"


def test_no_data_and_options_without_effect(hundred: str) -> None:
    assert "data.train: no data is given; set a file, a folder or hub:NAME" in fault(PAIRS)
    assert "data.splits: has no effect without" in fault(PAIRS, train=hundred, splits={"train": "x"})
    text = fault(PAIRS, test=hundred, validation_fraction=0.1)
    assert "data.validation_fraction: there is no data.train to hold rows out of" in text


def test_splits_of_a_hub_data_set_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, n in (("train", 1), ("test", 2)):
        jsonl(folder / f"{name}.jsonl", [{"text": name, "label": "x"}] * n)
    source = f"hub:{folder}"
    parts = split(PAIRS, train=source, splits={"validation": "test"})
    assert {name: len(part) for name, part in parts.items()} == {"train": 1, "validation": 2}
    parts = split(PAIRS, train=source, test=source)
    assert {name: len(part) for name, part in parts.items()} == {"train": 1, "test": 2}
    text = fault(PAIRS, train=source, splits={"validation": "test"}, validation_fraction=0.5)
    assert "data.validation_fraction: has no effect beside data.splits.validation" in text
