"""Several processes: the base in shards, one of them in each process, and the adapter whole in every one.

FSDP2 (torch's ``fully_shard``) keeps the frozen weights, which are gigabytes, in shards, and gathers a block's while it
runs. What is trained is kilobytes: every process has it whole, and DistributedDataParallel averages its gradients, and
that is all that processes exchange. So the optimizer, the checkpoints and the Trainer work as in one process. The
projections of VeRA and its like are in neither: each process makes them from their definition, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, final

import torch
from torch import nn

from ...added_modules import Added
from ...errors import UnsupportedError
from ...model.adapter_model import AdapterModel
from ...model.base_overrides import override
from ...storage import storage_of
from ...storage.sharded import is_sharded, is_unit, processes
from ...weak import Weak

__all__ = ["check_averaged", "ignore_sharded", "shard_base"]

IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks for what it is to leave alone


def shard_base(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Shard the frozen weights of ``model`` over all processes, in place; what is trained stays whole.

    ::

        torch.distributed.init_process_group()
        model = get_peft_model(base, VeraConfig(r=256))
        shard_base(model)
        ddp = DistributedDataParallel(model)          # or Trainer(model=for_trainer(model), ...)

    Adapters may be added before or after. The units are the blocks that transformers' models name
    (``_no_split_modules``), or else the modules in the outermost ``ModuleList`` or ``ModuleDict``; what is outside of
    them is one more unit. A block's weights are gathered for its forward, and once more for its backward.

    Args:
        model: of :func:`kilotune.get_peft_model`, or a base model with no adapters yet.
        mesh: over which processes (a ``DeviceMesh``); all of them by default.

    Returns:
        ``model``.

    Raises:
        UnsupportedError: the process group is not there, weights are quantised or merged, or it is sharded already.

    """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if not (dist.is_available() and dist.is_initialized()):
        raise UnsupportedError(
            "shard_base: there is no process group; start with torchrun and call torch.distributed.init_process_group()"
        )
    base = model.get_base_model() if isinstance(model, AdapterModel) else model
    _check(model, base)
    whole: set[nn.Parameter] = set()
    if base is not model:  # of a base without adapters all will be frozen
        whole.update(p for p in base.parameters() if p.requires_grad)
        whole.update(p for module in base.modules() if isinstance(module, Added) for p in module.parameters())
    for block in blocks(base):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(base, mesh=mesh, ignored_params=whole)
    ignore_sharded(base)
    return model


def _check(model: nn.Module, base: nn.Module) -> None:
    if any(is_unit(module) for module in base.modules()):
        raise UnsupportedError("shard_base: the model is sharded already")
    if isinstance(model, AdapterModel) and model.merged_adapters:
        raise UnsupportedError("shard_base: adapters are merged into the weights; unmerge_adapter() first")
    for name, module in base.named_modules():
        storage = storage_of(module)
        if storage is not None and not storage.lossless:
            own = name.removesuffix(".base_layer")
            raise UnsupportedError(
                f"shard_base: {own!r} is quantised ({storage.scheme(module)}), and FSDP2 shards floating-point "
                "weights only; let each process hold the quantised base whole, without shard_base, or shard it "
                "unquantised"
            )


def blocks(base: nn.Module) -> list[nn.Module]:
    """The units of sharding inside ``base``, the outermost ones."""
    named = set(getattr(base, "_no_split_modules", None) or ())
    found = list(_outermost(base, named))
    return found if found else list(_outermost(base, set()))


def _outermost(module: nn.Module, named: set[str]) -> Iterable[nn.Module]:
    for child in module.children():
        if isinstance(child, Added):
            continue
        if named and type(child).__name__ in named:
            yield child
        elif not named and isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from (inner for inner in child.children() if any(True for _ in inner.parameters()))
        else:
            yield from _outermost(child, named)


def ignore_sharded(model: nn.Module) -> None:
    """Let DistributedDataParallel leave alone what FSDP2 has sharded of ``model``, or shards of it later.

    :func:`shard_base` and ``for_trainer`` do this themselves; it is for a base that others have sharded.

    Args:
        model: of :func:`kilotune.get_peft_model`, or a base model; DistributedDataParallel goes around either.

    """
    base = model.get_base_model() if isinstance(model, AdapterModel) else model
    override(base, IGNORED, _Sharded(base))


def check_averaged(root: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook before each forward: refuse to train an adapter whose gradients nobody averages.

    Engines that shard by themselves put no DistributedDataParallel around a model that is sharded already, and leave it
    as it is: each process would train an adapter of its own.

    Raises:
        UnsupportedError: training, several processes, and no DistributedDataParallel.

    """
    if not (root.training and torch.is_grad_enabled() and processes() > 1):
        return
    if nn.parallel.DistributedDataParallel._active_ddp_module is None:
        raise UnsupportedError(
            "the base is sharded and the adapter is whole in each process, so DistributedDataParallel has to average "
            "its gradients; the engine was told to shard by itself (fsdp in TrainingArguments, accelerate's FSDP, "
            "DeepSpeed) and leaves that out: turn it off there, or leave out shard_base"
        )


@final
class _Sharded:
    """The names of the sharded parameters as they are now, in the base and in the model around it."""

    def __init__(self, base: nn.Module) -> None:
        self.base = Weak(base)  # which holds this

    def __iter__(self) -> Iterator[str]:
        for name, parameter in self.base().named_parameters(remove_duplicate=False):
            if is_sharded(parameter):
                yield from (name, f"model.{name}")
