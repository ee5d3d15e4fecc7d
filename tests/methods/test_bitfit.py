"""BitFit: which layers it takes, what it trains, what merging leaves behind, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kilotune import BitfitConfig, ConfigError, LoraConfig, PeftModel, TargetError, get_config, get_peft_model
from tests.support.models import Nested, Snapshot, bits, disk, mlp, randomize, tiny_classifier, tiny_gpt2


def biases(model: nn.Module) -> dict[str, int]:
    """Every bias of a plain model by the name of its module, counted by hand from the state dict."""
    return {key.removesuffix(".bias"): v.numel() for key, v in model.state_dict().items() if key.endswith(".bias")}


@pytest.mark.parametrize("make", [mlp, Nested, tiny_gpt2, tiny_classifier], ids=lambda make: make.__name__)
def test_by_default_every_bias_of_the_model_is_trained(make: Any) -> None:
    expected = biases(make())
    model = get_peft_model(make(), BitfitConfig())
    assert {name: layer.site(name).out for name, layer in model.adapted_layers().items()} == expected
    assert {name: p.numel() for name, p in model.adapter_parameters()} == {
        f"{name}.bitfit_delta": size for name, size in expected.items()
    }
    assert model.get_nb_trainable_parameters()[0] == sum(expected.values())


def test_a_bias_that_a_container_shares_with_its_layer_is_trained_once() -> None:
    """BERT's language-model head holds the bias of its decoder under its own name too."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertForMaskedLM(BertConfig(**sizes, intermediate_size=24)).eval()
    ids = torch.arange(6)[None]
    before = base(input_ids=ids).logits
    unique = {p.data_ptr(): p.numel() for n, p in base.named_parameters(remove_duplicate=False) if n.endswith("bias")}
    model = get_peft_model(base, BitfitConfig())
    assert model.get_nb_trainable_parameters()[0] == sum(unique.values())
    head = dict(model.adapter_parameters())["cls.predictions.decoder.bitfit_delta"]
    with torch.no_grad():
        head += torch.arange(32)
    torch.testing.assert_close(model(input_ids=ids).logits, before + torch.arange(32))  # once, not twice


class Net(nn.Module):
    """A norm, a layer with a bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.second = nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.norm(x))))


X = torch.linspace(-1, 2, 20, dtype=torch.float64).view(5, 4)


def shifted(net: Net, deltas: dict[str, Tensor]) -> Tensor:
    """The same arithmetic, written out."""
    h = (X - X.mean(-1, keepdim=True)) / (X.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    h = h * net.norm.weight + net.norm.bias + deltas.get("norm", 0)
    h = torch.tanh(h @ net.first.weight.T + net.first.bias + deltas.get("first", 0))
    return h @ net.second.weight.T + deltas.get("second", 0)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-biased", ["norm", "first"]),
        ("All-Biased", ["norm", "first"]),
        ("all-linear", ["first", "second"]),
        (["second"], ["second"]),
        (".*(norm|second)", ["norm", "second"]),
    ],
)
def test_targets_decide_and_the_output_is_that_of_the_shifted_biases(targets: Any, layers: list[str]) -> None:
    model = get_peft_model(Net().double(), BitfitConfig(target_modules=targets))
    assert list(model.adapted_layers()) == layers
    model.double()
    randomize(model)
    deltas = {name.removesuffix(".bitfit_delta"): p for name, p in model.adapter_parameters()}
    torch.testing.assert_close(model(X), shifted(Net().double(), deltas))


def test_merging_gives_a_bias_to_a_layer_without_and_unmerging_takes_it_away() -> None:
    model = get_peft_model(Net(), BitfitConfig(target_modules="all-linear"))
    randomize(model)
    before, y = bits(Net()), model(X.float())
    model.merge_adapter()
    assert set(model.get_base_model().second.base_layer.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(model(X.float()), y)
    model.unmerge_adapter()
    assert set(model.get_base_model().second.base_layer.state_dict()) == {"weight"}
    delta = dict(model.adapter_parameters())["second.bitfit_delta"].clone()
    plain = model.merge_and_unload()
    assert {key: value for key, value in bits(plain).items() if key.endswith("weight")} == {
        key: value for key, value in before.items() if key.endswith("weight")
    }
    assert torch.equal(plain.second.bias, delta)
    torch.testing.assert_close(plain(X.float()), y)


def test_beside_another_adapter_the_changes_add_up() -> None:
    model = get_peft_model(Net().double(), BitfitConfig(), "bits")
    model.add_adapter("low", LoraConfig(r=2, target_modules=["first"], bias="lora_only"))
    model.double()
    for name in ("bits", "low"):
        randomize(model, name)
    net, bits_, low = Net().double(), dict(model.adapter_parameters("bits")), dict(model.adapter_parameters("low"))
    both = {
        "norm": bits_["norm.bitfit_delta"],
        "first": bits_["first.bitfit_delta"] + low["first.bias"] - net.first.bias,
    }
    with torch.no_grad():
        net.first.weight += 4.0 * low["first.lora_B"] @ low["first.lora_A"]
    model.set_adapter(["bits", "low"])
    torch.testing.assert_close(model(X), shifted(net, both))


def test_a_classification_task_trains_the_head_whole() -> None:
    model = get_peft_model(tiny_classifier(), BitfitConfig(task_type="SEQ_CLS"))
    assert "classifier" not in model.adapted_layers()
    names = {name for name, _ in model.adapter_parameters()}
    assert {"classifier.weight", "classifier.bias"} <= names
    expected = sum(biases(tiny_classifier()).values()) + 3 * 16
    assert model.get_nb_trainable_parameters()[0] == expected


def test_the_file_is_small_exact_and_refused_by_peft(tmp_path: Path) -> None:
    model = get_peft_model(Net(), BitfitConfig(exclude_modules=["norm"]))
    randomize(model)
    model.save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {key: tuple(v.shape) for key, v in tensors.items()} == {"base_model.model.first.bitfit_delta": (3,)}
    again = PeftModel.from_pretrained(Net(), tmp_path / "one", is_trainable=True)
    assert torch.equal(again(X.float()), model(X.float()))
    again.save_pretrained(tmp_path / "two")
    assert disk(tmp_path / "one") == disk(tmp_path / "two")
    with pytest.raises(KeyError, match="BITFIT"):  # PEFT has no such method, and says so
        peft.PeftModel.from_pretrained(Net(), str(tmp_path / "one"))


def test_get_config_knows_it() -> None:
    assert get_config("bitfit") == BitfitConfig()
    assert get_config("BITFIT", target_modules=["a"]).target_modules == ("a",)


@pytest.mark.parametrize("bias", ["all", "bitfit_only"])
def test_the_option_bias_is_refused_with_the_reason(bias: str) -> None:
    with pytest.raises(ConfigError, match="BitFit trains the biases itself"):
        BitfitConfig(bias=bias)


def test_all_biased_is_refused_for_methods_that_change_weights() -> None:
    with pytest.raises(ConfigError, match=r"'all-biased' is for methods that train biases only; use 'all-linear'"):
        LoraConfig(target_modules="all-biased")


def test_a_model_without_biases_is_refused_with_the_way_out() -> None:
    base = mlp(bias=False)
    before = Snapshot.of(base)
    with pytest.raises(TargetError, match="the model has no layer with a bias; name the layers that are to get one"):
        get_peft_model(base, BitfitConfig())
    assert Snapshot.of(base) == before


def test_an_embedding_is_refused_with_the_reason() -> None:
    base = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2))
    with pytest.raises(TargetError, match=r"'0': Embedding is not a kind .* an embedding has no bias"):
        get_peft_model(base, BitfitConfig(target_modules=["0", "1"]))


def test_a_bias_that_came_by_merging_is_not_the_base_s() -> None:
    model = get_peft_model(Net(), BitfitConfig(target_modules="all-linear"), "one")
    model.merge_adapter()
    model.add_adapter("two", BitfitConfig())
    assert {name for name, _ in model.adapter_parameters("two")} == {"norm.bitfit_delta", "first.bitfit_delta"}
    model.add_adapter("three", LoraConfig(target_modules=["second"], bias="all"))
    assert not any(name.startswith("second.bias") for name, _ in model.adapter_parameters("three"))
