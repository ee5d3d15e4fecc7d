"""Layers whose adapter had no part in the first forward with gradients."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kilotune import BitfitConfig, LoraConfig, PeftModel, UniLoraConfig, UnusedLayersWarning, get_peft_model

X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    """Of its layers one runs, one is read, one is read where no adapter reaches, and of two experts one runs."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.run, self.read, self.bare = (nn.Linear(4, 4) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.reentrant, self.odd = reentrant, False

    def inner(self, x: Tensor) -> Tensor:
        x = F.linear(self.run(x), self.read.weight, self.read.bias)
        return torch.tanh(x @ dict(self.bare.named_parameters()).popitem()[1].T if self.odd else x)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            x = self.inner(x)
        else:
            x = checkpoint(self.inner, x.clone().requires_grad_(), use_reentrant=self.reentrant)
        made: Tensor = self.experts[1](x)
        return made


def net(targets: list[str] | None = None, base: nn.Module | None = None, **options: Any) -> PeftModel:
    targets = targets or ["run", "read", "bare", "experts.0", "experts.1", "experts.2"]
    return get_peft_model(Net() if base is None else base, LoraConfig(r=2, target_modules=targets, **options))


def quiet(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedLayersWarning)
        model(X)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_they_are_named_in_one_warning(reentrant: bool | None) -> None:
    model = net(base=Net(reentrant)).train()
    with pytest.warns(UnusedLayersWarning) as caught:
        y = model(X)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "3 of 6 layers" in text
    assert "'bare', 'experts.0' and 1 more of 'experts.*'" in text
    assert "experts that got no token" in text
    assert "'run'" not in text
    assert "'read'" not in text
    y.sum().backward()  # a checkpoint runs its part again
    quiet(model)
    unused = {"bare", "experts.0", "experts.2"}
    for name, parameter in model.adapter_parameters():
        assert (parameter.grad is None) is (name.rpartition(".")[0] in unused), name


def test_not_in_evaluation_nor_without_gradients_and_then_it_still_waits() -> None:
    model = net(["run", "bare"]).eval()
    quiet(model)
    model.train()
    with torch.no_grad():
        quiet(model)
    with model.disable_adapter():
        quiet(model)
    with model.route(["default", None, None]):
        quiet(model)
    with pytest.warns(UnusedLayersWarning):
        model(X)
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks


def test_a_forward_that_fails_is_not_the_first() -> None:
    model = net().train()
    with pytest.raises(RuntimeError, match="shapes"):
        model(X[:, :3])
    with pytest.warns(UnusedLayersWarning):
        model(X)


def test_the_base_model_called_by_itself_is_watched() -> None:
    """As a Trainer that got it from for_trainer() calls it."""
    model = net().train()
    with pytest.warns(UnusedLayersWarning):
        model.model(X)


def test_all_used_says_nothing_and_nothing_is_left_behind() -> None:
    model = net(["run", "read", "experts.1"]).train()
    assert model.model._forward_hooks
    quiet(model)
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks
    model = net(["run"])
    base = model.unload()
    assert not base._forward_hooks
    assert not base._forward_pre_hooks


def test_each_adapter_is_watched_once() -> None:
    model = net(["run"]).train()
    quiet(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["bare"]))
    quiet(model)  # it is not active yet
    model.set_adapter(["default", "second"])
    with pytest.warns(
        UnusedLayersWarning, match=r"1 of 2 layers with the adapters \['default', 'second'\].*: 'bare'\."
    ):
        model(X)
    model.set_adapter("second")
    quiet(model)
    model.delete_adapter("second")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["bare"]))
    model.set_adapter("second")
    with pytest.warns(UnusedLayersWarning):
        model(X)


def test_what_is_frozen_or_merged_is_not_missed() -> None:
    model = net(["bare"], inference_mode=True).train()
    quiet(model)
    model = net(["bare"]).train()
    model.merge_adapter()
    quiet(model)
    model.unmerge_adapter()
    with pytest.warns(UnusedLayersWarning):
        model(X)


def test_vectors_that_an_adapter_has_once_count_for_each_layer() -> None:
    config = UniLoraConfig(r=2, theta_d_length=8, unilora_dropout=0.0, target_modules=["run", "bare"])
    with pytest.warns(UnusedLayersWarning, match="1 of 2 layers.*: 'bare'"):
        get_peft_model(Net(), config).train()(X)


def test_a_bias_is_read_too() -> None:
    with pytest.warns(UnusedLayersWarning, match="1 of 3 layers.*: 'bare'"):
        get_peft_model(Net(), BitfitConfig(target_modules=["run", "read", "bare"])).train()(X)


def test_copies_wait_for_their_own_first_forward() -> None:
    model = net().train()
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    for copied in (copy.deepcopy(model), torch.load(held, weights_only=False)):
        with pytest.warns(UnusedLayersWarning):
            copied(X)
    with pytest.warns(UnusedLayersWarning):
        model(X)


def test_compiled_models_are_left_alone() -> None:
    """What compiled code runs is not seen, so nothing is said of it."""
    model = net().train()
    torch.compiler.reset()
    quiet(torch.compile(model, backend="eager", fullgraph=True))
    model = net().train()
    model.model.run = torch.compile(model.model.run, backend="eager")
    quiet(model)
