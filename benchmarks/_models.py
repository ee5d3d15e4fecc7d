"""The models that the benchmarks run: transformers' own, small, with random weights, built without a network.

All variants of one model read the same base weights in memory, so that caches serve each of them alike; only their
adapters differ. PEFT is what kilotune is compared with.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import kilotune

VOCABULARY = 2000
HEAD = 64  # features of one attention head
BERT_TARGETS = ["query", "key", "value", "dense"]
WAYS = ("factored", "merged", "dense")


@final
@dataclass(frozen=True)
class Shape:
    """A model's size: kind llama or bert; hidden a multiple of 64."""

    kind: str
    hidden: int
    layers: int
    vocabulary: int = VOCABULARY

    @property
    def intermediate(self) -> int:
        """8/3 hidden for Llama, rounded up to a multiple of 256 where it is large; 4 hidden for BERT."""
        if self.kind == "bert":
            return 4 * self.hidden
        step = 256 if self.hidden >= 256 else HEAD
        return -(-8 * self.hidden // (3 * step)) * step

    @property
    def targets(self) -> str | list[str]:
        """What is adapted: every linear layer but the one that makes the prediction."""
        return "all-linear" if self.kind == "llama" else BERT_TARGETS


@final
@dataclass(frozen=True)
class Variant:
    """One thing to be measured. library: none, peft or kilotune. method: floor, full, lora or vera."""

    library: str
    method: str
    rank: int = 0
    way: str = "picked"

    @property
    def name(self) -> str:
        """For tables: ``kilotune VeRA 256 merged``; ``floor``."""
        if self.library == "none":
            return self.method
        way = f" {self.way}" if self.way != "picked" else ""
        return f"{self.library} {'VeRA' if self.method == 'vera' else 'LoRA'} {self.rank}{way}"


def build(shape: Shape, length: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen transformers model of ``shape`` for sequences of ``length``, in train mode, the same at every call."""
    import transformers

    common = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // HEAD,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": max(length, 512),
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    torch.manual_seed(0)
    if shape.kind == "llama":
        config = transformers.LlamaConfig(**common, num_key_value_heads=shape.hidden // HEAD, head_dim=HEAD)
        model = transformers.LlamaForCausalLM(config)
    else:
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**common, **dropout))
    return model.to(device=device, dtype=dtype).train().requires_grad_(False)


def twin(model: Any) -> Any:
    """A model of its own whose parameters read the memory of ``model``'s."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def linear_layers(model: nn.Module, shape: Shape) -> dict[str, nn.Linear]:
    """What every variant trains or adapts, by name: all linear layers but the prediction's."""
    last = "lm_head" if shape.kind == "llama" else "classifier"
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != last}


def dress(base: Any, variant: Variant, shape: Shape, share: bool = True) -> Any:
    """A model of ``variant`` on ``base``'s weights (a copy of them with ``share=False``), its vectors not zero."""
    model = twin(base) if share else copy.deepcopy(base)
    if variant.method == "floor":
        model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.requires_grad_())
        return model
    if variant.method == "full":
        for layer in linear_layers(model, shape).values():
            layer.weight.requires_grad_(True)
        return model
    torch.manual_seed(1)  # LoRA's A: two models of one variant are the same
    model = _adapted(model, variant, shape)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model):
        if not parameter.any():  # VeRA's b and LoRA's B start at zero
            start = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(start)
    return model.train()


def _adapted(model: Any, variant: Variant, shape: Shape) -> Any:
    targets, rank = shape.targets, variant.rank
    if variant.library == "peft":
        import peft

        if variant.method == "vera":
            return peft.get_peft_model(model, peft.VeraConfig(r=rank, target_modules=targets))
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    if variant.method == "vera":
        made = kilotune.get_peft_model(model, kilotune.VeraConfig(r=rank, target_modules=targets))
    else:
        made = kilotune.get_peft_model(model, kilotune.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    if variant.way != "picked":
        made.set_way(variant.way)
    return made


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a step gives gradients to."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen_tensors(model: nn.Module) -> list[Tensor]:
    """All that a model holds whether it runs or not: parameters, buffers, and kilotune's projections."""
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    if isinstance(model, kilotune.PeftModel):
        held += model.projections.tensors()
    return held


def adapted_names(model: Any, variant: Variant) -> set[str]:
    """The dotted names, in the base model, of what is adapted."""
    if variant.library == "peft":
        return set(model.base_model.targeted_module_names)
    return set(model.adapted_layers())


def sample(shape: Shape, tokens: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """``tokens`` random tokens in sequences of ``length`` (one shorter sequence where there are fewer), and labels."""
    length = min(length, tokens)
    if tokens % length:
        raise SystemExit(f"error: {tokens} tokens are no whole number of sequences of {length}")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(shape.vocabulary, (tokens // length, length), generator=generator).to(device)
    labels = ids if shape.kind == "llama" else ids[:, 0] % 2
    return {"input_ids": ids, "labels": labels}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's loss on ``batch``, with its graph."""
    loss: Tensor = model(**batch).loss
    return loss


def step_of(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One training step: forward, loss, backward, gradients set to None; no optimizer."""
    own = trained(model)

    def step() -> None:
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        for parameter in own:
            parameter.grad = None

    return step


def logits_of(base: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the frozen model says of ``batch``, to be compared with."""
    with torch.no_grad():
        logits: Tensor = base(**batch).logits
    return logits


def check(model: Any, variant: Variant, layers: dict[str, nn.Linear], batch: dict[str, Tensor], plain: Tensor) -> int:
    """Run one step, and see that ``model`` is what it is called; returns how many numbers it trains.

    Args:
        model: made by :func:`dress`.
        variant: what it is to be.
        layers: the base model's :func:`linear_layers`.
        batch: its input.
        plain: the base model's :func:`logits_of` it.

    The targets are those of all other variants, the count is that of the formula, the adapters change the output,
    and all that is trained gets a gradient that is finite and not zero.
    """
    own = trained(model)
    count = sum(parameter.numel() for parameter in own)
    formula = {
        "floor": 0,
        "full": sum(layer.weight.numel() for layer in layers.values()),
        "vera": sum(variant.rank + layer.out_features for layer in layers.values()),
        "lora": sum(variant.rank * (layer.in_features + layer.out_features) for layer in layers.values()),
    }
    if count != formula[variant.method]:
        raise AssertionError(f"{variant.name}: trains {count} numbers, expected {formula[variant.method]}")
    output = model(**batch)
    if variant.library != "none":
        wrong = sorted(adapted_names(model, variant) ^ set(layers))
        if wrong:
            raise AssertionError(f"{variant.name}: adapted or left out against the rule: {wrong}")
        if torch.equal(output.logits, plain):
            raise AssertionError(f"{variant.name}: the output is the base model's")
    output.loss.backward()
    for parameter in own:
        gradient = parameter.grad
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            raise AssertionError(f"{variant.name}: a trained parameter {tuple(parameter.shape)} got no usable gradient")
        parameter.grad = None
    return count
