"""Intrinsic dimension (Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2020, arXiv 2012.13255).

One vector of d numbers is trained for the whole model; fixed random numbers P project it to every adapted weight:

::

    did    W_i + (P theta)_i                              theta: d numbers                      (2018, eq. 2)
    said   W_i + lambda_i (P theta)_i, i = 1 ... m        theta: d - m numbers, lambda: m       (2020, eq. 3)

P is defined by a seed, to the bit (docs/projections.md), and its columns have unit length in expectation over all D
adapted numbers. A checkpoint is d numbers, the seed, and the order of the layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor

from ..config import AdapterConfig, Names, number_fault, option
from ..deltas import Delta, Full, Role
from ..errors import CheckpointError, ConfigError, did_you_mean
from ..kernels.lowrank import accumulate_dtype
from ..kernels.projected import Held, Projection, padded
from ..projections.matrices import SEED_LIMIT, Projections
from ._base import Export, Kept, Method, Rate, Shared, Site
from ._order import in_order, order_faults, order_option

__all__ = ["Intrinsic", "IntrinsicConfig"]

PROJECTIONS = ("fastfood", "dense")
STRUCTURES = ("did", "said")
VECTOR = "intrinsic_vector"
DENSE_LIMIT = 2**30  # bytes; a dense projection has 4 d of them for each adapted number


@final
@dataclass(frozen=True, kw_only=True)
class IntrinsicConfig(AdapterConfig):
    """The options of intrinsic dimension. The number of trained numbers is d, whatever the model."""

    peft_type: ClassVar[str] = "INTRINSIC"
    bias_modes: ClassVar[Names] = ("none", "all", "intrinsic_only")

    d: int = option(1000, "How many numbers are trained for the whole model, the scales of 'said' among them.")
    projection: str = option(
        "fastfood",
        "'fastfood': H G Pi H B in blocks, O(D log d) for D adapted numbers. 'dense': a matrix (D, d), for small "
        "models; refused above 1 GiB.",
    )
    structure: str = option(
        "did",
        "'did': the projected vector as it is. 'said': times one trained scale per layer; as many of the d numbers as "
        "there are adapted layers are scales.",
    )
    projection_prng_key: int = option(0, "The seed of the projection, 0 ... 2**64 - 1.")
    site_order: Sequence[str] | None = order_option()

    def __post_init__(self) -> None:
        if isinstance(self.site_order, list):
            self._set("site_order", tuple(self.site_order))
        super().__post_init__()

    def faults(self) -> list[str]:
        faults = number_fault("d", self.d, low=1, whole=True)
        for name, valid in (("projection", PROJECTIONS), ("structure", STRUCTURES)):
            if (value := getattr(self, name)) not in valid:
                faults.append(f"{name}: expected one of {list(valid)}, got {value!r}.{did_you_mean(str(value), valid)}")
        key = self.projection_prng_key
        if type(key) is not int or not 0 <= key < SEED_LIMIT:
            faults.append(f"projection_prng_key: expected a whole number in 0 ... 2**64 - 1, got {key!r}")
        return faults + order_faults(self.site_order)


@final
class _IntrinsicShared(Shared):
    """For each layer its projection; ``gain`` makes the columns of P of unit length."""

    def __init__(self, sites: Sequence[Site], projections: Sequence[Projection], gain: float):
        super().__init__()
        self.sites, self.gain = tuple((site.name, site.out, site.inn) for site in sites), gain
        self.by_name = {site.name: projection for site, projection in zip(sites, projections)}
        self.held = Held(projections)

    def checksum(self) -> str:
        """SHA-256 over the form, and each layer's shape and first block (or row) of numbers (docs/projections.md)."""
        digest = hashlib.sha256()
        for name, out, inn in self.sites:
            projection = self.by_name[name]
            form = "dense" if projection.dense else "fastfood"
            digest.update(f"{form} {projection.size} ({out}, {inn});".encode())
            for part in projection.first():
                digest.update(np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


@final
class Intrinsic(Method[IntrinsicConfig]):
    """Parameters of the whole model: intrinsic_vector (d,); none of a layer.

    What it costs: each forward builds the change (out, in) of each layer, a projection in O(out in log d), and
    autograd keeps it until the backward, as it keeps any weight that an input is multiplied by; so training holds a
    second copy of the adapted weights, in the compute dtype. The projection's numbers take 7 bytes for each adapted
    number (4 d when dense) as long as they fit (``kernels.projected.KEEP_BYTES``), and are drawn anew where not.
    Merged, it costs nothing.
    """

    name: ClassVar[str] = "intrinsic"
    config_cls: ClassVar[type[AdapterConfig]] = IntrinsicConfig
    makes: type[Delta] = Full
    usual_rate: ClassVar[Rate] = Rate(5e-2)
    example: ClassVar[Mapping[str, Any]] = {"d": 13}
    keys: Mapping[str, str] = {}

    def __init__(self, config: IntrinsicConfig, vector: Tensor | None = None, checksum: str | None = None) -> None:
        super().__init__(config)
        self.loaded, self.expected_checksum = vector, checksum
        if config.structure == "said":  # the last numbers are the layers' scales, which start at one
            self.roles = {VECTOR: Role.ROWS}

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        config = self.config
        ordered = in_order(sites, config.site_order, self.loaded is not None)
        size, dense = self._projected_size(len(sites)), config.projection == "dense"
        total = sum(site.out * site.inn for site in sites)  # D
        if dense and (wanted := 4 * total * size) > DENSE_LIMIT:
            raise ConfigError(
                f"projection='dense' for {total} adapted numbers and a vector of {size} takes {wanted} bytes, and at "
                f"most {DENSE_LIMIT} are allowed; use projection='fastfood', a smaller d, or fewer target_modules"
            )
        seed = config.projection_prng_key
        made = [Projection(seed, i, site.out * site.inn, size, dense) for i, site in enumerate(ordered)]
        # The entries of P before the gain have mean square 1/3 (uniform), or n (rows of H G Pi H B, up to 2^-32).
        gain = (3.0 / total) ** 0.5 if dense else (total * padded(size)) ** -0.5
        return _IntrinsicShared(ordered, made, gain)

    def _projected_size(self, layers: int) -> int:
        """How many of the d numbers are projected: all, or those that are no scales."""
        if self.config.structure == "did":
            return self.config.d
        if self.config.d <= layers:
            raise ConfigError(
                f"structure='said' counts one scale for each adapted layer in d: with {layers} layers expected d > "
                f"{layers}, got d = {self.config.d}; raise d, adapt fewer layers, or use structure='did'"
            )
        return self.config.d - layers

    def init_model(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        device = sites[0].device()
        if self.loaded is not None:
            return {VECTOR: self.loaded.to(device, accumulate_dtype(self.loaded.dtype), copy=True)}
        vector = torch.zeros(self.config.d, device=device, dtype=torch.float32)
        vector[self._projected_size(len(sites)) :] = 1.0
        return {VECTOR: vector}

    def verify(self, shared: Shared) -> None:
        assert isinstance(shared, _IntrinsicShared)
        if self.expected_checksum is None or (actual := shared.checksum()) == self.expected_checksum:
            return
        raise CheckpointError(
            f"the projection does not match the checkpoint: expected SHA-256 {self.expected_checksum}, got {actual}; "
            "the seed, d, the layers' order or the base model's shapes differ from those at training"
        )

    def count(self, sites: Sequence[Site]) -> int:
        return self.config.d

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        return {}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Full:
        assert isinstance(shared, _IntrinsicShared)
        projection = shared.by_name[site.name]
        vector = shared.trained[VECTOR].to(site.device())  # (d,)
        theta = vector[: projection.size] * shared.gain
        if self.config.structure == "said":  # before the projection, so that autograd need not keep what came out
            theta = theta * vector[projection.size + projection.site]
        return Full(projection.forward(theta).view(site.out, site.inn))

    # -- files -----------------------------------------------------------------------------------

    def kept(self, key: str) -> Kept | None:
        return Kept.TRAINED if key == VECTOR else None

    @classmethod
    def from_file(cls, config: IntrinsicConfig, extra: Mapping[str, Tensor], checksum: str | None) -> Intrinsic:
        vector = extra.get(VECTOR)
        if vector is None or len(extra) != 1:
            raise CheckpointError(
                f"intrinsic: expected one tensor that belongs to no layer, {VECTOR!r}, got {sorted(extra) or 'none'}"
            )
        if tuple(vector.shape) != (config.d,):
            raise CheckpointError(
                f"intrinsic: expected {VECTOR} ({config.d},), as d in the config says, got {tuple(vector.shape)}"
            )
        return cls(config, vector, checksum)

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        assert isinstance(shared, _IntrinsicShared)
        order: list[Any] = [name for name, _, _ in shared.sites]
        tensors = super().export(sites, params, shared).tensors
        return Export(tensors, section={"site_order": order}, checksum=shared.checksum())
