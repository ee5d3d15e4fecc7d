"""Formulas of strangers over named numbers: ``calculate_output`` of OpenAI's multi graders.

::

    sum    product (+|- product)*          product  signed (*|/ signed)*
    signed (+|-) signed | power            power    atom (^ signed)?
    atom   NUMBER | NAME | FUNCTION ( sum (, sum)* ) | ( sum )

Functions are min, max, abs, floor, ceil, exp, sqrt and log. It is computed in as many steps as it has signs. Python's
own parser is not used: in two threads at once that of 3.11 raises SystemErrors.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import final

from ...errors import ConfigError, did_you_mean

__all__ = ["FUNCTIONS", "Formula"]

LONGEST = 500  # characters
DEEPEST = 50
FUNCTIONS: Mapping[str, Callable[..., float]] = {
    "min": lambda *numbers: min(numbers),
    "max": lambda *numbers: max(numbers),
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
MANY = ("min", "max")  # which take one or more; the others take one
SUMS: Mapping[str, Callable[[float, float], float]] = {"+": operator.add, "-": operator.sub}
PRODUCTS: Mapping[str, Callable[[float, float], float]] = {"*": operator.mul, "/": operator.truediv}
PART = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([^\W\d]\w*)|(\S))", re.ASCII)
Compute = Callable[[Mapping[str, float]], float]


@final
class Formula:
    """A formula over numbers of these names.

    Raises:
        ConfigError: it is none, or has something else in it; with its place.

    """

    def __init__(self, text: str, names: Mapping[str, object], where: str) -> None:
        self._where, self._names, self._depth, self._at = where, names, 0, 0
        if len(text) > LONGEST:
            raise self._fault(f"{len(text)} characters; at most {LONGEST} are taken")
        self._parts = [found.groups() for found in PART.finditer(text.strip())]
        self._compute = self._chain(SUMS)
        if self._at < len(self._parts):
            raise self._unexpected()

    def __call__(self, values: Mapping[str, float]) -> float:
        """The number that it comes to.

        Raises:
            ArithmeticError, ValueError: it comes to none (a division by zero, the logarithm of a negative number).

        """
        found = float(self._compute(values))
        if not math.isfinite(found):
            raise ArithmeticError(f"it comes to {found}")
        return found

    # -- reading ---------------------------------------------------------------------------------------

    def _fault(self, told: str) -> ConfigError:
        return ConfigError(f"{self._where}: {told}")

    def _unexpected(self) -> ConfigError:
        there = next(filter(None, self._parts[self._at]), "") if self._at < len(self._parts) else "its end"
        wanted = f"expected numbers, the graders' names, + - * / ^, brackets, and {', '.join(FUNCTIONS)}"
        return self._fault(f"{wanted}; got {there!r:.50} at part {self._at + 1}")

    def _sign(self, *signs: str) -> str | None:
        """The sign that is next, if it is one of these."""
        if self._at < len(self._parts) and self._parts[self._at][2] in signs:
            self._at += 1
            return str(self._parts[self._at - 1][2])
        return None

    def _chain(self, signs: Mapping[str, Callable[[float, float], float]]) -> Compute:
        """A sum, or a product: from the left to the right."""
        inner = self._signed if signs is PRODUCTS else lambda: self._chain(PRODUCTS)
        made = inner()
        while (sign := self._sign(*signs)) is not None:
            made = _joined(signs[sign], made, inner())
        return made

    def _signed(self) -> Compute:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._fault(f"more than {DEEPEST} brackets and signs in one another")
        sign = self._sign("+", "-")
        inner = self._signed() if sign else self._power()
        self._depth -= 1
        return (lambda values: -inner(values)) if sign == "-" else inner

    def _power(self) -> Compute:
        base = self._atom()
        return base if self._sign("^") is None else _joined(math.pow, base, self._signed())

    def _atom(self) -> Compute:
        if self._sign("("):
            made = self._chain(SUMS)
            if not self._sign(")"):
                raise self._unexpected()
            return made
        number, name, _ = self._parts[self._at] if self._at < len(self._parts) else (None, None, None)
        if number is not None:
            self._at += 1
            return self._number(number)
        if name is None:
            raise self._unexpected()
        self._at += 1
        return self._call(name) if self._sign("(") else self._name(name)

    def _number(self, text: str) -> Compute:
        value = float(text)
        if not math.isfinite(value):
            raise self._fault("expected finite numbers")
        return lambda values: value

    def _name(self, name: str) -> Compute:
        if name not in self._names:
            raise self._fault(f"there is no grader {name!r:.50}.{did_you_mean(name, self._names)}")
        return lambda values: values[name]

    def _call(self, name: str) -> Compute:
        if name not in FUNCTIONS:
            raise self._fault(f"there is no function {name!r:.50}.{did_you_mean(name, FUNCTIONS)}")
        given = [self._chain(SUMS)]
        while self._sign(","):
            given.append(self._chain(SUMS))
        if not self._sign(")"):
            raise self._unexpected()
        if name not in MANY and len(given) > 1:
            raise self._fault(f"{name} takes one number, got {len(given)}")
        function = FUNCTIONS[name]
        return lambda values: function(*(one(values) for one in given))


def _joined(join: Callable[[float, float], float], left: Compute, right: Compute) -> Compute:
    return lambda values: join(left(values), right(values))
