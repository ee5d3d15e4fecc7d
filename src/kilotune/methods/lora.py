"""LoRA (Hu et al. 2021, arXiv 2106.09685): W + (alpha / r) B A, both factors trained.

With ``use_rslora`` the scale is alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).

PiSSA (Meng et al. 2024, arXiv 2404.02948) and OLoRA (Büyükakyüz 2024, arXiv 2406.01775) start with a part of the weight
itself, A0 and B0, and the papers take that part away from the weight. Here the weight stays as it is and the change is
(alpha / r) (B A - B0 A0), which is the same matrix, so that other adapters, disable_adapter() and unload() have the
base's own bits. A0 and B0 are held once for all the adapters of a model (_svd.py), and an adapter has A and B alone; a
forward costs that of twice the rank. Files do not hold them: they are made again from the base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..config import CLOSED, AdapterConfig, Names, bool_faults, number_fault, option, rate_fault, regex_faults
from ..deltas import Delta, LowRank, Role
from ..errors import ConfigError, gather
from ..kernels.starts import orthogonal
from ..name_rules import first_at_end
from ..projections.matrices import Projections, Source
from . import _svd
from ._base import Export, LowRankConfig, Method, Rate, Shared, Site

__all__ = ["Lora", "LoraConfig"]

INITS = (True, False, "gaussian", "orthogonal", "pissa", "olora", "eva")
NAMED = "'gaussian', 'orthogonal', 'pissa', 'pissa_niter_<number>', 'olora' or 'eva'"
ITERATED = re.compile(r"pissa_niter_([1-9]\d{0,3})")
SVD_SEED = 0  # one for all, so that adapters share the start


@final
@dataclass(frozen=True, kw_only=True)
class LoraConfig(LowRankConfig):
    """LoRA's options, under PEFT's names."""

    peft_type: ClassVar[str] = "LORA"
    bias_modes: ClassVar[Names] = ("none", "all", "lora_only")

    r: int = option(8, "The rank.")
    lora_alpha: float = option(8, "The scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.")
    lora_dropout: float = option(0.0, "Dropout on the adapter's input, in [0, 1); none at an embedding, as in PEFT.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(r).")
    init_lora_weights: bool | str = option(
        True,
        "True: A Kaiming uniform with a = sqrt(5), B zero. 'gaussian': A normal with deviation 1 / r, B zero. "
        "False: both Kaiming uniform, so the adapter changes the output from the start. 'orthogonal': neither is zero, "
        "their product is; r must be even. 'pissa', 'olora': the largest singular values of the layer's weight, or the "
        "first columns of its QR; the change is that from this start, so the base stays as it is, for the time of "
        "twice the rank, and memory for one start, which all adapters share. 'pissa_niter_<number>': the SVD by so "
        "many power iterations, faster for large layers. "
        "'eva': as True, until kilotune.peft.initialize_lora_eva_weights makes A of the layers' inputs. "
        "At an embedding all but False are as True, as in PEFT.",
    )
    use_dora: bool = option(False, LowRankConfig.help_of("use_dora"))
    lora_fa: bool = option(
        False,
        "LoRA-FA: A stays as it started, at random, and only B is trained: r * out numbers a layer, and a backward "
        "that keeps r numbers of each input in place of all.",
        ours=True,
    )
    rank_pattern: dict[str, int] = option({}, "Other ranks: layer name or regular expression for its end -> r.")
    alpha_pattern: dict[str, float] = option({}, "Other alphas: layer name or regular expression -> lora_alpha.")
    exclude_modules: Sequence[str] | str | None = option(None, AdapterConfig.help_of("exclude_modules"))
    target_parameters: Sequence[str] | None = option(None, AdapterConfig.help_of("target_parameters"))

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @classmethod
    def from_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> LoraConfig:
        """PEFT's starts that leave the base's weights alone do not matter any more: the file has what came of them."""
        if values.get("init_lora_weights") == "eva":
            values = {**{k: v for k, v in values.items() if k != "eva_config"}, "init_lora_weights": True}
        start, closed = (
            str(values.get("init_lora_weights")).lower(),
            str(values.get("peft_type")).upper().startswith(CLOSED),
        )
        if start == "loftq":
            raise ConfigError(
                "init_lora_weights='loftq': PEFT puts quantised weights in the place of the base's each time that it "
                "loads this; save the adapter with init_lora_weights=True, beside the base that it had quantised"
            )
        if not closed and start.startswith("pissa_niter_"):
            raise ConfigError(
                f"init_lora_weights={start!r}: PEFT took a part of the base's weights away that it drew at random, and "
                "that is not in the file; save the adapter with PEFT's path_initial_model_for_weight_conversion, which "
                "makes a LoRA of it that needs none"
            )
        if not closed and start == "olora" and values.get("fan_in_fan_out") is True:
            raise ConfigError(
                "init_lora_weights='olora' with fan_in_fan_out=True: PEFT takes the QR of the transposed weight there, "
                "whose factors are no part of it, so this adapter runs in PEFT only"
            )
        return cls.from_dict({**values, **section})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """As for every method; PEFT takes the names of starts in any case."""
        start = values.get("init_lora_weights")
        return super().from_dict({**values, "init_lora_weights": start.lower()} if isinstance(start, str) else values)

    @property
    def part_of_base(self) -> str | None:
        start = self.init_lora_weights
        counted = isinstance(start, str) and (start in ("pissa", "olora") or ITERATED.fullmatch(start) is not None)
        return str(start) if counted else None

    @property
    def from_base(self) -> bool:
        """Whether it starts with a part of the layer's weight, from which its change is counted."""
        return self.part_of_base is not None

    def faults(self) -> list[str]:
        faults = number_fault("r", self.r, low=1, whole=True)
        faults += number_fault("lora_alpha", self.lora_alpha, low=0)
        faults += rate_fault("lora_dropout", self.lora_dropout)
        faults += bool_faults(self, "use_rslora", "lora_fa")
        # By type too: 0 == False, but a 0 here is a mistake.
        known = any(type(self.init_lora_weights) is type(v) and self.init_lora_weights == v for v in INITS)
        if not known and not self.from_base:
            faults.append(f"init_lora_weights: expected True, False, {NAMED}, got {self.init_lora_weights!r}")
        faults += self._pattern_faults()
        return faults or self._start_faults()

    def _start_faults(self) -> list[str]:
        """What the start asks of the other options, which are right by themselves."""
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}}
        odd = [f"{name} = {rank}" for name, rank in ranks.items() if rank % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            return [f"init_lora_weights='orthogonal': needs even ranks, got {', '.join(odd)}"]
        alphas = {"lora_alpha": self.lora_alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        none = [name for name, alpha in alphas.items() if alpha == 0]
        if self.from_base and none:
            return [f"init_lora_weights={self.init_lora_weights!r}: needs a scale above 0, got {', '.join(none)} = 0"]
        return []

    def _pattern_faults(self) -> list[str]:
        faults = []
        for name, patterns, whole in (
            ("rank_pattern", self.rank_pattern, True),
            ("alpha_pattern", self.alpha_pattern, False),
        ):
            if not isinstance(patterns, dict):
                faults.append(f"{name}: expected a dictionary, got {patterns!r}")
                continue
            for pattern, value in patterns.items():
                faults += number_fault(f"{name}[{pattern!r}]", value, low=1 if whole else 0, whole=whole)
                faults += regex_faults(name, pattern)
        return faults


@final
class _StartShared(Shared):
    """The holder of the starts from the base, and by site which it is."""

    def __init__(self, projections: Projections, sources: Mapping[str, Source]) -> None:
        super().__init__(common=tuple(sources.values()))
        self.projections, self.sources = projections, dict(sources)


@final
class Lora(Method[LoraConfig]):
    """Parameters per layer: lora_A (r, in) and lora_B (out, r)."""

    name: ClassVar[str] = "lora"
    config_cls: ClassVar[type[AdapterConfig]] = LoraConfig
    makes: type[Delta] = LowRank
    stacks: bool = True
    usual_rate: ClassVar[Rate] = Rate(7e-3)
    example: ClassVar[Mapping[str, Any]] = {"r": 2}
    keys: Mapping[str, str] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    roles: Mapping[str, Role] = {"lora_A": Role.FIRST, "lora_B": Role.SECOND}
    default_targets: Mapping[str, Sequence[str]] = {"phi": ("q_proj", "v_proj", "fc1", "fc2")}

    def __init__(self, config: LoraConfig) -> None:
        super().__init__(config)
        self._ranks: dict[str, int] = {}  # by name, where there are patterns
        self._alphas: dict[str, float] = {}

    @property
    def frozen(self) -> frozenset[str]:
        """With lora_fa the first factor (Zhang et al. 2023, arXiv 2308.03303)."""
        return frozenset({"lora_A"} if self.config.lora_fa else ())

    @property
    def needs_out_in(self) -> bool:
        """PEFT takes OLoRA's QR of the weight as it is stored."""
        return self.config.init_lora_weights == "olora"

    def rank(self, site: Site) -> int:
        """The layer's rank: the first of rank_pattern that fits its name, else r."""
        return int(self._found(self._ranks, "rank_pattern", site.pattern_name, self.config.r))

    def scale(self, site: Site) -> float:
        """Alpha / r, or alpha / sqrt(r) with use_rslora."""
        rank = self.rank(site)
        config = self.config
        alpha = float(self._found(self._alphas, "alpha_pattern", site.pattern_name, config.lora_alpha))
        return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank

    def _found(self, known: dict[str, Any], field: str, name: str, default: Any) -> Any:
        """PEFT's rule: the first pattern that is the whole name, or its end after a dot. Looked for once: this is asked
        for in every forward."""
        patterns: Mapping[str, Any] = getattr(self.config, field)
        if not patterns:
            return default
        if name not in known:
            known[name] = first_at_end(field, patterns, name, default)
        return known[name]

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        kind, own = self.config.init_lora_weights, [site for site in sites if self._from_base(site)]
        over = [site for site in own if self.rank(site) > min(site.out, site.inn)]
        if over:
            faults = [f"{site.name!r}: r = {self.rank(site)} of ({site.out}, {site.inn})" for site in over]
            raise ConfigError(gather(f"init_lora_weights={kind!r}: the weight has no such rank:", faults))
        if not own:
            return Shared()
        otherwise = f"init_lora_weights={kind!r} takes a part of it: leave the layer out, or take another start"
        sources = _svd.claim(own, self._source, projections, None, otherwise)
        projections.require(adapter, _svd.extents(own, sources, self.rank))
        shared = _StartShared(projections, sources)
        for site in own:  # now: a compiled forward cannot make them
            self._start(site, shared)
        return shared

    def _source(self, site: Site) -> _svd.WeightSource:
        kind = str(self.config.init_lora_weights)
        if kind == "olora":
            return _svd.WeightSource(self.rank(site), 0, 0, _svd.Split.TRIANGULAR)
        found = ITERATED.fullmatch(kind)
        return _svd.WeightSource(self.rank(site), int(found.group(1)) if found else 0, SVD_SEED, _svd.Split.EVEN)

    def _from_base(self, site: Site) -> bool:
        return self.config.from_base and site.fan_in == site.inn  # in an embedding PEFT leaves these starts out

    def count(self, sites: Sequence[Site]) -> int:
        first = 0 if self.config.lora_fa else 1
        return sum(self.rank(site) * (first * site.inn + site.out) for site in sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        rank, device, kind = self.rank(site), site.device(), self.config.init_lora_weights
        a = torch.empty(rank, site.inn, device=device, dtype=torch.float32)
        b = torch.zeros(site.out, rank, device=device, dtype=torch.float32)
        if site.fan_in < site.inn:  # an embedding: PEFT starts with A at zero and B normal, or with both normal
            if self.config.lora_fa:  # a frozen A of zeros would do nothing for ever, so B starts at zero
                return {"lora_A": nn.init.normal_(a), "lora_B": nn.init.normal_(b) if kind is False else b}
            return {"lora_A": nn.init.normal_(a) if kind is False else a.zero_(), "lora_B": nn.init.normal_(b)}
        if self._from_base(site):
            assert isinstance(shared, _StartShared)
            first, second = self._start(site, shared)
            return {"lora_A": first, "lora_B": second.contiguous()}
        if kind == "orthogonal":
            a, b = orthogonal(rank, site.out, site.inn, device)
        elif kind == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if kind is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        return {"lora_A": a, "lora_B": b}

    def _start(self, site: Site, shared: _StartShared) -> tuple[Tensor, Tensor]:
        """The part of the weight that the adapter starts as, A0 (r, in) and B0 (out, r), in float32.

        A multiplication, not a division: it is rounded alike on every device, and the trained A and B start as this.
        """
        pair = shared.projections.pair(shared.sources[site.name], site.device(), torch.float32)
        root = 1.0 if self.config.init_lora_weights == "olora" else 1.0 / math.sqrt(self.scale(site))
        return pair.a * root, (pair.b * root).T

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        """PEFT reads the file as plain LoRA: that A was frozen changes nothing that a trained adapter does.

        It makes a start from the base again, as we do; but not the random one of power iterations.
        """
        iterated = ITERATED.fullmatch(str(self.config.init_lora_weights)) is not None
        made = replace(super().export(sites, params, shared), peft=not iterated)
        if self.config.init_lora_weights == "eva":  # what came of it is in the file; PEFT would miss its eva_config
            made = replace(made, config={"init_lora_weights": True})
        return replace(made, header={"lora_fa": True}) if self.config.lora_fa else made

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        dtype = site.dtype()  # a 16-bit base never runs float32 products
        a, b = params["lora_A"], params["lora_B"]
        if self._from_base(site):
            # B A - B0 A0 from the differences, before they are rounded: zero at the start, and small steps stay.
            assert isinstance(shared, _StartShared)
            first, second = _as_held(*self._start(site, shared), a, b)
            a, b = torch.cat([a, a - first], dim=-2), torch.cat([b - second, second.expand_as(b)], dim=-1)
        return LowRank(a=a.to(dtype), b=b.to(dtype), scale=self.scale(site))


def _as_held(first: Tensor, second: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A start A0 (r, in), B0 (out, r) as ``a`` (..., r, in) and ``b`` (..., out, r) had it before their training.

    In their dtype: in a model that was turned to 16 bits they started rounded. With the signs of theirs: those of a
    file from elsewhere may be others, as LAPACK gave them, which B0 A0 does not tell, and the differences would be
    large.
    """
    first, second = first.to(a.dtype), second.to(b.dtype)
    along = (a.detach() * first).sum(-1, keepdim=True)  # (..., r, 1)
    sign = torch.where(along < 0, -1.0, 1.0).to(a.dtype)
    return first * sign, second * sign.mT.to(b.dtype)
