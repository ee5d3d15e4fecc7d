"""Each cell with something behind its layers that writes into their output: the gradients are the right ones.

timm's and torchvision's SwinV2 assign to a slice of what a linear layer gives, others act in place there.
torch lets nobody write into a view that a function of autograd's made (https://github.com/aleximmer/Laplace/issues/139).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from kilotune import VeraConfig, get_peft_model
from kilotune.config import AdapterConfig
from kilotune.deltas import LowRank
from kilotune.kernels import banked, lowrank
from kilotune.model.adapter_model import AdapterModel
from tests.conformance.cells import CELLS, METHOD_CASES, Cell, config_of, delta_of
from tests.conformance.checks import adapted, data
from tests.conformance.consumers import CONSUMERS, behind, results
from tests.conformance.declared import every_cell, every_quantised_cell
from tests.conformance.quantised import INN
from tests.conformance.quantised import Cell as QuantisedCell
from tests.conformance.test_routed import NAMES, ROUTED, two
from tests.support.models import randomize

LEADS = ((4,), (2, 3), (2, 1, 3))
# The first way to configure each method whose factors run with the layer.
SHARING: dict[str, AdapterConfig] = {
    name: config_of(cases[0], target_modules=["q", "k", "v"])
    for name, cases in METHOD_CASES.items()
    if delta_of(cases[0]) is LowRank
}


def same(found: list[torch.Tensor | None], right: list[torch.Tensor | None]) -> None:
    assert any(value is not None and value.any() for value in right[1:])
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


@every_cell("in place", CELLS, cost=3, consumer=list(CONSUMERS))
def test_what_comes_behind_may_write_into_the_output(cell: Cell, consumer: str) -> None:
    model, base = adapted(cell), cell.base(torch.float64)
    writes, makes = CONSUMERS[consumer]
    ran = 0
    for lead in LEADS:
        x = data(cell, *lead, dtype=torch.float64)
        try:
            base(x)
        except (RuntimeError, ValueError, AssertionError):  # the layer takes no such input
            continue
        ran += 1
        leaves = [] if cell.kind_case.ids else [x.requires_grad_()]
        with behind(model, makes, in_place=False):
            right = results(model, lambda x=x: model(x), *leaves)
        with behind(model, writes, in_place=True):
            same(results(model, lambda x=x: model(x), *leaves), right)
    assert ran


@every_cell("routed in place", ROUTED, consumer=list(CONSUMERS))
def test_so_it_may_behind_a_layer_with_routed_rows(cell: Cell, consumer: str) -> None:
    model, x = two(cell, torch.float64), data(cell, 4, dtype=torch.float64)
    for name in ("default", "other"):
        for _, p in model.adapter_parameters(name):
            p.requires_grad_()
    writes, makes = CONSUMERS[consumer]
    with behind(model, makes, in_place=False):
        right = results(model, lambda: model(x, adapter_names=NAMES))
    with behind(model, writes, in_place=True):
        same(results(model, lambda: model(x, adapter_names=NAMES)), right)


@every_quantised_cell(consumer=list(CONSUMERS))
def test_so_it_may_behind_a_quantised_layer(cell: QuantisedCell, consumer: str) -> None:
    model, _ = cell.models()
    writes, makes = CONSUMERS[consumer]
    for lead in LEADS:
        x = torch.randn(*lead, INN, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with behind(model, makes, in_place=False):
            right = results(model, lambda x=x: model(x), x)
        with behind(model, writes, in_place=True):
            torch.testing.assert_close(results(model, lambda x=x: model(x), x), right)


class _Projections(nn.Module):
    """q, k and v, fed by one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return q * k + v  # type: ignore[no-any-return]


def sharing(name: str) -> nn.Module:
    model = get_peft_model(_Projections().double(), SHARING[name]).double()
    randomize(model)
    return model


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("name", SHARING)
def test_so_it_may_behind_layers_that_share_a_product(name: str, consumer: str) -> None:
    model = sharing(name)
    writes, makes = CONSUMERS[consumer]
    for lead in LEADS:
        x = torch.randn(*lead, 8, dtype=torch.float64, requires_grad=True)
        with behind(model, makes, in_place=False):
            right = results(model, lambda x=x: model(x), x)
        with behind(model, writes, in_place=True):
            same(results(model, lambda x=x: model(x), x), right)


NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 12)),
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 5, 1)),
}


def few_ranks(net: str) -> AdapterModel:
    """Two adapters of rank 1: of so small a product, a route keeps nothing for the backward."""
    torch.manual_seed(0)
    config = VeraConfig(r=1, target_modules=["0"])
    model = get_peft_model(NETS[net](), config)
    model.add_adapter("other", config)
    for name in ("default", "other"):
        randomize(model, name)
    return model.double()


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("net", NETS)
def test_so_it_may_behind_rows_of_small_rank(net: str, consumer: str) -> None:
    model = few_ranks(net)
    writes, makes = CONSUMERS[consumer]
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with behind(model, makes, in_place=False):
        right = results(model, lambda: model(x, adapter_names=["default", "other"] * 2))
    with behind(model, writes, in_place=True):
        same(results(model, lambda: model(x, adapter_names=["default", "other"] * 2)), right)


@pytest.mark.parametrize("module", [lowrank, banked])
def test_a_planted_view_is_seen(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "no_view", lambda y: y.view(y.shape))
    model, x = few_ranks("linear"), torch.randn(4, 3, 8, dtype=torch.float64)
    names = ["default", "other"] * 2 if module is banked else None
    with behind(model, CONSUMERS["relu"][0], in_place=True), pytest.raises(RuntimeError, match="is a view"):
        model(x, adapter_names=names)
