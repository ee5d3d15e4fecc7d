"""A base layer with the base's very weights, beside the one that adapters are merged into."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import final

import torch
from torch import nn

from ..errors import UnsupportedError
from ..kinds import beside
from ..storage import Kept, Storage

__all__ = ["Bare"]

_LOCK = threading.Lock()


@final
class Bare:
    """Makes it when it is asked for: a second module around the same tensors. A copy is empty."""

    def __init__(self) -> None:
        self._made: tuple[Kept, nn.Module] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it makes a module
    def of(self, merged: nn.Module, storage: Storage, kept: Kept, names: Sequence[str]) -> nn.Module:
        """``merged`` as it was before ``names`` were merged into it; other threads run it as it is meanwhile.

        Args:
            merged: the layer, which is not changed.
            storage: how it keeps its weight.
            kept: its own parameters.
            names: for the error.

        Raises:
            UnsupportedError: its forward has been replaced by one that belongs to the object.

        """
        if "forward" in merged.__dict__:
            raise UnsupportedError(
                f"disable_adapter(): {list(names)} are merged, and the forward of a {type(merged).__name__} has been "
                "replaced in the object (by accelerate's offloading?), so it cannot run with the base's weights; call "
                "unmerge_adapter() first"
            )
        with _LOCK:
            if self._made is None or self._made[0] is not kept:
                bare = beside(merged, {})
                storage.restore(bare, kept)
                self._made = kept, bare
            bare = self._made[1]
        bare.training = merged.training
        return bare

    def forget(self) -> None:
        """What is kept has moved to another device or dtype."""
        self._made = None

    def __reduce__(self) -> tuple[type[Bare], tuple[()]]:
        return Bare, ()
