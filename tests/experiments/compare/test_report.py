"""What a comparison writes: tables, the Pareto front, pictures and the page."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from xml.etree import ElementTree

import pytest
from matplotlib.text import Text

from kilotune.experiments.compare.costs import Costs
from kilotune.experiments.compare.pictures import PICTURES, draw
from kilotune.experiments.compare.problem import Contender
from kilotune.experiments.compare.report import write_comparison
from kilotune.experiments.compare.results import Comparison, Row
from kilotune.experiments.compare.search import Found, Search
from kilotune.experiments.compare.trials import SEARCH, TEST, Trial, TrialKey

SEARCHED = Search(points=3, rounds=2, spare=1)


def row(
    name: str, scores: Sequence[float | None], size: int = 1000, edge: str | None = None, rate: float | None = 0.1
) -> Row:
    """A row of these test scores; None is a seed that diverged."""
    contender = Contender(name, "lora", {"r": 2})
    tests = tuple(
        Trial(TrialKey(TEST, name, 0.1, 1.0, seed), {} if s is None else {"validation": s, "loss": 1.0, "test": s}, 2.0)
        for seed, s in enumerate(scores)
    )
    searched = tuple(
        Trial(TrialKey(SEARCH, name, r, b, 1000), {"validation": 0.4 + r, "loss": 1.0}, 1.0)
        for r, b in ((0.01, 0.5), (0.1, 0.5), (0.1, 1.0), (0.3, 1.0))
    )
    return Row(contender, Costs(10, size, 1.25, 0.01, 2_000_000), Found(rate, edge, ()), searched, tests)


def comparison(*rows: Row, percent: bool = True, larger: bool = True, title: str = "A < B & C") -> Comparison:
    return Comparison(
        title=title,
        metric="accuracy" if percent else "perplexity",
        percent=percent,
        larger_is_better=larger,
        settings={"problem": "toy", "data": {"rows": 3}},
        search={**SEARCHED.to_dict(), "budget": SEARCHED.budget},
        steps=100,
        seeds=(0, 1),
        start=(0.1, 0.2),
        rows=rows,
        reused=0,
        seconds=1.0,
    )


GOOD, SMALL, WORSE = row("good", [0.9, 0.8], 5000), row("small", [0.7, 0.6], 1000), row("worse", [0.5, 0.5], 3000)


# -- numbers -----------------------------------------------------------------------------------------


def test_mean_and_spread_are_those_of_the_seeds() -> None:
    values = [0.91, 0.88, 0.95]
    one = row("x", values)
    assert one.mean == pytest.approx(fmean(values))
    assert one.deviation == pytest.approx(stdev(values))
    assert comparison(one).spread(one) == "91.3 ± 3.5"
    alone = row("y", [0.5])
    assert (alone.deviation, comparison(alone).spread(alone)) == (None, "50.0")


def test_a_mean_leaves_no_seed_out() -> None:
    lost = row("lost", [0.9, None])
    shown = comparison(lost, SMALL)
    assert (lost.mean, lost.failed, shown.spread(lost)) == (None, 1, "diverged")
    assert [r.name for r in shown.ranked] == ["small", "lost"]
    assert "lost: 1 of 2 runs diverged." in shown.notes


@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_the_front_is_what_nothing_beats(seed: int, larger: bool) -> None:
    draws = random.Random(seed)
    rows = [row(str(i), [draws.choice((0.2, 0.4, 0.6, 0.8))], draws.choice((10, 20, 30, 40))) for i in range(9)]
    sign = 1 if larger else -1

    def beaten(one: Row) -> bool:
        """Another is no larger and no worse, and in one of them better; of equal ones the first counts."""
        for place, other in enumerate(rows):
            size, score = other.costs.disk_bytes - one.costs.disk_bytes, sign * ((other.mean or 0) - (one.mean or 0))
            if size <= 0 and score >= 0 and (size < 0 or score > 0 or place < rows.index(one)):
                return True
        return False

    front = comparison(*rows, larger=larger).front
    assert {r.name for r in front} == {r.name for r in rows if not beaten(r)}
    assert [r.costs.disk_bytes for r in front] == sorted(r.costs.disk_bytes for r in front)


def test_a_winner_at_the_edge_is_said() -> None:
    low, high = row("low", [0.5, 0.5], edge="lowest"), row("high", [0.5, 0.6], edge="highest")
    notes = "\n".join(comparison(low, high, GOOD).notes)
    assert "low: the best learning rate, 0.1, is the lowest of all that were tried; a lower one may be better" in notes
    assert "high: the best learning rate, 0.1, is the highest of all that were tried; a higher one" in notes
    assert "good:" not in notes
    assert "0.1 (highest)" in comparison(high).to_markdown()


# -- files -------------------------------------------------------------------------------------------


def test_markdown_has_a_line_per_method_best_first() -> None:
    lines = comparison(SMALL, WORSE, GOOD).to_markdown().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert {len(line) for line in cells} == {7}
    assert [line[0] for line in cells[2:]] == ["good *", "small *", "worse"]
    assert cells[2][1:] == ["85.0 ± 7.1", "10", "5,000", "1.25", "2.0", "0.1"]


def test_csv_says_what_json_says() -> None:
    found = comparison(GOOD, row("lost", [None, None]), row("none", [], rate=None))
    plain = found.to_dict()
    for line, method in zip(csv.DictReader(io.StringIO(found.to_csv())), plain["methods"], strict=True):
        assert line["name"] == method["name"]
        assert (float(line["mean"]) if line["mean"] else None) == method["mean"]
        assert int(line["disk_bytes"]) == method["disk_bytes"]
    runs = list(csv.DictReader(io.StringIO(found.runs_csv())))
    assert len(runs) == 3 * 4 + 2 + 2
    assert [(r["part"], r["test"]) for r in runs if r["name"] == "lost" and r["part"] == "test"] == [("test", "")] * 2


def test_all_files_are_written_and_hold_together(tmp_path: Path) -> None:
    found = comparison(GOOD, SMALL, WORSE)
    written = write_comparison(found, tmp_path)
    names = {"comparison.json", "comparison.csv", "comparison.md", "runs.csv", "report.html"}
    names |= {f"{name}.{kind}" for name in PICTURES for kind in ("svg", "png")}
    assert {path.name for path in written} == names == {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    text = (tmp_path / "report.html").read_text()
    assert "A &lt; B &amp; C" in text
    assert text.count("<img ") == len(PICTURES)
    assert "http" not in text.replace("http://www.w3.org", "")  # it needs nothing but itself
    _check_html(text)


def test_names_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    write_comparison(comparison(GOOD, row(hostile, [0.2, 0.3], edge="lowest"), title=hostile), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 5, "both titles, a note, and a row of both tables"
    _check_html(text)


def _check_html(text: str) -> None:
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Checker().feed(text)
    assert open_tags == []


@pytest.mark.heavy
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_same_each_time_and_shows_every_method(name: str) -> None:
    found = comparison(GOOD, SMALL, WORSE, row("edge", [0.2, 0.3], 50, "highest"))
    pictures = draw(found, name)
    assert pictures == draw(found, name)
    assert ElementTree.fromstring(pictures["svg"]).tag.endswith("svg")
    assert pictures["png"].startswith(b"\x89PNG")
    shown = {text.get_text() for text in PICTURES[name](found).findobj(Text)}
    for one in found.rows:
        assert any(text.startswith(one.name) for text in shown)


def test_scores_that_are_far_apart_and_fall_and_failures_can_be_drawn() -> None:
    found = comparison(
        row("a", [20.0, 21.0]), row("b", [900.0, 800.0], 10), row("lost", [None, None]), percent=False, larger=False
    )
    assert [r.name for r in found.front] == ["b", "a"]
    for name in PICTURES:
        assert PICTURES[name](found).axes
    nothing = comparison(row("lost", [None, None]), row("none", [], rate=None))
    for name in PICTURES:
        assert PICTURES[name](nothing).axes


def test_labels_do_not_lie_on_each_other() -> None:
    import matplotlib as mpl

    from kilotune._ui.charts import STYLE

    rows = [row(f"method-{i}", [0.80 + 0.002 * i], 1000 + 40 * i) for i in range(6)]
    with mpl.rc_context(STYLE):
        figure = PICTURES["pareto"](comparison(*rows))
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 6
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])
