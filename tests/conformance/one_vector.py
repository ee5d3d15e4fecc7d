"""What one trained vector makes of a layer, from docs/projections.md: plain integers and numpy, nothing of the library.

Everything is built the long way: Philox in Python's integers, H by its definition, P as a dense matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tests.conformance.references._numbers import philox

__all__ = [
    "dense_matrix",
    "fastfood_matrix",
    "hadamard_by_bits",
    "indices",
    "intrinsic",
    "one_intrinsic",
    "unilora",
    "vblora",
    "words",
]

Array = np.ndarray[Any, np.dtype[np.float64]]


def words(seed: int, matrix: int, site: int, count: int) -> list[int]:
    """The first words of a site's stream."""
    found: list[int] = []
    while len(found) < count:
        found += philox((seed, matrix), (len(found) // 4 + 1, 0, 0, 1 + site))
    return found[:count]


def hadamard_by_bits(size: int) -> Array:
    """Entry (i, j): -1 to the number of ones in i AND j."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


def power_of_two(size: int) -> int:
    n = 1
    while n < size:
        n *= 2
    return n


def fastfood_matrix(seed: int, site: int, rows: int, size: int) -> Array:
    """The blocks H G Pi H B on one another, (rows, size), without the gain."""
    n = power_of_two(size)
    blocks = -(-rows // n)
    bits, keys = words(seed, 2, site, (blocks * n + 63) // 64), words(seed, 3, site, blocks * n)
    parts = words(seed, 4, site, 3 * blocks * n)
    h, low = hadamard_by_bits(n), n.bit_length() - 1
    made = []
    for k in range(blocks):
        places = range(k * n, (k + 1) * n)
        b = np.diag([1.0 - 2.0 * (bits[r // 64] >> (r % 64) & 1) for r in places])
        order = sorted(range(n), key=lambda j: (keys[k * n + j] >> low, j))
        pi = np.zeros((n, n))
        pi[range(n), order] = 1.0
        sums = [sum(parts[3 * r + i] >> (16 * q) & 0xFFFF for i in range(3) for q in range(4)) for r in places]
        g = np.diag([(total - 393210) / 65536 for total in sums])
        made.append(h @ g @ pi @ h @ b)
    return np.concatenate(made)[:rows, :size]


def dense_matrix(seed: int, site: int, rows: int, size: int) -> Array:
    """(rows, size) uniform in [-1, 1), without the gain."""
    halves = [half for word in words(seed, 5, site, (rows * size + 1) // 2) for half in (word & 0xFFFFFFFF, word >> 32)]
    return np.array([(half >> 8) * 2.0**-23 - 1.0 for half in halves[: rows * size]]).reshape(rows, size)


def intrinsic(vector: Array, config: Any, shapes: Sequence[tuple[int, int]]) -> list[Array]:
    """The changes of all layers, of shapes (out, in) in the order of the sites."""
    layers = len(shapes)
    size = config.d - (layers if config.structure == "said" else 0)
    total = sum(out * inn for out, inn in shapes)
    dense = config.projection == "dense"
    gain = math.sqrt(3 / total) if dense else 1 / math.sqrt(total * power_of_two(size))
    changes = []
    for i, (out, inn) in enumerate(shapes):
        matrix = (dense_matrix if dense else fastfood_matrix)(config.projection_prng_key, i, out * inn, size)
        scale = vector[size + i] if config.structure == "said" else 1.0
        changes.append((scale * gain * matrix @ vector[:size]).reshape(out, inn))
    return changes


def one_intrinsic(params: Any, config: Any, weight: Array, bias: Array | None) -> tuple[Array, Array | None]:
    """The formula of one of the adapted matrices."""
    change = intrinsic(params["intrinsic_vector"], config, params.shapes)[params.index]
    return weight + change.reshape(weight.shape), bias


def indices(seed: int, sizes: Sequence[int], d: int) -> list[int]:
    """Our index of every place of all factors, in one list."""
    total = sum(sizes)
    low = max(total - 1, 0).bit_length()
    keys = [word >> low for site, size in enumerate(sizes) for word in words(seed, 6, site, size)]
    flat = [0] * total
    for t, place in enumerate(sorted(range(total), key=lambda p: (keys[p], p))):
        flat[place] = t % d
    return flat


def unilora(params: Any, config: Any, weight: Array, bias: Array | None) -> tuple[Array, Array | None]:
    """B A, both gathered from the vector over the square root of how often each number is used; of one matrix."""
    (out, inn), rank, d = params.shapes[params.index], config.r, config.theta_d_length
    sizes = [rank * (rows + columns) for rows, columns in params.shapes]
    if config.generator == "peft":
        flat = _peft_indices(sum(sizes), d, config.proj_seed)
        # PEFT's norms are float32 numbers
        norm = torch.bincount(torch.tensor(flat), minlength=d).float().rsqrt().double().numpy()
    else:
        flat = indices(config.proj_seed, sizes, d)
        norm = np.array([1 / math.sqrt(flat.count(j)) if j in flat else 0.0 for j in range(d)])
    first = sum(sizes[: params.index])
    values = (params["unilora_theta_d"] * norm)[flat[first : first + sizes[params.index]]]
    a, b = values[: rank * inn].reshape(rank, inn), values[rank * inn :].reshape(out, rank)
    return weight + (b @ a).reshape(weight.shape), bias


def _peft_indices(total: int, d: int, seed: int) -> list[int]:
    """As PEFT deals them out: each D // d times, the rest drawn without repeating, shuffled by NumPy's generator."""
    generator = np.random.default_rng(seed)
    dealt = list(np.repeat(np.arange(d), total // d))
    if total % d:
        dealt += list(generator.choice(d, size=total % d, replace=False))
    data = np.array(dealt, dtype=np.int64)
    generator.shuffle(data)
    return [int(i) for i in data]


def vblora(params: Any, config: Any, weight: Array, bias: Array | None) -> tuple[Array, Array | None]:
    """B A, each piece of a row of A and of a column of B a mean of bank vectors, weighted by its k largest logits."""
    bank = params["vblora_vector_bank"]

    def piece(logits: Array) -> Array:
        best = sorted(range(len(logits)), key=lambda j: -logits[j])[: config.topk]
        powers = [math.exp(logits[j] - logits[best[0]]) for j in best]
        found: Array = sum(power / sum(powers) * bank[j] for power, j in zip(powers, best))
        return found

    a = np.array([np.concatenate([piece(one) for one in row]) for row in params["vblora_logits_A"]])
    columns = np.swapaxes(params["vblora_logits_B"], 0, 1)
    b = np.array([np.concatenate([piece(one) for one in column]) for column in columns]).T
    return weight + (b @ a).reshape(weight.shape), bias
