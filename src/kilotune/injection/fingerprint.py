"""Whether two base models are the same: a few numbers of every weight, hashed.

A fingerprint has an entry for each parameter: its shape, and a hash of up to 256 of its values, evenly spread and
rounded to bfloat16. So it takes milliseconds for any size of model, the same weights loaded in float32 and in bfloat16
have the same fingerprint, and a base that was trained further has another one. It is no proof: who changes a weight
between the values that are looked at is not found out. Buffers are left out, for training moves running means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor, nn

from ..candidates import inside
from ..errors import CheckpointError, ConfigError, MergeError, UnsupportedError, gather, type_name
from ..storage.sharded import is_sharded
from .base_mark import mark_of
from .tree import AroundBase, is_parameter, merged_into, unwrapped, walk

__all__ = ["Fingerprint"]

VALUES = 256  # looked at in each parameter


@final
@dataclass(frozen=True)
class Fingerprint:
    """What a base model is known by.

    parameters: ``<shape>:<hash>`` by the parameter's name. mark: what adapters' files know the base by (base_mark.py),
    where the fingerprint was taken of a model.
    """

    parameters: Mapping[str, str]
    mark: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of a base model, or of the base inside a model with adapters.

        Raises:
            MergeError: adapters are merged into the weights. UnsupportedError: the weights are not there (on meta)
                or each process has only a part of them.

        """
        if not isinstance(model, nn.Module):
            raise ConfigError(f"base: expected a model or a Fingerprint, got {type_name(model)}")
        base = model.model if isinstance(model, AroundBase) else model
        if merged := merged_into(base):
            raise MergeError(f"adapters {merged} are merged into the base's weights; call unmerge_adapter() first")
        return cls({name: _entry(name, value) for name, value in _parameters(base)}, mark_of(base))

    @classmethod
    def of_tensors(cls, parameters: Mapping[str, Tensor]) -> Fingerprint:
        """Of the parameters by name, such as a checkpoint's files have them."""
        return cls({name: _entry(name, value) for name, value in parameters.items()})

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over all of it, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def without(self, modules: Sequence[str]) -> Fingerprint:
        """Without the modules that an adapter brings itself, such as a head, which is drawn anew in each base."""
        if not modules:
            return self
        return Fingerprint({name: entry for name, entry in self.parameters.items() if not inside(modules, name)})

    def check(self, base: Fingerprint, what: str, modules: Sequence[str] = ()) -> None:
        """Refuse a base that is not this one; ``modules`` do not matter.

        Raises:
            CheckpointError: the parameters that differ, by name.

        """
        if self == base:
            return
        expected, got = self.without(modules).parameters, base.without(modules).parameters
        faults = [_difference(name, expected.get(name), got.get(name)) for name in sorted({*expected, *got})]
        if wrong := [fault for fault in faults if fault]:
            raise CheckpointError(gather(f"{what} is of another base model:", wrong, 5))

    def to_json(self) -> str:
        """As one JSON text."""
        return json.dumps(dict(self.parameters), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """The reverse of :meth:`to_json`."""
        values = json.loads(text)
        return cls({str(name): str(entry) for name, entry in values.items()})


def _difference(name: str, expected: str | None, got: str | None) -> str:
    if expected == got:
        return ""
    if expected is None or got is None:
        return f"{name}: {'not in this base' if got is None else 'only in this base'}"
    shapes = expected.partition(":")[0], got.partition(":")[0]
    if shapes[0] != shapes[1]:
        return f"{name}: expected the shape {shapes[0]}, this base has {shapes[1]}"
    return f"{name}: other values"


def _parameters(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's own parameters by their names in the base, whatever wraps them."""
    for name, module, _ in walk(base):
        if is_parameter(module):
            continue
        for key, value in unwrapped(module).named_parameters(recurse=False, remove_duplicate=False):
            yield f"{name}.{key}" if name else key, value


def _entry(name: str, value: Tensor) -> str:
    if value.device.type == "meta":
        raise UnsupportedError(f"{name!r} has no values yet (it is on meta), so the base has no fingerprint")
    if is_sharded(value) or is_sharded(value.data):
        raise UnsupportedError(f"{name!r} is sharded; take the fingerprint of the whole base, before it is sharded")
    shape = "x".join(map(str, value.shape))
    digest = hashlib.blake2b(shape.encode(), digest_size=8)
    for part in _parts(value.data):
        digest.update(_sample(part))
    return f"{shape}:{digest.hexdigest()}"


def _parts(value: Tensor) -> list[Tensor]:
    """A tensor's plain parts: itself, or those that a quantised weight is made of."""
    if type(value) is Tensor or not hasattr(value, "__tensor_flatten__"):
        return [value.as_subclass(Tensor)]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(value, name))]


def _sample(value: Tensor) -> bytes:
    flat = value.detach().reshape(-1)
    count = flat.numel()
    if count > VALUES:
        places = torch.arange(VALUES, dtype=torch.int64) * (count - 1) // (VALUES - 1)
        flat = flat[places.to(flat.device)]
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    flat = flat.to(torch.bfloat16) if flat.is_floating_point() else flat
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes() if count else b""
