"""Fine-tuning on one's own data: recipes that drive transformers' Trainer. Importing this needs no extra.

::

    from kilotune.train import load_settings, train

    result = train(load_settings("config.yaml"))     # what `kilotune train config.yaml` does
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config_file import load_settings, settings_from
    from .hf import for_trainer
    from .inference import Answer, Chat, Sampling, Writer
    from .modules import fit_module
    from .outcome import Result
    from .parallel import ignore_sharded, shard_base
    from .run import evaluate, fit, train
    from .session import Session, open_session
    from .settings import (
        AdapterSettings,
        DataSettings,
        LogSettings,
        ModelSettings,
        TrainingSettings,
        TrainSettings,
    )

__all__ = [
    "AdapterSettings",
    "Answer",
    "Chat",
    "DataSettings",
    "LogSettings",
    "ModelSettings",
    "Result",
    "Sampling",
    "Session",
    "TrainSettings",
    "TrainingSettings",
    "Writer",
    "evaluate",
    "fit",
    "fit_module",
    "for_trainer",
    "ignore_sharded",
    "load_settings",
    "open_session",
    "settings_from",
    "shard_base",
    "train",
]

_HOMES = {
    "config_file": ("load_settings", "settings_from"),
    "hf": ("for_trainer",),
    "inference": ("Answer", "Chat", "Sampling", "Writer"),
    "modules": ("fit_module",),
    "outcome": ("Result",),
    "parallel": ("ignore_sharded", "shard_base"),
    "run": ("evaluate", "fit", "train"),
    "session": ("Session", "open_session"),
    "settings": tuple(name for name in __all__ if name.endswith("Settings")),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the command line's help needs few of them."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{home}", __name__), name)
