"""Random numbers from their definitions: nothing of the library, no torch."""

from __future__ import annotations

import numpy as np

from tests.conformance.cases import Array

__all__ = ["philox", "unit_matrix"]


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x64-10 (Salmon et al. 2011), in plain integers."""
    mask, (k0, k1), (c0, c1, c2, c3) = 2**64 - 1, key, counter
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & mask, (p0 >> 64) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0, c1, c2, c3


def unit_matrix(seed: int, which: int, rows: int, columns: int, block: int = 0) -> Array:
    """U_A (which 0) or U_B (which 1) from the definition in DESIGN section 3."""
    result = np.empty((rows, columns))
    for k in range(rows):
        words: list[int] = []
        step = 0
        while len(words) < columns:
            step += 1  # the counter is raised before its first block
            for output in philox((seed, which), (step, 0, k, block)):
                words += [output & 0xFFFFFFFF, output >> 32]
        result[k] = [(word >> 8) * 2.0**-23 - 1.0 for word in words[:columns]]
    return result
