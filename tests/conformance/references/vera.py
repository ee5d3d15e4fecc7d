"""VeRA and DVoRA in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.conformance.cases import Array, Formula, Layer, MethodCase, Params
from tests.conformance.references._lengths import LENGTHS, dora
from tests.conformance.references._numbers import unit_matrix

CASES: dict[str, list[MethodCase]] = {
    "vera": [
        MethodCase("vera", {"r": 4}),
        MethodCase("vera", {"r": 7, "projection_prng_key": 2**64 - 1, "sharing": "shape", "d_initial": 0.5}),
        MethodCase("vera", {"r": 3, "generator": "peft", "projection_prng_key": 11}),
        MethodCase("vera", {"r": 2, "init_weights": False, "bias": "vera_only"}, "moved"),
    ],
    "dvora": [
        MethodCase("dvora", {"r": 4}, exact_gradient=LENGTHS),
        MethodCase("dvora", {"r": 3, "generator": "peft", "projection_prng_key": 11}, exact_gradient=LENGTHS),
    ],
}


def vera(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """The paper's equation 2, with whichever matrices the config asks for."""
    rank, (out, inn) = config.r, weight.shape
    if config.generator == "peft":
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        shapes = getattr(params, "shapes", ()) or ((out, inn),)  # PEFT draws for the largest, and cuts
        most_out, most_in = (max(sizes) for sizes in zip(*shapes, strict=True))
        a = nn.init.kaiming_uniform_(torch.empty(rank, most_in), generator=generator).double().numpy()[:, :inn]
        b = nn.init.kaiming_uniform_(torch.empty(most_out, rank), generator=generator).double().numpy()[:out]
    else:
        block = 1 + inn * 2**32 + out if config.sharing == "shape" else 0
        fan_in = getattr(params, "fan_in", 0) or inn
        a = math.sqrt(6 / fan_in) * unit_matrix(config.projection_prng_key, 0, rank, inn, block)
        b = math.sqrt(6 / rank) * unit_matrix(config.projection_prng_key, 1, rank, out, block).T
    return weight + np.diag(params["vera_lambda_b"]) @ b @ np.diag(params["vera_lambda_d"]) @ a, bias


FORMULAS: dict[str, Formula] = {"vera": vera, "dvora": dora(vera)}
