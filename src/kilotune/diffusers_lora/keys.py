"""The keys of a LoRA file: which model of a pipeline each is of, which layer it names, and which tensor it is there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, final

from torch import Tensor

from ..errors import did_you_mean

__all__ = ["DENOISERS", "Fault", "Named", "Part", "Pieces", "Place", "alternatives", "taken_apart"]

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@final
class Part(StrEnum):
    """What a tensor is in its layer."""

    DOWN = "first factor"  # (r, in)
    UP = "second factor"  # (out, r)
    ALPHA = "alpha"  # one number
    MAGNITUDE = "magnitudes"  # (out,) numbers, of DoRA


# How keys end, in the writings of PEFT, of diffusers now and before PEFT, and of kohya.
ENDINGS = {
    ".lora_A.weight": Part.DOWN,
    ".lora_B.weight": Part.UP,
    ".lora.down.weight": Part.DOWN,
    ".lora.up.weight": Part.UP,
    ".lora_linear_layer.down.weight": Part.DOWN,
    ".lora_linear_layer.up.weight": Part.UP,
    "_lora.down.weight": Part.DOWN,
    "_lora.up.weight": Part.UP,
    ".lora_down.weight": Part.DOWN,
    ".lora_up.weight": Part.UP,
    "_lora.alpha": Part.ALPHA,
    ".lora.alpha": Part.ALPHA,
    ".alpha": Part.ALPHA,
    ".lora_magnitude_vector.weight": Part.MAGNITUDE,
    ".lora_magnitude_vector": Part.MAGNITUDE,
    ".dora_scale": Part.MAGNITUDE,
}
# Kohya's beginnings -> the models they can mean, of which that counts which is there.
BEGINNINGS = {
    "lora_unet_": DENOISERS,
    "lora_transformer_": DENOISERS[::-1],
    "lora_te_": TEXT_ENCODERS[:1],
    "lora_te1_": TEXT_ENCODERS[:1],
    "lora_te2_": TEXT_ENCODERS[1:2],
    "lora_te3_": TEXT_ENCODERS[:0:-1],  # the T5 of SD3, or of Flux
    "diffusion_model.": DENOISERS[::-1],  # ComfyUI's
}
# What other ways than LoRA's are known by, so that the error can say so.
OTHERS = {"hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "a Tucker core", "diff": "a whole change", "oft_": "OFT"}


@final
class Place(NamedTuple):
    """A layer as a file names it. flat: with "_" where the model's names have dots."""

    component: str
    name: str
    flat: bool


@final
class Named(NamedTuple):
    """A tensor and the key that it has in the file."""

    key: str
    value: Tensor


@final
class Fault(NamedTuple):
    """Why a key cannot be read; component: the model that it is of, where that can be told."""

    component: str | None
    text: str


@final
@dataclass(frozen=True)
class Pieces:
    """What a file says: the tensors of each layer that it names, and what is wrong with keys that cannot be read."""

    layers: dict[Place, dict[Part, Named]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    @property
    def components(self) -> list[str]:
        """The models that it has something of."""
        found = {place.component for place in self.layers} | {fault.component for fault in self.faults}
        return sorted(name for name in found if name is not None)


def taken_apart(tensors: Mapping[str, Tensor], components: Collection[str]) -> Pieces:
    """A file's tensors by layer.

    Args:
        tensors: under the file's keys.
        components: the models that there are, by their names in the pipeline ("unet", "text_encoder", ...). Keys that
            name no model are of the only one there is.

    """
    pieces = Pieces()
    for key, value in tensors.items():
        ending = next((end for end in ENDINGS if key.endswith(end)), "")
        place = _place(key.removesuffix(ending), components) if key != ending else None
        if not ending or key == ending:
            pieces.faults.append(Fault(None if place is None else place.component, f"{key}: {_unknown(key)}"))
            continue
        if place is None:
            there = f"{len(components)} models are given ({', '.join(sorted(components))}); give the one that it is of"
            pieces.faults.append(Fault(None, f"{key}: does not say of which model it is, and {there}"))
            continue
        own = pieces.layers.setdefault(place, {})
        if (before := own.get(ENDINGS[ending])) is not None:
            pieces.faults.append(Fault(place.component, f"{key}: is there twice, also as {before.key}"))
        own[ENDINGS[ending]] = Named(key, value)
    return pieces


def _unknown(key: str) -> str:
    last = key.rpartition(".")[0] or key
    for word, what in OTHERS.items():
        if any(part.startswith(word) for part in key.split(".")[1:]):
            return f"this is of {what}, which is not LoRA"
    if key.endswith(".bias") and ".lora_" in key:
        return "a factor with a bias, which kilotune has not"
    return f"no tensor of LoRA.{did_you_mean(last[last.rfind('.') :] + '.weight', ENDINGS)}"


def _place(name: str, components: Collection[str]) -> Place | None:
    for beginning, meant in BEGINNINGS.items():
        if name.startswith(beginning) and len(name) > len(beginning):
            component = next((each for each in meant if each in components), meant[0])
            return Place(component, name.removeprefix(beginning).replace(".", "_"), True)
    first, dot, rest = name.partition(".")
    if dot and first in {*components, *DENOISERS, *TEXT_ENCODERS}:
        return Place(first, rest, False)
    return Place(next(iter(components)), name, False) if len(components) == 1 else None


def alternatives(name: str) -> list[str]:
    """A dotted name of a file, and what the same layer can be called in the model.

    diffusers once named attention's layers by their processors; and a CLIPTextModel had a ``text_model`` inside, which
    files of either time have or have not.
    """
    plain = name.replace(".processor.", ".")
    found = [plain]
    head, dot, last = plain.rpartition(".")
    if last == "to_out":
        found.append(f"{plain}.0")
    if (other := TEXT_NAMES.get(last)) is not None:
        found.append(head + dot + other)
    return found + [
        each.removeprefix("text_model.") if each.startswith("text_model.") else f"text_model.{each}" for each in found
    ]


TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
