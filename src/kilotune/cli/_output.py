"""What the verbs print: tables on a console, one JSON document, one line for an error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Json", "complain", "console", "print_json", "quiet_transformers", "rows_table", "warn"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
# What transformers imports where it is installed, and what then warns of kernels that nobody asked for.
IMPORTED_BY_THE_WAY = ("torchao", "bitsandbytes", "torch.utils._pytree")
WIDTH = 120  # of what goes to a file or a pipe, which has no width of its own


def console() -> Console:
    """stdout; lines are not cut where nobody looks at a screen."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def complain(message: str) -> None:
    """One error on stderr; a single fault under its headline is joined to it, so that it is one line."""
    lines = message.split("\n  - ")
    print(f"error: {' '.join(lines) if len(lines) == 2 else message}", file=sys.stderr)


def warn(message: str) -> None:
    """One warning on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def rows_table(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], justify: Literal["left", "right"] = "right"
) -> Table:
    """A table whose first column names the rows."""
    # Text, not str: regular expressions and paths hold brackets, which rich would take for its markup.
    heading = Text(title, style="bold") if title else None
    table = Table(title=heading, title_justify="left", show_header=any(columns))
    table.add_column("")
    for name in columns:
        table.add_column(Text(name), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def quiet_transformers() -> None:
    """No log lines of transformers and the hub between ours; their progress bars only where somebody looks."""
    for name in IMPORTED_BY_THE_WAY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging as transformers_logging
    except ImportError:
        return
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
