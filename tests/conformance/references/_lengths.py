"""DoRA over any formula, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.conformance.cases import Array, Formula, Layer, Params

__all__ = ["LENGTHS", "dora"]

LENGTHS = ("*.lora_magnitude_vector", "*.bias")  # what DoRA's gradient is exact for; test_dora.py has the rest


def dora(inner: Formula) -> Formula:
    """Equation 5 of the DoRA paper, the rows of W + dW at unit length times the trained one."""

    def formula(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
        moved, bias = inner(params, config, weight, bias)
        lengths = np.sqrt((moved**2).sum(-1, keepdims=True))
        return params["lora_magnitude_vector"][:, None] * moved / lengths, bias

    return formula
