"""What the verbs of the experiments share: the image data sets, and a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, final

from rich.console import Console

if TYPE_CHECKING:
    from ..experiments.images.digits_data import Progress as Report

__all__ = ["DataSet", "progress_bar"]


@final
class DataSet(str, Enum):
    """The data sets of the experiment."""

    digits = "digits"
    cifar10 = "cifar10"


@contextmanager
def progress_bar(console: Console) -> Iterator[Report]:
    """One bar on stderr; what the experiment does at the moment is its description. In a file or a pipe, lines."""
    if not console.is_terminal:
        yield _lines(console)
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("reading the data", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield report
        bar.update(task, description="done")


def _lines(console: Console) -> Report:
    """A line for each thing that is done, and for each tenth of it."""
    told = ("", -1)

    def report(what: str, done: int, total: int) -> None:
        nonlocal told
        now = what, 10 * done // total if total else 0
        if now != told:
            told = now
            console.print(
                f"{what}: {done} of {total}" if total else what, highlight=False, markup=False, soft_wrap=True
            )

    return report
