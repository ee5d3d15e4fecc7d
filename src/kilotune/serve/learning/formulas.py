"""Formulas of strangers over named numbers: ``calculate_output`` of OpenAI's multi graders.

Numbers, names, ``+ - * / ^``, brackets, and min, max, abs, floor, ceil, exp, sqrt and log: read with Python's own
parser into a tree of which only these are taken, and computed here, in as many steps as the formula has signs.
"""

from __future__ import annotations

import ast
import math
import operator
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
SIGNS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
Compute = Callable[[Mapping[str, float]], float]


@final
class Formula:
    """A formula over numbers of these names.

    Raises:
        ConfigError: it is none, or has something else in it; with its place.

    """

    def __init__(self, text: str, names: Mapping[str, object], where: str) -> None:
        if len(text) > LONGEST:
            raise ConfigError(f"{where}: {len(text)} characters; at most {LONGEST} are taken")
        try:
            tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            told = error.msg if isinstance(error, SyntaxError) else "it cannot be read"
            raise ConfigError(f"{where}: no formula: {told}") from None
        self._where, self._names = where, names
        self._compute = self._read(tree, 0)

    def __call__(self, values: Mapping[str, float]) -> float:
        """The number that it comes to.

        Raises:
            ArithmeticError, ValueError: it comes to none (a division by zero, the logarithm of a negative number).

        """
        found = float(self._compute(values))
        if not math.isfinite(found):
            raise ArithmeticError(f"it comes to {found}")
        return found

    def _read(self, tree: ast.expr, depth: int) -> Compute:
        if depth > DEEPEST:
            raise ConfigError(f"{self._where}: more than {DEEPEST} brackets and signs in one another")
        if isinstance(tree, ast.Constant):
            return self._number(tree.value)
        if isinstance(tree, ast.Name):
            return self._name(tree.id)
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, (ast.USub, ast.UAdd)):
            inner, sign = self._read(tree.operand, depth + 1), -1.0 if isinstance(tree.op, ast.USub) else 1.0
            return lambda values: sign * inner(values)
        if isinstance(tree, ast.BinOp) and type(tree.op) in SIGNS:
            join, left, right = (
                SIGNS[type(tree.op)],
                self._read(tree.left, depth + 1),
                self._read(tree.right, depth + 1),
            )
            return lambda values: join(left(values), right(values))
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
            return self._call(tree.func.id, [self._read(one, depth + 1) for one in tree.args])
        raise ConfigError(
            f"{self._where}: expected numbers, the graders' names, + - * / ^, brackets, and {', '.join(FUNCTIONS)}"
        )

    def _number(self, value: object) -> Compute:
        if type(value) not in (int, float):
            raise ConfigError(f"{self._where}: expected numbers and names, got {value!r:.50}")
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ConfigError(f"{self._where}: expected finite numbers")
        return lambda values: number

    def _name(self, name: str) -> Compute:
        if name not in self._names:
            raise ConfigError(f"{self._where}: there is no grader {name!r:.50}.{did_you_mean(name, self._names)}")
        return lambda values: values[name]

    def _call(self, name: str, given: list[Compute]) -> Compute:
        if name not in FUNCTIONS:
            raise ConfigError(f"{self._where}: there is no function {name!r:.50}.{did_you_mean(name, FUNCTIONS)}")
        if not given or (name not in MANY and len(given) > 1):
            count = "one number or more" if name in MANY else "one number"
            raise ConfigError(f"{self._where}: {name} takes {count}, got {len(given)}")
        function = FUNCTIONS[name]
        return lambda values: function(*(one(values) for one in given))
