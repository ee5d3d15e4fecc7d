"""One parameter of a module as the matrices of its experts (transformers' mixture-of-experts layers).

transformers keeps the weights of all experts of a layer in one parameter, (E, out, in) or (E, in, out), and
multiplies with it in one of several *experts implementations*. None of them is written again here: the module
runs as it is, with a :class:`StandIn` in the parameter's place. Whatever implementation runs picks experts from
the stand-in by index, and multiplies with it; a product with a stand-in is the product with the frozen weight,
and beside it that with the factors of the change. So no expert's adapted weight is ever built.

Tested with transformers 5.19 to 5.23: "eager", "batched_mm" and "grouped_mm".
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..deltas import Delta, Full, LowRank, Need, Rescale, Role
from ..errors import UnsupportedError
from ..kernels.routed import Batched, Form, Grouped, Plain
from ._base import LayerKind, hooked

__all__ = ["Experts", "StandIn", "run_with"]

# Modules that keep (E, in, out) without saying so by an attribute ``is_transposed``, as transformers' others do.
TRANSPOSED = frozenset({"Llama4TextExperts"})
# Modules whose parameters another module reads, cut into experts by itself.
READ_ELSEWHERE = frozenset({"DbrxExpertGLU"})
# transformers' experts implementations that hand the weights to kernels of their own, on a GPU.
FUSED = frozenset({"deepgemm", "sonicmoe"})
EXPERT_PARALLEL = "_is_expert_parallel"


@final
class Experts(LayerKind):
    """One parameter, (E, out, in) or (E, in, out), or a single matrix (out, in), of any module.

    Args:
        parameter: its name in the module.

    Offers no dropout on the input: what multiplies with the parameter hands the input to the frozen weight and to
    the change alike, and how often a row comes by depends on the routing. PEFT refuses it too.

    """

    name: ClassVar[str] = "experts"
    offers: ClassVar[frozenset[Need]] = frozenset({Need.LINEAR, Need.BIAS})
    substitutes: ClassVar[bool] = True
    takes_dropout: ClassVar[bool] = False
    lacks: ClassVar[Mapping[Need, str]] = {Need.OUTPUT: "a parameter inside a module has no output of its own"}

    def __init__(self, parameter: str = "weight") -> None:
        self.parameter: str = parameter

    def matches(self, module: nn.Module) -> bool:
        """Never: a parameter is taken by its own name, not by its module."""
        return False

    def transposed(self, module: nn.Module) -> bool:
        """Whether the parameter is (E, in, out)."""
        marked = bool(module.__dict__.get("is_transposed", False))
        return self.matrices(module) > 0 and (marked or _unmarked(module))

    def matrices(self, module: nn.Module) -> int:
        held = module.get_parameter(self.parameter)
        return held.shape[0] if held.ndim == 3 else 0

    def features(self, module: nn.Module) -> tuple[int, int]:
        *_, rows, columns = module.get_parameter(self.parameter).shape
        return (columns, rows) if self.transposed(module) else (rows, columns)

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.transpose(-2, -1) if self.transposed(module) else weight

    def native(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return self.canonical(module, matrix)

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        raise UnsupportedError(f"{self.parameter!r} of {type(module).__name__} is multiplied inside the module only")

    def lift(self, module: nn.Module, h: Tensor, matrix: Tensor) -> Tensor:
        return self.project(module, h, matrix)

    def stand_in(self, module: nn.Module, weight: Tensor, base: Tensor | None, deltas: Sequence[Delta]) -> StandIn:
        tail = bool(module.__dict__.get(EXPERT_PARALLEL, False))
        return StandIn(weight, base, tuple(deltas), self.transposed(module), tail)

    # -- files -----------------------------------------------------------------------------------
    # PEFT's: the first factors of all experts one below the other, (E * r, in); the second ones side by side, with
    # the experts innermost, (out, r * E). Where a module does not say that its parameter is (E, in, out), PEFT takes
    # it the other way round, so that the factors change places.

    def file_key(self, module: nn.Module, key: str) -> str:
        swapped = {"lora_A.weight": "lora_B.weight", "lora_B.weight": "lora_A.weight"}
        return swapped.get(key, key) if self.matrices(module) and _unmarked(module) else key

    def to_file(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        if not self.matrices(module) or role not in (Role.FIRST, Role.SECOND):
            return tensor
        if _unmarked(module):
            tensor = tensor.transpose(1, 2)
            role = Role.SECOND if role is Role.FIRST else Role.FIRST
        if role is Role.FIRST:
            return tensor.flatten(0, 1)  # (E * r, in)
        return tensor.permute(1, 2, 0).flatten(1)  # (out, r * E)

    def from_file(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        experts = self.matrices(module)
        if not experts or role not in (Role.FIRST, Role.SECOND):
            return tensor
        if swapped := _unmarked(module):
            role = Role.SECOND if role is Role.FIRST else Role.FIRST
        if role is Role.FIRST:
            stacked = tensor.reshape(experts, -1, tensor.shape[1])  # (E, r, in)
        else:
            stacked = tensor.reshape(tensor.shape[0], -1, experts).permute(2, 0, 1)  # (E, out, r)
        return stacked.transpose(1, 2) if swapped else stacked


def _unmarked(module: nn.Module) -> bool:
    """Whether the module keeps (E, in, out) without saying so."""
    return any(cls.__name__ in TRANSPOSED for cls in type(module).__mro__)


# -- the stand-in ----------------------------------------------------------------------------------


@final
class StandIn:
    """A weight with changes, in the place of a parameter. It multiplies, and nothing else.

    Args:
        weight: as the module keeps it: (E, out, in) or (E, in, out), (S, ...) of the experts of S rows, or one matrix.
        base: the same without merged adapters, in the same layout; None where it is ``weight``.
        deltas: the changes of the canonical matrices; all of a tensor, or (one for all experts) none, are indexed.
        inward: the last but one dimension is the canonical ``in``.
        tail: rows may come that belong to no expert here (expert parallelism).

    """

    def __init__(self, weight: Tensor, base: Tensor | None, deltas: tuple[Delta, ...], inward: bool, tail: bool):
        self.weight, self.base, self.deltas, self.inward, self.tail = weight, base, deltas, inward, tail

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def size(self, dim: int | None = None) -> Any:
        return self.weight.size() if dim is None else self.weight.size(dim)

    def dim(self) -> int:
        return self.weight.ndim

    def data_ptr(self) -> int:
        return self.weight.data_ptr()

    def __getitem__(self, index: Any) -> StandIn:
        if self.weight.ndim != 3 or isinstance(index, (tuple, slice)) or index is None or index is Ellipsis:
            raise self._refused(f"[{index!r}]")
        base = None if self.base is None else self.base[index]
        deltas = tuple(_pick(delta, index) for delta in self.deltas)
        return StandIn(self.weight[index], base, deltas, self.inward, self.tail)

    def transpose(self, dim0: int, dim1: int) -> StandIn:
        ndim = self.weight.ndim
        if {dim0 % ndim, dim1 % ndim} != {ndim - 2, ndim - 1}:
            raise self._refused(f".transpose({dim0}, {dim1})")
        base = None if self.base is None else self.base.transpose(-2, -1)
        return StandIn(self.weight.transpose(-2, -1), base, self.deltas, not self.inward, self.tail)

    @property
    def mT(self) -> StandIn:
        return self.transpose(-2, -1)

    @property
    def T(self) -> StandIn:
        return self.transpose(-2, -1)

    def t(self) -> StandIn:
        return self.transpose(-2, -1)

    def __getattr__(self, name: str) -> Any:
        raise self._refused(f".{name}")

    def _refused(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"a module does {what} with a parameter that has an adapter; only taking experts by index, transposing, "
            "and multiplying by linear, matmul, bmm and grouped_mm can be followed"
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Tensor:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func is F.linear:
            return _linear(*args, **kwargs)
        if name in ("matmul", "__matmul__", "bmm", "mm") and not kwargs:
            return _matmul(func, *args)
        if "grouped_mm" in f"{name} {func}" and all(v is None for key, v in kwargs.items() if key != "offs"):
            return _grouped(func, args[0], args[1], kwargs["offs"])
        raise next(a for a in (*args, *kwargs.values()) if isinstance(a, StandIn))._refused(f"{name}()")

    # -- products --------------------------------------------------------------------------------

    def times(self, form: Form, x: Tensor, y: Tensor, contract_last: bool) -> Tensor:
        """The product y of x and the weight, with the changes in it.

        contract_last: x met the weight's last dimension, else the last but one.
        """
        backward = contract_last == self.inward  # x meets the canonical out: the transposed change
        plain = y if self.base is None else None  # before any change is in it
        for delta in self.deltas:
            if isinstance(delta, Rescale):
                kept = self.weight if self.base is None else self.base
                stored = kept if contract_last else kept.transpose(-2, -1)  # (..., features of y, features of x)
                y = y + _rescaled(form, delta, x, stored, backward, plain)
            elif isinstance(delta, (LowRank, Full)):
                y = y + _change(form, delta, x, backward).to(y.dtype)
        return y


def _linear(x: Tensor, weight: StandIn, bias: Tensor | None = None) -> Tensor:
    y = F.linear(x, weight.weight)
    y = weight.times(Plain(), x, y, contract_last=True)
    return y if bias is None else y + bias


def _matmul(func: Callable[..., Any], left: Tensor | StandIn, right: Tensor | StandIn) -> Tensor:
    if isinstance(left, StandIn):  # weight @ columns
        assert isinstance(right, Tensor)
        y: Tensor = func(left.weight, right)
        form: Form = Batched() if left.ndim == 3 else Plain()
        return left.times(form, right.mT, y.mT, contract_last=True).mT
    assert isinstance(right, StandIn)
    y = func(left, right.weight)
    form = Batched() if right.ndim == 3 else Plain()
    return right.times(form, left, y, contract_last=False)


def _grouped(func: Callable[..., Any], x: Tensor, weight: StandIn, offs: Tensor) -> Tensor:
    y: Tensor = func(x, weight.weight, offs=offs)
    return weight.times(Grouped(func, offs, weight.tail), x, y, contract_last=False)


def _change(form: Form, delta: LowRank | Full, x: Tensor, backward: bool) -> Tensor:
    """The change's matrix, or its transpose (``backward``), times the rows x."""
    if isinstance(delta, Full):
        matrix = delta.delta.to(x.dtype)
        return form.product(x, matrix.mT if backward else matrix)
    if backward:
        return form.low_rank(form.scale(x, delta.out), delta.b.mT, delta.a.mT, delta.mid, delta.scale)
    return form.scale(form.low_rank(x, delta.a, delta.b, delta.mid, delta.scale), delta.out)


def _rescaled(form: Form, delta: Rescale, x: Tensor, stored: Tensor, backward: bool, y: Tensor | None) -> Tensor:
    """``rows (W + inner) cols x - W x``; y is W x where it is at hand."""
    before, after = (delta.rows, delta.cols) if backward else (delta.cols, delta.rows)
    plain = form.product(x, stored) if y is None else y
    if before is not None:
        x = form.scale(x, before)
    new = plain if before is None else form.product(x, stored)
    if delta.inner is not None:
        new = new + _change(form, delta.inner, x, backward).to(new.dtype)
    return form.scale(new, after) - plain


def _pick(delta: Delta, index: Any) -> Delta:
    """The changes of the experts ``index``; what is one for all experts stays so."""

    def pick(value: Tensor | None, single: int) -> Tensor | None:
        return value if value is None or value.ndim == single else value[index]

    if isinstance(delta, LowRank):
        a, b = pick(delta.a, 2), pick(delta.b, 2)
        assert a is not None
        assert b is not None
        return LowRank(a, b, pick(delta.mid, 1), pick(delta.out, 1), delta.scale)
    if isinstance(delta, Full):
        full = pick(delta.delta, 2)
        assert full is not None
        return Full(full)
    assert isinstance(delta, Rescale)
    inner = None if delta.inner is None else _pick(delta.inner, index)
    assert inner is None or isinstance(inner, (LowRank, Full))
    return Rescale(inner, pick(delta.rows, 1), pick(delta.cols, 1), delta.scale_bias)


# -- running a module with stand-ins ---------------------------------------------------------------


class _View(ABC):  # noqa: B024  # the two below differ in their class alone
    """A module as its own code sees it, with other values for some parameters. The module itself stays as it is,
    so several threads can run it at once.

    Its methods and properties see the values too, and so does a list of its own that holds such a parameter (torch's
    recurrent layers multiply by theirs).
    """

    def __init__(self, module: nn.Module, values: Mapping[str, Any], read: Callable[[str], None] | None) -> None:
        self._module, self._values, self._read = module, values, read

    def __getattr__(self, name: str) -> Any:
        if name in ("_module", "_values", "_read"):  # torch.compile makes one without them first
            raise AttributeError(name)
        if name in self._values:
            return self._value(name)
        module = self._module
        made = getattr(type(module), name, None)
        if isinstance(made, property) and name not in module.__dict__:
            return made.__get__(self)
        found = getattr(module, name)
        if isinstance(found, MethodType) and found.__self__ is module:
            return partial(found.__func__, self)
        return self._swapped(found) if isinstance(found, (list, tuple)) else found

    def _value(self, name: str) -> Any:
        if self._read is not None:
            self._read(name)
        return self._values[name]

    def _swapped(self, found: Any) -> Any:
        held = self._module._parameters
        names = [next((n for n in self._values if item is not None and item is held.get(n)), None) for item in found]
        if not any(names):
            return found
        return [item if n is None else self._value(n) for item, n in zip(found, names, strict=True)]

    # Hooks get the view; among the modules that they know they find the module.
    def __eq__(self, other: object) -> bool:
        return other is self or other is self._module

    def __hash__(self) -> int:
        return hash(self._module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = type(self._module).forward(self, *args, **kwargs)
        for name, kept in list(self.__dict__.items()):
            if name not in ("_module", "_values", "_read") and not self._holds_value(kept):
                setattr(self._module, name, kept)  # what a forward keeps stays with the module
        return result

    def _holds_value(self, kept: Any) -> bool:
        items = kept if isinstance(kept, (list, tuple)) else (kept,)
        return any(item is value for item in items for value in self._values.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module._call_impl(self, *args, **kwargs)  # type: ignore[arg-type, no-untyped-call]


@final
class _Traced(_View):
    """As torch.compile follows it."""


@final
class _Proxy(_View):
    """One that is of the module's class for ``isinstance``, and for ``super()`` in its methods."""

    @property
    def __class__(self) -> Any:
        return type(self._module)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError(f"the class of a module cannot become {value} while it runs with adapted parameters")


def run_with(
    module: nn.Module,
    values: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    read: Callable[[str], None] | None = None,
) -> Any:
    """The output of ``module`` with other values (tensors or stand-ins) for some of its parameters.

    Args:
        module: what runs.
        values: by the names of parameters.
        args: what it is called with.
        kwargs: the same, by name.
        read: told of each value that is read, by its name.

    Raises:
        UnsupportedError: its forward has been replaced, or the experts implementation takes the weights as they are.

    """
    if "forward" in module.__dict__:
        raise UnsupportedError(
            f"the forward of {type(module).__name__} has been replaced in the object (by accelerate's offloading?); "
            "it cannot run with adapted parameters"
        )
    chosen = getattr(module.__dict__.get("config"), "_experts_implementation", None)
    if chosen in FUSED:
        raise UnsupportedError(
            f"the experts implementation {chosen!r} hands the weights to a fused kernel; adapters on expert parameters "
            'run with "eager", "batched_mm" and "grouped_mm": call set_experts_implementation() of the model'
        )
    made: type[_View] = _Traced if torch.compiler.is_compiling() else _Proxy
    view = made(module, values, read)
    if hooked(module):
        return view(*args, **kwargs)
    return view.forward(*args, **kwargs)
