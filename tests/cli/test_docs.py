"""docs/cli.md: what stands there under a command is what the command prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.cli_helpers import kilotune
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "cli.md"


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def said(command: str) -> str:
    words = shlex.split(command.removeprefix("$ "))
    assert words[0] == "kilotune"
    result = kilotune(*words[1:])
    return "\n".join(line.rstrip() for line in (result.stdout + result.stderr).splitlines())


def test_the_page_is_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in fenced("python"):
        exec(compile(block, str(PAGE), "exec"), {})
    for block in fenced("console"):
        parts = re.split(r"^(\$ .*)\n", block, flags=re.MULTILINE)[1:]
        for command, shown in zip(parts[::2], parts[1::2], strict=True):
            assert shown.strip() == said(command).strip(), command


def test_the_numbers_of_the_paper_are_on_the_page() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    for shown in (
        "75,497,472",
        "2,362,368",
        "302 MB",
        "9.45 MB",
        "302 TB",
        "9.45 TB",
        "prints 2.8M",
        "9,120",
        "49,524",
    ):
        assert shown in text
