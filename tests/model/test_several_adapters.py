"""Several adapters in one model: add, set, delete, disable; rank, seed, targets and method as one likes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from kilotune import (
    AdapterConfig,
    AdapterError,
    LoraConfig,
    MergeError,
    PeftModel,
    TargetError,
    VeraConfig,
    get_peft_model,
)
from kilotune.projections.matrices import Projections
from tests.support.guards import disabled_is_the_base, frozen_matrices_are_one, inactive_adapters_stay
from tests.support.models import Nested, Snapshot, mlp, randomize, trained

X = torch.linspace(-1, 1, 24).view(4, 6)

# What PEFT refuses or crashes on as a second VeRA adapter: lower rank, larger targets, another key; and other methods.
ZOO: dict[str, AdapterConfig] = {
    "big": VeraConfig(r=9, target_modules=["stem"]),
    "lower rank": VeraConfig(r=2, target_modules=["stem"]),
    "larger targets": VeraConfig(r=5, target_modules="all-linear"),
    "other key": VeraConfig(r=4, target_modules=["head", "down"], projection_prng_key=77),
    "by shape": VeraConfig(r=6, target_modules=["up", "head"], sharing="shape"),
    "as peft": VeraConfig(r=3, target_modules=["up", "down"], generator="peft", projection_prng_key=5),
    "lora": LoraConfig(r=3, target_modules=["stem", "up"]),
    "patterned": LoraConfig(r=2, target_modules="all-linear", rank_pattern={"up": 4}, alpha_pattern={"head": 3}),
    "biased": VeraConfig(r=4, target_modules=["stem"], bias="all"),
}


def zoo(names: tuple[str, ...] = tuple(ZOO)) -> PeftModel:
    """All of them in one model, each with random values of its own."""
    torch.manual_seed(0)
    model = get_peft_model(Nested(), ZOO[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, ZOO[name])
    for name in names:
        randomize(model, name, seed=list(ZOO).index(name))
    return model


def alone(model: PeftModel, name: str) -> PeftModel:
    """The adapter ``name`` with the same values, by itself in a fresh model."""
    single = get_peft_model(Nested(), ZOO[name], name)
    values = dict(model.adapter_parameters(name))
    with torch.no_grad():
        for key, parameter in single.adapter_parameters(name):
            parameter.copy_(values[key])
    return single


@pytest.mark.parametrize("name", ZOO)
def test_each_of_many_adapters_is_what_it_is_alone(name: str) -> None:
    model = zoo()
    model.set_adapter(name)
    single = alone(model, name)
    assert torch.equal(model(X), single(X))
    model(X).sum().backward()
    single(X).sum().backward()
    grads = {key: p.grad for key, p in model.adapter_parameters(name)}
    for key, parameter in single.adapter_parameters(name):
        assert torch.equal(grads[key], parameter.grad), key


def test_the_order_of_adding_does_not_matter() -> None:
    names = tuple(ZOO)
    forward, backward = zoo(names), zoo(names[::-1])
    for name in names:
        forward.set_adapter(name)
        backward.set_adapter(name)
        if name not in ("lora", "patterned"):  # these draw from torch's generator as they come
            assert torch.equal(forward(X), backward(X)), name


@pytest.mark.parametrize("pair", list(itertools.combinations(ZOO, 2)), ids="+".join)
def test_two_together_sum_in_one_layer(pair: tuple[str, str]) -> None:
    """In a model of one linear layer the changes add up exactly; here, the trees of names are what is tested."""
    model = zoo(pair)
    model.double()
    model.set_adapter(list(pair))
    assert model.active_adapters == list(pair)
    both = model(X.double())
    plain = Nested().double()
    with torch.no_grad():
        for layer_name, layer in model.adapted_layers().items():
            target = plain.get_submodule(layer_name)
            merged = layer.merged_with(pair)
            if merged.weight is not None:
                target.weight.copy_(merged.weight)
            if merged.bias is not None:
                target.bias.copy_(merged.bias)
    torch.testing.assert_close(both, plain(X.double()), rtol=1e-10, atol=1e-10)


def test_the_frozen_matrices_exist_once_however_many_use_them() -> None:
    names = ("big", "lower rank", "larger targets")
    model = zoo(names)
    model.set_adapter(list(names))
    frozen_matrices_are_one(model, lambda m: m(X))
    (extent,) = model.projections.extents().values()
    assert extent == (9, 12, 12)
    assert model.report().frozen_shared == 9 * (12 + 12)
    model.delete_adapter("big")
    assert list(model.projections.extents().values()) == [(5, 12, 12)]
    model.delete_adapter("larger targets")
    assert list(model.projections.extents().values()) == [(2, 6, 8)]
    model.delete_adapter("lower rank")
    assert model.projections.extents() == {}
    assert model.projections.tensors() == []


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "float", "to", "meta"])
def test_the_frozen_matrices_follow_the_model(move: str) -> None:
    model = zoo(("larger targets", "other key"))
    holder = model.projections
    moved: Any = {
        "to": lambda: model.to(torch.float16),
        "meta": lambda: model.to("meta"),
    }.get(move, lambda: getattr(model, move)())()
    assert moved is model
    dtype = next(p.dtype for p in model.parameters())
    device = next(p.device for p in model.parameters())
    tensors = holder.tensors()
    assert len(tensors) == 4
    assert {(t.dtype, t.device) for t in tensors} == {(dtype, device)}
    y = model(X.to(device=device, dtype=dtype))
    assert y.dtype == dtype
    assert len(holder.tensors()) == 4


def test_going_to_half_and_back_does_not_change_a_bit_of_the_matrices() -> None:
    model = zoo(("larger targets",))
    before = [t.clone() for t in model.projections.tensors()]
    model.half().bfloat16().float()
    assert all(torch.equal(a, b) for a, b in zip(before, model.projections.tensors(), strict=True))


def test_moving_the_base_by_itself_is_followed_at_the_next_forward() -> None:
    model = zoo(("larger targets",))
    model.get_base_model().bfloat16()
    assert model(X.bfloat16()).dtype == torch.bfloat16


def test_training_continues_while_adapters_come_and_go() -> None:
    """Growing the shared matrices in the middle of a step does not change its gradients."""
    model, twin = zoo(("lower rank",)), zoo(("lower rank",))
    y = model(X)
    model.add_adapter("larger targets", ZOO["larger targets"])
    y.square().sum().backward()
    twin(X).square().sum().backward()
    for (_, a), (_, b) in zip(model.adapter_parameters("lower rank"), twin.adapter_parameters("lower rank")):
        assert torch.equal(a.grad, b.grad)


# -- active, inactive ------------------------------------------------------------------------------


def test_adding_does_not_activate_and_setting_does() -> None:
    model = get_peft_model(mlp(), VeraConfig(r=2, target_modules="all-linear"), "a")
    y = model(X)
    model.add_adapter("b", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert model.active_adapters == ["a"]
    assert torch.equal(model(X), y)
    model.set_adapter("b")
    assert model.active_adapter == "b"
    assert not torch.equal(model(X), y)
    model.set_adapter(["b", "a", "b"])
    assert model.active_adapters == ["b", "a"]
    assert model.active_adapter == ["b", "a"]
    model.set_adapter([])
    assert model.active_adapters == []
    assert torch.equal(model(X), mlp()(X))


def test_inactive_adapters_have_no_gradient_and_do_not_move() -> None:
    model = zoo(("larger targets", "lora", "biased"))
    model.set_adapter("lora")
    assert {id(p) for _, p in trained(model)} == {id(p) for _, p in model.adapter_parameters("lora")}
    for inactive in ("larger targets", "biased"):
        inactive_adapters_stay(model, X, inactive)
    model.set_adapter("biased")
    assert all(p.grad is None for _, p in model.adapter_parameters("lora"))  # what it had is gone
    inactive_adapters_stay(model, X, "lora")


def test_set_adapter_refuses_unknown_names_and_keeps_what_was() -> None:
    model = zoo(("lora", "biased"))
    for wrong in ("loro", ["biased", "loro"]):
        before = Snapshot.of(model)
        with pytest.raises(AdapterError, match=r"no adapter 'loro'\. Did you mean 'lora'\? There: 'lora', 'biased'"):
            model.set_adapter(wrong)
        assert Snapshot.of(model) == before


# -- delete ----------------------------------------------------------------------------------------


def test_deleting_the_active_adapter_activates_the_one_added_first_of_those_left() -> None:
    model = zoo(("big", "lora", "biased"))
    model.set_adapter("lora")
    model.delete_adapter("lora")
    assert model.active_adapters == ["big"]
    assert torch.equal(model(X), alone(model, "big")(X))
    assert all(p.requires_grad for _, p in model.adapter_parameters("big"))
    model.delete_adapter("big")
    assert model.active_adapters == ["biased"]
    model.delete_adapter("biased")
    assert model.active_adapters == []
    assert torch.equal(model(X), Nested()(X))
    assert model.adapted_layers() == {}
    assert not list(trained(model))
    with pytest.raises(AdapterError, match=r"no adapter 'big'.*There: none"):
        model.delete_adapter("big")


def test_deleting_one_of_several_active_leaves_the_others_on() -> None:
    model = zoo(("big", "lora", "biased"))
    model.set_adapter(["lora", "biased"])
    model.delete_adapter("lora")
    assert model.active_adapters == ["biased"]
    assert torch.equal(model(X), alone(model, "biased")(X))


def test_deleting_an_inactive_adapter_changes_nothing_else() -> None:
    model = zoo(("big", "lora"))
    y = model(X)
    model.delete_adapter("lora")
    assert model.active_adapters == ["big"]
    assert torch.equal(model(X), y)
    model.add_adapter("lora", ZOO["lora"])  # the name is free again
    assert list(model.peft_config) == ["big", "lora"]


# -- disable ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_disabled_is_exactly_the_base(name: str) -> None:
    disabled_is_the_base(Nested, ZOO[name], X)


def test_disabling_covers_all_active_adapters_and_leaves_gradients_alone() -> None:
    model = zoo(("big", "lora", "biased"))
    model.set_adapter(["big", "lora", "biased"])
    y = model(X)
    with model.disable_adapter() as nothing:
        assert nothing is None
        assert torch.equal(model(X), Nested()(X))
        assert not model(X).requires_grad
    assert torch.equal(model(X), y)
    assert all(p.requires_grad for _, p in model.adapter_parameters())


@pytest.mark.parametrize("action", ["merge_adapter", "unmerge_adapter", "merge_and_unload", "unload"])
def test_merging_inside_a_disabled_context_is_refused(action: str) -> None:
    model = zoo(("lora",))
    if action == "unmerge_adapter":
        model.merge_adapter()
    y = model(X)
    with model.disable_adapter(), pytest.raises(MergeError, match=r"inside disable_adapter\(\); leave its context"):
        getattr(model, action)()
    assert torch.equal(model(X), y)


def test_adding_and_setting_inside_a_disabled_context_work() -> None:
    model = zoo(("lora",))
    with model.disable_adapter():
        model.add_adapter("big", ZOO["big"])
        model.set_adapter("big")
        assert torch.equal(model(X), Nested()(X))
    assert model.active_adapters == ["big"]


# -- biases and whole modules ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "biases"),
    [
        ("none", set()),
        ("vera_only", {"stem.bias"}),
        ("all", {"stem.bias", "head.bias"} | {f"blocks.{i}.{n}.bias" for i in (0, 1) for n in ("norm", "mix.up")}),
    ],
)
def test_which_biases_are_trained(bias: str, biases: set[str]) -> None:
    model = get_peft_model(Nested(), VeraConfig(r=2, target_modules=["stem", "down"], bias=bias))
    names = {name for name, _ in model.adapter_parameters()}
    assert {name for name in names if name.endswith("bias")} == biases
    base = Nested()
    for name, value in model.adapter_parameters():
        if name in biases:
            assert torch.equal(value, base.get_parameter(name))
    assert torch.equal(model(X), base(X))
    randomize(model)
    y = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)
    model.unmerge_adapter()
    assert torch.equal(model(X), y)
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))
    assert Snapshot.of(model.unload()).bits == Snapshot.of(base).bits


def test_a_trained_bias_starts_from_the_base_while_another_is_merged() -> None:
    model = zoo(("biased",))
    model.merge_adapter()
    model.add_adapter("second", VeraConfig(r=2, target_modules=["stem"], bias="all"))
    base = Nested()
    for name, value in model.adapter_parameters("second"):
        if name.endswith("bias"):
            assert torch.equal(value, base.get_parameter(name)), name


def test_a_trained_bias_moves_the_output_by_itself() -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["2"], bias="lora_only"))
    with torch.no_grad():
        dict(model.adapter_parameters())["2.bias"].add_(2.0)
    torch.testing.assert_close(model(X), mlp()(X) + 2.0)


def test_modules_to_save_are_trained_whole_and_by_adapter() -> None:
    base = Nested()
    config = VeraConfig(r=2, target_modules=["stem"], modules_to_save=["head", "blocks.1.norm"])
    model = get_peft_model(base, config, "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["stem"], modules_to_save=["head"]))
    assert [n for n, _ in model.adapter_parameters("a")] == [
        "stem.vera_lambda_b",
        "stem.vera_lambda_d",
        "blocks.1.norm.weight",
        "blocks.1.norm.bias",
        "head.weight",
        "head.bias",
    ]
    assert torch.equal(model(X), Nested()(X))
    assert model.head.out_features == 3  # attributes pass through
    optimizer = torch.optim.SGD([p for _, p in trained(model)], lr=0.5)
    model(X).square().sum().backward()
    optimizer.step()
    moved = dict(model.adapter_parameters("a"))
    assert not torch.equal(moved["head.weight"], Nested().head.weight)
    y = model(X)
    assert not torch.equal(y, Nested()(X))
    with model.disable_adapter():
        assert torch.equal(model(X), Nested()(X))
    model.set_adapter("b")
    assert torch.equal(model(X), Nested()(X))
    model.set_adapter(["b", "a"])
    assert torch.equal(model(X), y)  # the last one's head
    model.set_adapter(["a", "b"])
    assert not torch.equal(model(X), y)
    model.set_adapter("b")
    model.delete_adapter("b")
    assert model.active_adapters == ["a"]
    assert torch.equal(model(X), y)
    twin = copy.deepcopy(model)
    head = twin.merge_and_unload().head
    assert type(head) is nn.Linear
    assert torch.equal(head.weight, moved["head.weight"])
    torch.testing.assert_close(twin.get_base_model()(X), y)
    assert Snapshot.of(model.unload()).bits == Snapshot.of(Nested()).bits


def test_a_module_to_save_that_is_not_there_is_refused() -> None:
    model = get_peft_model(Nested(), VeraConfig(r=2, target_modules=["up"], modules_to_save=["head"]), "a")
    before = Snapshot.of(model)
    with pytest.raises(TargetError, match=r"modules_to_save: no module is called 'heat'\. Did you mean 'head'\?"):
        model.add_adapter("b", LoraConfig(r=2, target_modules=["stem"], modules_to_save=["heat"]))
    assert Snapshot.of(model) == before


def test_a_target_inside_a_module_trained_whole_is_left_to_it() -> None:
    model = get_peft_model(Nested(), VeraConfig(r=2, target_modules="all-linear", modules_to_save=["blocks.0"]))
    assert list(model.adapted_layers()) == ["stem", "blocks.1.mix.up", "blocks.1.mix.down", "head"]


@pytest.mark.parametrize("name", ["_parameters", "keys", "training", "a.b", "50%", "a%2Eb", "ünï", "forward", "0"])
def test_any_name_that_is_no_path_can_name_an_adapter(name: str, tmp_path: Any) -> None:
    model = get_peft_model(
        mlp(), VeraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init_weights=False), name
    )
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    y = model(X)
    model.save_pretrained(tmp_path, selected_adapters=[name])
    again = PeftModel.from_pretrained(mlp(), tmp_path / name, adapter_name=name)
    assert torch.equal(again(X), y)
    model.delete_adapter(name)
    assert model.active_adapters == ["other"]


def test_names_that_escape_to_one_key_do_not_clash() -> None:
    names = ["a.b", "a%2Eb", "keys", "keys%"]
    model = get_peft_model(mlp(), VeraConfig(r=2, target_modules=["0"]), names[0])
    for name in names[1:]:
        model.add_adapter(name, VeraConfig(r=2, target_modules=["0"]))
    found = {id(p) for name in names for _, p in model.adapter_parameters(name)}
    assert len(found) == 2 * len(names)


def test_there_is_one_holder_of_frozen_matrices() -> None:
    model = zoo()
    assert [m for m in model.modules() if isinstance(m, Projections)] == [model.projections]


class Heads(nn.Module):
    """Goes through a list of modules and a sequence by itself, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])
        self.tail = nn.Sequential(nn.Linear(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        for head in self.heads:
            x = head(x)
        return self.tail[len(self.heads) - 2](x) if self.tail else x


def test_a_list_of_modules_can_be_trained_whole() -> None:
    config = VeraConfig(r=2, target_modules=["body"], modules_to_save=["heads", "tail"])
    model = get_peft_model(Heads(), config)
    assert torch.equal(model(X), Heads()(X))
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            if name.startswith(("heads", "tail")):
                parameter.add_(0.5)
    assert not torch.allclose(model(X), Heads()(X))
    with model.disable_adapter():
        assert torch.equal(model(X), Heads()(X))


@pytest.mark.parametrize("names", [None, 5, [["a"]], [None], {"a"}], ids=repr)
def test_what_is_no_name_is_refused_by_set_adapter(names: Any) -> None:
    model = zoo(("lora",))
    with pytest.raises(AdapterError, match="expected a name or a list of names|there is no adapter"):
        model.set_adapter(names)
    assert model.active_adapters == ["lora"]
