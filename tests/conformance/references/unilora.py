"""Uni-LoRA in numpy."""

from __future__ import annotations

from tests.conformance.cases import Formula, MethodCase
from tests.conformance.one_vector import unilora

# A few numbers for all experts, whose outputs are small: still a thousand times what rounding does.
LEAST = 1e-3
CASES: dict[str, list[MethodCase]] = {
    "unilora": [
        MethodCase(
            "unilora", {"r": 3, "theta_d_length": 11, "init_theta_d_bound": 0.5}, "moved", least_in_experts=LEAST
        ),
        MethodCase(
            "unilora",
            {"r": 2, "theta_d_length": 7, "generator": "peft", "init_weights": False},
            "moved",
            least_in_experts=LEAST,
        ),
        MethodCase(
            "unilora",
            {"theta_d_length": 3, "save_indices": True, "bias": "unilora_only"},
            "moved",
            least_in_experts=LEAST,
        ),
    ],
}


FORMULAS: dict[str, Formula] = {"unilora": unilora}
