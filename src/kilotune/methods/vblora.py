"""VB-LoRA (Li et al. 2024, arXiv 2405.15179): LoRA's factors are put together from vectors of one bank.

::

    bank (h, l), of the whole model        A_i (r, in) = in / l pieces a row,  B_i (out, r) = out / l pieces a column
    piece = sum_j softmax(top k of the piece's h logits)_j  bank_j            W_i + B_i A_i

Both are trained: the bank, and h logits for each piece, of which only the k largest count. A file may hold, for each
piece, the k numbers of its vectors and their k - 1 weights (``save_only_topk_weights``): two bytes or fewer and four
in place of 4 h. Which vectors a piece takes is decided then, so such an adapter is not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..config import AdapterConfig, Names, bool_faults, number_fault, option, rate_fault
from ..deltas import Delta, LowRank
from ..errors import CheckpointError, ConfigError, gather
from ..kernels.lowrank import accumulate_dtype
from ..projections.matrices import Projections
from ._base import Export, Kept, LowRankConfig, Method, Rate, Shared, Site

__all__ = ["VbLora", "VbLoraConfig"]

BANK = "vblora_vector_bank"
LOGITS_A, LOGITS_B = "vblora_logits_A", "vblora_logits_B"
NUMBERS, WEIGHTS = "_topk_indices", "_topk_weights"
BELOW = 1.0  # how far under the smallest logit of a piece those are that its file says nothing of
LEAST = 1e-37  # of a weight, so that its logarithm is a number


@final
@dataclass(frozen=True, kw_only=True)
class VbLoraConfig(LowRankConfig):
    """VB-LoRA's options, under PEFT's names."""

    peft_type: ClassVar[str] = "VBLORA"
    bias_modes: ClassVar[Names] = ("none", "all", "vblora_only")

    r: int = option(4, "The rank of the factors that are put together.")
    num_vectors: int = option(256, "h: how many vectors the bank has.")
    vector_length: int = option(256, "l: the length of a vector; it has to divide the sizes of all adapted layers.")
    topk: int = option(2, "k: of how many vectors a piece of a factor is made; at most num_vectors.")
    save_only_topk_weights: bool = option(
        False,
        "Write for each piece which vectors it takes and their weights, in place of all its logits: a much smaller "
        "file, which can be run and merged and not trained on.",
    )
    vblora_dropout: float = option(0.0, "Dropout on the adapter's input, in [0, 1).")
    init_vector_bank_bound: float = option(0.02, "The bank starts uniform in +- this; small values are stable.")
    init_logits_std: float = option(0.1, "The logits start normally distributed with this deviation.")
    exclude_modules: Sequence[str] | str | None = option(None, AdapterConfig.help_of("exclude_modules"))

    @property
    def dropout(self) -> float:
        return self.vblora_dropout

    def faults(self) -> list[str]:
        faults = [
            fault
            for name in ("r", "num_vectors", "vector_length", "topk")
            for fault in number_fault(name, getattr(self, name), low=1, whole=True)
        ]
        if not faults and self.topk > self.num_vectors:
            faults.append(f"topk: expected at most num_vectors, {self.num_vectors}, got {self.topk}")
        faults += rate_fault("vblora_dropout", self.vblora_dropout)
        faults += number_fault("init_vector_bank_bound", self.init_vector_bank_bound, low=0)
        if self.init_vector_bank_bound == 0:
            faults.append("init_vector_bank_bound: expected a number > 0, got 0: of zeros nothing gets a gradient")
        faults += number_fault("init_logits_std", self.init_logits_std, low=0)
        return faults + bool_faults(self, "save_only_topk_weights")


@final
class VbLora(Method[VbLoraConfig]):
    """Parameters of the whole model: vblora_vector_bank (h, l). Per layer: vblora_logits_A (r, in / l, h) and
    vblora_logits_B (out / l, r, h)."""

    name: ClassVar[str] = "vblora"
    config_cls: ClassVar[type[AdapterConfig]] = VbLoraConfig
    makes: type[Delta] = LowRank
    stacks: bool = True
    usual_rate: ClassVar[Rate] = Rate(2e-2)
    example: ClassVar[Mapping[str, Any]] = {"num_vectors": 2, "r": 2, "vector_length": 1}
    keys: Mapping[str, str] = {LOGITS_A: LOGITS_A, LOGITS_B: LOGITS_B}
    default_targets: Mapping[str, Sequence[str]] = {
        "t5": ("q", "k", "v", "o", "wi", "wo"),
        "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    }

    def __init__(self, config: VbLoraConfig, bank: Tensor | None = None) -> None:
        super().__init__(config)
        self.loaded = bank

    @property
    def untrainable(self) -> str | None:
        if self.loaded is None or not self.config.save_only_topk_weights:
            return None
        return "its file has the weights of the picked vectors alone (save_only_topk_weights), and not the logits"

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        length = self.config.vector_length
        wrong = [f"{site.name!r}: ({site.out}, {site.inn})" for site in sites if site.out % length or site.inn % length]
        if wrong:
            raise ConfigError(
                gather(f"vector_length={length} does not divide the sizes (out, in) of these layers:", wrong)
            )
        return Shared()

    def init_model(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        config, device = self.config, sites[0].device()
        if self.loaded is not None:
            return {BANK: self.loaded.to(device, accumulate_dtype(self.loaded.dtype), copy=True)}
        bank = torch.empty(config.num_vectors, config.vector_length, dtype=torch.float32, device=_drawn_on(device))
        nn.init.uniform_(bank, -config.init_vector_bank_bound, config.init_vector_bank_bound)
        return {BANK: bank.to(device)}

    def count(self, sites: Sequence[Site]) -> int:
        config = self.config
        pieces = sum(config.r * (site.out + site.inn) // config.vector_length for site in sites)
        return config.num_vectors * (pieces + config.vector_length)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        config, device = self.config, site.device()
        shapes = {
            LOGITS_A: (config.r, site.inn // config.vector_length, config.num_vectors),
            LOGITS_B: (site.out // config.vector_length, config.r, config.num_vectors),
        }
        made = {}
        for name, shape in shapes.items():
            logits = torch.empty(shape, dtype=torch.float32, device=_drawn_on(device))
            made[name] = nn.init.normal_(logits, 0.0, config.init_logits_std).to(device)
        return made

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        device, dtype = site.device(), site.dtype()
        bank = shared.trained[BANK].to(device)  # (..., h, l)
        a = self._pieces(params[LOGITS_A], bank).flatten(-2)  # (..., r, in / l, l)
        b = self._pieces(params[LOGITS_B], bank).transpose(-1, -2).flatten(-3, -2)  # (..., out / l, r, l)
        return LowRank(a=a.to(dtype), b=b.to(dtype))  # (..., r, in), (..., out, r)

    def _pieces(self, logits: Tensor, bank: Tensor) -> Tensor:
        """The pieces (..., l) of a factor, of logits (..., h); where many adapters stand in front, each of its bank."""
        top, numbers = logits.topk(self.config.topk, dim=-1)
        if bank.ndim == 3:
            first = torch.arange(bank.shape[0], device=bank.device) * bank.shape[1]
            numbers = numbers + first.view(-1, 1, 1, 1)
        picked = bank.flatten(0, -2).index_select(0, numbers.flatten()).view(*numbers.shape, -1)  # (..., k, l)
        return (top.softmax(-1).to(bank.dtype).unsqueeze(-1) * picked).sum(-2)

    # -- files -----------------------------------------------------------------------------------

    def kept(self, key: str) -> Kept | None:
        own = {BANK, *(logits + end for logits in (LOGITS_A, LOGITS_B) for end in ("", NUMBERS, WEIGHTS))}
        return Kept.TRAINED if key in own else None

    @classmethod
    def from_layers(cls, config: VbLoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits of the weights: their logarithms, and one below these for each vector that a piece leaves out."""
        found, faults = dict(tensors), []
        for key in [key for key in tensors if key.endswith(NUMBERS)] if config.save_only_topk_weights else ():
            name = key.removesuffix(NUMBERS)
            numbers, weights = found.pop(key), found.pop(name + WEIGHTS, None)
            fault = _fault(config, numbers, weights)
            if weights is None or fault is not None:
                faults.append(f"{key}: {fault}")
                continue
            weights = weights.to(accumulate_dtype(weights.dtype))
            logits = torch.cat([weights, 1.0 - weights.sum(-1, keepdim=True)], -1).clamp(min=LEAST).log()  # (..., k)
            whole = (logits.amin(-1, keepdim=True) - BELOW).expand(*logits.shape[:-1], config.num_vectors)
            found[name] = whole.scatter(-1, numbers.long(), logits)
        if faults:
            raise CheckpointError(gather("vblora: weights of picked vectors that are none:", faults))
        return found

    @classmethod
    def from_file(cls, config: VbLoraConfig, extra: Mapping[str, Tensor], checksum: str | None) -> VbLora:
        wanted, bank = (config.num_vectors, config.vector_length), extra.get(BANK)
        if bank is None or len(extra) != 1:
            raise CheckpointError(
                f"vblora: expected one tensor that belongs to no layer, {BANK!r}, got {sorted(extra) or 'none'}"
            )
        if tuple(bank.shape) != wanted:
            raise CheckpointError(
                f"vblora: expected {BANK} {wanted}, as num_vectors and vector_length say, got {tuple(bank.shape)}"
            )
        return cls(config, bank)

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        made = replace(super().export(sites, params, shared), peft=True)
        if not self.config.save_only_topk_weights:
            return made
        h = self.config.num_vectors  # PEFT's types of the numbers
        kind = torch.uint8 if h < 2**8 else torch.int16 if h < 2**15 else torch.int32
        tensors: dict[str, Tensor] = {}
        for key, value in made.tensors.items():
            if key == BANK:
                tensors[key] = value
                continue
            top, numbers = value.detach().topk(self.config.topk, dim=-1)
            tensors[key + NUMBERS] = numbers.to(kind)
            tensors[key + WEIGHTS] = top.softmax(-1)[..., :-1]
        return replace(made, tensors=tensors)


def _drawn_on(device: torch.device) -> str:
    """Where random numbers are drawn, so that a seed gives the same on each device."""
    return "meta" if device.type == "meta" else "cpu"


def _fault(config: VbLoraConfig, numbers: Tensor, weights: Tensor | None) -> str | None:
    """What is wrong with the numbers (..., k) of picked vectors and their weights (..., k - 1)."""
    k, h = config.topk, config.num_vectors
    if weights is None:
        return "there are no weights for it"
    if numbers.ndim < 2 or numbers.shape[-1] != k or tuple(weights.shape) != (*numbers.shape[:-1], k - 1):
        return f"expected shapes (..., {k}) and (..., {k - 1}), got {tuple(numbers.shape)} and {tuple(weights.shape)}"
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        return f"expected integers, got {numbers.dtype}"
    if not weights.is_floating_point():
        return f"expected floating-point weights, got {weights.dtype}"
    if numbers.numel() and not (int(numbers.min()) >= 0 and int(numbers.max()) < h):
        return f"expected numbers in 0 ... {h - 1}, got {int(numbers.min())} ... {int(numbers.max())}"
    sums = weights.double().sum(-1)
    if not bool(((weights >= 0).all(-1) & (sums <= 1 + 1e-3)).all()):  # not a number is neither
        return "expected weights of 0 or more whose sum is at most 1"
    return None
