"""The mark of a base's weights: the same for the same weights, however they are kept, and another one for others."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import LoraConfig, get_peft_model
from kilotune.convert import hollow
from kilotune.injection import base_mark
from kilotune.injection.base_mark import LETTERS, mark_of, same_base
from tests.conformance.quantised import STORAGE_SCHEMES
from tests.support.models import Nested, mlp, randomize, tiny_gpt2, tiny_llama

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Convs(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)


BASES: dict[str, Callable[[int], nn.Module]] = {
    "nested": lambda seed: Nested(seed=seed),
    "mlp": lambda seed: mlp(seed=seed),
    "llama": lambda seed: tiny_llama(seed=seed),
    "gpt2": lambda seed: tiny_gpt2(seed=seed),
    "convolutions": Convs,
    "large": lambda seed: Nested(blocks=70, seed=seed),  # more weights than bits
}


def differing(one: nn.Module, other: nn.Module) -> int:
    """How many of the 256 fine bits."""
    first, second = (base_mark._read(mark_of(net)) for net in (one, other))
    assert first is not None
    assert second is not None
    return sum((a ^ b).bit_count() for a, b in zip(first.fine, second.fine))


@pytest.mark.parametrize("name", BASES)
def test_the_same_weights_in_any_dtype(name: str) -> None:
    """Between float16 and bfloat16, two roundings of float32, a weight in 16 is another: 5 bits, and 25 are allowed."""
    marks = {dtype: mark_of(BASES[name](0).to(dtype)) for dtype in DTYPES}
    for mark in marks.values():
        assert mark is not None
        assert len(mark) == LETTERS
        assert all(same_base(mark, other) for other in marks.values())
    assert differing(BASES[name](0), BASES[name](0).to(torch.bfloat16)) == 0
    assert differing(BASES[name](0).bfloat16(), BASES[name](0).half()) <= 17


@pytest.mark.parametrize("name", BASES)
def test_other_weights(name: str) -> None:
    one, two = BASES[name](0), BASES[name](1)
    assert same_base(mark_of(one), mark_of(two)) is False
    assert same_base(mark_of(one.half()), mark_of(two.bfloat16())) is False
    if name != "mlp":  # 45 numbers, two matrices
        assert differing(one, two) > 50


def test_a_base_that_was_trained_further() -> None:
    """AdamW at 1e-3 for 20 steps: each weight moved by a few per cent of its size, the outputs hardly."""
    base = Nested(seed=0)
    trained = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        trained(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
    assert same_base(mark_of(base), mark_of(trained)) is False
    assert same_base(mark_of(base.half()), mark_of(trained.bfloat16())) is False


def test_a_base_into_which_an_adapter_was_merged() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomize(model, scale=0.02)
    before = mark_of(model.model)
    model.merge_adapter()
    assert mark_of(model.model) == before  # the base is still the same
    assert same_base(before, mark_of(model.merge_and_unload())) is False


# -- quantised -----------------------------------------------------------------------------------------


def wide(seed: int) -> nn.Module:
    """Six layers of sizes that every scheme takes, and a small one that none does."""
    torch.manual_seed(seed)
    layers = [nn.Linear(256, 256, bias=False) for _ in range(6)]
    return nn.Sequential(*layers, nn.Linear(256, 3))


@pytest.mark.filterwarnings("ignore")  # of the vendors
@pytest.mark.parametrize("scheme", STORAGE_SCHEMES, ids=lambda scheme: scheme.id)
def test_the_same_weights_quantised(scheme: Any) -> None:
    def quantised(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        net = wide(seed).to(dtype)
        for name, layer in list(net.named_children())[:-1]:
            setattr(net, name, scheme.quantise(layer))
        return net

    right = mark_of(quantised(0))
    assert right is not None
    for dtype in DTYPES:
        assert same_base(right, mark_of(wide(0).to(dtype))) is True
        assert same_base(right, mark_of(wide(1).to(dtype))) is False
    assert same_base(right, mark_of(quantised(0))) is True
    assert same_base(right, mark_of(quantised(1))) is False


def test_marks_of_two_schemes_agree() -> None:
    schemes = {scheme.storage: scheme for scheme in STORAGE_SCHEMES}
    marks = []
    for scheme in schemes.values():
        net = wide(0)
        for name, layer in list(net.named_children())[:-1]:
            setattr(net, name, scheme.quantise(layer))
        marks.append(mark_of(net))
    assert len(marks) > 2
    assert all(same_base(one, other) for one in marks for other in marks)


# -- what does not matter, and what cannot be told -----------------------------------------------------


def test_heads_that_an_adapter_brings_do_not_matter() -> None:
    one, two = Nested(seed=0), Nested(seed=0)
    nn.init.normal_(two.head.weight)
    assert same_base(mark_of(one), mark_of(two)) is False
    assert mark_of(one, ["head"]) == mark_of(two, ["head"])
    assert mark_of(one, ["head"]) != mark_of(one)


def test_other_modules_move_no_bits() -> None:
    """A token added, a head beside the others, tied weights or not: the rest of a large base says what it is."""
    one, two = Nested(blocks=70), Nested(blocks=70)
    two.another = nn.Linear(4, 4)
    two.stem = nn.Linear(7, 8)
    assert 0 < differing(one, two) <= 2
    assert same_base(mark_of(one), mark_of(two)) is True
    tied, untied = tiny_llama(tie=True), tiny_llama(tie=True)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert mark_of(tied) == mark_of(untied)


def test_adapters_change_nothing() -> None:
    base = Nested()
    before = mark_of(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", modules_to_save=None))
    model.add_adapter("head", LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
    randomize(model)
    assert mark_of(copy.deepcopy(model.model)) == before == mark_of(model.model)


def test_weights_that_are_not_here() -> None:
    with torch.device("meta"):
        far = Nested()
    assert mark_of(far) is None
    assert mark_of(hollow(far)) is None
    partly = Nested()
    partly.stem.to("meta")
    assert mark_of(partly) is None
    assert mark_of(nn.Tanh()) is None


class DTensor(nn.Parameter):
    """Called as torch's, of which each process has a part."""

    def full_tensor(self) -> Tensor:
        raise AssertionError("gathered, which waits for all processes")


def test_sharded_weights_are_passed_over_without_a_collective() -> None:
    base = Nested()
    base.blocks[1].mix["up"].register_parameter("weight", DTensor(torch.zeros(12, 8), requires_grad=False))
    assert mark_of(base) is None


@pytest.mark.parametrize(
    "mark", [None, "", "1", "4" + "A" * 64, "1" + "!" * 64, "1" + "A" * 63, "1" + "A" * 64, "ä" * 65]
)
def test_what_is_no_mark_tells_nothing(mark: str | None) -> None:
    assert same_base(mark, mark_of(Nested())) is None
    assert same_base(mark_of(Nested()), mark) is None


# -- kept ----------------------------------------------------------------------------------------------


def test_it_is_taken_anew_where_weights_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    base, taken = Nested(), []
    take = base_mark._take
    monkeypatch.setattr(base_mark, "_take", lambda *given: taken.append(1) or take(*given))
    first = mark_of(base)
    assert mark_of(base) == first
    assert len(taken) == 1
    base.load_state_dict(Nested(seed=1).state_dict())
    assert mark_of(base) == mark_of(Nested(seed=1))
    with torch.no_grad():
        base.stem.weight.mul_(2)
    doubled = mark_of(base)
    assert doubled != mark_of(Nested(seed=1))
    base.stem.weight = nn.Parameter(base.stem.weight.detach() / 2)
    assert mark_of(base) == mark_of(Nested(seed=1))
    base.blocks.append(nn.Linear(3, 3))
    assert len(taken) >= 6


def test_it_keeps_no_weight_alive() -> None:
    base = Nested()
    mark_of(base)
    seen = weakref.ref(base.stem.weight)
    gc.disable()
    try:
        del base
        assert seen() is None
    finally:
        gc.enable()


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        base = Nested()
        first = mark_of(base)
    assert first == mark_of(Nested()) == mark_of(base)


def test_the_bits_never_change() -> None:
    """What is in files must be found again: weights by arithmetic, a mark by heart."""
    from tests.golden.net import base

    assert mark_of(base("linear")) == "1LjoyCtioSISQ2BAERgyDAtYCLJhicAQk2IFoCQsASA4TQFuqwl0A3SI7Fyc0mSIj"
