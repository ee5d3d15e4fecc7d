"""VB-LoRA in numpy."""

from __future__ import annotations

from tests.conformance.cases import Formula, MethodCase
from tests.conformance.one_vector import vblora

CASES: dict[str, list[MethodCase]] = {
    "vblora": [  # each piece takes all vectors, so that all logits have gradients; test_vblora.py has the rest
        MethodCase("vblora", {"r": 2, "num_vectors": 2, "vector_length": 1, "init_vector_bank_bound": 1.0}, "moved"),
        MethodCase("vblora", {"num_vectors": 3, "topk": 3, "vector_length": 1, "init_logits_std": 1}, "moved"),
        MethodCase("vblora", {"r": 3, "num_vectors": 2, "vector_length": 1, "bias": "vblora_only"}, "moved"),
    ]
}


FORMULAS: dict[str, Formula] = {"vblora": vblora}
