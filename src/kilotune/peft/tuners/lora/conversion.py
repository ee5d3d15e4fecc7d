"""convert_to_lora and save_as_lora: an adapter of another method as a LoRA adapter, in memory or on disk.

A layer's change becomes ``B A`` by its singular values, ``u diag(s) v``: B = u diag(s) (out, r), A = v (r, in), so that
alpha is the rank and the scale 1. A change that is a product of factors is taken apart in these, which costs
r^2 (in + out) in place of in * out * min(in, out).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ...._ui.progress import track
from ....adapter_files.files import tensors_checksum, write
from ....adapter_files.peft_layout import PREFIX, config_checksum, header_metadata
from ....adapter_files.writing import DEFAULT
from ....convert import factors_of_low_rank
from ....deltas import Delta, LowRank, Role
from ....errors import CheckpointError, ConfigError
from ....injection.inject import walk
from ....layers.adapted import AdaptedLayer
from ....layers.saved_module import SavedModule
from ....layers.slot import Slot, slot_key
from ...config import PeftConfig
from ...layer_shape import adapters_in, becomes_lora
from ..tuners_utils import BaseTuner
from .config import LoraConfig

__all__ = ["convert_to_lora", "save_as_lora"]


@final
class Parts(NamedTuple):
    """A matrix (out, in) as ``u diag(s) v``: u (out, k), s (k,) from the largest down, v (k, in)."""

    u: Tensor
    s: Tensor
    v: Tensor


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = DEFAULT,
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA adapter that comes nearest to an adapter of any method whose change is of the weight.

    Modules that it trains whole are kept. What DoRA makes of the weight is among what is converted.

    Args:
        model: a PeftModel, or a base with our layers in it; not changed.
        rank: a whole number: the rank of each layer. A float in (0, 1]: that share of the sum of a layer's squared
            singular values is kept, at the smallest rank that does so.
        adapter_name: which adapter.
        progressbar: show on stderr how far it is.
        compile_kwargs: have ``torch.compile`` compile the arithmetic, with these options.

    Returns:
        The configuration, and tensors under the keys of PEFT's files, in the adapter's dtype.

    Raises:
        TypeError: no layer, or layers of a kind, for which there is no LoRA.
        ConfigError: a rank that is no rank or larger than a layer, or an adapter that trains biases.
        CheckpointError: numbers that are not finite.

    """
    _check_rank(rank)
    model = getattr(model, "_orig_mod", model)
    layers = _layers(model, adapter_name)
    config = _config_of(model, adapter_name)
    _check_config(config, layers)
    compiled: Callable[..., Parts] = _parts
    if compile_kwargs is not None:
        compiled = torch.compile(_parts, **compile_kwargs)
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in track(list(layers), "Converting to LoRA", show=progressbar):
        layer, slot = layers[name]
        a, b = _factors(name, layer, slot, rank, compiled)
        ranks[name.removeprefix(PREFIX)] = a.shape[0]
        for key, role, value in (("lora_A.weight", Role.FIRST, a), ("lora_B.weight", Role.SECOND, b)):
            place = f"{name}.{layer.kind.file_key(layer.base_layer, key)}"
            state[place] = layer.kind.to_file(layer.base_layer, role, value.to(_dtype(slot))).contiguous()
    heads = _heads(model, adapter_name)
    state.update({f"{head}.{key}": value for head, own in heads.items() for key, value in own.items()})
    return _configuration(model, config, ranks, rank, [head.removeprefix(PREFIX) for head in heads]), state


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = DEFAULT,
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write what :func:`convert_to_lora` gives into a folder, which is made where it is not there.

    Raises:
        CheckpointError: the folder cannot be written. Others as of :func:`convert_to_lora`.

    """
    made, state = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    tensors = {
        key if key.startswith(PREFIX) else f"{PREFIX}{key}": value.cpu().contiguous() for key, value in state.items()
    }
    ours = made.translated()
    config = ours.to_dict()
    checksums = tensors_checksum(tensors), config_checksum(config, ours.option_names())
    write(Path(path), config, tensors, header_metadata(*checksums, None, {}, None))


# -- what is refused -------------------------------------------------------------------------------


def _check_rank(rank: float) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise ConfigError(f"rank: expected a whole number, or a share in (0, 1], got {rank!r}")
    if rank <= 0:
        raise ConfigError(f"Passing a rank of {rank} doesn't make sense, please pass a whole number >= 1.")


def _layers(model: nn.Module, adapter_name: str) -> dict[str, tuple[AdaptedLayer, Slot]]:
    """The layers that an adapter changes, by their names in the model, with its slots there."""
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLayer)}
    found = {
        name: (layer, slot)
        for name, layer in wrappers.items()
        if (slot := layer.slot(adapter_name)) is not None and slot.method is not None
    }
    refused = {
        f"{type(layer.base_layer).__name__} ({slot.method.name})"
        for layer, slot in found.values()
        if slot.method is not None and not becomes_lora(layer, slot)
    }
    if refused:
        names = ", ".join(sorted(refused))
        raise TypeError(f"Some module types on this model do not support LoRA conversion: {names}.")
    if not found:
        there = sorted({name for layer in wrappers.values() for name in adapters_in(layer)})
        told = f" There is no adapter {adapter_name!r} in it; there are {there}." if there else ""
        raise TypeError(f"Could not detect any layer that supports LoRA conversion.{told}")
    return found


def _config_of(model: nn.Module, adapter_name: str) -> PeftConfig | None:
    """Of a PeftModel, or of a base into which it was injected; None where there is no more than our layers."""
    for holder in (model, *(value for value in model.__dict__.values() if isinstance(value, BaseTuner))):
        if isinstance(configs := getattr(holder, "peft_config", None), dict):
            return configs.get(adapter_name)
    return None


def _check_config(config: PeftConfig | None, layers: Mapping[str, tuple[AdaptedLayer, Slot]]) -> None:
    bias = getattr(config, "bias", "none")
    if bias == "none" and any(slot.trained_bias is not None for _, slot in layers.values()):
        bias = "all"
    if bias != "none":
        raise ConfigError(f"The adapter's config sets bias={bias}, this is not supported right now.")
    if all(slot.method is not None and slot.method.config.peft_type == "LORA" for _, slot in layers.values()):
        told = "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that."
        warnings.warn(told, stacklevel=3)


# -- numbers ---------------------------------------------------------------------------------------


def _dtype(slot: Slot) -> torch.dtype:
    """The dtype of what an adapter trains."""
    own = (*slot.own().values(), *slot.shared.trained.values())
    return own[0].dtype if own else torch.float32


def _factors(
    name: str, layer: AdaptedLayer, slot: Slot, rank: float, parts: Callable[..., Parts]
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of one layer."""
    delta = slot.delta()
    assert delta is not None
    left, right = _as_product(layer, delta)
    if not all(bool(torch.isfinite(one).all()) for one in (left, right) if one is not None):
        raise CheckpointError(f"{name}: the adapter's change is not finite (a training that diverged?)")
    found = parts(left, right)
    kept = rank if isinstance(rank, int) else _cutoff(found.s, rank)
    if kept > (full := min(found.u.shape[0], found.v.shape[1])):
        raise ConfigError(
            f"The chosen rank {kept} is larger than the weight shape ({full}), please choose a lower rank."
        )
    return _of_rank(found, kept)


def _as_product(layer: AdaptedLayer, delta: Delta) -> tuple[Tensor, Tensor | None]:
    """A change as (B, A), or as (matrix, None) where it is no product; in float64, where the device has that."""
    base = layer.base_matrix()
    wide = torch.float32 if base.device.type == "mps" else torch.float64
    if isinstance(delta, LowRank):
        a, b = factors_of_low_rank(delta, wide)
        return b, a
    change = delta.weight_change(base.to(wide))
    assert change is not None
    return change, None


def _parts(left: Tensor, right: Tensor | None) -> Parts:
    """Of ``left right``, (out, r) times (r, in), or of ``left`` (out, in) alone, which float32 is enough for."""
    if right is None:
        u, s, v = torch.linalg.svd(left.float(), full_matrices=False)
        return Parts(u, s, v)
    q1, r1 = torch.linalg.qr(left)  # (out, k1), (k1, r)
    q2, r2 = torch.linalg.qr(right.mT)  # (in, k2), (k2, r)
    u, s, v = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
    return Parts(q1 @ u, s, v @ q2.mT)


def _cutoff(s: Tensor, share: float) -> int:
    """The smallest rank whose singular values have that share of the sum of all squares; in float32, as in PEFT."""
    sums = (s.float() ** 2).cumsum(dim=0)
    return int(torch.searchsorted(sums, share * sums[-1])) + 1


def _of_rank(parts: Parts, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank). Where the change has a lower rank, the rest of B is zeros, and that of A not."""
    a, b = parts.v[:rank], parts.u[:, :rank] * parts.s[:rank]
    if (more := rank - a.shape[0]) > 0:
        # As an SVD of the whole matrix has them: at right angles to the others, so that they can be trained.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(a.shape[1], more, generator=generator, dtype=a.dtype).to(a.device)
        others = torch.linalg.qr(torch.cat([a.mT, noise], dim=1)).Q[:, a.shape[0] :].mT
        a, b = torch.cat([a, others]), torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1)
    return a, b


# -- all else --------------------------------------------------------------------------------------


def _heads(model: nn.Module, adapter_name: str) -> dict[str, dict[str, Tensor]]:
    """The state of each module that the adapter trains whole, by its name in the model."""
    key = slot_key(adapter_name)
    return {
        name: {inner: value.detach().clone() for inner, value in module.modules_to_save[key].state_dict().items()}
        for name, module in model.named_modules()
        if isinstance(module, SavedModule) and key in module.modules_to_save
    }


def _configuration(
    model: nn.Module, old: PeftConfig | None, ranks: Mapping[str, int], rank: float, heads: list[str]
) -> LoraConfig:
    """That of the LoRA adapter: the same layers, and alpha the rank in each."""
    r = rank if isinstance(rank, int) else 1
    targets = getattr(old, "target_modules", None)
    targets = _exact(model, ranks) if targets is None else targets
    pattern = {} if isinstance(targets, str) else {name: own for name, own in ranks.items() if own != rank}
    if isinstance(targets, str):
        pattern = dict(ranks)
    else:
        targets = {*targets, *(name for name in ranks if name not in pattern)}
    pattern = {_alone(name, ranks): own for name, own in pattern.items()}
    more = {}
    for name in ("layers_pattern", "layers_to_transform", "base_model_name_or_path", "revision", "task_type"):
        if (value := getattr(old, name, None)) is not None:
            more[name] = value
    trained = getattr(old, "modules_to_save", None) if old is not None else heads
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=targets,
        exclude_modules=_copied(getattr(old, "exclude_modules", None)),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        modules_to_save=list(trained) if trained else None,
        **more,
    )


def _copied(names: Any) -> Any:
    return names if names is None or isinstance(names, str) else set(names)


def _alone(name: str, names: Iterable[str]) -> str:
    """A pattern for a layer's name: the name, held to its beginning where other layers' names end like it."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _exact(model: nn.Module, names: Mapping[str, int]) -> set[str] | str:
    """What names these layers and no others, in a model without a configuration."""
    others = [name for name, _, _ in walk(model) if name not in names]
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(map(re.escape, names))
    return set(names)
