"""The pages on fine-tuning: what they tell people to type is run, in a short form, on tiny models."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from kilotune.methods import METHODS
from kilotune.train.settings.config_file import starting_text
from kilotune.train.settings.rates import WITHOUT_ADAPTER, usual
from tests.support.cli_helpers import kilotune
from tests.support.paths import ROOT
from tests.support.train_support import model_folder, prompts, write_jsonl

DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHORT = ["--set", "training.max_steps=2", "--set", "training.device=cpu", "--set", "logging.report=false"]


def run_the_page(name: str) -> list[str]:
    """Run Python and commands in the order of the page; returns the verbs that were run."""
    verbs = []
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, body in FENCE.findall((DOCS / name).read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(body, name, "exec"), names)
        for line in body.splitlines() if language == "bash" else ():
            words = shlex.split(line)
            if words[0] != "kilotune":
                assert words[:2] == ["pip", "install"], line
                continue
            verbs.append(words[1])
            # Only a training of its own is cut short: one that is gone on with has its settings already.
            more = [*SHORT, "--progress", "quiet"] if words[1] == "train" and "--resume" not in words else []
            done = kilotune(*words[1:], *more) if words[1] != "chat" else talk(words[1:])
            assert done.exit_code == 0, (line, done.stderr)
    return verbs


def talk(words: list[str]) -> Any:
    """``kilotune chat`` with one message typed in."""
    from typer.testing import CliRunner

    from kilotune.cli.main import app

    done = CliRunner().invoke(app, [*words, "--max-tokens", "4"], input="the cat\n", catch_exceptions=False)
    assert done.stdout.strip(), "an answer"
    return done


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.full
def test_the_tutorials(folder: Path) -> None:
    for kind in ("llama", "bert", "vit"):
        shutil.copytree(model_folder(kind), folder / "models" / kind)
    verbs = run_the_page("tutorials.md")
    assert verbs == ["train", "train", "generate", "init", "train", "evaluate", "train", "evaluate"]
    for name in ("answers", "topics", "photos-vera"):
        assert (folder / name / "adapter_model.safetensors").is_file()


@pytest.mark.heavy
def test_the_three_commands_and_the_rest_of_the_page(folder: Path) -> None:
    shutil.copytree(model_folder("llama"), folder / "path" / "to" / "model")
    write_jsonl(folder / "rows.jsonl", prompts(8))
    verbs = run_the_page("training.md")
    assert verbs[:2] == ["train", "chat"], "with pip install before them: three commands"
    assert verbs[2:] == ["init", "train", "train"]


def test_the_table_of_rates_is_the_library_s() -> None:
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    table = text.split("| method | at 100 steps | power |")[1].split("\n\n")[0]
    found = {}
    for names, rate, power in re.findall(r"^\| ([^|]*`[^|]*) \| ([^|]*) \| ([^|]*) \|", table, re.MULTILINE):
        found |= {name: (float(rate), float(power)) for name in re.findall(r"`(\w+)`", names)}
    assert found == {name: usual(name) for name in found}
    assert {*METHODS, *WITHOUT_ADAPTER} <= set(found)


def test_a_starting_file_for_every_reader() -> None:
    assert "docs/training.md" in starting_text({})
