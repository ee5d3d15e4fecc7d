"""A ledger of memory: every storage that torch's operators make, and when its last reference goes.

It is a dispatch mode, so it sees what runs inside ``with ledger:``, the backward included, on real tensors and on fakes
alike (see memory_rehearsal.py). What an operator takes and gives back within itself is not seen. torch does not declare
its dispatch modes stable; tested with torch 2.13.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Ledger", "storages"]

LARGEST = 1 << 22  # numbers in a tensor whose values are followed beside its fake
BEFORE = -1  # the number of what was there before


@final
class Ledger(TorchDispatchMode):
    """Every storage that an operator makes, and when it goes.

    Args:
        block: the allocator hands out multiples of so many bytes.

    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block, self.now, self.start = block, 0, 0
        self.entries: list[tuple[int, int]] = []  # (number of the storage, bytes; below zero when it goes)
        self.numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.watches: dict[int, Any] = {}
        self.values = WeakIdKeyDictionary()  # fakes -> their numbers, where all that they are made of is known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self._known(func, args, kwargs)
        if known is not None and func in ASKS_FOR_NUMBERS:
            output = known
        else:
            output = CORRECTED.get(func, _as_is)(func(*args, **kwargs), args)
            self._follow(func, output, known)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._enter(leaf)
        return output

    # -- what was there before, and values -----------------------------------------------------------------

    def know(self, tensors: Iterable[Tensor]) -> None:
        """These were there before, and cost nothing."""
        for tensor in tensors:
            for storage in storages(tensor):
                self.numbers.setdefault(storage, BEFORE)

    def tell(self, fake: Tensor, value: Tensor) -> None:
        """The numbers of a fake, for models that ask whether a mask is all ones."""
        if value.numel() <= LARGEST and not value.is_floating_point():
            self.values[fake] = value.cpu()

    def _known(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operator gives on the numbers, where all of them are known; else None."""
        if not self.values:
            return None
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not all(tensor in self.values or _is_constant(tensor) for tensor in tensors):
            if func._schema.is_mutable and any(tensor in self.values for tensor in tensors):
                self.values.clear()  # one of them is overwritten by who knows what
            return None
        if torch.Tag.nondeterministic_seeded in func.tags or not (tensors or func in OF_NOTHING):
            return None

        def number(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            return self.values[leaf] if isinstance(leaf, FakeTensor) else leaf

        with _disable_current_modes(), torch.no_grad():  # in earnest
            return func(*tree_map(number, args), **tree_map(number, kwargs))

    def _follow(self, func: Any, output: Any, known: Any) -> None:
        if known is None:
            return
        for fake, value in zip(tree_leaves(output), tree_leaves(known)):
            if isinstance(fake, FakeTensor) and isinstance(value, Tensor) and value.numel() <= LARGEST:
                self.values[fake] = value

    # -- entries ---------------------------------------------------------------------------------------------

    def number(self, tensor: Tensor | None) -> int:
        """Which entry a tensor's storage is; -1 for what was there before, or was never seen."""
        return BEFORE if tensor is None else self.numbers.get(tensor.untyped_storage(), BEFORE)

    def of(self, tensors: Iterable[Tensor | None]) -> int:
        """The bytes of these, as entered."""
        made = {number: size for number, size in self.entries if size > 0}
        return sum(made.get(number, 0) for number in {self.number(tensor) for tensor in tensors})

    def restart(self) -> int:
        """Forget the peak so far; the bytes now."""
        self.entries, self.start = [], self.now
        return self.now

    def peak(self, some: set[int]) -> tuple[int, int]:
        """The most bytes at a time since the (re)start, and the bytes of the storages ``some`` among them."""
        now = most = self.start
        inside = least = 0
        for number, size in self.entries:
            now += size
            inside += size if number in some else 0
            if now > most:
                most, least = now, inside
        return most, least

    def _enter(self, tensor: Tensor) -> None:
        for storage in storages(tensor):
            if storage in self.numbers:
                continue
            size = -(-storage.nbytes() // self.block) * self.block
            number = len(self.watches)
            self.numbers[storage] = number
            self.watches[number] = weakref.finalize(storage, self._strike, number, size)
            self.watches[number].atexit = False
            self.entries.append((number, size))
            self.now += size

    def _strike(self, number: int, size: int) -> None:
        self.entries.append((number, -size))
        self.now -= size


def _is_constant(tensor: Tensor) -> bool:
    """A number that Python gave, as in ``ids[:, 0] = start``."""
    return not isinstance(tensor, FakeTensor) and tensor.numel() == 1


def storages(tensor: Tensor) -> list[Any]:
    """The storages of a tensor, or of the parts of one that is made of several (torchao's)."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor) in (Tensor, nn.Parameter):
        return [tensor.untyped_storage()]
    return [storage for name in flatten()[0] for storage in storages(getattr(tensor, name))]


aten = torch.ops.aten
ASKS_FOR_NUMBERS = frozenset({aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default})
"""Operators that give Python a number, which no fake has."""
OF_NOTHING = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.full.default,
        aten.ones.default,
        aten.zeros.default,
    }
)
"""Operators that make their numbers of nothing, as positions and masks of ones are made."""


def _as_is(output: Any, args: Any) -> Any:
    return output


def _rows_first(output: Any, args: Any) -> Any:
    """The CPU's attention writes (batch, tokens, heads, features), and its fake says the layout of the query."""
    attention, *rest = output
    if not isinstance(attention, FakeTensor):
        return output
    laid_out = torch.empty_permuted(
        attention.shape, (0, 2, 1, 3), dtype=attention.dtype, device=attention.device, requires_grad=False
    )
    return (laid_out, *rest)


CORRECTED: dict[Any, Callable[[Any, Any], Any]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _rows_first
}
