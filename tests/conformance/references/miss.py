"""MiSS in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.conformance.cases import Array, Formula, Layer, MethodCase, Params

CASES: dict[str, list[MethodCase]] = {
    "miss": [
        MethodCase("miss", {"r": 2}),
        MethodCase("miss", {"r": 4, "init_weights": False, "bias": "MiSS_only"}, "moved"),
        MethodCase("miss", {"r": 3, "init_weights": "mini"}),
    ]
}


def miss(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """Column by column, output by output."""
    block = params["miss_block"]  # (r, out), or (r, m)
    change = np.empty_like(weight)
    for i, j in np.ndindex(*weight.shape):
        change[i, j] = block[j % config.r, i % block.shape[1]]
    return weight + change, bias


FORMULAS: dict[str, Formula] = {"miss": miss}
