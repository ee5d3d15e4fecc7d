"""Fine-tuning on one's own data: recipes that drive transformers' Trainer. Importing this needs no extra.

Begin in run.py: a fine-tuning from its settings to its files. Rooms, from below: settings, data (with metrics.py),
tasks, trainer, running, finished, results. Stands on model/, convert.py, plan.py and below::

    from kilotune.train import load_settings, train

    result = train(load_settings("config.yaml"))     # what `kilotune train config.yaml` does
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .finished.sampling_options import Sampling
    from .finished.text_generation import Answer, Chat, Writer
    from .own_module import fit_module
    from .results.outcome import Result
    from .run import evaluate, fit, train
    from .running.session import Session, open_session
    from .settings.config_file import load_settings, settings_from
    from .settings.sections import (
        AdapterSettings,
        DataSettings,
        LogSettings,
        ModelSettings,
        TrainingSettings,
        TrainSettings,
    )
    from .trainer.for_trainer import for_trainer
    from .trainer.parallel import ignore_sharded, shard_base
    from .trainer.with_reference import with_reference

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
    "with_reference",
]

if not TYPE_CHECKING:  # type checkers have the imports above, and no name beside them
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "own_module": ("fit_module",),
            "results.outcome": ("Result",),
            "run": ("evaluate", "fit", "train"),
            "running.session": ("Session", "open_session"),
            "settings.config_file": ("load_settings", "settings_from"),
            "settings.sections": (
                "AdapterSettings",
                "DataSettings",
                "LogSettings",
                "ModelSettings",
                "TrainingSettings",
                "TrainSettings",
            ),
            "trainer.for_trainer": ("for_trainer",),
            "trainer.parallel": ("ignore_sharded", "shard_base"),
            "trainer.with_reference": ("with_reference",),
            "finished.sampling_options": ("Sampling",),
            "finished.text_generation": ("Answer", "Chat", "Writer"),
        },
    )
