"""``import peft`` gives ``kilotune.peft``, for every module of it; the PEFT that is installed is never imported.

A module of the alias is a front: reading, setting and deleting its names goes to the module of ``kilotune.peft``. A
name that PEFT's module has (read from PEFT's sources, not from a list) and kilotune's does not is a stub, so that
test files that import it can be collected; using a stub raises ``LeftOut``.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ALIAS = "peft"


class LeftOut(NotImplementedError):
    """A test used what PEFT has and kilotune.peft does not."""


class _Stub(type):
    """The metaclass of stubs: they are classes, so they can stand in isinstance(), in a list of cases, as a base."""

    inert = False  # while test files are collected, whose lists of cases hold ready-made configs

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if _Stub.inert:
            made: Any = cls
            return made.__new__(made)
        raise LeftOut(f"{ALIAS}.{cls.__name__} is left out of kilotune.peft")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise LeftOut(f"{ALIAS}.{cls.__name__}.{name} is left out of kilotune.peft")


@functools.cache
def stub(name: str) -> type:
    """The one stub of a name."""
    base = Warning if name.endswith("Warning") else Exception if name.endswith("Error") else object
    return _Stub(name, (base,), {"__module__": f"{ALIAS}.left_out"})


@contextmanager
def inert_stubs() -> Iterator[None]:
    """Let stubs be called meanwhile; what they give can do nothing."""
    _Stub.inert = True
    try:
        yield
    finally:
        _Stub.inert = False


def not_here(*args: Any, **kwargs: Any) -> bool:
    """What PEFT's ``is_..._available()`` answers for a library that kilotune.peft knows nothing of."""
    return False


def top_names(nodes: Sequence[ast.stmt]) -> Iterator[str]:
    """The names that statements at the top of a module define, within if and try too."""
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            yield from top_names([*node.body, *node.orelse])


class Names:
    """What PEFT's modules are called and define, by their source."""

    def __init__(self, package: Path) -> None:
        self.package = package

    def path(self, module: str) -> Path | None:
        """The file of a module, or None where PEFT has no such one."""
        place = self.package.joinpath(*module.split(".")[1:])
        files = (place / "__init__.py", place.with_suffix(".py"))
        return next((path for path in files if path.exists()), None)

    def of(self, module: str) -> frozenset[str]:
        """The names of a module."""
        path = self.path(module)
        return frozenset(top_names(ast.parse(path.read_text(encoding="utf-8")).body) if path else ())


def given(target: str) -> ModuleType | None:
    """A module of ours, or None where there is none; a fault inside it is raised."""
    try:
        found = importlib.util.find_spec(target)
    except ModuleNotFoundError as error:
        if error.name is not None and (target == error.name or target.startswith(f"{error.name}.")):
            return None
        raise
    return importlib.import_module(target) if found else None


class Front(ModuleType):
    """A module of the alias."""

    def __init__(self, name: str, target: str, names: frozenset[str]) -> None:
        super().__init__(name)
        super().__setattr__("_front", (target, given(target), names))
        super().__setattr__("__path__", [])

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """That of the module behind it, which mock.patch() looks into."""
        real = object.__getattribute__(self, "_front")[1]
        return {} if real is None else vars(real)

    def __getattr__(self, name: str) -> Any:
        target, real, names = object.__getattribute__(self, "_front")
        try:
            value = getattr(real, name)
        except (AttributeError, ImportError):
            if name in names and not name.startswith("__"):
                return not_here if name.startswith("is_") and name.endswith("_available") else stub(name)
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None
        top = target.split(".", 1)[0] + "."
        inside = isinstance(value, ModuleType) and value.__name__.startswith(f"{target}.") and target.startswith(top)
        return importlib.import_module(self.__name__ + value.__name__[len(target) :]) if inside else value

    def __setattr__(self, name: str, value: Any) -> None:
        real = object.__getattribute__(self, "_front")[1]
        if real is None or isinstance(value, Front) or (name.startswith("__") and name.endswith("__")):
            super().__setattr__(name, value)
        else:
            setattr(real, name, value)

    def __delattr__(self, name: str) -> None:
        real = object.__getattribute__(self, "_front")[1]
        if real is not None and hasattr(real, name):
            delattr(real, name)
        else:
            super().__delattr__(name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(object.__getattribute__(self, "_front")[1]), *super().__dir__()})


class Finder(MetaPathFinder, Loader):
    """Finds ``peft`` and all beneath it."""

    def __init__(self, target: str, names: Names) -> None:
        self.target, self.names = target, names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """A spec for a module that kilotune.peft or PEFT has."""
        if fullname != ALIAS and not fullname.startswith(f"{ALIAS}."):
            return None
        known = self.names.path(fullname) is not None or given(self.target + fullname[len(ALIAS) :]) is not None
        return ModuleSpec(fullname, self, is_package=True, origin="kilotune's alias") if known else None

    def create_module(self, spec: ModuleSpec) -> Front:
        """The front of a module."""
        return Front(spec.name, self.target + spec.name[len(ALIAS) :], self.names.of(spec.name))

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: the module behind it was run when it was imported."""


def install(package: Path, target: str = "kilotune.peft") -> Finder:
    """Put the alias before all other finders.

    Raises:
        ImportError: PEFT was imported before, or there is no ``target``.

    """
    there = [name for name in sys.modules if name == ALIAS or name.startswith(f"{ALIAS}.")]
    if there:
        raise ImportError(f"{there[0]} was imported before the alias was installed")
    if given(target) is None:
        raise ImportError(f"there is no {target}")
    finder = Finder(target, Names(package))
    sys.meta_path.insert(0, finder)
    return finder
