"""FourierFT in numpy: the sum over the frequencies, term by term."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.conformance.cases import Array, Formula, Layer, MethodCase, Params
from tests.conformance.references._numbers import philox

CASES: dict[str, list[MethodCase]] = {
    "fourierft": [
        MethodCase("fourierft", {"n_frequency": 7, "init_weights": True}),
        MethodCase("fourierft", {"n_frequency": 5, "generator": "peft", "bias": "fourier_only"}, "moved"),
    ]
}


def fourierft(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """Each frequency's wave over the matrix, times its number."""
    out, inn = weight.shape
    spectrum = params["fourierft_spectrum"]
    if config.generator == "peft":
        generator = torch.Generator().manual_seed(config.random_loc_seed)
        places = torch.randperm(out * inn, generator=generator)[: len(spectrum)].tolist()
    else:
        places = first_places(config.random_loc_seed, out * inn, len(spectrum))
    change = np.zeros((out, inn))
    i, j = np.arange(out)[:, None], np.arange(inn)[None]
    for value, place in zip(spectrum, places, strict=True):
        u, v = divmod(place, inn)
        change += value * np.cos(2 * np.pi * (u * i / out + v * j / inn))
    return weight + config.scaling * change / (out * inn), bias


def first_places(seed: int, total: int, count: int) -> list[int]:
    """Values of the stream, each where it comes first; of those that are left out, where they are fewer."""
    if 2 * count > total:
        return sorted(set(range(total)) - set(first_places(seed, total, total - count)))
    found: list[int] = []
    step = 0
    while len(found) < count:
        step += 1
        for word in philox((seed, 7), (step, 0, 0, 1)):
            if word % total not in found:
                found.append(word % total)
    return found[:count]


FORMULAS: dict[str, Formula] = {"fourierft": fourierft}
