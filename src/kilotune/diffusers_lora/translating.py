"""One model's part of a LoRA file as an adapter in our own layout. Tensors in, tensors out: what a model is, only its
layers' names and sizes say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from ..adapter_files.files import not_finite
from ..adapter_files.peft_layout import PREFIX
from ..errors import ConfigError, faults_of
from ..methods import LoraConfig
from ..name_rules import first_at_end, named
from .keys import Named, Part, Place, alternatives
from .names import Layer, Names

__all__ = ["Changed", "Translation", "lora_config", "translated"]

DOWN, UP, ALPHA, MAGNITUDE = Part


@final
@dataclass(frozen=True)
class Changed:
    """One layer's change: (alpha / r) B A, or with magnitudes that of DoRA.

    a: (r, in) or (r, in, *kernel). b: (out, r) or (out, r, 1, ...). alpha: None where the file says none.
    magnitude: (out,) numbers as PEFT keeps them, or None. key: of ``a`` in the file. called: the layer in the file.
    """

    a: Tensor
    b: Tensor
    alpha: float | None
    magnitude: Tensor | None
    key: str
    called: str

    @property
    def rank(self) -> int:
        """The number of rows of ``a``."""
        return int(self.a.shape[0])


@final
@dataclass
class Translation:
    """A model's part of a file: its layers' changes by the model's own names, the configuration, and what is wrong.

    said: the configuration in the file's header, where there is one, with the targets that it names.
    """

    layers: dict[str, Changed] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    said: LoraConfig | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Under PEFT's keys."""
        found = {}
        for name, each in self.layers.items():
            found[f"{PREFIX}{name}.lora_A.weight"] = each.a
            found[f"{PREFIX}{name}.lora_B.weight"] = each.b
            if each.magnitude is not None:
                found[f"{PREFIX}{name}.lora_magnitude_vector"] = each.magnitude
        return found


def translated(
    given: Mapping[Place, Mapping[Part, Named]], names: Names, header: Mapping[str, Any] | None
) -> Translation:
    """What a file says of one model.

    Args:
        given: the tensors of each layer that the file names.
        names: the layers of the model.
        header: the configuration in the file's header (PEFT's keys); None where there is none.

    """
    made = Translation()
    for place, own in given.items():
        _take(place, own, names, made)
    if header is not None and not made.faults:
        _configure(header, made)
    _check_alphas(made)
    dora = {name: each.magnitude is not None for name, each in made.layers.items()}
    if len(set(dora.values())) == 2:
        without = [name for name, has in dora.items() if not has]
        made.faults += [f"{name}: no magnitudes, where other layers have DoRA's" for name in without]
    return made


# -- one layer -----------------------------------------------------------------------------------------


def _take(place: Place, own: Mapping[Part, Named], names: Names, made: Translation) -> None:
    """Put what a file says of one of its layers into ``made``: into several layers where the model has it split."""
    first = next(iter(own.values())).key
    meant = names.find(place.name, place.flat)
    faults = [] if meant is not None else [f"{first}: {names.fault(place.name, place.flat)}"]
    faults += [f"{first}: its {part.value} is missing" for part in (DOWN, UP) if part not in own]
    faults += _form_faults(own)
    if faults or meant is None:
        made.faults += faults
        return
    layers = [names.layers[name] for name in meant.names]
    (key, a), b = own[DOWN], own[UP].value
    alpha = float(own[ALPHA].value) if ALPHA in own else None
    sizes = [layer.out for layer in layers]
    if b.shape[0] != sum(sizes):
        what = " + ".join(map(str, sizes))
        made.faults.append(f"{own[UP].key}: {b.shape[0]} outputs, and {' + '.join(meant.names)} have {what}")
        return
    lengths = _rows(own, b.shape[0], made)
    if meant.swapped:
        b, lengths = _swapped(b), None if lengths is None else _swapped(lengths)
    at = 0
    for name, layer in zip(meant.names, layers, strict=True):
        rows = slice(at, at + layer.out)
        at += layer.out
        if (before := made.layers.get(name)) is not None:
            made.faults.append(f"{key}: {name!r} is changed twice, also by {before.key}")
            continue
        shaped = None if lengths is None else _as_peft(lengths[rows], layer)
        made.layers[name] = Changed(a, b[rows].contiguous(), alpha, shaped, key, place.name)


def _swapped(rows: Tensor) -> Tensor:
    """The halves of the outputs the other way round."""
    return torch.cat(rows.chunk(2)[::-1])


def _form_faults(own: Mapping[Part, Named]) -> list[str]:
    faults = [f"{named.key}: expected floats, got {named.value.dtype}" for named in own.values() if _odd_type(named)]
    faults += [f"{key}: values that are not finite" for key in not_finite(dict(own.values()))]
    alpha = own.get(ALPHA)
    if alpha is not None and alpha.value.numel() != 1:
        faults.append(f"{alpha.key}: expected one number >= 0, got the shape {tuple(alpha.value.shape)}")
    elif alpha is not None and not faults and float(alpha.value) < 0:
        faults.append(f"{alpha.key}: expected one number >= 0, got {float(alpha.value):g}")
    if DOWN in own and UP in own:
        (down, a), (up, b) = own[DOWN], own[UP]
        if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            faults.append(f"{down}, {up}: shapes {shapes} are no factors (r, in) and (out, r)")
    return faults


def _odd_type(named: Named) -> bool:
    return not named.value.is_floating_point() and not (named.key.endswith(".alpha") and not named.value.is_complex())


def _rows(own: Mapping[Part, Named], out: int, made: Translation) -> Tensor | None:
    """DoRA's magnitudes as (out,); kohya has them as (out, 1, ...), PEFT those of a convolution as (1, out, 1, ...)."""
    if MAGNITUDE not in own:
        return None
    key, value = own[MAGNITUDE]
    shape = tuple(value.shape)
    if shape in ((out,), (out, *[1] * (len(shape) - 1))) or (
        len(shape) > 2 and shape == (1, out, *[1] * len(shape[2:]))
    ):
        return value.flatten()
    made.faults.append(f"{key}: expected magnitudes of {out} outputs, got the shape {shape}")
    return None


def _as_peft(lengths: Tensor, layer: Layer) -> Tensor:
    """As PEFT keeps them for such a layer."""
    return lengths.reshape(1, -1, *[1] * layer.dimensions) if layer.dimensions else lengths.contiguous()


# -- alphas --------------------------------------------------------------------------------------------


def _configure(header: Mapping[str, Any], made: Translation) -> None:
    """Take the alphas, and all else that the header says, into ``made``."""
    if (kind := header.get("peft_type", "LORA")) != "LORA":
        made.faults.append(f"the header's peft_type is {kind!r}, expected 'LORA'")
        return
    try:
        config = LoraConfig.from_file(header, {})
    except ConfigError as error:
        made.faults += [f"the header: {fault}" for fault in faults_of(error)]
        return
    except TypeError as error:
        made.faults.append(f"the header: {error}")
        return
    more = {"bias": config.bias != "none", "modules_to_save": config.modules_to_save is not None}
    more["target_parameters"] = bool(config.target_parameters)
    more["use_dora"] = config.use_dora and not any(each.magnitude is not None for each in made.layers.values())
    made.faults += [f"the header has {name}, which such a file has no tensors for" for name, on in more.items() if on]
    if config.from_base:
        made.faults.append(
            f"the header has init_lora_weights={config.init_lora_weights!r}, so its factors are no change of this base "
            "but of what is left of it; let PEFT convert it (path_initial_model_for_weight_conversion)"
        )
    for name, each in made.layers.items():
        rank, alpha = (_said(config, what, name, each.called) for what in ("r", "lora_alpha"))
        if rank != each.rank:
            made.faults.append(f"{each.key}: rank {each.rank}, and the header says {rank}")
        if each.alpha not in (None, alpha):
            made.faults.append(f"{each.key}: its alpha is {each.alpha:g}, and the header says {alpha:g}")
        made.layers[name] = Changed(each.a, each.b, float(alpha), each.magnitude, each.key, each.called)
    made.said = config


def _said(config: LoraConfig, option: str, name: str, called: str) -> float:
    """What the header says of a layer: by its name in the model, or else by that in the file."""
    field = "rank_pattern" if option == "r" else "alpha_pattern"
    patterns: Mapping[str, float] = getattr(config, field)
    default: float = getattr(config, option)
    for each in (name, *alternatives(called)):
        found = first_at_end(field, patterns, each, None)
        if found is not None:
            return found
    return default


def _check_alphas(made: Translation) -> None:
    """Where some layers have an alpha and others have none, kohya reads the rank, and diffusers the commonest alpha."""
    said = [each.alpha for each in made.layers.values() if each.alpha is not None]
    if not said:
        return
    usual = _commonest(said)
    for each in made.layers.values():
        if each.alpha is None and each.rank != usual:
            made.faults.append(
                f"{each.key}: no alpha, where other layers have one; kohya's trainer takes the rank {each.rank} for "
                f"it, and diffusers {usual:g}"
            )


def _commonest(values: Sequence[float]) -> float:
    return Counter(values).most_common(1)[0][0]


# -- the configuration ---------------------------------------------------------------------------------


def lora_config(made: Translation, model: Sequence[str]) -> LoraConfig:
    """The configuration of exactly the layers of ``made``, each with its own rank and alpha.

    Args:
        made: a part of a file, without faults and with at least one layer.
        model: the names of all modules of its model.

    """
    layers = made.layers
    ranks = {name: each.rank for name, each in layers.items()}
    # Without any alpha the change is B A, so alpha is the rank.
    alphas = {name: float(ranks[name]) if each.alpha is None else each.alpha for name, each in layers.items()}
    rank, alpha = int(_commonest(list(ranks.values()))), _commonest(list(alphas.values()))
    said = made.said
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0 if said is None else said.lora_dropout,
        use_rslora=said is not None and said.use_rslora,
        use_dora=any(each.magnitude is not None for each in layers.values()),
        target_modules=_exactly(list(layers), model),
        rank_pattern={_whole(name): value for name, value in ranks.items() if value != rank},
        alpha_pattern={_whole(name): value for name, value in alphas.items() if value != alpha},
    )


def _whole(name: str) -> str:
    """The pattern of this layer alone, for PEFT takes a pattern for the end of a name too."""
    return f"^{re.escape(name)}"


def _exactly(layers: Sequence[str], model: Sequence[str]) -> list[str] | str:
    """Target modules that take these layers and no others of the model."""
    own = set(layers)
    if any(named(layers, other) for other in model if other not in own):
        return "|".join(re.escape(name) for name in layers)
    return list(layers)
