"""The options in docs/beside-vllm.md: those of vLLM's server, and what `kilotune serve` does with each.

    python scripts/vllm_comparison.py [--vllm FOLDER] [--check]

vLLM's names are read from its source (the installed package ``vllm``) where ``--vllm`` names its folder; else they stay
as the page has them. What kilotune does is asked of the code each time. ``--check`` writes nothing, and fails where the
page is out of date.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "beside-vllm.md"
BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"
HEAD = "| option | chat | completions | responses |\n|---|---|---|---|\n"
REQUESTS = {
    "chat": ("chat_completion", "ChatCompletionRequest"),
    "completions": ("completion", "CompletionRequest"),
    "responses": ("responses", "ResponsesRequest"),
}
NOT, NEVER = "–", "400"  # vLLM does not have it there; it is refused whatever it says


def of_vllm(package: Path) -> dict[str, list[str]]:
    """The names that vLLM's requests have, by request."""
    found = {}
    for request, (folder, name) in REQUESTS.items():
        tree = ast.parse((package / "entrypoints" / "openai" / folder / "protocol.py").read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        names = [
            node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        ]
        found[request] = [one for one in names if not one.startswith("_")]
    return found


def of_page(text: str) -> dict[str, list[str]]:
    """The same, as the page has them."""
    found: dict[str, list[str]] = {request: [] for request in REQUESTS}
    for line in _between(text).splitlines()[2:]:
        option, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for request, cell in zip(REQUESTS, cells, strict=True):
            if cell != NOT:
                found[request].append(option.strip("`"))
    return found


def _between(text: str) -> str:
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def table(names: Mapping[str, list[str]]) -> str:
    """Every option of vLLM's, and what is done with it here."""
    from kilotune.serve.http.responses_body import ResponseBody
    from kilotune.serve.http.schemas import ChatBody, CompletionBody

    bodies: Mapping[str, Any] = {"chat": ChatBody, "completions": CompletionBody, "responses": ResponseBody}
    every = sorted({name for own in names.values() for name in own})
    lines = []
    for name in every:
        cells = [_done(name, bodies[request]) if name in names[request] else NOT for request in REQUESTS]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines)


def _done(name: str, body: Any) -> str:
    if (field := body.model_fields.get(name)) is not None:
        said = re.match(r"Only (\w+):", field.description or "")  # it is there to be refused in words of its own
        return "served" if said is None else NEVER if said[1] == "null" else f"at `{said[1]}` only"
    option = body.neutral.get(name)
    return NEVER if option is None or not option.told else f"at {option.told.partition(' (')[0]} only"


def page_of(text: str, names: Mapping[str, list[str]]) -> str:
    """The page with the table made anew."""
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    return f"{before}\n\n{table(names)}\n\n{after}"


def main() -> None:
    """Write the page, or check it."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--vllm", type=Path, help="the folder of the installed package vllm")
    options.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    chosen = options.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    text = PAGE.read_text(encoding="utf-8")
    made = page_of(text, of_page(text) if chosen.vllm is None else of_vllm(chosen.vllm))
    if chosen.check:
        sys.exit(0 if made == text else f"{PAGE.name} is out of date: python scripts/vllm_comparison.py")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
