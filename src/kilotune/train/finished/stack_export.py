"""A stack of low-rank adapters as one LoRA.

::

    W + B1 A1 + B2 A2  =  W + [B1 B2] [A1; A2],     rank r1 + r2, exact to float32 rounding
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...adapter_files import writing
from ...adapter_files.files import TwoFiles
from ...adapter_files.reading import AdapterFile, parse
from ...convert import exact_targets, low_rank_factors
from ...errors import AdapterError, CheckpointError, UnsupportedError, gather
from ...injection import inject
from ...injection.installed_adapter import Installed
from ...methods import LoraConfig
from ...model.peft_model import PeftModel
from .lora_export import check_low_rank

__all__ = ["summed"]

Factors = tuple[Tensor, Tensor]  # A (r, in), B (out, r), float64


def summed(model: PeftModel, names: Mapping[str, str]) -> AdapterFile:
    """Adapters of ``model`` that act together as one LoRA, whose rank is the sum of theirs.

    A layer that not all of them change has zeros in place of the others' rows.

    Args:
        model: the adapters in their base (whose weights are not read; see :func:`kilotune.convert.hollow`).
        names: of two or more in the model, the lowest first, by what errors call them.

    Raises:
        UnsupportedError: one of them is no LoRA (not of low rank, trained biases, modules trained whole), by name.
        CheckpointError: values that are not finite.

    """
    if len(names) < 2:
        raise AdapterError(f"summed(): expected two adapters or more, got {list(names.values())}")
    parts = {told: model.installed(name) for told, name in names.items()}
    for name, installed in parts.items():
        _check(name, installed)
    factors: dict[str, list[Factors]] = {}
    for installed in parts.values():
        for layer, own in low_rank_factors(installed).items():
            factors.setdefault(layer, []).append(own)
    joined = {
        layer: (torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], 1)) for layer, own in factors.items()
    }
    return _as_lora(model, list(parts.values())[-1], joined)


def _check(name: str, installed: Installed) -> None:
    try:
        check_low_rank(installed)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name} of the stack is no LoRA: {error}") from error
    whole = [f"module {module!r}, trained whole" for module in installed.saved]
    whole += [f"the bias of {layer!r}" for layer, slot in installed.slots().items() if slot.trained_bias is not None]
    if whole:
        raise UnsupportedError(
            gather(f"{name} of the stack brings what one LoRA for both does not hold; export it --to merged:", whole, 5)
        )
    broken = [key for key, parameter in installed.parameters() if not bool(torch.isfinite(parameter).all())]
    if broken:
        raise CheckpointError(gather(f"{name} of the stack holds values that are not finite:", broken))


def _as_lora(model: PeftModel, top: Installed, factors: dict[str, Factors]) -> AdapterFile:
    rank = max(a.shape[0] for a, _ in factors.values())
    old = top.config
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=exact_targets(model, list(factors)),
        task_type=old.task_type,
        base_model_name_or_path=old.base_model_name_or_path,
        revision=old.revision,
        inference_mode=True,
    )
    name = "summed"
    while name in model.peft_config:
        name += "'"
    model._install(inject.plan(model.model, name, config, strict=False), None)
    try:
        new = model.installed(name)
        new.base = top.base  # of a hollow base there is none
        slots = new.slots()
        for layer, (a, b) in factors.items():
            own = slots[layer].own()
            for parameter in own.values():
                parameter.data.zero_()
            own["lora_A"].data[: a.shape[0]] = a
            own["lora_B"].data[:, : b.shape[1]] = b
        return parse(TwoFiles(Path("the stack"), *writing.state_of(new)))
    finally:
        model.delete_adapter(name)
