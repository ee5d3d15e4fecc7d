"""VB-LoRA by itself: its start, what its files of weights are, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kilotune import PeftModel, UnsupportedError, get_config, get_peft_model
from kilotune.errors import CheckpointError, ConfigError
from kilotune.fleet import AdapterBank, FleetSettings, User, fit, open_store, wrap
from kilotune.serve.engine.interface import AdapterKey
from tests.support.fleet_support import Kept, points, stacked
from tests.support.models import Nested, randomize
from tests.support.serve_support import Served, adapter_of, alone, answers, base_model, greedy, prompt_of

FIRST = ["stem"]  # (8, 6)
SMALL: dict[str, Any] = {"r": 2, "num_vectors": 8, "vector_length": 2, "init_vector_bank_bound": 1.0}
W = "adapter_model.safetensors"
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))


def made(seed: int = 1, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(Nested(), get_config("vblora", **{**SMALL, "target_modules": FIRST, **options}))
    randomize(model, seed=seed)
    return model.eval()


def test_the_start_is_the_papers_and_near_the_base() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Nested(), get_config("vblora", num_vectors=500, vector_length=2, target_modules=FIRST, r=8))
    numbers = dict(model.adapter_parameters())
    bank, logits = numbers["vblora_vector_bank"], numbers["stem.vblora_logits_A"]
    assert bank.shape == (500, 2)
    assert bank.abs().max() <= 0.02 < 1.05 * bank.abs().max()
    assert logits.shape == (8, 3, 500)
    assert numbers["stem.vblora_logits_B"].shape == (4, 8, 500)
    assert abs(float(logits.detach().std()) - 0.1) < 5e-3
    y = model(X)
    assert 0 < (y - Nested()(X)).abs().max() < 1e-2
    torch.manual_seed(0)
    again = get_peft_model(Nested(), get_config("vblora", num_vectors=500, vector_length=2, target_modules=FIRST, r=8))
    assert torch.equal(again(X), y)


def test_a_file_of_weights_is_small_and_gives_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_vectors": 64, "topk": 3}
    made(**options).save_pretrained(tmp_path / "logits")
    model = made(**options, save_only_topk_weights=True)
    model.save_pretrained(tmp_path / "weights")
    files = {name: load_file(tmp_path / name / W) for name in ("logits", "weights")}
    sizes = {name: sum(t.numel() * t.itemsize for t in file.values()) for name, file in files.items()}
    pieces = 2 * (8 + 6) // 2
    assert sizes == {"logits": 4 * (64 * 2 + 64 * pieces), "weights": 4 * 64 * 2 + pieces * (3 + 4 * 2)}
    again = PeftModel.from_pretrained(Nested(), tmp_path / "weights").eval()
    assert torch.allclose(again(X), model(X), atol=1e-6)
    assert all(torch.isfinite(p).all() for p in again.parameters())
    assert not torch.allclose(again(X), Nested()(X), atol=1e-2)


def test_an_adapter_of_weights_is_run_and_merged_and_not_trained_on(tmp_path: Path) -> None:
    made(save_only_topk_weights=True).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"is_trainable: .* cannot be trained on: .*save_only_topk_weights"):
        PeftModel.from_pretrained(Nested(), tmp_path, is_trainable=True)
    model = PeftModel.from_pretrained(Nested(), tmp_path).eval()
    model.set_adapter("default")
    assert not any(p.requires_grad for p in model.parameters())
    y = model(X)
    assert torch.allclose(model.merge_and_unload()(X), y, atol=1e-5)
    config = get_config("vblora", **SMALL, target_modules=FIRST, save_only_topk_weights=True)
    report = fit(
        Nested().double(),
        config,
        [User("ann", points(4, 1), seed=1, start=tmp_path), User("bob", points(4, 1), seed=1)],
        FleetSettings(batch_size=2, epochs=1, only_gains=False),
        collate=stacked,
        loss="classification",
        sink=Kept(),
    )
    assert [user.ended for user in report.users if user.name == "bob"] == ["done"]
    (ann,) = [user for user in report.users if user.name == "ann"]
    assert ann.ended == "failed"
    assert "cannot be trained on" in str(ann.error)


def test_sizes_that_the_length_does_not_divide_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"(?s)vector_length=4 does not divide.*'stem': \(8, 6\)"):
        get_peft_model(Nested(), get_config("vblora", vector_length=4, target_modules=FIRST))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"topk": 9, "num_vectors": 8}, "topk: expected at most num_vectors, 8, got 9"),
        ({"topk": 0}, "topk"),
        ({"r": 0}, "r: "),
        ({"vector_length": 1.5}, "vector_length"),
        ({"init_vector_bank_bound": 0}, "init_vector_bank_bound"),
        ({"init_logits_std": -1}, "init_logits_std"),
        ({"vblora_dropout": 1.0}, "vblora_dropout"),
        ({"save_only_topk_weights": 1}, "save_only_topk_weights"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        get_config("vblora", **options)


NUMBERS = "base_model.model.stem.vblora_logits_A_topk_indices"
SHARES = "base_model.model.stem.vblora_logits_A_topk_weights"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (NUMBERS, torch.full((2, 3, 2), 8, dtype=torch.uint8), r"numbers in 0 \.\.\. 7, got 8 \.\.\. 8"),
        (NUMBERS, torch.zeros(2, 3, 2), "expected integers"),
        (NUMBERS, torch.zeros(2, 3, 3, dtype=torch.uint8), "expected shapes"),
        (SHARES, torch.full((2, 3, 1), 1.5), "whose sum is at most 1"),
        (SHARES, torch.full((2, 3, 1), -0.5), "0 or more"),
        (SHARES, torch.full((2, 3, 1), torch.nan), "0 or more"),
        (SHARES, None, "no weights for it"),
        (NUMBERS, None, "vblora_logits_A"),
        ("base_model.vblora_vector_bank", torch.zeros(7, 2), r"expected vblora_vector_bank \(8, 2\)"),
        ("base_model.vblora_vector_bank", None, "'vblora_vector_bank', got none"),
    ],
)
def test_files_that_are_none(key: str, value: Any, text: str, tmp_path: Path) -> None:
    made(save_only_topk_weights=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / W)
    tensors.pop(key)
    save_file({**tensors, **({} if value is None else {key: value})}, tmp_path / W)
    with pytest.raises(CheckpointError, match=text):
        PeftModel.from_pretrained(Nested(), tmp_path)


@pytest.mark.parametrize("weights", [False, True], ids=["logits", "weights"])
def test_banks_of_many_users_in_one_batch(weights: bool, tmp_path: Path) -> None:
    """A bank of adapters, each with its own bank of vectors."""
    singles = [made(seed, save_only_topk_weights=weights, target_modules=["stem", "up"]) for seed in (1, 2, 3)]
    bank = AdapterBank(wrap(Nested()).eval(), singles[0].peft_config["default"], slots=3)
    with open_store(f"sqlite:///{tmp_path}/a.db", base=Nested()) as store:
        for i, single in enumerate(singles):
            store.put(f"u{i}", single)
            bank.put(f"u{i}", store.get(f"u{i}").file())
    x, names = torch.randn(4, 5, 6), ["u2", None, "u0", "u1"]
    with torch.no_grad():
        routed = bank.model(x, adapter_names=names)
        for row, name in enumerate(names):
            own = Nested().eval()(x)[row] if name is None else singles[int(name[1])](x)[row]
            assert torch.allclose(routed[row], own, atol=1e-5, rtol=1e-4), name
    assert not torch.allclose(routed[0], singles[0](x)[0], atol=1e-3)


def test_they_are_served_beside_others(tmp_path: Path) -> None:
    own = []
    for seed in range(2):
        options = {**SMALL, "save_only_topk_weights": bool(seed)}
        config = get_config("vblora", **options, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(copy.deepcopy(base_model()), config)
        randomize(model, seed=seed, scale=0.3)
        own.append(model.eval())
    own.append(adapter_of(base_model(), 5))
    with Served(tmp_path, count=1) as served:
        keys = [AdapterKey.of("t", served.registry.put("t", f"m{i}", model)) for i, model in enumerate(own)]
        asked = [(prompt_of(i), greedy(6), key, "t") for i, key in enumerate([*keys, None])]
        found = [one.ids for one in answers(served.engine, asked)]
        assert found == [alone(model, prompt_of(i), 6) for i, model in enumerate([*own, base_model()])]
        assert not served.registry.residents._wholes
