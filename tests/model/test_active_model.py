"""A stack in one model: the shared adapter beneath, the personal one on top of it and alone in training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from kilotune import AdapterConfig, LoraConfig, PeftModel, StandsOnWarning, VeraConfig, get_config, get_peft_model
from kilotune.adapter_files.content import content_sha256
from kilotune.adapter_files.reading import open_adapter
from kilotune.adapter_files.stands_on import StandsOn
from kilotune.errors import AdapterError, ConfigError
from tests.support.models import Nested, mlp, randomize

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
ALL = "all-linear"
# Not DoRA and LoRA-XS: their norms and factors are of the base's weights, others once the house style is in it.
PERSONAL: dict[str, AdapterConfig] = {
    "vera": VeraConfig(r=6, target_modules=ALL),
    "lora": LoraConfig(r=3, target_modules=ALL, bias="all"),
    "ia3": get_config("ia3", target_modules=["up", "down"], feedforward_modules=["down"]),
    "unilora": get_config("unilora", target_modules=ALL),
    "bitfit": get_config("bitfit"),
    "intrinsic": get_config("intrinsic", target_modules=ALL),
}
WITH_HEAD = LoraConfig(r=3, target_modules=["up"], modules_to_save=["head"])
HOUSE = LoraConfig(r=2, target_modules=ALL)


def stack(config: AdapterConfig, house: AdapterConfig = HOUSE) -> PeftModel:
    model = get_peft_model(Nested().double(), house, "house-style")
    model.add_adapter("ann", config)
    model.double()
    for i, name in enumerate(("house-style", "ann")):
        randomize(model, name, seed=i, scale=0.3)
    model.set_adapter(["house-style", "ann"], inference_mode=True)
    model.set_requires_grad("ann")
    return model.eval()


@pytest.mark.parametrize("config", PERSONAL.values(), ids=PERSONAL)
def test_a_stack_is_the_personal_one_over_a_base_with_the_shared_one_in_it(config: AdapterConfig) -> None:
    model = stack(config)
    merged = copy.deepcopy(model)
    base = merged.merge_and_unload(adapter_names=["house-style"])
    over = get_peft_model(base, config, "ann")
    over.double()
    with torch.no_grad():
        own = dict(model.adapter_parameters("ann"))
        for key, parameter in over.adapter_parameters("ann"):
            parameter.copy_(own[key])  # a bias whole: HOUSE leaves biases as they are
    over.eval()
    torch.testing.assert_close(model(X), over(X), rtol=1e-9, atol=1e-9)
    gradients = {}
    for which in (model, over):
        which(X).square().sum().backward()
        gradients[which] = {key: p.grad for key, p in which.adapter_parameters("ann")}
    for key, gradient in gradients[over].items():
        torch.testing.assert_close(gradients[model][key], gradient, rtol=1e-7, atol=1e-9)


def test_the_top_alone_is_trained_and_saved(tmp_path: Path) -> None:
    model = stack(PERSONAL["vera"])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for _, p in model.adapter_parameters("ann")}
    before = {key: p.clone() for key, p in model.adapter_parameters("house-style")}
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = (model(X) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[key]) for key, p in model.adapter_parameters("house-style"))
    model.save_pretrained(tmp_path, selected_adapters=["ann"])
    assert [path.name for path in tmp_path.iterdir()] == ["ann"]
    again = stack(PERSONAL["vera"])
    again.delete_adapter("ann")
    again.load_adapter(tmp_path / "ann", "ann")
    again.set_adapter(["house-style", "ann"], inference_mode=True)
    torch.testing.assert_close(again(X), model(X), rtol=1e-6, atol=1e-6)  # files are of float32


def test_what_it_stands_on_goes_with_it(tmp_path: Path) -> None:
    model = stack(PERSONAL["vera"])
    model.save_pretrained(tmp_path)
    house = open_adapter(tmp_path / "house-style")
    on = StandsOn("house-style", None, content_sha256(house))
    assert StandsOn.of_header(open_adapter(tmp_path / "ann").metadata) == on
    assert StandsOn.of_header(house.metadata) is None
    with pytest.warns(
        StandsOnWarning, match=r"'ann' was trained on top of 'house-style' .* set_adapter\(\['house-style', 'ann'\]"
    ):
        again = PeftModel.from_pretrained(Nested().double(), tmp_path / "ann", "ann")
    again.load_adapter(tmp_path / "house-style", "the house's")
    again.set_adapter(["the house's", "ann"], inference_mode=True)  # the contents count, and not the name
    with pytest.warns(StandsOnWarning):
        again.set_adapter(["ann", "the house's"])
    again.set_adapter("the house's")
    again.save_pretrained(tmp_path / "again")
    assert StandsOn.of_header(open_adapter(tmp_path / "again" / "ann").metadata) == on
    randomize(again, "the house's", seed=9)
    with pytest.warns(StandsOnWarning):
        again.set_adapter(["the house's", "ann"])


@pytest.mark.parametrize("trained", [["house-style", "ann"], ["ann", "house-style"], ["house-style"]])
def test_nobody_stands_on_what_is_trained_too(trained: list[str]) -> None:
    model = stack(PERSONAL["vera"])
    for name in trained:
        model.set_requires_grad(name)
    assert not model.installed("ann").marks
    assert not model.installed("house-style").marks


def test_who_trains_is_as_peft_says() -> None:
    model = stack(PERSONAL["lora"])

    def training() -> list[str]:
        return [name for name in model.peft_config if any(p.requires_grad for _, p in model.adapter_parameters(name))]

    assert training() == ["ann"]
    model.set_requires_grad(["house-style", "ann"], requires_grad=False)
    assert training() == []
    model.set_requires_grad("house-style")  # whether it is active or not
    assert training() == ["house-style"]
    model(X).sum().backward()
    model.set_requires_grad("house-style", False)
    assert all(p.grad is None for _, p in model.adapter_parameters("house-style"))
    model.set_requires_grad("ann")
    model.add_adapter("bob", PERSONAL["vera"])
    model.delete_adapter("bob")
    assert training() == ["ann"]  # another one's end changes nothing
    model.delete_adapter("house-style")
    assert training() == ["ann"]
    model.add_adapter("carl", PERSONAL["vera"])
    with pytest.warns(StandsOnWarning):  # what it stands on is gone
        model.set_adapter(["ann", "carl"])
    assert training() == ["ann", "carl"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.set_requires_grad("eve"), AdapterError, "there is no adapter 'eve'"),
        (lambda m: m.set_requires_grad(3), AdapterError, "expected a name or a list of names, got 3"),
        (lambda m: m.set_requires_grad("ann", "yes"), ConfigError, "requires_grad: expected True or False, got 'yes'"),
    ],
)
def test_bad_calls_are_refused(call: object, error: type[Exception], message: str) -> None:
    model = stack(PERSONAL["lora"])
    with pytest.raises(error, match=message):
        call(model)  # type: ignore[operator]


def test_of_two_heads_the_upper_ones_runs_whoever_is_merged() -> None:
    model = stack(WITH_HEAD, LoraConfig(r=2, target_modules=["stem"], modules_to_save=["head"]))
    lower, upper = (model.model.head.modules_to_save[name] for name in ("house-style", "ann"))
    assert not any(p.requires_grad for p in lower.parameters())
    seen: list[torch.Tensor] = []
    model.model.blocks.register_forward_hook(lambda *_: None)
    model.model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    y = model(X)
    torch.testing.assert_close(y, upper(seen[-1]))
    for merged in (["house-style"], ["ann"], ["house-style", "ann"]):
        model.merge_adapter(merged)
        torch.testing.assert_close(model(X), y)
        model.unmerge_adapter()
    with pytest.warns(StandsOnWarning):
        model.set_adapter(["ann", "house-style"])
    assert not any(p.requires_grad for p in upper.parameters())  # it does not run, so it does not train
    assert all(p.requires_grad for p in lower.parameters())
    torch.testing.assert_close(model(X), lower(seen[-1]))
    assert torch.equal(model.merge_and_unload(adapter_names=["house-style", "ann"]).head.weight, upper.weight)


def test_an_adapter_whose_head_is_overruled_still_trains_the_rest() -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    model.set_adapter(["a", "b"])
    wanted = {(n, key): p.requires_grad for n in ("a", "b") for key, p in model.adapter_parameters(n)}
    assert [which for which, trains in wanted.items() if not trains] == [("a", "2.weight"), ("a", "2.bias")]
    model.set_adapter("a")
    assert all(p.requires_grad for _, p in model.adapter_parameters("a"))
