"""Intrinsic dimension in numpy."""

from __future__ import annotations

from tests.conformance.cases import Formula, MethodCase
from tests.conformance.one_vector import one_intrinsic

CASES: dict[str, list[MethodCase]] = {
    "intrinsic": [
        MethodCase("intrinsic", {"d": 13}),
        MethodCase("intrinsic", {"d": 21, "structure": "said", "projection_prng_key": 2**64 - 1}),
        MethodCase("intrinsic", {"d": 25, "structure": "said", "projection": "dense", "bias": "intrinsic_only"}),
    ],
}


FORMULAS: dict[str, Formula] = {"intrinsic": one_intrinsic}
