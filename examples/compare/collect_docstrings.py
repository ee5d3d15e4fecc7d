"""Collect a labelled text from what is installed: first paragraphs of docstrings, labelled by their package.

python examples/compare/collect_docstrings.py [--out data/compare/docstrings]

Eight libraries, all under licences that allow it (BSD-3-Clause, BSD-2-Clause, matplotlib's, Apache-2.0). Nothing is
imported: the files are parsed. Which library is meant must be found from what the text is about, so

- only the first paragraph is taken, without signatures and examples;
- a text that names any of the eight libraries, or an alias such as ``np.``, is left out;
- texts that differ only in names, numbers and code are taken once, and not at all where two libraries have them.

The splits are by file, so that the methods of one class never stand on both sides. What is taken is decided by hashes
of the paths and the texts: the same versions of the libraries give the same files. ``manifest.json`` has the versions
and a checksum of each file.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = {  # label -> the folder in site-packages, the distribution
    "matplotlib": ("matplotlib", "matplotlib"),
    "networkx": ("networkx", "networkx"),
    "numpy": ("numpy", "numpy"),
    "scikit-learn": ("sklearn", "scikit-learn"),
    "scipy": ("scipy", "scipy"),
    "sympy": ("sympy", "sympy"),
    "torch": ("torch", "torch"),
    "transformers": ("transformers", "transformers"),
}
# Other people's files within them, tests, and files that a program wrote.
SKIPPED = re.compile(
    r"(^|/)(tests?|testing|externals?|_?vendor(ed)?|array_api_compat|array_api_extra|distutils|conftest|_generated|"
    r"test_[^/]*|modeling_tf_[^/]*|dummy_[^/]*)(/|\.py$)"
)
GIVEAWAY = re.compile(
    r"numpy|\bnp\b|ndarray|scipy|sklearn|scikit|matplotlib|\bmpl\b|pyplot|\bplt\b|sympy|networkx|\bnx\b|torch|"
    r"transformers|hugging ?face|\bhf\b",
    re.IGNORECASE,
)
LEAST_WORDS, MOST_WORDS = 8, 40
SPLITS = {"train": (0.60, 200), "validation": (0.15, 40), "test": (0.25, 120)}  # share of the files, texts per label


class Text(NamedTuple):
    """One docstring's first paragraph."""

    text: str
    label: str
    source: str
    """``scipy/stats/_entropy.py:entropy``"""


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("data/compare/docstrings"))
    out: Path = options.parse_args().out
    texts = distinct([text for label in PACKAGES for text in texts_of(label)])
    out.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, object] = {
        "versions": {label: importlib.metadata.version(dist) for label, (_, dist) in PACKAGES.items()}
    }
    for split, rows in cut(texts).items():
        content = "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows).encode()
        (out / f"{split}.jsonl").write_bytes(content)
        counts = {label: sum(row.label == label for row in rows) for label in PACKAGES}
        manifest[split] = {"texts": counts, "sha256": hashlib.sha256(content).hexdigest()}
        print(f"{split}: {len(rows)} texts, {counts}")
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def texts_of(label: str) -> Iterator[Text]:
    """All usable first paragraphs of one library, in the order of its files."""
    folder, distribution = PACKAGES[label]
    root = Path(str(importlib.metadata.distribution(distribution).locate_file(folder)))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root.parent).as_posix()
        if SKIPPED.search(name):
            continue
        for place, docstring in docstrings(path):
            text = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())
            words = text.split()
            if LEAST_WORDS <= len(words) <= MOST_WORDS and ">>>" not in text and not GIVEAWAY.search(text):
                yield Text(text, label, f"{name}:{place}")


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(name, docstring) of the functions and classes in a file, in order."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield node.name, text


def distinct(texts: list[Text]) -> list[Text]:
    """Each text once, names, numbers and code left aside; none that stands in two libraries."""
    seen: dict[str, Text] = {}
    shared: set[str] = set()
    for text in texts:
        words = [word if re.fullmatch(r"[A-Z]?[a-z]+[.,;:]?", word) else "*" for word in text.text.split()]
        key = " ".join(words).lower()
        if key in seen and seen[key].label != text.label:
            shared.add(key)
        seen.setdefault(key, text)
    return [text for key, text in seen.items() if key not in shared]


def cut(texts: list[Text]) -> dict[str, list[Text]]:
    """The splits, by file; as many texts of each label, in an order that is decided by their hashes."""
    chosen: dict[str, list[Text]] = {split: [] for split in SPLITS}
    for text in sorted(texts, key=lambda text: place_of(text.text)):
        where, split = place_of(text.source.partition(":")[0]), ""
        for split, (share, _) in SPLITS.items():  # noqa: B007
            where -= share
            if where < 0:
                break
        if sum(row.label == text.label for row in chosen[split]) < SPLITS[split][1]:
            chosen[split].append(text)
    return chosen


def place_of(text: str) -> float:
    """A number in [0, 1) that the text decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


if __name__ == "__main__":
    main()
