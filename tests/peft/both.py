"""One script, run with PEFT and with kilotune.peft: a tiny Llama, adapters with the same numbers in both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kilotune.peft as ours
from tests.peft_parity.oracle import quiet
from tests.support.models import tiny_llama

IDS = torch.arange(12).reshape(2, 6) % 32  # (rows, tokens)
METHODS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "VeraConfig": {"r": 8, "target_modules": ["q_proj", "o_proj"]},
    "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "UniLoraConfig": {"r": 2, "target_modules": ["q_proj", "v_proj"], "theta_d_length": 32},
    "VBLoRAConfig": {"r": 2, "target_modules": ["q_proj", "v_proj"], "num_vectors": 9, "vector_length": 2},
}


def made(library: Any, name: str, adapter: str = "default", **options: Any) -> Any:
    """A tiny Llama with an adapter whose trained numbers are the same in both libraries."""
    config = getattr(library, name)(**{**METHODS[name], "task_type": "CAUSAL_LM", **options})
    model = library.get_peft_model(tiny_llama(), config, adapter)
    filled(library, model, adapter)
    return model


def filled(library: Any, model: Any, adapter: str) -> None:
    """Give an adapter numbers that depend on the names of its keys in PEFT's files alone."""
    state = library.get_peft_model_state_dict(model, adapter_name=adapter)
    fresh = {}
    for at, key in enumerate(sorted(state)):
        generator = torch.Generator().manual_seed(at)
        fixed = "vera_A" in key or "vera_B" in key or not state[key].is_floating_point()
        noise = 0.3 * torch.randn(state[key].shape, generator=generator)
        fresh[key] = state[key] if fixed else noise + (1.0 if "ia3" in key else 0.0)
    library.set_peft_model_state_dict(model, fresh, adapter_name=adapter)


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def alike(script: Callable[[Any], Any], tolerance: float = 1e-5) -> None:
    """What a script gives with PEFT and with kilotune.peft is the same."""
    import peft

    with quiet():
        theirs = script(peft)
    check_same(script(ours), theirs, tolerance)


def check_same(own: Any, theirs: Any, tolerance: float, where: str = "") -> None:
    if isinstance(theirs, Tensor):
        assert own.shape == theirs.shape, (where, own.shape, theirs.shape)
        torch.testing.assert_close(own, theirs, atol=tolerance, rtol=tolerance, msg=lambda text: f"{where}: {text}")
    elif isinstance(theirs, dict):
        assert set(own) == set(theirs), (where, sorted(set(own) ^ set(theirs)))
        for key, value in theirs.items():
            check_same(own[key], value, tolerance, f"{where}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(own) == len(theirs), (where, own, theirs)
        for at, value in enumerate(theirs):
            check_same(own[at], value, tolerance, f"{where}[{at}]")
    else:
        assert own == theirs, (where, own, theirs)
