"""How sizes look to a reader."""

from __future__ import annotations

__all__ = ["readable_bytes"]


def readable_bytes(count: float) -> str:
    """A number of bytes in decimal units: 9_449_472 -> '9.45 MB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError("unreachable")
