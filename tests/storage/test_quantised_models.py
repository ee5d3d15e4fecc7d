"""Models that transformers loads quantised, from end to end; and PEFT on the same layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kilotune import Ia3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.layers.adapted import AdaptedLayer
from kilotune.storage import storage_of
from tests.conformance.quantised import STORAGE_SCHEMES
from tests.support.cli_helpers import as_json, error
from tests.support.models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::kilotune.MergePrecisionWarning")  # 4 bits: tested elsewhere
WIDTH = 64
IDS = torch.arange(12).view(2, 6)


def _bnb(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**options)

    return make


def _torchao(name: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import torchao.quantization as ao
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(ao, name)(**options))

    return make


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONFIGS = {
    "nf4-double-bf16": (
        _bnb(**NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16),
        "bnb-4bit",
        torch.bfloat16,
    ),
    "fp4": (_bnb(load_in_4bit=True), "bnb-4bit", torch.float32),
    "int8": (_bnb(load_in_8bit=True), "bnb-int8", torch.bfloat16),
    "torchao-int8": (_torchao("Int8WeightOnlyConfig", version=2), "torchao", torch.bfloat16),
    "torchao-int4": (_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4), "torchao", torch.float32),
    "torchao-dynamic": (
        _torchao("Int8DynamicActivationInt8WeightConfig", version=2),
        "torchao-dynamic",
        torch.float32,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of width 64 on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=WIDTH, num_key_value_heads=2, max_position_embeddings=32, **sizes)
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder: Path, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    make, _, dtype = CONFIGS[name]
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=make(), dtype=dtype, device_map="cpu")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "method",
    [LoraConfig(r=4, target_modules="all-linear"), VeraConfig(r=8, target_modules="all-linear")],
    ids=["lora", "vera"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantised_model_trains_saves_loads_and_merges_both_ways(
    folder: Path, name: str, method: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = get_peft_model(load(folder, name), method)
    layers = model.adapted_layers()
    assert len(layers) == 14
    assert {layer.storage.name for layer in layers.values()} == {CONFIGS[name][1]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        model.train()
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for _, p in model.adapter_parameters())
        optimizer.step()
        losses.append(loss.item())
        logits(model)  # an evaluation between two steps
    assert losses[-1] < losses[0] - 0.05
    expected = logits(model)

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder, name), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)

    noise = 0.03  # of the input's rounding, and of bfloat16
    dense = model.merge_and_unload(dtype=torch.float32)
    assert far(logits(dense), expected) < noise
    assert not any(isinstance(m, AdaptedLayer) or "bitsandbytes" in type(m).__module__ for m in dense.modules())
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    dense.to(torch.float64)  # transformers refuses that for a model that it takes for quantised
    dense.to(torch.float32)
    dense.save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert getattr(plain.config, "quantization_config", None) is None
    assert torch.equal(logits(plain), logits(dense))

    quantised = again.merge_and_unload(requantize=True)
    worst = again.merge_report.worst
    assert worst is not None
    assert storage_of(quantised.get_submodule(worst)).name == CONFIGS[name][1]  # type: ignore[union-attr]
    assert far(logits(quantised), expected) < 0.3
    quantised.save_pretrained(tmp_path / "quantised")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    assert far(logits(back), logits(quantised)) < noise


def test_tied_embeddings_stay_tied_in_a_dense_model() -> None:
    """Widths of 16: no layer is quantised here, so dtype is all that changes."""
    model = get_peft_model(tiny_llama(tie=True), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    dense = model.merge_and_unload(dtype=torch.bfloat16)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    # The frequencies of rotary embeddings are not saved, and transformers keeps them in float32.
    assert dense.model.rotary_emb.inv_freq.dtype == torch.float32


# -- PEFT --------------------------------------------------------------------------------------------

PEFT_HAS = {
    "lora": ["bnb-4bit:nf4-double", "bnb-4bit:fp4", "bnb-int8:int8", "torchao:int8", "torchao:float8"],
    "vera": ["bnb-4bit:nf4-double", "bnb-4bit:fp4", "bnb-int8:int8"],
    "dora": ["bnb-4bit:nf4-double", "bnb-4bit:fp4", "bnb-int8:int8"],
    "ia3": ["bnb-4bit:nf4-double", "bnb-4bit:fp4", "bnb-int8:int8"],
}
PAIRS = [(method, scheme) for method, schemes in PEFT_HAS.items() for scheme in schemes]


# PEFT cannot merge torchao layers that transformers did not load; nothing is merged by it here.
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
@pytest.mark.parametrize("method, scheme", PAIRS, ids=[f"{m}-{s}" for m, s in PAIRS])
def test_peft_computes_the_same_from_our_file(method: str, scheme: str, tmp_path: Path) -> None:
    import peft

    storage, _, name = scheme.partition(":")
    case = next(s for s in STORAGE_SCHEMES if (s.storage, s.name) == (storage, name))

    def base() -> nn.Sequential:
        torch.manual_seed(0)
        net = nn.Sequential()
        net.add_module("layer", case.quantise(nn.Linear(WIDTH, WIDTH)))
        return net

    if method in ("lora", "dora"):
        more = {"lora_alpha": 8, "init_lora_weights": False, "use_dora": method == "dora"}
        config: Any = LoraConfig(r=4, target_modules=["layer"], **more)
    elif method == "ia3":
        config = Ia3Config(target_modules=["layer"], feedforward_modules=[], init_ia3_weights=False)
    else:
        config = VeraConfig(r=8, target_modules=["layer"], init_weights=False, generator="peft", save_projection=True)
    ours = get_peft_model(base(), config)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path), is_trainable=True)
    x, same = torch.randn(5, WIDTH).requires_grad_(), torch.empty(5, WIDTH).requires_grad_()
    same.data.copy_(x.data)
    y, expected = ours.train()(x), theirs.train()(same)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-4, atol=1e-4)
    grads = {
        n.partition(".layer.")[2].replace(".default", "").removesuffix(".weight"): p.grad
        for n, p in theirs.named_parameters()
    }
    for key, parameter in ours.adapter_parameters():
        theirs_key = key.removeprefix("layer.").replace("ia3_rows", "ia3_l")
        expected = grads[theirs_key].view_as(parameter)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4, msg=key)


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4-double-bf16", "torchao-int8"])
def test_the_command_merges_into_a_quantised_folder(folder: Path, name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = load(folder, name)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    run = ["merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out"]
    assert "the base is quantised" in error(*run, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    as_json(*run, tmp_path / "dense", "--dtype", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert far(logits(merged), expected) < 0.03
