"""A second tree over the same weights: no number twice, and what is done to one tree is not done to the other."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import LoraConfig, get_peft_model
from kilotune.errors import UnsupportedError
from kilotune.fleet.stepper.adam import Adam
from kilotune.fleet.stepper.operations import Forward, ForwardBackward, OptimStep
from kilotune.fleet.stepper.stepper import Stepper
from kilotune.serve.twin import twin_of
from tests.support.engine_support import nf4_llama
from tests.support.fleet_support import token_rows
from tests.support.models import tiny_gpt2, tiny_llama


def bfloat16() -> Any:
    return tiny_llama(tie=True).to(torch.bfloat16)


def int8() -> Any:
    import torchao.quantization as quantization

    model = tiny_llama()
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    return model


BASES: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tie=True),
    "gpt2": tiny_gpt2,
    "bfloat16": bfloat16,
    "nf4": nf4_llama,
    "torchao-int8": int8,
}
IDS = torch.tensor([[3, 4, 5, 6, 7]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def memory(root: nn.Module) -> dict[int, int]:
    """The bytes of all memory that a model holds, by its address, looked for outside of parameters and buffers too."""
    seen: dict[int, Any] = {}
    found: dict[int, int] = {}
    left: list[Any] = [root]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, (type, type(gc))) or callable(getattr(one, "__code__", None)):
            continue
        seen[id(one)] = one
        if type(one) in (Tensor, nn.Parameter):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        if not hasattr(one, "__globals__"):
            left += gc.get_referents(one)
    return found


@pytest.mark.parametrize("base", BASES)
def test_it_computes_the_same_and_no_number_is_there_twice(base: str) -> None:
    model = BASES[base]()
    expected = logits(model.train())  # in eval, NF4 layers would pack their weights anew on some CPUs
    model.eval()
    before = memory(model)
    twin: Any = twin_of(model)
    assert sum(size for place, size in memory(twin).items() if place not in before) <= 64  # nothing of a weight's size
    assert sum(before.values()) > 1000
    torch.testing.assert_close(logits(twin), expected, rtol=1e-5, atol=1e-6)
    own, other = (dict(one.named_parameters(remove_duplicate=False)) for one in (model, twin))
    assert own.keys() == other.keys()
    assert all(own[name] is other[name] for name in own)
    assert not {*map(id, model.modules())} & {*map(id, twin.modules())}
    assert twin.config is not model.config


@pytest.mark.parametrize("base", BASES)
def test_the_twin_learns_and_the_base_answers_as_before(base: str) -> None:
    model = BASES[base]().eval()
    model.config.use_cache = True
    rows = token_rows(3, 0)
    twin = twin_of(model)
    expected = logits(model)
    with Stepper(twin) as stepper:
        stepper.open("ann", LoraConfig(r=2, target_modules="all-linear"))
        scored = [stepper.submit("ann", ForwardBackward(rows))]
        stepper.submit("ann", OptimStep(Adam(rate=0.1)))
        scored.append(stepper.submit("ann", Forward(rows)))
        while stepper.work():
            assert torch.equal(logits(model), expected)  # in the middle of it, too
    assert scored[1].result().loss < scored[0].result().loss
    assert model.config.use_cache is True
    assert all(type(module).__module__.partition(".")[0] != "kilotune" for module in model.modules())


def test_attention_of_one_is_not_that_of_the_other() -> None:
    model = tiny_llama()
    model.set_attn_implementation("eager")
    twin: Any = twin_of(model)
    assert (model.config._attn_implementation, twin.config._attn_implementation) == ("eager", "sdpa")


def test_tensors_are_found_wherever_a_module_holds_them() -> None:
    class State:
        def __init__(self) -> None:
            self.scales = [torch.rand(1000)]

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = State()
            self.tables = {"a": (torch.rand(1000),)}

    model = Odd()
    twin: Any = twin_of(model)
    assert twin.state is not model.state
    assert twin.state.scales[0] is model.state.scales[0]
    assert twin.tables["a"][0] is model.tables["a"][0]


def test_what_cannot_have_a_twin_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="adapted already; make its twin before that"):
        twin_of(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))
    model: Any = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(UnsupportedError, match="the Linear holds what cannot be copied: cannot pickle"):
        twin_of(model)
