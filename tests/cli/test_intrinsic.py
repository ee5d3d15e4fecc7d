"""``kilotune intrinsic-dimension`` as a user runs it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from kilotune.experiments.dimension import report as dimension_report
from kilotune.experiments.images import tasks
from tests.support.cli_helpers import as_json, error, kilotune
from tests.support.experiment_support import binary_members, cifar_batches, tar_gz

VERB = "intrinsic-dimension"
FOLDER = Path("runs/intrinsic-dimension-digits-scratch")
TINY = ("--quick", "--epochs", "1", "--structure", "did", "--resolution", "20")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files() -> list[str]:
    return sorted(path.as_posix() for path in Path().rglob("*") if path.is_file())


@pytest.mark.full
def test_a_quick_run_shows_a_table_and_writes_a_report() -> None:
    done = kilotune(VERB, "--quick")
    assert done.exit_code == 0, done.stderr
    for part in ("digits from scratch: 61,770 weights of 5 layers", "62,006 numbers", "full training", "wanted"):
        assert part in done.stdout
    for structure in ("DID", "SAID"):
        assert re.search(rf"^{structure}: d90 ", done.stdout, re.MULTILINE)
        assert f"{structure} d 2,000" in done.stdout
    assert re.search(r": (\d+) of \1$", done.stderr, re.MULTILINE)  # where no terminal is, progress comes in lines
    names = ("report.html", "results.json", "runs.jsonl", "scores.csv", "scores.svg")
    assert files() == [f"{FOLDER}/{name}" for name in names]
    assert f"{FOLDER}/report.html" in done.stdout


def test_json_is_one_document_and_what_is_written_and_a_second_call_runs_nothing() -> None:
    first = as_json(VERB, *TINY)
    assert first == json.loads((FOLDER / "results.json").read_text())
    assert first["settings"]["epochs"] == 1
    assert first["settings"]["search"]["structures"] == ["did"]
    assert first["timings"]["runs_reused"] == 0
    again = as_json(VERB, *TINY)
    assert again["timings"]["runs_reused"] == len((FOLDER / "runs.jsonl").read_text().splitlines()) - 1
    assert again["timings"]["runs"] == first["timings"]["runs"]  # the first call's seconds: nothing ran anew
    assert {k: v for k, v in again.items() if k != "timings"} == {k: v for k, v in first.items() if k != "timings"}


def test_ctrl_c_keeps_what_is_done_and_the_next_call_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = tasks.train, [0]

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "train", interrupted)
        done = kilotune(VERB, *TINY)
    assert done.exit_code == 130
    assert "interrupted: no report was written; 3 finished runs are kept" in done.stderr  # the untrained one, and two
    assert done.stdout == ""
    assert files() == [f"{FOLDER}/runs.jsonl"]
    done = kilotune(VERB, *TINY)
    assert done.exit_code == 0, done.stderr
    assert "3 runs of before taken over" in done.stdout


def test_ctrl_c_before_anything_is_done_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "digits", interrupt)
    done = kilotune(VERB, *TINY)
    assert done.exit_code == 130
    assert done.stderr.strip().endswith("interrupted: no report was written")
    assert files() == []


def test_a_fault_while_writing_leaves_no_half_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(dimension_report, "score_page", interrupt)
    assert kilotune(VERB, *TINY).exit_code == 130
    assert files() == [f"{FOLDER}/runs.jsonl"]


@pytest.mark.full
def test_other_settings_in_the_same_folder_are_refused_until_restarted() -> None:
    as_json(VERB, *TINY)
    before = (FOLDER / "runs.jsonl").read_bytes()
    said = error(VERB, *TINY, "--batch", "64")
    assert "batch: 32 there, 64 now" in said
    assert "--restart" in said
    assert "--out" in said
    assert (FOLDER / "runs.jsonl").read_bytes() == before
    assert as_json(VERB, *TINY, "--batch", "64", "--restart")["settings"]["batch"] == 64
    assert as_json(VERB, *TINY, "--out", "elsewhere")["settings"]["batch"] == 32


def test_a_pretrained_start_is_turned() -> None:
    document = as_json(VERB, *TINY, "--from", "pretrained", "--pretrain-epochs", "3")
    assert document["task"] == "digits from a pretrained network, turned by 45 degrees"
    assert document["settings"]["pretrain_epochs"] == 3
    assert document["start_median"] > 0.15  # better than a guess before any of it is trained
    assert files()[0].startswith("runs/intrinsic-dimension-digits-pretrained/")


def test_cifar10_from_a_small_archive() -> None:
    archive = tar_gz(Path("small.tar.gz"), binary_members(cifar_batches(per_batch=20)))
    document = as_json(VERB, *TINY, "--data", "cifar10", "--data-dir", archive)
    assert document["task"] == "cifar10 from scratch"
    assert document["settings"]["pictures"] == {"training": 80, "validation": 20, "test": 20}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--pretrain-epochs", "3"), "--pretrain-epochs is for --from pretrained"),
        (("--data-dir", "."), "data_dir is for cifar10"),
        (("--data", "cifar10", "--data-dir", "nowhere"), "data_dir nowhere does not exist"),
        (("--from", "pretrained", "--rotation", "0"), "a pretrained start needs a rotation"),
        (("--rates", "0.1;0.2"), "--rates is '0.1;0.2', and must be numbers with commas between"),
        (("--rates", "0.2,0.1"), "rates is [0.2, 0.1], and must be rising"),
        (("--share", "1.5"), "share is 1.5"),
        (("--lowest", "4000"), "highest is 3000, and must be more than lowest, 4000"),
        (("--structure", "sad"), "'sad' is not one of"),
        (("--epochs", "0"), "epochs is 0"),
        (("--out", "file"), "the report cannot be written into file"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(words: tuple[str, ...], reason: str) -> None:
    Path("file").write_text("")
    assert reason in error(VERB, *words)
    assert files() == ["file"]


def test_more_dimensions_than_weights_are_refused() -> None:
    done = kilotune(VERB, "--highest", "100000")
    assert done.exit_code == 2
    assert "error: highest is 100,000, but the 5 adapted layers have only 61,770 weights" in done.stderr
    assert files() == []


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "'matplotlib': pip install 'kilotune[demo]'" in error(VERB)


def test_help_names_every_default() -> None:
    from kilotune.experiments.dimension.search import Search
    from kilotune.experiments.images.settings import ImageSettings

    text = re.sub(r"[│\s]+", " ", kilotune(VERB, "--help").stdout)
    search, settings = Search(), ImageSettings()
    rates = ",".join(f"{rate:g}" for rate in search.rates)
    full_rates = ",".join(f"{rate:g}" for rate in search.full_rates)
    for part in (
        f"Smallest d of the grid. Default: {search.lowest}.",
        f"Largest d. Default: {search.highest}.",
        f"evenly in log d. Default: {search.points}.",
        f"Default: {search.resolution}.",
        f"Runs per d. Default: {search.seeds}.",
        f"Default: {settings.epochs}; cifar10: 3.",
        f"Default: {settings.pretrain_epochs}; cifar10: 3.",
        f"Default: {rates}.",
        f"Default: {full_rates}.",
    ):
        assert part in text
