"""TRL's trainers that hold the model against a reference (DPO, KTO, GRPO, RLOO), with one base for both.

TRL takes the reference of PEFT's models from their adapter, and knows them by ``isinstance``. For any other model it
loads a second base from the path in the config: not the base that is trained, where that was merged or has no path.
"""

from __future__ import annotations

from typing import TypeVar, cast

from ...errors import ConfigError, MissingExtraError

__all__ = ["REFERENCES", "with_reference"]

REFERENCES = ("start", "base")
Made = TypeVar("Made")


def with_reference(trainer: type[Made], reference: str = "start") -> type[Made]:
    """A trainer of TRL's whose reference model shares the weights of the model that it trains.

    ::

        trainer = with_reference(DPOTrainer)(model=for_trainer(model), args=DPOConfig("run"), train_dataset=pairs)

    It is TRL's trainer in all else, and takes the same arguments. The reference is made when the trainer is, and takes
    as much memory as the adapters in it. A ``ref_model`` that is given is taken as it is.

    Args:
        trainer: ``DPOTrainer``, ``KTOTrainer``, ``GRPOTrainer``, ``RLOOTrainer``, or a class made of one of them.
        reference: "start": the active adapters as they are when the trainer is made, as TRL does it with PEFT. For a
            new adapter that is the base, for one that goes on what it was. "base": the base, whatever the adapters do.

    Raises:
        ConfigError: another reference, or no trainer. MissingExtraError: transformers is not installed. The trainer
            that is made raises UnsupportedError where a reference cannot share the base: merged adapters, a sharded
            base, ``sync_ref_model``; and for ``use_vllm``.

    """
    if reference not in REFERENCES:
        raise ConfigError(f"with_reference: reference: expected one of {list(REFERENCES)}, got {reference!r}")
    try:
        from .reference_trainer import made_of
    except ImportError as error:
        raise MissingExtraError("transformers", "train", "with_reference") from error
    return cast("type[Made]", made_of(trainer, reference))
