"""Adapters of other methods as LoRA adapters, beside PEFT's own conversion and beside float64."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kilotune.peft as ours
from kilotune.errors import CheckpointError, ConfigError
from tests.peft.both import IDS, alike, check_same, logits, made
from tests.peft_parity.oracle import quiet
from tests.support.models import tiny_llama

TOLD = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "modules_to_save")


def converted(library: Any, model: Any, rank: float, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a PEFT adapter to LoRA that is already", UserWarning)
        config, state = library.convert_to_lora(model, rank, **options)
    return config, state


def products(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A of each layer: what factors are equal up to signs and turns."""
    firsts = [key for key in state if key.endswith(".lora_A.weight")]
    return {key: state[key.replace("lora_A", "lora_B")].double() @ state[key].double() for key in firsts}


@pytest.mark.parametrize("name", ["LoraConfig", "VeraConfig", "UniLoraConfig", "VBLoRAConfig"])
@pytest.mark.parametrize("rank", [1, 3, 10, 0.3, 0.9, 1.0])
def test_it_is_pefts_conversion(name: str, rank: float) -> None:
    def script(library: Any) -> Any:
        config, state = converted(library, made(library, name, target_modules=["q_proj", "k_proj"]), rank)
        told = {key: getattr(config, key) for key in TOLD}
        shapes = {key: (tuple(value.shape), str(value.dtype)) for key, value in state.items()}
        return products(state), told, shapes

    alike(script)


def test_the_change_is_the_nearest_of_its_rank() -> None:
    """Eckart and Young: no rank-k matrix is nearer than the k largest singular values' part, taken here in float64."""
    model = made(ours, "VeraConfig")
    _, state = converted(ours, model, 2)
    for key, found in products(state).items():
        layer = model.get_submodule(key.removesuffix(".lora_A.weight"))
        u, s, v = torch.linalg.svd(layer.get_delta_weight("default").double(), full_matrices=False)
        torch.testing.assert_close(found, (u[:, :2] * s[:2]) @ v[:2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["VeraConfig", "UniLoraConfig"])
def test_at_its_own_rank_it_gives_what_the_adapter_gave_and_peft_reads_it(name: str, tmp_path: Path) -> None:
    import peft

    model = made(ours, name)
    ours.save_as_lora(tmp_path / "lora", model, 8)
    check_same(logits(ours.PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")), logits(model), 1e-5)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    check_same(logits(theirs), logits(model), 1e-5)
    assert type(theirs).__name__ == "PeftModelForCausalLM"


def test_a_share_keeps_its_ranks_through_a_file(tmp_path: Path) -> None:
    model = made(ours, "VeraConfig")
    config, state = converted(ours, model, 0.6)
    ours.save_as_lora(tmp_path, model, 0.6)
    loaded = ours.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    twin = ours.get_peft_model(tiny_llama(), config)
    keys = ours.set_peft_model_state_dict(twin, state)
    assert keys.missing_keys == keys.unexpected_keys == []
    assert torch.equal(logits(loaded), logits(twin))
    assert len(set(config.rank_pattern.values())) > 1


def test_dora_is_converted_with_its_lengths() -> None:
    """PEFT's takes the product alone; here all that DoRA makes of the weight."""
    model = made(ours, "LoraConfig", use_dora=True)
    config, state = converted(ours, model, 16)
    twin = ours.get_peft_model(tiny_llama(), config)
    ours.set_peft_model_state_dict(twin, state)
    check_same(logits(twin), logits(model), 1e-5)


def test_convolutions_and_embeddings() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(10, 6), nn.Conv2d(2, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(self.table(x).reshape(-1, 2, 4, 6))
            return y

    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 3, "target_modules": ["table", "conv"], "init_lora_weights": False}
    base, again = Net(), Net()
    again.load_state_dict(base.state_dict())
    model = ours.get_peft_model(base, ours.LoraConfig(**options))
    config, state = converted(ours, model, 3)
    twin = ours.get_peft_model(again, config)
    assert ours.set_peft_model_state_dict(twin, state).unexpected_keys == []
    x = torch.arange(16).reshape(2, 8) % 10
    torch.testing.assert_close(twin(x), model(x), atol=1e-5, rtol=1e-5)


def test_heads_are_kept_and_the_named_adapter_alone() -> None:
    def script(library: Any) -> Any:
        model = made(library, "VeraConfig", adapter="one", modules_to_save=["lm_head"])
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["one"].weight.mul_(-2)
        config, state = converted(library, model, 4, adapter_name="one")
        heads = {key: value for key, value in state.items() if "lora_" not in key}
        return products(state), heads, config.modules_to_save

    alike(script)
    model = made(ours, "VeraConfig", adapter="one", modules_to_save=["lm_head"])
    model.add_adapter("two", ours.VeraConfig(r=8, target_modules=["k_proj"]))
    config, state = converted(ours, model, 4, adapter_name="two")
    assert config.modules_to_save is None
    assert all("k_proj.lora_" in key for key in state)


def test_left_out_layers_stay_left_out() -> None:
    options = {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]}
    model = made(ours, "LoraConfig", **options)
    config, state = converted(ours, model, 4)
    twin = ours.get_peft_model(tiny_llama(), config)
    keys = ours.set_peft_model_state_dict(twin, state)
    assert keys.missing_keys == keys.unexpected_keys == []


def test_names_that_end_like_other_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.part = nn.Linear(6, 6), nn.ModuleDict({"lin": nn.Linear(6, 6)})

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.part["lin"](self.lin(x))
            return y

    torch.manual_seed(1)
    model = ours.get_peft_model(Net(), ours.LoraConfig(r=4, target_modules=["lin"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".part.lin.lora_A" in name:
                parameter[1:] = 0  # of rank 1, so that the two layers' ranks differ
    config, state = converted(ours, model, 0.999)
    ranks = {key: state[key].shape[0] for key in state if "lora_A" in key}
    twin = ours.get_peft_model(Net(), config)
    own = ours.get_peft_model_state_dict(twin)
    assert {key: own[key].shape[0] for key in ranks} == ranks
    assert len(set(ranks.values())) == 2


def test_a_base_with_injected_adapters_and_one_with_our_layers_alone() -> None:
    config = ours.VeraConfig(r=8, target_modules=["q_proj"])
    injected = ours.inject_adapter_in_model(config, tiny_llama())
    found, state = converted(ours, injected, 2)
    assert "q_proj" in found.target_modules
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in state
    alone, same = converted(ours, made(ours, "VeraConfig").get_base_model(), 2)
    names = {key.removesuffix(".lora_A.weight") for key in same if "lora_A" in key}
    assert alone.target_modules == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_have_the_adapters_dtype(dtype: torch.dtype) -> None:
    config = ours.VeraConfig(r=8, target_modules=["q_proj"])
    for cast, wanted in ((True, torch.float32), (False, dtype)):
        model = ours.get_peft_model(tiny_llama().to(dtype), config.copy(), autocast_adapter_dtype=cast)
        assert {value.dtype for value in converted(ours, model, 2)[1].values()} == {wanted}


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
        ours.convert_to_lora(tiny_llama(), 8)
    ia3 = made(ours, "IA3Config")
    assert not ia3.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: Linear \(ia3\)"):
        ours.convert_to_lora(ia3, 8)
    vera = made(ours, "VeraConfig")
    assert vera.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"no adapter 'other' in it; there are \['default'\]"):
        ours.convert_to_lora(vera, 8, adapter_name="other")
    for rank in (123.0, -0.5, 0.0):
        with pytest.raises(ConfigError, match=f"must be between 0 and 1 but got {re.escape(str(rank))}"):
            ours.convert_to_lora(vera, rank)
    for rank in (0, -3):
        with pytest.raises(ConfigError, match=f"Passing a rank of {rank} doesn't make sense"):
            ours.convert_to_lora(vera, rank)
    with pytest.raises(ConfigError, match="expected a whole number"):
        ours.convert_to_lora(vera, True)
    with pytest.raises(ConfigError, match=r"chosen rank 1000 is larger than the weight shape \(\d+\)"):
        ours.convert_to_lora(vera, 1000)
    with pytest.raises(ConfigError, match="sets bias=all"):
        ours.convert_to_lora(made(ours, "LoraConfig", bias="all", target_modules=["q_proj"]), 4)
    with torch.no_grad():
        next(p for n, p in vera.named_parameters() if "lambda_b" in n).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        ours.convert_to_lora(vera, 2)


def test_a_lora_is_converted_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        ours.convert_to_lora(made(ours, "LoraConfig"), 2)


def test_the_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    converted(ours, made(ours, "VeraConfig"), 2, progressbar=True)
    assert "Converting to LoRA" in capsys.readouterr().err


def test_the_model_is_as_it_was() -> None:
    model = made(ours, "VeraConfig")
    before = logits(model)
    model.merge_adapter()
    _, merged = converted(ours, model, 2)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    check_same(products(merged), products(converted(ours, model, 2)[1]), 1e-7)
    assert IDS.shape == (2, 6)


@pytest.mark.heavy
def test_compiled_arithmetic_gives_the_same() -> None:
    model = made(ours, "VeraConfig")
    _, plain = converted(ours, model, 2)
    _, compiled = converted(ours, model, 2, compile_kwargs={"backend": "eager"})
    check_same(products(compiled), products(plain), 1e-6)
