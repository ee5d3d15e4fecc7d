"""``kilotune train``: fine-tune a model on your own data, from a config file or from flags."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._ui.sizes import readable_bytes
from ..errors import ConfigError
from ..train.settings.config_file import merged, put, read_config, settings_from
from ..train.settings.data_names import SPLITS
from ..train.settings.places import check_base, check_data
from ..train.settings.sections import (
    TASK_NAMES,
    AdapterSettings,
    DataSettings,
    ModelSettings,
    TrainingSettings,
    TrainSettings,
)
from ._completion import complete, complete_settings, complete_trained
from ._output import Json, print_json, quiet_transformers

if TYPE_CHECKING:
    from ..train.results.outcome import Result
    from ..train.running.planning import RunPlan

__all__ = ["train"]

INTERRUPTED = 130


def _modes() -> Iterable[str]:
    from ..train.running.progress import MODES

    return MODES


def train(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file, as kilotune init writes one; flags and --set change it.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=ModelSettings.help_of("base"))] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help=f"{DataSettings.help_of('train')} May be given again."),
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="The same, for the evaluations between. May be given again.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help=TrainSettings.help_of("output"))] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            "-t",
            help=f"{TrainSettings.help_of('task')} Default: causal-lm.",
            autocompletion=complete(lambda: TASK_NAMES),
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"{AdapterSettings.help_of('method')} Default: vera.", autocompletion=complete_trained),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help=DataSettings.help_of("plain"))] = False,
    epochs: Annotated[float | None, typer.Option(help=f"{TrainingSettings.help_of('epochs')}")] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option("--learning-rate", "--lr", metavar="NUMBER", help=TrainingSettings.help_of("learning_rate")),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"{TrainingSettings.help_of('batch_size')} Default: 8.")
    ] = None,
    progress: Annotated[
        str | None,
        typer.Option(
            help="bar, plain, json, quiet or auto; --json goes with plain, bar or quiet.",
            autocompletion=complete(_modes),
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE: any setting, such as training.schedule=cosine. May be given again.",
            autocompletion=complete_settings,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in the output folder.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew in an output folder that holds a training, and remove that.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and stop there.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on your own data: an adapter of some kilobytes comes out, with logs and a report.

    The shortest form: kilotune train --model FOLDER --data FILE.jsonl --output DIR. Before it starts it prints a plan;
    stopped by whatever means, it goes on with --resume, to the same result. With --resume, --output is enough.
    """
    flags = {
        "model.base": model,
        "data.train": data,
        "data.validation": validation,
        "data.plain": plain or None,
        "output": output,
        "task": task,
        "adapter.method": method,
        "training.epochs": epochs,
        "training.learning_rate": None if learning_rate is None else _number(learning_rate),
        "training.batch_size": batch_size,
        "logging.progress": progress,
    }
    chosen = _settings(config, flags, settings or [], resume)
    if as_json and chosen.logging.progress == "json":
        raise ConfigError(
            "--json prints one document on stdout, and logging.progress json many lines; take one of them"
        )
    check_base(chosen.model.base, chosen.model.revision)
    for split in SPLITS:
        check_data(getattr(chosen.data, split), f"data.{split}", chosen.data.format)
    quiet_transformers()
    from ..train.results.outcome import is_main
    from ..train.run import train as run

    try:
        result = run(chosen, resume, force, dry_run, show=_document if as_json and dry_run else None)
    except KeyboardInterrupt as stopped:  # as the user asked for, so it is no error, but nothing came out either
        print(str(stopped) or "interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if result is None or not is_main():
        return
    if as_json:
        print_json(result.to_dict())
    elif chosen.logging.progress == "json":
        print(json.dumps({"event": "result", **result.to_dict()}))
    elif chosen.logging.progress != "quiet":
        print("\n".join(_summary(chosen, result)))


def _summary(settings: TrainSettings, result: Result) -> list[str]:
    """What came out, where it is, and what to do with it."""
    what = "the adapter" if settings.adapter.is_adapter else "the model"
    scores = result.metrics.get("test") or result.metrics.get("best") or {}
    told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in scores.items())
    split = "test" if "test" in result.metrics else "validation"
    lines = [f"{what} of step {result.best_step}: {result.folder}, {readable_bytes(result.adapter_bytes)}"]
    lines += [f"{split}: {told}"] if told else []
    if result.compared is not None:
        lines += [result.compared.line, *([result.compared.verdict] if result.compared.verdict else [])]
    lines += [f"report: {result.folder / 'report.html'}"] if settings.logging.report else []
    base = f" --base {settings.model.base}" if Path(settings.model.base).exists() else ""
    if settings.adapter.is_adapter:
        verb = "chat" if settings.task == "causal-lm" else "evaluate"
        data = "" if verb == "chat" else " DATA"
        lines.append(f"try it: kilotune {verb} {result.folder}{data}{base}")
    return lines


def _document(plan: RunPlan, preview: str) -> None:
    print_json({**plan.to_dict(), "example": preview})


def _settings(config: Path | None, flags: Mapping[str, Any], overrides: list[str], resume: bool) -> TrainSettings:
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    where = "the command line" if config is None else str(config)
    if config is None and resume and "output" in given:
        from ..train.trainer.output_folder import SETTINGS_NAME

        config = Path(given["output"]) / SETTINGS_NAME
        if not config.is_file():
            raise ConfigError(f"--resume: there is no training in {given['output']} to go on with")
    values = {} if config is None else read_config(config)
    for name, value in given.items():
        put(values, name, value[0] if isinstance(value, list) and len(value) == 1 else value)
    values = merged(values, overrides)
    missing = {"model.base": "--model", "data.train": "--data", "output": "--output"}
    faults = [f"{flag} ({name})" for name, flag in missing.items() if _absent(values, name)]
    if faults and config is None:
        raise ConfigError(f"give a config file (kilotune init writes one), or {', '.join(faults)}")
    return settings_from(values, where)


def _number(text: str) -> float | str:
    """A number, or the word as it is, which the settings then take or refuse."""
    try:
        return float(text)
    except ValueError:
        return text


def _absent(values: Mapping[str, Any], name: str) -> bool:
    place: Any = values
    for key in name.split("."):
        place = place.get(key) if isinstance(place, Mapping) else None
    return place is None
