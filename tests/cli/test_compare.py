"""``kilotune compare`` as a user runs it: on the digits, killed and resumed, with configs that are wrong."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kilotune.experiments.compare import costs, digits
from tests.support.cli_helpers import as_json, error, kilotune
from tests.support.paths import SUPPORT

VERB = "compare"
CONFIG = """
problem: {kind: digits, epochs: 2, pretrain_epochs: 1}
methods:
  full:
  vera: {r: 4, target_modules: [fc1, fc2, fc3]}
search: {lowest: 0.001, highest: 0.1, points: 2, rounds: 2, spare: 1}
seeds: 2
"""
FOLDER = Path("runs/compare-small")
LAST = ("values", "seconds")  # of a line of the journal: what was found, not what was run


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(costs, "LEAST_SECONDS", 1e-4)
    Path("small.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def own() -> Path:
    """A comparison on the toy problem, in a Python file beside its config file."""
    home = Path("home")
    home.mkdir()
    (home / "toy.py").write_text((SUPPORT / "compare_toy.py").read_text())
    (home / "own.yaml").write_text(
        "problem: {kind: python, file: toy.py, name: Toy}\n"
        "methods: {full: , lora: {r: 2}, vera: {r: 4}, head: }\n"
        "search: {lowest: 0.003, highest: 0.3, points: 3, rounds: 2}\nseeds: 2\n"
    )
    return home / "own.yaml"


def without_times(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "timings"}


def files() -> set[str]:
    return {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}


@pytest.mark.heavy
def test_it_prints_a_table_and_writes_everything() -> None:
    done = kilotune(VERB, "small.yaml")
    assert done.exit_code == 0, done.stderr
    for part in ("digits turned by 45 degrees", "test accuracy in %", "step / floor", "peak MB", "runs of full length"):
        assert part in " ".join(done.stdout.split())
    assert re.search(r"full( \*)? .*62,006", done.stdout)
    assert f"{FOLDER}/report.html" in done.stdout
    pictures = {f"{name}.{kind}" for name in ("pareto", "scores", "rates", "costs") for kind in ("svg", "png")}
    tables = {"comparison.json", "comparison.csv", "comparison.md", "runs.csv", "report.html", "runs.jsonl"}
    assert files() == pictures | tables
    rows = list(csv.DictReader((FOLDER / "comparison.csv").read_text().splitlines()))
    assert [(row["name"], row["trained"]) for row in rows] == [("full", "62006"), ("vera", str(3 * 4 + 120 + 84 + 10))]


@pytest.mark.heavy
def test_json_is_what_is_written_and_a_second_call_runs_nothing() -> None:
    first = as_json(VERB, "small.yaml", "--methods", "vera")
    assert first == json.loads((FOLDER / "comparison.json").read_text())
    assert [method["name"] for method in first["methods"]] == ["vera"]
    again = as_json(VERB, "small.yaml", "--methods", "vera")
    assert without_times(again) == without_times(first)
    assert again["timings"]["runs"] == first["timings"]["runs"]
    assert again["timings"]["runs_reused"] == len((FOLDER / "runs.jsonl").read_text().splitlines()) - 1


def test_a_method_that_the_file_does_not_name_may_be_added() -> None:
    plan = as_json(VERB, "small.yaml", "--methods", "lora, vera", "--dry-run")
    assert plan["methods"] == ["lora", "vera"]


def test_a_dry_run_says_what_would_be_run_and_runs_nothing() -> None:
    plan = as_json(VERB, "small.yaml", "--dry-run", "--seeds", "3", "--set", "search.points=4")
    assert plan["rates"] == [0.001, 0.00464, 0.0215, 0.1]
    assert plan["budget"] == "4 rates x 0.5 + 2 rates x 1 + 1 x 1 = 5 runs of full length"
    assert plan["steps_of_full_length"] == 2 * 29
    assert plan["steps"] == 2 * (5 + 3) * 2 * 29
    assert not FOLDER.exists()
    shown = kilotune(VERB, "small.yaml", "--dry-run")
    assert "runs of full length" in shown.stdout


@pytest.mark.heavy
def test_ctrl_c_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = digits.train, [0]

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(digits, "train", interrupted)
        done = kilotune(VERB, "small.yaml", "--methods", "full")
    assert done.exit_code == 130
    assert "interrupted: no report was written; 5 finished runs are kept" in done.stderr  # costs, two starts, two runs
    assert (done.stdout, files()) == ("", {"runs.jsonl"})
    done = kilotune(VERB, "small.yaml", "--methods", "full")
    assert done.exit_code == 0, done.stderr
    assert "(5 finished runs of before taken over)" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("every", [40, *(pytest.param(n, marks=pytest.mark.full) for n in (25, 6))])
def test_killed_at_any_moment_it_resumes_and_runs_nothing_twice(every: int, own: Path) -> None:
    """kill -9 of real processes, again after so many runs; the numbers are those of an unbroken comparison."""
    journal, kept, kills, ended = Path("runs/compare-own/runs.jsonl"), b"", 0, False
    while not ended:
        words = [sys.executable, "-m", "kilotune.cli.main", VERB, str(own)]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            wanted = kept.count(b"\n") + every
            while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < wanted):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            ended = process.wait() == 0
        now = journal.read_bytes()
        assert now.startswith(kept[: kept.rfind(b"\n") + 1])
        kept, kills = now, kills + (not ended)
    assert kills >= 1
    keys = [{k: v for k, v in json.loads(line).items() if k not in LAST} for line in kept.splitlines()[1:]]
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)
    found = json.loads((journal.parent / "comparison.json").read_text())
    assert without_times(found) == without_times(as_json(VERB, own, "--out", "whole"))


# -- what goes wrong ---------------------------------------------------------------------------------


@pytest.mark.heavy
def test_other_settings_in_the_same_folder_are_refused_until_restarted() -> None:
    as_json(VERB, "small.yaml", "--methods", "full", "--seeds", "1")
    said = error(VERB, "small.yaml", "--methods", "full", "--set", "problem.batch=64")
    assert "batch: 32 there, 64 now" in said
    assert "--restart" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "problem.kind=digit",
            "problem.kind: expected one of digits, recipe, python, got 'digit'. Did you mean 'digits'?",
        ),
        ("problem.epoch=3", "problem.epoch: there is no such setting. Did you mean 'epochs'?"),
        ("search.point=3", "search.point: there is no such setting. Did you mean 'points'?"),
        ("search=3", "search: expected settings with values, got 3"),
        ("seed=3", "seed: there is no such setting. Did you mean 'seeds'?"),
        ("search.seed=1", "search.seed: 1 is one of the reported seeds"),
        ("methods.lorra={r: 3}", "methods.lorra: 'lorra' is no method. Did you mean 'lora'?"),
        ("methods.mine={method: verra}", "methods.mine: 'verra' is no method. Did you mean 'vera'?"),
        ("methods.lora=3", "methods.lora: expected options with values, got 3"),
        ("methods.lora={rank: 3}", "lora: unknown option 'rank'. Did you mean 'r'?"),
        ("methods.full={r: 3}", "full: method 'full' has no options, got r"),
        ("methods.again={method: vera, r: 4, target_modules: [fc1, fc2, fc3]}", "again: is the same as vera"),
        ("problem.rotation=360", "problem.rotation: at 0 degrees nothing is left to learn"),
    ],
)
def test_a_wrong_setting_is_named(change: str, said: str) -> None:
    assert said in error(VERB, "small.yaml", "--set", change)
    assert not FOLDER.exists()


def test_several_faults_are_told_together() -> None:
    text = error(VERB, "small.yaml", "--set", "seeds=0", "--set", "search.rounds=0", "--set", "thread=1")
    for part in ("seeds: ", "search.rounds: ", "thread: there is no such setting. Did you mean 'threads'?"):
        assert part in text


def test_wrong_words_on_the_command_line() -> None:
    assert "cannot read the config file nothere.yaml" in error(VERB, "nothere.yaml")
    assert "'lorra' is no method. Did you mean 'lora'?" in error(VERB, "small.yaml", "--methods", "full,lorra")
    assert "--methods is ','" in error(VERB, "small.yaml", "--methods", ",")
    assert "--set: expected KEY=VALUE" in error(VERB, "small.yaml", "--set", "seeds")


def test_what_cannot_be_adapted_is_told_before_anything_is_trained() -> None:
    done = kilotune(
        VERB, "small.yaml", "--set", "methods={vera: {target_modules: [fc9]}, lora: {target_modules: [pool]}}"
    )
    assert (done.exit_code, done.stdout, files()) == (2, "", set())
    assert done.stderr.count("error: ") == 1
    for part in ("vera: ", "lora: ", "fc9"):
        assert part in done.stderr


# -- a problem of one's own --------------------------------------------------------------------------


def test_a_problem_from_a_python_file(own: Path) -> None:
    document = as_json(VERB, own, "--set", "problem.arguments={diverges_above: 5.0}", "--methods", "full,lora")
    assert document["settings"]["limit"] == "5.0"
    assert [method["trained"] for method in document["methods"]] == [92, 52]
    assert "has no problem 'Toi'. Did you mean 'Toy'?" in error(VERB, own, "--set", "problem.name=Toi")
    assert "there is no file" in error(VERB, own, "--set", "problem.file=gone.py")
