"""A report as one HTML page that needs nothing but itself, and files that are written all together or not at all."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from html import escape
from pathlib import Path

from ..errors import KilotuneError
from ..whole_file import replacing

__all__ = ["check_folder", "document", "facts", "figure", "publish", "section", "table"]

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #22262d;
  background: #f4f5f7; margin: 0; }
main { max-width: 1060px; margin: 0 auto; padding: 36px 44px 56px; background: #fff; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 42px 0 8px; padding-top: 18px; border-top: 1px solid #e3e6ea; }
p, li { max-width: 820px; }
.lead { font-size: 17.5px; color: #3b424d; }
.small { font-size: 14px; color: #5a626e; }
.verdict { display: inline-block; padding: 5px 14px; border-radius: 999px; font-weight: 600;
  font-size: 15px; }
.pass { background: #e2f4e8; color: #11613a; } .fail { background: #fde5e3; color: #a01c12; }
table { border-collapse: collapse; width: 100%; margin: 14px 0; font-size: 14.5px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; border-bottom: 1px solid #e3e6ea; text-align: right; vertical-align: top; }
th { font-weight: 600; color: #4a525e; vertical-align: bottom; border-bottom: 2px solid #c9ced6; }
th:first-child, td:first-child { text-align: left; }
.text td, .text th { text-align: left; }
td .tag { padding: 1px 9px; font-size: 13px; }
.range { color: #5a626e; font-size: 12.5px; }
.whole { white-space: nowrap; }
.scroll { overflow-x: auto; }
figure { margin: 18px 0; } figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: 14px; color: #5a626e; margin-top: 6px; max-width: 820px; }
pre { font: 13px/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; background: #f4f5f7; padding: 12px 16px;
  overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; font-size: 14.5px; }
dt { color: #5a626e; } dd { margin: 0; }
@media (max-width: 700px) { main { padding: 22px 16px 40px; } }
@media print { body { background: #fff; } main { max-width: none; padding: 0; }
  figure { break-inside: avoid; } }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A page of these parts, which are HTML already, that needs nothing but itself."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """A heading and what is under it, HTML already."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}</section>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def figure(picture: bytes, kind: str, alt: str, caption: str) -> str:
    """A picture within the page, and its caption."""
    data = base64.b64encode(picture).decode("ascii")
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def facts(values: Mapping[str, str]) -> str:
    """Names and what is said of them; plain text."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in values.items())
    return f"<dl>\n{items}</dl>\n"


# -- files ---------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Fail before the training, rather than after it, when a report cannot be written into ``folder``.

    Raises:
        KilotuneError: it is a file, or neither it nor the folder above may be written to.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise KilotuneError(f"the report cannot be written into {folder}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise KilotuneError(f"the report cannot be written into {folder}: no permission to write to {nearest}")


def publish(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files below ``folder``: all of them aside first, then each renamed into place, in order.

    Raises:
        KilotuneError: one could not be written; then nothing is left aside.
    """
    targets = [folder / name for name in files]
    try:
        with ExitStack() as aside:
            for target, content in reversed([*zip(targets, files.values())]):  # the last one in is renamed first
                target.parent.mkdir(parents=True, exist_ok=True)
                aside.enter_context(replacing(target, shared=True)).write_bytes(content)
    except OSError as error:
        raise KilotuneError(f"could not write the report into {folder}: {error}") from error
    return targets
