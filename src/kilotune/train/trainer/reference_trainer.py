"""The trainers that :mod:`.with_reference` makes, on transformers' Trainer; importing this needs transformers.

What touches internals of TRL's trainers stands here; tested with TRL 1.16.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, final

from torch import nn
from transformers import Trainer

from ...errors import ConfigError, UnsupportedError, type_name
from .for_trainer import HAS_REFERENCE
from .handed_over import HandedOver
from .reference import reference_of, root_of

__all__ = ["made_of"]


def made_of(trainer: Any, reference: str) -> type[Trainer]:
    """A subclass of ``trainer`` that makes its reference of the model that it trains."""
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise ConfigError(f"with_reference: expected a trainer of TRL's, such as DPOTrainer, got {type_name(trainer)}")
    if issubclass(trainer, _Ready):
        raise ConfigError(f"with_reference: {trainer.__name__} is one of with_reference's already; give TRL's own")
    signature = inspect.signature(trainer.__init__)

    @final
    class WithReference(trainer, _Ready):  # type: ignore[misc]  # made when it is asked for
        _tag_names: ClassVar[list[str]] = [*getattr(trainer, "_tag_names", ()), HAS_REFERENCE]
        _reference = reference

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = signature.bind(self, *args, **kwargs)
            options = _named(given, signature)
            if args and options.get("model") is None:  # a class of the caller's that hands on all that it gets
                raise ConfigError(f"with_reference: {trainer.__name__}: give its arguments by name, model=... too")
            root = options["model"] = root_of(options.get("model"))
            if not HandedOver.of(root).state.merged:  # of which the reference says more
                HandedOver.of(root).check_trains()
            if options.get("peft_config") is not None:
                raise ConfigError("with_reference: peft_config: the adapter is in the model already; leave it out")
            if "ref_model" in signature.parameters and options.get("ref_model") is None:
                options["ref_model"] = reference_of(root, reference)
            _, *positional = given.args
            try:
                super().__init__(*positional, **given.kwargs)
            finally:
                self._take_back()
            HandedOver.of(root).wide.restore()

    WithReference.__name__, WithReference.__qualname__ = trainer.__name__, trainer.__qualname__
    return WithReference


def _named(given: inspect.BoundArguments, signature: inspect.Signature) -> dict[str, Any]:
    """The arguments by name, to read and to change: where a class hands on what its trainer takes, those in that."""
    more = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    if more is None or "model" in signature.parameters:
        return given.arguments
    found: dict[str, Any] = given.arguments.setdefault(more, {})
    return found


class _Ready(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Comes, by inheritance, between a trainer of TRL's and transformers'.

    When the latter is made, the former makes its reference. Where none is given it loads one, with the options
    ``model_init_kwargs``, one of which says by which architecture.
    """

    _reference: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self)
        if "model_init_kwargs" in vars(self.args):
            self._given = self.args.model_init_kwargs
            self.args.model_init_kwargs = {**(self._given or {}), "architecture": _Maker(self.model, self._reference)}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' does it."""
        if not HandedOver.has(self.accelerator.unwrap_model(self.model)):
            raise ConfigError(
                "with_reference: the adapters were taken out of the model after this trainer was made, and its "
                "reference shares the base's weights; make another trainer"
            )
        return super().train(*args, **kwargs)

    def _take_back(self) -> None:
        if "_given" in self.__dict__:
            self.args.model_init_kwargs = self.__dict__.pop("_given")


@final
class _Maker:
    """In the place of an architecture, of which TRL loads a model."""

    def __init__(self, root: nn.Module, reference: str) -> None:
        self.root, self.reference = root, reference

    def from_pretrained(self, path: str, **_: Any) -> nn.Module:
        """What architectures are asked for."""
        return reference_of(self.root, self.reference)


def _check(trainer: Any) -> None:
    """Refuse what TRL would do wrong with weights that the model and its reference share."""
    args = trainer.args
    if getattr(args, "sync_ref_model", False):
        raise UnsupportedError(
            "sync_ref_model: the reference shares the base's weights, which this would write into; leave it out"
        )
    if getattr(args, "use_vllm", False):
        raise UnsupportedError("use_vllm: TRL sends vLLM a model's own weights, without its adapters; leave it out")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UnsupportedError(
            "with_reference: FSDP and DeepSpeed would shard the weights that the model and its reference share; let "
            "each process hold the base whole (DistributedDataParallel)"
        )
    tied = getattr(trainer.model.config.get_text_config(), "tie_word_embeddings", False)
    if getattr(args, "cast_lm_head_to_fp32", False) and tied:
        raise UnsupportedError(
            "cast_lm_head_to_fp32: the head is tied to the embeddings, which the reference would then compute with in "
            "another dtype than the model; leave it out"
        )
