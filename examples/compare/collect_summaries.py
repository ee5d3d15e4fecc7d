"""Collect what a function is said to do, from what is installed: its signature, and its docstring's first sentence.

python examples/compare/collect_summaries.py [--out data/compare/summaries]

A row is ``{"prompt": "scipy.ndimage.zoom(input, zoom, order, mode)", "completion": "Zoom an array."}``. The libraries
are those of collect_docstrings.py (BSD-3-Clause, BSD-2-Clause, matplotlib's, Apache-2.0). Nothing is imported: the
files are parsed. The splits are by file, and what is taken is decided by hashes of the paths and the texts, so that
the same versions of the libraries give the same rows. ``manifest.json`` has the versions and checksums.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from collect_docstrings import PACKAGES, SKIPPED, place_of

MOST_ARGUMENTS, LEAST_WORDS, MOST_CHARACTERS = 5, 3, 90
SPLITS = {"train": (0.60, 640), "validation": (0.15, 160), "test": (0.25, 320)}  # share of the files, rows


class Row(NamedTuple):
    """One function. source: its file."""

    prompt: str
    completion: str
    source: str


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("data/compare/summaries"))
    out: Path = options.parse_args().out
    found: dict[str, Row] = {}
    for label in PACKAGES:
        for row in rows_of(label):
            found.setdefault(row.completion.lower(), row)  # a sentence is there once
    out.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, object] = {
        "versions": {label: importlib.metadata.version(dist) for label, (_, dist) in PACKAGES.items()}
    }
    for split, rows in cut(list(found.values())).items():
        content = "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows).encode()
        (out / f"{split}.jsonl").write_bytes(content)
        manifest[split] = {"rows": len(rows), "sha256": hashlib.sha256(content).hexdigest()}
        print(f"{split}: {len(rows)} rows")
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def rows_of(label: str) -> Iterator[Row]:
    """The public functions and methods of one library, in the order of its files."""
    folder, distribution = PACKAGES[label]
    root = Path(str(importlib.metadata.distribution(distribution).locate_file(folder)))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root.parent).as_posix()
        if SKIPPED.search(name):
            continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                sentence = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                names = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
                if fits(sentence) and len(names) <= MOST_ARGUMENTS:
                    yield Row(f"{module}.{node.name}({', '.join(names)})", sentence, name)


def fits(sentence: str) -> bool:
    """Whether it is one plain sentence of the usual length."""
    plain = sentence.endswith(".") and "." not in sentence[:-1] and ">>>" not in sentence and sentence.isascii()
    return plain and len(sentence.split()) >= LEAST_WORDS and len(sentence) <= MOST_CHARACTERS


def cut(rows: list[Row]) -> dict[str, list[Row]]:
    """The splits, by file, in an order that the rows' hashes decide."""
    chosen: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in sorted(rows, key=lambda row: place_of(row.completion)):
        where, split = place_of(row.source), ""
        for split, (share, _) in SPLITS.items():  # noqa: B007
            where -= share
            if where < 0:
                break
        if len(chosen[split]) < SPLITS[split][1]:
            chosen[split].append(row)
    return chosen


if __name__ == "__main__":
    main()
