"""Adapters in a base that ``fully_shard`` has sharded before: whose gradients nobody reduces by himself."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..added_modules import base_modules
from ..errors import UnsupportedError
from ..storage.sharded import is_unit, processes

__all__ = ["came_after_shards", "check_reduced"]


def came_after_shards(base: nn.Module) -> bool:
    """Whether an adapter that comes now comes into a base that is sharded already."""
    return processes() > 1 and any(map(is_unit, base_modules(base)))


def check_reduced(model: nn.Module) -> None:
    """Refuse a training step in which each process would go its own way without a word.

    FSDP2 reduces the gradients of the parameters that were there when ``fully_shard`` was called. An adapter that came
    later is whole in each process, and its gradients are those of the process's own rows, unless
    DistributedDataParallel is around it, or ``fully_shard`` was called again, on the whole ``model``.

    Raises:
        UnsupportedError: neither is so.

    """
    if is_unit(model) or _inside_ddp():
        return
    raise UnsupportedError(
        "fully_shard() sharded the base before the adapter was added, so nobody reduces the adapter's gradients: each "
        "process would train another one. Add the adapter first and call fully_shard() then; or "
        "kilotune.train.shard_base(model), with DistributedDataParallel around it"
    )


def _inside_ddp() -> bool:
    """Whether DistributedDataParallel runs this forward; imports nothing."""
    module: Any = sys.modules.get("torch.nn.parallel.distributed")
    return module is not None and module.DistributedDataParallel._get_active_ddp_module() is not None
