"""Training: losses fall, the base stays, accumulation and precision behave as in any PyTorch model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilotune import AdapterConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from tests.support.guards import frozen_matrices_are_one, inactive_adapters_stay
from tests.support.models import Nested, bits, randomize, trained

BOTH: list[AdapterConfig] = [
    VeraConfig(r=16, target_modules="all-linear", d_initial=0.5),
    LoraConfig(r=2, target_modules="all-linear"),
]
both = pytest.mark.parametrize("config", BOTH, ids=["vera", "lora"])


def task() -> tuple[Tensor, Tensor]:
    """Three classes that a linear rule tells apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 6, generator=generator)
    return x, x[:, :3].argmax(dim=1)


def run(model: PeftModel, steps: int = 20, parts: int = 1, optimizer: Any = None) -> list[float]:
    x, y = task()
    optimizer = optimizer or torch.optim.AdamW([p for _, p in trained(model)], lr=0.05)
    losses = []
    for _ in range(steps):
        total = 0.0
        for xs, ys in zip(x.chunk(parts), y.chunk(parts)):
            loss = F.cross_entropy(model(xs), ys) / parts
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def base_bits(model: PeftModel) -> dict[str, bytes]:
    return {
        name: value for name, value in bits(model).items() if "adapters" not in name and "modules_to_save" not in name
    }


@both
@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"modules_to_save": ["head"]}], ids=str)
def test_twenty_steps_lower_the_loss_and_leave_the_base_alone(config: AdapterConfig, options: dict[str, Any]) -> None:
    model = get_peft_model(Nested(), config.replace(**options))
    before = base_bits(model)
    losses = run(model)
    assert losses[-1] < 0.5 * losses[0]
    assert base_bits(model) == before
    assert all(torch.isfinite(p).all() for _, p in model.adapter_parameters())


def test_b_and_big_b_leave_zero() -> None:
    for config, key in ((BOTH[0], "vera_lambda_b"), (BOTH[1], "lora_B")):
        model = get_peft_model(Nested(), config)
        starts = [p for name, p in model.adapter_parameters() if name.endswith(key)]
        assert starts
        assert all(p.count_nonzero() == 0 for p in starts)
        run(model, steps=2)
        assert all(p.count_nonzero() > 0 for p in starts)


@both
def test_eight_small_batches_train_like_one_large(config: AdapterConfig) -> None:
    torch.manual_seed(0)
    one = get_peft_model(Nested(), config).double()
    torch.manual_seed(0)
    eight = get_peft_model(Nested(), config).double()

    def double_run(model: PeftModel, parts: int) -> list[float]:
        x, y = task()
        optimizer = torch.optim.SGD([p for _, p in trained(model)], lr=0.3)
        losses = []
        for _ in range(8):
            for xs, ys in zip(x.double().chunk(parts), y.chunk(parts)):
                (F.cross_entropy(model(xs), ys) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(F.cross_entropy(model(x.double()), y).item())
        return losses

    assert double_run(one, 1) == pytest.approx(double_run(eight, 8), rel=1e-9)


@both
def test_training_is_repeatable(config: AdapterConfig) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(run(get_peft_model(Nested(), config.replace(**{dropout_of(config): 0.3})), steps=5))
    assert results[0] == results[1]


def dropout_of(config: AdapterConfig) -> str:
    return next(name for name in config.option_names() if name.endswith("_dropout"))


@both
def test_under_autocast_the_loss_falls_too(config: AdapterConfig) -> None:
    model = get_peft_model(Nested(), config)
    x, y = task()
    optimizer = torch.optim.AdamW([p for _, p in trained(model)], lr=0.05)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@both
def test_two_adapters_train_in_turn_and_do_not_touch_each_other(config: AdapterConfig) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Nested(), config, "a")
    alone = run(model, steps=5)
    values = {name: p.detach().clone() for name, p in model.adapter_parameters("a")}
    model.add_adapter("b", VeraConfig(r=32, target_modules=["stem", "head"]))
    model.set_adapter("b")
    x, _ = task()
    inactive_adapters_stay(model, x, "a")
    run(model, steps=5)
    for name, parameter in model.adapter_parameters("a"):
        assert torch.equal(parameter, values[name])
    torch.manual_seed(0)
    again = get_peft_model(Nested(), config, "a")
    assert run(again, steps=5) == alone


def test_two_active_adapters_train_together() -> None:
    model = get_peft_model(Nested(), BOTH[0], "a")
    model.add_adapter("b", BOTH[1])
    model.set_adapter(["a", "b"])
    losses = run(model)
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_matrices_stay_one_through_training() -> None:
    model = get_peft_model(Nested(), BOTH[0])
    before = [t.clone() for t in model.projections.tensors()]
    run(model, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.projections.tensors(), strict=True))
    assert not any(t.requires_grad for t in model.projections.tensors())
    frozen_matrices_are_one(model, lambda m: m(task()[0]))


def test_what_a_user_unfreezes_stays_so_when_adapters_are_added() -> None:
    model = get_peft_model(Nested(), BOTH[0], "a")
    norm = model.get_base_model().get_submodule("blocks.0.norm")
    norm.weight.requires_grad_(True)
    model.add_adapter("b", BOTH[1])
    model.set_adapter("b")
    assert norm.weight.requires_grad
    x, y = task()
    F.cross_entropy(model(x), y).backward()
    assert norm.weight.grad is not None


@both
def test_activations_of_the_frozen_factors_are_not_kept_twice(config: AdapterConfig) -> None:
    """What autograd keeps for an adapted layer: its input, and vectors of the rank; no copy of a frozen matrix."""
    base = nn.Sequential(nn.Linear(64, 48))
    model = get_peft_model(base, config.replace(r=8))
    randomize(model)
    weights = {t.untyped_storage().data_ptr() for t in (*model.projections.tensors(), *model.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    x = torch.randn(100, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    # At most x, h before and after d, the output before b, and small vectors.
    assert sum(kept.values()) <= 100 * (64 + 8 + 8 + 48) + 64 + 48 + 16
