"""A problem of one's own, from a Python file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from ...config import FrozenDict
from ...errors import ConfigError, did_you_mean
from ...train.settings.fields import Section, mapping, setting, text
from .problem import Problem

__all__ = ["YoursSettings", "load_yours"]


@final
@dataclass(frozen=True, kw_only=True)
class YoursSettings(Section):
    """Where the problem is."""

    SECTION: ClassVar[str] = "problem"

    file: str = setting("", text, "A Python file, which is run; from the folder of this config file.")
    name: str = setting("", text, "The class in it: a subclass of kilotune.experiments.compare.problem.Problem.")
    arguments: Mapping[str, Any] = setting(FrozenDict(), mapping, "What the class is made with, by name.")


def load_yours(settings: YoursSettings) -> Problem:
    """The problem of a user's file.

    Raises:
        ConfigError: there is no such file, or no such class in it.
    """
    path = Path(settings.file)
    if not path.is_file():
        raise ConfigError(f"problem.file: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"problem.file: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    there = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Problem)]
    if settings.name not in there:
        hint = did_you_mean(settings.name, there) or f" Problems there: {', '.join(there) or 'none'}"
        raise ConfigError(f"problem.name: {path} has no problem {settings.name!r}.{hint}")
    made: Problem = getattr(module, settings.name)(**settings.arguments)
    return made
