"""``kilotune demo``: what ``kilotune experiment cnn`` does."""

from __future__ import annotations

from .experiment import cnn as demo

__all__ = ["demo"]
