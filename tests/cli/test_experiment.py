"""``kilotune experiment cnn`` as a user runs it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kilotune.cli.experiment import app
from kilotune.errors import ConfigError, KilotuneError, MissingExtraError
from kilotune.experiments.cnn import experiment as experiment
from kilotune.experiments.cnn import page
from tests.support.experiment_support import binary_members, cifar_batches, tar_gz

TINY = ("--seeds", "1", "--epochs", "1", "--adapt-epochs", "1")


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["cnn", *words], env={"COLUMNS": "160", "NO_COLOR": "1"})


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.heavy
def test_a_quick_run_shows_a_table_and_writes_a_report(tmp_path: Path) -> None:
    done = call("--quick")
    assert done.exit_code == 0, done.stderr
    for part in ("VeRA", "LoRA", "full fine-tuning", "542", "89,660", "0.60", "121,212", "3,272", "78,110", "4.19"):
        assert part in done.stdout
    assert done.stdout.count("pass  ") == 14
    assert "runs/cnn-digits/report.html" in done.stdout
    assert "full: 2280 of 2280" in done.stderr  # lines, where nobody looks at a bar
    there = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert [name for name in there if "adapters" not in name] == [
        "runs/cnn-digits/report.html",
        "runs/cnn-digits/results.json",
    ]


@pytest.mark.heavy
def test_json_is_one_document_and_what_is_written() -> None:
    done = call(*TINY, "--json", "--out", "here")
    document = json.loads(done.stdout)
    assert document == json.loads(Path("here/results.json").read_text())
    assert document["timings"]["total_seconds"] > 0
    assert document["passed"] is (done.exit_code == 0)


@pytest.mark.heavy
def test_a_run_without_gains_fails_and_still_reports() -> None:
    done = call(*TINY, "--vera-rate", "1e-6", "--lora-rate", "1e-6", "--full-rate", "1e-6")
    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: \d+ of 14 checks failed: VeRA: the adapted classes gain: \+0.0 points on average", line)
    for label in ("VeRA", "LoRA", "full fine-tuning"):
        assert f"FAIL  {label}: the adapted classes gain" in done.stdout
        assert f"FAIL  {label}: the other classes pay" in done.stdout
    assert "checks FAILED" in Path("runs/cnn-digits/report.html").read_text()


def test_cifar10_from_a_small_archive() -> None:
    archive = tar_gz(Path("small.tar.gz"), binary_members(cifar_batches(per_batch=20)))
    done = call("--data", "cifar10", "--data-dir", str(archive), "--classes", "cat,dog,frog", *TINY, "--json")
    assert done.exit_code == 1  # nothing can be learnt from noise, and the run says so
    document = json.loads(done.stdout)
    assert document["source"] == "CIFAR-10, binary version"
    assert document["settings"]["classes"] == [3, 5, 6]
    assert document["settings"]["rotation_degrees"] == 0.0
    assert document["settings"]["optimizer"] == {"name": "SGD", "momentum": 0.9, "batch": 4}
    assert document["pictures"] == {"pretraining": 100, "adaptation": 30, "test": 20}
    failing = {check["name"] for check in document["checks"] if not check["passed"]}
    assert not any("merging" in name or "loaded" in name or "parameters" in name for name in failing)
    assert "cat, dog and frog" in Path("runs/cnn-cifar10/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--classes", "2,3,twelve"), "'twelve' is no class"),
        (("--seeds", "0"), "seeds is 0, and must be 1 or more"),
        (("--data-dir", "."), "data_dir is for cifar10"),
        (("--data", "cifar10", "--data-dir", "nowhere"), "data_dir nowhere does not exist"),
        (("--data", "cifar10", "--data-dir", "."), "no CIFAR-10 at"),
        (("--out", "file"), "the report cannot be written into file"),
        (("--vera-rate", "1e6", *TINY), "training diverged"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(tmp_path: Path, words: tuple[str, ...], reason: str) -> None:
    Path("file").write_text("")
    done = call(*words)
    assert done.exit_code != 0
    assert isinstance(done.exception, KilotuneError)
    assert reason in str(done.exception)
    assert list(tmp_path.rglob("*")) == [tmp_path / "file"]


def test_an_unknown_data_set_names_the_known_ones() -> None:
    done = call("--data", "mnist")
    assert done.exit_code == 2
    assert "digits" in done.stderr
    assert "cifar10" in done.stderr


def test_bad_settings_are_found_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "run", lambda *_: pytest.fail("it ran"))
    assert isinstance(call("--batch", "0").exception, ConfigError)


@pytest.mark.parametrize("where", ["training", "writing"])
def test_ctrl_c_ends_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((experiment, "train") if where == "training" else (page, "page")), interrupt)
    done = call(*TINY)
    assert done.exit_code == 130
    assert "interrupted: no report was written" in done.stderr
    assert list(tmp_path.rglob("*")) == []


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(experiment, "run", lambda *_: pytest.fail("it ran"))
    done = call()
    assert isinstance(done.exception, MissingExtraError)
    assert "'matplotlib': pip install 'kilotune[demo]'" in str(done.exception)


def test_help_names_every_default() -> None:
    done = call("--help")
    assert done.exit_code == 0
    text = re.sub(r"[│\s]+", " ", done.stdout)
    for part in ("Default: 10; cifar10: 6", "Default: 0.03; cifar10: 0.01", "Default: 0.003; cifar10: 0.001"):
        assert part in text


def test_the_command_turns_errors_into_one_line_and_an_exit_code(tmp_path: Path) -> None:
    from kilotune.cli.main import app as whole

    done = CliRunner().invoke(whole, ["experiment", "cnn", "--classes", "cat,2", "--json"])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: classes are numbers or names")
    assert list(tmp_path.iterdir()) == []
