"""LoRA-XS's own: the factors of the SVD, their bits, what goes into the file and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kilotune import CheckpointError, ConfigError, LoraXsConfig, PeftModel, get_peft_model
from kilotune.methods._svd import Split, WeightSource
from tests.support.models import mlp, randomize

X = torch.linspace(-1, 1, 24).view(4, 6)


def frozen_factors(weight: torch.Tensor, rank: int, iterations: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) as a file has them."""
    pair = WeightSource(rank, iterations, seed, Split.SECOND).made(weight).pair
    assert pair is not None
    return pair.a, pair.b.T


def spectrum(out: int, inn: int, decay: float, seed: int = 0) -> np.ndarray:
    """A matrix with singular values decay^i."""
    rng = np.random.default_rng(seed)
    rank = min(out, inn)
    u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (out, inn))
    return (u * decay ** np.arange(rank)) @ v.T


@pytest.mark.parametrize("iterations", [0, 10])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (7, 9)])
def test_the_factors_are_the_best_of_their_rank(shape: tuple[int, int], iterations: int) -> None:
    """B A is the truncated SVD (Eckart and Young), A has orthonormal rows, B A's singular values; to 12 digits."""
    weight = spectrum(*shape, decay=0.7)
    a, b = (t.double().numpy() for t in frozen_factors(torch.from_numpy(weight), 4, iterations, 3))
    u, s, vh = np.linalg.svd(weight)
    np.testing.assert_allclose(b @ a, (u[:, :4] * s[:4]) @ vh[:4], atol=2e-3)
    np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), s[:4], rtol=1e-3)
    for values in (a, b):
        mantissa, _ = np.frexp(values)
        assert np.array_equal(mantissa * 2**12, np.round(mantissa * 2**12))
    assert (np.take_along_axis(a, np.abs(a).argmax(1, keepdims=True), 1) > 0).all()


@pytest.mark.parametrize("iterations", [0, 10])
def test_the_bits_do_not_follow_the_last_digits_of_the_arithmetic(iterations: int) -> None:
    """The same matrix up to float64 rounding, and other numbers of threads, give the same bits."""
    weight = torch.from_numpy(spectrum(120, 80, decay=0.97))
    one = frozen_factors(weight, 6, iterations, 0)
    noisy = frozen_factors(weight * (1 + 1e-15 * torch.randn(weight.shape, dtype=torch.float64)), 6, iterations, 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        other = frozen_factors(weight, 6, iterations, 0)
    finally:
        torch.set_num_threads(threads)
    for found in (noisy, other):
        assert torch.equal(one[0], found[0])
        assert torch.equal(one[1], found[1])


def test_the_start_is_small_and_normal() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(300, 200)), LoraXsConfig(r=100, target_modules=["0"]))
    ((name, core),) = model.adapter_parameters()
    assert name == "0.loraxs_R"
    assert abs(float(core.detach().std()) - 1e-5) < 5e-7
    assert model.get_nb_trainable_parameters()[0] == 100 * 100


def size(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"save_factors": False}, {"start": "random"}])
def test_files_come_back_to_the_bit(options: dict[str, object], dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(mlp().to(dtype), LoraXsConfig(r=3, target_modules="all-linear", **options))
    randomize(model)
    model.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(mlp().to(dtype), tmp_path / "one", is_trainable=True)
    assert torch.equal(again(X.to(dtype)), model(X.to(dtype)))
    again.save_pretrained(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_the_factors_cost_in_a_file(tmp_path: Path) -> None:
    sizes = {}
    for name, options in (("saved", {}), ("made", {"save_factors": False}), ("random", {"start": "random"})):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(256, 128)), LoraXsConfig(r=8, target_modules=["0"], **options))
        model.save_pretrained(tmp_path / name)
        sizes[name] = size(tmp_path / name)
    assert sizes["saved"] >= 4 * (8 * 8 + 8 * (256 + 128))
    assert sizes["made"] < 4 * 8 * 8 + 1000
    assert sizes["random"] < 4 * 8 * 8 + 1000


@pytest.mark.filterwarnings("ignore::kilotune.OtherBaseWarning")  # the error says more
def test_another_base_is_refused_where_the_factors_are_made_again(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), LoraXsConfig(r=3, target_modules="all-linear", save_factors=False))
    model.save_pretrained(tmp_path)
    for base in (mlp(seed=1), mlp().bfloat16()):
        with pytest.raises(CheckpointError, match="factors made from this base are not those.*save_factors=True"):
            PeftModel.from_pretrained(base, tmp_path)
        assert type(base[0]) is nn.Linear
    with torch.device("meta"):
        empty = mlp()
    with pytest.raises(CheckpointError, match="a base on the meta device has none"):
        PeftModel.from_pretrained(empty, tmp_path)


def test_saved_factors_fit_the_base_in_another_dtype(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), LoraXsConfig(r=3, target_modules="all-linear"))
    randomize(model)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(mlp().bfloat16(), tmp_path)
    torch.testing.assert_close(other(X.bfloat16()).float(), model(X), rtol=0.05, atol=0.05)


def test_a_layer_has_the_core_alone() -> None:
    model = get_peft_model(mlp(), LoraXsConfig(r=3, target_modules=["0"]))
    slot = model.adapted_layers()["0"].slot("default")
    assert slot is not None
    model(X).square().sum().backward()
    assert {name: p.requires_grad for name, p in slot.own().items()} == {"loraxs_R": True}
    assert slot.own()["loraxs_R"].grad is not None
    assert not any("loraxs_A" in key for key in model.state_dict())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": "sdv"}, "start: expected one of .* Did you mean 'svd'"),
        ({"start": "random", "save_factors": False}, "save_factors: has no effect"),
        ({"start": "random", "svd_iterations": 3}, "svd_iterations: has no effect"),
        ({"svd_iterations": -1}, "svd_iterations: expected a whole number"),
        ({"r": 0}, "r: expected a whole number"),
        ({"projection_prng_key": -1}, "projection_prng_key: expected"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraXsConfig(**options)


def test_a_rank_that_a_layer_does_not_have_is_refused() -> None:
    base = mlp()
    with pytest.raises(ConfigError, match=r"r = 4 is more than the SVD of these layers has.*\n?.*'2': \(3, 5\)"):
        get_peft_model(base, LoraXsConfig(r=4, target_modules="all-linear"))
    assert type(base[0]) is nn.Linear
    get_peft_model(base, LoraXsConfig(r=4, start="random", target_modules="all-linear"))
