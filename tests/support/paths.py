"""Where things are in the repository, for tests that read or run them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ROOT", "SUPPORT"]

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent
