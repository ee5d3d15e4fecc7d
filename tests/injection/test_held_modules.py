"""Modules that are reached by name and through plain Python containers too."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict, deque
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from kilotune import LoraConfig, PeftModel, UnsupportedError, get_peft_model
from kilotune.layers.adapted import AdaptedLayer
from tests.support.models import Snapshot, randomize

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


class Pair(NamedTuple):
    """A layer with a number."""

    layer: nn.Module
    times: int


class Net(nn.Module):
    """One layer; ``hold`` keeps it in another way too, and ``use`` runs it from there."""

    def __init__(self, hold: Callable[[nn.Module], Any], use: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.use, self.held = use, None
        self.__dict__["held"] = hold(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.use(self.held)(x.flip(0)) * 2
        return y


def _recursive(layer: nn.Module) -> list[Any]:
    held: list[Any] = [layer]
    held.append(held)
    return held


# how it is kept -> (what is kept, how it is taken from there)
KEPT: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], Any]]] = {
    "list": (lambda m: [1, m], lambda held: held[1]),
    "tuple": (lambda m: (m, "name"), lambda held: held[0]),
    "named tuple": (lambda m: Pair(m, 2), lambda held: held.layer),
    "dict": (lambda m: {"a": m}, lambda held: held["a"]),
    "ordered dict": (lambda m: OrderedDict(a=m), lambda held: held["a"]),
    "set": (lambda m: {m}, lambda held: next(iter(held))),
    "frozen set": (lambda m: frozenset([m]), lambda held: next(iter(held))),
    "deque": (lambda m: deque([m]), lambda held: held[0]),
    "nested": (lambda m: [{"a": (m,)}], lambda held: held[0]["a"][0]),
    "recursive": (_recursive, lambda held: held[1][1][0]),
    "attribute": (lambda m: m, lambda held: held),
}


def adapted(hold: Any, use: Any, **options: Any) -> PeftModel:
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["layer"], **options})
    model = get_peft_model(Net(hold, use).double(), config)
    randomize(model.double())
    return model


@pytest.mark.parametrize("kept", KEPT)
def test_it_is_adapted_at_both(kept: str) -> None:
    hold, use = KEPT[kept]
    base, plain = Net(hold, use).double(), Net(hold, use).double()
    before = base(X)
    model = adapted(hold, use)
    (slot,) = model.installed("default").slots().values()
    with torch.no_grad():
        plain.layer.weight += 2.0 * slot.get_parameter("lora_B") @ slot.get_parameter("lora_A")
    wanted = plain(X)
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(model(X), wanted)
    torch.testing.assert_close(copy.deepcopy(model)(X), wanted)
    with model.disable_adapter():
        assert torch.equal(model(X), before)
    model.merge_adapter()
    torch.testing.assert_close(model(X), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), wanted)
    found = model.unload()
    assert use(found.held) is found.layer
    assert torch.equal(found(X), before)


def test_another_adapter_and_what_is_trained_whole() -> None:
    hold, use = KEPT["nested"]
    model = adapted(hold, use)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["layer"]))
    net: Any = model.model
    assert use(net.held) is net.layer
    model.delete_adapter("default")
    assert use(net.held) is net.layer
    model.delete_adapter("second")
    assert use(net.held) is net.layer
    assert type(net.layer) is nn.Linear
    holder = nn.Sequential(Net(hold, use), nn.Linear(4, 4)).double()
    model = get_peft_model(holder, LoraConfig(r=2, target_modules=["1"], modules_to_save=["layer"])).double()
    randomize(model)
    y = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), y)


def test_a_part_that_knows_the_whole_goes_on_knowing_the_module_itself() -> None:
    """What a part writes there has to reach the module whose forward reads it."""

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.whole[0].count += 1  # type: ignore[attr-defined]
            return x

    class Block(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.part, self.count = Part(), 0
            self.part.whole = [self]

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.part(super().forward(x)) * self.count
            return y

    model = get_peft_model(nn.Sequential(Block()), LoraConfig(r=2, target_modules=["0"]))
    base = model.model[0].base_layer
    assert base.part.whole[0] is base
    model(X.float())
    assert base.count == 1


@pytest.mark.parametrize(
    "hold",
    [
        lambda m: m.forward,
        lambda m: [m.forward],
        lambda m: {"a": (m.__call__,)},
        lambda m: functools.partial(m),
        lambda m: functools.partial(m.forward),
    ],
)
def test_a_bound_call_is_refused(hold: Callable[[Any], Any]) -> None:
    base = Net(hold, lambda held: held)
    before = Snapshot.of(base)
    with pytest.raises(UnsupportedError, match="'layer' is called by 'held' of 'the model itself' too.*keep the mod"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["layer"]))
    assert Snapshot.of(base) == before


def test_a_layers_own_old_forward_is_its_own() -> None:
    """As accelerate keeps it, when it puts hooks around a module."""
    base = nn.Sequential(nn.Linear(4, 4))
    layer: Any = base[0]
    layer._old_forward = layer.forward
    layer.extra_repr = MethodType(functools.partial(lambda text, module: text, "by torchao"), layer)  # it has no name
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    assert isinstance(model.model[0], AdaptedLayer)
    assert layer._old_forward.__self__ is layer
