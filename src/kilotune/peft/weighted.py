"""add_weighted_adapter: a LoRA adapter made of several others in one model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError, check_one_of
from ..kernels.combining import WAYS, combined, factors
from ..kernels.lowrank import accumulate_dtype
from ..layers.slot import Slot
from ..methods.ia3 import Ia3
from .config import PeftConfig
from .layer_shape import low_rank

if TYPE_CHECKING:
    from .tuners.tuners_utils import BaseTuner

__all__ = ["COMBINATIONS", "add_scales", "combine", "configuration"]

COMBINATIONS = (*WAYS, "cat", "svd", *(f"{way}_svd" for way in WAYS if way != "linear"))


def configuration(tuner: BaseTuner, adapters: Sequence[str], way: str, svd_rank: int | None) -> PeftConfig:
    """That of an adapter made of others: the first one's, with the rank that is needed, all targets, and a scale of 1.

    Raises:
        ConfigError: an unknown way, other methods than LoRA, ranks that differ, targets that cannot be put together.

    """
    check_one_of("combination_type", way, COMBINATIONS)
    configs = [tuner.peft_config[name] for name in tuner._named(list(adapters))]
    if wrong := [
        name
        for name, c in zip(adapters, configs, strict=True)
        if c.peft_type != "LORA" or getattr(c, "use_dora", False)
    ]:
        raise ConfigError(f"add_weighted_adapter: {wrong} are no plain LoRA adapters; only such are a sum of factors")
    if started := [name for name in adapters if tuner.installed(name).config.part_of_base]:
        raise ConfigError(
            f"add_weighted_adapter: {started} count their change from a part of the base (init_lora_weights), so no "
            "sum of their factors is meant; kilotune.convert.to_lora makes plain LoRA adapters of them"
        )
    ranks = [_rank(tuner, name) for name in adapters]
    if way == "cat":
        rank = sum(ranks)
    elif way == "svd" or way.endswith("_svd"):
        rank = svd_rank or max(ranks)
    elif len(set(ranks)) > 1:
        given = ", ".join(f"{name!r}: {rank}" for name, rank in zip(adapters, ranks, strict=True))
        raise ConfigError(f"combination_type={way!r} needs adapters of one rank, got {given}; use 'cat' or 'svd'")
    else:
        rank = ranks[0]
    _refuse_shared_heads(tuner, adapters)
    targets = sorted({name for one in adapters for name in tuner.installed(one).slots()})
    return configs[0].copy(
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        target_modules=targets,
        alpha_pattern={},
        rank_pattern={},
        init_lora_weights=True,
    )


def _rank(tuner: BaseTuner, name: str) -> int:
    """The largest of an adapter's ranks."""
    found = [low_rank(slot) for slot in tuner.installed(name).slots().values() if slot.method is not None]
    return max(delta.a.shape[-2] for delta in found if delta is not None)


def _refuse_shared_heads(tuner: BaseTuner, adapters: Sequence[str]) -> None:
    saved = [name for one in adapters for name in tuner.installed(one).saved]
    if doubled := sorted({name for name in saved if saved.count(name) > 1}):
        raise ConfigError(
            f"add_weighted_adapter: cannot add weighted adapters that each train {doubled} whole (modules_to_save), of "
            "which no sum is meant; leave those adapters out"
        )


@torch.no_grad()
def combine(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    way: str,
    density: float | None,
    sign: str,
    clamp: float | None,
) -> None:
    """Give an adapter that is in a model the numbers that ``way`` makes of others."""
    for name, slot in tuner.installed(adapter_name).slots().items():
        layer = tuner.installed(adapter_name).layers[name]
        pairs = [(layer.slot(one), weight) for one, weight in zip(adapters, weights, strict=True)]
        own = [(found, weight) for found, weight in pairs if found is not None and found.method is not None]
        a, b = _made(own, way, slot.own()["lora_A"].shape[0], density, sign, clamp)
        for parameter, value in ((slot.own()["lora_A"], a), (slot.own()["lora_B"], b)):
            parameter.zero_()
            places = tuple(slice(0, size) for size in value.shape)
            parameter[places] = value.to(parameter.dtype)


def _made(
    own: Sequence[tuple[Slot, float]], way: str, rank: int, density: float | None, sign: str, clamp: float | None
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of one layer."""
    deltas = [(delta, weight) for slot, weight in own if (delta := low_rank(slot)) is not None]
    scaled = [weight * delta.scale for delta, weight in deltas]
    firsts, seconds = ([slot.own()[key] for slot, _ in own] for key in ("lora_A", "lora_B"))
    if way == "cat":
        return torch.cat([a * s for a, s in zip(firsts, scaled, strict=True)]), torch.cat(list[Tensor](seconds), dim=1)
    if way == "svd" or way.endswith("_svd"):
        wide = accumulate_dtype(firsts[0].dtype)
        whole = [s.to(wide) @ f.to(wide) * d.scale for f, s, (d, _) in zip(firsts, seconds, deltas, strict=True)]
        plain = "linear" if way == "svd" else way.removesuffix("_svd")
        return factors(combined(plain, whole, [weight for _, weight in deltas], density, sign), rank, clamp)
    # Of a product of two factors each gets the root, and one of them the sign.
    roots = [math.sqrt(abs(value)) for value in scaled]
    signed = [math.copysign(root, value) for root, value in zip(roots, scaled, strict=True)]
    return combined(way, firsts, signed, density, sign), combined(way, seconds, roots, density, sign)


# -- IA3 -------------------------------------------------------------------------------------------------------


def add_scales(tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Add an IA3 adapter whose vectors are the weighted sums of others'; a layer that one lacks gets nothing from it.

    Raises:
        ConfigError: other methods than IA3, modules that several train whole, or a layer of which one scales the input
            and another the output.

    """
    configs = [tuner.peft_config[name] for name in tuner._named(list(adapters))]
    if wrong := [name for name, c in zip(adapters, configs, strict=True) if c.peft_type != "IA3"]:
        raise ConfigError(f"add_weighted_adapter: {wrong} are no IA3 adapters, and this model's first one is")
    _refuse_shared_heads(tuner, adapters)
    slots = {one: tuner.installed(one).slots() for one in adapters}
    targets = list(dict.fromkeys(name for own in slots.values() for name in own))
    inputs: dict[str, set[bool]] = {name: set() for name in targets}
    for own in slots.values():
        for name, slot in own.items():
            assert isinstance(slot.method, Ia3)
            inputs[name].add(slot.method.is_feedforward(slot.site))
    if mixed := [name for name, ways in inputs.items() if len(ways) > 1]:
        raise ConfigError(f"add_weighted_adapter: of {mixed} one adapter scales the input, and another the output")
    forward = [name for name, ways in inputs.items() if ways == {True}]
    tuner.inject(adapter_name, configs[0].copy(target_modules=targets, feedforward_modules=forward))
    with torch.no_grad():
        for name, slot in tuner.installed(adapter_name).slots().items():
            (made,) = slot.own().values()
            made.zero_()
            for one, weight in zip(adapters, weights, strict=True):
                if (found := slots[one].get(name)) is not None:
                    (scales,) = found.own().values()
                    made.add_(scales, alpha=weight)
    tuner.set_requires_grad(adapter_name, False)
