"""docs/troubleshooting.md begins each entry with words that a message of the library really has."""

from __future__ import annotations

import ast
import re

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"


def told() -> str:
    """All text constants of the library, f-strings with their values left out, in one string."""
    found = []
    for path in sorted((ROOT / "src" / "kilotune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted() -> list[str]:
    return re.findall(r"^\*\*`([^`]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_there_are_twenty() -> None:
    entries = re.findall(r"^\*\*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(entries) >= 20
    assert len(quoted()) >= 17


def test_their_words_are_the_library_s() -> None:
    text = told()
    assert [words for words in quoted() if words not in text] == []


def test_a_message_that_is_not_there_would_be_noticed() -> None:
    assert "the loss has become" not in told()
