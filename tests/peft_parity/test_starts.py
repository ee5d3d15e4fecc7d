"""LoRA's starts against PEFT, live: the numbers they start with, outputs, gradients, and files both ways."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import kilotune
from kilotune.convert import to_lora
from tests.peft_parity.files import check_acts, check_outputs, files, peft_load, scrambled
from tests.peft_parity.oracle import (
    Twins,
    assert_all_close,
    assert_close,
    base,
    check_gradients,
    check_training,
    peft_parameters,
    quiet,
    run,
)

ALL = "all-linear"


def test_orthogonal_is_as_large_as_pefts() -> None:
    """Not the same numbers, which are drawn in another order, but of the same size, with a product of zero."""
    options = {"r": 4, "target_modules": ["first"], "init_lora_weights": "orthogonal"}
    with quiet():
        theirs = peft.get_peft_model(base("mlp"), peft.LoraConfig(**options))
    own = peft_parameters(theirs)
    ours = dict(kilotune.get_peft_model(base("mlp"), kilotune.LoraConfig(**options)).adapter_parameters())
    for mine in (own, ours):
        a, b = mine["first.lora_A"].detach(), mine["first.lora_B"].detach()
        assert float((b @ a).abs().max()) < 1e-6
        assert float(a.std()) > 0.03
        assert float(b.std()) > 0.03


def test_orthogonal_files_go_both_ways(tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ALL, "init_lora_weights": "orthogonal"}
    ours = kilotune.get_peft_model(base("mlp"), kilotune.LoraConfig(**options))
    with torch.no_grad():
        for _, parameter in ours.adapter_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft_load(tmp_path / "ours", base("mlp"))
    check_outputs(theirs, ours)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path / "theirs")
    check_outputs(loaded, theirs)
    assert loaded.peft_config["default"].init_lora_weights == "orthogonal"
    with torch.no_grad(), loaded.disable_adapter():
        plain = loaded(torch.ones(1, 12))
    assert_close(plain, base("mlp")(torch.ones(1, 12)).detach(), "without the adapter", 0.0)


# -- starts from the base --------------------------------------------------------------------------


FROM_BASE = ("pissa", "olora")
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"r": 4, "lora_alpha": 6, "target_modules": ALL}),
    "rslora": ("mlp", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ALL, "bias": "lora_only"}),
    "patterns": ("mlp", {"r": 2, "rank_pattern": {"first": 4}, "alpha_pattern": {"head": 3}, "target_modules": ALL}),
    "dora": ("mlp", {"r": 4, "use_dora": True, "target_modules": ALL}),
    "llama": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
}


def both(start: str, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Twins:
    """Both models, as they start."""
    ours = kilotune.get_peft_model(base(name, dtype), kilotune.LoraConfig(init_lora_weights=start, **options))
    with quiet():
        theirs = peft.get_peft_model(base(name, dtype), peft.LoraConfig(init_lora_weights=start, **options))
    return Twins(ours, theirs.eval())


def moved(model: peft.PeftModel) -> None:
    """A little further, as after some steps: the factors are near those that they started as."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(peft_parameters(model).items()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("start", FROM_BASE)
@pytest.mark.parametrize("case", OPTIONS)
def test_they_start_alike_and_train_alike(start: str, case: str) -> None:
    name, options = OPTIONS[case]
    pair = both(start, name, **options)
    mine, other = dict(pair.ours.adapter_parameters()), peft_parameters(pair.theirs)
    assert_all_close({k: p.detach() for k, p in mine.items()}, {k: p.detach() for k, p in other.items()}, "start", 1e-4)
    check_outputs(pair.ours, pair.theirs)
    check_outputs(pair.ours, base(name), 1e-5)
    check_gradients(pair, 1e-3)
    check_training(pair, "sgd", 3)


@pytest.mark.parametrize("start", FROM_BASE)
@pytest.mark.parametrize("case", OPTIONS)
def test_their_files_are_read_and_ours_are(start: str, case: str, tmp_path: Path) -> None:
    """Each takes the start from the base again when it loads."""
    name, options = OPTIONS[case]
    theirs = both(start, name, **options).theirs
    moved(theirs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = kilotune.PeftModel.from_pretrained(base(name), tmp_path / "theirs")
    check_acts(loaded)
    check_outputs(loaded, theirs)
    loaded.save_pretrained(tmp_path / "ours")
    check_outputs(peft_load(tmp_path / "ours", base(name)), theirs)
    with torch.no_grad(), loaded.disable_adapter():
        assert torch.equal(run(loaded), run(base(name)))
    loaded.merge_adapter()
    check_outputs(loaded, theirs)
    with torch.no_grad():
        assert torch.equal(run(loaded.unload()), run(base(name)))


@pytest.mark.parametrize("start", FROM_BASE)
def test_a_16_bit_base(start: str, tmp_path: Path) -> None:
    """PEFT rounds what is left of the base to 16 bits; we do not."""
    options = {"r": 4, "target_modules": ALL}
    theirs = both(start, "mlp", torch.bfloat16, **options).theirs
    moved(theirs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = kilotune.PeftModel.from_pretrained(base("mlp", torch.bfloat16), tmp_path / "theirs")
    check_acts(loaded)
    check_outputs(loaded, theirs, 8 * 2.0**-8)
    loaded.save_pretrained(tmp_path / "ours")
    check_outputs(peft_load(tmp_path / "ours", base("mlp", torch.bfloat16)), theirs, 8 * 2.0**-8)


@pytest.mark.parametrize("start", FROM_BASE)
def test_conv1d(start: str, tmp_path: Path) -> None:
    """PEFT takes PiSSA's part of the matrix as a linear layer has it, and OLoRA's of its transpose."""
    options = {"r": 4, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}
    pair = both(start, "gpt2", **options)
    moved(pair.theirs)
    with quiet():
        pair.theirs.save_pretrained(tmp_path / "theirs")
    if start == "olora":
        with pytest.raises(kilotune.ConfigError, match="takes the QR of the transposed weight"):
            kilotune.PeftModel.from_pretrained(base("gpt2"), tmp_path / "theirs")
        pair.ours.save_pretrained(tmp_path / "ours")
        assert files(tmp_path / "ours")[0]["peft_type"] == "KILOTUNE_LORA"
        check_outputs(kilotune.PeftModel.from_pretrained(base("gpt2"), tmp_path / "ours"), pair.ours)
        return
    loaded = kilotune.PeftModel.from_pretrained(base("gpt2"), tmp_path / "theirs")
    check_acts(loaded)
    check_outputs(loaded, pair.theirs)
    loaded.save_pretrained(tmp_path / "ours")
    check_outputs(peft_load(tmp_path / "ours", base("gpt2")), pair.theirs)


def test_an_embedding_starts_plain_in_both(tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}
    theirs = both("pissa", "llama", **options).theirs
    moved(theirs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = kilotune.PeftModel.from_pretrained(base("llama"), tmp_path / "theirs")
    check_acts(loaded)
    check_outputs(loaded, theirs)


def test_a_part_that_was_drawn_at_random_is_refused(tmp_path: Path) -> None:
    """PEFT itself takes another part away when it loads such a file; ours are closed to it, and come back here."""
    theirs = both("pissa_niter_2", "mlp", r=4, target_modules=ALL).theirs
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(kilotune.ConfigError, match="drew at random.*path_initial_model_for_weight_conversion"):
        kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path / "theirs")


def test_as_a_plain_lora_it_is_read_by_peft(tmp_path: Path) -> None:
    ours = scrambled(both("pissa_niter_2", "mlp", r=4, target_modules=ALL).ours)
    to_lora(ours).save(tmp_path)
    check_outputs(peft_load(tmp_path, base("mlp")), ours)


def test_pefts_conversion_is_a_plain_lora(tmp_path: Path) -> None:
    """Which it makes of the adapter as it started, and of what became of it."""
    theirs = both("pissa", "mlp", r=4, lora_alpha=6, target_modules=ALL).theirs
    with quiet():
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = "pissa"
        moved(theirs)
        warnings.filterwarnings("ignore", message="PiSSA changes the base weights of the model", category=UserWarning)
        theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path / "plain")
    check_acts(loaded)
    check_outputs(loaded, theirs)
