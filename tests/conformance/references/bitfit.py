"""BitFit in numpy."""

from __future__ import annotations

from typing import Any

from tests.conformance.cases import Array, Formula, Layer, MethodCase, Params

CASES: dict[str, list[MethodCase]] = {
    "bitfit": [
        MethodCase("bitfit"),
    ],
}

EXCEPTIONS: dict[tuple[str, str, str, str], str] = {
    (
        "bitfit",
        "attention*",
        "*",
        "parameters act",
    ): "a key's bias moves all scores of a query alike: no gradient"
}


def bitfit(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """The weight as it is, and the bias (zero where there is none) shifted."""
    return weight, params["bitfit_delta"] if bias is None else bias + params["bitfit_delta"]


FORMULAS: dict[str, Formula] = {"bitfit": bitfit}
