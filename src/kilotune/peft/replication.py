"""``LoraConfig(layer_replication=...)``: a model with some of its blocks more than once, over the same weights.

``[[0, 4], [2, 5]]`` makes blocks 0, 1, 2, 3, 2, 3, 4 of the blocks 0 to 4. Each copy has an adapter of its own. Nothing
of the base's numbers is changed or stored again; its list of blocks is another one from there on, as in PEFT.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, final

from torch import nn

from ..errors import ConfigError, type_name

__all__ = ["Replicated", "fault_of", "replicate"]

MOST = 1024  # blocks that a file may ask for; the deepest models have some 130
DONE = "_kilotune_replication"  # on the module that has the list
# Where architectures keep their blocks, from the innermost ``.model`` on: (inside, its list).
PLACES = (("", "layers"), ("bert.encoder", "layer"), ("encoder", "layer"), ("", "h"))


@final
class Replicated(NamedTuple):
    """What is needed to take a replication back: the module that has the list, its list, what its config said."""

    owner: nn.Module
    name: str
    before: nn.ModuleList
    config: Any
    said: dict[str, Any]

    def undo(self) -> None:
        """Put the model's own list back."""
        setattr(self.owner, self.name, self.before)
        del self.owner.__dict__[DONE]
        for key, value in self.said.items():
            setattr(self.config, key, value)


def fault_of(ranges: Any) -> str | None:
    """Why a value is no layer_replication; None where it is one, or is empty."""
    if ranges in (None, [], ()):
        return None
    pairs = ranges if isinstance(ranges, Sequence) and not isinstance(ranges, str) else [ranges]
    good = all(
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(type(number) is int for number in pair)
        and 0 <= pair[0] < pair[1]
        for pair in pairs
    )
    if not good:
        return f"layer_replication: expected pairs [first, end] of numbers of blocks, got {ranges!r:.200}"
    total = sum(end - first for first, end in pairs)
    return None if total <= MOST else f"layer_replication: {total} blocks are more than the {MOST} that there may be"


def replicate(model: nn.Module, ranges: Sequence[Sequence[int]], with_adapters: bool) -> Replicated | None:
    """Give a model the blocks that the ranges name; None where it has them already.

    Args:
        model: the base, changed in place.
        ranges: (first, end) of blocks, one after the other.
        with_adapters: whether adapters are in it, whose layers cannot be copied.

    Raises:
        ConfigError: a model without a list of blocks where PEFT looks for it, blocks that it does not have, adapters in
            it, or another replication.

    """
    owner, name = _place(model)
    wanted = [tuple(pair) for pair in ranges]
    if (done := owner.__dict__.get(DONE)) is not None and done == wanted:
        return None
    if done is not None or with_adapters:
        why = f"its blocks are replicated by {[list(pair) for pair in done]}" if done else "there are adapters in it"
        raise ConfigError(
            f"layer_replication={[list(pair) for pair in wanted]}: {why}; take the model as it was loaded"
        )
    before = getattr(owner, name)
    if (end := max(pair[1] for pair in wanted)) > len(before):
        raise ConfigError(f"layer_replication: there are {len(before)} blocks, and a range ends at {end}")
    numbers = [number for first, end in wanted for number in range(first, end)]
    setattr(owner, name, nn.ModuleList(_copy(before[number], place) for place, number in enumerate(numbers)))
    owner.__dict__[DONE] = wanted
    config = getattr(owner, "config", None)
    return Replicated(owner, name, before, config, _say(config, len(before), numbers))


def _place(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that has the list of blocks, and what it calls it."""
    inner = model
    while isinstance(found := getattr(inner, "model", None), nn.Module):
        inner = found
    for inside, name in PLACES:
        owner: Any = inner
        for part in inside.split(".") if inside else ():
            owner = getattr(owner, part, None)
        if isinstance(getattr(owner, name, None), nn.ModuleList):
            return owner, name
    raise ConfigError(
        f"layer_replication: {type_name(model)} has no list of blocks; expected .layers, .encoder.layer or .h, as "
        "Llama, BERT and Falcon have"
    )


def _copy(block: nn.Module, place: int) -> nn.Module:
    """A block over the same parameters, which knows the place where it stands."""
    made = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    for module in made.modules():
        if isinstance(getattr(module, "layer_idx", None), int):  # what transformers finds a block's cache by
            module.layer_idx = place  # type: ignore[assignment]
    return made


def _say(config: Any, count: int, numbers: Sequence[int]) -> dict[str, Any]:
    """Tell the model's config how many blocks there are, and of what type each is; returns what it said before."""
    said: dict[str, Any] = {}
    if isinstance(getattr(config, "num_hidden_layers", None), int):
        said["num_hidden_layers"] = config.num_hidden_layers
        config.num_hidden_layers = len(numbers)
    types = getattr(config, "layer_types", None)
    if isinstance(types, list) and len(types) == count:
        said["layer_types"] = types
        config.layer_types = [types[number] for number in numbers]
    return said
