"""What there is by name, known without importing torch: for help texts, completion and the checks of settings.

known_names.json is written by ``python scripts/known_names.py`` from the methods' configs and the built-in models, the
home of all that it says; ``tests/repository/test_known_names.py`` fails where it is not what they say.

A name that is listed is there. One that is not may be there all the same (:func:`may_be_method`): only
``kilotune.methods``, whose import takes seconds, then says it.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = [
    "CONFIG_NAMES",
    "DTYPE_NAMES",
    "METHOD_OPTIONS",
    "MODEL_NAMES",
    "PRESETS_OF",
    "PRESET_NAMES",
    "may_be_method",
    "may_be_option",
    "methods_are_loaded",
]

DTYPE_NAMES = ("float32", "bfloat16", "float16")
"""The dtypes that the weights of a base can be held in."""

_HERE = Path(__file__).parent
_LISTED = json.loads((_HERE / "known_names.json").read_text(encoding="utf-8"))

METHOD_OPTIONS: Mapping[str, Mapping[str, str]] = _LISTED["methods"]
"""Method -> its own options -> their help texts; the options that all methods have are AdapterConfig's."""

CONFIG_NAMES: Mapping[str, str] = _LISTED["configs"]
"""Method -> the name of its configuration's class."""

PRESETS_OF: Mapping[str, str] = _LISTED["presets"]
"""Another name that a method can be picked by -> the method."""

PRESET_NAMES: tuple[str, ...] = tuple(PRESETS_OF)
"""These other names."""

MODEL_NAMES: tuple[str, ...] = tuple(_LISTED["models"])
"""The models that ``kilotune plan`` has built in."""


def methods_are_loaded() -> bool:
    """Whether ``kilotune.methods`` is imported: to ask it costs nothing then, and a program may have added to it."""
    return "kilotune.methods" in sys.modules


def may_be_method(name: str) -> bool:
    """Whether a name that is not listed may be a method or a preset all the same: where :func:`methods_are_loaded`, or
    where the code of methods/ has it as a text, so that it can have come since the list was written."""
    return _may_be(rf'"{re.escape(name)}"')


def may_be_option(name: str) -> bool:
    """The same for an option of a method, which the code has as a field with a default."""
    return _may_be(rf"^    {re.escape(name)}: .*=")


def _may_be(pattern: str) -> bool:
    return methods_are_loaded() or _code() == "" or re.search(pattern, _code(), re.MULTILINE) is not None


@functools.cache
def _code() -> str:
    """The code of methods/; empty where only what is made of it is installed."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((_HERE / "methods").glob("*.py")))
