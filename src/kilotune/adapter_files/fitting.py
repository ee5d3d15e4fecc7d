"""An adapter's file held against a model: every tensor in its place, or one error with all that does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from ..deltas import Role
from ..errors import CheckpointError, gather
from ..injection.base_mark import same_base
from ..injection.inject import Plan
from ..injection.option_checks import part_of
from ..injection.tree import bare_state
from ..kinds import LayerKind
from ..layers.adapted_parameters import file_names
from ..layers.slot import BIAS
from ..storage import Storage
from ..storage.sharded import whole_parts
from .files import not_finite
from .peft_layout import BASE, bias_key, bias_name_in_file
from .reading import AdapterFile

__all__ = ["OtherBaseWarning", "Wanted", "check_base", "match_tensors", "wanted_of"]

# PEFT with bias="all" also writes these copies of a bias that it saves under the module's own key.
REDUNDANT = (".modules_to_save.", ".original_module.")

Wanted = Mapping[str, tuple[str, tuple[int, ...]]]
"""The file's key -> (``<layer>.<parameter>``, the shape in the file)."""


class OtherBaseWarning(UserWarning):
    """An adapter was trained on a base of other weights than the one that it is loaded into."""


def check_base(file: AdapterFile, made: Plan, name: str, strict: bool) -> None:
    """Tell of a base whose weights are not those that the adapter was trained on, as far as their marks say.

    Args:
        file: the adapter.
        made: what it would be in the base.
        name: of the base.
        strict: raise, and do not warn.

    Raises:
        CheckpointError: the weights are others, and ``strict``.

    """
    theirs, ours = file.metadata.get(BASE), made.base
    if theirs is None or ours is None or same_base(theirs, ours) is not False:
        return
    trained = file.config.base_model_name_or_path
    text = (
        f"the adapter in {file.folder} was trained on {repr(trained) if trained else 'a base without a name'} "
        f"(weights {theirs[1:9]} ...), and this base, {name!r}, has other weights ({ours[1:9]} ...), for which the "
        "adapter was not made; load it into the base that it was trained on"
    )
    if strict:
        raise CheckpointError(text)
    warnings.warn(text, OtherBaseWarning, stacklevel=3)


def match_tensors(file: AdapterFile, made: Plan, base_name: str, of_layers: Wanted | None = None) -> dict[str, Tensor]:
    """The file's tensors as ``inject.apply`` wants them, or one error with all that does not fit.

    of_layers: what :func:`wanted_of` says of ``made``, from who reads many adapters of one plan.
    """
    wanted = dict(wanted_of(made, file.method.carried) if of_layers is None else of_layers)
    for name, module in made.saved.items():
        wanted.update({f"{name}.{k}": (f"{name}.{k}", tuple(v.shape)) for k, v in bare_state(module).items()})
    given = {k: v for k, v in file.tensors.items() if not (_redundant(k, made) or _repeats(k, file, made))}
    given.update({key: file.extra[key] for key in wanted if key in file.extra})
    bases = {key: weight for key in given if (weight := _base_weight(key, made)) is not None}
    tables = {key: _is_base_weight(given[key], weight) for key, weight in bases.items()}
    given = {key: value for key, value in given.items() if key not in tables}
    exact = _exact_buffers(made)
    faults = [f"missing: {key} {shape}" for key, (_, shape) in wanted.items() if key not in given]
    faults += [f"unexpected: {key} {tuple(value.shape)}" for key, value in given.items() if key not in wanted]
    faults += [f"{key}: the file has another base weight than this model" for key, same in tables.items() if not same]
    faults += [
        f"shape of {key}: the model expects {wanted[key][1]}, the file has {tuple(value.shape)}"
        for key, value in given.items()
        if key in wanted and tuple(value.shape) not in (wanted[key][1], _peft_shape(made, wanted[key][0]))
    ]
    faults += [
        f"type of {key}: expected a floating-point tensor, the file has {value.dtype}"
        for key, value in given.items()
        if key in wanted and key not in exact and not value.is_floating_point()
    ]
    faults += [f"values of {key} are not finite (a training that diverged?)" for key in not_finite(given)]
    if faults:
        base = file.config.base_model_name_or_path
        trained = f"; it was trained on {base!r}" if base else ""
        raise CheckpointError(
            gather(f"the adapter in {file.folder} does not fit this {base_name}{trained}:", faults, len(faults))
        )
    found = {target: _from_file(made, target, given[key]) for key, (target, _) in wanted.items()}
    parts = [target for target in found if _is_second_of_part(target, made)] if file.doubled is not False else []
    if parts and file.doubled is None:
        raise CheckpointError(
            f"the adapter in {file.folder} changes {parts[0].rpartition('.')[0]!r}, and which program wrote it cannot "
            "be told: PEFT up to 0.21.2 adds that change twice, so its numbers stand for twice what they say. Put "
            '"peft_version" into adapter_config.json: the version of the PEFT that trained it, or null where none did'
        )
    return {**found, **{target: 2 * found[target] for target in parts}}


def _is_second_of_part(target: str, made: Plan) -> bool:
    """Whether it is the second factor of what comes with an attention."""
    name, _, key = target.rpartition(".")
    return made.method.roles.get(key) is Role.SECOND and bool(part_of(name, made.layers))


def wanted_of(made: Plan, carried: frozenset[str] = frozenset()) -> Wanted:
    """All that the layers of a plan need of a file. carried: what it has of ``made.carries``."""
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    everything = {**made.bias_only, **made.layers}
    names = file_names({name: (cast(LayerKind, c.kind), c.module) for name, c in everything.items()}, made.config)
    for name, own_shapes in made.shapes.items():
        besides = {key: shape for key, shape in made.carries.get(name, {}).items() if key in carried}
        shapes = {**own_shapes, **besides}
        candidate = made.layers.get(name) or made.bias_only[name]
        kind, storage = cast(LayerKind, candidate.kind), cast(Storage, candidate.storage)
        for key, shape in shapes.items():
            if key == BIAS:
                own = bias_key(made.method if name in made.layers else None, storage)
                wanted[f"{bias_name_in_file(name, kind, names)}.{own}"] = (f"{name}.{key}", shape)
            else:
                own = made.method.keys[key]
                role = made.method.roles.get(key, Role.OTHER)
                formed = kind.to_file(candidate.module, role, torch.empty(shape, device="meta"))
                place = f"{names[name]}.{kind.file_key(candidate.module, own)}"
                wanted[place] = (f"{name}.{key}", tuple(formed.shape))
    return wanted


def _from_file(made: Plan, target: str, tensor: Tensor) -> Tensor:
    name, _, key = target.rpartition(".")
    if name not in made.layers or key == BIAS:
        return tensor
    candidate = made.layers[name]
    role = made.method.roles.get(key, Role.OTHER)
    kind = cast(LayerKind, candidate.kind)
    if tuple(tensor.shape) == _peft_shape(made, target):
        try:
            return kind.from_blocks(candidate.module, role, tensor)
        except CheckpointError as error:
            raise CheckpointError(f"{target}: {error}") from None
    found, shape = kind.from_file(candidate.module, role, tensor), _shape(made, name, key)
    return found if found.shape == shape else found.reshape(shape)


def _peft_shape(made: Plan, target: str) -> tuple[int, ...] | None:
    """The shape that PEFT gives a tensor for which this layer has another form as well."""
    name, _, key = target.rpartition(".")
    if name not in made.layers or key == BIAS:
        return None
    candidate, role = made.layers[name], made.method.roles.get(key, Role.OTHER)
    return cast(LayerKind, candidate.kind).peft_shape(candidate.module, role, _shape(made, name, key))


def _shape(made: Plan, name: str, key: str) -> tuple[int, ...]:
    own = made.shapes[name]
    return own[key] if key in own else made.carries[name][key]


def _base_weight(key: str, made: Plan) -> Tensor | None:
    """The base's weight that ``key`` names: PEFT writes an embedding's beside an adapter on "embed_tokens"."""
    name, _, last = key.rpartition(".base_layer.")
    candidate = made.layers.get(name)
    if candidate is None or candidate.storage is None or last != candidate.storage.weight_name:
        return None
    return candidate.storage.read(candidate.module, whole_parts(candidate.storage.keep(candidate.module))).detach()


def _is_base_weight(value: Tensor, weight: Tensor) -> bool:
    if weight.shape != value.shape or weight.device.type == "meta":
        return weight.shape == value.shape
    return torch.equal(weight.cpu().to(value.dtype), value)


def _exact_buffers(made: Plan) -> set[str]:
    """What modules saved whole keep in other than floats, such as the number of batches that a norm has seen."""
    return {
        f"{name}.{key}"
        for name, module in made.saved.items()
        for key, value in bare_state(module).items()
        if not value.is_floating_point()
    }


def _redundant(key: str, made: Plan) -> bool:
    return any(key.startswith(f"{name}{part}") for name in made.saved for part in REDUNDANT)


def _repeats(key: str, file: AdapterFile, made: Plan) -> bool:
    """Whether ``key`` is a tied bias that the file holds under its layer's name as well, with equal values."""
    module, _, last = key.rpartition(".")
    if last != BIAS or module not in made.tied:
        return False
    others = [file.tensors.get(f"{made.tied[module]}.{end}") for end in (BIAS, f"base_layer.{BIAS}")]
    return any(other is not None and torch.equal(other, file.tensors[key]) for other in others)
