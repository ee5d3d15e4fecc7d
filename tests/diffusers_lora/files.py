"""LoRA files as diffusers, its older versions, and kohya's trainers write them, with random numbers in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.diffusers_lora.oracle import Models, factors, linear_layers

ALPHAS = (4.0, 1.0, 3.0)
Tensors = dict[str, Tensor]
Writer = Callable[[str, str, Tensor, Tensor], Tensors]

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


def peft_like(component: str, layer: str, a: Tensor, b: Tensor) -> Tensors:
    """What diffusers writes of a transformer."""
    return {f"{component}.{layer}.lora_A.weight": a, f"{component}.{layer}.lora_B.weight": b}


def down_up(component: str, layer: str, a: Tensor, b: Tensor) -> Tensors:
    """What diffusers' training scripts write of a UNet and of text encoders."""
    middle = "lora_linear_layer" if component.startswith("text_encoder") else "lora"
    if component == "text_encoder":  # written where CLIPTextModel had one
        layer = _with_text_model(layer)
    start = f"{component}.{layer}.{middle}"
    return {f"{start}.down.weight": a, f"{start}.up.weight": b}


def processors(component: str, layer: str, a: Tensor, b: Tensor) -> Tensors:
    """What diffusers wrote before it had PEFT: attention's layers are named by their processors."""
    if component.startswith("text_encoder"):
        layer = layer.replace("q_proj", "to_q").replace("k_proj", "to_k").replace("v_proj", "to_v")
        layer = layer.replace("out_proj", "to_out")
        layer = _with_text_model(layer)
        end = "_lora" if "self_attn" in layer else ".lora_linear_layer"
    else:
        for block in ("attn1", "attn2"):
            layer = layer.replace(f"{block}.to_out.0", f"{block}.to_out").replace(
                f"{block}.to", f"{block}.processor.to"
            )
        end = "_lora" if ".processor." in layer else ".lora"
    return {f"{component}.{layer}{end}.down.weight": a, f"{component}.{layer}{end}.up.weight": b}


def _with_text_model(layer: str) -> str:
    """A text encoder's layer as it was called where CLIPTextModel had a ``text_model`` inside."""
    return layer if layer.startswith(("text_model.", "text_projection")) else f"text_model.{layer}"


STARTS = {"unet": "lora_unet", "transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def kohya(component: str, layer: str, a: Tensor, b: Tensor, original: str | None = None) -> Tensors:
    """What kohya's trainers write; ``original``: under the name of the model's release."""
    if component.startswith("text_encoder"):
        layer = _with_text_model(layer)
    name = f"{STARTS[component]}_{(original or layer).replace('.', '_')}"
    return {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}


def made(
    models: Models,
    write: Writer,
    layers: Callable[[str], bool] = lambda name: True,
    ranks: Iterable[int] = (3, 2, 4),
) -> Tensors:
    """The tensors of a file for all models: each layer's factors, with ranks that go through ``ranks``."""
    found: Tensors = {}
    count, ranks = 0, list(ranks)
    for component, model in models.items():
        for name, module in linear_layers(model).items():
            if layers(name):
                a, b = factors(module, ranks[count % len(ranks)], count)
                found.update(write(component, name, a, b))
                count += 1
    return found


def with_alphas(
    tensors: Mapping[str, Tensor], alphas: Iterable[float] = ALPHAS, end: str = ".lora_down.weight"
) -> Tensors:
    """The same with an alpha for each layer."""
    alphas = list(alphas)
    firsts = [key for key in tensors if key.endswith(end)]
    extra = {key.removesuffix(end) + ".alpha": torch.tensor(alphas[i % len(alphas)]) for i, key in enumerate(firsts)}
    return {**tensors, **extra}


def put(path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any] | None = None) -> Path:
    """The file; ``said``: the configuration in its header."""
    header = {"format": "pt"} if said is None else {"format": "pt", "lora_adapter_metadata": json.dumps(said)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=header)
    return path
