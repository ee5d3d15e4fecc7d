"""Bottleneck adapters: y + s (up act(down x + b1) + b2), a small network beside a frozen part of a block.

==============  =============================================================================  ======
placement       where it stands, and what it reads                                             scale
==============  =============================================================================  ======
``houlsby``     after the attention's and after the feed-forward's projection back to the      1
                model's size, before the residual is added; reads that output
                (Houlsby et al. 2019, arXiv 1902.00751, section 2.1)
``pfeiffer``    after the feed-forward's only (Pfeiffer et al. 2021, arXiv 2005.00247, as in   1
                table 1 of He et al. 2022)
``parallel``    beside the feed-forward; reads its input, adds to its output                   4
                (He et al. 2022, arXiv 2110.04366, section 4.6)
==============  =============================================================================  ======

Start: the second factor and both biases are zero, so the model is exactly the base; the first factor is normal with
deviation 0.01, cut at two deviations, as in Houlsby et al. 2019. ``init="near-identity"`` draws the second factor in
the same way, as that paper does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AdapterConfig, number_fault, option, rate_fault
from ..deltas import Delta, Residual
from ..errors import ConfigError, did_you_mean
from ._base import Method, Rate, Shared, Site

__all__ = ["Bottleneck", "BottleneckConfig"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "mish": F.mish,
}
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
INITS = ("identity", "near-identity")
DEVIATION = 1e-2

# transformers' model_type -> (the attention's last projections, the feed-forward's last projection, the feed-forward),
# by names in a block. No feed-forward: its layers stand in the block itself, so nothing has its input and its output.
_LLAMA = (("self_attn.o_proj",), "mlp.down_proj", "mlp")
_T5 = (("o",), "wo", "DenseReluDense")
_BERT = (("attention.output.dense",), r".*\.layer\.\d+\.output\.dense", None)
_BLOCKS: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "granite",
            "olmo2",
            "phi3",
            "stablelm",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta-v2"), _BERT),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("bloom", "falcon"), (("self_attention.dense",), "mlp.dense_4h_to_h", "mlp")),
    "bart": (("self_attn.out_proj", "encoder_attn.out_proj"), "fc2", None),
    "distilbert": (("attention.out_lin",), "ffn.lin2", "ffn"),
    "gpt2": (("attn.c_proj",), "mlp.c_proj", "mlp"),
    "gpt_neo": (("attention.out_proj",), "mlp.c_proj", "mlp"),
    "gpt_neox": (("attention.dense",), "mlp.dense_4h_to_h", "mlp"),
    "gptj": (("attn.out_proj",), "mlp.fc_out", "mlp"),
    "mpt": (("attn.out_proj",), "ffn.down_proj", "ffn"),
    "opt": (("self_attn.out_proj",), "fc2", None),
    "phi": (("self_attn.dense",), "mlp.fc2", "mlp"),
    "vit": (("attention.o_proj",), "mlp.fc2", "mlp"),
}


@final
@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """Options of bottleneck adapters; PEFT has no such method, so the files are kilotune's own."""

    peft_type: ClassVar[str] = "BOTTLENECK"
    usual_targets: ClassVar[str | None] = None  # the method's own places

    target_modules: Sequence[str] | str | None = option(
        None,
        "Which modules to put an adapter on: linear layers, or blocks of layers (a feed-forward, an attention); a list "
        "of names, one regular expression, 'all-linear', or None for the places of a known architecture.",
    )
    width: int = option(64, "The size of the bottleneck.")
    activation: str = option("relu", f"torch's function in the bottleneck: {', '.join(ACTIVATIONS)}.")
    placement: str = option(
        "houlsby",
        "'houlsby': after the attention and after the feed-forward; 'pfeiffer': after the feed-forward; 'parallel': "
        "beside the feed-forward, reading its input. With target_modules given, only what the adapter reads: a "
        "module's output, or its input for 'parallel'.",
    )
    scale: float | None = option(None, "What the adapter's output is multiplied by; None: 4 for 'parallel', else 1.")
    init: str = option(
        "identity",
        "'identity': the start is exactly the base model; 'near-identity': both factors are small at the start.",
    )
    bottleneck_dropout: float = option(0.0, "Dropout on what the adapter reads, in [0, 1).")

    @property
    def dropout(self) -> float:
        return self.bottleneck_dropout

    @property
    def reads_input(self) -> bool:
        """Whether the adapter reads the module's input, not its output."""
        return self.placement == "parallel"

    @property
    def factor(self) -> float:
        """The scale, filled in."""
        if self.scale is not None:
            return self.scale
        return 4.0 if self.reads_input else 1.0

    def faults(self) -> list[str]:
        faults = number_fault("width", self.width, low=1, whole=True)
        faults += [] if self.scale is None else number_fault("scale", self.scale, low=float("-inf"))
        faults += rate_fault("bottleneck_dropout", self.bottleneck_dropout)
        for name, valid in (("activation", ACTIVATIONS), ("placement", PLACEMENTS), ("init", INITS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in valid:
                faults.append(f"{name}: expected one of {list(valid)}, got {value!r}.{did_you_mean(str(value), valid)}")
        return faults


@final
class Bottleneck(Method[BottleneckConfig]):
    """Parameters per module: down (width, n), down_bias (width,), up (out, width), up_bias (out,).

    n: the features of what it reads, the module's output (n = out) or input. With n = out = d and width m these are
    2 m d + d + m numbers.
    """

    name: ClassVar[str] = "bottleneck"
    config_cls: ClassVar[type[AdapterConfig]] = BottleneckConfig
    makes: type[Delta] = Residual
    usual_rate: ClassVar[Rate] = Rate(3e-3)
    example: ClassVar[Mapping[str, Any]] = {"width": 2}
    keys: Mapping[str, str] = {
        "down": "bottleneck_down.weight",
        "down_bias": "bottleneck_down.bias",
        "up": "bottleneck_up.weight",
        "up_bias": "bottleneck_up.bias",
    }

    def completed(self, config: BottleneckConfig, model_type: str | None) -> BottleneckConfig:
        """The places of a known architecture, where no targets are given.

        Raises:
            ConfigError: the architecture is not known, or has no module of its own for the feed-forward.

        """
        if config.target_modules is not None or config.target_parameters:
            return config
        if model_type not in _BLOCKS:
            what = "the model has no config.model_type" if model_type is None else f"there are none for {model_type!r}"
            hint = did_you_mean(model_type, _BLOCKS) if model_type else ""
            raise ConfigError(
                f"target_modules=None asks for an architecture's places, but {what}.{hint} "
                "Give names of layers or blocks."
            )
        attention, projection, feedforward = _BLOCKS[model_type]
        if config.placement == "parallel":
            if feedforward is None:
                raise ConfigError(
                    f"placement='parallel': in a {model_type!r} no module is the feed-forward alone, with its input "
                    "and without the residual, so there is nothing to stand beside; take 'houlsby' or 'pfeiffer'"
                )
            return config.replace(target_modules=(feedforward,))
        if config.placement == "pfeiffer":
            alone = projection if projection.startswith(".*") else (projection,)
            return config.replace(target_modules=alone)
        if projection.startswith(".*"):  # BERT: the one name is the end of the other
            return config.replace(target_modules=("output.dense",))
        return config.replace(target_modules=(*attention, projection))

    def count(self, sites: Sequence[Site]) -> int:
        width = self.config.width
        reads = [site.input if self.config.reads_input else site.output for site in sites]
        return sum(width * n + width + (width + 1) * site.output for n, site in zip(reads, sites, strict=True))

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        width, device = self.config.width, site.device()
        reads = site.input if self.config.reads_input else site.output
        if reads == 0:
            raise ConfigError(
                f"placement='parallel': {site.name!r} has no input features for each place of its output (ids, or the "
                "window of a convolution), so there is nothing to read; take 'pfeiffer'"
            )
        down = torch.empty(width, reads, device=device, dtype=torch.float32)
        up = torch.zeros(site.output, width, device=device, dtype=torch.float32)
        for factor in (down, up) if self.config.init == "near-identity" else (down,):
            nn.init.trunc_normal_(factor, std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION)
        return {
            "down": down,
            "down_bias": torch.zeros(width, device=device, dtype=torch.float32),
            "up": up,
            "up_bias": torch.zeros(site.output, device=device, dtype=torch.float32),
        }

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Residual:
        return Residual(
            params["down"],
            params["up"],
            ACTIVATIONS[self.config.activation],
            "input" if self.config.reads_input else "output",
            params["down_bias"],
            params["up_bias"],
            self.config.factor,
        )
