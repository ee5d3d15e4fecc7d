"""What the demo claims of its losses, by losses that were made up, and the page that shows them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest

from kilotune.experiments.people.measuring import BASE
from kilotune.experiments.people.page import page, write_report
from kilotune.experiments.people.results import PeopleResult
from kilotune.experiments.people.training import SHARED
from tests.support.people_support import NAMES, result


def failing(found: PeopleResult) -> list[str]:
    return [check.name.split()[0] + " " + check.name.split()[1] for check in found.failures]


def changed(found: PeopleResult, adapter: str, text: str, loss: float) -> PeopleResult:
    return replace(found, losses={**found.losses, adapter: {**found.losses[adapter], text: loss}})


def test_good_losses_pass_every_check() -> None:
    found = result()
    assert failing(found) == []
    assert all(found.best(name) for name in NAMES)


@pytest.mark.parametrize("adapter", [BASE, SHARED, "h"])
def test_own_must_be_least_for_seven_of_eight(adapter: str) -> None:
    found = changed(result(), adapter, "a", result().own("a"))  # no worse than one's own
    assert not found.best("a")
    assert "one's own" not in failing(found)  # seven are left
    assert "one's own" in failing(changed(found, adapter, "b", 0.5))


def test_the_gain_is_held_against_its_standard_error() -> None:
    found = result()
    for name, loss in zip(NAMES, (2.9, 3.1) * 4):
        found = changed(found, name, name, loss)  # gains of +-0.1
    assert "the mean" in failing(found)
    gains = [3.0 - 2.0 - 0.01 * n for n in range(8)]
    mean = sum(gains) / 8
    error = sqrt(sum((gain - mean) ** 2 for gain in gains) / 7 / 8)
    (check,) = (check for check in result().checks if check.name.startswith("the mean"))
    assert check.detail == f"{mean:.3f} nats a token, standard error {error:.3f}"


def test_other_claims_fail_where_they_do_not_hold() -> None:
    assert failing(changed(result(), SHARED, "c", 5.0)) == ["the shared"]
    assert failing(replace(result(), alone=0.01)) == ["a row"]
    assert failing(replace(result(), faults=("a is damaged",))) == ["the store"]


def test_the_table_has_means_and_costs() -> None:
    rows = {row.name: row for row in result().rows}
    assert [round(row.loss, 3) for row in rows.values()] == [5.0, 3.0, 2.035, 3.2]
    own = rows["a personal one on top"]
    assert (own.least, own.most, own.bytes, own.seconds) == (2.0, 2.07, 40, 1.0)


def test_the_page_says_what_was_measured() -> None:
    text = page(result())
    assert "all 5 checks passed" in text
    for part in (
        "best of all\nfor 8 of 8",
        "Title a",
        "Author of h",
        "a says",
        "h wrote",
        "0.97",
        "40 MB",
        "VeRA of rank 64",
    ):
        assert part in text, part
    assert text.count("data:image/svg+xml;base64,") == 4
    assert "a &lt;source&gt;" in text
    assert "what &lt;is&gt; it?" in text
    assert "<source>" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)


def test_a_failed_run_and_people_without_gain_are_told() -> None:
    lost = replace(result().people[0], bytes=0)
    found = replace(result(own=3.5), people=(lost, *result().people[1:]))
    text = page(found)
    assert "checks FAILED" in text
    assert "Nothing was kept for Title a:" in text


def test_the_same_result_gives_the_same_files(tmp_path: Path) -> None:
    files = write_report(result(), tmp_path / "one")
    assert [file.name for file in files] == ["results.json", "report.html"]
    again = write_report(result(), tmp_path / "two")
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    told = json.loads(files[0].read_text())
    assert told["passed"] is True
    assert told["losses"]["a"]["a"] == 2.0
