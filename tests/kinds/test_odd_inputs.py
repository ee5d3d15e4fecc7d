"""What the conformance cells do not ask of a layer kind: odd inputs, odd modules, refusals, and what is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilotune import (
    BitfitConfig,
    LoraConfig,
    MergeError,
    PeftModel,
    TargetError,
    UnsupportedError,
    VeraConfig,
    get_config,
    get_peft_model,
)
from kilotune.adapter_files.reading import open_adapter
from kilotune.convert import rewrite, to_kilotune, to_lora, to_peft
from kilotune.kinds import kind_of
from tests.support.models import Snapshot, bits, disk, randomize, tiny_llama


def wrapped(layer: nn.Module, config: Any = None) -> PeftModel:
    """One layer, adapted, in float64, with random numbers in the adapter."""
    model = get_peft_model(nn.Sequential(layer.double()), config or LoraConfig(r=3, target_modules=["0"])).double()
    randomize(model)
    return model


def merged_layer(model: PeftModel) -> nn.Module:
    """The plain layer with the adapter in its weight."""
    return model.merge_and_unload()[0]


def change(model: PeftModel) -> Tensor:
    """The change of a LoRA adapter's canonical matrix, written out."""
    own = dict(model.adapter_parameters())
    result: Tensor = 8 / 3 * (own["0.lora_B"] @ own["0.lora_A"]).detach()
    return result


# -- convolutions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_grouped_convolution_gets_the_flat_change_and_its_factors_run_per_group(groups: int) -> None:
    """The merged weight is the base's plus b a in the weight's own shape, and the unmerged output is its output."""
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, (3, 2), groups=groups, padding=1)
    weight, bias = layer.weight.detach().double().clone(), layer.bias.detach().double().clone()
    model = wrapped(layer)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    expected = F.conv2d(x, weight + change(model).view(weight.shape), bias, padding=1, groups=groups)
    y = model(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(merged_layer(model)(x), expected)


def test_no_dense_matrix_is_built_for_the_factors() -> None:
    """The largest tensor of a forward of a wide 1x1 layer stays far below (out, in)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for one in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(one, Tensor):
                    self.largest = max(self.largest, one.numel())
            return result

    model = get_peft_model(nn.Sequential(nn.Conv2d(256, 256, 1, groups=2)), LoraConfig(r=2, target_modules=["0"]))
    with Sizes() as seen:
        model(torch.randn(1, 256, 3, 3)).sum().backward()
    assert seen.largest <= 256 * 3 * 3  # the output; the weight has 32768 numbers


@pytest.mark.parametrize("config", [LoraConfig(r=3, target_modules=["0"]), VeraConfig(r=5, target_modules=["0"])])
def test_channels_last_and_inputs_without_a_batch(config: Any) -> None:
    model = wrapped(nn.Conv2d(4, 6, 3, stride=2, groups=2), config)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    y = model(x)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), y)
    torch.testing.assert_close(model(x[0]), y[0])
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), y)


def test_vera_s_gain_counts_the_inputs_that_one_output_sees() -> None:
    """sqrt(6 / fan_in), fan_in = in / groups * kernel, as in nn.init.kaiming_uniform_ of the weight."""
    sites = [
        (nn.Conv2d(6, 4, 3, groups=2), 27),
        (nn.Conv1d(6, 4, 5), 30),
        (nn.Embedding(9, 4), 1),
        (nn.Linear(7, 4), 7),
    ]
    for layer, fan_in in sites:
        model = get_peft_model(nn.Sequential(layer), VeraConfig(r=2, target_modules=["0"]))
        assert model.adapted_layers()["0"].site("0").fan_in == fan_in


class Standardised(nn.Conv2d):
    """A convolution that changes its weight in its forward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch's layers call it
        return self._conv_forward(input, self.weight / self.weight.std(), self.bias)


def test_a_convolution_with_a_forward_of_its_own_is_refused_but_its_bias_is_not() -> None:
    base = nn.Sequential(Standardised(2, 3, 2))
    before = Snapshot.of(base)
    with pytest.raises(TargetError, match=r"Standardised does not run as torch's Conv2d does"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    assert Snapshot.of(base) == before
    x = torch.randn(1, 2, 4, 4)
    y = base(x)
    model = get_peft_model(base, BitfitConfig())
    with torch.no_grad():
        dict(model.adapter_parameters())["0.bitfit_delta"].copy_(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(model(x), y + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))


@pytest.mark.parametrize("cls", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_transposed_convolution_is_refused_with_the_reason(cls: Callable[..., nn.Module]) -> None:
    base = nn.Sequential(cls(2, 3, 2))
    with pytest.raises(TargetError, match="in a transposed convolution an input meets the columns of several outputs"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    assert list(get_peft_model(base, BitfitConfig()).adapted_layers()) == ["0"]


def test_a_lazy_convolution_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="has no shape yet"):
        get_peft_model(nn.Sequential(nn.LazyConv2d(3, 2)), LoraConfig(r=2, target_modules=["0"]))


def test_all_linear_takes_linear_layers_only() -> None:
    base = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Linear(4, 5), nn.Embedding(3, 2), nn.LayerNorm(5))
    assert list(get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).adapted_layers()) == ["1"]


# -- embeddings ------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 4, 0], [6, 4, 4]])


class Scaled(nn.Embedding):
    """As Gemma's and Bart's: what is looked up is multiplied."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch's layers call it
        return super().forward(input) * 3.5


@pytest.mark.parametrize("config", [LoraConfig(r=3, target_modules=["0"]), get_config("dora", target_modules=["0"])])
def test_an_embedding_that_scales_what_it_looks_up(config: Any) -> None:
    model = wrapped(Scaled(7, 5), config)
    y = model(IDS)
    layer = merged_layer(model)
    assert isinstance(layer, Scaled)
    torch.testing.assert_close(y, 3.5 * F.embedding(IDS, layer.weight))


def test_an_id_sees_its_own_column_only() -> None:
    layer = nn.Embedding(7, 5)
    table = layer.weight.detach().double().clone()
    model = wrapped(layer)
    torch.testing.assert_close(model(IDS), F.embedding(IDS, table + change(model).T))


def test_max_norm_is_refused_with_the_reason_and_the_table_is_left_alone() -> None:
    base = nn.Sequential(nn.Embedding(7, 5, max_norm=0.1))
    before = Snapshot.of(base)
    with pytest.raises(TargetError, match=r"max_norm=0\.1 rescales rows of its own weight in each forward"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    assert Snapshot.of(base) == before


def test_an_embedding_that_computes_its_ids_is_refused_by_the_names_of_its_inputs() -> None:
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    base = nn.Sequential(OPTLearnedPositionalEmbedding(8, 4))
    with pytest.raises(TargetError, match=r"several inputs \(attention_mask, .*only an embedding that takes ids alone"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))


class Words(nn.Module):
    """An embedding, a convolution in groups, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix, self.head = nn.Embedding(7, 4), nn.Conv1d(4, 6, 2, groups=2), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(ids).mT)).mean(-1))


ALL = ["table", "mix", "head"]


@pytest.mark.parametrize("sharing", ["nested", "shape"])
def test_vera_over_all_kinds_keeps_its_output_with_stored_matrices_and_back(sharing: str, tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules=ALL, sharing=sharing, save_projection=True)
    model = get_peft_model(Words(), config)
    randomize(model)
    model.save_pretrained(tmp_path / "stored")
    stored = PeftModel.from_pretrained(Words(), tmp_path / "stored")
    torch.testing.assert_close(stored(IDS), model(IDS), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(IDS), Words()(IDS), atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("method", ["lora", "vera", "ia3", "bitfit"])
def test_files_round_trip_to_the_same_bytes(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    if method == "ia3":
        options = {"feedforward_modules": ["mix"]}
    elif method == "bitfit":
        options = {}
    targets = ["mix", "head"] if method == "bitfit" else ALL
    model = get_peft_model(Words(), get_config(method, target_modules=targets, **options))
    randomize(model)
    model.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(Words(), tmp_path / "one", is_trainable=True)
    assert torch.equal(again(IDS), model(IDS))
    again.save_pretrained(tmp_path / "two")
    assert disk(tmp_path / "one") == disk(tmp_path / "two")


# -- norms -----------------------------------------------------------------------------------------


def test_a_norm_s_kind_is_known_without_transformers_and_by_name() -> None:
    class T5LayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    for layer in (nn.LayerNorm(3), nn.LayerNorm(3, bias=False), nn.RMSNorm(3), nn.GroupNorm(1, 3), T5LayerNorm()):
        kind = kind_of(layer)
        assert kind is not None
        assert kind.name == "norm", layer
    assert getattr(kind_of(nn.BatchNorm1d(3)), "name", None) == "biased"
    assert getattr(kind_of(nn.LayerNorm(3, elementwise_affine=False)), "name", None) != "norm"


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm((2, 3)), nn.LayerNorm((2, 3), bias=False), nn.LayerNorm(3, bias=False), nn.GroupNorm(2, 2)],
    ids=str,
)
def test_the_shift_of_a_norm_s_bias_is_added_to_its_output_and_merges(layer: nn.Module) -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    y = layer.double()(x)
    before = bits(layer)
    model = wrapped(layer, BitfitConfig(target_modules=["0"]))
    ((_, delta),) = model.adapter_parameters()
    shape = (2, 1) if isinstance(layer, nn.GroupNorm) else layer.weight.shape
    expected = y + delta.detach().view(shape)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(layer(x), expected)
    model.unmerge_adapter()
    assert bits(layer) == before
    torch.testing.assert_close(merged_layer(model)(x), expected)


def test_the_bias_of_a_norm_with_several_axes_is_trained_with_bias_all() -> None:
    base = nn.Sequential(nn.LayerNorm((2, 3)), nn.Linear(3, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["1"], bias="all"))
    own = dict(model.adapter_parameters())
    assert own["0.bias"].shape == (2, 3)
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        own["0.bias"] += torch.arange(6.0).view(2, 3)
    y = model(x)
    torch.testing.assert_close(y, base[1].base_layer(base[0].base_layer(x) + torch.arange(6.0).view(2, 3)))
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)


def test_an_rms_norm_has_no_place_for_a_bias_so_it_trains_and_saves_but_does_not_merge(tmp_path: Path) -> None:
    base = tiny_llama()
    assert "bias" not in base.model.norm._parameters
    model = get_peft_model(base, BitfitConfig(target_modules=["input_layernorm", "norm", "q_proj"]))
    randomize(model)
    ids = torch.arange(8)[None]
    y = model(input_ids=ids).logits
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in model.adapter_parameters())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, y)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)
    before = Snapshot.of(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"a LlamaRMSNorm has no place for one, so it cannot be merged"):
            merge()
        assert Snapshot.of(model) == before
    assert set(get_peft_model(tiny_llama(), BitfitConfig(target_modules="all-linear")).adapted_layers()) == {
        name for name, m in tiny_llama().named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    }


# -- conversions -----------------------------------------------------------------------------------


def test_vera_over_all_kinds_becomes_an_equal_lora(tmp_path: Path) -> None:
    model = get_peft_model(Words(), VeraConfig(r=4, target_modules=ALL))
    randomize(model)
    y = model(IDS)
    to_lora(model).save(tmp_path / "lora")
    torch.testing.assert_close(PeftModel.from_pretrained(Words(), tmp_path / "lora")(IDS), y, rtol=1e-5, atol=1e-6)


def test_vera_with_stored_matrices_finds_its_seed_again(tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules=ALL, projection_prng_key=5, save_projection=True)
    model = get_peft_model(Words(), config)
    randomize(model)
    with pytest.raises(UnsupportedError, match="PEFT has no form for VeRA in layers that are not linear") as caught:
        to_peft(model)
    assert "table" in str(caught.value)
    assert "mix" in str(caught.value)
    model.save_pretrained(tmp_path / "stored")
    stored = PeftModel.from_pretrained(Words(), tmp_path / "stored")
    back = to_kilotune(stored)
    assert "portable matrices from the seed" in back.what
    back.save(tmp_path / "small")
    small = PeftModel.from_pretrained(Words(), tmp_path / "small")
    torch.testing.assert_close(small(IDS), model(IDS), rtol=1e-5, atol=1e-6)


def test_a_file_of_convolutions_is_not_rewritten_without_the_base(tmp_path: Path) -> None:
    """The groups decide PEFT's form, and no file tells them."""
    model = get_peft_model(Words(), LoraConfig(r=4, target_modules=ALL))
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"mix\.lora_A\.weight is of a convolution; give the base"):
        rewrite(open_adapter(tmp_path))
