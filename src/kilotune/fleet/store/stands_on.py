"""On which shared adapter a personal one stands, as a training says it in a version's metadata."""

from __future__ import annotations

from ...adapter_files.stands_on import HEADER, StandsOn

__all__ = ["HEADER", "METADATA", "StandsOn"]

METADATA = "stands_on"
