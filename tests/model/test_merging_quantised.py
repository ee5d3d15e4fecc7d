"""What a hostile review of quantised storages, merging and expert parameters found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import LoraConfig, VeraConfig, get_peft_model
from kilotune.convert import to_lora
from kilotune.deltas import LowRank, Rescale
from kilotune.errors import MergeError, TargetError, UnsupportedError
from tests.conformance.quantised import STORAGE_SCHEMES, StorageCase
from tests.support.models import randomize

SIZE = 64


class Net(nn.Module):
    """Two layers and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, SIZE)
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.embed(x)))


def _case(storage: str) -> StorageCase:
    return next(case for case in STORAGE_SCHEMES if case.storage == storage)


def _config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["first"], **options})


@pytest.mark.parametrize("storage", ["bnb-4bit", "bnb-int8", "torchao", "torchao-dynamic"])
def test_a_quantised_module_cannot_be_trained_whole(storage: str) -> None:
    net = Net()
    net.second = _case(storage).quantise(net.second)
    with pytest.raises(TargetError, match=r"modules_to_save: quantised weights.*\n.*second: "):
        get_peft_model(net, _config(modules_to_save=["second"]))
    assert type(net.first) is nn.Linear  # nothing was wrapped
    get_peft_model(net, _config(modules_to_save=["embed"]))


class Other(nn.Linear):
    """A linear layer of the user's own."""


def test_a_layer_that_cuts_the_gradient_and_cannot_be_mended_is_told_of() -> None:
    net = Net()
    net.second = _case("torchao-dynamic").quantise(net.second)
    net.second.__class__ = Other
    with pytest.warns(UserWarning, match="a Other of this model .* stays without gradients"):
        get_peft_model(net, _config())


@pytest.mark.parametrize("storage", ["dense", "torchao"])
def test_a_merged_model_goes_to_the_meta_device(storage: str) -> None:
    net = Net()
    if storage != "dense":
        net.first = _case(storage).quantise(net.first)
    model = get_peft_model(net, _config())
    model.merge_adapter()
    model.to("meta")
    model.unmerge_adapter()
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_safe_merge_looks_at_what_is_only_cast_too() -> None:
    net = Net()
    net.embed.weight.data[0, 0] = 1e6
    model = get_peft_model(net, _config())
    x = torch.tensor([[1, 2]])
    before = model(x)
    with pytest.raises(MergeError, match=r"safe_merge refused dtype=torch.float16: 1 tensors"):
        model.merge_and_unload(dtype=torch.float16, safe_merge=True)
    assert torch.equal(model(x), before)
    net.embed.weight.data[0, 0] = torch.inf  # was not finite before, so it is not the dtype's doing
    assert model.merge_and_unload(dtype=torch.float16, safe_merge=True).embed.weight.dtype == torch.float16


def test_narrow_floats_of_a_layer_unknown_here_are_not_taken_for_its_weight() -> None:
    """They need the scales that stand beside them (transformers' FP8Linear)."""
    net = Net()
    net.second.weight = nn.Parameter(net.second.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    model = get_peft_model(net, _config())
    with pytest.raises(MergeError, match=r"second\.weight: Tensor of float8_e4m3fn in a Linear"):
        model.merge_and_unload(dtype=torch.bfloat16)
    assert net.second.weight.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_model_quantised_in_a_way_unknown_here_is_not_made_dense(dequantize: bool) -> None:
    transformers = pytest.importorskip("transformers")
    tiny = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8)
    base = transformers.GPT2Model(tiny)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"]))

    class Config:
        quant_method = "gptq"

    class Quantiser:
        quantization_config = Config()

        def get_weight_conversions(self) -> list[Any]:
            return []

        def remove_quantization_config(self, whole: nn.Module) -> None:
            del whole.hf_quantizer

    Config.dequantize = dequantize  # type: ignore[attr-defined]  # the weights were made dense as they were loaded
    base.__dict__["hf_quantizer"] = Quantiser()
    if dequantize:
        assert model.merge_and_unload(dtype=torch.bfloat16).dtype == torch.bfloat16
        return
    with pytest.raises(MergeError, match="the model: transformers has it quantised by 'gptq'"):
        model.merge_and_unload(dtype=torch.bfloat16)


# -- modules that multiply by a parameter of their own ----------------------------------------------


class Product(nn.Module):
    """A forward that keeps something."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(SIZE))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x @ self.matrix


def test_a_forward_may_keep_things() -> None:
    base = nn.Sequential(Product())
    config = LoraConfig(r=2, target_modules=[], target_parameters=["matrix"])
    model = get_peft_model(copy.deepcopy(base), config)
    x = torch.randn(3, SIZE)
    assert torch.allclose(model(x), base(x))
    assert model.model[0].base_layer.calls == 1
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("order", [["plain", "dora"], ["dora", "plain"]])
def test_a_rescaled_matrix_beside_another_adapter(order: list[str]) -> None:
    """In the order of activation: DoRA's rows scale what was added before, and not what comes after."""
    options: dict[str, Any] = {"r": 2, "target_modules": [], "target_parameters": ["matrix"]}
    base = nn.Sequential(Product()).double()
    model = get_peft_model(base, LoraConfig(**options), "plain")
    model.add_adapter("dora", LoraConfig(use_dora=True, **options))
    for name in ("plain", "dora"):
        randomize(model, name, scale=0.2)
    x = torch.randn(3, SIZE).double()
    (layer,) = model.adapted_layers().values()
    plain, dora = (layer.slot(name) for name in ("plain", "dora"))
    assert plain is not None
    assert dora is not None
    low, rescale = plain.delta(), dora.delta()
    assert isinstance(low, LowRank)
    assert isinstance(rescale, Rescale)
    assert rescale.rows is not None
    added, matrix = low.weight_change(layer.base_matrix()), layer.base_matrix()
    inner = matrix + (0 if rescale.inner is None else rescale.inner.weight_change(matrix))
    before, after = (added, 0) if order[0] == "plain" else (0, added)
    weight = rescale.rows.unsqueeze(-1) * (inner + before) + after
    model.set_adapter(order)
    y = model(x)
    for part in ([], order, order[:1], order[1:]):
        if part:
            model.merge_adapter(part)
        torch.testing.assert_close(model(x), y)
        if part:
            model.unmerge_adapter()
    plain_model: Any = model.merge_and_unload()
    torch.testing.assert_close(plain_model[0].matrix, layer.kind.native(layer.base_layer, weight))
    torch.testing.assert_close(plain_model(x), y)


def test_an_adapter_on_a_matrix_is_not_turned_into_lora() -> None:
    config = VeraConfig(r=2, target_modules=[], target_parameters=["matrix"])
    model = get_peft_model(nn.Sequential(Product()), config)
    with pytest.raises(UnsupportedError, match=r"target_parameters.*into LoRA is not there"):
        to_lora(model)
