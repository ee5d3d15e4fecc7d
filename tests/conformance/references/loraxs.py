"""LoRA-XS in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.conformance.cases import Array, Formula, Layer, MethodCase, Params
from tests.conformance.references._numbers import unit_matrix

LAST = 2.0**-9  # factors have 12 binary digits, and the last of them may fall to either side
CASES: dict[str, list[MethodCase]] = {
    "loraxs": [
        MethodCase("loraxs", {"r": 2, "lora_alpha": 64, "svd_iterations": 0}, "moved", rounded=LAST),
        MethodCase("loraxs", {"r": 3, "save_factors": False, "bias": "loraxs_only"}, "moved", rounded=LAST),
        MethodCase("loraxs", {"r": 4, "start": "random", "projection_prng_key": 7}, "moved"),
    ],
}


def loraxs(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """B R A with the factors of the paper, signs and digits as they are defined, or random ones."""

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


def _twelve_digits(values: Array) -> Array:
    """Each number to 12 binary digits."""
    steps = 2.0 ** (np.floor(np.log2(np.abs(values) + 1e-300)) - 11)
    return np.round(values / steps) * steps


FORMULAS: dict[str, Formula] = {"loraxs": loraxs}
