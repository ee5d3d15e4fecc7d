"""RandLoRA against PEFT: its matrices, its files and ours, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kilotune import CheckpointError, ConfigError, PeftModel, get_config, get_peft_model
from tests.support.models import randomize

peft = pytest.importorskip("peft")
TARGETS = {"target_modules": ["0", "2", "4"]}
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"r": 3},
    "sparse": {"r": 4, "sparse": True, "randlora_alpha": 7},
    "very-sparse": {"r": 5, "very_sparse": True, "projection_prng_key": 9},
    "both": {"r": 2, "very_sparse": True, "sparse": True},
    "rank-over-all": {"r": 20},
    "not-at-the-base": {"r": 2, "init_weights": False, "bias": "randlora_only"},
}
X = torch.linspace(-2, 2, 60).view(5, 12)


def net() -> nn.Module:
    """In over out, out over in, and as many of both."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 9))


def moved(model: nn.Module) -> nn.Module:
    """With numbers that a training might have given."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def theirs(options: dict[str, Any]) -> Any:
    return moved(peft.get_peft_model(net(), peft.RandLoraConfig(**TARGETS, **options)))


def ours(**options: Any) -> PeftModel:
    model = get_peft_model(net(), get_config("randlora", **{"r": 3, "randlora_alpha": 6, **TARGETS, **options}))
    randomize(model)
    return model.eval()


def plain(name: str) -> str:
    """The layer and the parameter, by which both are the same."""
    parts = [part for part in name.split(".") if part.isdigit() or part.startswith("randlora_") or part == "bias"]
    return ".".join(parts)


def read_by_peft(folder: Path) -> Any:
    """It has names for the pair in each layer too, which are the same tensors, and misses them in the file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        return peft.PeftModel.from_pretrained(net(), folder)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def held_of(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights, and their header."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in sorted(file.keys())}, dict(file.metadata())


def same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * (1 + float(right.detach().abs().max())))


@pytest.mark.parametrize("way", WAYS)
def test_files_both_ways(way: str, tmp_path: Path) -> None:
    """PEFT's file here, and ours in PEFT, with the same outputs and gradients; merged too."""
    model = theirs(WAYS[way])
    model.save_pretrained(tmp_path / "theirs")
    read = PeftModel.from_pretrained(net(), tmp_path / "theirs", is_trainable=True)
    same(read(X), model(X))
    for each in (read, model):
        each(X).square().mean().backward()
    mine = {plain(name): p.grad for name, p in read.named_parameters() if p.requires_grad}
    right = {plain(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert mine.keys() == right.keys()
    for name, grad in right.items():
        same(mine[name], grad)
    read.save_pretrained(tmp_path / "ours")
    same(read_by_peft(tmp_path / "ours")(X), model(X))
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path / "ours")(X), read(X))
    same(read.merge_and_unload()(X), model(X))


@pytest.mark.parametrize("way", WAYS)
def test_the_start_is_pefts(way: str) -> None:
    model = peft.get_peft_model(net(), peft.RandLoraConfig(**TARGETS, **WAYS[way]))
    mine = get_peft_model(net(), get_config("randlora", **TARGETS, **WAYS[way]))
    starts = {plain(name): p for name, p in mine.named_parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.shape == starts[plain(name)].shape
        if "lambda" not in name or "init_weights" not in WAYS[way]:  # those are random
            torch.testing.assert_close(starts[plain(name)], parameter)


@pytest.mark.parametrize("way", ["sparse", "very-sparse"])
def test_sparse_matrices_of_pefts_seeds(way: str, tmp_path: Path) -> None:
    """Bit for bit; so PEFT's files without them are read, and ours there."""
    options = {**WAYS[way], "save_projection": False}
    with pytest.warns(UserWarning, match="not save basis_A"):
        model = theirs(options)
    model.save_pretrained(tmp_path / "theirs")
    assert not any("randlora_A" in key for key in tensors_in(tmp_path / "theirs"))
    read = PeftModel.from_pretrained(net(), tmp_path / "theirs")
    assert read.peft_config["default"].generator == "peft"
    same(read(X), model(X))
    made = ours(**{**WAYS[way], "generator": "peft", "save_projection": True})
    made.save_pretrained(tmp_path / "saved")
    held = tensors_in(tmp_path / "saved")
    for key in ("randlora_A", "randlora_B"):
        assert torch.equal(held[f"base_model.{key}"], getattr(model.base_model, key)["default"])


@pytest.mark.parametrize("sparsity", [{}, {"sparse": True}, {"very_sparse": True}])
def test_portable_matrices_in_a_file_are_those_of_the_seed(sparsity: dict[str, bool], tmp_path: Path) -> None:
    """PEFT takes them from the file; here they are made again, and held against it."""
    model = ours(save_projection=True, **sparsity)
    model.save_pretrained(tmp_path)
    same(read_by_peft(tmp_path)(X), model(X))
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert again.peft_config["default"].generator == "portable"
    assert torch.equal(again(X), model(X))
    held = tensors_in(tmp_path)
    deviations = [float(held[f"base_model.randlora_{which}"].std()) for which in "AB"]
    assert all(0.6 < deviation < 1.5 for deviation in deviations)


def test_another_matrix_in_a_file_is_refused(tmp_path: Path) -> None:
    theirs({"r": 3}).save_pretrained(tmp_path / "theirs")
    held = tensors_in(tmp_path / "theirs")
    held["base_model.model.2.randlora_B"][0] += 1
    save_file(held, tmp_path / "theirs" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"2\.randlora_B in the file is another matrix than randlora_B"):
        PeftModel.from_pretrained(net(), tmp_path / "theirs")
    ours(save_projection=True).save_pretrained(tmp_path / "ours")
    held, header = held_of(tmp_path / "ours")
    held["base_model.randlora_A"][0] *= 2
    header.pop("kilotune_sha256", None)
    save_file(held, tmp_path / "ours" / "adapter_model.safetensors", header)
    with pytest.raises(CheckpointError, match=r"randlora_A \(3, 1, 9\) in the file is not the one of projection"):
        PeftModel.from_pretrained(net(), tmp_path / "ours")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="generator='peft': PEFT draws dense matrices in bfloat16"):
        get_config("randlora", generator="peft")
    with pytest.raises(ConfigError, match=r"generator: expected one of .* Did you mean"):
        get_config("randlora", generator="portible")
    with pytest.raises(ConfigError, match="'stored' is for adapters loaded"):
        ours(generator="stored")
    with pytest.raises(ConfigError, match="projection_prng_key: expected a whole number"):
        get_config("randlora", projection_prng_key=-1)
    with pytest.raises(ConfigError, match="are alike, so PEFT divides by zero"):
        ours(r=1, generator="peft", very_sparse=True, projection_prng_key=ALL_ZERO)
    with pytest.warns(UserWarning, match="not save basis_A"):
        model = theirs({"r": 3, "save_projection": False})
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="save the adapter in PEFT with save_projection=True"):
        PeftModel.from_pretrained(net(), tmp_path)


ALL_ZERO = 7  # a key with which PEFT draws an A of zeros


@pytest.mark.filterwarnings("ignore:the adapter in:UserWarning")  # that the base is another one
def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    wider = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 13))
    theirs({"r": 3}).save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"need randlora_A \(3, 1, 12\).*got \(3, 1, 9\).*another base"):
        PeftModel.from_pretrained(wider, tmp_path / "theirs")
    for name, options in (("seed", {}), ("saved", {"save_projection": True})):
        ours(**options).save_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError):
            PeftModel.from_pretrained(wider, tmp_path / name)


def test_the_change_has_full_rank_and_the_layers_share_one_pair() -> None:
    model = ours(target_modules=["0", "4"])
    before = net()
    merged = model.merge_and_unload()
    for place in (0, 4):
        change = (merged[place].weight - before[place].weight).detach().double()
        assert int(torch.linalg.matrix_rank(change, rtol=1e-6)) == min(change.shape)
    twin = ours()
    held = [t.numel() for t in twin.projections.tensors()]
    assert sorted(held) == [0, 0, 3 * 9, 9 * 12]  # A (r, least), B (r n, most), for three layers
    twin.add_adapter("other", get_config("randlora", r=5, randlora_alpha=6, **TARGETS))
    assert sorted(t.numel() for t in twin.projections.tensors()) == [0, 0, 5 * 9, 10 * 12]


@pytest.mark.parametrize("shape", [(4096, 64), (64, 4096)])
def test_in_float16_nothing_is_too_small_or_too_large(shape: tuple[int, int]) -> None:
    """Gamma starts at 1 / least, and a product with a frozen matrix alone is some 40 times the input."""
    x = torch.randn(3, shape[0], generator=torch.Generator().manual_seed(1))
    outputs = []
    for dtype in (torch.float32, torch.float16):
        layer = nn.Linear(*shape, dtype=dtype)
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        options = {"r": 8, "randlora_alpha": 160, "target_modules": ["0"]}
        model = get_peft_model(nn.Sequential(layer), get_config("randlora", **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lambda" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
            outputs.append(model(x.to(dtype)).float())
    assert (outputs[1] - outputs[0]).norm() < 2e-3 * outputs[0].norm()
