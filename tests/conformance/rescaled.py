"""DoRA, IA3 and LoRA-XS in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.conformance.cases import Array, Layer, Params

Formula = Callable[[Params, Any, Array, Array | None], Layer]
Matrix = Callable[[int, int, int, int], Array]


def dora(inner: Formula) -> Formula:
    """Equation 5 of the DoRA paper, the rows of W + dW at unit length times the trained one."""

    def formula(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
        moved, bias = inner(params, config, weight, bias)
        lengths = np.sqrt((moved**2).sum(-1, keepdims=True))
        return params["lora_magnitude_vector"][:, None] * moved / lengths, bias

    return formula


def ia3(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """The outputs with their bias, or the inputs, scaled."""
    if "ia3_rows" in params:
        rows = params["ia3_rows"].ravel()
        return rows[:, None] * weight, None if bias is None else rows * bias
    kernel_positions = params.kernel_positions
    spread = np.array([[value] * kernel_positions for value in params["ia3_cols"].ravel()]).ravel()
    return weight * spread, bias


def loraxs(unit_matrix: Matrix) -> Formula:
    """B R A with the factors of the paper, signs and digits as they are defined, or random ones."""

    def formula(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
        rank, (out, inn) = config.r, weight.shape
        if config.start == "random":
            seed, fan_in = config.projection_prng_key, params.fan_in or inn
            a = math.sqrt(6 / fan_in) * unit_matrix(seed, 0, rank, inn)
            b = math.sqrt(6 / rank) * unit_matrix(seed, 1, rank, out).T
        else:
            u, s, vh = np.linalg.svd(weight, full_matrices=False)
            largest = [row[np.abs(row).argmax()] for row in vh[:rank]]
            a = np.array([_twelve_digits(row * np.sign(big)) for row, big in zip(vh, largest)])
            b = np.array([_twelve_digits(column * np.sign(big)) for column, big in zip((u * s).T, largest)]).T
        return weight + config.lora_alpha / rank * np.einsum("or,rs,si->oi", b, params["loraxs_R"], a), bias

    return formula


def _twelve_digits(values: Array) -> Array:
    """Each number to 12 binary digits."""
    steps = 2.0 ** (np.floor(np.log2(np.abs(values) + 1e-300)) - 11)
    return np.round(values / steps) * steps
