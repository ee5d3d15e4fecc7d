"""``kilotune compare``: methods side by side, each with its own learning-rate search of an equal budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import ConfigError
from ._experiments import progress_bar
from ._output import Json, console, print_json, quiet_transformers, rows_table

if TYPE_CHECKING:
    from ..experiments.compare.problem import Contender, Problem
    from ..experiments.compare.results import Comparison
    from ..experiments.compare.settings import CompareSettings

__all__ = ["compare"]

RUNS = Path("runs")
STORE = "runs.jsonl"
INTERRUPTED = 130


def compare(
    config: Annotated[Path, typer.Argument(help="A YAML file: the problem, the methods, the search.")],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Only these, by name, with commas between; methods that the file does not name may be added."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each winner. Default: what the file says.")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another value for a setting, such as search.points=7; repeatable."),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the finished runs in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and stop.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report. Default: runs/compare-NAME, NAME the config file's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search each method's learning rate with the same budget, and run the winner over several seeds.

    Prints score with spread, trained numbers, bytes, time of a step against the frozen floor, and peak memory; writes
    them as CSV, JSON, Markdown, pictures and one HTML page. Finished runs are kept in the folder: the same command goes
    on after an interruption, and more seeds or methods cost only what is new.
    """
    from ..experiments.compare.settings import contenders_of, load_comparison, make_problem

    overrides = [*(change or ()), *([f"seeds={seeds}"] if seeds is not None else [])]
    settings = load_comparison(config, overrides)
    only = _names(methods)
    quiet_transformers()
    problem = make_problem(settings)
    contenders = contenders_of(settings, problem, only)
    if dry_run:
        _plan(settings, problem, contenders, as_json)
        return
    comparison, report = _run(settings, problem, contenders, out or RUNS / f"compare-{config.stem}", restart)
    if as_json:
        print_json(comparison.to_dict())
    else:
        _show(comparison, report)


def _names(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = tuple(word.strip() for word in text.split(",") if word.strip())
    if not names:
        raise ConfigError(f"--methods is {text!r}, and must be names with commas between, such as lora,vera")
    return names


def _run(
    settings: CompareSettings, problem: Problem, contenders: tuple[Contender, ...], folder: Path, restart: bool
) -> tuple[Comparison, Path]:
    from .._ui.pages import check_folder, require_packages
    from ..experiments.compare.report import write_comparison
    from ..experiments.compare.runner import compare, run_settings
    from ..experiments.compare.trials import Trial
    from ..experiments.run_store import Journal

    require_packages()
    check_folder(folder)
    journal = Journal(folder / STORE, run_settings(problem, settings.threads), Trial.from_dict, restart)
    errors = Console(stderr=True)
    try:
        with progress_bar(errors) as progress:
            comparison = compare(problem, contenders, settings, journal, progress)
        return comparison, write_comparison(comparison, folder)[-1]
    except KeyboardInterrupt:
        there = f"; {journal.count} finished runs are kept, and the same command goes on from there"
        message = f"interrupted: no report was written{there if journal.count else ''}"
        errors.print(message, highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


def _plan(settings: CompareSettings, problem: Problem, contenders: tuple[Contender, ...], as_json: bool) -> None:
    """What would be run."""
    search = settings.search
    each = search.cost + settings.seeds
    plan = {
        "problem": problem.name,
        "metric": problem.metric,
        "methods": [contender.name for contender in contenders],
        "rates": list(search.grid),
        "budget": search.budget,
        "seeds": list(settings.all_seeds),
        "steps_of_full_length": problem.steps,
        "steps": round(each * problem.steps * len(contenders)),
    }
    if as_json:
        print_json(plan)
        return
    table = rows_table("", ("",), [(k.replace("_", " "), _plain(v)) for k, v in plan.items()], justify="left")
    console().print(table)


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _show(comparison: Comparison, report: Path) -> None:
    from ..experiments.compare.results import LEGEND

    screen = console()
    heads, cells = comparison.table()
    screen.print(rows_table(comparison.title, heads[1:], [tuple(row) for row in cells]))
    for line in (*comparison.notes, LEGEND.replace("\\", "")):
        screen.print(line, markup=False)
    again = f" ({comparison.reused} finished runs of before taken over)" if comparison.reused else ""
    screen.print(f"\n{comparison.seconds:.0f} seconds{again}; all runs together {comparison.work:.0f}. Report:")
    screen.print(str(report), style="bold", markup=False, soft_wrap=True)
