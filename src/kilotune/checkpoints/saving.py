"""Adapters of a model to disk, whole, however they are held."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..injection.installed_adapter import Installed
from ..storage.sharded import gathered, is_sharded
from . import peft_layout as checkpoint

__all__ = ["save"]


def save(
    adapters: Mapping[Path, Installed], is_main_process: bool = True, values: Mapping[int, Tensor] | None = None
) -> None:
    """Write adapters, each into its folder.

    Args:
        adapters: by folder.
        is_main_process: False writes nothing, and only takes part in gathering what is sharded.
        values: of parameters that are gathered already, by ``id`` (see :func:`kilotune.storage.sharded.gathered`).

    """
    modules = [module for installed in adapters.values() for module in installed.modules()]
    if not (is_main_process or any(is_sharded(p) for module in modules for p in module.parameters(recurse=False))):
        return
    with gathered(modules, values):
        states = {
            folder: checkpoint.state_of(installed) for folder, installed in adapters.items()
        }  # all, before any is written
    for folder, state in states.items() if is_main_process else ():
        checkpoint.write(folder, *state)
