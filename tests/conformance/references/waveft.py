"""WaveFT in numpy: each number's block of two by two."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.conformance.cases import Array, Formula, Layer, MethodCase, Params
from tests.conformance.references.fourierft import first_places

# With a scaling at which single numbers do not stand out of the weights: a scale of quantised ones is their largest's.
CASES: dict[str, list[MethodCase]] = {
    "waveft": [
        MethodCase("waveft", {"n_frequency": 20, "scaling": 0.3}),
        MethodCase(
            "waveft",
            {"n_frequency": 5, "scaling": 0.3, "generator": "peft", "init_weights": False, "bias": "all"},
            "moved",
        ),
        MethodCase("waveft", {"n_frequency": 20, "scaling": 0.3, "use_idwt": False}),
    ]
}


def waveft(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """Number by number."""
    out, inn = weight.shape
    spectrum = params["waveft_spectrum"]
    if config.generator == "peft":
        generator = torch.Generator().manual_seed(config.random_loc_seed)
        places = torch.randperm(out * inn, generator=generator)[: len(spectrum)].tolist()
    else:
        places = first_places(config.random_loc_seed, out * inn, len(spectrum))
    change = np.zeros((out + 1, inn + 1))
    halves = (-(-out // 2), -(-inn // 2))
    for value, place in zip(spectrum, places, strict=True):
        at = divmod(place, inn)
        if not config.use_idwt:
            change[at] += value
            continue
        (row, left), (column, up) = ((k % half, -1.0 if k >= half else 1.0) for k, half in zip(at, halves))
        for i, j in np.ndindex(2, 2):
            change[2 * row + i, 2 * column + j] += value / 2 * (up if i else 1.0) * (left if j else 1.0)
    return weight + config.scaling * change[:out, :inn], bias


FORMULAS: dict[str, Formula] = {"waveft": waveft}
