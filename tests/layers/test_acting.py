"""A change that says how it acts on an input is not built where a layer does no more than multiply by its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import pytest
import torch
from torch import Tensor, nn

from kilotune import AdapterConfig, PeftModel, get_peft_model
from kilotune.config import option
from kilotune.deltas import Delta, Full
from kilotune.fleet import AdapterBank, wrap
from kilotune.methods import METHODS, Method, Shared, Site
from tests.support.models import Nested, randomize

BUILT: list[str] = []
ACTED: list[str] = []


@final
@dataclass(frozen=True, kw_only=True)
class ShiftedConfig(AdapterConfig):
    peft_type: ClassVar[str] = "SHIFTED"

    dropout_rate: float = option(0.0, "Dropout on the adapter's input.")

    @property
    def dropout(self) -> float:
        return self.dropout_rate

    def faults(self) -> list[str]:
        return []


@final
class Shifted(Method[ShiftedConfig]):
    """Row i of the change has one trained number, at column i modulo in: so output i gets v_i x_(i mod in)."""

    name: ClassVar[str] = "shifted"
    config_cls: ClassVar[type[AdapterConfig]] = ShiftedConfig
    makes: type[Delta] = Full
    by_rows: bool = True
    keys: Mapping[str, str] = {"v": "shifted_v"}

    def count(self, sites: Sequence[Site]) -> int:
        return sum(site.out for site in sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        return {"v": torch.zeros(site.out, device=site.device())}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Full:
        v = params["v"]
        places = torch.arange(site.out) % site.inn

        def build() -> Tensor:
            BUILT.append(site.name)
            return torch.zeros(site.out, site.inn, dtype=v.dtype).index_put((torch.arange(site.out), places), v)

        def act(x: Tensor) -> Tensor:
            ACTED.append(site.name)
            return x[..., places] * v.to(x.dtype)

        return Full(build, act)


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "shifted", Shifted)
    BUILT.clear()
    ACTED.clear()


def changed(base: nn.Module, **options: Any) -> PeftModel:
    model = get_peft_model(base.double(), ShiftedConfig(**{"target_modules": "all-linear", **options})).double()
    randomize(model)
    return model


def test_it_acts_without_a_matrix_and_merges_to_the_same() -> None:
    model = changed(Nested()).eval()
    x = torch.randn(5, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = model(x)
    assert BUILT == []
    with model.disable_adapter():
        assert not torch.equal(y, model(x))
    merged = model.merge_and_unload()
    assert BUILT
    torch.testing.assert_close(merged(x), y, rtol=0, atol=1e-12)


def test_its_gradient_is_that_of_the_matrix() -> None:
    model, x = changed(Nested()), torch.randn(4, 6, dtype=torch.float64)
    own = dict(model.adapter_parameters())
    for parameter in own.values():
        parameter.requires_grad_()
    gradients = torch.autograd.grad(model(x).square().sum(), list(own.values()))
    step = 1e-6
    for (name, parameter), gradient in zip(own.items(), gradients, strict=True):
        losses = []
        for move in (step, -2 * step, step):
            with torch.no_grad():
                parameter[0] += move
                losses.append(float(model(x).square().sum()))
        assert float(gradient[0]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5), name


def test_layers_that_do_more_than_multiply_get_the_matrix() -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(20, 5))
    model = changed(net, target_modules=["0", "2"]).eval()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    y = model(x)
    assert set(BUILT) == {"0"}
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lead", [(4,), (4, 3), (4, 2, 3)])
def test_rows_of_several_adapters_in_one_pass(lead: tuple[int, ...]) -> None:
    model = changed(Nested(), bias="all").eval()
    model.add_adapter("other", ShiftedConfig(target_modules="all-linear", bias="all"))
    randomize(model, "other", seed=4)
    model.double()
    rows = ["default", "other", None, "other"]
    x = torch.randn(*lead, 6, dtype=torch.float64)
    y = model(x, adapter_names=rows)
    assert len(ACTED) == len(set(ACTED)) > 1
    assert BUILT == []
    for place, name in enumerate(rows):
        if name is None:
            with model.disable_adapter():
                own = model(x)
        else:
            model.set_adapter(name)
            own = model(x)
        torch.testing.assert_close(y[place], own[place], rtol=0, atol=1e-12)


def test_rows_of_a_bank_in_one_pass(tmp_path: Path) -> None:
    config = ShiftedConfig(target_modules="all-linear")
    bank = AdapterBank(wrap(Nested()).eval(), config, slots=3)
    alone = {}
    for seed, name in enumerate("abc"):
        model = alone[name] = get_peft_model(Nested(), config)
        randomize(model, seed=seed)
        model.eval().save_pretrained(tmp_path / name)
        bank.put(name, tmp_path / name)
    x, names = torch.randn(4, 2, 6), ["c", "a", "b", "a"]
    ACTED.clear()
    y = bank.model(x, adapter_names=names)
    assert len(ACTED) == len(set(ACTED)) > 1
    for place, name in enumerate(names):
        torch.testing.assert_close(y[place], alone[name](x)[place], rtol=1e-5, atol=1e-5)
