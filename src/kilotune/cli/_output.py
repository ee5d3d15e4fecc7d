"""What the verbs print: tables on a console, one JSON document, one line for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["Json", "complain", "console", "print_json", "quiet_transformers", "rows_table", "warn"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
WIDTH = 120  # of what goes to a file or a pipe, which has no width of its own


def console() -> Console:
    """stdout; lines are not cut where nobody looks at a screen."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def complain(message: str) -> None:
    """One error on stderr."""
    print(f"error: {message}", file=sys.stderr)


def warn(message: str) -> None:
    """One warning on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def rows_table(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], justify: Literal["left", "right"] = "right"
) -> Table:
    """A table whose first column names the rows."""
    table = Table(title=title or None, title_justify="left", title_style="bold", show_header=any(columns))
    table.add_column("")
    for name in columns:
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def quiet_transformers() -> None:
    """No log lines of transformers between ours; its progress bars only where somebody looks."""
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
