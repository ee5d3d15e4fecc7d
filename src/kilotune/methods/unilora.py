"""Uni-LoRA (2025, arXiv 2506.00799): all of LoRA's factors are picked from one trained vector.

::

    theta (d,) ──· norm (d,)──► A_i (r, in), B_i (out, r) of every layer i, each number at fixed places; W_i + B_i A_i

Every place of every factor has an index into theta, drawn from a seed; ``norm`` is 1 / sqrt(the number of places that
an index has in the whole model), so the map from theta to all the factors keeps lengths and angles. As in the paper
and in PEFT theta starts random and both factors are made of it, so the start is near the base, not at it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn

from ..config import AdapterConfig, Names, bool_faults, number_fault, option, rate_fault
from ..deltas import Delta, LowRank
from ..errors import CheckpointError, ConfigError, gather
from ..kernels.lowrank import accumulate_dtype
from ..projections.matrices import SEED_LIMIT, Projections
from ..projections.streams import balanced_indices
from ._base import Export, Kept, LowRankConfig, Method, Rate, Shared, Site
from ._order import in_order, order_faults, order_option

__all__ = ["UniLora", "UniLoraConfig"]

GENERATORS = ("portable", "peft", "stored")
VECTOR = "unilora_theta_d"
INDICES = ("unilora_indices_A", "unilora_indices_B")
SCALES = ("unilora_scales_A", "unilora_scales_B")


@final
@dataclass(frozen=True, kw_only=True)
class UniLoraConfig(LowRankConfig):
    """Uni-LoRA's options, under PEFT's names, and two of ours: ``generator`` and ``site_order``."""

    peft_type: ClassVar[str] = "UNILORA"
    bias_modes: ClassVar[Names] = ("none", "all", "unilora_only")

    r: int = option(4, "The rank of the factors that are picked from the vector.")
    proj_seed: int = option(42, "The seed of the indices, 0 ... 2**64 - 1.")
    theta_d_length: int = option(256, "d: how many numbers are trained for the whole model.")
    unilora_dropout: float = option(0.0, "Dropout on the adapter's input, in [0, 1).")
    init_theta_d_bound: float = option(0.02, "The vector starts uniform in +- this; small values are stable.")
    init_weights: bool = option(True, "False: the vector starts normally distributed, for experiments.")
    save_indices: bool = option(
        False,
        "Write all indices and norms into the checkpoint. PEFT can then load it whatever drew them; without, it can "
        "load those of generator='peft' only.",
    )
    generator: str = option(
        "portable",
        "Where the indices come from: 'portable' (the same everywhere), 'peft' (those that PEFT draws for this seed, "
        "these targets and their order). 'stored' stands in adapters that brought theirs along.",
        ours=True,
    )
    site_order: Sequence[str] | None = order_option()

    def __post_init__(self) -> None:
        if isinstance(self.site_order, list):
            self._set("site_order", tuple(self.site_order))
        super().__post_init__()

    @property
    def dropout(self) -> float:
        return self.unilora_dropout

    @classmethod
    def from_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> UniLoraConfig:
        """PEFT's files mean PEFT's indices: those in the file, or those that its generator draws.

        Ours say so otherwise: by ``generator``, older ones by ``theta_d_length`` in our section.
        """
        if not section.keys() & {"generator", "theta_d_length"}:
            section = {**section, "generator": "stored" if values.get("save_indices", False) else "peft"}
        return cls.from_dict({**values, **section})

    def faults(self) -> list[str]:
        faults = number_fault("r", self.r, low=1, whole=True)
        faults += number_fault("theta_d_length", self.theta_d_length, low=1, whole=True)
        faults += rate_fault("unilora_dropout", self.unilora_dropout)
        faults += number_fault("init_theta_d_bound", self.init_theta_d_bound, low=0)
        if self.init_theta_d_bound == 0:
            faults.append("init_theta_d_bound: expected a number > 0, got 0: at zero neither factor gets a gradient")
        faults += bool_faults(self, "init_weights", "save_indices")
        if type(self.proj_seed) is not int or not 0 <= self.proj_seed < SEED_LIMIT:
            faults.append(f"proj_seed: expected a whole number in 0 ... 2**64 - 1, got {self.proj_seed!r}")
        if self.generator not in GENERATORS:
            faults.append(f"generator: expected one of {list(GENERATORS)}, got {self.generator!r}")
        if self.site_order is not None and self.generator != "portable":
            faults.append(
                f"site_order: needs generator='portable', got {self.generator!r}, which has the model's order"
            )
        return faults + order_faults(self.site_order)


class Places(NamedTuple):
    """Where one layer's factors stand in the vector: a (r, in) and b (out, r), int32; and, where a file brought
    them, the factors' own norms in the same shapes."""

    a: Tensor
    b: Tensor
    scale_a: Tensor | None = None
    scale_b: Tensor | None = None


@final
class Layout:
    """The places of all layers, and the vector's norms; drawn when they are first used.

    Frozen, so copies of a model share it. Copies on other devices are kept.
    """

    def __init__(self, config: UniLoraConfig, sites: Sequence[Site], stored: Mapping[str, Places] | None) -> None:
        self.shapes = {site.name: (site.out, site.inn) for site in sites}
        self.rank, self.d, self.seed = config.r, config.theta_d_length, config.proj_seed
        self.peft = config.generator == "peft"
        self._stored = stored
        self._places: dict[tuple[str, torch.device], Places] = {}
        self._norms: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": {}, "_norms": {}}  # what the definition gives back need not be written

    @torch.inference_mode(False)  # tensors made in inference mode could never serve a training step
    def places(self, name: str, device: torch.device) -> Places:
        """The places of the layer ``name`` on ``device``."""
        found = self._places.get((name, device))
        if found is None:
            out, inn = self.shapes[name]
            if device.type == "meta":
                made = (
                    torch.empty(shape, dtype=torch.int32, device=device)
                    for shape in ((self.rank, inn), (out, self.rank))
                )
                found = Places(*made)
            else:
                here = self.defined()[name]
                found = Places(*(None if t is None else t.to(device) for t in here))  # type: ignore[arg-type]
            self._places[name, device] = found
        return found

    @torch.inference_mode(False)
    def norms(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """1 / sqrt(count) of each of the d numbers, 0 where one has no place: (d,)."""
        found = self._norms.get((device, dtype))
        if found is None:
            found = torch.empty(self.d, device=device, dtype=dtype)
            if device.type != "meta":
                found = self._norms_in(dtype).to(device)
            self._norms[device, dtype] = found
        return found

    def _norms_in(self, dtype: torch.dtype) -> Tensor:
        flat = torch.cat([t.reshape(-1) for places in self.defined().values() for t in (places.a, places.b)])
        counts = torch.bincount(flat, minlength=self.d)  # (d,)
        exact = counts.float() if self.peft else counts.double()  # PEFT's are float32 numbers
        return exact.rsqrt().masked_fill(counts == 0, 0.0).to(dtype)

    def defined(self) -> dict[str, Places]:
        """The places of all layers on the CPU."""
        if self._stored is None:
            self._stored = self._draw()
        return dict(self._stored)

    def _draw(self) -> dict[str, Places]:
        sizes = [self.rank * (out + inn) for out, inn in self.shapes.values()]
        drawn = _peft_indices(self.seed, sizes, self.d) if self.peft else balanced_indices(self.seed, sizes, self.d)
        made = {}
        for (name, (out, inn)), flat in zip(self.shapes.items(), drawn):
            cut, indices = self.rank * inn, torch.from_numpy(flat)
            made[name] = Places(indices[:cut].view(self.rank, inn), indices[cut:].view(out, self.rank))
        return made

    def checksum(self) -> str:
        """SHA-256 over d, and each layer's shape and indices as little-endian 32-bit integers."""
        digest = hashlib.sha256(f"{self.d};".encode())
        for name, (out, inn) in self.shapes.items():
            digest.update(f"({out}, {inn});".encode())
            for part in self.defined()[name][:2]:
                digest.update(np.ascontiguousarray(part.numpy(), dtype="<i4").tobytes())
        return digest.hexdigest()


def _peft_indices(seed: int, sizes: Sequence[int], d: int) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """The indices of PEFT 0.21, number for number: NumPy's default generator, whose stream may change some day."""
    total = sum(sizes)
    generator = np.random.default_rng(seed)
    flat = np.repeat(np.arange(d), total // d)
    if total % d:
        flat = np.concatenate([flat, generator.choice(d, size=total % d, replace=False)])
    generator.shuffle(flat)
    return np.split(flat.astype(np.int32), np.cumsum(sizes)[:-1])


@final
class _UniShared(Shared):
    """Where the vector's numbers stand."""

    def __init__(self, layout: Layout, brought: bool) -> None:
        super().__init__(common=layout if brought else None)  # what is drawn is the same for one configuration
        self.layout = layout


@final
class UniLora(Method[UniLoraConfig]):
    """Parameters of the whole model: unilora_theta_d (d,); none of a layer."""

    name: ClassVar[str] = "unilora"
    config_cls: ClassVar[type[AdapterConfig]] = UniLoraConfig
    makes: type[Delta] = LowRank
    stacks: bool = True
    usual_rate: ClassVar[Rate] = Rate(0.15)
    example: ClassVar[Mapping[str, Any]] = {"r": 2, "theta_d_length": 11}
    keys: Mapping[str, str] = {}
    default_targets: Mapping[str, Sequence[str]] = {"phi": ("q_proj", "v_proj", "fc1", "fc2")}

    def __init__(
        self, config: UniLoraConfig, brought: Mapping[str, Tensor] | None = None, checksum: str | None = None
    ) -> None:
        super().__init__(config)
        self.brought, self.expected_checksum = brought or {}, checksum

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        stored = None
        if self.config.generator == "stored":
            if not self.brought:
                raise ConfigError("generator='stored' is for adapters loaded from a file; use 'portable' or 'peft'")
            stored = self._stored_places(sites)
        ordered = in_order(sites, self.config.site_order, bool(self.brought))
        layout = Layout(self.config, ordered, stored)
        for site in sites:  # now, so that a compiled forward never draws them
            layout.places(site.name, site.device())
            layout.norms(site.device(), torch.float32)
        return _UniShared(layout, stored is not None)

    def init_model(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        given, d, device = self.brought.get(VECTOR), self.config.theta_d_length, sites[0].device()
        if given is not None:
            return {VECTOR: given.to(device, accumulate_dtype(given.dtype), copy=True)}
        # On the CPU, as PEFT draws it: the same seed of torch gives the same start.
        vector = torch.empty(d, dtype=torch.float32, device="meta" if device.type == "meta" else "cpu")
        if self.config.init_weights:
            nn.init.uniform_(vector, -self.config.init_theta_d_bound, self.config.init_theta_d_bound)
        else:
            nn.init.normal_(vector)
        return {VECTOR: vector.to(device)}

    def verify(self, shared: Shared) -> None:
        assert isinstance(shared, _UniShared)
        if self.expected_checksum is None or (actual := shared.layout.checksum()) == self.expected_checksum:
            return
        raise CheckpointError(
            f"the indices do not match the checkpoint: expected SHA-256 {self.expected_checksum}, got {actual}; the "
            "seed, the rank, the layers' order or the base model's shapes differ from those at training"
        )

    def count(self, sites: Sequence[Site]) -> int:
        return self.config.theta_d_length

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        return {}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        assert isinstance(shared, _UniShared)
        device, dtype = site.device(), site.dtype()
        places = shared.layout.places(site.name, device)
        theta = shared.trained[VECTOR].to(device)  # (..., d), of each of the adapters in front
        if places.scale_a is None or places.scale_b is None:
            theta = theta * shared.layout.norms(device, theta.dtype)
        a, b = (theta.index_select(-1, p.view(-1)).view(*theta.shape[:-1], *p.shape) for p in places[:2])
        if places.scale_a is not None and places.scale_b is not None:
            a, b = a * places.scale_a, b * places.scale_b
        return LowRank(a=a.to(dtype), b=b.to(dtype))  # (..., r, in), (..., out, r)

    # -- files -----------------------------------------------------------------------------------

    def kept(self, key: str) -> Kept | None:
        if key == VECTOR:
            return Kept.TRAINED
        return Kept.BROUGHT if key in (*INDICES, *SCALES) else None

    @classmethod
    def from_file(cls, config: UniLoraConfig, extra: Mapping[str, Tensor], checksum: str | None) -> UniLora:
        vector = extra.get(VECTOR)
        faults = [] if vector is not None else [f"missing: {VECTOR} ({config.theta_d_length},)"]
        if vector is not None and tuple(vector.shape) != (config.theta_d_length,):
            faults.append(f"shape of {VECTOR}: expected ({config.theta_d_length},), got {tuple(vector.shape)}")
        unknown = [key for key in extra if key != VECTOR and key.rpartition(".")[2] not in (*INDICES, *SCALES)]
        faults += [f"unexpected: {key}" for key in sorted(unknown)]
        indices = [key for key in extra if key != VECTOR and key not in unknown]
        if config.generator != "stored" and indices:
            faults.append(
                f"the config says save_indices=False, but the file holds {indices[0]} and {len(indices) - 1} more"
            )
        if faults:
            raise CheckpointError(gather("unilora: the file is not what its config says:", faults))
        return cls(config, dict(extra), None if config.generator == "stored" else checksum)

    def _stored_places(self, sites: Sequence[Site]) -> dict[str, Places]:
        """The file's indices and norms, held against the layers of this model."""
        rank, made, used, faults = self.config.r, {}, {VECTOR}, []
        for site in sites:
            shapes = ((rank, site.inn), (site.out, rank)) * 2
            found = []
            for key, shape in zip((*INDICES, *SCALES), shapes):
                name, value = self._brought_for(site, key)
                used.add(name)
                fault = self._stored_fault(key, value, shape)
                faults += [] if fault is None else [f"{name}: {fault}"]
                found.append(value)
            if not faults:
                a, b, scale_a, scale_b = (t for t in found if t is not None)
                made[site.name] = Places(a.to(torch.int32), b.to(torch.int32), scale_a.float(), scale_b.float())
        faults += [f"unexpected: {key}" for key in self.brought if key not in used]
        if faults:
            raise CheckpointError(gather("unilora: the file's indices do not fit this model:", faults))
        return made

    def _brought_for(self, site: Site, key: str) -> tuple[str, Tensor | None]:
        """The file's tensor of a site, and its name; one tensor holds those of all the experts of a stack."""
        if not site.stack:
            name = f"{site.name}.{key}"
            return name, self.brought.get(name)
        name, index = f"{site.stack}.{key}", int(site.name.rpartition(".")[2])
        whole = self.brought.get(name)
        return name, whole[index] if whole is not None and whole.ndim == 3 and index < len(whole) else None

    def _stored_fault(self, key: str, value: Tensor | None, shape: tuple[int, ...]) -> str | None:
        d = self.config.theta_d_length
        if value is None or tuple(value.shape) != shape:
            return f"the model expects {shape}, the file has {'nothing' if value is None else tuple(value.shape)}"
        if key in SCALES:
            return None if value.is_floating_point() else f"expected floats, got {value.dtype}"
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            return f"expected integers, got {value.dtype}"
        if bool(((value < 0) | (value >= d)).any()):
            return f"expected indices in 0 ... {d - 1}, got {int(value.min())} ... {int(value.max())}"
        return None

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        assert isinstance(shared, _UniShared)
        config, plain = self.config, super().export(sites, params, shared)
        if config.generator == "stored":  # as they came
            kept = {key: value for key, value in self.brought.items() if key != VECTOR}
            return Export({**plain.tensors, **kept}, peft=True, config={"save_indices": True})
        if config.save_indices:
            section: dict[str, Any] = {"generator": "stored", "site_order": None}
            return Export({**plain.tensors, **_index_tensors(shared.layout)}, peft=True, section=section)
        if config.generator == "peft":
            return Export(plain.tensors, peft=True, checksum=shared.layout.checksum())
        # PEFT would draw other indices for the seed and not notice.
        section = {"generator": config.generator, "site_order": list(shared.layout.shapes)}
        return Export(plain.tensors, section=section, checksum=shared.layout.checksum())


def _index_tensors(layout: Layout) -> dict[str, Tensor]:
    norms = layout.norms(torch.device("cpu"), torch.float32)
    made = {}
    for name, places in layout.defined().items():
        for key, scale, place in zip(INDICES, SCALES, (places.a, places.b)):
            made[f"{name}.{key}"] = place.long()
            made[f"{name}.{scale}"] = norms[place.long()]
    return made
