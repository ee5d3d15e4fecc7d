"""What code outside of an adapted layer gets when it reads the layer's weight or bias.

A parent may multiply by a weight itself, and never call the layer that holds it. So while a module's forward runs
(:func:`in_forward`), such a read gives a :class:`Given`: a tensor that is the weight with all changes in it, built when
something computes with it. Everywhere else, where weights are tied, resized, initialised and saved, it gives the
Parameter. Nothing here depends on who the parent is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_map_only

from ..errors import UnsupportedError
from ..kernels.lowrank import no_autocast

__all__ = ["Given", "Recipe", "give", "in_forward"]

_CALL = nn.Module._call_impl.__code__

# What a tensor says of itself is asked of the Parameter, which is there; nothing is built for it.
_SAID = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "ndimension", "numel", "nelement", "element_size", "__len__")),
    *(getattr(Tensor, name) for name in ("get_device", "is_floating_point", "is_complex", "is_inference")),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
# What need not have it built, where there is something that multiplies in its place.
_PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm}
_HOOKS = {Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook}
_DATA = cast(Any, Tensor.data).__get__
# What it says of its place in the graph is its own.
_OWN = {getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad_fn", "output_nr")}


def in_forward() -> bool:
    """Whether a module's forward runs in this thread, or a backward, which may run one again (a checkpoint's)."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        return True
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            return True
        named = code.co_argcount > 0 and code.co_name.startswith(("forward", "_forward"))
        if named and isinstance(frame.f_locals.get(code.co_varnames[0]), nn.Module):
            return True  # one that is called by itself: model.forward(x), model.forward_features(x)
        frame = frame.f_back
    return False


@final
@dataclass(eq=False, slots=True)
class Recipe:
    """How a value with changes in it is made.

    held: the Parameter that it stands for, where there is one. make: makes it, with gradients where they are enabled.
    trained: what these go to. like: its shape, dtype and device. refusal: why there is none, told to who computes with
    it. quantised: whether the Parameter holds codes. factored: makes what multiplies in its place without being built.
    """

    held: Tensor | None
    make: Callable[[], Tensor]
    trained: tuple[Tensor, ...]
    like: tuple[torch.Size, torch.dtype, torch.device]
    refusal: str | None = None
    quantised: bool = False
    factored: Callable[[], Any] | None = None

    def build(self) -> Tensor:
        """The value.

        Raises:
            UnsupportedError: there is none.

        """
        if self.refusal is not None:
            raise UnsupportedError(self.refusal)
        compiling = torch.compiler.is_compiling()  # leaving the context would end an autocast around it (torch 2.13)
        with nullcontext() if compiling else no_autocast(self.like[2]):
            return self.make()

    @classmethod
    def refused(cls, held: Tensor, why: str) -> Recipe:
        """None for ``held``, which tells of itself and cannot be computed with; ``why`` in words."""
        return cls(held, lambda: held, (), (held.shape, held.dtype, held.device), why)

    def data(self) -> Recipe:
        """The same without a graph, as ``tensor.data``."""

        def make() -> Tensor:
            with torch.no_grad():
                return self.build()

        return Recipe(self.held, make, (), self.like, None, self.quantised)


def give(recipe: Recipe) -> Tensor:
    """What a reader gets in a forward: a :class:`Given`, or at once what it stands for.

    The latter where somebody follows all operations: a compiler, which drops what nothing uses, a tracer, a transform.
    """
    if recipe.refusal is not None:
        return cast(Tensor, _lazily(recipe))
    if torch.compiler.is_compiling() or _followed():
        return recipe.build()
    if recipe.trained and torch.is_grad_enabled():
        given: Tensor = _Edge.apply(recipe, *recipe.trained)  # type: ignore[no-untyped-call]
        return given
    return Given(recipe)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # whether it is used, only a run can tell
def _lazily(recipe: Recipe) -> Tensor:
    return Given(recipe)


def _followed() -> bool:
    return bool(
        torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd.forward_ad._current_level >= 0
    )


@final
class Given(Tensor):
    """A weight with changes in it, which is built when it is used; it has the Parameter's shape, dtype and device.

    What is handed to a function of torch is the built value, with its graph. To an ``autograd.Function`` the object
    goes as it is; so it stands in the graph itself (:class:`_Edge`), and what that function's forward computes with is
    the built value again. There is no memory behind it: ``data_ptr()`` gives that of the built value, and code in C++
    that goes past torch's functions gets torch's error.
    """

    _recipe: Recipe
    _built: tuple[bool, Tensor] | None

    @staticmethod
    def __new__(cls, recipe: Recipe) -> Given:
        size, dtype, device = recipe.like
        made: Given = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)
        made._recipe, made._built = recipe, None
        return made

    def value(self) -> Tensor:
        """What it stands for: with a graph, made anew, since a checkpoint that makes it again has to do the same."""
        if torch.is_grad_enabled() and self._recipe.trained:
            return self._recipe.build()
        mode = torch.is_inference_mode_enabled()
        if self._built is None or self._built[0] != mode:
            self._built = mode, self._recipe.build()
        return self._built[1]

    def factor(self) -> Any:
        """What multiplies in its place, where there is something; else itself."""
        return self if self._recipe.factored is None else self._recipe.factored()

    def __getattr__(self, name: str) -> Any:
        """What somebody has put on the Parameter; but not what is needed to multiply by its codes."""
        if name in ("_recipe", "_built"):
            raise AttributeError(name)
        found = getattr(self._recipe.held, name)
        if self._recipe.quantised:
            raise UnsupportedError(
                f"code around an adapted layer reads .{name} of its quantised weight, to multiply by the codes itself, "
                "where no adapter can act; leave the layer out with exclude_modules"
            )
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAID:
            return func(args[0]._recipe.held, *args[1:], **kwargs)
        if func in _OWN:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _DATA:
            return Given(args[0]._recipe.data())
        if func is Tensor.data_ptr:  # of what lives as long as this does
            with torch.no_grad():
                return args[0].value().data_ptr()
        if func in _HOOKS:
            raise UnsupportedError(
                f"{func.__name__}(): what a forward reads as the weight or bias of an adapted layer is made anew for "
                "each use, so nothing can be hung on it; hang it on the adapter's parameters"
            )
        if func in _PRODUCTS:
            args, kwargs = tree_map_only(Given, lambda given: given.factor(), (args, kwargs))
        return _with_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch says that it is none
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _with_values(func, args, kwargs or {})


def _with_values(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives for the built values; they are gone afterwards, so it must not write into them."""
    used: list[tuple[Tensor, int]] = []

    def value(given: Given) -> Tensor:
        made = given.value()
        used.append((made, 0 if made.is_inference() else made._version))
        return made

    args, kwargs = tree_map_only(Given, value, (args, kwargs))
    sets = getattr(func, "__name__", "") == "__set__"
    result = None if sets else func(*args, **kwargs)
    if sets or any(version != made._version for made, version in used if not made.is_inference()):
        raise UnsupportedError(
            "a forward writes into the weight or bias of an adapted layer, which is read with the adapters in it: the "
            "change would be lost; leave the layer out with exclude_modules, or write into its base_layer"
        )
    return result


@final
class _Edge(torch.autograd.Function):
    """The place of a :class:`Given` in the graph. Nothing is computed until a gradient comes here."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *trained: Tensor) -> Given:
        ctx.recipe, ctx.versions = recipe, [tensor._version for tensor in trained]
        return Given(recipe)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        trained = ctx.recipe.trained
        if ctx.versions != [tensor._version for tensor in trained]:
            raise RuntimeError(
                "the parameters of an adapter were changed in place between a forward that read a weight with it and "
                "the backward; call backward() before optimizer.step()"
            )
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            value = ctx.recipe.build()
        return None, *torch.autograd.grad(value, trained, gradient, create_graph=keep, allow_unused=True)
