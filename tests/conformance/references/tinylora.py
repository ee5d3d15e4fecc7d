"""TinyLoRA in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from tests.conformance.cases import Array, Formula, Layer, MethodCase, Params
from tests.conformance.one_vector import words

SAVED = {"save_factors": True, "svd_iterations": 0}
CASES: dict[str, list[MethodCase]] = {
    "tinylora": [
        MethodCase("tinylora", {"u": 5, "svd_iterations": 0}),
        MethodCase("tinylora", {"u": 4, "weight_tying": 1.0, "projection_seed": 2**64 - 1, "svd_iterations": 0}),
        MethodCase("tinylora", {"r": 3, "u": 3, "save_projection": True, "init_weights": "uniform", **SAVED}, "moved"),
        MethodCase("tinylora", {"u": 2, "generator": "peft", "bias": "tinylora_only", **SAVED}),
    ],
}


def tinylora(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """B (sum v_i P_i) A, the singular values in equal parts in both, P from the seed and the layer's place."""
    rank = min(config.r, *weight.shape)
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    sign = np.array([[np.sign(row[np.abs(row).argmax()])] for row in vh[:rank]])
    root = np.sqrt(s[:rank, None])
    a = _single(root * sign * vh[:rank])
    b = _single(root * sign * u.T[:rank]).T
    shape = (config.u, rank, rank)
    if config.generator == "peft":
        generator = torch.Generator().manual_seed(config.projection_seed + params.index)
        tables = torch.empty(shape).normal_(0.0, 1 / rank**0.5, generator=generator).double().numpy()
    else:
        parts = words(config.projection_seed, 4, params.index, 3 * math.prod(shape))
        of_three = [parts[3 * n : 3 * n + 3] for n in range(math.prod(shape))]
        sums = [sum(w >> (16 * q) & 0xFFFF for w in three for q in range(4)) for three in of_three]
        tables = (np.array(sums) - 393210.0).reshape(shape) / 65536 / math.sqrt(rank)
        tables = _single(tables) if config.save_projection else tables
    layers = len(params.shapes)
    groups = max(1, round(layers * (1 - config.weight_tying)))
    v = params["tinylora_v"][min(params.index // (layers // groups), groups - 1)]
    return weight + b @ np.einsum("i,ijk->jk", v, tables) @ a, bias


def _single(values: Array) -> Array:
    """Rounded to float32."""
    return values.astype(np.float32).astype(np.float64)


FORMULAS: dict[str, Formula] = {"tinylora": tinylora}
