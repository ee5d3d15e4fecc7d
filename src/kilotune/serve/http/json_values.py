"""Values of JSON that a request brings and nobody knows the shape of: schemas of tools, arguments of calls."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from pydantic_core import PydanticCustomError

__all__ = ["TOO_DEEP", "json_fault", "written"]

MAX_DEPTH = 200
TOO_DEEP = f"is more than {MAX_DEPTH} objects and lists deep"
HALF = "holds half of a surrogate pair, which is no character"
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
    """Why a value cannot be taken; None where it can.

    However deep the value is, this goes no deeper than its loop; and it is quick, as others wait meanwhile.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        names: list[str] = []
        for found in level:
            if isinstance(found, str):
                if not found.isascii() and not _writable(found):
                    return HALF
            elif isinstance(found, list):
                below += found
            elif isinstance(found, dict):
                names += found
                below += found.values()
            elif isinstance(found, float) and not math.isfinite(found):
                return f"holds {found}, which is no number of JSON"
        if not below:  # then there are no names, either
            return None
        if (fault := _fault_of(names)) is not None:
            return fault
        level = below
    return TOO_DEEP


def _fault_of(names: list[str]) -> str | None:
    for name in names:
        if len(name) > MAX_NAME:
            return f"has a name of {len(name):,} characters; at most {MAX_NAME:,} are taken"
        if not name.isascii() and not _writable(name):
            return HALF
    return None


def _writable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
