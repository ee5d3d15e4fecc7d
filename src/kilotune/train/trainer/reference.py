"""What a model is held against in training: a copy, in which all that training leaves as it is, is the model's own."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ... import storage
from ...errors import ConfigError, UnsupportedError, type_name
from ...injection import inject
from ...injection.tree import held_tensors, own_modules
from ...model.adapter_model import AdapterModel
from ...projections.matrices import Projections
from ...storage.sharded import is_unit
from ...weak import Weak
from .for_trainer import SHARED, for_trainer
from .handed_over import HandedOver

__all__ = ["reference_of", "root_of"]


def root_of(model: Any) -> nn.Module:
    """What to train for the ``model`` that a trainer is given."""
    if isinstance(model, AdapterModel):
        return for_trainer(model)
    if isinstance(model, nn.Module) and HandedOver.has(model):
        return model
    raise ConfigError(f"with_reference: model: expected for_trainer(model), got {type_name(model)}")


def reference_of(root: nn.Module, reference: str) -> nn.Module:
    """A model for inference: ``root``, of :func:`for_trainer`, as it is now, or without its adapters.

    All tensors that training does not change are the root's own.

    Raises:
        UnsupportedError: adapters are merged, the base is sharded, or holds what cannot be copied.

    """
    handed = HandedOver.of(root)
    handed.wide.restore()
    _check(root, handed)
    storage.settle(own_modules(root))
    memo: dict[int, Any] = {id(tensor): tensor for tensor in held_tensors(root)}
    memo.update({id(tensor): _apart(tensor) for tensor in handed.trained().values() if _changes(tensor)})
    try:
        made = copy.deepcopy(root, memo)
    except TypeError as error:  # locks, files and the like
        raise UnsupportedError(
            f"with_reference: the {type(root).__name__} holds what cannot be copied: {error}"
        ) from error
    if isinstance(made.__dict__.get("forward"), MethodType):  # put there by an earlier trainer, around root's own
        del made.__dict__["forward"]
    _keep_adapters(made, handed.state.active if reference == "start" else ())
    made.eval()
    if rounding := [m for m in own_modules(made) if (how := storage.storage_of(m)) is not None and not how.lossless]:
        made.register_forward_pre_hook(partial(_round_alike, Weak(root), rounding))
    return made


def _round_alike(root: Weak[nn.Module], layers: list[nn.Module], made: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook before each forward: bitsandbytes' int8 layers round their input in eval, and on CPUs not in training."""
    for layer in layers:
        layer.training = root().training


def _check(root: nn.Module, handed: HandedOver) -> None:
    if handed.state.merged:
        raise UnsupportedError(
            f"with_reference: adapters {list(handed.state.merged)} are merged into the weights that the reference "
            "would share; unmerge_adapter() first, or merge_and_unload() and add a new adapter"
        )
    if any(is_unit(module) for module in root.modules()):
        raise UnsupportedError(
            "with_reference: the base is sharded, and FSDP2 gathers its weights for one model only; let each process "
            "hold it whole, without shard_base"
        )


def _changes(tensor: Tensor) -> bool:
    """Whether training changes a tensor of a checkpoint, which has some that are only costly to make again."""
    return tensor.requires_grad or not isinstance(tensor, nn.Parameter)


def _apart(tensor: Tensor) -> Tensor:
    own = tensor.detach().clone()
    return nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own


def _keep_adapters(made: nn.Module, kept: tuple[str, ...]) -> None:
    """Take the other adapters out, so that the state dict, by which TRL tells references, is of what runs."""
    handed = HandedOver.of(made)
    handed.state.change(active=kept)
    for name in [name for name in handed.installed if name not in kept]:
        installed = handed.installed.pop(name)
        inject.remove(made, name, installed, Projections())
        if (shared := made._modules.get(SHARED)) is not None:  # what it has once for the whole model
            shared._modules.pop(installed.key, None)
    made.register_buffer("kilotune_options", handed.options())
