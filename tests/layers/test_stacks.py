"""Rows that run a stack: what runs how often, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import BitfitConfig, LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model
from kilotune.errors import AdapterError, UnsupportedError
from kilotune.fleet import AdapterBank
from kilotune.layers import routing
from kilotune.layers.route import Cohort
from tests.support.models import Nested, randomize, tiny_classifier, tiny_llama

ALL = "all-linear"
VERA, LORA = VeraConfig(r=6, target_modules=ALL), LoraConfig(r=3, target_modules=ALL)


def house(base: nn.Module, people: int = 3, shared: Any = LORA, own: Any = VERA, scale: float = 0.5) -> PeftModel:
    """``base`` with a shared adapter "house" and personal ones "p0", "p1", ..."""
    model = get_peft_model(base, shared, "house")
    for i in range(people):
        model.add_adapter(f"p{i}", own)
    for i, name in enumerate(model.peft_config):
        randomize(model, name, seed=20 + i, scale=scale)
    return model.eval()


def together(model: PeftModel, names: list[str], x: Tensor) -> Tensor:
    model.set_adapter(names)
    found: Tensor = model(x)
    return found


def test_the_shared_one_runs_once_for_all_rows_and_the_personal_ones_in_one_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = house(Nested()), torch.randn(5, 4, 6)
    seen: list[tuple[str, ...]] = []
    real = routing._changed

    def counted(layer: Any, cohort: Cohort, owners: Any, x: Tensor, y: Tensor) -> Tensor:
        seen.append((*cohort.names, f"{x.shape[0]} rows"))
        return real(layer, cohort, owners, x, y)

    monkeypatch.setattr(routing, "_changed", counted)
    rows = [["house", "p0"], ["house", "p1"], ["house", "p2"], "house", ["house", "p0"]]
    routed = model(x, adapter_names=rows)
    layers = len(model.adapted_layers())
    assert seen == [("house", "5 rows"), ("p0", "p1", "p2", "4 rows")] * layers
    seen.clear()
    rows[3] = "p1"  # alone: in the same pass as those that stand on the house style
    mixed = model(x, adapter_names=rows)
    assert seen == [("house", "4 rows"), ("p0", "p1", "p2", "5 rows")] * layers
    monkeypatch.undo()
    for i in (0, 1, 2, 4):
        torch.testing.assert_close(routed[i], mixed[i])
    torch.testing.assert_close(mixed[3], together(model, ["p1"], x)[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routed[3], together(model, ["house"], x)[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routed[4], together(model, ["house", "p0"], x)[4], rtol=1e-4, atol=1e-5)


def test_two_orders_and_two_of_one_form_in_one_batch() -> None:
    """No level can be found for the forms then, and each place in a row is one."""
    model, x = house(Nested(), own=get_config("ia3", target_modules=["up"], feedforward_modules=[])), torch.randn(4, 6)
    rows = [["p0", "p1"], ["house", "p0"], ["p0", "house"], ["p2", "p1", "house"]]
    routed = model(x, adapter_names=rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(routed[i], together(model, row, x)[i], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(routed[1], together(model, ["p0", "house"], x)[1], atol=1e-3)  # the order matters


@pytest.mark.parametrize("hooked", [False, True])
def test_what_scales_the_output_scales_what_is_beneath_it(hooked: bool) -> None:
    """By itself, without a second run of the base; but with it where somebody looks at what the base gives."""
    model, x = house(Nested(), own=get_config("ia3", target_modules=["up"], feedforward_modules=[])), torch.randn(3, 6)
    runs: list[int] = []
    layer = model.adapted_layers()["blocks.0.mix.up"]
    real = layer.kind.run
    if hooked:
        layer.base_layer.register_forward_hook(lambda module, args, output: None)
    rows = [["house", "p0"], ["house", "p1"], "p2"]
    expected = [together(model, [row] if isinstance(row, str) else row, x)[i] for i, row in enumerate(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer.kind), "run", lambda self, *args: (runs.append(1), real(*args))[1])
        routed = model(x, adapter_names=rows)
    for i, row in enumerate(expected):
        torch.testing.assert_close(routed[i], row, rtol=1e-4, atol=1e-5)
    assert bool(runs) is hooked


def test_a_stack_of_one_is_bit_for_bit_the_adapter() -> None:
    model, x = house(Nested()), torch.randn(4, 6)
    plain = model(x, adapter_names=["p0", "house", "p1", None])
    assert torch.equal(plain, model(x, adapter_names=[["p0"], ("house",), ["p1"], []]))


@pytest.mark.parametrize("own", ["vera", "lora", "ia3", "dora"])
def test_personal_ones_from_a_bank_on_a_shared_one_in_the_model(own: str) -> None:
    config = {
        "vera": VERA,
        "lora": LORA,
        "ia3": get_config("ia3", target_modules=["up", "down"], feedforward_modules=["down"]),
        "dora": LoraConfig(r=2, target_modules=ALL, use_dora=True),
    }[own]
    model, x = house(Nested(), people=2, own=config), torch.randn(4, 3, 6)
    rows = [["house", "p1"], ["house", "p0"], "p0", ["house", "p1"]]
    expected = [together(model, [row] if isinstance(row, str) else row, x)[i] for i, row in enumerate(rows)]
    bank = AdapterBank(model, config, slots=4)
    for name in ("p0", "p1"):
        own_numbers = {key: p.detach().clone() for key, p in model.adapter_parameters(name)}
        model.delete_adapter(name)
        bank.put(name, own_numbers)
    for _ in range(2):  # the second time out of what is known of the route
        routed = model(x, adapter_names=rows)
        for i, row in enumerate(expected):
            torch.testing.assert_close(routed[i], row, rtol=1e-4, atol=1e-5)
    bank.close()


@pytest.mark.parametrize("own", [VERA, LoraConfig(r=2, target_modules=ALL, use_dora=True)], ids=["vera", "dora"])
def test_packed_tokens_and_beams(own: Any) -> None:
    model = house(tiny_llama(), own=own, scale=2.0)
    ids = torch.randint(2, 32, (3, 5), generator=torch.Generator().manual_seed(1))
    rows = [["house", "p0"], "house", ["house", "p2"]]
    more: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    routed = model.generate(input_ids=ids, attention_mask=mask, adapter_names=rows, **more)
    for i, row in enumerate(rows):
        model.set_adapter(row)
        alone = model.generate(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], **more)
        assert routed[i, : alone.shape[1]].tolist() == alone[0].tolist()
    net, x = house(Nested(), own=own), torch.randn(1, 7, 6)
    with net.route([["house", "p1"], "p0", ["house", "p0"]], lengths=[2, 1, 4]):
        packed = net(x)
    for place, row in ((slice(0, 2), ["house", "p1"]), (slice(2, 3), ["p0"]), (slice(3, 7), ["house", "p0"])):
        torch.testing.assert_close(packed[:, place], together(net, row, x[:, place]), rtol=1e-4, atol=1e-5)


def test_of_two_heads_the_upper_ones_runs() -> None:
    with_head = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = house(tiny_classifier(), people=2, shared=with_head, own=VeraConfig(r=4, target_modules=["key"]))
    model.add_adapter("own-head", with_head)
    randomize(model, "own-head", seed=5)
    model.eval()
    ids = torch.randint(2, 32, (5, 6))
    rows = [["house", "own-head"], ["house", "p0"], "house", None, ["own-head", "house"]]
    routed = model(input_ids=ids, adapter_names=rows).logits
    for i, row in enumerate(rows):
        if row is None:
            with model.disable_adapter():
                own = model(input_ids=ids).logits[i]
        else:
            model.set_adapter(row)
            own = model(input_ids=ids).logits[i]
        torch.testing.assert_close(routed[i], own, rtol=1e-4, atol=1e-5, msg=str(row))


def test_what_cannot_be_a_stack_says_so() -> None:
    model, x = house(Nested(), people=2), torch.randn(2, 6)
    model.add_adapter("whole", LoraConfig(r=2, target_modules=["stem"], modules_to_save=["blocks.0"]))
    neck = get_config("bottleneck", target_modules=["mix.up"], width=2)
    model.add_adapter("neck", neck)
    model.add_adapter("neck2", neck)
    with pytest.raises(UnsupportedError) as caught:
        model(x, adapter_names=[["neck", "neck2"], None])
    assert "'neck' and 'neck2' cannot be a stack" in str(caught.value)
    assert "both not linear" in str(caught.value)
    with pytest.raises(UnsupportedError, match="'whole' replaces it whole, and 'p0' changes"):
        model(x, adapter_names=[["whole", "p0"], "p1"])
    for names, message in (
        ([["house", "house"], None], "an adapter cannot stand on itself, as in ['house', 'house']"),
        ([["house", None], None], "a list of names for a stack, got ['house', None]"),
        ([["house", "__base__"], None], "got ['house', '__base__']"),
        ([{"house"}, None], "got {'house'}"),
        ([["house", "p7"], None], "- 'p7'. Did you mean 'p1'?"),
    ):
        with pytest.raises(AdapterError, match=re.escape(message)):
            model(x, adapter_names=names)


def test_the_gradient_reaches_the_personal_ones_alone() -> None:
    model, x = house(Nested(), people=2), torch.randn(3, 6)
    model.set_adapter("house", inference_mode=True)
    model.set_requires_grad(["p0", "p1"])
    model(x, adapter_names=[["house", "p0"], ["house", "p1"], "house"]).square().sum().backward()
    assert all(p.grad is None for _, p in model.adapter_parameters("house"))
    for name in ("p0", "p1"):
        assert all(p.grad is not None and p.grad.any() for _, p in model.adapter_parameters(name))


def test_gradient_checkpointing_runs_the_stack_again() -> None:
    model = house(tiny_llama(), people=2)
    model.set_adapter(["p0", "p1"])  # any that want gradients
    model.train()
    ids = torch.randint(2, 32, (2, 5))
    rows = [["house", "p0"], ["house", "p1"]]
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            model.get_base_model().config.use_cache = False
        with model.route(rows):
            model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for _, p in model.adapter_parameters("p0")])  # type: ignore[union-attr]
        model.zero_grad()
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_biases_add_up(tmp_path: Path) -> None:
    model, x = (
        house(Nested(), people=2, shared=BitfitConfig(), own=LoraConfig(r=2, target_modules=ALL, bias="all")),
        (torch.randn(3, 6)),
    )
    rows = [["house", "p0"], ["house", "p1"], ["house", "p0"]]
    routed = model(x, adapter_names=rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(routed[i], together(model, row, x)[i], rtol=1e-4, atol=1e-5)
