"""``kilotune init``: a config file for ``kilotune train``, with every setting and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError, did_you_mean
from ..train.settings.config_file import put, settings_from, starting_text
from ..train.settings.sections import TASK_NAMES, AdapterSettings, DataSettings, ModelSettings, TrainSettings
from ._output import Json, print_json

__all__ = ["init"]

# What a first config of each task has beside the defaults: something to change, not something to know.
STARTS: dict[str, dict[str, Any]] = {
    "causal-lm": {"data.train": "train.jsonl"},
    "text-classification": {"data.train": "train.csv", "data.validation_fraction": 0.1},
    "regression": {"data.train": "train.csv", "data.validation_fraction": 0.1},
    "token-classification": {"data.train": "train.jsonl", "data.validation_fraction": 0.1},
    "image-classification": {"data.train": "images", "data.validation_fraction": 0.1},
    "seq2seq": {"data.train": "train.jsonl", "data.validation_fraction": 0.1},
}


def init(
    task: Annotated[str, typer.Argument(help=f"{TrainSettings.help_of('task')}", metavar="[TASK]")] = "causal-lm",
    file: Annotated[Path, typer.Option("--file", "-f", help="The file to write.")] = Path("config.yaml"),
    model: Annotated[str, typer.Option("--model", "-m", help=ModelSettings.help_of("base"))] = "path/to/model",
    data: Annotated[str | None, typer.Option("--data", "-d", help=DataSettings.help_of("train"))] = None,
    method: Annotated[str, typer.Option(help=AdapterSettings.help_of("method"))] = "vera",
    output: Annotated[str, typer.Option("--output", "-o", help=TrainSettings.help_of("output"))] = "fine-tuned",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a config file for kilotune train: every setting at its default, with what it does."""
    if task not in TASK_NAMES:
        raise ConfigError(
            f"task: expected one of {', '.join(TASK_NAMES)}, got {task!r}.{did_you_mean(task, TASK_NAMES)}"
        )
    values: dict[str, Any] = {}
    chosen = {**STARTS[task], "task": task, "output": output, "model.base": model, "adapter.method": method}
    for name, value in {**chosen, **({} if data is None else {"data.train": data})}.items():
        put(values, name, value)
    settings_from(values, "kilotune init")
    if file.exists() and not force:
        raise ConfigError(f"{file} is there; --force overwrites it, --file names another")
    from ..train.trainer.output_folder import write_text

    try:
        write_text(file, starting_text(values))
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}") from error
    if as_json:
        print_json({"file": str(file), "task": task})
    else:
        print(f"wrote {file}; look it through, then: kilotune train {file}")
