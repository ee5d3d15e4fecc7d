"""Bottleneck adapters and their presets in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.conformance.cases import Array, MethodCase, OnOutput, Params

FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
}
WITH_INPUT = ("linear", "conv1d-transformers", "attention", "attention-split", "norm", "block")
# Smooth functions: finite differences and "every number acts" have no kink to meet.
CASES: dict[str, list[MethodCase]] = {
    "bottleneck": [
        MethodCase("bottleneck", {"width": 3, "activation": "gelu"}),
        MethodCase("bottleneck", {"width": 2, "activation": "silu", "scale": -0.5, "init": "near-identity"}, "moved"),
        MethodCase("bottleneck", {"width": 4, "activation": "tanh", "placement": "parallel"}, kinds=WITH_INPUT),
    ],
    "houlsby": [MethodCase("houlsby", {"width": 2, "activation": "mish"})],
    "pfeiffer": [MethodCase("pfeiffer", {"width": 2, "activation": "sigmoid"})],
    "parallel": [MethodCase("parallel", {"width": 2, "activation": "softplus"})],
}

_NO_FEATURES = "no input to read: ids, or a window, in place of the features of one place of the output"
EXCEPTIONS: dict[tuple[str, str, str, str], str] = {
    ("parallel", kind, "*", "*"): _NO_FEATURES for kind in ("conv?d", "conv?d:*", "embedding*")
}


def bottleneck(params: Params, config: Any, x: Array, y: Array) -> Array:
    """The output and, times 4 beside the feed-forward, the small network of the input; else of the output."""
    beside = config.placement == "parallel"
    scale = (4.0 if beside else 1.0) if config.scale is None else config.scale
    h = np.einsum("...i,mi->...m", x if beside else y, params["down"]) + params["down_bias"]
    h = FUNCTIONS[config.activation](h)
    result: Array = y + scale * (np.einsum("...m,om->...o", h, params["up"]) + params["up_bias"])
    return result


ON_OUTPUT: dict[str, OnOutput] = dict.fromkeys(CASES, bottleneck)
