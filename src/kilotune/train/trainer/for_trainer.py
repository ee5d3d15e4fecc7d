"""Adapters under transformers' Trainer and TRL's SFTTrainer as they stand: what the model that they get answers.

A Trainer knows two kinds of models with adapters: PEFT's own class, which it tells with ``isinstance`` where PEFT is
installed, and a transformers model that says of itself that adapters are in it. Ours is the second kind: the base
model, with the adapters in it, goes to the Trainer, and some of its attributes are overridden (:func:`for_trainer`).
They are the same whether PEFT is installed or not.

What touches internals of transformers stands here; tested with transformers 5.23 and TRL 1.16.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ...adapter_files.writing import check_safe
from ...errors import CheckpointError, ConfigError, MissingExtraError, UnsupportedError, gather, type_name
from ...layers.adapted import AdaptedLayer
from ...model.adapter_model import AdapterModel
from ...model.base_overrides import attach_module, override
from ...storage.sharded import gathered, is_unit
from .handed_over import OPTIONS, STATE_NAME, HandedOver
from .parallel import check_averaged, ignore_sharded

__all__ = ["HAS_REFERENCE", "SHARED", "STATE_NAME", "for_trainer"]

CHECKPOINT = re.compile(r"checkpoint-\d+")
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
SHARED = "kilotune_shared"
ALONE = ("sft", "reward-trainer")  # the tags of TRL's trainers that know no model but the one that they train
HAS_REFERENCE = "kilotune"  # the tag of one of with_reference's
# Says that from_pretrained(distributed_config=...) has sharded a model. A Trainer then neither puts
# DistributedDataParallel around it nor lets it be resumed; for frozen weights there is no reason for that.
LOADED_SHARDED = "_is_distributed_loading_by_transformers"


def for_trainer(model: AdapterModel) -> nn.Module:
    """What to hand to ``transformers.Trainer`` or TRL's ``SFTTrainer`` in the place of ``model``.

    ::

        model = get_peft_model(base, VeraConfig(r=256))
        trainer = Trainer(model=for_trainer(model), args=..., train_dataset=...)

    It is the base model itself, adapters in it (a module that is not of transformers is put into a model of
    transformers), with answers of its own, until ``unload()`` or ``merge_and_unload()``:

    - ``save_pretrained`` writes the adapters and nothing else, and into the Trainer's own ``checkpoint-...`` folders
      also ``model.safetensors``, in which is what training changes, by the names of the model's parameters;
    - ``load_state_dict`` reads that file strictly, so that ``resume_from_checkpoint`` and ``load_best_model_at_end``
      work; anything else it takes as ever;
    - ``_hf_peft_config_loaded`` says that adapters are there, so that a quantised base may be trained, and gradient
      checkpointing lets gradients through the frozen embeddings;
    - DistributedDataParallel leaves alone what FSDP2 has sharded of the base (docs/engines.md);
    - vectors that an adapter has once for the whole model (Uni-LoRA, intrinsic dimension) are among its parameters.

    Columns of the data are chosen, labels found and losses shifted as for the base model. Trained vectors that were
    float32 stay so: TRL rounds those of quantised models to bfloat16, in which small steps are lost.

    Raises:
        ConfigError: ``model`` is not one of ours. MissingExtraError: transformers is not installed.

    """
    if not isinstance(model, AdapterModel):
        raise ConfigError(f"for_trainer: expected the model of get_peft_model(), got {type_name(model)}")
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise MissingExtraError("transformers", "train", "for_trainer") from error
    root = base = model.get_base_model()
    if HandedOver.has(base):  # before
        return base
    if isinstance(base, PreTrainedModel):
        attach_module(base, SHARED, model.shared_parameters)
    else:
        root = _as_pretrained(model)
    handed = HandedOver(model, root)
    override(root, "_hf_peft_config_loaded", True)
    override(root, LOADED_SHARDED, False)
    ignore_sharded(root)
    override(root, "save_pretrained", _Saving(handed))
    override(root, "load_state_dict", _Loading(handed))
    override(root, "add_model_tags", _Tagging(handed))
    override(root, "_kilotune_head", root.register_forward_pre_hook(_check_head, with_kwargs=True))
    if is_unit(base):
        override(root, "_kilotune_averaged", root.register_forward_pre_hook(check_averaged))
    override(root, "_kilotune_before", root.register_forward_pre_hook(_before_training))
    return root


@final
class _Saving:
    """``save_pretrained`` of a model that is handed to a Trainer."""

    def __init__(self, handed: HandedOver) -> None:
        self.handed = handed

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write the adapters, and in a Trainer's checkpoint what it resumes from.

        Args:
            save_directory: the folder.
            is_main_process: False writes nothing.
            state_dict: of the whole model, from engines that shard it all (FSDP, DeepSpeed), which gather it in this
                process only and resume from files of their own.
            safe_serialization: only True.

        """
        check_safe(safe_serialization)
        folder, handed = Path(save_directory), self.handed
        if state_dict is not None and is_main_process:
            with gathered(handed.modules(), _values(handed.root, state_dict)):
                handed.save(folder)
            return
        handed.save(folder, is_main_process)
        if is_main_process and CHECKPOINT.fullmatch(folder.name):
            handed.write_state(folder)


@final
class _Loading:
    """``load_state_dict`` of a model that is handed to a Trainer."""

    def __init__(self, handed: HandedOver) -> None:
        self.handed = handed

    def __call__(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take what a checkpoint of ours holds, all of it; every other state dict as any module does."""
        if OPTIONS not in state_dict:
            root = self.handed.root
            return type(root).load_state_dict(root, state_dict, strict, assign)
        self.handed.wide.restore()
        given = dict(state_dict)
        self.handed.check_options(given.pop(OPTIONS))
        own = self.handed.trained()
        faults = [f"missing: {name} {tuple(tensor.shape)}" for name, tensor in own.items() if name not in given]
        faults += [f"unexpected: {name} {tuple(value.shape)}" for name, value in given.items() if name not in own]
        faults += [
            f"{name}: expected {tuple(own[name].shape)} of {own[name].dtype}, got {tuple(value.shape)} of {value.dtype}"
            for name, value in given.items()
            if name in own and (value.shape, value.dtype) != (own[name].shape, own[name].dtype)
        ]
        if faults:
            raise CheckpointError(gather(f"{STATE_NAME} of the checkpoint does not fit this model:", faults))
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(given[name])
        return _Loaded([], [])


@final
class _Tagging:
    """``add_model_tags`` of a model that is handed to a Trainer: TRL's trainers say by it who they are."""

    def __init__(self, handed: HandedOver) -> None:
        self.handed = handed

    def __call__(self, tags: list[str] | str) -> None:
        """Refuse a trainer that perhaps loads a second base as its reference, the wrong one where ours was merged."""
        given = {tags} if isinstance(tags, str) else set(tags)
        if "trl" in given and not given & {*ALONE, HAS_REFERENCE}:
            raise UnsupportedError(
                f"TRL's trainer of {sorted(given - {'trl'})} may load a second base as its reference, and not the one "
                "that is trained; make it with kilotune.train.with_reference, as in "
                "with_reference(DPOTrainer)(model=for_trainer(model), ...)"
            )
        root = self.handed.root
        type(root).add_model_tags(root, tags)  # type: ignore[attr-defined]  # a model of transformers


class _Loaded(NamedTuple):
    """What ``load_state_dict`` gives."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _values(root: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The parameters' values in ``state_dict``, by ``id``; FSDP1 and compiled models add words of theirs to names."""
    names = {p: WRAPPERS.sub("", name) for name, p in root.named_parameters()}
    return {id(p): state_dict[name] for p, name in names.items() if name in state_dict}


# -- models --------------------------------------------------------------------------------------------


def _check_head(root: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what TRL would pass over: it multiplies with the head's weight itself."""
    head = root.get_output_embeddings() if kwargs.get("fused_lm_head") else None
    if isinstance(head, AdaptedLayer) and len(head.adapters) > 0:
        raise UnsupportedError(
            "TRL's trainers multiply with the weight of the output embeddings themselves, so an adapter there would "
            "never be trained; leave it out of target_modules, or name it in modules_to_save"
        )


def _before_training(root: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook before each forward in training: parameters that were float32 are so again, and some are trained."""
    if root.training:
        handed = HandedOver.of(root)
        handed.wide.restore()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            handed.check_trains()


def _as_pretrained(model: AdapterModel) -> nn.Module:
    """A model of transformers around a module that is none: a Trainer saves others whole, whatever they answer."""
    from transformers import PreTrainedConfig, PreTrainedModel

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.adapted(*args, **kwargs)

    base = type(model.get_base_model())
    signature = inspect.signature(base.forward)
    forward.__signature__ = signature  # type: ignore[attr-defined]  # a Trainer reads the columns and labels there
    given = [name for name in signature.parameters if name != "self"]
    members = {
        "forward": forward,
        "config_class": PreTrainedConfig,
        "main_input_name": given[0] if given else "input",
        "accepts_loss_kwargs": False,
    }
    made: nn.Module = type(base.__name__, (PreTrainedModel,), members)(PreTrainedConfig())
    made.adapted = model
    return made
