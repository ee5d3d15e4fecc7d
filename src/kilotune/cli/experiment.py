"""``kilotune experiment cnn``: a pretrained network, adapted with VeRA, with LoRA and in full, on real images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ._experiments import DataSet, progress_bar
from ._output import Json, complain, console, print_json, rows_table

if TYPE_CHECKING:
    from ..experiments.cnn.results import CnnResult

__all__ = ["app"]

RUNS = Path("runs")
FAILED = 1
INTERRUPTED = 130
app = typer.Typer(name="experiment", no_args_is_help=True, help="Experiments as tutorials have them, with a report.")


@app.callback()
def _group() -> None:
    """So that its one verb keeps its name."""


@app.command()
def cnn(
    data: Annotated[DataSet, typer.Option(help="The images: scikit-learn's digits, or CIFAR-10.")] = DataSet.digits,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder or archive with CIFAR-10, binary or Python version. Default: download it."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Classes to adapt to, by number or name. Default: 2,3,7; cifar10: bird,cat,deer."),
    ] = None,
    rotation: Annotated[
        float | None,
        typer.Option(help="Degrees by which the adapted classes' pictures turn. Default: 30; cifar10: 0."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds to run. Default: 3.")] = None,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of pretraining on all classes. Default: 10; cifar10: 6.")
    ] = None,
    adapt_epochs: Annotated[int | None, typer.Option(help="Epochs of each adaptation. Default: 8; cifar10: 2.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 4,
    pretrain_rate: Annotated[
        float | None, typer.Option(help="The pretraining's learning rate. Default: 0.002; cifar10: 0.001.")
    ] = None,
    vera_rate: Annotated[float | None, typer.Option(help="VeRA's learning rate. Default: 0.03; cifar10: 0.01.")] = None,
    lora_rate: Annotated[
        float | None, typer.Option(help="LoRA's learning rate. Default: 0.003; cifar10: 0.001.")
    ] = None,
    full_rate: Annotated[
        float | None, typer.Option(help="Full fine-tuning's learning rate. Default: 0.001 for both.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, fewer epochs and a rougher pretraining, to see it work.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html and results.json. Default: runs/cnn-DATA.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pretrain a small network, adapt it with VeRA, LoRA and in full, and write an HTML report.

    Exits with 1 when the adapted classes do not gain, the others do not pay, or any other check fails.
    """
    from ..experiments.cnn.settings import choose

    chosen = {
        "data_dir": data_dir,
        "classes": classes,
        "rotation": rotation,
        "seeds": seeds,
        "first_seed": seed,
        "epochs": epochs,
        "adapt_epochs": adapt_epochs,
        "batch": batch,
        "pretrain_rate": pretrain_rate,
        "rates": {"vera": vera_rate, "lora": lora_rate, "full": full_rate},
    }
    folder = out or RUNS / f"cnn-{data.value}"
    settings = choose(data.value, quick=quick, chosen=chosen)
    from .._ui.pages import check_folder, require_packages
    from ..experiments.cnn.experiment import run
    from ..experiments.cnn.page import write_report

    require_packages()
    check_folder(folder)
    errors = Console(stderr=True)
    try:
        with progress_bar(errors) as report:
            result = run(settings, report)
        files = write_report(result, folder)
    except KeyboardInterrupt:
        errors.print("interrupted: no report was written", highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result, files[-1])
    if result.failures:
        failed = "; ".join(f"{check.name}: {check.detail}" for check in result.failures)
        complain(f"{len(result.failures)} of {len(result.checks)} checks failed: {failed}")
        raise typer.Exit(FAILED)


def _show(result: CnnResult, report: Path) -> None:
    screen = console()
    screen.print(_accuracy_table(result))
    screen.print(_count_table(result))
    for check in result.checks:
        mark = "[green]pass[/]" if check.passed else "[bold red]FAIL[/]"
        screen.print(f"{mark}  {check.name}")
    seeds = "1 seed" if len(result.seeds) == 1 else f"{len(result.seeds)} seeds"
    screen.print(f"\n{seeds} in {result.seconds:.0f} seconds. Report:")
    screen.print(str(report), style="bold", markup=False, soft_wrap=True)


def _accuracy_table(result: CnnResult) -> Table:
    from ..experiments.cnn.results import spread
    from ..experiments.cnn.settings import LABELS, METHODS

    settings = result.settings
    adapted = ", ".join(result.class_names[c] for c in settings.classes)
    many = ", mean of the seeds (lowest to highest)" if settings.seeds > 1 else ""
    vera, lora = result.counts[0], result.counts[1]
    trained = {"vera": vera.trainable, "lora": lora.trainable, "full": vera.frozen}
    rows = [
        (
            LABELS[method] if method else "before",
            f"{trained[method]:,}" if method else "",
            f"{result.seeds[0].runs[method].weight_bytes:,}" if method else "",
            spread(result.levels(method, settings.classes)),
            spread(result.levels(method, settings.other_classes)),
        )
        for method in (None, *METHODS)
    ]
    columns = ("trained", "bytes on disk", f"adapted classes ({adapted})", "the other classes")
    return rows_table(f"Accuracy in %{many}", columns, rows)


def _count_table(result: CnnResult) -> Table:
    from ..experiments.cnn.settings import LABELS

    rows = [
        (
            f"{LABELS[row.method]} r {row.rank}, {'-'.join(map(str, row.widths))}",
            *(f"{row.trainable:,}", f"{row.frozen:,}", f"{row.total:,}", f"{row.percent:.2f}"),
            *(str(row.pairs), f"{row.shared:,}", f"{row.total_by_location:,}"),
        )
        for row in result.counts
    ]
    columns = ("trained", "frozen", "in all", "trained %", "shared pairs", "in them", "in all with them")
    return rows_table("Parameters: as the tutorials count, then by memory location", columns, rows)
