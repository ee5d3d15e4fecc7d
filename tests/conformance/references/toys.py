"""The test-only methods in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.conformance.cases import Array, Formula, Layer, MethodCase, OnOutput, Params

CASES: dict[str, list[MethodCase]] = {
    "toy_full": [MethodCase("toy_full"), MethodCase("toy_full", {"bias": "all"})],
    "toy_rescale": [
        MethodCase("toy_rescale", {"rows": True}),
        MethodCase("toy_rescale", {"rows": True, "scale_bias": True}),
        MethodCase("toy_rescale", {"cols": True}, "near"),
        MethodCase("toy_rescale", {"rows": True, "inner": "low_rank"}),
        MethodCase("toy_rescale", {"rows": True, "cols": True, "inner": "full", "scale_bias": True}, "near"),
    ],
    "toy_shift": [MethodCase("toy_shift")],
    "toy_residual": [MethodCase("toy_residual"), MethodCase("toy_residual", {"source": "input"}, kinds=("linear",))],
}
EXCEPTIONS: dict[tuple[str, str, str, str], str] = {
    (
        "toy_shift",
        "attention*",
        "*",
        "parameters act",
    ): "a key's bias moves all scores of a query alike: no gradient"
}


def toy_full(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    return weight + params["change"], bias


def toy_shift(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    return weight, params["shift"] if bias is None else bias + params["shift"]


def toy_rescale(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    out, inn = weight.shape
    inner = params.get("change", np.zeros((out, inn)))
    if "a" in params:
        inner = 2.0 * params["b"] @ params["a"]
    rows, cols = params.get("rows", np.ones(out)), params.get("cols", np.ones(inn))
    scaled = rows * bias if config.scale_bias and bias is not None else bias
    return np.diag(rows) @ (weight + inner) @ np.diag(cols), scaled


def toy_residual(params: Params, config: Any, x: Array, y: Array) -> Array:
    """Acts on the output, not on the weight."""
    source = y if config.source == "output" else x
    result: Array = y + np.tanh(source @ params["down"].T) @ params["up"].T
    return result


FORMULAS: dict[str, Formula] = {"toy_full": toy_full, "toy_rescale": toy_rescale, "toy_shift": toy_shift}
ON_OUTPUT: dict[str, OnOutput] = {"toy_residual": toy_residual}
