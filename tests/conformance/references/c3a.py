"""C3A in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.conformance.cases import Array, Formula, Layer, MethodCase, Params

CASES: dict[str, list[MethodCase]] = {
    "c3a": [
        MethodCase("c3a", {"block_size": 1, "init_weights": True}),
        MethodCase("c3a", {"block_size": 1, "bias": "c3a_only"}, "moved"),
    ]
}


def c3a(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """Block by block, each row the one above it, turned by one."""
    kernel, (out, inn) = params["c3a_kernel"], weight.shape
    rows = [np.block([[np.array([np.roll(w, turn) for turn in range(len(w))]) for w in row]]) for row in kernel]
    change = np.concatenate(rows) / inn
    assert change.shape == (out, inn)
    return weight + change, bias


FORMULAS: dict[str, Formula] = {"c3a": c3a}
