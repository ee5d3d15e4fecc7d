"""Write the table of PEFT's names in docs/peft.md, from kilotune.peft.vocabulary.

python scripts/peft_table.py
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import peft

import kilotune.peft as ours
from kilotune.peft.vocabulary import Absent, absent

PAGE = Path(__file__).parent.parent / "docs" / "peft.md"
FOR_QUESTIONS = ("PrefixTuningConfig", "PromptLearningConfig")
BEGIN, END = "<!-- names: begin -->", "<!-- names: end -->"


def table() -> str:
    """The table: what is here, and what is not, why, and what to use."""
    here = [name for name in peft.__all__ if name in ours.__all__ and name not in FOR_QUESTIONS]
    missing: dict[Absent, list[str]] = defaultdict(list)
    for name in peft.__all__:
        if name not in ours.__all__ and (found := absent(name)) is not None:
            missing[found].append(name)
    asked = f"| {_listed(list(FOR_QUESTIONS))} | to be asked for by `isinstance`; none can be made |"
    lines = ["| PEFT's names | here |", "|---|---|", f"| {_listed(here)} | yes |", asked]
    for found, names in sorted(missing.items()):
        lines.append(f"| {_listed(names)} | no: {found.why}{f'; {found.instead}' if found.instead else ''} |")
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names, key=str.lower))


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    begin, end = re.escape(BEGIN), re.escape(END)
    made = re.sub(f"{begin}.*{end}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)
    PAGE.write_text(made, encoding="utf-8")
    print(f"wrote {PAGE}")
