"""Which way a linear layer with a low-rank change runs: what each costs, and the pick.

Per layer, with T tokens (rows of x), a weight (out, in), and a change of rank r that is shared by n layers' input:

===========================  ====================================================  ===========================
product                      one form                                              the other
===========================  ====================================================  ===========================
forward                      factored: z F^T added to x W^T,          T r out      merged: W' built,   r in out
gradient of x                factored: g F through A,    T r out + T r in / n      merged: W' rebuilt, r in out
gradients of the vectors     from z: z^T g,                           T r out      dense: (x^T g) A^T,
                                                                                   T in out + r in out
z = x A^T                    T r in / n, needed by both factored forms and by the gradients from z
===========================  ====================================================  ===========================

in multiply-adds, beside the 2 T in out of the frozen layer. Each product is chosen on its own; the three ways of the
literature of this project are *factored* (both factored, from z), *merged* (both merged, from z) and *dense* (both
merged, dense). The pick depends on shapes and dtypes alone, never on values: nothing waits for a GPU.
"""

from __future__ import annotations

from enum import StrEnum
from itertools import product
from typing import Any, NamedTuple, final

from ..errors import ConfigError, did_you_mean

__all__ = ["Choice", "Shape", "Way", "costs", "multiply_adds", "pick"]

# What reading and writing one number costs, in multiply-adds: the ratio of a machine's arithmetic to its memory.
# About the same on a CPU core with AVX-512 (50 G multiply-adds/s, 8 GB/s) and on a GPU (30 T/s in float32, 3 TB/s).
PASS = 40


@final
class Way(StrEnum):
    """How a layer runs with its change; PICKED leaves it to the cost model."""

    PICKED = "picked"
    FACTORED = "factored"
    MERGED = "merged"
    DENSE = "dense"

    @classmethod
    def of(cls, value: Any) -> Way:
        """The way called ``value``; ConfigError, with the nearest, where there is none."""
        try:
            return cls(value)
        except ValueError:
            valid = [way.value for way in cls]
            near = did_you_mean(str(value), valid)
            raise ConfigError(f"way: expected one of {valid}, got {value!r}.{near}") from None


@final
class Choice(NamedTuple):
    """The form of each of the three products.

    merged_forward: of the output. merged_input: of the gradient of x. dense: of the vectors' gradients.
    """

    merged_forward: bool
    merged_input: bool
    dense: bool


WAYS = {
    Way.FACTORED: Choice(False, False, False),
    Way.MERGED: Choice(True, True, False),
    Way.DENSE: Choice(True, True, True),
}


@final
class Shape(NamedTuple):
    """What the cost depends on.

    tokens: rows of x. inn, out: of the weight. rank. sharers: how many layers share one z, this one included.
    mean_out: the mean ``out`` of those. vectors: whether the gradients of what is trained are wanted. input: whether
    that of x is. trained_a: whether the first factor is trained (LoRA).
    """

    tokens: int
    inn: int
    out: int
    rank: int
    sharers: int = 1
    mean_out: float = 0.0
    vectors: bool = True
    input: bool = True
    trained_a: bool = False


def multiply_adds(shape: Shape, choice: Choice) -> float:
    """Multiply-adds of one step beyond the frozen layer's own; those of a z that n layers share count 1 / n."""
    t, i, o, r, n = shape.tokens, shape.inn, shape.out, shape.rank, shape.sharers
    build = r * i * o
    total: float = build if choice.merged_forward else t * r * o
    if _needs_z(shape, choice):
        total += t * r * i / n
    if shape.vectors:
        width = shape.mean_out or o
        total += (t * i + r * i) * width if choice.dense else t * r * width
        if shape.trained_a:
            total += r * i * width if choice.dense else t * r * i
    if shape.input and choice.merged_input:
        total += build
    elif shape.input:
        total += t * r * i / n
    return total + (t * r * o if _lowers(shape, choice) else 0)


def costs(shape: Shape, choice: Choice) -> float:
    """:func:`multiply_adds` and, at :data:`PASS` each, the numbers that are written beside the products."""
    t, i, o, n = shape.tokens, shape.inn, shape.out, shape.sharers
    passes: float = i * o if choice.merged_forward else t * o
    if shape.input:
        passes += i * o if choice.merged_input else t * i / n
    return multiply_adds(shape, choice) + PASS * passes


def _lowers(shape: Shape, choice: Choice) -> bool:
    """Whether g F (T, r) is made: for the gradient of x, for that of a trained a, or once for both."""
    through_z = shape.input and not choice.merged_input
    return through_z or (shape.vectors and shape.trained_a and not choice.dense)


def _needs_z(shape: Shape, choice: Choice) -> bool:
    return not choice.merged_forward or (shape.vectors and not choice.dense)


def pick(shape: Shape) -> Choice:
    """The cheapest forms; the one that keeps less where two cost the same."""
    forms = [Choice(*form) for form in product((False, True), repeat=3)]
    if not shape.vectors:
        forms = [form for form in forms if not form.dense]
    if not shape.input:
        forms = [form for form in forms if form.merged_input == form.merged_forward]
    best, least = forms[0], costs(shape, forms[0])
    for form in forms[1:]:  # a plain loop: torch.compile follows it where the number of tokens is a symbol
        cost = costs(shape, form)
        if cost < least:
            best, least = form, cost
    return best
