"""LoRA, DoRA and LoRA-FA in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.conformance.cases import Array, Formula, Layer, MethodCase, Params
from tests.conformance.references._lengths import LENGTHS, dora

CASES: dict[str, list[MethodCase]] = {
    "lora": [
        MethodCase("lora", {"r": 2, "lora_alpha": 16}),
        MethodCase("lora", {"r": 4, "use_rslora": True, "init_lora_weights": "gaussian"}),
        MethodCase("lora", {"r": 3, "init_lora_weights": False, "bias": "lora_only"}, "moved"),
        MethodCase("lora", {"r": 2, "init_lora_weights": "pissa"}),
    ],
    "dora": [
        MethodCase("dora", {"r": 2, "lora_alpha": 16}, exact_gradient=LENGTHS),
        MethodCase("dora", {"r": 3, "init_lora_weights": False, "bias": "lora_only"}, "moved", exact_gradient=LENGTHS),
    ],
    "lora_fa": [
        MethodCase("lora_fa", {"r": 2, "lora_alpha": 16}),
    ],
}

EXCEPTIONS: dict[tuple[str, str, str, str], str] = {
    **{
        (
            method,
            "attention",
            "*",
            "read by PEFT",
        ): "PEFT 0.21 adds the change of out_proj twice (huggingface/peft#3774)"
        for method in ("lora", "lora_fa")
    },
    (
        "lora_fa",
        "experts*",
        "*",
        "kept in files",
    ): "which factor of an expert stands under which of PEFT's keys, its module decides",
}


def lora(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """alpha / r (or sqrt(r)) B A, less that of a start from the base."""
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    change = np.einsum("or,ri->oi", params["lora_B"], params["lora_A"])
    if config.from_base and params.fan_in in (0, weight.shape[1]):  # not in an embedding
        u, s, vh = np.linalg.svd(weight, full_matrices=False)
        root, unscaled = np.sqrt(s[: config.r]), np.float32(1 / math.sqrt(scale))
        a, b = (root[:, None] * vh[: config.r]).astype(np.float32), (u[:, : config.r] * root).astype(np.float32)
        change = change - (b * unscaled).astype(float) @ (a * unscaled).astype(float)  # both held in float32
    return weight + scale * change, bias


FORMULAS: dict[str, Formula] = {"lora": lora, "dora": dora(lora), "lora_fa": lora}
