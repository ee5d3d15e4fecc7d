"""What the shell offers for a value that is half typed. The shell learns it by ``kilotune --install-completion``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..known_names import METHOD_OPTIONS, PRESET_NAMES

__all__ = ["complete", "complete_methods", "complete_settings", "complete_trained"]


def complete(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """For typer's ``autocompletion``: those of ``names`` that begin with what is typed."""

    def begin_with(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return begin_with


def _methods() -> list[str]:
    return [*METHOD_OPTIONS, *PRESET_NAMES]


complete_methods = complete(_methods)
"""The methods and presets."""


def _trained() -> list[str]:
    from ..train.settings.sections import METHOD_NAMES

    return list(METHOD_NAMES)


complete_trained = complete(_trained)
"""What ``adapter.method`` takes."""


def _settings() -> list[str]:
    from ..train.settings.sections import SECTIONS, TrainSettings

    own = [f"{name}=" for name in TrainSettings.names()]
    return own + [f"{name}.{key}=" for name, section in SECTIONS.items() for key in section.names()]


complete_settings = complete(_settings)
"""The keys of the settings of a fine-tuning, for ``--set``."""
