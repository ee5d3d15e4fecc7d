"""A problem of one's own, from a Python file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ...errors import ConfigError, did_you_mean
from .problem import Problem
from .problem_settings import YoursSettings

__all__ = ["load_yours"]


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
