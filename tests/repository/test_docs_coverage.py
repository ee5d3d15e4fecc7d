"""A public name that the API page does not describe fails, and so does a description of nothing."""

from __future__ import annotations

import importlib
import re

import pytest

import kilotune
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "api.md"
DIRECTIVE = re.compile(r"^\.\. (?:auto\w+|py:data):: (\w+)", re.MULTILINE)
# Modules whose __all__ is public beside the names of kilotune itself.
PUBLIC_MODULES = (
    "kilotune.convert",
    "kilotune.errors",
    "kilotune.fleet.store",
    "kilotune.plan",
    "kilotune.model.parameter_report",
    "kilotune.train",
)


def described(page: str) -> set[str]:
    """The full names that the page describes."""
    found = set()
    module = ""
    for line in page.splitlines():
        current = re.match(r"\.\. currentmodule:: (\S+)", line)
        module = current.group(1) if current else module
        directive = DIRECTIVE.match(line)
        if directive:
            found.add(f"{module}.{directive.group(1)}")
    return found


def public() -> set[str]:
    """The full names that must be described: a name that kilotune gives again counts there only."""
    names = {f"kilotune.{name}" for name in kilotune.__all__ if not name.startswith("__")}
    for module in PUBLIC_MODULES:
        own = importlib.import_module(module).__all__
        names |= {f"{module}.{name}" for name in own if name not in kilotune.__all__}
    return names


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_every_public_name_is_described(page: str) -> None:
    assert sorted(public() - described(page)) == []


def test_everything_described_exists(page: str) -> None:
    missing = []
    for name in sorted(described(page)):
        module, _, attribute = name.rpartition(".")
        if not hasattr(importlib.import_module(module), attribute):
            missing.append(name)
    assert missing == []


def test_a_name_taken_off_the_page_is_noticed(page: str) -> None:
    shorter = page.replace(".. autofunction:: get_peft_model", "")
    assert described(page) - described(shorter) == {"kilotune.get_peft_model"}
    assert "kilotune.get_peft_model" in public() - described(shorter)


def test_every_public_name_has_a_docstring() -> None:
    bare = []
    for name in sorted(public()):
        module, _, attribute = name.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        if (callable(value) or isinstance(value, type)) and not (value.__doc__ or "").strip():
            bare.append(name)
    assert bare == []
