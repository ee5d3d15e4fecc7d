"""Putting adapters into models: what is wrapped, what passes through, what is refused, what comes back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import (
    AdapterConfig,
    ConfigError,
    LoraConfig,
    LoraModel,
    PeftModel,
    TargetError,
    UnsupportedError,
    VeraConfig,
    VeraModel,
    get_peft_model,
)
from kilotune.layers.adapted import AdaptedLayer
from kilotune.layers.saved_module import SavedModule
from tests.support.guards import adapters_act, no_base_weight_is_copied
from tests.support.models import Nested, Snapshot, mlp, places, randomize, trained

X = torch.linspace(-1, 1, 24).view(4, 6)
BOTH = [VeraConfig(r=4, target_modules="all-linear"), LoraConfig(r=2, target_modules="all-linear")]
both = pytest.mark.parametrize("config", BOTH, ids=["vera", "lora"])


# -- constructors ----------------------------------------------------------------------------------


@both
def test_get_peft_model_changes_the_model_in_place_and_freezes_its_base(config: AdapterConfig) -> None:
    base = mlp()
    weights = set(places(base).values())
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    assert model.get_base_model() is base
    assert model.base_model.model is base
    assert [name for name, m in base.named_modules() if isinstance(m, AdaptedLayer)] == ["0", "2"]
    assert {p.data_ptr() for _, p in trained(model)}.isdisjoint(weights)
    assert {id(p) for _, p in trained(model)} == {id(p) for _, p in model.adapter_parameters("default")}
    assert model.active_adapters == ["default"]
    assert model.active_adapter == "default"
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(("cls", "index"), [(VeraModel, 0), (LoraModel, 1)])
def test_the_models_of_one_method_take_their_own_config_only(cls: Any, index: int) -> None:
    model = cls(mlp(), BOTH[index], "mine")
    assert model.active_adapters == ["mine"]
    randomize(model)
    twin = get_peft_model(mlp(), BOTH[index], "mine")
    randomize(twin)
    assert torch.equal(model(X), twin(X))
    base = mlp()
    before = Snapshot.of(base)
    other = BOTH[1 - index]
    with pytest.raises(ConfigError, match=rf"{cls.__name__}: expected a \w+Config, got .*{type(other).__name__}"):
        cls(base, other, "mine")
    assert Snapshot.of(base) == before
    with pytest.raises(ConfigError, match=cls.__name__):
        model.add_adapter("more", other)
    assert list(model.peft_config) == ["mine"]


def test_the_default_adapter_name_is_default() -> None:
    assert VeraModel(mlp(), BOTH[0]).active_adapters == ["default"]
    assert get_peft_model(mlp(), BOTH[0], adapter_name="me").active_adapters == ["me"]


# -- passthrough -----------------------------------------------------------------------------------


def test_every_attribute_of_the_base_passes_through() -> None:
    base = Nested()
    base.note = {"a": 1}
    model = get_peft_model(base, VeraConfig(r=2, target_modules=["head"]))
    assert model.note is base.note
    assert model.greet() == "hello you from Nested"
    assert model.blocks is base.blocks
    assert isinstance(model.head, AdaptedLayer)
    assert model.head.out_features == 3
    assert model.head.weight is model.head.base_layer.weight
    assert not hasattr(model, "missing")
    with pytest.raises(AttributeError, match="missing"):
        _ = model.missing
    with pytest.raises(AttributeError, match="missing"):
        _ = model.head.missing


def test_train_and_eval_reach_the_adapters() -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    randomize(model)
    model.eval()
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))
    base = mlp().eval()
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    assert not wrapped.training
    assert not any(m.training for m in wrapped.adapted_layers()["0"].modules())


def test_hooks_of_the_base_layer_still_run() -> None:
    base, seen = mlp(), []
    base[0].register_forward_hook(lambda *a: seen.append("forward"))
    base[0].weight.requires_grad_(False)
    get_peft_model(base, BOTH[0])(X)
    assert seen == ["forward"]


# -- shapes of models ------------------------------------------------------------------------------


@both
def test_nested_modules_and_modules_without_bias(config: AdapterConfig) -> None:
    model = get_peft_model(Nested(), config)
    expected = ["stem", "blocks.0.mix.up", "blocks.0.mix.down", "blocks.1.mix.up", "blocks.1.mix.down", "head"]
    assert list(model.adapted_layers()) == expected
    assert torch.equal(model(X), Nested()(X)) or isinstance(config, LoraConfig)
    torch.testing.assert_close(model(X), Nested()(X))
    randomize(model)
    adapters_act(model, lambda: model(X))
    no_base_weight_is_copied(Nested, config, X)


class Twice(nn.Module):
    """One layer object under two names, in two parents."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.rest = nn.ModuleDict({"second": self.first, "last": nn.Linear(6, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.rest["last"](torch.tanh(self.rest["second"](torch.tanh(self.first(x)))))


def test_one_module_under_two_names_is_adapted_once_and_acts_at_both() -> None:
    base = Twice()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["first"]))
    assert base.first is base.rest["second"]
    assert list(model.adapted_layers()) == ["first"]
    assert model.get_nb_trainable_parameters()[0] == 2 * (6 + 6)
    randomize(model)
    plain, layer = Twice(), base.first
    with torch.no_grad():
        slot = layer.slot("default")
        plain.first.weight += 4.0 * slot.lora_B @ slot.lora_A  # alpha 8 / r 2
    torch.testing.assert_close(model(X), plain(X))
    model.merge_adapter()
    torch.testing.assert_close(model(X), plain(X))
    model.unmerge_adapter()
    assert Snapshot.of(model.unload()).bits == Snapshot.of(Twice()).bits
    assert type(base.first) is nn.Linear
    assert base.first is base.rest["second"]


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("target", ["first", "second", "rest.second"])
def test_one_module_under_two_names_can_be_targeted_by_either(target: str, bias: str, tmp_path: Path) -> None:
    model = get_peft_model(Twice(), LoraConfig(r=2, target_modules=[target, "last"], bias=bias))
    if bias == "all":
        assert sum(name.endswith(".bias") for name, _ in model.adapter_parameters()) == 2
    else:
        assert [name.rpartition(".")[2] for name, _ in model.adapter_parameters()] == ["lora_A", "lora_B"] * 2
    randomize(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Twice(), tmp_path)(X), model(X))


def test_two_layers_that_share_one_weight_stay_tied_unless_merged() -> None:
    def make() -> nn.Sequential:
        base = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        torch.manual_seed(0)
        nn.init.normal_(base[0].weight)
        base[2].weight = base[0].weight
        return base

    base = make()
    model = get_peft_model(base, VeraConfig(r=2, target_modules=["0"], init_weights=False))
    kept = base[2].weight
    y = model(X)
    assert base[0].weight is kept
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)
    assert base[2].weight is kept  # the other module keeps the base's value
    assert base[0].weight is not kept
    model.unmerge_adapter()
    assert base[0].weight is kept
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(X), y)
    assert plain[2].weight is kept
    assert plain[0].weight.requires_grad
    assert plain[2].weight.requires_grad


def test_a_bare_layer_as_the_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(TargetError, match=r"no modules inside it; put a bare layer into torch\.nn\.Sequential"):
        get_peft_model(nn.Linear(3, 4), VeraConfig(r=2, target_modules="all-linear"))


# -- torch's own transformer -----------------------------------------------------------------------


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers)


Z = torch.linspace(-1, 1, 64).view(2, 4, 8)


@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], ["layers.1.linear1"], ["linear1", "linear2"]])
def test_in_torchs_encoder_the_adapters_run_in_eval_too(targets: list[str]) -> None:
    base = encoder()
    model = get_peft_model(base, VeraConfig(r=2, target_modules=targets))
    adapters_act(model, lambda: model(Z))
    model.eval()
    reference = encoder().eval()
    torch.testing.assert_close(model(Z), reference(Z))
    with torch.no_grad():
        torch.testing.assert_close(model(Z), reference(Z))  # the fast path against the plain one
    model.unload()
    assert Snapshot.of(base.eval()).bits == Snapshot.of(reference).bits
    assert {k: v for k, v in vars(base.layers[0]).items() if "kilotune" in k} == {}
    assert base.layers[0].activation_relu_or_gelu == reference.layers[0].activation_relu_or_gelu != 0
    assert base.use_nested_tensor == reference.use_nested_tensor


def test_in_torchs_encoder_padding_does_not_bring_the_fast_path_back() -> None:
    """A padding mask makes the encoder hand nested tensors to its layers, which only the fast path takes."""
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    model = get_peft_model(encoder(), VeraConfig(r=2, target_modules=["layers.1.linear1"], init_weights=False)).eval()
    with torch.no_grad():
        without = model(Z, src_key_padding_mask=padding)
        with model.disable_adapter():
            base = model(Z, src_key_padding_mask=padding)
    torch.testing.assert_close(without, model(Z, src_key_padding_mask=padding))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: nested tensors are a prototype
        with torch.no_grad():
            reference = encoder().eval()(Z, src_key_padding_mask=padding)
    torch.testing.assert_close(base[~padding], reference[~padding])
    assert (without - base)[~padding].abs().max() > 1e-3


def test_in_torchs_encoder_a_norm_trained_whole_acts_in_eval() -> None:
    model = get_peft_model(encoder(), VeraConfig(r=2, target_modules=["linear1"], modules_to_save=["norm2"]))
    model.eval()
    with torch.no_grad():
        before = model(Z)
        for name, parameter in model.adapter_parameters():
            if "norm2" in name:
                parameter.add_(1.0)
        assert not torch.equal(model(Z), before)
        with model.disable_adapter():
            torch.testing.assert_close(model(Z), encoder().eval()(Z))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [None, "model", 5, {"a": nn.Linear(2, 2)}, nn.Linear], ids=repr)
def test_what_is_no_module_is_refused(thing: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a torch\.nn\.Module as the base model, got builtins\."):
        get_peft_model(thing, BOTH[0])


@pytest.mark.parametrize("thing", [None, "vera", {"r": 4}, VeraConfig], ids=repr)
def test_what_is_no_config_is_refused(thing: Any) -> None:
    base = mlp()
    before = Snapshot.of(base)
    with pytest.raises(ConfigError, match="expected a AdapterConfig, got"):
        get_peft_model(base, thing)
    assert Snapshot.of(base) == before


def test_a_model_that_has_adapters_already_is_refused() -> None:
    base = Nested()
    model = get_peft_model(base, BOTH[0])
    for again in (base, model, nn.Sequential(model), nn.Sequential(base)):
        before = Snapshot.of(model)
        with pytest.raises(UnsupportedError, match=r"has adapters of kilotune already .*use add_adapter\(\)"):
            get_peft_model(again, BOTH[1])
        assert Snapshot.of(model) == before
    saved = mlp()
    get_peft_model(saved, VeraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    assert isinstance(saved[2], SavedModule)
    with pytest.raises(UnsupportedError, match="has adapters of kilotune already"):
        get_peft_model(saved[2], BOTH[0])


def test_a_model_with_adapters_of_peft_is_refused() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0"]))
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(UnsupportedError, match=r"has adapters of PEFT already .*unload\(\) them first"):
            get_peft_model(model, BOTH[0])


def test_a_failure_inside_a_modules_own_copying_leaves_the_model_alone() -> None:
    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Uncopyable:
            raise RuntimeError("this module cannot be copied")

    base = nn.Sequential(nn.Linear(6, 6), Uncopyable(6, 2))
    before = Snapshot.of(base)
    with pytest.raises(RuntimeError, match="cannot be copied"):
        get_peft_model(base, VeraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    assert Snapshot.of(base) == before


# -- after -----------------------------------------------------------------------------------------


@both
def test_unload_gives_the_base_back_as_it_was(config: AdapterConfig) -> None:
    base = Nested()
    base.stem.weight.requires_grad_(False)
    base.blocks[0].norm.bias.requires_grad_(False)
    before = Snapshot.of(base)
    model = get_peft_model(base, config)
    randomize(model)
    model(X).sum().backward()
    model.merge_adapter()
    assert model.unload() is base
    assert Snapshot.of(base) == before
    again = get_peft_model(base, config)  # and it can be wrapped anew
    assert list(again.adapted_layers())


@both
def test_merge_and_unload_restores_what_could_be_trained(config: AdapterConfig) -> None:
    base = Nested()
    base.stem.weight.requires_grad_(False)
    before = Snapshot.of(base)
    model = get_peft_model(base, config)
    randomize(model)
    y = model(X)
    plain = model.merge_and_unload(progressbar=True, safe_merge=True)
    after = Snapshot.of(plain)
    torch.testing.assert_close(plain(X), y, rtol=1e-4, atol=1e-5)
    assert after.trainable == before.trainable
    assert after.modules == before.modules
    assert after.bits.keys() == before.bits.keys()


def test_meta_models_are_wrapped_without_memory() -> None:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(20_000, 30_000), nn.Linear(30_000, 20_000))
    model = get_peft_model(base, VeraConfig(r=1024, target_modules="all-linear"))
    assert all(p.device.type == "meta" for p in model.parameters())
    report = model.report()
    assert report.trainable == 2 * 1024 + 50_000
    assert report.frozen_shared == 2 * 1024 * 30_000
    assert report.pairs == 1
    model.add_adapter("lora", LoraConfig(r=8, target_modules="all-linear"))
    model.set_adapter("lora")
    assert model.get_nb_trainable_parameters()[0] == 2 * 8 * 50_000


@both
def test_the_printed_line_is_pefts(config: AdapterConfig, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(mlp(), config)
    trainable = 4 + 5 + 4 + 3 if isinstance(config, VeraConfig) else 2 * (6 + 5) + 2 * (5 + 3)
    total = 6 * 5 + 5 + 5 * 3 + 3 + trainable
    assert model.get_nb_trainable_parameters() == (trainable, total)
    model.print_trainable_parameters()
    line = f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
    printed = capsys.readouterr().out.strip()
    shared = " || shared frozen projections: 44" if isinstance(config, VeraConfig) else ""  # 4 x (6 + 5)
    assert printed == line + shared


# -- weights that are not what they seem -----------------------------------------------------------


def weight_norm(layer: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(layer)


def pruned(layer: nn.Module) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(layer, "weight", amount=0.5)


def pruned_bias(layer: nn.Module) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(layer, "bias", amount=0.5)


@pytest.mark.parametrize("change", [weight_norm, pruned, pruned_bias])
def test_a_weight_computed_from_others_is_refused_when_the_adapter_is_added(change: Any) -> None:
    """It could be run, but neither merged nor saved whole: said at once, not at the first merge."""
    base = Nested()
    change(base.stem)
    before = Snapshot.of(base)
    with pytest.raises(TargetError, match=r"'stem': its weight is no plain floating-point parameter \("):
        get_peft_model(base, VeraConfig(r=2, target_modules=["stem"]))
    assert Snapshot.of(base) == before
    assert "stem" not in get_peft_model(base, BOTH[0]).adapted_layers()


def test_a_lazy_layer_anywhere_is_refused_until_it_has_a_shape() -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.LazyLinear(3))
    with pytest.raises(UnsupportedError, match="'1' has no shape yet; run the base model once, then add adapters"):
        get_peft_model(base, VeraConfig(r=2, target_modules=["0"]))
    assert type(base[0]) is nn.Linear
    assert base[0].weight.requires_grad
    base(X)
    assert list(get_peft_model(base, BOTH[0]).adapted_layers()) == ["0", "1"]
