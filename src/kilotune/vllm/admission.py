"""Whether an adapter of a store may be served, all of it checked before any worker hears of it; and its row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from ..adapter_files.reading import AdapterFile
from ..adapter_files.stands_on import StandsOn
from ..errors import CheckpointError, UnsupportedError, did_you_mean, gather
from ..fleet.store import Fingerprint, Record
from ..methods.vera import Vera, VeraConfig
from ..projections.matrices import Extent, PortableSource, pair_checksum
from .base_fingerprint import check_base
from .merged_base import Merged
from .settings import ONE_SHARED
from .worker_status import Served

__all__ = ["row_of"]

KEYS = ("vera_lambda_d", "vera_lambda_b")
EXPORT = "export it as a LoRA adapter (kilotune convert) for a server with LoRA"


def row_of(record: Record, served: Served, base: Fingerprint | None, merged: Merged | None = None) -> Tensor:
    """The whole row of an adapter, in the engine's type. base: of the engine's model; None: not to be compared. merged:
    the shared adapter that is merged into that model, before which ``base`` is.

    Raises:
        CheckpointError: it is damaged, or of another base. UnsupportedError: this engine cannot serve it.

    """
    what = f"the adapter {record.info.name!r} (version {record.info.version})"
    file = record.file()
    _check_stack(file, merged, what)
    if faults := _config_faults(file, served):
        raise UnsupportedError(gather(f"{what} cannot be served by this engine:", faults))
    numbers, faults = _numbers(file, served)
    if faults:
        raise CheckpointError(gather(f"{what} does not fit this engine:", faults))
    _check_matrices(file, served, numbers, what)
    if base is not None:
        if record.form.base is not None:
            check_base(record.form.base, base, what)
        elif served.settings.require_base:
            raise CheckpointError(
                f"{what} does not say what base it was trained on: put it from its model, or into a store that is "
                "opened with base=..., or set require_base to false"
            )
    row = served.layout.row(numbers).to(served.dtype)
    if not bool(torch.isfinite(row).all()):
        raise CheckpointError(f"{what} has numbers that are too large for {served.dtype}")
    return row


def _check_stack(file: AdapterFile, merged: Merged | None, what: str) -> None:
    """See that an adapter stands on what is merged into the engine's model, and on nothing else.

    Raises:
        UnsupportedError: it does not.

    """
    on, there = StandsOn.of_header(file.metadata), None if merged is None else merged.on
    if (None if on is None else on.sha256) == (None if there is None else there.sha256):
        return
    if on is None:
        raise UnsupportedError(
            f"{what} was trained on the base alone, and this engine's model has {there} merged into it; ask a process "
            "without it"
        )
    if there is None:
        raise UnsupportedError(
            f"{what} stands on {on.name!r}, which is not merged into this engine's model; start a process with "
            f"--on {on.name}"
        )
    raise UnsupportedError(f"{what} stands on {on}, and this engine's model has {there} merged into it; {ONE_SHARED}")


def _config_faults(file: AdapterFile, served: Served) -> list[str]:
    config = file.config
    if not isinstance(config, VeraConfig):
        return [f"its method is {config.peft_type}, and only VeRA is served natively"]
    layout = served.layout
    found = []
    if config.generator != "portable" or config.sharing != "nested":
        found.append(
            f"its matrices are of generator={config.generator!r}, sharing={config.sharing!r}; one pair for all is "
            f"'portable' and 'nested' ({EXPORT})"
        )
    if config.projection_prng_key != layout.seed:
        found.append(f"its projection_prng_key is {config.projection_prng_key}, the engine's is {layout.seed}")
    if config.r > layout.rank:
        found.append(f"its rank is {config.r}, the engine's largest is {layout.rank}")
    if config.use_dora:
        found.append(f"it is DoRA over VeRA ({EXPORT})")
    if config.bias != "none":
        found.append(f"it trains biases (bias={config.bias!r})")
    if config.modules_to_save:
        found.append(f"it brings modules of its own: {config.modules_to_save}")
    return found


def _numbers(file: AdapterFile, served: Served) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """The d and b by layer, and what is wrong with them."""
    sites, rank = served.layout.by_name, int(file.config.to_dict()["r"])
    found: dict[str, dict[str, Tensor]] = {}
    faults = []
    for key, value in file.tensors.items():
        name, _, last = key.rpartition(".")
        if name not in sites or last not in KEYS:
            faults.append(f"{key}: no layer that this engine adapts.{did_you_mean(name, sites)}")
            continue
        size = rank if last == KEYS[0] else sites[name].out
        if tuple(value.shape) != (size,):
            faults.append(f"{key}: expected the shape ({size},), got {tuple(value.shape)}")
        elif not math.isfinite(largest := float(value.abs().max())) or largest > served.settings.max_abs:
            faults.append(f"{key}: expected finite numbers of at most {served.settings.max_abs:g}, got {largest:g}")
        else:
            found.setdefault(name, {})[last] = value
    faults += [f"{key}: belongs to no layer" for key in file.extra]
    if not faults:
        faults = [f"{name}: only one of {KEYS} is there" for name, own in found.items() if len(own) < len(KEYS)]
    if faults:
        return {}, faults
    return {name: (own[KEYS[0]], own[KEYS[1]]) for name, own in found.items()}, []


def _check_matrices(file: AdapterFile, served: Served, numbers: Mapping[str, tuple[Tensor, Tensor]], what: str) -> None:
    """Hold the checksum of the frozen matrices that it was trained with against those of the engine."""
    method = file.method
    if not isinstance(method, Vera) or method.expected_checksum is None or not numbers:
        return
    sites = [served.layout.by_name[name] for name in numbers]
    extent = Extent(method.config.r, max(site.inn for site in sites), max(site.out for site in sites))
    if (actual := _checksum(served.layout.seed, extent)) != method.expected_checksum:
        raise CheckpointError(
            f"{what} was trained with other frozen matrices: expected SHA-256 {method.expected_checksum}, this "
            f"engine's are {actual}"
        )


@lru_cache(maxsize=64)
def _checksum(seed: int, extent: Extent) -> str:
    return pair_checksum([PortableSource(seed).build(extent)])
