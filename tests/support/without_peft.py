"""A plugin of pytest for a run in which PEFT is not installed: ``python -m pytest -p without_peft`` with tests/ in
PYTHONPATH. Neither an import finds it, nor a look at the installed packages.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "peft"


class Without:
    """One of Python's finders, which finds everything but PEFT."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found: ModuleSpec | None = self.finder.find_spec(name, path, target)
        return None if name.partition(".")[0] == PACKAGE else found

    def find_distributions(self, context: Any = None) -> Iterator[Any]:
        """What ``importlib.metadata`` is told: the installed packages."""
        given = () if context is None else (context,)
        return (found for found in self.finder.find_distributions(*given) if found.metadata["Name"] != PACKAGE)


assert PACKAGE not in sys.modules
sys.meta_path[:] = [Without(f) if f is importlib.machinery.PathFinder else f for f in sys.meta_path]  # type: ignore[misc]
