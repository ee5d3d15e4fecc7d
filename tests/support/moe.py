"""Small mixture-of-experts layers and models, and their mathematics in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

EXPERTS, HIDDEN, INNER, TOP = 4, 16, 24, 2
Array = np.ndarray[Any, np.dtype[np.float64]]


class Net(nn.Module):
    """One layer of experts, alone."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        generator = torch.Generator().manual_seed(3)
        for parameter in experts.parameters():
            parameter.data.normal_(0.0, 0.4, generator=generator)

    def forward(self, *args: Tensor) -> Tensor:
        return self.experts(*args)

    def use(self, implementation: str) -> Net:
        self.experts.config._experts_implementation = implementation
        return self


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _concatenated(h: Array) -> Array:
    gate, up = np.split(h, 2, axis=-1)
    return _silu(gate) * up


def _interleaved(h: Array, limit: float = 7.0, alpha: float = 1.702) -> Array:
    gate, up = np.minimum(h[..., ::2], limit), np.clip(h[..., 1::2], -limit, limit)
    return (up + 1) * gate / (1 + np.exp(-alpha * gate))


def _plain(h: Array) -> Array:
    return np.maximum(h, 0.0) ** 2


@dataclass(frozen=True)
class Layout:
    """A form of transformers' expert layers: how to make one, and its plain mathematics.

    first, second: the names of the parameters. inward: they are (E, in, out). bias: they have biases.
    """

    make: Callable[..., nn.Module]
    activation: Callable[[Array], Array]
    inward: bool = False
    bias: bool = False
    implementations: tuple[str, ...] = ("eager", "batched_mm", "grouped_mm")
    first: str = "gate_up_proj"
    second: str = "down_proj"

    @property
    def names(self) -> tuple[str, str]:
        return self.first, self.second

    def matrices(self, net: nn.Module, name: str) -> Array:
        """The matrices (E, out, in) of one parameter of ``net``, in double precision."""
        raw = net.get_parameter(f"experts.{name}").detach().double().numpy()
        return raw.transpose(0, 2, 1) if self.inward else raw

    def biases(self, net: nn.Module, name: str) -> Array | None:
        return net.get_parameter(f"experts.{name}_bias").detach().double().numpy() if self.bias else None


def dense(
    layout: Layout,
    x: Array,
    index: Array,
    weights: Array,
    first: tuple[Array, Array | None],
    second: tuple[Array, Array | None],
) -> Array:
    """sum_k w_tk E_{i_tk}(x_t), token by token; an index of EXPERTS or more means no expert here."""
    y = np.zeros_like(x)
    for token in range(len(x)):
        for choice in range(index.shape[1]):
            if (expert := int(index[token, choice])) >= EXPERTS:
                continue
            h = first[0][expert] @ x[token] + (0.0 if first[1] is None else first[1][expert])
            h = layout.activation(h)
            h = second[0][expert] @ h + (0.0 if second[1] is None else second[1][expert])
            y[token] += weights[token, choice] * h
    return y


def _mixtral(hidden: int = HIDDEN, inner: int = INNER) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return MixtralExperts(MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=EXPERTS))


def _gpt_oss(hidden: int = HIDDEN, inner: int = INNER) -> nn.Module:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts(GptOssConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=EXPERTS))


def _nemotron(hidden: int = HIDDEN, inner: int = INNER) -> nn.Module:
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    return NemotronHExperts(
        NemotronHConfig(hidden_size=hidden, moe_intermediate_size=inner, n_routed_experts=EXPERTS, moe_latent_size=None)
    )


def _step(hidden: int = HIDDEN, inner: int = INNER) -> nn.Module:
    from types import SimpleNamespace

    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    config = SimpleNamespace(
        num_local_experts=EXPERTS, hidden_size=hidden, moe_intermediate_size=inner, hidden_act="silu"
    )
    layer = Step3p7Experts(config)
    layer.config = config
    return layer


LAYOUTS: dict[str, Layout] = {
    "mixtral": Layout(_mixtral, _concatenated),
    "gpt_oss": Layout(_gpt_oss, _interleaved, inward=True, bias=True),
    "nemotron_h": Layout(_nemotron, _plain, first="up_proj"),
    "step3p7": Layout(_step, _concatenated, implementations=("eager",)),
}
CELLS = [(name, implementation) for name, layout in LAYOUTS.items() for implementation in layout.implementations]


def net(layout: str, implementation: str = "eager", size: int = 0) -> Net:
    """size: another number of features than HIDDEN and INNER, for both."""
    make = LAYOUTS[layout].make
    return Net(make(size, size) if size else make()).use(implementation).eval()


def routed(dtype: torch.dtype = torch.float32, tokens: int = 7, sentinels: bool = False) -> tuple[Tensor, ...]:
    """(x, index, weights) of tokens that never go to expert 2; with ``sentinels`` some choices are of no expert."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    pairs = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3], [3, 1], [1, 0], [0, 1]])[:tokens].clone()
    weights = torch.rand(tokens, TOP, generator=generator, dtype=torch.float64).to(dtype)
    if sentinels:
        pairs[0, 1] = pairs[3, 0] = EXPERTS
        weights = weights.masked_fill(pairs >= EXPERTS, 0.0)
    return x, pairs, weights


# -- whole models ----------------------------------------------------------------------------------


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of 2 blocks, width 16, vocabulary 32, 4 experts of which 2 are used."""
    import transformers as t

    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_experts_per_tok": TOP,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if name == "mixtral":
        model = t.MixtralForCausalLM(t.MixtralConfig(num_local_experts=EXPERTS, **common))
    elif name == "qwen3_moe":
        model = t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=INNER, head_dim=8, **common)
        )
    elif name == "gpt_oss":
        model = t.GptOssForCausalLM(t.GptOssConfig(num_local_experts=EXPERTS, head_dim=8, **common))
    elif name == "llama4":
        model = t.Llama4ForCausalLM(
            t.Llama4TextConfig(
                num_local_experts=EXPERTS,
                intermediate_size_mlp=INNER,
                head_dim=8,
                interleave_moe_layer_step=1,
                **common,
            )
        )
    else:
        raise KeyError(name)
    return model.eval().to(dtype)


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(2, 32, (2, 6), generator=torch.Generator().manual_seed(seed))
