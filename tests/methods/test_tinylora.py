"""TinyLoRA's own: whose vector a layer takes, what is shared, what files hold and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kilotune import CheckpointError, ConfigError, PeftModel, TinyLoraConfig, get_peft_model
from kilotune.fleet.bank.adapter_bank import AdapterBank
from kilotune.fleet.store import open_store
from tests.support.models import mlp, randomize, tiny_llama

X = torch.linspace(-1, 1, 24).view(4, 6)
ALL: dict[str, Any] = {"target_modules": "all-linear"}
WEIGHTS = "adapter_model.safetensors"


def deep(layers: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))


@pytest.mark.parametrize(
    ("tying", "groups"),
    [(0.0, [0, 1, 2, 3, 4]), (0.2, [0, 1, 2, 3, 3]), (0.5, [0, 0, 1, 1, 1]), (0.9, [0] * 5), (1.0, [0] * 5)],
)
def test_layers_that_follow_one_another_share_a_vector(tying: float, groups: list[int]) -> None:
    model = get_peft_model(deep(), TinyLoraConfig(u=3, weight_tying=tying, **ALL))
    shared: Any = model.installed("default").shared
    assert list(shared.groups.values()) == groups
    assert model.report().trainable == 3 * len(set(groups))


def test_the_start_is_the_base_and_learns() -> None:
    base = deep()
    expected = base(X)
    model = get_peft_model(base, TinyLoraConfig(u=13, weight_tying=1.0, **ALL))
    assert torch.equal(model(X), expected)
    ((_, vector),) = model.adapter_parameters()
    model(X).square().sum().backward()
    assert vector.grad is not None
    assert bool((vector.grad != 0).all())


def test_twenty_adapters_hold_their_vectors_alone() -> None:
    """They held 8,960 frozen numbers for 400 trained, each its own factors."""
    model = get_peft_model(mlp(), TinyLoraConfig(u=10, **ALL))
    one = model.report()
    for i in range(19):
        model.add_adapter(f"other{i}", TinyLoraConfig(u=10, **ALL))
    many = model.report()
    assert many.frozen_shared == one.frozen_shared == 2 * (6 + 5 + 5 + 3) + 2 * 10 * 4
    assert many.trainable + many.frozen_adapters == 20 * 2 * 10


def test_adapters_of_fewer_numbers_share_the_tables_of_the_larger() -> None:
    small = get_peft_model(mlp(), TinyLoraConfig(u=3, **ALL))
    randomize(small)
    expected = small(X)
    small.add_adapter("large", TinyLoraConfig(u=7, **ALL))
    assert torch.equal(small(X), expected)
    assert small.report().frozen_shared == 2 * (6 + 5 + 5 + 3) + 2 * 7 * 4


def test_a_small_layer_has_its_own_rank() -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    model = get_peft_model(base, TinyLoraConfig(r=3, u=4, **ALL))
    randomize(model)
    change = {n: layer.slot("default").delta() for n, layer in model.adapted_layers().items()}  # type: ignore[union-attr]
    assert {n: (tuple(d.a.shape), tuple(d.b.shape)) for n, d in change.items()} == {  # type: ignore[union-attr]
        "0": ((3, 6), (5, 3)),
        "1": ((1, 5), (1, 1)),
    }


@pytest.mark.parametrize("tying", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"save_factors": True}, {"save_factors": True, "generator": "peft"}])
def test_files_come_back_to_the_bit(options: dict[str, Any], dtype: torch.dtype, tying: float, tmp_path: Path) -> None:
    model = get_peft_model(mlp().to(dtype), TinyLoraConfig(u=5, weight_tying=tying, **options, **ALL))
    randomize(model)
    model.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(mlp().to(dtype), tmp_path / "one", is_trainable=True)
    assert torch.equal(again(X.to(dtype)), model(X.to(dtype)))
    again.save_pretrained(tmp_path / "two")
    for name in ("adapter_config.json", WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_file_without_factors_has_the_vectors_alone(tmp_path: Path) -> None:
    get_peft_model(deep(), TinyLoraConfig(u=13, weight_tying=1.0, **ALL)).save_pretrained(tmp_path)
    assert {key: tuple(value.shape) for key, value in load_file(tmp_path / WEIGHTS).items()} == {
        "base_model.tinylora_v": (1, 13)
    }


@pytest.mark.filterwarnings("ignore::kilotune.OtherBaseWarning")  # the error says more
def test_another_base_and_another_order_of_its_layers_are_refused(tmp_path: Path) -> None:
    get_peft_model(deep(), TinyLoraConfig(u=5, weight_tying=1.0, **ALL)).save_pretrained(tmp_path)
    swapped = deep()
    swapped[1].weight.data, swapped[2].weight.data = swapped[2].weight.data, swapped[1].weight.data
    with torch.device("meta"):
        empty = deep()
    for base in (mlp(), swapped):
        with pytest.raises(CheckpointError, match="factors made from this base are not those"):
            PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(CheckpointError, match="a base on the meta device has none"):
        PeftModel.from_pretrained(empty, tmp_path)


def test_other_numbers_of_layers_than_vectors_are_refused(tmp_path: Path) -> None:
    config = TinyLoraConfig(u=5, weight_tying=0.5, save_factors=True, generator="peft", **ALL)
    get_peft_model(deep(4), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the file has 2 vectors, and the layers of this model have 4"):
        PeftModel.from_pretrained(deep(8), tmp_path)


def test_ties_are_refused_with_what_to_do() -> None:
    base = mlp()
    with torch.no_grad():
        u, _, vh = torch.linalg.svd(base[0].weight, full_matrices=False)
        base[0].weight.copy_((u * torch.tensor([2.0, 1.0, 1.0, 0.5, 0.2])) @ vh)
    with pytest.raises(ConfigError, match=r"use save_factors=True, .* or a smaller r.*\n?.*'0': number 2"):
        get_peft_model(base, TinyLoraConfig(**ALL))
    get_peft_model(base, TinyLoraConfig(r=1, **ALL))
    get_peft_model(mlp(), TinyLoraConfig(save_factors=True, **ALL))


def test_merging_is_the_formula_with_numpys_svd() -> None:
    base = mlp()
    model = get_peft_model(base, TinyLoraConfig(u=3, svd_iterations=0, target_modules=["0"]))
    with torch.no_grad():
        dict(model.adapter_parameters())["tinylora_v"].copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    shared: Any = model.installed("default").shared
    tables = shared.projections.pair(shared.tables["0"], torch.device("cpu"), torch.float32).a
    core = (torch.tensor([1.0, -2.0, 0.5]) @ tables).view(2, 2).double().numpy() / 2**0.5
    weight = mlp()[0].weight.detach().double().numpy()
    u, s, vh = np.linalg.svd(weight)
    sign = np.sign([row[np.abs(row).argmax()] for row in vh[:2]])
    root = np.sqrt(s[:2])
    expected = weight + (u[:, :2] * sign * root) @ core @ ((sign * root)[:, None] * vh[:2])
    np.testing.assert_allclose(model.merge_and_unload()[0].weight.detach().numpy(), expected, atol=1e-6)  # type: ignore[index]


@pytest.mark.parametrize("saved", [True, False])
def test_a_bank_holds_u_numbers_a_layer(saved: bool, tmp_path: Path) -> None:
    model = get_peft_model(mlp(), TinyLoraConfig(u=5, save_factors=saved, **ALL))
    randomize(model)
    expected = model(X)
    model.save_pretrained(tmp_path)
    other = get_peft_model(mlp(), TinyLoraConfig(u=5, **ALL))
    bank = AdapterBank(other, TinyLoraConfig(u=5, **ALL), slots=4)
    assert bank.form.length == 2 * 5
    bank.put("a", tmp_path)
    torch.testing.assert_close(other(X, adapter_names=["a"] * 4), expected)
    bank.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"u": 0}, "u: expected a whole number"),
        ({"weight_tying": 1.5}, "weight_tying: expected"),
        ({"init_weights": False}, "init_weights: expected True or 'uniform'"),
        ({"generator": "pefd"}, "generator: expected one of .* Did you mean 'peft'"),
        ({"generator": "peft"}, "generator='peft': needs save_factors=True"),
        ({"save_projection": True}, "save_projection: needs save_factors=True"),
        ({"projection_seed": -1}, "projection_seed: expected"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinyLoraConfig(**options)


def test_stored_tables_come_from_a_file_alone() -> None:
    with pytest.raises(ConfigError, match="generator='stored' is for adapters loaded from a file"):
        get_peft_model(mlp(), TinyLoraConfig(generator="stored", save_factors=True, **ALL))


def test_thirteen_numbers_take_less_than_a_kilobyte(tmp_path: Path) -> None:
    """Base name, targets, mark, checksums and fingerprint included; and in a store less than 200 bytes."""
    base = tiny_llama()
    base.name_or_path = "HuggingFaceTB/SmolLM2-135M"
    model = get_peft_model(base, TinyLoraConfig(u=13, weight_tying=1.0, task_type="CAUSAL_LM"))
    assert model.report().trainable == 13
    model.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1000
    ids = torch.arange(2, 12).view(2, 5)
    randomize(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(ids).logits, model(ids).logits)


def test_a_row_of_a_store_takes_less_than_200_bytes(tmp_path: Path) -> None:
    model = get_peft_model(deep(), TinyLoraConfig(u=13, weight_tying=1.0, **ALL))
    sizes = []
    for first in (0, 300):
        with open_store(f"sqlite:///{tmp_path}/store.db") as store:
            for i in range(first, first + 300):
                randomize(model, seed=i)
                store.put(f"user{i}", model)
        sizes.append((tmp_path / "store.db").stat().st_size)  # when it is closed, without the log of what is written
    assert (sizes[1] - sizes[0]) / 300 < 200
