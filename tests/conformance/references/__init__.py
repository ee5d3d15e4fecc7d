"""What the tests know of a method beside what its class says: a file a method (its presets too), found by itself.

A file may hold CASES (how to configure it), FORMULAS or ON_OUTPUT (what it computes, written again in numpy) and
EXCEPTIONS (what is left out, and why), each by the name that ``get_config`` takes. A method without a file runs on its
class's ``example``, held against its own delta; ``test_tables.py`` asks for the formula.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__all__ = ["collected"]


def collected(table: str) -> dict[Any, Any]:
    """``table`` of all files in one, in the order of the files' names."""
    found: dict[Any, Any] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        for key, value in getattr(importlib.import_module(f"{__name__}.{module.name}"), table, {}).items():
            assert key not in found, f"{table}[{key!r}] stands in two files"
            found[key] = value
    return found
