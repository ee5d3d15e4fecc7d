"""Adapters into other forms: any low-rank adapter into LoRA, VeRA to and from PEFT's layout.

::

    VeRA   W + diag(b) B diag(d) A      is LoRA with  lora_A = diag(d) A (r, in),  lora_B = diag(b) B (out, r)

so the LoRA of the same rank is exact, to float32 rounding. A smaller rank k takes the best approximation
of each layer's change (Eckart and Young 1936), found from the factors and never from the (out, in) matrix:

    B' A' = Q1 R1 (Q2 R2)^T = Q1 (R1 R2^T) Q2^T,   and the small R1 R2^T (r, r) goes through an SVD.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ._ui.progress import track
from .adapter_files import writing
from .adapter_files.files import tensors_checksum, write
from .adapter_files.peft_layout import BASE, PREFIX, config_checksum, header_metadata
from .adapter_files.reading import AdapterFile
from .config import SECTION, AdapterConfig
from .deltas import LowRank, Role
from .errors import CheckpointError, ConfigError, UnsupportedError, gather
from .injection import inject
from .injection.inject import Installed
from .kinds import KINDS
from .methods import LoraConfig, Site, UniLoraConfig, VeraConfig
from .methods.lora import Lora
from .methods.unilora import UniLora
from .methods.vera import Vera
from .model.adapter_model import AdapterModel
from .model.peft_model import PeftModel
from .name_rules import ends
from .projections.matrices import Extent, PeftSource, PortableSource, StoredSource

__all__ = [
    "Conversion",
    "factors_of_low_rank",
    "hollow",
    "rewrite",
    "to_kilotune",
    "to_lora",
    "to_peft",
    "truncate",
]

SAME_FORM = "PEFT's files and ours are the same"
State = tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]


@final
@dataclass(frozen=True)
class Conversion:
    """A converted adapter, in memory until :meth:`save`.

    state: the config, tensors and metadata of its files. what: one line that says what was done. errors:
    layer -> the relative Frobenius error of its change; empty where nothing was approximated.
    """

    state: State
    what: str
    errors: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float] | None:
        """The layer with the largest error, and the error."""
        return max(self.errors.items(), key=lambda item: item[1], default=None)

    def save(self, folder: str | Path) -> None:
        """Write the adapter to ``folder``, atomically."""
        write(Path(folder), *self.state)


def hollow(model: nn.Module) -> nn.Module:
    """Give a meta model CPU weights that are all zero and take no memory; returns ``model``.

    What only needs the shapes of a base (loading and converting adapters) can then run on it.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(_nothing(parameter, torch.float32), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _nothing(buffer, buffer.dtype)
    return model


def _nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device="cpu").expand(like.shape)


def _sites(installed: Installed) -> dict[str, Site]:
    """The layers that the method itself adapts (not those of which only the bias is trained)."""
    return {name: slot.site for name, slot in installed.slots().items() if slot.method is not None}


@contextmanager
def _beside(model: AdapterModel, config: AdapterConfig, old: Installed) -> Iterator[Installed]:
    """A second adapter of the same layers under another config, with ``old``'s biases and whole modules in it.

    It is gone again at the end. Names that match nothing are no errors, as for every loaded adapter.
    """
    name = "converted"
    while name in model.peft_config:
        name += "'"
    model._install(inject.plan(model.model, name, config, strict=False), None)
    try:
        new = model.installed(name)
        new.base = old.base  # of a hollow base there is none
        if set(new.layers) != set(old.layers) or set(new.saved) != set(old.saved):
            raise UnsupportedError(f"converting would change the layers: {sorted(set(new.layers) ^ set(old.layers))}")
        before = old.slots()
        for layer, slot in new.slots().items():
            bias = before[layer].trained_bias
            if slot.trained_bias is not None and bias is not None:
                slot.trained_bias.data.copy_(bias.detach())
        for saved in new.saved.values():
            saved.modules_to_save[new.key].load_state_dict(saved.modules_to_save[old.key].state_dict())
        yield new
    finally:
        model.delete_adapter(name)


# -- to LoRA ---------------------------------------------------------------------------------------


def to_lora(
    model: AdapterModel, adapter_name: str = "default", rank: int | None = None, progressbar: bool = False
) -> Conversion:
    """Any low-rank adapter of ``model`` as a LoRA adapter of the same layers.

    Args:
        model: the adapter in its base model (whose weights are not read; see :func:`hollow`).
        adapter_name: which adapter.
        rank: None for the adapter's own rank, exactly (to float32 rounding); else a smaller rank, and the
            best approximation.
        progressbar: show on stderr how far it is.

    Raises:
        ConfigError: ``rank`` is not below the adapter's own.
        CheckpointError: values that are not finite.
        UnsupportedError: the adapter is a LoRA already (and no rank is given, nor does it count its change from a part
            of the base, as PiSSA's), or not of low rank.

    """
    installed = model.installed(adapter_name)
    broken = [name for name, parameter in installed.parameters() if not bool(torch.isfinite(parameter).all())]
    if broken:
        raise CheckpointError(gather(f"adapter {adapter_name!r} holds values that are not finite:", broken))
    exact = low_rank_factors(installed)
    full = max(a.shape[0] for a, _ in exact.values())
    _check_rank(rank, full, installed)
    errors: dict[str, float] = {}
    factors = {}
    for name in track(list(exact), "approximating" if rank else "converting", show=progressbar):
        a, b = exact[name]
        if rank is not None:
            a, b, errors[name] = truncate(a, b, rank)
        factors[name] = (a.float(), b.float())
    config = _lora_config(model, installed, rank or full)
    what = f"{installed.method.name} of rank {full} as LoRA of rank {rank or full}"
    return Conversion(_lora_state(model, installed, config, factors), what, errors)


def _check_rank(rank: int | None, full: int, installed: Installed) -> None:
    if rank is None:
        if isinstance(installed.config, LoraConfig) and not installed.config.from_base:
            raise UnsupportedError("the adapter is a LoRA adapter already; give a smaller rank to approximate it")
        return
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank: expected a whole number >= 1, got {rank!r}")
    if rank >= full:
        raise ConfigError(
            f"rank {rank} is not below the adapter's own {full}; leave it out for the exact conversion"
            if not isinstance(installed.config, LoraConfig)
            else f"rank {rank} is not below the adapter's own {full}"
        )


def low_rank_factors(installed: Installed) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer (A (r, in), B (out, r)), float64, such that the layer's change is B A; raises as the next one."""
    return {name: factors_of_low_rank(delta) for name, delta in low_rank_deltas(installed).items()}


def low_rank_deltas(installed: Installed) -> dict[str, LowRank]:
    """The change of each layer that the method itself adapts, in float32 on the CPU.

    Raises:
        UnsupportedError: a change that is not of low rank, or of parameters that are in no layer of their own.

    """
    if stacked := [name for name in _sites(installed) if installed.layers[name].kind.parameter is not None]:
        what = "turning an adapter on parameters (target_parameters) into LoRA is not there; merge it instead"
        raise UnsupportedError(gather(f"{what}:", stacked, 3))
    # In float32 on the CPU, whatever the base is in; with a copy of the holder, freed at once.
    sites = {
        name: replace(site, dtype=lambda: torch.float32, device=lambda: torch.device("cpu"))
        for name, site in _sites(installed).items()
    }
    shared = copy.deepcopy(installed.shared)
    slots = installed.slots()
    found = {}
    for name, site in sites.items():
        params = {key: p.detach().cpu() for key, p in slots[name].own().items()}
        delta = installed.method.delta(site, params, shared)
        if not isinstance(delta, LowRank):
            raise UnsupportedError(f"{name}: {installed.method.name} makes no low-rank change, so it is no LoRA")
        found[name] = delta
    return found


def factors_of_low_rank(delta: LowRank, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), whose product the change is; its scale goes in equal parts to both."""
    a, b = delta.a.detach().to(dtype), delta.b.detach().to(dtype)
    root = math.sqrt(abs(delta.scale))
    if delta.mid is not None:
        a = delta.mid.detach().to(dtype).unsqueeze(-1) * a
    if delta.out is not None:
        b = delta.out.detach().to(dtype).unsqueeze(-1) * b
    return a * math.copysign(root, delta.scale), b * root


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best rank-``rank`` approximation of ``b a``, as factors, and its relative Frobenius error.

    Args:
        a: (r, in).
        b: (out, r).
        rank: of the result; where the product's own rank is lower, the rest is zeros.

    Returns:
        (a' (rank, in), b' (out, rank), error in [0, 1]).

    """
    q1, r1 = torch.linalg.qr(b)  # (out, k1), (k1, r)
    q2, r2 = torch.linalg.qr(a.T)  # (in, k2), (k2, r)
    u, s, vh = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    kept = min(rank, s.numel())
    root = s[:kept].sqrt()
    new_a, new_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    new_a[:kept] = root.unsqueeze(-1) * (vh[:kept] @ q2.T)
    new_b[:, :kept] = (q1 @ u[:, :kept]) * root
    whole = float(s.norm())
    return new_a, new_b, float(s[kept:].norm()) / whole if whole > 0 else 0.0


def _lora_config(model: AdapterModel, installed: Installed, rank: int) -> LoraConfig:
    """LoRA's config with everything that the adapter's own config shares with it."""
    old = installed.config
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=old.dropout,
        target_modules=_targets(model, installed),
        bias=old.bias if old.bias in ("none", "all") else "lora_only",
        modules_to_save=old.modules_to_save,
        task_type=old.task_type,
        base_model_name_or_path=old.base_model_name_or_path,
        revision=old.revision,
        inference_mode=True,
    )


def _targets(model: AdapterModel, installed: Installed) -> tuple[str, ...] | str:
    """Exactly the adapted layers: their own short list of names where it is one, else their whole names."""
    old, layers = installed.config, list(_sites(installed))
    if isinstance(old.target_modules, tuple) and not old.exclude_modules and old.layers_to_transform is None:
        there = {end for name in layers for end in ends(name)}
        return tuple(target for target in old.target_modules if target in there)
    return exact_targets(model, layers)


def exact_targets(model: AdapterModel, layers: Sequence[str]) -> tuple[str, ...] | str:
    """What a config names so that it takes these layers, by whole names, and no others."""
    others = [name for name, _, _ in inject.walk(model.model) if name and name not in layers]
    if any(other.endswith(f".{name}") for other in others for name in layers):
        return "|".join(name.replace(".", r"\.") for name in layers)
    return tuple(layers)


def _lora_state(
    model: AdapterModel, installed: Installed, config: LoraConfig, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> State:
    with _beside(model, config, installed) as new:
        slots = new.slots()
        for name, (a, b) in factors.items():
            own = slots[name].own()
            for key, value in (("lora_A", a), ("lora_B", b)):  # an embedding beside PiSSA's layers has half the rank
                own[key].data.zero_()
                own[key].data[: value.shape[0], : value.shape[1]] = value
        return writing.state_of(new)


# -- PEFT's layout ---------------------------------------------------------------------------------


def to_peft(model: PeftModel, adapter_name: str = "default") -> Conversion:
    """The adapter in a form that PEFT loads: VeRA with its matrices in the file; LoRA is the same in both."""
    installed = model.installed(adapter_name)
    config = installed.config
    if isinstance(config, UniLoraConfig) and isinstance(installed.method, UniLora) and config.generator == "portable":
        whole = config.replace(save_indices=True)
        state = writing.state_of(replace(installed, config=whole, method=UniLora(whole)))
        return Conversion(state, "unilora with all its indices in the file", {})
    if not isinstance(config, VeraConfig) or config.use_dora:
        same = _same(installed)
        if SECTION in same.state[0]:
            raise UnsupportedError(f"{installed.method.name}: PEFT has no form for this adapter")
        return _in_blocks(installed, same)
    others = [name for name, layer in installed.layers.items() if not layer.kind.all_linear or layer.kind.substitutes]
    if others := [name for name in others if (slot := installed.slots().get(name)) is not None and slot.own()]:
        raise UnsupportedError(gather("PEFT has no form for VeRA in layers that are not linear:", others))
    state = _vera_state(installed, config.replace(save_projection=True))
    pairs = state[0]["r"] // config.r
    what = f"vera of rank {config.r} with its matrices in the file"
    if pairs > 1:
        what += f"; {pairs} pairs (one a layer shape) stacked to rank {state[0]['r']}, for PEFT has one pair"
    return Conversion(state, what, {})


def _in_blocks(installed: Installed, same: Conversion) -> Conversion:
    """Grouped convolutions at ``groups`` times their rank, block by block; PEFT's scale is then kept by alpha."""
    method = installed.method
    slots = installed.slots()
    adapted = {name: layer for name, layer in installed.layers.items() if name in slots and slots[name].own()}
    grouped = [name for name, layer in adapted.items() if layer.kind.groups(layer.base_layer) > 1]
    if not grouped or not {Role.FIRST, Role.SECOND} & set(method.roles.values()):
        return same
    if not isinstance(method, Lora):
        raise UnsupportedError(f"{method.name}: PEFT has no form for a grouped convolution: {', '.join(grouped)}")
    config, tensors, metadata = same.state
    config, tensors = dict(config), dict(tensors)
    ranks, alphas = {}, {}
    for name, layer in adapted.items():
        module, site = layer.base_layer, layer.site(name)
        groups, rank = layer.kind.groups(module), method.rank(site)
        for parameter, value in slots[name].own().items() if groups > 1 else ():
            key = f"{PREFIX}{name}.{layer.kind.file_key(module, method.keys[parameter])}"
            tensors[key] = layer.kind.to_blocks(module, method.roles[parameter], value.detach().cpu()).contiguous()
        alpha = method.scale(site) * (math.sqrt(groups * rank) if method.config.use_rslora else groups * rank)
        ranks[name], alphas[name] = groups * rank, alpha
    # Every layer by its whole name, for patterns of the user's, and ends of names, may fit the grouped ones too.
    config["rank_pattern"] = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config["alpha_pattern"] = {f"^{re.escape(name)}": alpha for name, alpha in alphas.items()}
    checksums = (
        tensors_checksum(tensors),
        config_checksum(config, installed.config.option_names()),
    )
    metadata = {**metadata, **header_metadata(*checksums, None)}
    what = f"lora with grouped convolutions in PEFT's form, at groups times their rank: {', '.join(grouped)}"
    return Conversion((config, tensors, metadata), what, {})


def to_kilotune(model: PeftModel, adapter_name: str = "default") -> Conversion:
    """The adapter in our smallest form: VeRA without matrices where a seed gives them back bit for bit.

    The matrices of a file are compared with those that PEFT draws for its seed, and with the portable ones
    (the file is then one of ours, written for PEFT, and d changes by rounding); where neither fits, they
    stay in the file.
    """
    installed = model.installed(adapter_name)
    config = installed.config
    if not isinstance(config, VeraConfig) or not isinstance(installed.method, Vera):
        return _same(installed)
    stored = installed.method.stored
    if stored is None:
        state = _vera_state(installed, config.replace(save_projection=False))
        return Conversion(state, f"vera of rank {config.r}, its matrices from the seed", {})
    if _is_drawn_by_peft(stored, config.projection_prng_key):
        state = _reseeded(model, installed, config.replace(generator="peft", save_projection=False), None)
        return Conversion(state, f"vera of rank {config.r}, PEFT's matrices from the seed", {})
    found = _portable(installed, config, stored)
    if found is not None:
        small, vectors = found
        what = f"vera of rank {small.r}, portable matrices from the seed, sharing={small.sharing!r}"
        return Conversion(_reseeded(model, installed, small, vectors), what, {})
    what = f"vera of rank {config.r}; its matrices come from no seed that is known here, so they stay in the file"
    return Conversion(writing.state_of(installed), what, {})


def rewrite(file: AdapterFile) -> Conversion:
    """An adapter whose form is the same in PEFT and here, written anew by us, with checksums; needs no base.

    Raises:
        UnsupportedError: a VeRA adapter, whose forms differ, one with tensors that belong to no layer, or one of
            PEFT's on an attention.

    """
    if isinstance(file.config, VeraConfig) or file.section or file.extra:
        raise UnsupportedError(
            f"{file.method.name}: needs the base's shapes: give the base (--base), or load the adapter and use "
            "to_peft or to_kilotune"
        )
    if deep := sorted(key for key, value in file.tensors.items() if "lora_A" in key and value.ndim > 2):
        raise UnsupportedError(f"{deep[0]} is of a convolution; give the base, whose groups decide PEFT's form of it")
    parts = [f".base_layer.{part}." for kind in KINDS for part in kind.with_it]
    if file.doubled is not False and (own := [k for k in file.tensors if any(part in k for part in parts)]):
        raise UnsupportedError(f"{own[0]} is of an attention, whose change PEFT may add twice; give the base (--base)")
    tensors = {f"{PREFIX}{key}": value for key, value in file.tensors.items()}
    config = file.config.to_dict()
    checksums = tensors_checksum(tensors), config_checksum(config, file.config.option_names())
    metadata = header_metadata(*checksums, None, file.config.ours(), file.metadata.get(BASE))
    return Conversion((config, tensors, metadata), _same_text(file.method.name), {})


def _same_text(method: str) -> str:
    return f"{method}: {SAME_FORM}; written anew, with a checksum"


def _same(installed: Installed) -> Conversion:
    state, name = writing.state_of(installed), installed.method.name
    ours = SECTION in state[0]
    return Conversion(state, f"{name}: {'only kilotune has a form for it' if ours else SAME_FORM}", {})


def _vera_state(installed: Installed, config: VeraConfig) -> State:
    """The files of a VeRA adapter under a config that only says otherwise how it is written."""
    assert isinstance(installed.method, Vera)
    return writing.state_of(replace(installed, config=config, method=Vera(config, installed.method.stored)))


def _is_drawn_by_peft(stored: StoredSource, seed: int) -> bool:
    pair = PeftSource(seed, stored.extent).build(stored.extent)
    return torch.equal(pair.a, stored.pair.a) and torch.equal(pair.b, stored.pair.b)


def _portable(
    installed: Installed, config: VeraConfig, stored: StoredSource
) -> tuple[VeraConfig, dict[str, Tensor]] | None:
    """Undo our own export for PEFT: the config and each layer's d, when the matrices are exactly its; else None."""
    sites, slots = _sites(installed), installed.slots()
    shapes = sorted({(site.out, site.inn) for site in sites.values()})
    keys: dict[str, list[tuple[int, int] | None]] = {"nested": [None], "shape": [*shapes]}
    for sharing, pairs in keys.items():
        if config.r % len(pairs):
            continue
        small = config.replace(generator="portable", sharing=sharing, r=config.r // len(pairs), save_projection=False)
        blocks = _blocks(stored, small, pairs)
        vectors: dict[str, Tensor] = {}
        for name, site in sites.items() if blocks else ():
            first = blocks[None if sharing == "nested" else (site.out, site.inn)] * small.r
            d = slots[name].own()["vera_lambda_d"].detach().double()
            block = slice(first, first + small.r)
            if int((d != 0).sum()) == int((d[block] != 0).sum()):  # zero outside its own pair's block
                vectors[name] = (d[block] / math.sqrt(stored.extent.inn / site.fan_in)).float()
        if len(vectors) == len(sites):
            return small, vectors
    return None


def _blocks(
    stored: StoredSource, config: VeraConfig, pairs: list[tuple[int, int] | None]
) -> dict[tuple[int, int] | None, int]:
    """Which block of ``config.r`` stored rows is the pair of each layer shape (None: of all); empty if none fits."""
    rank, (_, max_in, max_out) = config.r, stored.extent
    gain_a, gain_b = math.sqrt(6.0 / max_in), math.sqrt(6.0 / rank)
    found: dict[tuple[int, int] | None, int] = {}
    for shape in pairs:
        out, inn = (max_out, max_in) if shape is None else shape
        unit = PortableSource(config.projection_prng_key, shape).build(Extent(rank, inn, out))
        a, b = (unit.a.double() * gain_a).float(), (unit.b.double() * gain_b).float()
        for block in range(len(pairs)):
            rows = slice(block * rank, (block + 1) * rank)
            if torch.equal(stored.pair.a[rows, :inn], a) and torch.equal(stored.pair.b[rows, :out], b):
                found[shape] = block
    return found if len(found) == len(pairs) else {}


def _reseeded(model: PeftModel, installed: Installed, config: VeraConfig, d: Mapping[str, Tensor] | None) -> State:
    """The files of the same adapter with its matrices from a seed; ``d`` where the layers' d changes."""
    before = installed.slots()
    with _beside(model, config, installed) as new:
        slots = new.slots()
        for name in _sites(new):
            for key, parameter in slots[name].own().items():
                changed = d is not None and key == "vera_lambda_d"
                parameter.data.copy_(d[name] if changed and d is not None else before[name].own()[key].detach())
        return writing.state_of(new)
