"""The tower of ARCHITECTURE.md, kept: the table there is read, and the imports of the code are held to it.

All imports count: those inside functions and those for types only, too.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "src" / "kilotune"
Floor = tuple[float, ...]
TOP: Floor = (float("inf"),)
Sources = Mapping[str, tuple[str, bool]]  # module -> (source, is a package)


class Room(NamedTuple):
    """One line of the table: its name there, the floor, whether its files stand apart."""

    name: str
    floor: Floor
    apart: bool


def table(text: str) -> dict[str, Room]:
    """The table of ARCHITECTURE.md: dotted name -> room; ``train.settings`` for ``train/settings/``, '' for the top."""
    block = text.split("| floor | room |", 1)[1].split("\n\n", 1)[0]
    rooms = {}
    for line in block.splitlines()[2:]:
        match = re.fullmatch(r"\| (top|[\d.]+) \| `([\w/.]+)`( apart)? \| \S.* \|", line)
        assert match, f"ARCHITECTURE.md: this line of the table cannot be read: {line!r}"
        floor, name, apart = match.groups()
        key = name.removesuffix(".py").removesuffix("/").replace("/", ".").removesuffix("__init__")
        assert key not in rooms, f"ARCHITECTURE.md: {name} stands twice in the table"
        rooms[key] = Room(name, TOP if floor == "top" else tuple(map(float, floor.split("."))), bool(apart))
    return rooms


def room_of(module: str, rooms: Mapping[str, Room]) -> Room | None:
    """The room that a module belongs to: that with the longest name that it begins with."""
    words = module.split(".")[1:]
    return next(
        (rooms[key] for n in range(len(words), -1, -1) if (key := ".".join(words[:n])) in rooms and n > 0),
        rooms.get("") if not words else None,
    )


def floor_of(module: str, room: Room, rooms: Mapping[str, Room]) -> Floor:
    """The floor of a module. The ``__init__`` of a room that is made of rooms stands above all of these."""
    divided = any(key.startswith(module.partition(".")[2] + ".") for key in rooms) and room.floor is not TOP
    own = rooms.get(module.partition(".")[2])
    return (*room.floor, float("inf")) if divided and own == room and not room.apart else room.floor


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
            for alias in node.names:
                if alias.name.split(".")[0] == "kilotune":
                    yield node.lineno, alias.name
                    if alias.asname is None:  # it binds `kilotune`, of which any name can then be had
                        yield node.lineno, "kilotune"
        else:
            base = home[: len(home) + 1 - node.level] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            if base[:1] != ["kilotune"]:
                continue
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield node.lineno, whole if whole in known else ".".join(base)


def shown(floor: Floor) -> str:
    """A floor as the table writes it."""
    return "the top" if floor == TOP else f"floor {'.'.join(f'{n:g}' for n in floor if n != float('inf'))}"


# Who imports by a name that is known only when it runs, and what.
BY_NAME = {
    "kilotune._lazy": "a package's own public names, when they are asked for",
    "kilotune._ui.pages": "optional packages, to see whether they are there",
    "kilotune.cli._app": "a verb, when it is asked for",
    "kilotune.cli.doctor": "optional packages, to see whether they are there",
    "kilotune.peft.auto": "the class of transformers that an adapter's file names",
    "kilotune.peft.in_place": "kilotune.peft's own modules, under PEFT's names",
    "kilotune.train.results.report": "optional packages, to see whether they are there",
    "kilotune.vllm.plugin": "a module of vLLM",
}


def by_name(source: str) -> list[int]:
    """Lines that import by name, which the arrows do not show."""
    names = {"import_module", "__import__"}
    found = []
    for node in ast.walk(ast.parse(source)):
        named = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        named += [getattr(node, "id", ""), getattr(node, "attr", "")]
        found += [node.lineno] if isinstance(node, (ast.expr, ast.ImportFrom)) and names & set(named) else []
    return sorted(found)


def fault(module: str, other: str, rooms: Mapping[str, Room]) -> str | None:
    """Why ``module`` may not import ``other``, or None when it may."""
    mine, theirs = room_of(module, rooms), room_of(other, rooms)
    if mine is None or theirs is None:
        return f"{module if mine is None else other}: not in ARCHITECTURE.md's table"
    here, there = floor_of(module, mine, rooms), floor_of(other, theirs, rooms)
    if mine.name.partition("/")[0] != theirs.name.partition("/")[0]:
        here, there = here[:1], there[:1]  # 14.1 is no higher than 14
    if mine.apart and theirs.apart and mine != theirs:
        return f"{mine.name} and {theirs.name} stand apart"
    if there > here:
        return f"{shown(here)} imports {shown(there)}"
    if mine != theirs:
        return f"both are of {shown(here)}" if here == there else None
    # One room: its __init__ lists the files, and the files share what starts with an underscore.
    is_listing = module == "kilotune." + mine.name.rstrip("/").replace("/", ".")
    if mine.apart and module != other and not is_listing and not other.rsplit(".", 1)[-1].startswith("_"):
        return f"the files of {mine.name} stand apart"
    return None


def breaches(sources: Sources, rooms: Mapping[str, Room]) -> list[str]:
    """One line per forbidden import."""
    found = []
    for module, (source, is_package) in sources.items():
        for line, other in imports(module, source, is_package, set(sources)):
            reason = fault(module, other, rooms)
            if reason:
                found.append(f"{module}:{line} imports {other}: {reason}")
    return found


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """A circle of arrows, its first once more at its end; empty where there is none."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def file_arrows(sources: Sources) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    return {
        module: {other for _, other in imports(module, source, is_package, set(sources)) if other != module}
        for module, (source, is_package) in sources.items()
    }


def room_arrows(sources: Sources, rooms: Mapping[str, Room]) -> dict[str, set[str]]:
    """Room -> the rooms that its files import from."""
    arrows: dict[str, set[str]] = {}
    for module, others in file_arrows(sources).items():
        mine = room_of(module, rooms)
        for theirs in (room_of(other, rooms) for other in others):
            if mine is not None and theirs is not None and mine != theirs:
                arrows.setdefault(mine.name, set()).add(theirs.name)
    return arrows


@pytest.fixture(scope="module")
def rooms() -> dict[str, Room]:
    return table((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sources() -> dict[str, tuple[str, bool]]:
    found = source_modules(PACKAGE)
    return {name: (path.read_text(encoding="utf-8"), path.stem == "__init__") for name, path in found.items()}


def with_line(sources: Sources, module: str, line: str) -> dict[str, tuple[str, bool]]:
    """The sources with a line at the end of one of them."""
    source, is_package = sources[module]
    return {**sources, module: (f"{source}\n{line}\n", is_package)}


def test_each_floor_imports_only_from_below(sources: Sources, rooms: dict[str, Room]) -> None:
    assert breaches(sources, rooms) == []


def test_nobody_imports_by_name_past_the_table(sources: Sources) -> None:
    assert {name for name, (source, _) in sources.items() if by_name(source)} == set(BY_NAME)
    assert by_name("import importlib\nimportlib.import_module('kilotune.model.peft_model')") == [2]
    assert by_name("from importlib import import_module as load\n__import__('kilotune')") == [1, 2]


def test_no_files_and_no_rooms_import_in_a_circle(sources: Sources, rooms: dict[str, Room]) -> None:
    assert circle(file_arrows(sources)) == []
    assert circle(room_arrows(sources, rooms)) == []


def test_the_table_lists_what_exists(sources: Sources, rooms: dict[str, Room]) -> None:
    assert [name for name in sources if room_of(name, rooms) is None] == [], "not in ARCHITECTURE.md's table"
    gone = [room.name for key, room in rooms.items() if f"kilotune.{key}".rstrip(".") not in sources]
    assert gone == [], "in the table, but not there"


def test_a_room_of_rooms_has_no_loose_files(sources: Sources, rooms: dict[str, Room]) -> None:
    """What lies in train/ beside its rooms stands in the table itself."""
    divided = {key.rpartition(".")[0] for key in rooms if "." in key} - {"storage"}
    loose = [name for name in sources if name.count(".") > 1 and name.partition(".")[2].rpartition(".")[0] in divided]
    assert [name for name in loose if name.partition(".")[2] not in rooms] == []


@pytest.mark.parametrize(
    ("module", "planted", "reason"),
    [
        ("kilotune.errors", "from .model.peft_model import PeftModel", "floor 1 imports floor 10"),
        ("kilotune.errors", "def f():\n    import kilotune.model.peft_model as m", "floor 1 imports floor 10"),
        ("kilotune.kernels.ways", "import kilotune.errors\nkilotune.get_peft_model", "floor 3 imports the top"),
        ("kilotune.errors", "if TYPE_CHECKING:\n    from .config import AdapterConfig", "floor 1 imports floor 2"),
        ("kilotune.layers.adapted", "from .. import get_peft_model", "floor 7 imports the top"),
        ("kilotune.layers.adapted", "from kilotune.injection import inject", "floor 7 imports floor 8"),
        ("kilotune.layers.slot", "from ..injection.tree import wrappers", "floor 7 imports floor 8"),
        ("kilotune.methods.vera", "from .lora import LoraConfig", "the files of methods/ stand apart"),
        ("kilotune.methods.vera", "from . import lora", "the files of methods/ stand apart"),
        ("kilotune.methods.vera", "from . import METHODS", "the files of methods/ stand apart"),
        ("kilotune.methods.vera", "from ..kinds.linear import Linear", "methods/ and kinds/ stand apart"),
        ("kilotune.kinds.linear", "from ..storage import storage_of", "kinds/ and storage/ stand apart"),
        ("kilotune.storage.dense", "from ..methods import _base", "storage/ and methods/ stand apart"),
        ("kilotune.storage.sharded", "from .dense import Dense", "floor 1 imports floor 2"),
        ("kilotune.convert", "from .plan import costs", "both are of floor 11"),
        ("kilotune.train.data.rows", "from ..tasks import TASKS", "floor 12.2 imports floor 12.3"),
        ("kilotune.train.data.rows", "def f():\n    from .. import train", "floor 12.2 imports floor 12"),
        ("kilotune.train.trainer.stopping", "from ..run import train", "floor 12.4 imports floor 12.8"),
        ("kilotune.train.tasks.causal_lm", "from . import regression", "the files of train/tasks/ stand apart"),
        ("kilotune.fleet.store.sql", "from ..bank.adapter_bank import AdapterBank", "both are of floor 13.1"),
        ("kilotune.serve.engine.sampling", "from ..http.keys import Keys", "floor 14.1 imports floor 14.3"),
        ("kilotune.serve.engine.sampling", "from ...vllm import gate", "both are of floor 14"),
        ("kilotune.experiments.cnn.page", "from ..compare import report", "both are of floor 15.2"),
    ],
)
def test_a_planted_breach_is_caught(
    module: str, planted: str, reason: str, sources: Sources, rooms: dict[str, Room]
) -> None:
    there = set(breaches(sources, rooms))
    found = [b for b in breaches(with_line(sources, module, planted), rooms) if b not in there]
    assert len(found) == 1, found
    assert found[0].startswith(f"{module}:"), found
    assert found[0].endswith(reason), found


def test_a_planted_circle_is_caught(sources: Sources, rooms: dict[str, Room]) -> None:
    """Between files of one room, and between rooms that the floors alone would not tell."""
    planted = with_line(sources, "kilotune.layers.slot", "from .route import Route")
    assert breaches(planted, rooms) == []
    found = circle(file_arrows(planted))
    assert found[0] == found[-1]
    assert set(found) == {"kilotune.layers.slot", "kilotune.layers.route"}
    planted = with_line(sources, "kilotune.train.settings.fields", "from ..tasks import TASKS")
    found = circle(room_arrows(planted, rooms))
    assert found[0] == found[-1]
    assert {"train/settings/", "train/tasks/"} <= set(found)


def test_what_is_allowed_is_not_called_a_breach(sources: Sources, rooms: dict[str, Room]) -> None:
    allowed = {
        "kilotune.methods.vera": "from ._base import Method\nfrom ..errors import ConfigError\nimport torch",
        "kilotune.methods": "from .lora import Lora",
        "kilotune.methods.lora": "from ..storage.sharded import whole",
        "kilotune.deltas": "from .kernels import lowrank",
        "kilotune.train": "if TYPE_CHECKING:\n    from .run import train",
        "kilotune.cli.train": "from ..train import train",
    }
    for module, added in allowed.items():
        assert set(breaches(with_line(sources, module, added), rooms)) <= set(breaches(sources, rooms))


def test_each_room_says_what_it_is(sources: Sources) -> None:
    """The docstring of a folder has two to six lines: what lives here, what it may import, where to begin reading."""
    found = []
    for name, (source, is_package) in sources.items():
        text = ast.get_docstring(ast.parse(source)) if is_package and name != "kilotune" else None
        if is_package and name != "kilotune":
            lines = [line for line in (text or "").split("::")[0].splitlines() if line.strip()]
            found += [] if 2 <= len(lines) <= 6 else [f"{name}: {len(lines)} lines"]
    assert found == []


def test_public_names_are_listed_alike(sources: Sources) -> None:
    """A lazy package names each public name for types, in ``__all__`` and with its home; none hides a submodule."""
    lazy = {name: source for name, (source, _) in sources.items() if "__dir__ = lazy(" in source}
    assert {"kilotune", "kilotune.train", "kilotune.fleet", "kilotune.fleet.store"} <= set(lazy)
    for name, source in lazy.items():
        typed = {
            (node.module, alias.name)
            for node in import_nodes(source)
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.col_offset  # under TYPE_CHECKING
            for alias in node.names
        }
        call = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "lazy")
        homes = {(home, public) for home, names in ast.literal_eval(call.args[1]).items() for public in names}
        package = __import__(name, fromlist=["__all__"])
        assert typed == homes, name
        assert sorted(public for _, public in homes) == sorted(package.__all__), name
        assert [public for _, public in homes if f"{name}.{public}" in sources] == [], name


def named_in_walks(page: str) -> tuple[set[str], set[tuple[str, str]]]:
    """The files and folders that ARCHITECTURE.md names, and the (file, name in it) pairs."""
    text = " ".join(page.split())
    places = set(re.findall(r"`([\w/]+/|[\w/]+\.py)`", text))
    pairs = {(file, name) for file, name in re.findall(r"`([\w/]+\.py)` `([\w.]+)`", text)}
    return places, pairs


def lost(page: str, package: Path) -> list[str]:
    """What of it is not in the package, nor in the repository."""
    places, pairs = named_in_walks(page)
    files = {place for place in places if not (package / place).exists() and not (ROOT / place).exists()}
    shared = {place for place in files if "/" not in place and list(package.rglob(place))}
    names = [
        f"{file}: {name}"
        for file, name in sorted(pairs)
        if (package / file).exists()
        and not re.search(rf"\b(?:class|def) {name.rpartition('.')[2]}\b", (package / file).read_text(encoding="utf-8"))
    ]
    return [*sorted(files - shared), *names]


def test_what_the_walks_name_is_there() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert len(named_in_walks(page)[1]) > 30
    assert lost(page, PACKAGE) == []
    assert lost(page.replace("`parse`", "`no_such_name`"), PACKAGE) == ["adapter_files/reading.py: no_such_name"]
    assert lost(page.replace("`fleet/stepper/losses.py`", "`fleet/losses_gone.py`"), PACKAGE) == [
        "fleet/losses_gone.py"
    ]


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
