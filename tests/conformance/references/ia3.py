"""IA3 in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.conformance.cases import Array, Formula, Layer, MethodCase, Params

CASES: dict[str, list[MethodCase]] = {
    "ia3": [
        MethodCase("ia3", {"feedforward_modules": []}),
        MethodCase("ia3", {"feedforward_modules": ".*"}, "near"),
        MethodCase("ia3", {"feedforward_modules": [], "init_ia3_weights": False}, "moved"),
    ],
}


def ia3(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """The outputs with their bias, or the inputs, scaled."""
    if "ia3_rows" in params:
        rows = params["ia3_rows"].ravel()
        return rows[:, None] * weight, None if bias is None else rows * bias
    kernel_positions = params.kernel_positions
    spread = np.array([[value] * kernel_positions for value in params["ia3_cols"].ravel()]).ravel()
    return weight * spread, bias


FORMULAS: dict[str, Formula] = {"ia3": ia3}
