"""Adapting the last blocks of a model only: which list of blocks it has, and a config that takes those.

::

    base.layers.0 ... 25    frozen, so what they give for a row never changes (frozen_inputs.py keeps it)
    base.layers.26 ... 29   adapted, with ``last_blocks=4``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import nn

from ..config import AdapterConfig
from ..errors import ConfigError, TargetError
from ..injection.inject import plan
from ..injection.tree import unwrapped, walk

__all__ = ["Blocks", "blocks_of", "in_last_blocks"]


@final
@dataclass(frozen=True)
class Blocks:
    """A model's list of equal blocks, that each text goes through one after the other. name: where it is."""

    name: str
    modules: tuple[nn.Module, ...]

    def first_of(self, last: int) -> int:
        """The index of the first of the ``last`` blocks.

        Raises:
            ConfigError: there are not more blocks than that.

        """
        if not 0 < last < len(self.modules):
            raise ConfigError(
                f"last_blocks: expected 1 to {len(self.modules) - 1}, got {last}: {self.name} has "
                f"{len(self.modules)} blocks; leave last_blocks out to adapt all of them"
            )
        return len(self.modules) - last

    def names(self, begin: int, end: int | None = None) -> tuple[str, ...]:
        """The blocks' own names."""
        return tuple(f"{self.name}.{i}" for i in range(begin, len(self.modules) if end is None else end))


def blocks_of(model: nn.Module) -> Blocks:
    """The longest list of equal blocks in ``model``, whether adapters are in it or not.

    Raises:
        TargetError: there is none, or there are several of that length (an encoder and a decoder).

    """
    found: list[Blocks] = []
    for name, module, _ in walk(model):
        held = unwrapped(module)
        if not isinstance(held, nn.ModuleList) or len(held) < 2 or any(_within(name, outer.name) for outer in found):
            continue
        blocks = tuple(unwrapped(block) for block in held)
        if len({type(block) for block in blocks}) == 1 and any(True for _ in blocks[0].children()):
            found.append(Blocks(name, blocks))
    longest = max((len(blocks.modules) for blocks in found), default=0)
    chosen = [blocks for blocks in found if len(blocks.modules) == longest]
    if len(chosen) != 1:
        there = " and ".join(blocks.name for blocks in chosen) or "none"
        raise TargetError(
            f"last_blocks: needs a model with one list of equal blocks, and {type(model).__name__} has {there}; name "
            "what to adapt in target_modules"
        )
    return chosen[0]


def in_last_blocks(model: nn.Module, config: AdapterConfig, last: int) -> AdapterConfig:
    """``config`` for the modules that it takes in the ``last`` blocks of ``model``, and no others.

    It names them as PEFT does: by ``layers_to_transform`` where each of these blocks has all of them, else one by one.

    Raises:
        ConfigError: ``last``, or a config that chooses blocks or parameters itself. TargetError: the model has no list
            of blocks, or what ``config`` takes lies elsewhere.

    """
    blocks = blocks_of(model)
    first = blocks.first_of(last)
    for name in ("layers_to_transform", "target_parameters"):
        if name in config.option_names() and getattr(config, name) is not None:
            raise ConfigError(f"last_blocks: {name} chooses by itself; give one of them")
    own = [name for name in _taken(model, config) if any(_within(name, block) for block in blocks.names(first))]
    if not own:
        raise TargetError(
            f"last_blocks: nothing that target_modules takes lies in {', '.join(blocks.names(first))}; all-linear does"
        )
    short = _by_index(config, blocks, first, own)
    return short if short is not None and _taken(model, short) == own else config.replace(target_modules=tuple(own))


def _taken(model: nn.Module, config: AdapterConfig) -> list[str]:
    return list(plan(model, "last-blocks", config).layers)


def _by_index(config: AdapterConfig, blocks: Blocks, first: int, own: list[str]) -> AdapterConfig | None:
    """As PEFT names layers of some blocks; the caller looks whether that takes the same."""
    if not {"layers_to_transform", "layers_pattern"} <= set(config.option_names()):
        return None
    names = {name.removeprefix(f"{block}.") for name in own for block in blocks.names(first) if _within(name, block)}
    return config.replace(
        target_modules=tuple(sorted(names)),
        layers_to_transform=tuple(range(first, len(blocks.modules))),
        layers_pattern=(blocks.name.rpartition(".")[2],),
    )


def _within(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")
