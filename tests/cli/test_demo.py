"""``kilotune demo`` as a user runs it, on a run of seconds; the whole short form is in test_makefile.py."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kilotune.experiments.people import experiment, page, settings, toy
from kilotune.experiments.people.results import PeopleResult
from tests.support.cli_helpers import error, kilotune
from tests.support.people_support import result, tiny


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "STEPS", 4)
    monkeypatch.setattr(settings, "chosen", lambda quick, seed: tiny(seed))
    return tmp_path


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nothing is trained: the result is made up, and what was asked for is noted."""
    told: list[Any] = []

    def run(wanted: Any, folder: Path, report: Any) -> PeopleResult:
        told.append((wanted.seed, folder))
        report("training", 1, 2)
        return result()

    monkeypatch.setattr(experiment, "run", run)
    return told


@pytest.mark.full
def test_a_run_ends_with_a_report_and_a_second_one_takes_its_adapters() -> None:
    first = kilotune("demo", "--quick")
    assert Path("runs/demo-quick/report.html").is_file()
    assert first.exit_code in (0, 1)  # so short a run need not learn enough
    assert re.search(r": (\d+) of \1$", first.stderr, re.MULTILINE)  # where no terminal is, progress comes in lines
    second = kilotune("demo", "--quick")
    assert "with the adapters that were there (--restart trains anew)" in second.stdout
    assert "train" not in first.stdout.rpartition("seconds")[2]
    third = kilotune("demo", "--quick", "--restart", "--json")
    assert json.loads(third.stdout)["trained_now"] is True
    other = kilotune("demo", "--quick", "--seed", "1")
    assert other.exit_code == 2
    assert "holds another run of the demo (seed 0 there, 1 now)" in other.stderr


def test_the_table_the_answers_and_the_checks_are_shown(made_up: list[Any]) -> None:
    done = kilotune("demo", "--seed", "5", "--out", "here")
    assert done.exit_code == 0, done.stderr
    assert made_up == [(5, Path("here"))]
    assert "training: 1 of 2" in done.stderr
    for part in (
        "a personal one on top",
        "2.035",
        "40 B",
        "what <is> it?",
        "a says",
        "20 seconds. Report:",
        "here/report.html",
    ):
        assert part in done.stdout, part
    assert done.stdout.count("pass  ") == 5
    assert Path("here/results.json").is_file()
    assert '<p class="lead">A base' in Path("here/report.html").read_text()  # a sentence, whatever the base is called


def test_json_is_one_document_and_what_is_written(made_up: list[Any]) -> None:
    done = kilotune("demo", "--json")
    assert json.loads(done.stdout) == json.loads(Path("runs/demo/results.json").read_text())


def test_a_failed_check_is_told_and_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "run", lambda *_: replace(result(), alone=1.0))
    done = kilotune("demo")
    assert done.exit_code == 1
    assert "FAIL  a row in a batch of many people has the loss that it has alone" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: 1 of 5 checks failed: a row in a batch")
    assert "checks FAILED" in Path("runs/demo/report.html").read_text()


@pytest.mark.parametrize("where", ["training", "writing"])
def test_ctrl_c_says_how_to_go_on(made_up: list[Any], monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((experiment, "run") if where == "training" else (page, "page")), interrupt)
    done = kilotune("demo")
    assert done.exit_code == 130
    assert "interrupted: the same command goes on from what is in runs/demo" in done.stderr
    assert not Path("runs/demo/report.html").exists()


def test_bad_input_is_one_error_before_anything_runs(made_up: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    assert "the report cannot be written into file" in error("demo", "--out", "file")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "'matplotlib': pip install 'kilotune[demo]'" in error("demo")
    assert made_up == []


def test_help_says_what_is_downloaded() -> None:
    text = re.sub(r"[│\s]+", " ", kilotune("demo", "--help").stdout)
    assert "both come from the Python package index, once (101 MB)" in text
