"""Values of JSON that a request brings and nobody knows the shape of: schemas of tools, arguments of calls."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from pydantic_core import PydanticCustomError

__all__ = ["TOO_DEEP", "json_fault", "written"]

MAX_DEPTH = 200
TOO_DEEP = f"is more than {MAX_DEPTH} objects and lists deep"
MAX_NAME = 1000  # characters of a name; places in errors repeat them


T = TypeVar("T")


def written(value: T) -> T:
    """The value, for pydantic.

    Raises:
        PydanticCustomError: it has a fault.

    """
    if (fault := json_fault(value)) is not None:
        raise PydanticCustomError("lacking", "{fault}", {"fault": fault})
    return value


def json_fault(value: Any) -> str | None:
    """Why a value cannot be taken; None where it can. However deep the value is, this goes no deeper than its loop."""
    left: list[tuple[Any, int]] = [(value, 1)]
    while left:
        found, depth = left.pop()
        if depth > MAX_DEPTH:
            return TOO_DEEP
        if isinstance(found, dict):
            if long := next((name for name in found if len(name) > MAX_NAME), None):
                return f"has a name of {len(long):,} characters; at most {MAX_NAME:,} are taken"
            left += [(name, depth) for name in found]
            left += [(item, depth + 1) for item in found.values()]
        elif isinstance(found, list):
            left += [(item, depth + 1) for item in found]
        elif isinstance(found, str) and not _writable(found):
            return "holds half of a surrogate pair, which is no character"
        elif isinstance(found, float) and not math.isfinite(found):
            return f"holds {found}, which is no number of JSON"
    return None


def _writable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
