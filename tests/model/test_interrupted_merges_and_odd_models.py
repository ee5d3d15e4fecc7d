"""Interrupted merges, narrow dtypes, shared and scripted modules, and models that do what nobody expects."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from kilotune import (
    LoraConfig,
    MergeError,
    PeftModel,
    TargetError,
    UnsupportedError,
    VeraConfig,
    get_config,
    get_peft_model,
)
from kilotune.layers.adapted import AdaptedLayer
from kilotune.layers.saved_module import SavedModule
from kilotune.model.adapter_model import AdapterModel
from kilotune.storage.dense import Dense
from tests.support.models import Nested, Snapshot, bits, mlp, randomize, tiny_llama

X = torch.linspace(-1, 1, 24).view(4, 6)
LORA, VERA = LoraConfig(r=2, target_modules="all-linear"), VeraConfig(r=3, target_modules="all-linear")
Patch = pytest.MonkeyPatch


def several(make: Callable[[], nn.Module] = mlp, **configs: Any) -> PeftModel:
    """A model with the adapters ``configs``, each with its own random values; the first is active."""
    (first, config), *more = configs.items()
    model = get_peft_model(make(), config, first)
    for name, other in more:
        model.add_adapter(name, other)
    for seed, name in enumerate(configs):
        randomize(model, name, seed=seed)
    return model.eval()


# -- merges that are cut off -----------------------------------------------------------------------


def three() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])


def failing(monkeypatch: Patch, owner: type, method: str, error: type[BaseException], calls: range) -> None:
    """Let the calls ``calls`` (from 0) of ``owner.method`` fail before they do anything."""
    real, number = getattr(owner, method), count()

    def call(*args: Any) -> Any:
        if next(number) in calls:
            raise error("planted")
        return real(*args)

    monkeypatch.setattr(owner, method, call)


def an_interrupted_merge_changes_nothing(
    model: PeftModel, merge: Callable[[], Any], error: type[BaseException]
) -> None:
    """``merge`` fails, and the model is as before: its bits, what is merged, what is active."""
    before, merged, y = Snapshot.of(model), model.merged_adapters, model(X)
    with pytest.raises(error, match="planted"):
        merge()
    assert Snapshot.of(model).bits == before.bits, "half a merge stays"
    assert Snapshot.of(model) == before
    assert model.merged_adapters == merged
    assert torch.equal(model(X), y)


FAULTS = [
    (AdaptedLayer, "merge", range(1, 2)),
    (AdaptedLayer, "merged_with", range(2, 3)),
    (Dense, "write", range(1, 99)),
]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(("owner", "method", "calls"), FAULTS, ids=lambda value: str(value))
def test_an_interrupted_merge(
    owner: type, method: str, calls: range, error: type[BaseException], monkeypatch: Patch
) -> None:
    for config in (LORA.replace(bias="all"), VERA):
        for name in ("merge_adapter", "merge_and_unload"):
            model = several(three, a=config)
            y = model(X)
            with monkeypatch.context() as patch:
                failing(patch, owner, method, error, calls)
                an_interrupted_merge_changes_nothing(model, getattr(model, name), error)
            assert model.merged_adapters == []
            torch.testing.assert_close(model.merge_and_unload()(X), y)


@pytest.mark.parametrize("name", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("calls", [range(1, 2), range(1, 99)], ids=["once", "for good"])
def test_an_interrupted_merge_beside_one_that_is_merged(name: str, calls: range, monkeypatch: Patch) -> None:
    """Memory that is not there for the merge is not there for going back either: that must allocate nothing."""
    model = several(three, a=LORA, b=VERA)
    model.merge_adapter(["a"])
    with monkeypatch.context() as patch:
        failing(patch, Dense, "write", MemoryError, calls)
        an_interrupted_merge_changes_nothing(model, lambda: getattr(model, name)(adapter_names=["b"]), MemoryError)
    assert model.merged_adapters == ["a"]
    model.unmerge_adapter()
    assert bits(model) == bits(several(three, a=LORA, b=VERA))


def test_planted_merge_without_a_way_back(monkeypatch: Patch) -> None:
    def naive(self: AdapterModel) -> None:
        for layer in self.adapted_layers().values():
            layer.merge(self.active_adapters)

    monkeypatch.setattr(AdapterModel, "merge_adapter", naive)
    model = several(three, a=LORA)
    failing(monkeypatch, AdaptedLayer, "merge", MemoryError, range(1, 2))
    with pytest.raises(AssertionError, match="half a merge stays"):
        an_interrupted_merge_changes_nothing(model, model.merge_adapter, MemoryError)


@pytest.mark.parametrize("merged", [["a"], ["a", "b"], ["b"], []])
def test_unloading_one_adapter_while_others_are_merged_gives_that_one(merged: list[str]) -> None:
    model = several(a=LORA, b=VERA)
    if merged:
        model.merge_adapter(merged)
    alone = several(a=LORA, b=VERA).merge_and_unload(adapter_names=["b"])
    plain = model.merge_and_unload(adapter_names=["b"])
    assert bits(plain) == bits(alone)
    reference = several(a=LORA, b=VERA)
    reference.set_adapter("b")
    torch.testing.assert_close(plain(X), reference(X))


def test_merging_an_adapter_with_a_head_of_its_own_beside_an_active_one() -> None:
    head = VeraConfig(r=3, target_modules=["up"], modules_to_save=["head"])
    model = several(Nested, a=LoraConfig(r=2, target_modules=["up"]), b=head)
    y = model(X)
    model.set_adapter(["a", "b"])
    both = model(X)
    model.set_adapter("a")
    model.merge_adapter(["b"])
    torch.testing.assert_close(model(X), both)
    with model.disable_adapter():
        assert torch.equal(model(X), Nested()(X))
    torch.testing.assert_close(model(X), both)
    model.unmerge_adapter()
    assert torch.equal(model(X), y)
    twice = several(Nested, a=head, b=head)
    heads = twice.model.head.modules_to_save
    twice.merge_adapter(["b"])
    assert twice.model.head.current() is heads["a"]  # active, so above what is merged and not active


def test_a_layers_weight_is_not_set_while_merged() -> None:
    model = several(a=LORA)
    model.merge_adapter()
    before, layer = Snapshot.of(model), model.adapted_layers()["0"]
    for name in ("weight", "bias"):
        with pytest.raises(MergeError, match=rf"'{name}'.*\['a'\].*unmerge"):
            setattr(layer, name, nn.Parameter(torch.zeros_like(getattr(layer, name))))
    assert Snapshot.of(model) == before
    model.unmerge_adapter()
    layer.weight = nn.Parameter(torch.zeros(5, 6))
    assert layer.base_layer.weight.count_nonzero() == 0


def test_a_weight_set_on_a_module_saved_whole_reaches_the_original() -> None:
    model = several(Nested, a=LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
    wrapper, fresh = model.model.head, nn.Parameter(torch.zeros(3, 8))
    assert isinstance(wrapper, SavedModule)
    copied = wrapper.modules_to_save["a"].weight
    wrapper.weight = fresh
    assert wrapper.original_module.weight is fresh
    assert wrapper.modules_to_save["a"].weight is copied
    assert "weight" not in dict(wrapper.named_parameters(recurse=False))


def test_weights_are_tied_again_with_the_output_layer_saved_whole() -> None:
    model = several(
        lambda: tiny_llama(tie=True), a=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    ids = torch.tensor([[1, 2, 3]])
    logits = model(input_ids=ids).logits
    model.tie_weights()
    assert torch.equal(model(input_ids=ids).logits, logits)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, tiny_llama(tie=True).eval()(input_ids=ids).logits)


# -- copies inside disable_adapter() ---------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 -- our own bytes


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("twin", [copy.deepcopy, pickled, saved])
def test_a_copy_inside_disable_adapter_is_refused(twin: Callable[[nn.Module], Any], merged: bool) -> None:
    model = several(a=VERA, b=LORA)
    if merged:
        model.merge_adapter()
    y = model(X)
    with model.disable_adapter():
        for part in (model, model.get_base_model()):
            with pytest.raises(MergeError, match=r"disable_adapter\(\).*leave"):
                twin(part)
    assert torch.equal(model(X), y)
    again = twin(model)
    assert torch.equal(again(X), y)
    if merged:
        again.unmerge_adapter()
    assert bits(again) == bits(several(a=VERA, b=LORA))


# -- modules that are not what they seem -----------------------------------------------------------


class Shared(nn.Module):
    """``right`` is ``left``; ``other`` stands apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.Linear(6, 6)
        self.right = self.left
        self.other = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.right(torch.tanh(self.left(x))))


@pytest.mark.parametrize(("target", "whole"), [("right", "left"), ("left", "right")])
def test_one_module_adapted_and_saved_whole_under_two_names(target: str, whole: str) -> None:
    base = Shared()
    before = Snapshot.of(base)
    with pytest.raises(UnsupportedError, match="left|right"):
        get_peft_model(base, LoraConfig(r=2, target_modules=[target], modules_to_save=[whole]))
    assert Snapshot.of(base) == before


@pytest.mark.parametrize("name", ["left", "right"])
def test_a_module_saved_whole_under_either_of_its_names(name: str, tmp_path: Any) -> None:
    model = several(Shared, a=LoraConfig(r=2, target_modules=["other"], modules_to_save=[name]))
    assert model.model.left is model.model.right
    assert isinstance(model.model.left, SavedModule)
    y = model(X)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Shared(), tmp_path / "a")(X), y)
    with model.disable_adapter():
        assert torch.equal(model(X), Shared()(X))
    plain = model.merge_and_unload()
    assert plain.left is plain.right
    torch.testing.assert_close(plain(X), y)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=DeprecationWarning)
            self.front = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.front(x))


@pytest.mark.parametrize("config", [LORA, VERA, LORA.replace(target_modules=["head"])], ids=["lora", "vera", "named"])
def test_a_scripted_submodule_is_left_alone(config: Any) -> None:
    base = Scripted()
    front = base.front
    model = several(lambda: base, a=config)
    assert list(model.adapted_layers()) == ["head"]
    assert model.model.front is front
    model(X).sum().backward()
    assert not any(p.requires_grad for p in front.parameters())
    with model.disable_adapter():
        assert torch.equal(model(X), Scripted()(X))
    assert bits(model.unload()) == bits(Scripted())


@pytest.mark.parametrize("target", ["front", "front.0"])
def test_a_scripted_submodule_cannot_be_adapted(target: str) -> None:
    with pytest.raises(TargetError, match=target):
        get_peft_model(Scripted(), LoraConfig(r=2, target_modules=[target]))


class TinyMambaMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_proj, self.out_proj = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.in_proj(x), self.out_proj.weight, self.out_proj.bias)


def test_a_layer_whose_parent_reads_its_weight_in_a_fused_kernel() -> None:
    base = nn.Sequential(TinyMambaMixer())
    model = several(lambda: base, a=LoraConfig(r=2, lora_alpha=2, target_modules=["out_proj"]))
    factors = {name.rpartition(".")[2]: p.detach() for name, p in model.adapter_parameters()}
    changed = base[0].out_proj.base_layer.weight + factors["lora_B"] @ factors["lora_A"]
    x = torch.linspace(-1, 1, 12).reshape(2, 6)
    wanted = nn.functional.linear(base[0].in_proj(x), changed, base[0].out_proj.bias)
    torch.testing.assert_close(model(x), wanted)
    with model.disable_adapter():
        assert (model(x) - wanted).abs().max() > 1e-3
    with pytest.raises(UnsupportedError, match=r"lora_dropout=0.1: '0\.out_proj' runs with the adapter in its weight"):
        get_peft_model(nn.Sequential(TinyMambaMixer()), LoraConfig(target_modules=["out_proj"], lora_dropout=0.1))


class Asking(nn.Module):
    """get_output_embeddings means something else here."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 3)

    def get_output_embeddings(self, which: int) -> nn.Module:
        return self.lin

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def test_a_base_whose_output_embeddings_need_an_argument() -> None:
    assert list(several(Asking, a=LORA).adapted_layers()) == ["lin"]


class Scaled(nn.Linear):
    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:  # noqa: A002 -- torch's own name
        return scale * super().forward(input)


class Renamed(nn.Linear):
    def forward(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(hidden)


class Calling(nn.Module):
    def __init__(self, kind: type[nn.Linear], name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.name = kind(6, 3), name

    def forward(self, x: Tensor, by_name: bool) -> Tensor:
        return self.lin(**{"scale": 2.0, self.name: x}) if by_name else self.lin(x, 2.0)


@pytest.mark.parametrize("config", [LORA, VERA], ids=["lora", "vera"])
@pytest.mark.parametrize(("kind", "name"), [(Scaled, "input"), (Renamed, "hidden")], ids=["input", "other name"])
def test_a_layer_called_by_keyword_in_another_order(kind: type[nn.Linear], name: str, config: Any) -> None:
    model = several(lambda: Calling(kind, name), a=config)
    assert torch.equal(model(X, True), model(X, False))
    assert not torch.equal(model(X, True), Calling(kind, name)(X, True))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch._dynamo's own imports use torch.jit
def test_a_compiled_base_is_refused() -> None:
    compiled = torch.compile(mlp(), backend="eager")
    before = Snapshot.of(compiled)
    with pytest.raises(UnsupportedError, match=r"compile.*add adapters first.*torch\.compile"):
        get_peft_model(compiled, LORA)
    assert Snapshot.of(compiled) == before


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_a_layer_without_inputs() -> None:
    """There is nothing to adapt: 'all-linear' passes it over, its name is refused with the reason."""
    net = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 2))
    assert list(get_peft_model(net, VeraConfig(r=3, target_modules="all-linear")).adapted_layers()) == ["1"]
    with pytest.raises(TargetError, match=r"'0': its weight is empty: \(4, 0\)"):
        get_peft_model(nn.Sequential(nn.Linear(0, 4)), VeraConfig(r=3, target_modules=["0"]))


def test_the_report_counts_the_weights_kept_aside() -> None:
    model = several(a=LORA.replace(bias="all"), b=VERA)
    before = model.report()
    model.merge_adapter()
    replaced = sum(p.numel() for p in mlp().parameters())
    merged = model.report()
    assert merged.frozen_base == before.frozen_base + replaced
    assert merged.total_bytes == before.total_bytes + 4 * replaced
    assert merged.trainable == before.trainable
    model.unmerge_adapter()
    assert model.report() == before


# -- what the user has set -------------------------------------------------------------------------


def test_adding_and_loading_leave_the_other_adapters_gradients_as_they_are(tmp_path: Any) -> None:
    model = several(a=LORA, b=VERA)
    model.save_pretrained(tmp_path)
    own = {f"{adapter}.{name}": p for adapter in "ab" for name, p in model.adapter_parameters(adapter)}
    own["a.0.lora_A"].requires_grad_(False)  # frozen though active
    own["b.2.vera_lambda_d"].requires_grad_(True)  # trained though not active
    model(X).sum().backward()
    wanted = {name: p.requires_grad for name, p in own.items()}
    grads = {name: p.grad is not None for name, p in own.items()}
    assert [name for name, on in wanted.items() if on != name.startswith("a")] == ["a.0.lora_A", "b.2.vera_lambda_d"]
    model.add_adapter("c", LORA)
    model.load_adapter(tmp_path / "b", "d")
    model.load_adapter(tmp_path / "a", "e", is_trainable=True)
    assert {name: p.requires_grad for name, p in own.items()} == wanted
    assert {name: p.grad is not None for name, p in own.items()} == grads
    assert not any(p.requires_grad for name in "cd" for _, p in model.adapter_parameters(name))
    assert all(p.requires_grad for _, p in model.adapter_parameters("e"))


# -- weights that come to be computed ----------------------------------------------------------------

PUT_ON = {
    "prune": lambda layer, name: prune.random_unstructured(layer, name, 0.5),
    "weight norm": lambda layer, name: parametrizations.weight_norm(layer, name),
    "old weight norm": lambda layer, name: torch.nn.utils.weight_norm(layer, name),
}


def computed_since(method: str, how: str, name: str) -> tuple[PeftModel, nn.Module]:
    """A model whose stem was pruned or normed after the adapter came, and the stem of the base pruned alike."""
    options: dict[str, Any] = {"feedforward_modules": []} if method == "ia3" else {}
    model = get_peft_model(Nested().eval(), get_config(method, target_modules=["stem"], **options))
    randomize(model)
    plain = Nested().eval().stem
    for layer in (model.model.stem.base_layer, plain):
        torch.manual_seed(3)
        PUT_ON[how](layer, name)
    return model, plain


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")  # still in use
@pytest.mark.parametrize("how", PUT_ON)
@pytest.mark.parametrize(
    ("method", "name"), [("lora", "weight"), ("lora", "bias"), ("bitfit", "weight"), ("bitfit", "bias")]
)
def test_over_a_weight_that_is_computed_since_the_adapter_runs(method: str, how: str, name: str) -> None:
    model, plain = computed_since(method, how, name)
    x = torch.linspace(-1, 1, 24).view(4, 6)
    delta: Any = model.model.stem.slot("default").delta()
    weight, bias = plain.weight, plain.bias
    if method == "lora":
        weight = weight + delta.scale * delta.b @ delta.a
    else:
        bias = bias + delta.bias
    torch.testing.assert_close(model.model.stem(x), torch.nn.functional.linear(x, weight, bias))
    with model.disable_adapter():
        torch.testing.assert_close(model.model.stem(x), plain(x))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")  # still in use
@pytest.mark.parametrize("how", PUT_ON)
@pytest.mark.parametrize(
    ("method", "name"), [("lora", "weight"), ("dora", "weight"), ("bitfit", "bias"), ("ia3", "bias")]
)
def test_into_a_weight_that_is_computed_since_nothing_is_merged(method: str, how: str, name: str) -> None:
    model, _ = computed_since(method, how, name)
    before = Snapshot.of(model)
    with pytest.raises(UnsupportedError, match=f"the {name} of a .*Linear is computed from other parameters now"):
        model.merge_adapter()
    assert Snapshot.of(model) == before
    if method == "dora":
        with pytest.raises(UnsupportedError, match="the weight of a .*Linear is computed"):
            model(torch.zeros(1, 6))
