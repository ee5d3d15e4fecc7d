"""Each cell with hooks for all modules: they see each module that they see in the plain net, and change what it gives.

Hooks that are passed over by a fused way of running: https://github.com/pytorch/pytorch/issues/128413.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from kilotune.deltas import LowRank, Residual
from kilotune.layers import fusion
from tests.conformance.cells import CELLS, Cell
from tests.conformance.checks import adapted, data, far, layer_of
from tests.conformance.consumers import results
from tests.conformance.declared import every_cell, every_quantised_cell
from tests.conformance.quantised import INN
from tests.conformance.quantised import Cell as QuantisedCell

Seen = list[Any]
HOOKS: dict[str, Callable[[Callable[..., None]], RemovableHandle]] = {
    "forward": torch_modules.register_module_forward_hook,
    "forward-always": lambda hook: torch_modules.register_module_forward_hook(hook, always_call=True),
    "forward-pre": torch_modules.register_module_forward_pre_hook,
    "backward": torch_modules.register_module_full_backward_hook,
    "backward-pre": torch_modules.register_module_full_backward_pre_hook,
}


@contextmanager
def watching(kind: str) -> Iterator[Seen]:
    """The modules that a hook for all modules gets."""
    seen: Seen = []

    def hook(module: Any, *values: Any) -> None:
        seen.append(module)

    handle = HOOKS[kind](hook)
    try:
        yield seen
    finally:
        handle.remove()


def names_seen(kind: str, base: nn.Module, x: Tensor) -> list[str]:
    """The modules of a net without adapters that such a hook sees."""
    with watching(kind) as seen:
        results(base, lambda: base(x), x)
    return [name for name, module in base.named_modules() if name and module in seen]


def sees(kind: str, names: list[str], model: nn.Module, x: Tensor, near: float) -> None:
    """The base's modules of these names are seen in ``model``, and its values are those without a hook.

    near: how far the output and each gradient may be, as a part of its norm. A number of a gradient is a sum, and where
    a layer computes in bfloat16 it is rounded by the size of what is summed, and not by its own.
    """
    right = results(model, lambda: model(x), x)
    with watching(kind) as seen:
        found = results(model, lambda: model(x), x)
    own = {name.replace(".base_layer", "").removeprefix("model."): m for name, m in bare(model)}
    assert [name for name in names if own[name] not in seen] == []
    for ours, theirs in zip(found, right, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.dtype == theirs.dtype
            assert far(ours, theirs) <= near


def bare(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base, by their names; each wrapper stands before what it wraps."""
    return ((name, module) for name, module in model.named_modules() if "adapters" not in name.split("."))


@every_cell("hooks", [cell for cell in CELLS if not cell.kind_case.ids], hook=list(HOOKS))
def test_hooks_for_all_modules_see_the_base_layer(cell: Cell, hook: str) -> None:
    x = data(cell, 4, dtype=torch.float64).requires_grad_()
    names = names_seen(hook, cell.base(torch.float64), x)
    assert names
    sees(hook, names, adapted(cell), x, near=1e-9)


@every_quantised_cell(hook=list(HOOKS))
def test_so_they_do_where_it_is_quantised(cell: QuantisedCell, hook: str) -> None:
    model, _ = cell.models()
    x = torch.randn(2, 3, INN, generator=torch.Generator().manual_seed(3)).requires_grad_()
    sees(hook, ["layer"], model, x, near=cell.scheme.forward / 2)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_planted_blindness_is_seen(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "hooked", lambda module: bool(module._forward_hooks))
    cell = next(cell for cell in CELLS if cell.makes is LowRank and cell.kind == "linear")
    with pytest.raises(AssertionError, match="layer"):
        test_hooks_for_all_modules_see_the_base_layer(cell, hook)


LINEAR = [cell for cell in CELLS if cell.kind == "linear" and cell.bias and not issubclass(cell.makes, Residual)]


@pytest.mark.parametrize("cell", LINEAR, ids=[cell.id for cell in LINEAR])
def test_what_a_hook_returns_is_what_the_layer_gives(cell: Cell) -> None:
    """The change is added to it."""
    model, x = adapted(cell), data(cell, 4, dtype=torch.float64)
    layer = layer_of(model)
    plain = layer.base_layer(x)
    change = model(x) - plain

    def doubled(module: nn.Module, args: Any, y: Any) -> Any:
        return 2.0 * y if module is layer.base_layer else y

    handle = torch_modules.register_module_forward_hook(doubled)
    try:
        torch.testing.assert_close(model(x), 2.0 * plain + change)
        names = ["default", None, "default", None]
        mine = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64).unsqueeze(1)
        torch.testing.assert_close(model(x, adapter_names=names), 2.0 * plain + mine * change)
    finally:
        handle.remove()
    torch.testing.assert_close(model(x), plain + change)
