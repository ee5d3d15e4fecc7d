"""What PEFT keeps in ``peft.utils.other``: preparing a base, and the wrapper of modules that are trained whole."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers.saved_module import SavedModule
from ..inspecting import no_split_modules as _get_no_split_modules
from ..inspecting import tied_to_embedding as _get_module_names_tied_with_embedding
from .constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

__all__ = [
    "CONFIG_NAME",
    "QUANTISED",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "_get_module_names_tied_with_embedding",
    "_get_no_split_modules",
    "_get_submodules",
    "cast_mixed_precision_params",
    "fsdp_auto_wrap_policy",
    "infer_device",
    "let_inputs_have_gradients",
    "prepare_model_for_kbit_training",
    "shift_tokens_right",
    "transpose",
]

QUANTISED = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
# Of these PEFT leaves what is in 16 bits as it is.
KEPT_AS_THEY_ARE = ("gptq", "aqlm", "eetq", "hqq", "torchao")


@final
class _SavedNames(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, SavedModule)


@final
class ModulesToSaveWrapper(metaclass=_SavedNames):
    """A module of which each adapter has a whole copy: ``isinstance(module, ModulesToSaveWrapper)``. None is made."""


AuxiliaryTrainingWrapper = ModulesToSaveWrapper


def infer_device() -> str:
    """The kind of device that is here: "cuda", "mps", "xpu" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if torch.xpu.is_available() else "cpu"


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Make a base ready for adapters: all frozen, what is in 16 bits in float32, and gradient checkpointing.

    As in PEFT a dense base is raised to float32 as well, and gets no gradient checkpointing.

    Args:
        model: the base, quantised or not; changed in place.
        use_gradient_checkpointing: of a quantised base: keep no activations of its blocks, and compute them again in
            the backward.
        gradient_checkpointing_kwargs: for the model's own method; by default ``use_reentrant=True``.
        auto_clear_cache: give a GPU's memory back that the 16 bits had.

    Returns: the model.

    Raises:
        ConfigError: a quantised model that has no gradient checkpointing.

    """
    method = getattr(model, "quantization_method", None)
    method = str(getattr(method, "value", method))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        plain = type(parameter.data) is Tensor and type(parameter).__name__ == "Parameter"
        if method not in KEPT_AS_THEY_ARE and plain and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    quantised = any(getattr(model, name, False) for name in QUANTISED) or method in KEPT_AS_THEY_ARE
    if use_gradient_checkpointing and quantised:
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant", True):
            let_inputs_have_gradients(model)
        named = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the latter before 5.23
        enable = next((found for name in named if (found := getattr(model, name, None)) is not None), None)
        if enable is None:
            raise ConfigError(f"use_gradient_checkpointing: a {type(model).__name__} has none; set it to False")
        enable(*([options] if options else []))
    return model


def let_inputs_have_gradients(model: nn.Module) -> None:
    """Let what a model's embedding gives have a gradient."""
    own = getattr(model, "enable_input_require_grads", None)
    if own is not None:
        own()
        return
    get = getattr(model, "get_input_embeddings", None)
    if get is not None:
        get().register_forward_hook(_require_gradients)


def _require_gradients(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters in ``dtype``, trained ones in float32, in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """What torch's ``FullyShardedDataParallel`` is to wrap by itself: blocks, and heads that are trained.

    It needs ``use_orig_params=True``, for a block has frozen and trained numbers. Blocks are the classes that the
    environment's ``FSDP_TRANSFORMER_CLS_TO_WRAP`` names, else those that transformers does not split.

    Raises:
        ConfigError: a class that the model has no module of.

    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    unsplit = getattr(model, "_no_split_modules", None) or ()
    told = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    wanted = {name.strip() for name in told.split(",")} - {""} if told is not None else set(unsplit)
    classes = {type(module) for module in model.modules() if type(module).__name__ in wanted}
    # transformers names blocks of all sizes of an architecture, of which a model may lack some.
    if told is not None and (missing := wanted - {cls.__name__ for cls in classes}):
        raise ConfigError(f"FSDP_TRANSFORMER_CLS_TO_WRAP: the model has no {', '.join(sorted(missing))}")
    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=_trained_leaf)
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return functools.partial(_or_policy, policies=[leaves, blocks])


def _trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not any(True for _ in module.children()) and isinstance(weight, Tensor) and weight.requires_grad


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """A decoder's inputs of its labels: each token one place to the right, padding in place of -100.

    Args:
        input_ids: (rows, tokens).
        pad_token_id, decoder_start_token_id: the tokens' numbers.

    """
    if pad_token_id is None:
        raise ConfigError("pad_token_id: expected the number of a token, got None")
    first = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([first, input_ids[:, :-1]], dim=1)  # (rows, tokens)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The module around that of a dotted name, that module, and its own name."""
    around, _, own = key.rpartition(".")
    return model.get_submodule(around), model.get_submodule(key), own


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight (out, in), of one that may be kept as (in, out)."""
    return weight.T if fan_in_fan_out else weight
