"""The house of ARCHITECTURE.md, kept: the level table there is read, and the imports of the code are held to it."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "kilotune"
TOP = 99


class Row(NamedTuple):
    """One line of the table: the level, whether its files stand apart, whether it is only planned."""

    level: int
    apart: bool
    planned: bool


def table(text: str) -> dict[str, Row]:
    """The level table of ARCHITECTURE.md: ``errors`` or ``methods`` -> its row."""
    block = text.split("src/kilotune/\n", 1)[1].split("\n```", 1)[0]
    rows = {}
    for line in block.splitlines():
        match = re.fullmatch(r"  (\S+(?:, \S+)*) {2,}\S.*?( planned)?( apart)? +(top|L\d+)", line)
        assert match, f"ARCHITECTURE.md: this line of the table cannot be read: {line!r}"
        names, planned, apart, level = match.groups()
        for name in names.split(", "):
            key = name.removesuffix("/").removesuffix(".py")
            rows[key] = Row(TOP if level == "top" else int(level[1:]), bool(apart), bool(planned))
    return rows


def part(module: str) -> str:
    """The row that a module belongs to: ``kilotune.methods.lora`` -> ``methods``, ``kilotune`` -> ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def source_modules(package: Path) -> dict[str, Path]:
    """All modules of the package by dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        words = ["kilotune", *path.relative_to(package).with_suffix("").parts]
        found[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return found


@functools.cache
def import_nodes(source: str) -> list[ast.Import | ast.ImportFrom]:
    """All imports of a file, which the tests below read again and again."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]


def imports(module: str, source: str, is_package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module of kilotune) for every import, those inside functions and for types included."""
    home = module.split(".") if is_package else module.split(".")[:-1]
    for node in import_nodes(source):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "kilotune")
        else:
            base = home[: len(home) + 1 - node.level] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            if base[:1] != ["kilotune"]:
                continue
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield node.lineno, whole if whole in known else ".".join(base)


def fault(module: str, other: str, rows: Mapping[str, Row]) -> str | None:
    """Why ``module`` may not import ``other``, or None when it may."""
    unknown = {part(module), part(other)} - set(rows)
    if unknown:
        return f"{', '.join(sorted(unknown))}: not in ARCHITECTURE.md's table"
    mine, theirs = rows[part(module)], rows[part(other)]
    if theirs.level > mine.level:
        return f"level {mine.level} imports level {theirs.level}"
    if theirs.level < mine.level or module == other:
        return None
    if part(module) != part(other):
        return f"both are of level {mine.level}" if mine.apart or theirs.apart else None
    # One package: its __init__ lists the files, and the files share what starts with an underscore.
    shared = other.rsplit(".", 1)[-1].startswith("_")
    if mine.apart and module.count(".") > 1 and not shared:
        return f"the files of {part(module)}/ stand apart"
    return None


def breaches(sources: Mapping[str, tuple[str, bool]], rows: Mapping[str, Row]) -> list[str]:
    """One line per forbidden import. ``sources``: module -> (source, is a package)."""
    found = []
    for module, (source, is_package) in sources.items():
        for line, other in imports(module, source, is_package, set(sources)):
            reason = fault(module, other, rows)
            if reason:
                found.append(f"{module}:{line} imports {other}: {reason}")
    return found


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return table((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sources() -> dict[str, tuple[str, bool]]:
    found = source_modules(PACKAGE)
    return {name: (path.read_text(encoding="utf-8"), path.stem == "__init__") for name, path in found.items()}


def test_each_level_imports_only_from_below(sources: dict[str, tuple[str, bool]], rows: dict[str, Row]) -> None:
    assert breaches(sources, rows) == []


def test_the_table_lists_what_exists_and_marks_what_does_not(
    sources: dict[str, tuple[str, bool]], rows: dict[str, Row]
) -> None:
    there = {part(module) for module in sources}
    assert there - set(rows) == set(), "not in ARCHITECTURE.md's table"
    assert {name for name in there & set(rows) if rows[name].planned} == set(), "marked as planned, but there"
    assert {name for name, row in rows.items() if not row.planned} - there == set(), "in the table, but not there"


@pytest.mark.parametrize(
    ("module", "planted", "reason"),
    [
        ("kilotune.errors", "from .model import PeftModel", "level 0 imports level 6"),
        ("kilotune.errors", "def f():\n    import kilotune.model", "level 0 imports level 6"),
        ("kilotune.layer", "from . import get_peft_model", "level 4 imports level 99"),
        ("kilotune.layer", "from kilotune import inject", "level 4 imports level 5"),
        ("kilotune.methods.vera", "from .lora import LoraConfig", "the files of methods/ stand apart"),
        ("kilotune.methods.vera", "from . import lora", "the files of methods/ stand apart"),
        ("kilotune.methods.vera", "from . import METHODS", "the files of methods/ stand apart"),
        ("kilotune.methods.vera", "from ..kinds.linear import Linear", "both are of level 3"),
        ("kilotune.kinds.linear", "from ..storage import storage_of", "both are of level 3"),
        ("kilotune.storage.dense", "import kilotune.methods._base", "both are of level 3"),
    ],
)
def test_a_planted_breach_is_caught(
    module: str, planted: str, reason: str, sources: dict[str, tuple[str, bool]], rows: dict[str, Row]
) -> None:
    source, is_package = sources[module]
    there = set(breaches(sources, rows))
    found = [b for b in breaches({**sources, module: (f"{source}\n{planted}\n", is_package)}, rows) if b not in there]
    assert len(found) == 1, found
    assert found[0].startswith(f"{module}:"), found
    assert found[0].endswith(reason), found


def test_what_is_allowed_is_not_called_a_breach(sources: dict[str, tuple[str, bool]], rows: dict[str, Row]) -> None:
    allowed = {
        "kilotune.methods.vera": "from ._base import Method\nfrom ..errors import ConfigError\nimport torch",
        "kilotune.methods": "from .lora import Lora",
        "kilotune.deltas": "from .kernels import lowrank",
    }
    for module, added in allowed.items():
        source, is_package = sources[module]
        changed = {**sources, module: (f"{source}\n{added}\n", is_package)}
        assert set(breaches(changed, rows)) <= set(breaches(sources, rows))


# -- sizes and shapes ----------------------------------------------------------------------------------


def long_functions(source: str, limit: int) -> list[str]:
    """Functions whose body has more lines than ``limit``; the signature and the docstring do not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            described = ast.get_docstring(node, clean=False) is not None
            first = node.body[0].end_lineno if described else node.body[0].lineno - 1
            size = (node.end_lineno or 0) - (first or 0)
            if size > limit:
                found.append(f"{node.name}: {size} lines")
    return found


def test_functions_and_files_are_short(sources: dict[str, tuple[str, bool]]) -> None:
    found = [f"{name}.{line}" for name, (source, _) in sources.items() for line in long_functions(source, 50)]
    found += [name for name, (source, _) in sources.items() if source.count("\n") > 500]
    assert found == []


def test_a_long_function_is_found() -> None:
    signature, docstring = "def f(\n    a,\n    b,\n):\n", '    """One.\n\n    Two.\n    """\n'
    body = "    x = 1\n" * 50
    assert long_functions(f"{signature}{docstring}{body}", 50) == []
    assert long_functions(f"{signature}{docstring}{body}    x = 2\n", 50) == ["f: 51 lines"]
    assert long_functions(f"{signature}{body}    x = 2\n", 50) == ["f: 51 lines"]


def open_classes(sources: Mapping[str, str]) -> list[str]:
    """Classes that are neither abstract, nor final, nor inherited from in the library; errors and warnings are free."""
    classes = [
        (name, node)
        for name, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    ]
    inherited = {ast.unparse(base).split("[")[0].split(".")[-1] for _, node in classes for base in node.bases}
    free = {"ABC", "Protocol", "NamedTuple", "TypedDict"}
    found = []
    for name, node in classes:
        bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
        final = any(ast.unparse(decorator).split(".")[-1] == "final" for decorator in node.decorator_list)
        if (
            final
            or node.name in inherited
            or bases & free
            or any(base.endswith(("Error", "Warning")) for base in bases)
        ):
            continue
        found.append(f"{name}.{node.name}")
    return found


def test_classes_are_abstract_or_final(sources: dict[str, tuple[str, bool]]) -> None:
    assert open_classes({name: source for name, (source, _) in sources.items()}) == []


def test_an_open_class_is_found() -> None:
    assert open_classes({"m": "class A: ...\nclass B(A): ...\n@final\nclass C: ...\nclass D(ABC): ..."}) == ["m.B"]
