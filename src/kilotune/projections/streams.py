"""Streams of frozen random numbers for methods that train one vector for the whole model (docs/projections.md).

::

    seed s, matrix m, site i ──► Philox4x64-10, key (s, m), counter (0, 0, 0, 1 + i) ──► 64-bit words x_0, x_1, ...

    m = 2  signs         bit R of the words, the lowest bit first          1 - 2 bit
    m = 3  permutations  block of n words, its order by their upper bits   positions 0 ... n - 1
    m = 4  Gaussians     the twelve 16-bit parts of three words            (sum - 393210) / 65536
    m = 5  dense         32-bit half w of a word, the low half first       (w >> 8) * 2^-23 - 1
    m = 6  indices       one word for each number of all factors           rank in the order by their upper bits, mod d
    m = 7  places        words mod N, each value where it comes first      0 ... N - 1, no two alike

Only integers, and floats that are exact, so all of it is the same bits everywhere. Site i is the i-th adapted layer.
Each site has streams of its own, and any part of a stream can be made without the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from .matrices import check_seed

__all__ = ["balanced_indices", "dense_rows", "distinct_places", "gaussians", "permutations", "raw_words", "signs"]

SIGNS, PERMUTATION, GAUSS, DENSE, INDICES, PLACES = 2, 3, 4, 5, 6, 7
SUM_OF_MEANS = 393210  # 12 * 65535 / 2: the mean of the sum of twelve 16-bit numbers
SITE_LIMIT = 2**32  # counter word 3 of larger ones belongs to VeRA's pairs by shape

Words = np.ndarray[Any, np.dtype[np.uint64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.int8]]
Indices = np.ndarray[Any, np.dtype[np.int32]]


def raw_words(seed: int, matrix: int, site: int, first: int, count: int) -> Words:
    """Words ``first ... first + count - 1`` of the stream of ``site`` in ``matrix``: uint64 (count,).

    Args:
        seed: the seed s, 0 <= s < 2^64.
        matrix: which stream, m in the table above.
        site: the layer's number i, from 0.
        first: the first word's number, from 0.
        count: how many.

    """
    if not 0 <= site < SITE_LIMIT:
        raise ConfigError(f"the number of a layer: expected 0 ... 2**32 - 1, got {site}")
    key = np.array([check_seed(seed), matrix], dtype=np.uint64)
    block, skip = divmod(first, 4)  # a block of the generator is four words
    counter = np.array([block, 0, 0, 1 + site], dtype=np.uint64)
    words: Words = np.random.Philox(key=key, counter=counter).random_raw(skip + count)[skip:]
    return words


def signs(seed: int, site: int, first: int, count: int) -> Bytes:
    """Signs ``first ... first + count - 1`` of B: int8 (count,), +1 for a bit 0 and -1 for a bit 1."""
    word, skip = divmod(first, 64)
    words = raw_words(seed, SIGNS, site, word, (skip + count + 63) // 64)
    bits = np.unpackbits(words.astype("<u8", copy=False).view(np.uint8), bitorder="little")[skip : skip + count]
    result: Bytes = 1 - 2 * bits.astype(np.int8)
    return result


def permutations(seed: int, site: int, size: int, first: int, count: int) -> Indices:
    """Permutations of blocks ``first ... first + count - 1``: int32 (count, size).

    Row k, entry l is the number of the word in block k that comes l-th when they are sorted by all but their lowest
    log2(size) bits, equal ones by their number. Those bits are overwritten by the number, so no two are equal and
    any sort will do.

    Args:
        seed: the seed.
        site: the layer's number.
        size: n, a power of two.
        first: the first block's number.
        count: how many blocks.

    """
    words = raw_words(seed, PERMUTATION, site, first * size, count * size).reshape(count, size)
    low = np.uint64(size - 1)
    words &= ~low
    words |= np.arange(size, dtype=np.uint64)
    words.sort(axis=1)
    words &= low
    return words.astype(np.int32)


def gaussians(seed: int, site: int, first: int, count: int) -> Floats:
    """Numbers ``first ... first + count - 1`` of G: float32 (count,), near normal, on the grid of 2^-16.

    Each is the sum of twelve uniform 16-bit numbers, less its mean, over 2^16: mean 0, variance 1 - 2^-32, and never
    larger than 6. A float32 holds each exactly, and no logarithm, whose last bit differs between libraries, is taken.
    """
    words = raw_words(seed, GAUSS, site, 3 * first, 3 * count).reshape(count, 3)
    halves = np.uint64(0x0000FFFF0000FFFF)
    total = np.zeros(count, dtype=np.uint64)
    for column in words.T:  # two sums of six at once, in the halves of a word
        total += column & halves
        total += (column >> np.uint64(16)) & halves
    whole = ((total & np.uint64(0xFFFFFFFF)) + (total >> np.uint64(32))).astype(np.int32)
    result: Floats = (whole - np.int32(SUM_OF_MEANS)).astype(np.float32)
    result *= np.float32(2.0**-16)
    return result


def dense_rows(seed: int, site: int, first: int, count: int, size: int) -> Floats:
    """Rows ``first ... first + count - 1`` of the dense projection without its gain: float32 (count, size) in [-1, 1).

    Entry j of row R is made of the 32-bit half number R * size + j, as the entries of VeRA's matrices are.
    """
    word, skip = divmod(first * size, 2)
    words = raw_words(seed, DENSE, site, word, (skip + count * size + 1) // 2)
    unit = (words.astype("<u8", copy=False).view("<u4")[skip : skip + count * size] >> np.uint32(8)).astype(np.float32)
    unit *= np.float32(2.0**-23)
    unit -= np.float32(1.0)
    return unit.reshape(count, size)


def balanced_indices(seed: int, sizes: Sequence[int], d: int) -> list[Indices]:
    """Which of d numbers stands at each place of the sites' factors: int32 (sizes[i],) for each site i.

    All places of all sites are put into a random order, by the upper bits of one word each; place number t in it
    gets number t mod d. So each number has D // d places, or one more, where D is the sum of ``sizes``, and every
    number has one as long as d <= D.

    Args:
        seed: the seed.
        sizes: how many places each site has.
        d: how many numbers there are.

    """
    total = sum(sizes)
    bits = max(total - 1, 0).bit_length()
    keys = np.empty(total, dtype=np.uint64)
    start = 0
    for site, size in enumerate(sizes):
        keys[start : start + size] = raw_words(seed, INDICES, site, 0, size)
        start += size
    low = np.uint64(2**bits - 1)
    keys &= ~low
    keys |= np.arange(total, dtype=np.uint64)
    keys.sort()
    keys &= low
    flat = np.empty(total, dtype=np.int32)
    flat[keys.astype(np.int64)] = (np.arange(total, dtype=np.int64) % d).astype(np.int32)
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    return [flat[end - size : end] for size, end in zip(sizes, ends)]


def distinct_places(seed: int, total: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``count`` of the numbers 0 ... total - 1, no two alike: int64 (count,).

    The words of the stream of site 0, modulo ``total``; a value that has been there is passed over. So the first places
    of a larger ``count`` are those of a smaller one. Where more than half of all are asked for, those that are left out
    are drawn so, and the rest are in rising order.
    """
    if 2 * count > total:
        left = distinct_places(seed, total, total - count)
        return np.setdiff1d(np.arange(total, dtype=np.int64), left)
    found = np.empty(0, dtype=np.int64)
    first = 0
    while len(found) < count:
        words = raw_words(seed, PLACES, 0, first, 2 * count + 8)
        first += len(words)
        values = np.concatenate([found, (words % np.uint64(total)).astype(np.int64)])
        _, places = np.unique(values, return_index=True)
        found = values[np.sort(places)]
    return found[:count]
