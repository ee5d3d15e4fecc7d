"""References from a part to the whole, which keep the whole alive no longer than its own names do."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar, final

__all__ = ["Weak", "call"]

T = TypeVar("T")


@final
class Weak(Generic[T]):
    """A reference for what its object holds: held strongly, both would be freed by the garbage collector only.

    A copy of the object, pickled ones too, has parts that refer to the copy.
    """

    def __init__(self, to: T) -> None:
        self._to = weakref.ref(to)

    def __call__(self) -> T:
        """The object, which has to be there still."""
        found = self._to()
        if found is None:
            raise ReferenceError("a part of a model was used after the model was gone")
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Weak, (self(),)


def call(owner: Weak[Any], method: str, *args: Any, **kwargs: Any) -> Any:
    """Call the owner's method; with ``functools.partial``, a bound method that keeps nothing alive."""
    return getattr(owner(), method)(*args, **kwargs)
