"""Parameters that a module's own code reaches in other ways than by their names in its forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilotune import LoraConfig, PeftModel, get_peft_model
from tests.support.models import randomize
from tests.support.readers import seeded


class Holder(nn.Module):
    """``part`` with a name; of what it gives the first."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        made = self.part(x)
        first: Tensor = made[0] if isinstance(made, tuple) else made
        return first


class Own(nn.Module):
    """Its matrices come by a method, by a property, from a list of its own and from a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.matrix = nn.Parameter(torch.empty(5, 4)), nn.Parameter(torch.empty(3, 4))
        self.listed, self.pair = [self.matrix], (self.table, 1)
        self.kept: Tensor | None = None

    @property
    def turned(self) -> Tensor:
        return self.matrix.t()

    def mixed(self, x: Tensor) -> Tensor:
        return x + self.table

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        y = self.mixed(x) @ self.turned + F.linear(x, self.matrix) + x @ self.listed[0].mT
        return y + self.pair[0].sum() * self.pair[1]


class Heir(Own):
    def mixed(self, x: Tensor) -> Tensor:
        return super().mixed(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self, Heir)
        return super().forward(x).tanh()


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


STACK = {"num_layers": 2, "bidirectional": True}
CASES: dict[str, tuple[Any, list[str], Tensor]] = {
    "lstm": (lambda: nn.LSTM(4, 6), ["weight_ih_l0", "weight_hh_l0"], rand(3, 5, 4)),
    "lstm of two layers": (lambda: nn.LSTM(4, 6, **STACK), ["weight_hh_l1", "weight_ih_l0_reverse"], rand(3, 5, 4)),
    "gru": (lambda: nn.GRU(4, 6, **STACK), ["weight_ih_l0", "weight_hh_l1_reverse"], rand(3, 5, 4)),
    "rnn": (lambda: nn.RNN(4, 6), ["weight_ih_l0"], rand(3, 5, 4)),
    "cell": (lambda: nn.LSTMCell(4, 6), ["weight_ih", "weight_hh"], rand(5, 4)),
    "own": (Own, ["table", "matrix"], rand(2, 5, 4)),
    "inherited": (Heir, ["table", "matrix"], rand(2, 5, 4)),
}


def adapted(case: str) -> PeftModel:
    make, targets, _ = CASES[case]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=targets)
    model = get_peft_model(seeded(Holder(make())), config)
    randomize(model.double())
    return model


def changed(case: str, model: PeftModel) -> nn.Module:
    """The plain module with W + (alpha / r) B A by the formula."""
    plain = seeded(Holder(CASES[case][0]()))
    with torch.no_grad():
        for name, slot in model.installed("default").slots().items():
            plain.get_parameter(name).add_(2.0 * slot.get_parameter("lora_B") @ slot.get_parameter("lora_A"))
    return plain


@pytest.mark.parametrize("case", CASES)
def test_a_parameter_is_adapted_wherever_its_module_reads_it(case: str) -> None:
    """https://github.com/huggingface/peft/issues/1116 asks for recurrent layers."""
    x = CASES[case][2]
    base = seeded(Holder(CASES[case][0]()))(x)
    model = adapted(case)
    wanted = changed(case, model)(x)
    assert (wanted - base).abs().max() > 1e-2
    y = model(x)
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.grad is not None, name
        direction, step, values = torch.ones_like(parameter), 1e-5, []
        with torch.no_grad():
            for sign in (1, -2, 1):
                parameter.add_(direction, alpha=sign * step)
                values.append(float(model(x).square().sum()))
        assert float(parameter.grad.sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6), name
    with torch.no_grad():
        for _ in range(2):  # what ran before leaves nothing behind
            with model.disable_adapter():
                assert torch.equal(model(x), base)
            torch.testing.assert_close(model(x), wanted)
        model.merge_adapter()
        torch.testing.assert_close(model(x), wanted)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), wanted)
        torch.testing.assert_close(model.merge_and_unload()(x), wanted)


def test_what_a_forward_keeps_stays_with_the_module_but_for_adapted_values() -> None:
    model = adapted("own")
    x = CASES["own"][2]
    part = model.model.part.base_layer
    model(x)
    assert part.kept is x
    model = adapted("lstm")
    part = model.model.part.base_layer
    model(CASES["lstm"][2])
    assert part._flat_weights[0] is part.weight_ih_l0
    model.unload()
    plain = seeded(Holder(nn.LSTM(4, 6)))
    assert torch.equal(model.model(CASES["lstm"][2]), plain(CASES["lstm"][2]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize("case", ["lstm", "own"])
def test_compiled(case: str) -> None:
    model = adapted(case)
    x = CASES[case][2]
    y = model(x)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), y)
