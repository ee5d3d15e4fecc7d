"""Rows of one batch through different adapters: each row gives what its adapter alone gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import AdapterConfig, LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model
from kilotune.errors import AdapterError, MergeError, UnsupportedError
from tests.support.models import Nested, randomize, tiny_classifier, tiny_gpt2, tiny_llama

ALL = "all-linear"
CONFIGS: dict[str, AdapterConfig] = {
    "vera": VeraConfig(r=6, target_modules=ALL),
    "vera-shape": VeraConfig(r=6, target_modules=ALL, sharing="shape"),
    "vera-peft": VeraConfig(r=6, target_modules=ALL, generator="peft"),
    "vera-bias": VeraConfig(r=6, target_modules=ALL, bias="all"),
    "lora": LoraConfig(r=3, target_modules=ALL),
    "lora-fa": LoraConfig(r=3, target_modules=ALL, lora_fa=True),
    "dora": LoraConfig(r=3, target_modules=ALL, use_dora=True),
    "dvora": VeraConfig(r=6, target_modules=ALL, use_dora=True),
    "ia3": get_config("ia3", target_modules=["up", "down"], feedforward_modules=["down"]),
    "loraxs": get_config("loraxs", r=3, target_modules=ALL),
    "unilora": get_config("unilora", target_modules=ALL),
    "vblora": get_config(
        "vblora", r=2, num_vectors=5, vector_length=2, init_vector_bank_bound=1.0, target_modules=["stem"]
    ),
    "bitfit": get_config("bitfit", target_modules=["stem", "up", "head"]),
    "bottleneck": get_config("bottleneck", target_modules=["mix.up", "mix.down"]),
    "intrinsic": get_config("intrinsic", target_modules=ALL),
}


def with_adapters(base: nn.Module, configs: Sequence[AdapterConfig], scale: float = 0.5) -> PeftModel:
    """``base`` with adapters a0, a1, ..., all different."""
    model = get_peft_model(base, configs[0], "a0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{i}", config)
    for i in range(len(configs)):
        randomize(model, f"a{i}", seed=10 + i, scale=scale)
    return model.eval()


def alone(model: PeftModel, name: str | None, run: Callable[[], Tensor]) -> Tensor:
    """What ``run`` gives with one adapter, or the base."""
    if name is None:
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


def rows_equal(model: PeftModel, names: Sequence[str | None], x: Tensor, atol: float = 1e-5) -> None:
    """Each row of the routed batch is its adapter's own row; rows of different adapters differ."""
    with torch.no_grad():
        routed = model(x, adapter_names=list(names))
        apart = {name: alone(model, name, lambda: model(x)) for name in dict.fromkeys(names)}
    for row, name in enumerate(names):
        assert torch.allclose(routed[row], apart[name][row], atol=atol, rtol=1e-4), f"row {row} is not {name}'s"
        for other, output in apart.items():
            assert other == name or not torch.allclose(routed[row], output[row], atol=10 * atol), "no difference"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", [(5, 6), (5, 4, 6)], ids=["rows", "tokens"])
def test_each_row_is_its_adapters(config: AdapterConfig, shape: tuple[int, ...]) -> None:
    model = with_adapters(Nested(), [config] * 3)
    rows_equal(model, ["a2", None, "a0", "a2", "a1"], torch.randn(shape))
    rows_equal(model, ["a1"] * 5, torch.randn(shape))


def test_methods_and_ranks_mix() -> None:
    mixed = [*CONFIGS.values(), VeraConfig(r=3, target_modules=ALL), VeraConfig(r=6, target_modules=["head"])]
    model = with_adapters(Nested(), mixed)
    names: list[str | None] = [f"a{i}" for i in range(len(mixed))]
    rows_equal(model, [*names, None, *reversed(names)], torch.randn(2 * len(mixed) + 1, 3, 6))


@pytest.mark.parametrize(
    "name", ["vera", "lora", "dora", "ia3", "bitfit", "bottleneck", "unilora", "vblora", "vera-bias"]
)
def test_gradients_are_those_of_each_adapter_alone(name: str) -> None:
    names: list[str | None] = ["a1", "a0", None, "a1"]
    x, g = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    model = with_adapters(Nested(), [CONFIGS[name]] * 2).double().train()
    for adapter in ("a0", "a1"):
        for _, parameter in model.adapter_parameters(adapter):
            parameter.data = parameter.data.double()
    expected: dict[str, Tensor] = {}
    for adapter in ("a0", "a1"):
        model.set_adapter(adapter)
        rows = [i for i, n in enumerate(names) if n == adapter]
        (model(x[rows]) * g[rows]).sum().backward()
        expected |= {f"{adapter}.{key}": p.grad.clone() for key, p in model.adapter_parameters(adapter)}  # type: ignore[union-attr]
    for adapter in ("a0", "a1"):
        for _, parameter in model.adapter_parameters(adapter):
            parameter.requires_grad_(True).grad = None
    (model(x, adapter_names=names) * g).sum().backward()
    for adapter in ("a0", "a1"):
        for key, parameter in model.adapter_parameters(adapter):
            assert parameter.grad is not None, key
            assert torch.allclose(parameter.grad, expected[f"{adapter}.{key}"], rtol=1e-6, atol=1e-9), key


def test_the_gradient_reaches_the_input() -> None:
    model = with_adapters(Nested(), [CONFIGS["vera"]] * 2)
    x = torch.randn(3, 4, 6, requires_grad=True)
    (routed,) = torch.autograd.grad(model(x, adapter_names=["a0", None, "a1"]).sum(), x)
    for row, name in enumerate(["a0", None, "a1"]):
        (own,) = torch.autograd.grad(alone(model, name, lambda: model(x)).sum(), x)
        assert torch.allclose(routed[row], own[row], atol=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", ["vera", "lora"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(make: Callable[[], Any], name: str, side: str) -> None:
    model = with_adapters(make(), [CONFIGS[name]] * 2)
    ids, mask = torch.randint(2, 32, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    for row, short in enumerate((3, 0, 5, 1)):
        place = slice(0, short) if side == "left" else slice(9 - short, 9)
        ids[row, place], mask[row, place] = 0, 0
    names = ["a0", "a1", None, "a0"]
    with torch.no_grad():
        routed = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
        for row, adapter in enumerate(names):
            own = alone(model, adapter, lambda: model(input_ids=ids, attention_mask=mask).logits)
            assert torch.allclose(routed[row], own[row], atol=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", ["vera", "lora", "dora"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(make: Callable[[], Any], name: str, beams: int) -> None:
    """With a cache, greedy and with beams, each row gives the tokens of its adapter alone."""
    model = with_adapters(make(), [CONFIGS[name]] * 2, scale=2.0)
    ids = torch.randint(2, 32, (4, 5))
    more: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    names = ["a1", None, "a0", "a1"]
    routed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **more)
    seen = []
    for row, adapter in enumerate(names):
        own = alone(model, adapter, lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more))
        assert torch.equal(routed[row], own[row])
        seen.append(own)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_packed_sequences_have_a_name_for_each_segment() -> None:
    model = with_adapters(tiny_llama(), [CONFIGS["vera"]] * 2)
    lengths, names = [4, 3, 5], ["a1", None, "a0"]
    parts = [torch.randint(2, 32, (n,)) for n in lengths]
    packed = torch.cat(parts).unsqueeze(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = (segment[:, None] == segment[None]) & torch.ones(12, 12).tril().bool()
    with torch.no_grad(), model.route(names, lengths=lengths):
        routed = model(input_ids=packed, position_ids=positions, attention_mask=mask[None, None]).logits[0]
    with torch.no_grad():
        for name, part, place in zip(names, parts, routed.split(lengths), strict=True):
            own = alone(model, name, lambda part=part: model(input_ids=part.unsqueeze(0)).logits[0])  # type: ignore[misc]
            assert torch.allclose(place, own, atol=1e-5)


def test_heads_are_the_rows_own() -> None:
    config = VeraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"])
    model = with_adapters(tiny_classifier(), [config] * 2)
    ids = torch.randint(1, 32, (4, 6))
    names = ["a1", "a0", None, "a1"]
    with torch.no_grad():
        routed = model(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            assert torch.allclose(routed[row], alone(model, name, lambda: model(input_ids=ids).logits)[row], atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_inside_the_route_and_not_outside(reentrant: bool) -> None:
    names, ids = ["a1", None, "a0"], torch.randint(2, 32, (3, 5))
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = with_adapters(tiny_llama(), [CONFIGS["vera"]] * 2).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for adapter in ("a0", "a1"):
            for _, p in model.adapter_parameters(adapter):
                p.requires_grad_(True)
        with model.route(names):
            model(input_ids=ids, labels=ids).loss.backward()
        found.append({f"{a}.{k}": p.grad for a in ("a0", "a1") for k, p in model.adapter_parameters(a)})  # type: ignore[misc]
    for key, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][key], atol=1e-6), key
        assert gradient.any()
    loss = model(input_ids=ids, labels=ids, adapter_names=names).loss
    with pytest.raises(UnsupportedError, match=r"inside the context"):
        loss.backward()
    model.set_adapter("a0")
    model(input_ids=ids, labels=ids).loss.backward()  # without a route, as ever


# -- what is refused -----------------------------------------------------------------------------------


def test_bad_names_are_all_reported() -> None:
    model = with_adapters(Nested(), [CONFIGS["vera"]] * 2)
    with pytest.raises(AdapterError, match=r"(?s)no such adapters.*'a7'.*'b'"), model.route(["a0", "a7", "b"]):
        pass
    for wrong in ("a0", [], [3], None):
        with pytest.raises(AdapterError, match="route"), model.route(wrong):  # type: ignore[arg-type]
            pass
    for lengths in ([1], [1, -1], [0, 0], [1, 2.0]):
        with pytest.raises(AdapterError, match="lengths"), model.route(["a0", "a1"], lengths=lengths):  # type: ignore[arg-type]
            pass


def test_a_batch_of_another_size_is_refused() -> None:
    model = with_adapters(Nested(), [CONFIGS["vera"]] * 2)
    for shape in [(3, 6), (3, 4, 6), (4, 2, 6)]:
        with pytest.raises(UnsupportedError, match="'stem'.*2 rows"), model.route(["a0", "a1"]):
            model(torch.randn(shape))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_generation_wants_a_name_for_each_row_of_its_input(beams: int) -> None:
    model = with_adapters(tiny_llama(), [CONFIGS["vera"]] * 2)
    ids = torch.randint(2, 32, (4, 5))
    for names in (["a0", "a1"], ["a0"], ["a0"] * 8):  # rows of which each would be taken for several, or for a beam
        for given in ({"input_ids": ids}, {"inputs": ids}, {"inputs_embeds": torch.randn(4, 5, 8)}):
            with pytest.raises(AdapterError, match=f"each of 4 rows, got {len(names)}"):
                model.generate(**given, adapter_names=names, max_new_tokens=2, num_beams=beams)
        with pytest.raises(AdapterError, match="each of 4 rows"):
            model.generate(ids, adapter_names=names, max_new_tokens=2, num_beams=beams)


def test_sequence_first_models_are_refused() -> None:
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=False), 1, enable_nested_tensor=False)
    model = with_adapters(base, [LoraConfig(r=2, target_modules=["linear1"])])
    with pytest.raises(UnsupportedError, match="batch_first"):
        model(torch.randn(4, 4, 8), adapter_names=["a0"] * 4)


def test_what_its_parent_reads_is_refused() -> None:
    model = with_adapters(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [LoraConfig(r=2, target_modules=["self_attn"])]
    )
    with pytest.raises(UnsupportedError, match="its parent multiplies"):
        model(torch.randn(4, 4, 8), adapter_names=["a0"] * 4)


def test_not_while_merged() -> None:
    model = with_adapters(Nested(), [CONFIGS["vera"]])
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge"):
        model(torch.randn(1, 6), adapter_names=["a0"])


def test_the_route_ends_with_its_context_and_nests() -> None:
    model = with_adapters(Nested(), [CONFIGS["vera"]] * 2)
    x = torch.randn(2, 6)
    one, two = (alone(model, name, lambda: model(x)) for name in ("a0", "a1"))
    model.set_adapter("a0")
    with model.route(["a1", "a1"]):
        with model.route(["a0", None]):
            assert torch.allclose(model(x)[0], one[0], atol=1e-6)
        assert torch.allclose(model(x), two, atol=1e-6)
        with model.disable_adapter():
            assert not torch.allclose(model(x), two, atol=1e-3)
    assert torch.equal(model(x), one)
    with pytest.raises(KeyError), model.route(["a1", "a1"]):
        raise KeyError
    assert torch.equal(model(x), one)


# -- who is in a route ---------------------------------------------------------------------------------


def test_coroutines_have_routes_of_their_own() -> None:
    model = with_adapters(Nested(), [CONFIGS["vera"]] * 2)
    x = torch.randn(2, 6)
    apart = {name: alone(model, name, lambda: model(x)) for name in ("a0", "a1", None)}
    model.set_adapter("a1")
    found: dict[str, Tensor] = {}

    async def one(name: str | None, first: float, then: float) -> None:
        with model.route([name, name]):
            await asyncio.sleep(first)
            found[f"{name}"] = model(x)
            found[f"{name} in a thread"] = await asyncio.to_thread(model, x)
            found[f"{name} in a task"] = await asyncio.create_task(plain())
            await asyncio.sleep(then)

    async def plain() -> Tensor:
        await asyncio.sleep(0)
        return model(x)  # type: ignore[no-any-return]

    async def all_at_once() -> None:
        await asyncio.gather(one("a0", 0.02, 0.0), one("a1", 0.01, 0.04), one(None, 0.0, 0.03), without())

    async def without() -> None:
        await asyncio.sleep(0.015)
        found["without"] = model(x)

    with torch.no_grad():
        asyncio.run(all_at_once())
        assert not model._state.opened
        assert torch.equal(model(x), apart["a1"])
    for name, output in apart.items():
        for what in ("", " in a thread", " in a task"):
            assert torch.allclose(found[f"{name}{what}"], output, atol=1e-6), f"{name}{what}"
    assert torch.equal(found["without"], apart["a1"]), "the active adapter"


def test_a_task_that_outlives_its_route_is_told_while_there_are_others() -> None:
    model = with_adapters(Nested(), [CONFIGS["vera"]] * 2)

    async def late() -> None:
        await asyncio.sleep(0.01)
        model(torch.randn(1, 6))

    async def main() -> None:
        with model.route(["a0"]):
            task = asyncio.create_task(late())
        with model.route(["a1"]):
            await task

    with pytest.raises(UnsupportedError, match="has ended"):
        asyncio.run(main())
