"""docs/data.md against the code: the table of tasks, its example rows, its preview."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from kilotune.errors import ConfigError
from kilotune.train import metrics
from kilotune.train.data.readers import FORMATS
from kilotune.train.data.splits import load_splits
from kilotune.train.settings.data_names import ROLES
from kilotune.train.settings.sections import TASK_NAMES
from kilotune.train.tasks import TASKS, Limits
from tests.support.paths import ROOT
from tests.support.train_data import byte_level, jsonl, settings
from tests.train.data.test_rendering import CHATML

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    text = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_tasks_of_the_settings_the_code_and_the_page_are_the_same() -> None:
    assert set(TASKS) == set(TASK_NAMES)
    assert [row[0].strip("`") for row in table("Tasks")] == [
        "causal-lm",
        "text-classification",
        "regression",
        "token-classification",
        "image-classification",
        "seq2seq",
    ]
    assert set(TASKS) == {row[0].strip("`") for row in table("Tasks")}
    known = {role.rstrip("?") for task in TASKS.values() for group in task.roles for role in group}
    assert known == set(ROLES)


def test_the_columns_of_the_page_are_those_of_the_tasks() -> None:
    for name, columns, *_ in table("Tasks"):
        groups = tuple(
            tuple(re.findall(r"`(\w+)`", part)[i] + mark for i, mark in enumerate(re.findall(r"`\w+`(\??)", part)))
            for part in columns.split("; or ")
        )
        assert groups == TASKS[name.strip("`")].roles


def test_the_scores_of_the_page_are_those_of_the_functions() -> None:
    some = np.array([0, 1, 1])
    found = {
        "causal-lm": metrics.language(np.ones((1, 3))),
        "text-classification": metrics.classification(some, some, 2),
        "regression": metrics.regression(some, some),
        "token-classification": {
            **metrics.tagging(some[None], some[None], ("O", "B-X")),
            **metrics.tagging(some[None], some[None], ("a", "b")),
        },
        "image-classification": metrics.classification(some, some, 2),
        "seq2seq": {**metrics.language(np.ones((1, 3))), **metrics.generation(["a"], ["a"])},
    }
    for name, _, scores, _ in table("Tasks"):
        words = set(re.findall(r"[a-z0-9_]+", scores))
        assert words - {"two", "classes", "of", "entities", "else", "what", "is", "written"} == set(
            found[name.strip("`")]
        ), name


def test_every_example_row_is_taken_by_a_task(tmp_path: Path) -> None:
    lines = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL).group(1).splitlines()  # type: ignore[union-attr]
    taken: set[str] = set()
    for line in lines:
        path = jsonl(tmp_path / "row.jsonl", [json.loads(line)])
        fits = set()
        for name, task in TASKS.items():
            try:
                load_splits(settings(train=path), task.roles, name, 0)
            except ConfigError:
                continue
            fits.add(name)
        assert fits, line
        taken |= fits
    assert taken == set(TASKS)


def test_the_formats_of_the_page_are_those_of_the_reader() -> None:
    assert {row[0].strip("`") for row in table("Files")} == {*FORMATS, "hub"}


def test_the_preview_of_the_page_is_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the numbers of tokens, which are the tokenizer's."""
    shown = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL).group(1)  # type: ignore[union-attr]
    first = re.search(r"```json\n(.*?)\n", PAGE, re.DOTALL).group(1)  # type: ignore[union-attr]
    monkeypatch.chdir(tmp_path)
    jsonl(Path("chats.jsonl"), [json.loads(first)])
    tokenizer = byte_level(chat_template=CHATML)
    made = TASKS["causal-lm"]().prepare(settings(train="chats.jsonl"), tokenizer, Limits(), 0).preview
    numbers = re.compile(r"\d+(?= tokens| in the loss)")
    assert numbers.sub("n", made).strip() == numbers.sub("n", shown).strip()
