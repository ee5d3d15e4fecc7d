"""How sizes look to a reader, and what a reader writes for them."""

from __future__ import annotations

import math
import re

from ..errors import ConfigError, did_you_mean

__all__ = ["parse_bytes", "parse_count", "readable_bytes"]

UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def readable_bytes(count: float) -> str:
    """A number of bytes in decimal units: 9_449_472 -> '9.45 MB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError("unreachable")


def parse_count(text: str, what: str) -> int:
    """``1000000``, ``1_000_000`` or ``1e6`` as a whole number.

    Raises:
        ConfigError: it is none.

    """
    plain = re.sub(r"(?<=\d)[_,](?=\d{3}(?!\d))", "", text)  # 2,000 is a number; 1,5 is half of one in many places
    try:
        value = math.nan if "_" in plain else float(plain)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value != int(value):
        raise ConfigError(f"{what}: expected a whole number, such as 1000000 or 1e6, got {text!r}")
    return int(value)


def parse_bytes(text: str, what: str) -> int:
    """``24GiB``, ``80 GB`` or ``1000000`` as bytes.

    Raises:
        ConfigError: it is no size, with the nearest unit.

    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if found is None else next((u for u in UNITS if u.lower() == found[2].lower()), None)
    if found is None or unit is None:
        near = "" if found is None else did_you_mean(found[2], UNITS)
        raise ConfigError(f"{what}: expected a size such as 24GiB or 80GB, got {text!r}.{near}")
    number = float(found[1])
    if not math.isfinite(number):
        raise ConfigError(f"{what}: {text!r:.40} is more than any machine has; expected a size such as 24GiB")
    return int(number * UNITS[unit])
