"""RandLoRA in numpy: base by base."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from tests.conformance.cases import Array, Formula, Layer, MethodCase, Params
from tests.conformance.references._numbers import unit_matrix

# Of the sparse ones, keys with which no row or column is of zeros alone in layers as small as these are.
CASES: dict[str, list[MethodCase]] = {
    "randlora": [
        MethodCase("randlora", {"r": 2, "randlora_alpha": 4}),
        MethodCase("randlora", {"r": 7, "randlora_alpha": 3, "sparse": True, "projection_prng_key": 2**64 - 2}),
        MethodCase(
            "randlora",
            {"r": 3, "randlora_alpha": 2, "very_sparse": True, "save_projection": True, "projection_prng_key": 28},
        ),
        MethodCase(
            "randlora", {"r": 4, "randlora_alpha": 4, "sparse": True, "generator": "peft", "projection_prng_key": 46}
        ),
        MethodCase("randlora", {"r": 2, "randlora_alpha": 1, "init_weights": False, "bias": "randlora_only"}, "moved"),
    ]
}


def matrices(config: Any, most_out: int, most_in: int, rows: tuple[int, int], columns: tuple[int, int]) -> Any:
    """A (rows, columns) and B (rows, columns), with standard deviation one."""
    least, most = sorted((most_out, most_in))
    sparsity = math.sqrt(least) if config.very_sparse else 3
    if config.generator == "peft":
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        sizes = (config.r, 1, least), (most, math.ceil(least / config.r), config.r)
        drawn = [torch.rand(size, generator=generator) for size in sizes]
        signs = [(each > 1 - 0.5 / sparsity).float() - (each < 0.5 / sparsity).float() for each in drawn]
        found = [(each / each.std()).double().numpy() for each in signs]  # rounded to float32, which defines them
        return found[0][: rows[0], 0, : columns[0]], found[1].reshape(most, -1).T[: rows[1], : columns[1]]
    units = [unit_matrix(config.projection_prng_key, i, rows[i], columns[i]) for i in (0, 1)]
    if not (config.sparse or config.very_sparse):
        return [unit * math.sqrt(3) for unit in units]
    words = [(unit + 1) * 2**23 for unit in units]
    low = math.floor(2**24 / (2 * sparsity))
    share = low / 2**24  # of -1, and of 1
    return [np.where(w < low, -1.0, np.where(w >= 2**24 - low, 1.0, 0.0)) / math.sqrt(2 * share) for w in words]


def randlora(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """The paper's sum; column k of base j of B is number k n + j."""
    lam, gamma = params["randlora_lambda"], params["randlora_gamma"]  # (r, n), (n, least)
    (rank, bases), least, most = lam.shape, min(weight.shape), max(weight.shape)
    shapes = getattr(params, "shapes", ()) or (weight.shape,)
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    a, b = matrices(config, largest[0], largest[1], (rank, rank * bases), (least, most))
    change = np.zeros((most, least))
    for j in range(bases):
        columns = b[[k * bases + j for k in range(rank)]].T  # (most, r)
        change += columns @ np.diag(lam[:, j]) @ a @ np.diag(gamma[j])
    out, inn = weight.shape
    return weight + config.randlora_alpha / rank * (change if inn <= out else change.T), bias


FORMULAS: dict[str, Formula] = {"randlora": randlora}
