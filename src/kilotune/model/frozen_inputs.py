"""The frozen blocks of a model run once for each row: what they gave is kept, and given again.

::

    with FrozenInputs(model, last=4):
        model(**batch)      # all blocks run, and what goes into the fourth from the end is kept, row by row
        model(**batch)      # only the last four run

With only the last blocks adapted, what enters them depends on nothing that training changes: not on the adapters, and
not on dropout, since the frozen blocks run in eval mode here. A row is known by its own inputs without the padding, so
a row of another batch, or of a padding of another length, is the same row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedError, type_name
from .adapter_model import AdapterModel
from .kept_rows import KeptRows, rows_of
from .last_blocks import blocks_of

__all__ = ["FrozenInputs", "Usage"]


@final
class _Reached(BaseException):
    """The first adapted block is called: the forward is not needed any further. Nothing catches it on the way."""


@final
@dataclass(frozen=True)
class Usage:
    """rows: that are kept. bytes: that they take. found, computed: rows of forwards that were kept, that were not."""

    rows: int
    bytes: int
    found: int
    computed: int


@final
class FrozenInputs:
    """Inside this context the blocks before the ``last`` ones of ``model`` run once for each row that it sees.

    Args:
        model: with adapters in its last blocks only, or any model. Its forward takes tensors whose first axis are the
            rows, by name or as the one first argument.
        last: how many blocks run each time.
        kept: where they are kept; None: in memory on the CPU, 2,000 megabytes at most. Rows beyond that run through
            all blocks each time. One may serve several models of the same base.

    Raises:
        ConfigError: the arguments. TargetError: the model has no list of blocks.
        UnsupportedError: in the first forward: something before the last blocks is trained, or the model does not hand
            one tensor from block to block.

    """

    def __init__(self, model: nn.Module, last: int, kept: KeptRows | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model: expected a torch.nn.Module, got {type_name(model)}")
        self.root: nn.Module = model.get_base_model() if isinstance(model, AdapterModel) else model
        blocks = blocks_of(self.root)
        first = blocks.first_of(last)
        self._frozen, self._first, self._where = blocks.modules[:first], blocks.modules[first], blocks.names(first)[0]
        self._kept = KeptRows() if kept is None else kept
        dtype = next((parameter.dtype for parameter in self._frozen[-1].parameters()), None)
        self._what = f"{self._where} {dtype}"
        self._found = self._computed = 0
        self._checked = self._seen = self._busy = False
        self._form: type = Tensor
        self._device = torch.device("cpu")
        self._handles: list[Any] = []

    @property
    def usage(self) -> Usage:
        """What is kept, and what it saved."""
        return Usage(len(self._kept.places), self._kept.used, self._found, self._computed)

    def __enter__(self) -> FrozenInputs:
        self._handles = [self.root.register_forward_pre_hook(self._before, with_kwargs=True)]
        self._handles.append(self.root.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()
        for handle in self._handles:
            handle.remove()

    # -- around a forward ----------------------------------------------------------------------------

    def _before(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._busy:
            return None
        rows = rows_of(args, kwargs, self._what)
        if rows is None:
            return None
        found = [self._kept.get(row.key) for row in rows]
        missing = [i for i, value in enumerate(found) if value is None]
        self._found, self._computed = self._found + len(rows) - len(missing), self._computed + len(missing)
        if missing or not self._checked:  # kept by another model with this base, maybe
            hidden = self._computed_for(args, kwargs)
            if hidden.shape[0] != len(rows):
                raise UnsupportedError(
                    f"last_blocks: {self._where} gets {tuple(hidden.shape)} for {len(rows)} rows, so rows cannot be "
                    "told apart; turn the cache off"
                )
            for i in missing:
                self._kept.put(rows[i].key, rows[i].own(hidden[i]))
        else:
            own = [value.to(self._device) for value in found if value is not None]
            hidden = torch.stack([row.padded(value) for row, value in zip(rows, own)])
        if torch.is_grad_enabled() and _checkpoints(root):
            hidden.requires_grad_()  # torch's older way of it asks for that
        self._give(hidden)
        if "use_cache" in kwargs or getattr(getattr(root, "config", None), "use_cache", False):
            return args, {**kwargs, "use_cache": False}  # of keys and values, which the frozen blocks do not fill
        return None

    def _after(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._busy:
            self._put_back()

    def _computed_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What goes into the first of the last blocks, for a batch."""
        held: list[Tensor] = []

        def reached(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held.append(self._hidden(args, kwargs))
            raise _Reached

        with self._alone(), torch.set_grad_enabled(not self._checked), ExitStack() as hooks:
            hooks.callback(self._first.register_forward_pre_hook(reached, with_kwargs=True).remove)
            hooks.callback(self._frozen[-1].register_forward_hook(self._note_form).remove)
            embedded = hooks.enter_context(_embedded(self.root))
            with suppress(_Reached):
                self.root(*args, **kwargs)
            if not held:
                raise UnsupportedError(f"last_blocks: the model's forward does not come to {self._where}; leave it out")
            if {id(leaf) for leaf in _leaves(held[0])} - {id(output) for output in embedded}:
                raise UnsupportedError(
                    f"last_blocks: something is trained before {self._where} (an adapter, or a module of "
                    "modules_to_save), so what enters it changes; leave last_blocks out, or adapt the last blocks only"
                )
        self._checked, self._device = True, held[0].device
        return held[0].detach()

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        value = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(value, Tensor):
            raise UnsupportedError(f"last_blocks: {self._where} is not given a tensor first; turn the cache off")
        return value

    def _note_form(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What a frozen block gives: the tensor, or a tuple with nothing else in it."""
        alone = isinstance(output, Tensor) or (type(output) is tuple and not any(v is not None for v in output[1:]))
        if not alone:
            raise UnsupportedError(
                f"last_blocks: a {type(block).__name__} gives more than its hidden states, so it cannot be left out; "
                "turn the cache off"
            )
        self._form = type(output) if type(output) is tuple else Tensor

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The frozen part runs as it is: without dropout, and not through this object."""
        modes = {module: module.training for module in self.root.modules()}
        self._busy = True
        try:
            self.root.eval()
            yield
        finally:
            self._busy = False
            for module, mode in modes.items():
                module.training = mode

    def _give(self, hidden: Tensor) -> None:
        """Until the forward is over the frozen blocks hand on what they get, and the last of them gives ``hidden``."""
        if any("forward" in block.__dict__ for block in self._frozen):
            raise UnsupportedError(
                "last_blocks: the forward of a frozen block has been replaced in the object (by accelerate's "
                "offloading?), so it cannot be left out; turn the cache off"
            )
        if not self._seen:
            self._handles.append(self._first.register_forward_pre_hook(partial(self._see, hidden), with_kwargs=True))
        for block in self._frozen:
            block.__dict__["forward"] = _Passing(hidden if block is self._frozen[-1] else None, self._form)

    def _see(self, hidden: Tensor, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Once: what the last frozen block gave is what comes to the next, as it is."""
        if self._busy:
            return
        self._seen = True
        self._handles.pop().remove()
        if self._hidden(args, kwargs) is not hidden:
            raise UnsupportedError(
                f"last_blocks: the model changes what it hands to {self._where}, so that cannot be kept; turn the "
                "cache off"
            )

    def _put_back(self) -> None:
        for block in self._frozen:
            if isinstance(block.__dict__.get("forward"), _Passing):
                del block.__dict__["forward"]


@final
class _Passing:
    """The forward of a block that is left out."""

    def __init__(self, hidden: Tensor | None, form: type) -> None:
        self.hidden, self.form = hidden, form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        result = given if self.hidden is None else self.hidden
        return (result,) if self.form is tuple else result


def _checkpoints(root: nn.Module) -> bool:
    """Whether a model of transformers computes activations again in its backward."""
    new = "is_activation_checkpointing"  # before 5.23 it is the other
    return bool(getattr(root, new if hasattr(type(root), new) else "is_gradient_checkpointing", False))


@contextmanager
def _embedded(root: nn.Module) -> Iterator[list[Tensor]]:
    """What the input embeddings give meanwhile: some models make it ask for a gradient that goes nowhere."""
    found: list[Tensor] = []
    getter = getattr(root, "get_input_embeddings", None)
    try:
        module = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError, TypeError):  # transformers raises where a model has none
        module = None
    if not isinstance(module, nn.Module):
        yield found
        return
    handle = module.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def _leaves(result: Tensor) -> list[Tensor]:
    """The tensors that a gradient of ``result`` would go to."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    left = [result.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            found.append(leaf)
        left += [before for before, _ in node.next_functions]
    return found
