"""Which layers of a model a name in a LoRA file means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, final

from ..errors import did_you_mean, nearest
from .keys import alternatives
from .original_names import Meant, of_transformer, of_unet

__all__ = ["Layer", "Names"]

TEXT_MODEL = "text_model_"


@final
class Layer(NamedTuple):
    """A layer of a model that LoRA can change.

    out: its features. dimensions: of a convolution's kernel, 0 for a linear layer.
    """

    out: int
    dimensions: int = 0


@final
class Names:
    """The layers of one model, found by all the names that files have for them.

    Args:
        layers: by their dotted names in the model.

    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self._original = {**of_unet(layers), **of_transformer(layers)}
        self._flat: dict[str, list[str]] = {}
        for name in layers:
            self._flat.setdefault(name.replace(".", "_"), []).append(name)

    def find(self, name: str, flat: bool) -> Meant | None:
        """The layers that ``name`` means; None where there is none, or where it means one of several."""
        if not flat:
            own = next((each for each in alternatives(name) if each in self.layers), None)
            return self._original.get(name.replace(".", "_")) if own is None else Meant((own,))
        for each in (name, name.removeprefix(TEXT_MODEL), TEXT_MODEL + name):
            if len(found := self._flat.get(each, [])) == 1:
                return Meant((found[0],))
            if not found and each in self._original:
                return self._original[each]
        return None

    def fault(self, name: str, flat: bool) -> str:
        """Why ``name`` means no layer, and what is nearest to it."""
        if len(several := self._flat.get(name, [])) > 1 and flat:
            return f"can mean {' or '.join(several)}"
        if not flat:
            return f"the model has no such layer.{did_you_mean(name, self.layers)}"
        close = nearest(name, [*self._flat, *self._original], 1)
        return "the model has no such layer." + (f" Did you mean {close[0]!r}?" if close else "")
