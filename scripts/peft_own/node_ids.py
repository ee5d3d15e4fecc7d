"""Lists of node ids as files that can be read and compared: a file of PEFT's a file of ours, tests by their parameters.

    TestPeftCustomModel::test_merge_layers
    TestPeftCustomModel::test_generate
      [Vanilla MLP 1 LoRA-MLP-LoraConfig-config_kwargs20]
      [Vanilla MLP 2 LoRA-MLP-LoraConfig-config_kwargs21]

says four node ids: the tests of a block have all of the parameters beneath them. One without parameters stands alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path


def split(nodeid: str) -> tuple[str, str, str]:
    """(file, test, parameters with their brackets) of ``test_x.py::Class::test[a-b]``."""
    file, _, rest = nodeid.partition("::")
    test, bracket, parameters = rest.partition("[")
    return file, test, bracket + parameters


def unnumbered(nodeid: str) -> str:
    """A node id without the numbers that pytest gives to configs and their options, which have no name."""
    return re.sub(r"(kwargs|config)[0-9]+(?=[-\]])", r"\1", nodeid)


def found(listed: Iterable[str], collected: Sequence[str]) -> dict[str, str]:
    """Collected node ids, and what the list calls them.

    Where PEFT makes cases of all of its classes that have something, kilotune.peft has fewer, and pytest numbers them
    otherwise: then what is left of a name without its number has to be the only one on both sides.
    """
    names = set(listed)
    same = {nodeid: nodeid for nodeid in collected if nodeid in names}
    gone, fresh = Counter(map(unnumbered, names - same.keys())), Counter(map(unnumbered, collected))
    left = {unnumbered(name): name for name in names - same.keys() if gone[unnumbered(name)] == 1}
    others = (nodeid for nodeid in collected if nodeid not in same and fresh[unnumbered(nodeid)] == 1)
    return same | {nodeid: left[unnumbered(nodeid)] for nodeid in others if unnumbered(nodeid) in left}


def blocks(nodeids: Iterable[str]) -> Iterator[str]:
    """The text of one file's node ids."""
    by_test: dict[str, list[str]] = {}
    for nodeid in nodeids:
        _, test, own = split(nodeid)
        by_test.setdefault(test, []).append(own)
    by_parameters: dict[tuple[str, ...], list[str]] = {}
    for test, parameters in by_test.items():
        by_parameters.setdefault(tuple(sorted(parameters)), []).append(test)
    for shared, tests in sorted(by_parameters.items(), key=lambda block: min(block[1])):
        yield "\n".join([*sorted(tests), *(f"  {one}" for one in shared if one)]) + "\n"


def write(folder: Path, nodeids: Iterable[str]) -> None:
    """Write the lists of a folder, and remove those of files that have no more of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.txt"):
        old.unlink()
    for file, group in groupby(sorted(set(nodeids)), key=lambda nodeid: split(nodeid)[0]):
        text = "\n".join(blocks(group))
        (folder / file).with_suffix(".txt").write_text(text, encoding="utf-8")


def read_one(file: str, text: str) -> Iterator[str]:
    """The node ids in the text of one file."""
    for block in text.split("\n\n"):
        lines = block.splitlines()
        tests = [line for line in lines if line and not line.startswith(" ")]
        parameters = [line[2:] for line in lines if line.startswith("  ")] or [""]
        yield from (f"{file}::{test}{one}" for test in tests for one in parameters)


def read(folder: Path) -> list[str]:
    """All node ids of a folder, in order."""
    return sorted(
        nodeid
        for path in folder.glob("*.txt")
        for nodeid in read_one(f"{path.stem}.py", path.read_text(encoding="utf-8"))
    )
