"""torch's MultiheadAttention against PEFT, live: LoRA on both projections; forward, gradients, steps, files.

Two faults of PEFT 0.21.2 are taken out for the comparison, and have a test each: torch's fast path for encoder layers
skips its wrappers in eval without gradients, and the change of out_proj is added twice (huggingface/peft#3774).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import MultiheadAttention as PeftAttention
from torch import Tensor, nn

import kilotune
from kilotune import TargetError
from tests.peft_parity.files import check_acts, check_outputs, check_peft_to_ours, files, peft_load, scrambled
from tests.peft_parity.oracle import (
    LAYERED,
    Fed,
    assert_close,
    assert_same,
    base,
    check_forward,
    check_gradients,
    check_training,
    quiet,
    run,
    twins,
)


class Sequences(Fed):
    """torch's encoder, and attention of its own to another sequence."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.cross = nn.MultiheadAttention(8, 4, batch_first=True, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        return self.head(h + self.cross(h, x, x.flip(1), need_weights=False)[0]).mean(1)

    def example(self, dtype: torch.dtype) -> Tensor:
        return torch.sin(torch.arange(5 * 6 * 8, dtype=torch.float32) * 3).reshape(5, 6, 8).to(dtype)


LAYERED["sequences"] = Sequences


def without(monkeypatch: pytest.MonkeyPatch, method: str, instead: Callable[..., None]) -> None:
    """PEFT's method of the attention, in which out_proj's method of the same name only keeps the books."""
    original = getattr(PeftAttention, method)

    def once(self: Any, *args: Any, **kwargs: Any) -> None:
        projection = self.base_layer.out_proj
        setattr(projection, method, lambda **given: instead(projection, **given))
        try:
            original(self, *args, **kwargs)
        finally:
            delattr(projection, method)

    monkeypatch.setattr(PeftAttention, method, once)


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's attention as its authors mean it: the change of out_proj is added once."""
    without(monkeypatch, "merge", lambda layer, adapter_names: layer.merged_adapters.extend(adapter_names))
    without(monkeypatch, "unmerge", lambda layer: layer.merged_adapters.clear())


@pytest.fixture(autouse=True)
def no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


CASES: dict[str, dict[str, Any]] = {
    "module": {"target_modules": ["self_attn"], "r": 3},
    "mixture": {"target_modules": ["self_attn", "cross", "linear1"], "r": 2, "lora_alpha": 6},
    "expression": {"target_modules": r".*\.1\.self_attn|cross", "r": 2, "use_rslora": True},
    "patterns": {
        "target_modules": ["self_attn", "cross"],
        "r": 4,
        "rank_pattern": {"cross": 2, r"1\.self_attn": 3},
        "alpha_pattern": {"self_attn": 5},
    },
    "biases": {"target_modules": ["self_attn", "linear2"], "r": 2, "bias": "all"},
    "own biases": {"target_modules": ["self_attn", "linear2"], "r": 2, "bias": "lora_only"},
    "other blocks": {"target_modules": ["self_attn"], "layers_to_transform": [1], "r": 2},
}


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize("case", CASES)
def test_forward_gradients_and_steps(case: str) -> None:
    check_forward(twins("sequences", "lora", **CASES[case]))
    check_gradients(twins("sequences", "lora", **CASES[case]))
    check_training(twins("sequences", "lora", **CASES[case]), "adamw")


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_peft_does_here_what_it_did_there(case: str, tmp_path: Path) -> None:
    """The very PEFT of today, which adds the change of out_proj twice."""
    both = twins("sequences", "lora", **CASES[case])
    with quiet():
        both.theirs.save_pretrained(tmp_path)
    loaded = kilotune.PeftModel.from_pretrained(base("sequences"), tmp_path)
    check_acts(loaded)
    check_outputs(loaded, both.theirs)
    for name, value in loaded.adapter_parameters():
        factor = 2 if name.endswith("out_proj.lora_B") else 1
        assert torch.equal(value, factor * dict(both.ours.adapter_parameters())[name]), name


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize("case", CASES)
def test_a_file_of_a_mended_peft_there_and_back(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal outputs, every tensor the same bits under the same keys, and PEFT reads it again."""
    monkeypatch.setattr("peft.config.__version__", "0.21.3")
    check_peft_to_ours("sequences", "lora", torch.float32, CASES[case], tmp_path)


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize("case", CASES)
def test_merged_for_good(case: str) -> None:
    both = twins("sequences", "lora", **CASES[case])
    with torch.no_grad():
        wanted = run(both.ours)
        with quiet():
            theirs = both.theirs.merge_and_unload()
        assert_close(run(both.ours.merge_and_unload()), wanted, "ours", 1e-5)
        assert_close(run(theirs), wanted, "theirs", 1e-5)


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize(
    "targets",
    [["self_attn"], "all-linear", ["self_attn", "out_proj", "cross"], ".*attn|.*out_proj|cross|head"],
    ids=str,
)
def test_a_file_of_ours_is_read_by_peft(targets: Any, tmp_path: Path) -> None:
    """Also where PEFT would take other layers for these targets: it wraps an out_proj that is never called."""
    model = scrambled(kilotune.get_peft_model(base("sequences"), kilotune.LoraConfig(r=2, target_modules=targets)))
    model.save_pretrained(tmp_path)
    theirs = peft_load(tmp_path, base("sequences"))
    check_outputs(theirs, model)
    again = kilotune.PeftModel.from_pretrained(base("sequences"), tmp_path)
    check_acts(again)
    check_outputs(again, model)
    assert_same(list(again.adapted_layers()), list(model.adapted_layers()), "layers")


def test_the_keys_are_pefts() -> None:
    model = kilotune.get_peft_model(base("sequences"), kilotune.LoraConfig(r=2, target_modules=["cross"]))
    with quiet():
        theirs = peft.get_peft_model(base("sequences"), peft.LoraConfig(r=2, target_modules=["cross"]))
    expected = {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(theirs).items()}
    assert {key.replace("base_layer.", "") for key in expected} == {
        f"base_model.model.{name}.weight" for name, _ in model.adapter_parameters()
    }
    assert expected["base_model.model.cross.base_layer.out_proj.lora_B.weight"] == (8, 2)
    assert expected["base_model.model.cross.lora_B.weight"] == (24, 2)


def test_out_proj_without_its_attention_is_ours_alone(tmp_path: Path) -> None:
    """PEFT never calls its wrapper there: its own adapter changes nothing, and it refuses our file."""
    config = kilotune.LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False)
    ours = kilotune.get_peft_model(base("sequences"), config)
    with quiet():
        theirs = peft.get_peft_model(
            base("sequences"), peft.LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False)
        )
    check_outputs(theirs, base("sequences"))
    ours.save_pretrained(tmp_path)
    check_acts(ours)
    with pytest.raises(KeyError, match="KILOTUNE_LORA"):
        peft.PeftModel.from_pretrained(base("sequences"), tmp_path)
    check_outputs(kilotune.PeftModel.from_pretrained(base("sequences"), tmp_path), ours)
    assert files(tmp_path)[0]["target_modules"] == ["out_proj"]


def test_pefts_dropout_has_no_effect_there_and_its_file_is_read(tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["cross"], "init_lora_weights": False, "lora_dropout": 0.5}
    with quiet():
        theirs = peft.get_peft_model(base("sequences"), peft.LoraConfig(**options)).train()
    with torch.no_grad():
        assert torch.equal(run(theirs), run(theirs))
    theirs.save_pretrained(tmp_path)
    loaded = kilotune.PeftModel.from_pretrained(base("sequences"), tmp_path)
    check_outputs(loaded, theirs)


def test_separate_weights_are_refused_by_both() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4))
    with pytest.raises(ValueError, match="Only same"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(TargetError, match="kdim or vdim"):
        kilotune.get_peft_model(model, kilotune.LoraConfig(target_modules=["0"]))


def test_pefts_adapter_is_skipped_by_torchs_fast_path_and_ours_is_not() -> None:
    both = twins("sequences", "lora", target_modules=["self_attn"], r=2)
    both.theirs.requires_grad_(False)
    with torch.no_grad():
        wanted = run(both.ours.eval())
        plain = run(base("sequences").eval())
        torch.backends.mha.set_fastpath_enabled(True)
        assert_close(run(both.ours), wanted, "ours", 1e-5)
        assert_close(run(both.theirs.eval()), plain, "theirs, which is the base", 1e-5)
        assert (wanted - plain).abs().max() > 1e-2
