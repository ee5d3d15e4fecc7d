"""Going on from an adapter that is there already (``adapter.start``), if it is one of this base."""

from __future__ import annotations

from pathlib import Path

from ...adapter_files.reading import open_adapter
from ...adapter_files.stands_on import StandsOn
from ...errors import CheckpointError, ConfigError, KilotuneError
from ...methods import PRESETS, method_of
from ...model.peft_model import PeftModel
from ..settings.sections import TrainSettings
from ..trainer import output_folder
from .base_model import Loaded

__all__ = ["start_from"]


def start_from(loaded: Loaded, settings: TrainSettings, digest: str) -> tuple[PeftModel, tuple[str, ...]]:
    """The base with the adapter that ``adapter.start`` names in it, to be trained on; and notes for the user.

    Args:
        loaded: the base.
        settings: of the training.
        digest: of the base as it was loaded.

    Raises:
        CheckpointError: it is of another base, or brings no weights for what the base lacks.
        ConfigError: it is of another method than ``adapter.method`` says.

    """
    start, base = str(settings.adapter.start), settings.model.base
    file = open_adapter(start)
    method = method_of(file.config).name
    if method != PRESETS.get(settings.adapter.method, (settings.adapter.method, {}))[0]:
        raise ConfigError(f"adapter.method is {settings.adapter.method!r}, and the adapter in {start!r} is {method!r}")
    if (on := StandsOn.of_header(file.metadata)) is not None:
        raise ConfigError(
            f"adapter.start: {start!r} stands on {on}, and would be trained without it here; go on with it by "
            f"`kilotune fleet train --on {on.name} --start {start}`, or in Python (docs/adapters.md)"
        )
    named = file.config.base_model_name_or_path
    trained = f"adapter.start: {start!r} was trained on {named!r}, and model.base is {base!r}"
    before = output_folder.base_of_run(file.folder, settings.model.to_dict())
    if before is not None and before != digest:
        raise CheckpointError(f"{trained}: its weights are others")
    try:
        model = PeftModel.from_pretrained(loaded.model, file, is_trainable=True)
    except KilotuneError as error:
        lines = [line.strip(" -") for line in str(error).splitlines()]
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        raise CheckpointError(f"{trained}: {' '.join(lines[:2])}{more}") from error
    saved = model.installed("default").saved
    bare = [name for name in loaded.fresh if name not in saved]
    if bare:
        raise CheckpointError(f"adapter.start: {start!r} brings no weights for {', '.join(bare)}, which the base lacks")
    unsure = before is None and named is not None and not _same(named, base)
    return model, (f"{trained}; if that is another model, the adapter means nothing there",) if unsure else ()


def _same(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())
