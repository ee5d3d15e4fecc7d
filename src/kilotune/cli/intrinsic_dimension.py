"""``kilotune intrinsic-dimension``: the smallest d that reaches 90 % of full training's score."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from ._experiments import DataSet, progress_bar
from ._output import Json, console, print_json, rows_table

if TYPE_CHECKING:
    from ..experiments.dimension.results import DimensionResult, Level, Outcome
    from ..experiments.dimension.settings import Search
    from ..experiments.images.settings import ImageSettings
    from ..experiments.images.tasks import ImageTask
    from ..experiments.run_store import RunStore

__all__ = ["intrinsic_dimension"]

RUNS = Path("runs")
STORE = "runs.jsonl"
INTERRUPTED = 130
PRETRAINED_ROTATION = 45.0
QUICK: dict[str, Any] = {
    "epochs": 2,
    "seeds": 1,
    "rates": (0.1,),
    "full_rates": (0.003,),
    "points": 2,
    "lowest": 100,
    "highest": 2000,
    "resolution": 2.0,
}


@final
class Start(str, Enum):
    """Where training starts."""

    scratch = "scratch"
    pretrained = "pretrained"


@final
class Structure(str, Enum):
    """What is searched."""

    did = "did"
    said = "said"
    both = "both"


@final
class Kind(str, Enum):
    """Projections."""

    fastfood = "fastfood"
    dense = "dense"


def intrinsic_dimension(
    data: Annotated[DataSet, typer.Option(help="The images: scikit-learn's digits, or CIFAR-10.")] = DataSet.digits,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder or archive with CIFAR-10, binary or Python version. Default: download it."),
    ] = None,
    start: Annotated[
        Start,
        typer.Option("--from", help="Random weights (Li et al.), or a network trained on the upright pictures."),
    ] = Start.scratch,
    rotation: Annotated[
        float | None,
        typer.Option(help="Degrees by which the pictures are turned. Default: 0; from pretrained: 45."),
    ] = None,
    structure: Annotated[
        Structure, typer.Option(help="The projected vector as it is, times a learned scale per layer, or each.")
    ] = Structure.both,
    projection: Annotated[Kind, typer.Option(help="How the vector is projected; dense is slow.")] = Kind.fastfood,
    lowest: Annotated[int | None, typer.Option(help="Smallest d of the grid. Default: 30.")] = None,
    highest: Annotated[int | None, typer.Option(help="Largest d. Default: 3000.")] = None,
    points: Annotated[int | None, typer.Option(help="Points of the grid, evenly in log d. Default: 5.")] = None,
    resolution: Annotated[
        float | None, typer.Option(help="Bisect until a d that fails is within this share below. Default: 0.1.")
    ] = None,
    share: Annotated[float, typer.Option(help="Of full training's score that is to be reached.")] = 0.9,
    seeds: Annotated[int | None, typer.Option(help="Runs per d. Default: 3.")] = None,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each run. Default: 10; cifar10: 3.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 32,
    pretrain_epochs: Annotated[
        int | None, typer.Option(help="Epochs of the pretraining. Default: 10; cifar10: 3.")
    ] = None,
    rates: Annotated[
        str | None, typer.Option(help="Learning rates to try at each d, rising. Default: 0.03,0.1,0.3.")
    ] = None,
    full_rates: Annotated[
        str | None, typer.Option(help="Learning rates to try for full training. Default: 0.001,0.003,0.01.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, one learning rate, two epochs, a coarse search: to see it work.")
    ] = (False),
    restart: Annotated[bool, typer.Option("--restart", help="Forget the finished runs in the folder.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report. Default: runs/intrinsic-dimension-DATA-FROM.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find d90, the smallest d whose random subspace reaches 90 % of full training's score.

    Finished runs are kept in the folder: the same command goes on after an interruption, and a finer search or more
    seeds cost only what is new. Runs of other settings are refused.
    """
    chosen: dict[str, Any] = {"epochs": epochs, "seeds": seeds, "points": points, "lowest": lowest, "highest": highest}
    chosen |= {"resolution": resolution}
    chosen |= {"rates": _numbers("--rates", rates), "full_rates": _numbers("--full-rates", full_rates)}
    values = {**(QUICK if quick else {}), **{name: value for name, value in chosen.items() if value is not None}}
    settings = _settings(data, data_dir, start, rotation, values.pop("epochs", None), batch, pretrain_epochs)
    search = _search(structure, projection, share, seed, values)
    folder = out or RUNS / f"intrinsic-dimension-{data.value}-{start.value}"
    result, report = _measure(settings, search, folder, restart)
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result, report)


def _settings(
    data: DataSet,
    data_dir: Path | None,
    start: Start,
    rotation: float | None,
    epochs: int | None,
    batch: int,
    pretrain_epochs: int | None,
) -> ImageSettings:
    from ..experiments.images.settings import ImageSettings

    if start is Start.scratch and pretrain_epochs is not None:
        raise ConfigError("--pretrain-epochs is for --from pretrained")
    large = data is DataSet.cifar10
    if rotation is None:
        rotation = PRETRAINED_ROTATION if start is Start.pretrained else 0.0
    return ImageSettings(
        data=data.value,
        start=start.value,
        rotation=rotation,
        epochs=epochs if epochs is not None else 3 if large else 10,
        batch=batch,
        pretrain_epochs=pretrain_epochs if pretrain_epochs is not None else 3 if large else 10,
        data_dir=data_dir,
    )


def _search(
    structure: Structure,
    projection: Kind,
    share: float,
    seed: int,
    values: dict[str, Any],
) -> Search:
    from ..experiments.dimension.settings import STRUCTURES, Search

    return Search(
        structures=STRUCTURES if structure is Structure.both else (structure.value,),
        projection=projection.value,
        share=share,
        first_seed=seed,
        **values,
    )


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} is {text!r}, and must be numbers with commas between, such as 0.01,0.1") from None


def _measure(settings: ImageSettings, search: Search, folder: Path, restart: bool) -> tuple[DimensionResult, Path]:
    from .._ui.pages import check_folder, require_packages
    from ..experiments.dimension.report import write_dimension_report
    from ..experiments.dimension.search import measure, run_settings
    from ..experiments.run_store import RunStore

    require_packages()
    check_folder(folder)
    errors = Console(stderr=True)
    store: RunStore | None = None
    try:
        task = _task(settings, errors)
        store = RunStore(folder / STORE, run_settings(task, search), restart)
        with progress_bar(errors) as report:
            result = measure(task, search, store, report)
        return result, write_dimension_report(result, folder)[-1]
    except KeyboardInterrupt:
        kept = store.count if store is not None else 0
        there = f"; {kept} finished runs are kept, and the same command goes on from there" if kept else ""
        errors.print(f"interrupted: no report was written{there}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


def _task(settings: ImageSettings, errors: Console) -> ImageTask:
    """Reads the pictures; where that takes long, with a progress bar."""
    from ..experiments.images.tasks import ImageTask

    if settings.data == "digits":
        return ImageTask.of(settings)
    with progress_bar(errors) as report:
        return ImageTask.of(settings, report)


def _show(result: DimensionResult, report: Path) -> None:
    screen = console()
    screen.print(
        f"{result.task}: {result.weights:,} weights of {result.layers} layers; full training trains"
        f" {result.trained_in_full:,} numbers",
        markup=False,
    )
    screen.print(_table(result))
    for line in (*result.answers, *result.notes):
        screen.print(line, markup=False)
    again = f", {result.reused} runs of before taken over" if result.reused else ""
    screen.print(f"\n{result.seconds:.0f} seconds{again}. Report:")
    screen.print(str(report), style="bold", markup=False, soft_wrap=True)


def _table(result: DimensionResult) -> Table:
    unit = " in %" if result.percent else ""
    rows: list[tuple[str, ...]] = [("before training", "", *_scores(result, result.start_median, None, None), "")]
    rows.append(_row(result, result.full, "full training", ""))
    rows.append(("wanted", "", result.shown(result.threshold), "", "", ""))
    for outcome in result.outcomes:
        rows += [
            _row(result, level, f"{outcome.structure.upper()} d {level.d:,}", _verdict(result, outcome, level))
            for level in outcome.levels
        ]
    columns = ("rate", "validation", "worst to best", "test", "")
    seeds = len(result.full.runs)
    what = f", medians of {seeds} seeds" if seeds > 1 else ", one seed"
    return rows_table(f"{result.metric.capitalize()}{unit}{what}", columns, rows)


def _row(result: DimensionResult, level: Level, name: str, verdict: str) -> tuple[str, ...]:
    return (name, f"{level.rate:g}", *_scores(result, level.median, level.range, level.test_median), verdict)


def _scores(
    result: DimensionResult, middle: float, reach: tuple[float, float] | None, test: float | None
) -> tuple[str, str, str]:
    if reach is None:
        return result.shown(middle), "", ""
    return result.shown(middle), " to ".join(map(result.shown, reach)), result.shown(test)


def _verdict(result: DimensionResult, outcome: Outcome, level: Level) -> str:
    if level.d == outcome.d90:
        return result.symbol
    return "reaches it" if level.median >= outcome.threshold else ""
