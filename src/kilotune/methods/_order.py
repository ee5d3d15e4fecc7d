"""The order of the layers, which decides what numbers of a model-wide vector's projection each of them gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import option
from ..errors import CheckpointError, ConfigError, gather
from ._base import Site

__all__ = ["in_order", "order_faults", "order_option"]


def order_option() -> Any:
    """The option ``site_order``; normalise it with ``tuple`` before it is checked."""
    return option(
        None,
        "The adapted layers in the order in which the projection's numbers were dealt out to them; filled in when an "
        "adapter is saved. None: the order of the model.",
        ours=True,
    )


def order_faults(order: Any) -> list[str]:
    """A line when ``order`` is neither None nor a tuple of different names."""
    if order is None:
        return []
    if not isinstance(order, tuple) or not all(isinstance(name, str) for name in order):
        return [f"site_order: expected a list of layer names or None, got {order!r}"]
    twice = sorted({name for name in order if order.count(name) > 1})
    return [f"site_order: names {twice} more than once"] if twice else []


def in_order(sites: Sequence[Site], order: Sequence[str] | None, loaded: bool) -> list[Site]:
    """The sites as ``order`` lists them.

    Raises:
        ConfigError: it lists others than there are; CheckpointError where it came with a file (``loaded``).

    """
    if order is None:
        return list(sites)
    here, listed = {site.name: site for site in sites}, set(order)
    faults = [f"{name!r}: in site_order, but not adapted here" for name in order if name not in here]
    faults += [f"{name!r}: adapted here, but not in site_order" for name in here if name not in listed]
    if faults:
        kind = CheckpointError if loaded else ConfigError
        raise kind(gather("other layers are adapted than those that the vector belongs to:", faults))
    return [here[name] for name in order]
