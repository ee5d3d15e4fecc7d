"""TinyLoRA beside PEFT's, live: factors and tables, outputs, gradients and files, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import kilotune
from kilotune.methods import TinyLoraConfig, _svd
from tests.peft_parity.oracle import assert_close, assert_same, base, quiet, run

TARGETS: dict[str, Any] = {
    "llama": ["q_proj", "v_proj"],
    "opt": ["q_proj", "fc1"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "dense"],
    "mlp": "all-linear",
}
TYING = [0.0, 0.5, 1.0]
WEIGHTS = "adapter_model.safetensors"


def options_of(name: str, **options: Any) -> dict[str, Any]:
    return {"r": 2, "u": 5, "projection_seed": 7, "target_modules": TARGETS[name], **options}


def peft_model(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """PEFT's, with numbers of some size in the vectors."""
    with quiet():
        model = peft.get_peft_model(base(name, dtype), peft.TinyLoraConfig(**options_of(name, **options))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for vector in model.base_model.tinylora_v["default"].values():
            vector.copy_(2.0 * torch.randn(vector.shape, generator=generator))
    return model


def sites_of(model: Any) -> dict[str, Any]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if hasattr(m, "tinylora_A")}


def moved(model: Any, name: str, dtype: torch.dtype = torch.float32) -> float:
    with torch.no_grad():
        y = run(model)
        return float((y - run(base(name, dtype))).abs().max() / y.abs().max())


@pytest.mark.parametrize("tying", TYING)
@pytest.mark.parametrize("name", TARGETS)
def test_tables_factors_and_groups_are_pefts(name: str, tying: float) -> None:
    """The factors up to sign and to its float32 SVD, the tables to the bit, each layer's vector by its place."""
    theirs = peft_model(name, weight_tying=tying)
    config = TinyLoraConfig(
        **options_of(name, weight_tying=tying, generator="peft", save_factors=True, svd_iterations=0)
    )
    shared: Any = kilotune.get_peft_model(base(name), config).installed("default").shared
    layers = sites_of(theirs)
    assert_same(list(shared.sources), list(layers), "adapted layers, in order")
    for key, layer in layers.items():
        pair, tables = _svd.pair_of(shared.sources[key]), shared.tables[key]
        sign = (pair.a * layer.tinylora_A["default"]).sum(1, keepdim=True).sign()
        assert_close(pair.a, sign * layer.tinylora_A["default"], f"A of {key}", 1e-3)
        assert_close(pair.b, sign * layer.tinylora_B["default"].T, f"B of {key}", 1e-3)
        mine = shared.projections.pair(tables, torch.device("cpu"), torch.float32).a
        assert torch.equal(mine, layer.tinylora_P["default"].flatten(1)), key
        assert str(shared.groups[key]) == layer._tinylora_v_key["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [{}, {"save_projection": False}, {"bias": "all"}], ids=["tables", "seed", "biases"])
@pytest.mark.parametrize("tying", TYING)
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_peft_to_ours_and_back(
    name: str, tying: float, form: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = peft_model(name, dtype, weight_tying=tying, **form)
    with quiet():
        theirs.save_pretrained(tmp_path / "peft")
    ours = kilotune.PeftModel.from_pretrained(base(name, dtype), tmp_path / "peft")
    allowed = 1e-5 if dtype == torch.float32 else 8 * 2.0**-8
    with torch.no_grad():
        assert_close(run(ours), run(theirs), "output", allowed)
    assert moved(ours, name, dtype) > 1e-2
    ours.save_pretrained(tmp_path / "ours")
    written, given = (load_file(tmp_path / side / WEIGHTS) for side in ("ours", "peft"))
    assert_same(sorted(written), sorted(given), "keys")
    for key, value in given.items():
        assert torch.equal(written[key].to(value.dtype), value), key
    with quiet():
        again = peft.PeftModel.from_pretrained(base(name, dtype), tmp_path / "ours").eval()
    with torch.no_grad():
        assert_close(run(again), run(theirs), "output", 1e-6)


@pytest.mark.parametrize("tying", TYING)
@pytest.mark.parametrize(
    "form", [{"save_projection": True}, {"generator": "peft"}, {"generator": "peft", "save_projection": True}]
)
def test_ours_to_peft_and_back(form: dict[str, Any], tying: float, tmp_path: Path) -> None:
    config = TinyLoraConfig(
        **options_of("mlp", weight_tying=tying, save_factors=True, init_weights="uniform", init_v_bound=2.0, **form)
    )
    ours = kilotune.get_peft_model(base("mlp"), config).eval()
    ours.save_pretrained(tmp_path / "ours")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(base("mlp"), tmp_path / "ours").eval()
        theirs.save_pretrained(tmp_path / "peft")
    again = kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path / "peft")
    assert moved(ours, "mlp") > 1e-2
    with torch.no_grad():
        assert_close(run(theirs), run(ours), "PEFT's output", 1e-5)
        assert_close(run(again), run(ours), "output", 1e-5)


def test_gradients_are_pefts(tmp_path: Path) -> None:
    theirs = peft_model("mlp", weight_tying=0.5)
    with quiet():
        theirs.save_pretrained(tmp_path)
    ours = kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        run(model).square().sum().backward()
    own = dict(ours.adapter_parameters())["tinylora_v"].grad
    expected = torch.stack([vector.grad for vector in theirs.base_model.tinylora_v["default"].values()])
    assert isinstance(own, Tensor)
    assert_close(own, expected, "gradient", 1e-5)


def test_peft_refuses_files_without_its_factors(tmp_path: Path) -> None:
    kilotune.get_peft_model(base("mlp"), TinyLoraConfig(**options_of("mlp"))).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="KILOTUNE_TINYLORA"):
        peft.PeftModel.from_pretrained(base("mlp"), tmp_path)


def test_options_and_defaults_are_pefts_but_for_what_is_saved() -> None:
    made, expected = TinyLoraConfig().to_dict(), peft.TinyLoraConfig().to_dict()
    own = {key for key in expected if key in made and key not in ("task_type", "peft_type", "peft_version")}
    assert {"r", "u", "weight_tying", "projection_seed", "save_projection", "init_v_bound", "init_weights"} < own
    differ = {key for key in own if made[key] != expected[key]}
    assert differ == {"save_projection"}
    assert set(expected) - set(made) <= {"peft_version", "auto_mapping"}
