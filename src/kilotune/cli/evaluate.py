"""``kilotune evaluate``: how well an adapter does on a data file."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..train.settings.places import check_data
from ._options import Adapter, AdapterRevision, Alone, Base, On, Revision
from ._output import Json, console, print_json, quiet_transformers, rows_table, warn
from ._paths import check_adapter, is_whole_model

if TYPE_CHECKING:
    from ..adapter_files.reading import AdapterFile
    from ..train.running.session import Session

__all__ = ["evaluate"]


def evaluate(
    adapter: Adapter,
    data: Annotated[list[str], typer.Argument(help="Data files, a folder of images, or hub:NAME.", metavar="DATA...")],
    base: Base = None,
    on: On = None,
    generate: Annotated[
        bool,
        typer.Option("--generate", help="Let the model write its answers, and score those: seq2seq."),
    ] = False,
    base_alone: Alone = False,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", "-t", help="What is scored. Default: what it was trained for, where its folder says that."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="The classes in the order of their numbers, with commas between. Default: those that the training "
            "wrote down."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE: a setting other than the training's, such as data.columns.text=review."),
    ] = None,
    revision: Revision = None,
    adapter_revision: AdapterRevision = None,
    as_json: Json = False,
) -> None:
    """Score an adapter, or the base alone, on data: the loss and the metrics of the task it was trained for."""
    check_adapter(adapter, base, revision, whole=True, on=on)
    _check_data(adapter, data, task, settings or [])
    quiet_transformers()
    from ..model.peft_model import PeftModel
    from ..train.results.scoring import open_scoring, scoring_settings
    from ._adapter import apart, put_below

    folder, source, revision, below = _places(adapter, adapter_revision, base, revision, on)
    chosen = scoring_settings(folder, data, source, revision=revision, task=task, changes=settings or [])
    classes = None if labels is None else [name.strip() for name in labels.split(",")]
    with apart():
        session = open_scoring(chosen, folder, classes)
    if isinstance(session.model, PeftModel):  # else it is a whole model, which stands on nothing
        put_below(session.model, below)
    with _alone(session, base_alone):
        metrics = _scores(session, generate)
    rows: Any = session.prepared.test
    document = {
        "adapter": None if base_alone else adapter,
        "on": on,
        "base": source,
        "task": chosen.task,
        "data": data,
        "rows": len(rows),
        "metrics": metrics,
        "notes": list(session.notes),
    }
    for note in session.notes:
        warn(note)
    if as_json:
        print_json(document)
    else:
        _show(document)


def _check_data(adapter: str, data: list[str], task: str | None, settings: list[str]) -> None:
    """Refuse files that are not there, where it is known what is to be scored, and that they are files."""
    known = task is not None or (Path(adapter) / "kilotune-train.yaml").is_file()
    if known and not any(change.partition("=")[0].strip() == "data.format" for change in settings):
        check_data(data, "DATA")


def _places(
    adapter: str, adapter_revision: str | None, base: str | None, revision: str | None, on: str | None
) -> tuple[Path, str, str | None, AdapterFile | None]:
    """(folder of the adapter or whole model, base, its revision, the adapter that it stands on)."""
    from ._adapter import base_of, open_adapter, open_below

    if is_whole_model(adapter):
        return Path(adapter), adapter, None, None
    file = open_adapter(adapter, adapter_revision)
    return file.folder, *base_of(file, base, revision), open_below(file, on)


def _alone(session: Session, wanted: bool) -> contextlib.AbstractContextManager[None]:
    if not wanted:
        return contextlib.nullcontext()
    from ..model.peft_model import PeftModel

    if not isinstance(model := session.model, PeftModel):
        raise ConfigError("--base-alone: this is a whole model, and no adapter")
    if saved := model.installed("default").saved:
        raise ConfigError(
            f"--base-alone: the adapter brings {', '.join(saved)}, without which the base has nothing to score"
        )
    return model.disable_adapter()


def _scores(session: Session, generate: bool) -> dict[str, float]:
    from ..train.run import evaluate as score
    from ..train.running.progress import progress_for

    progress = progress_for("bar" if sys.stderr.isatty() else "quiet")
    return score(session, "test", generate, listeners=[progress])


def _show(document: dict[str, Any]) -> None:
    out = console()
    who = f"{document['base']}, without an adapter" if document["adapter"] is None else document["adapter"]
    out.print(f"{who} on {', '.join(document['data'])}: {document['rows']:,} rows, {document['task']}", markup=False)
    rows = [(name, f"{value:.4f}") for name, value in sorted(document["metrics"].items())]
    out.print(rows_table("", ("score",), rows))
