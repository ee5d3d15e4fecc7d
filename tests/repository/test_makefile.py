"""The set-up that the Makefile runs: it resumes, refuses clearly, and calls itself done only when it is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.support.paths import ROOT

HERE = sys.version_info[:2]


@pytest.fixture
def environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment", ROOT / "scripts" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with the two files that a set-up depends on."""
    (tmp_path / "pyproject.toml").write_text("one")
    (tmp_path / "constraints.txt").write_text("two")
    return tmp_path


@pytest.fixture
def fake_venv(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tree: Path) -> Path:
    """A .venv that runs, as far as the set-up can tell, and a pip that does nothing."""
    venv = tree / ".venv"
    venv.mkdir()
    monkeypatch.setattr(environment, "venv_version", lambda _: HERE)
    monkeypatch.setattr(environment, "install", lambda *_: None)
    return venv


def run_make(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MFLAGS", "PYTHON"}}
    return subprocess.run(
        ["make", *words], cwd=ROOT, capture_output=True, text=True, env={**clean, **more}, timeout=240
    )


def test_plain_make_lists_every_target() -> None:
    done = run_make()
    assert done.returncode == 0, done.stderr
    listed = set(re.findall(r"^  make (\S+)", done.stdout, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert listed == {name for name in phony.group(1).split() if not name.startswith("env-")}


def test_ci_runs_both_tiers_and_the_full_one_runs_everything() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"make (\S+)", script) == ["test", "test-heavy"]
    assert "set -euo pipefail" in script
    assert '-m "heavy and not full"' in run_make("-n", "test-heavy").stdout
    assert '-m ""' in run_make("-n", "test-full").stdout


@pytest.mark.parametrize(
    "target", ["demo", "tutorial", "test", "test-heavy", "test-full", "lint", "type", "bench", "docs", "format"]
)
def test_each_target_sets_up_first(target: str) -> None:
    done = run_make("-n", "-j4", target)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    extra = {"demo": "demo", "tutorial": "demo", "docs": "docs"}.get(target, "dev")
    position = next(i for i, line in enumerate(lines) if "scripts/environment.py" in line)
    assert lines[position].endswith(f" {extra}")
    assert not any("-m pytest" in line or "-m ruff" in line or "/kilotune " in line for line in lines[:position])


@pytest.mark.heavy
def test_make_demo_runs_to_its_report(tmp_path: Path) -> None:
    """The whole of `make demo`, in its short form: no download, and all of its checks."""
    out = tmp_path / "run"
    done = run_make("demo", f"ARGS=--quick --out {out}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("pass  ") == 5
    results = json.loads((out / "results.json").read_text())
    assert results["passed"] is True
    assert (out / "report.html").stat().st_size > 100_000


@pytest.mark.full
def test_make_tutorial_runs_to_its_report(tmp_path: Path) -> None:
    """The whole of `make tutorial`, on one seed and fewer epochs; `make test` has set up what it needs."""
    out = tmp_path / "run"
    done = run_make("tutorial", f"ARGS=--quick --out {out}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fail" not in re.findall(r"^(pass|fail) ", done.stdout, re.MULTILINE)
    assert {path.name for path in out.iterdir()} == {"report.html", "results.json", "adapters"}
    results = json.loads((out / "results.json").read_text())
    assert results["checks"]
    assert all(check["passed"] for check in results["checks"])


def test_a_python_that_is_not_there_is_one_clear_line() -> None:
    done = run_make("demo", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "error: no no-such-python here; kilotune needs Python 3.11 to 3.13"


def test_a_python_too_old_for_the_set_up_is_one_clear_line(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = run_make("demo", f"PYTHON={old}")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == f"error: {old} is too old; kilotune needs Python 3.11 to 3.13"


@pytest.mark.parametrize(
    ("version", "good"),
    [((3, 10), False), ((3, 11), True), ((3, 12), True), ((3, 13), True), ((3, 14), False), ((2, 7), False)],
)
def test_supported_versions(environment: ModuleType, version: tuple[int, int], good: bool) -> None:
    assert environment.supported(version) is good
    classifiers = (ROOT / "pyproject.toml").read_text()
    assert (f"Python :: {version[0]}.{version[1]}" in classifiers) is good


def test_an_unsupported_python_is_refused(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    monkeypatch.setattr(environment.sys, "version_info", (3, 10, 0))
    with pytest.raises(environment.SetupError, match=r"needs Python 3\.11 to 3\.13, .* is 3\.10"):
        environment.prepare(tree, tree / ".venv", "demo", explicit=False)
    assert not (tree / ".venv").exists()


def test_a_broken_venv_is_built_anew(environment: ModuleType, tree: Path) -> None:
    venv = tree / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("home = nowhere")
    (venv / "bin" / "python").symlink_to(tree / "gone")
    assert environment.check_existing(venv, explicit=False) is False
    assert not venv.exists()


def test_a_folder_that_is_no_venv_is_left_alone(environment: ModuleType, tree: Path) -> None:
    (tree / ".venv").mkdir()
    (tree / ".venv" / "precious").write_text("mine")
    with pytest.raises(environment.SetupError, match="not a virtual environment"):
        environment.check_existing(tree / ".venv", explicit=False)
    assert (tree / ".venv" / "precious").read_text() == "mine"


@pytest.mark.parametrize(("version", "message"), [((3, 10), r"is of Python 3\.10"), ((3, 99), r"is of Python 3\.99")])
def test_a_venv_of_another_python_is_named(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tree: Path, version: tuple[int, int], message: str
) -> None:
    (tree / ".venv").mkdir()
    monkeypatch.setattr(environment, "venv_version", lambda _: version)
    with pytest.raises(environment.SetupError, match=message):
        environment.check_existing(tree / ".venv", explicit=False)


def test_only_a_chosen_python_must_be_the_one_of_the_venv(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tree: Path
) -> None:
    (tree / ".venv").mkdir()
    other = (3, 12) if HERE != (3, 12) else (3, 13)
    monkeypatch.setattr(environment, "venv_version", lambda _: other)
    assert environment.check_existing(tree / ".venv", explicit=False)
    with pytest.raises(environment.SetupError, match="leave PYTHON out"):
        environment.check_existing(tree / ".venv", explicit=True)


def test_an_interrupted_set_up_is_taken_up_again(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, fake_venv: Path, tree: Path
) -> None:
    installed: list[str] = []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environment.prepare(tree, fake_venv, "demo", explicit=False)
    assert not list(fake_venv.glob("*.stamp"))
    monkeypatch.setattr(environment, "install", lambda root, venv, extra: installed.append(extra))
    for _ in range(2):
        environment.prepare(tree, fake_venv, "demo", explicit=False)
    assert installed == ["demo"], "installed once, then known to be done"


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_again(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, fake_venv: Path, tree: Path, name: str
) -> None:
    installed: list[str] = []
    monkeypatch.setattr(environment, "install", lambda root, venv, extra: installed.append(extra))
    environment.prepare(tree, fake_venv, "dev", explicit=False)
    environment.prepare(tree, fake_venv, "demo", explicit=False)
    assert installed == ["dev"], "dev contains demo"
    (tree / "pyproject.toml").write_text("one\n[tool.ruff]\nline-length = 100")
    environment.prepare(tree, fake_venv, "demo", explicit=False)
    assert installed == ["dev"], "a linter's settings change no installation"
    (tree / name).write_text("changed")
    environment.prepare(tree, fake_venv, "demo", explicit=False)
    assert installed == ["dev", "demo"]


def test_a_failed_pip_is_one_line_and_no_stamp(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / ".venv").mkdir()
    monkeypatch.setattr(environment, "ROOT", tree)
    monkeypatch.setattr(environment, "VENV", tree / ".venv")
    monkeypatch.setattr(environment, "venv_version", lambda _: HERE)
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert environment.main(["demo"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: pip failed")
    assert not list((tree / ".venv").glob("*.stamp"))


def test_pip_gets_the_constraints(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    ran: list[list[str]] = []

    def remember(command: list[str], **_: object) -> SimpleNamespace:
        ran.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(environment.subprocess, "run", remember)
    environment.install(tree, tree / ".venv", "docs")
    (command,) = ran
    assert command[command.index("--constraint") + 1] == str(tree / "constraints.txt")
    assert command[-2:] == ["--editable", f"{tree}[docs]"]


@pytest.mark.parametrize("words", [[], ["nonsense"], ["demo", "dev"]])
def test_wrong_arguments_are_told(
    environment: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert environment.main(words) == 2
    assert "usage" in capsys.readouterr().err


def test_every_extra_is_pinned() -> None:
    """What the extras name has a tested version, so that a set-up next year gives the same packages."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    names = {re.split(r"[\[<>=!~ ]", line)[0].lower().replace("_", "-") for line in wanted} - {"kilotune"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert names - pinned == set()
    assert all(
        re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines if line and not line.startswith("#")
    )
