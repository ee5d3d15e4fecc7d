"""``kilotune fleet``: adapters of many users, trained together."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, gather
from ..fleet.joint.settings import FleetSettings
from ..train.settings.config_file import merged
from ..train.settings.places import check_base
from ..train.settings.sections import AdapterSettings, DataSettings, ModelSettings
from ._output import Json, console, print_json, quiet_transformers, rows_table

if TYPE_CHECKING:
    from ..fleet import FleetReport, Record

__all__ = ["app"]

NO = 1
app = typer.Typer(name="fleet", no_args_is_help=True, help="Train the adapters of many users together, over one base.")


@app.callback()
def _group() -> None:
    """So that its one verb keeps its name."""


def _pairs(flag: str, words: list[str] | None) -> dict[str, Any]:
    for word in words or ():
        if not all(word.partition("=")[:2]):
            raise ConfigError(f"{flag} {word!r}: expected KEY=VALUE")
    return merged({}, words or ())


@app.command()
def train(
    model: Annotated[str, typer.Option("--model", "-m", help=ModelSettings.help_of("base"))],
    data: Annotated[
        Path,
        typer.Option("--data", "-d", help="One file with a column that names the user, or a folder of a file each."),
    ],
    user_column: Annotated[
        str | None, typer.Option(help="The column of that file; with a folder the files' names are the users'.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder for the adapters, one of PEFT's each.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Or the URL of an adapter store, as kilotune store takes it.")
    ] = None,
    namespace: Annotated[str, typer.Option(help="Whose adapters in the store.")] = "default",
    alias: Annotated[str | None, typer.Option(help="Let this alias name the new versions in the store.")] = None,
    method: Annotated[str, typer.Option(help="An adapter's method.")] = "vera",
    option: Annotated[
        list[str] | None, typer.Option("--option", help=f"KEY=VALUE: {AdapterSettings.help_of('options')} Repeatable.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help=f"KEY=VALUE, of {', '.join(FleetSettings.known())}. May be given again."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="An adapter that runs, frozen, beneath each user's own: a folder, or NAME or NAME/VERSION of --store.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="An adapter of the same method and options from which each user's own starts, given likewise.",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column", help="ROLE=COLUMN, where a column is not called text, prompt, completion or messages."
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut rows to so many tokens.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help=DataSettings.help_of("plain"))] = False,
    validation_fraction: Annotated[
        float, typer.Option(help="The part of each user's rows held out to evaluate.")
    ] = 0.0,
    state: Annotated[
        Path | None, typer.Option(help="A folder for the training's state, so that --resume can go on with it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in --state.")] = False,
    progress: Annotated[
        str, typer.Option(help="plain: lines; json: one JSON object a line; quiet: nothing.")
    ] = "plain",
    as_json: Json = False,
) -> None:
    """Train an adapter for each user of a causal language model, many in one batch, each as if it were alone.

    A user whose data is broken fails alone; the exit code is then 1. With rows held out to evaluate
    (--validation-fraction), nothing is kept for a user whose adapter is no better on them than the model without it.
    """
    if (output is None) == (store is None):
        raise ConfigError("give --output FOLDER or --store URL, one of them")
    if store is None and (alias is not None or namespace != "default"):
        raise ConfigError("--alias and --namespace are of a store, and --output is a folder")
    if as_json and progress == "json":
        raise ConfigError("--json prints one document on stdout, and --progress json many lines; take one of them")
    chosen = FleetSettings(**_pairs("--set", settings))
    check_base(model, None)
    quiet_transformers()
    from ..fleet import StoreSink, fit, open_store
    from ..fleet.joint.progress import told_by
    from ..fleet.joint.users_from_files import text_users

    adapter = AdapterSettings(method=method, options=_pairs("--option", option))
    telling = told_by(progress)
    with ExitStack() as held:
        there = [_existing(flag, word, store, namespace) for flag, word in (("--on", on), ("--start", start))]
        found = text_users(
            model, data, user_column=user_column, columns=_pairs("--column", column), max_length=max_length,
            plain=plain, fraction=validation_fraction, seed=chosen.seed,
        )  # fmt: skip
        for note in found.notes if progress != "quiet" else ():
            print(note, file=sys.stderr)
        sink: Any = output
        if store is not None:
            sink = StoreSink(held.enter_context(open_store(store, namespace=namespace)), alias)
        config = adapter.config(task_type="CAUSAL_LM", base_model_name_or_path=model)
        if progress == "plain" and chosen.learning_rate is None:
            print(
                f"learning rate: by the rule for {method}, {chosen.rate(config, 100):g} for 100 steps", file=sys.stderr
            )
        report = fit(
            found.model, config, found, chosen, collate=found.collate, sink=sink, folder=state, resume=resume,
            told=telling, on=there[0], start=there[1],
        )  # fmt: skip
    _show(report, as_json)
    if report.failed:
        raise typer.Exit(NO)


def _existing(flag: str, word: str | None, store: str | None, namespace: str) -> Record | Path | None:
    """The adapter that a flag names; it is looked for before the model is loaded."""
    if word is None:
        return None
    if Path(word).is_dir():
        return Path(word)
    if store is None:
        raise ConfigError(f"{flag}: there is no folder {word!r}; names are of a store, and --output is none")
    from ..fleet import open_store
    from ..fleet.stepper.given_adapters import stored

    with open_store(store, namespace=namespace, read_only=True) as opened:
        return stored(opened, word, flag.removeprefix("--"))


def _show(report: FleetReport, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
        return
    endings: dict[str, int] = {}
    for user in report.users:
        endings[user.ended] = endings.get(user.ended, 0) + 1
    rows = [(ending, str(count)) for ending, count in endings.items()]
    for what, losses in (
        ("validation loss without", [user.without for user in report.users if user.with_own is not None]),
        ("validation loss with", [user.with_own for user in report.users]),
    ):
        if known := [loss for loss in losses if loss is not None]:
            rows.append((f"{what} their own, mean", f"{sum(known) / len(known):.4f}"))
    rows += [("rows", f"{report.rows:,}"), ("joint steps", f"{report.steps:,}"), ("seconds", f"{report.seconds:.1f}")]
    console().print(rows_table("users", [""], rows))
    if report.no_gain:
        names = [(user.name, f"{user.without:.4f}", f"{user.with_own:.4f}") for user in report.no_gain]
        console().print(rows_table("nothing kept: no gain", ["loss without", "loss with"], names))
    if report.failed:
        faults = [f"{user.name}: {user.error}" for user in report.failed]
        print(gather(f"{len(faults)} users failed:", faults), file=sys.stderr)
