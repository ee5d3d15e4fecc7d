"""`kilotune doctor`, and what the shell offers for words that are half typed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from kilotune.cli import doctor
from kilotune.cli._app import VERBS
from kilotune.methods import METHODS, PRESETS
from kilotune.plan import BUILT_IN
from tests.support.cli_helpers import as_json, kilotune
from tests.support.paths import ROOT


def named() -> dict[str, Requirement]:
    """What the extras for users name, from pyproject.toml itself."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for extra, own in extras.items() if extra not in doctor.NOT_FOR_USERS for line in own]
    made = [Requirement(line) for line in lines]
    return {re.sub(r"[-_.]+", "-", r.name).lower(): r for r in made if r.name != "kilotune"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = as_json("doctor")
    return found


def test_versions_and_devices(document: dict[str, Any]) -> None:
    assert document["kilotune"] == importlib.metadata.version("kilotune")
    assert (document["python"], document["torch"]) == (platform.python_version(), torch.__version__)
    cpu = document["devices"][0]
    assert (cpu["kind"], cpu["name"]) == ("cpu", "CPU")
    assert 0 < cpu["free"] < cpu["total"] <= psutil.virtual_memory().total
    assert f"{os.cpu_count()} cores" in cpu["notes"]
    assert sum(device["kind"] == "cuda" for device in document["devices"]) == torch.cuda.device_count()


def test_every_package_of_an_extra_is_there_with_what_it_is_for(document: dict[str, Any]) -> None:
    assert set(doctor.FOR) == set(named()), "cli/doctor.py says what each package is for"
    found = {package["name"]: package for package in document["packages"]}
    assert set(found) == set(named())
    for name, package in found.items():
        assert package["purpose"]
        assert package["state"] == "ok", package
        assert package["version"] == importlib.metadata.version(name)
    assert document["problems"] == []


def test_each_package_is_told_with_an_extra_that_names_it_itself(document: dict[str, Any]) -> None:
    """Not with one that has it through another: all of `ray` is not what transformers needs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    own = {
        extra: {re.sub(r"[-_.]+", "-", Requirement(line).name).lower() for line in lines}
        for extra, lines in extras.items()
    }
    told = {package["name"]: package["extra"] for package in document["packages"]}
    assert [name for name, extra in told.items() if name not in own[extra]] == []
    wanted = {"ray": "ray", "fastapi": "serve", "transformers": "transformers", "accelerate": "train", "typer": "cli"}
    assert {name: told[name] for name in wanted} == wanted


def test_the_tables_are_for_people() -> None:
    result = kilotune("doctor")
    assert result.exit_code == 0
    for text in ("CPU", "transformers", importlib.metadata.version("transformers"), "Nothing is broken."):
        assert text in result.stdout


def planted(folder: Path, name: str, version: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of this name, installed before the real one."""
    module = doctor.MODULES.get(name, name.replace("-", "_"))
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(body)
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for loaded in [m for m in sys.modules if m.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.syspath_prepend(str(folder))


def test_a_broken_package_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(tmp_path, "gguf", "0.19.0", "raise OSError('libgguf.so: wrong ELF class')", monkeypatch)
    result = kilotune("doctor", "--json")
    assert result.exit_code == 1
    assert "gguf 0.19.0 cannot be imported (OSError: libgguf.so: wrong ELF class)" in result.stdout
    assert "kilotune export to llama.cpp" in kilotune("doctor").stdout


def test_a_version_outside_the_range_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(tmp_path, "gguf", "0.0.1", "", monkeypatch)
    result = kilotune("doctor", "--json")
    assert result.exit_code == 1
    line = "gguf 0.0.1 is not one of the versions that kilotune is made for (>=0.17): pip install 'kilotune[export]'"
    assert line in result.stdout


def test_what_a_package_says_while_it_is_imported_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = "import sys, warnings\nprint('hello')\nprint('hello', file=sys.stderr)\nwarnings.warn('hello')\n"
    planted(tmp_path, "gguf", "0.19.0", noise, monkeypatch)
    assert {p.name: p.state for p in doctor.packages_here()}["gguf"] == "ok"
    assert "hello" not in "".join(capfd.readouterr())


def test_a_missing_package_costs_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("gguf", "pyarrow"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = kilotune("doctor")
    assert result.exit_code == 0, "what is optional may be missing"
    text = " ".join(result.stdout.split())
    assert (
        "To have more: pip install 'kilotune[export]' for gguf (models in GGUF files, kilotune export to llama.cpp)"
        in text
    )
    assert "To have more: pip install 'kilotune[train]' for pyarrow (Parquet files)" in text


def test_a_gpu_that_torch_does_not_see_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = [doctor.Device("CPU", "cpu", 1, 1, "")]
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: True)
    assert any("there is an NVIDIA GPU, and torch" in line for line in doctor._advice([], cpu))
    gpu = doctor.Device("GPU", "cuda", 1, 1, "")
    assert not any("NVIDIA" in line for line in doctor._advice([], [*cpu, gpu]))


# -- completion ----------------------------------------------------------------------------------------


def offered(*words: str) -> list[str]:
    """What bash is offered for the last word, by the installed command in a process of its own."""
    from typer.testing import CliRunner

    from kilotune.cli.main import app

    environment = {"_KILOTUNE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["kilotune", *words])}
    environment["COMP_CWORD"] = str(len(words))
    result = CliRunner().invoke(app, [], prog_name="kilotune", env=environment)
    return result.stdout.split()


def test_verbs_options_and_values_are_offered() -> None:
    assert set(offered("")) == set(VERBS)
    assert offered("doc") == ["doctor"]
    assert offered("doctor", "--j") == ["--json"]
    assert set(offered("plan", "--method", "v")) == {name for name in (*METHODS, *PRESETS) if name.startswith("v")}
    assert offered("plan", "llama-3.2-1") == ["llama-3.2-1b"]
    assert set(BUILT_IN) <= set(offered("plan", ""))
    assert offered("train", "--task", "seq") == ["seq2seq"]
    assert offered("train", "--method", "hea") == ["head"]
    assert offered("train", "--set", "training.warm") == ["training.warmup="]


def test_the_shell_gets_its_script_from_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import shellingham

    monkeypatch.setattr(shellingham, "detect_shell", lambda *_: ("bash", "/bin/bash"))
    result = kilotune("--show-completion")
    assert result.exit_code == 0, result.stderr
    assert "_KILOTUNE_COMPLETE=complete_bash" in result.stdout
