"""The report of a training: its pictures are of what was measured, and the page needs nothing but itself."""

from __future__ import annotations

import base64
import dataclasses
import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilotune.errors import KilotuneError, MissingExtraError
from kilotune.train.results import plots
from kilotune.train.results.outcome import Result
from kilotune.train.results.report import page, require_for, write_report
from kilotune.train.run import fit, open_session
from kilotune.train.running.planning import plan_run
from kilotune.train.running.session import Session
from kilotune.train.settings.sections import (
    AdapterSettings,
    DataSettings,
    LogSettings,
    ModelSettings,
    TrainingSettings,
    TrainSettings,
)
from tests.support.train_support import model_folder, sentence, write_jsonl

PNG = b"\x89PNG\r\n"
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Reader(HTMLParser):
    """Text, images, and whether every element is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.images: list[str] = []
        self.outside: list[str] = []
        self.cells: list[list[str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        for name in ("src", "href"):
            source = values.get(name) or ""
            (self.images if source.startswith("data:") else self.outside).append(source) if source else None
        if tag == "tr":
            self.cells.append([])
        if tag == "td":
            self.cells[-1].append("")
        if tag == "img":
            assert values["alt"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open:
            self.cells[-1][-1] += data


def record(kind: str, step: int, **values: float) -> dict[str, Any]:
    return {"kind": kind, "step": step, "epoch": 0.0, "seconds": 0.0, "tokens": 1, "memory": 1, **values}


HISTORY = [
    record("train", 10, loss=2.0, learning_rate=1e-3, grad_norm=1.0),
    record("validation", 10, loss=2.5, accuracy=0.25),
    record("train", 20, loss=math.nan, learning_rate=5e-4, grad_norm=math.inf),
    record("validation", 20, loss=1.5, accuracy=0.75),
    record("end", 20, loss=1.8),
    record("test", 20, loss=1.6, accuracy=0.5),
]


# -- pictures ------------------------------------------------------------------------------------------


def drawn(picture: bytes) -> np.ndarray[Any, Any]:
    """The pixels of a PNG (height, width, 4)."""
    import io

    import matplotlib.image

    return np.asarray(matplotlib.image.imread(io.BytesIO(picture)))


@pytest.mark.heavy
def test_there_is_a_picture_of_all_that_was_measured_and_of_nothing_else() -> None:
    assert set(plots.draw(HISTORY, 20)) == {"loss", "learning_rate", "gradient", "metrics"}
    assert set(plots.draw(HISTORY[:1])) == {"loss", "learning_rate", "gradient"}
    assert set(plots.draw([record("validation", 1, loss=1.0)])) == {"loss"}
    assert plots.draw([record("end", 1, loss=1.0)]) == {}
    assert plots.draw([]) == {}
    for picture in plots.draw(HISTORY, 20).values():
        assert picture.startswith(PNG)
        assert len(np.unique(drawn(picture).reshape(-1, 4), axis=0)) > 10, "something is on it"


def test_what_is_drawn_follows_from_the_history() -> None:
    assert plots.points(HISTORY, "validation", "accuracy") == ([10.0, 20.0], [0.25, 0.75])
    assert plots.points([*HISTORY, record("validation", 20, loss=9.0)], "validation", "loss")[1] == [2.5, 9.0]
    first = plots.draw(HISTORY, 20)
    assert plots.draw(HISTORY, 20) == first, "the same history draws the same"
    changed = [dict(r) for r in HISTORY]
    changed[3]["accuracy"] = 0.5
    again = plots.draw(changed, 20)
    assert again["metrics"] != first["metrics"]
    assert again["loss"] == first["loss"]
    assert plots.draw(HISTORY, 10)["loss"] != first["loss"], "the ring is elsewhere"


def test_what_is_not_finite_is_left_out() -> None:
    nothing = [record("train", i, loss=math.nan, learning_rate=0.0, grad_norm=math.inf) for i in range(200)]
    assert set(plots.draw(nothing)) == {"loss", "learning_rate", "gradient"}


@pytest.mark.parametrize("count", [1, 59, 60, 2000, 2001, 50_000])
def test_many_points_become_means_of_neighbours(count: int) -> None:
    steps, values = plots._thinned(([float(i) for i in range(count)], [float(i % 7) for i in range(count)]))
    assert len(steps) == len(values) <= plots.MOST
    size = math.ceil(count / plots.MOST)
    assert values[0] == pytest.approx(np.mean([i % 7 for i in range(min(size, count))]))
    assert steps[-1] <= count - 1
    assert plots.draw([record("train", i, loss=1.0 + i % 7) for i in range(count)])["loss"].startswith(PNG)


def test_a_wide_range_of_losses_is_drawn_on_a_logarithmic_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[str] = []
    monkeypatch.setattr(plots, "png", lambda figure: scales.append(figure.axes[0].get_yscale()) or b"")
    for least in (0.5, 0.05, 0.0, -1.0):
        plots.draw([record("train", 1, loss=2.0), record("train", 2, loss=least)])
    assert scales == ["linear", "log", "linear", "linear"]


# -- the page ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Result, Any]:
    """A training that is over."""
    folder = tmp_path_factory.mktemp("report")
    rows = [{"text": sentence(i), "label": "<b>one" if i % 2 else "two & three"} for i in range(40)]
    session = open_session(
        TrainSettings(
            task="text-classification",
            model=ModelSettings(base=str(model_folder("bert"))),
            adapter=AdapterSettings(method="lora", options={"r": 2}),
            data=DataSettings(
                train=str(write_jsonl(folder / "a.jsonl", rows)), validation_fraction=0.2, test_fraction=0.2
            ),
            training=TrainingSettings(max_steps=4, device="cpu", eval_every=2),
            logging=LogSettings(progress="quiet", log_every=1, report=False),
            output=str(folder / "out"),
        )
    )
    plan = plan_run(session)
    return session, fit(session), plan


def test_the_page_has_the_result(done: tuple[Session, Result, Any]) -> None:
    session, result, plan = done
    written = write_report(session, result, plan)
    names = [path.relative_to(session.folder).as_posix() for path in written]
    assert names == [f"plots/{n}.png" for n in ("loss", "learning_rate", "gradient", "metrics")] + ["report.html"]
    read = Reader((session.folder / "report.html").read_text(encoding="utf-8"))
    assert read.outside == [], "nothing is loaded from elsewhere"
    shown = [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in read.images]
    assert sorted(shown) == sorted(path.read_bytes() for path in written[:-1])
    rows = {cells[0]: cells[1:] for cells in read.cells if cells}
    names_shown = list(dict.fromkeys(name for values in result.metrics.values() for name in values))
    for split, row in (("best", f"validation, step {result.best_step} (kept)"), ("test", "test")):
        assert rows[row] == [f"{result.metrics[split][name]:.4g}" for name in names_shown]
    for text in (
        f"{result.trained:,} numbers were trained in 4 steps",
        "<b>one, two & three",
        session.prepared.preview,
        f"train{len(session.prepared.train)}",  # type: ignore[arg-type]
        "max_steps: 4",
        "planned memory",
        *session.notes,
    ):
        assert text in read.text.replace("\n", "") or text in read.text


def test_a_page_without_evaluations_or_plan(done: tuple[Session, Result, Any]) -> None:
    session, result, _ = done
    bare = dataclasses.replace(result, metrics={}, history=(), step_seconds=0.0)
    read = Reader(page(session, bare, None, {}))
    assert "Nothing was evaluated" in read.text
    assert "Nothing was logged" in read.text
    assert "planned memory" not in read.text
    assert not read.images


def test_names_are_escaped(done: tuple[Session, Result, Any]) -> None:
    session, result, plan = done
    hostile = "<script>alert(1)</script>"
    prepared = dataclasses.replace(session.prepared, labels=[hostile, "b"], preview=hostile)
    model = dataclasses.replace(session.settings.model, base="models/<b>base")
    settings = session.settings.replace(model=model)
    text = page(dataclasses.replace(session, prepared=prepared, settings=settings, notes=[hostile]), result, plan, {})
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
    assert "<h1>lora on &lt;b&gt;base</h1>" in text
    Reader(text)


def test_a_folder_that_cannot_be_written_to(done: tuple[Session, Result, Any], tmp_path: Path) -> None:
    session, result, plan = done
    (tmp_path / "file").write_text("")
    elsewhere = dataclasses.replace(session, settings=session.settings.replace(output=str(tmp_path / "file")))
    with pytest.raises(KilotuneError, match="could not write the report into"):
        write_report(elsewhere, result, plan)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_asked_for_and_not_installed_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    require_for(LogSettings(progress="bar", tensorboard=True))
    cases = {
        "jinja2": (LogSettings(report=True), r"logging\.report needs .*'jinja2'.*kilotune\[train\]"),
        "matplotlib.figure": (LogSettings(report=True), r"logging\.report needs .*'matplotlib'.*kilotune\[train\]"),
        "rich.progress": (LogSettings(progress="bar"), r"logging\.progress bar needs .*'rich'.*kilotune\[cli\]"),
        "torch.utils.tensorboard": (
            LogSettings(tensorboard=True),
            r"logging\.tensorboard needs .*kilotune\[tensorboard\]",
        ),
    }
    for module, (settings, message) in cases.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingExtraError, match=message):
                require_for(settings)
            require_for(LogSettings(progress="plain", tensorboard=False, report=False))
