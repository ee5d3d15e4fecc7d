"""Uni-LoRA on models of several layers: against the definition by hand, as an isometry, and through files."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kilotune
from kilotune import CheckpointError, ConfigError, LoraConfig, PeftModel, UnsupportedError, get_peft_model
from kilotune.adapter_files.reading import open_adapter
from kilotune.convert import rewrite, to_lora, to_peft
from kilotune.methods import UniLoraConfig
from tests.conformance.one_vector import indices

SHAPES = {"first": (7, 6), "second": (5, 7), "third": (4, 5)}
RANK = 3
SIZES = [RANK * (out + inn) for out, inn in SHAPES.values()]
X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
Array = np.ndarray[Any, np.dtype[np.float64]]


def base(dtype: torch.dtype = torch.float64, sizes: dict[str, tuple[int, int]] = SHAPES) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, (out, inn) in sizes.items():
        net.add_module(name, nn.Linear(inn, out))
    return net.to(dtype)


def config(**options: Any) -> UniLoraConfig:
    return UniLoraConfig(**{"r": RANK, "theta_d_length": 17, "target_modules": "all-linear", **options})


def model_with(dtype: torch.dtype = torch.float64, **options: Any) -> PeftModel:
    model = get_peft_model(base(dtype), config(init_weights=False, **options)).to(dtype)
    assert isinstance(model, PeftModel)
    return model


def vector_of(model: PeftModel, adapter: str | None = None) -> Tensor:
    return dict(model.adapter_parameters(adapter))["unilora_theta_d"]


def factors(vector: Array, order: list[str], seed: int) -> dict[str, tuple[Array, Array]]:
    """A and B of each layer, by hand."""
    sizes = [RANK * sum(SHAPES[name]) for name in order]
    flat = indices(seed, sizes, len(vector))
    values = np.array([vector[j] / math.sqrt(flat.count(j)) for j in flat])
    made, start = {}, 0
    for name, size in zip(order, sizes):
        out, inn = SHAPES[name]
        part = values[start : start + size]
        made[name] = part[: RANK * inn].reshape(RANK, inn), part[RANK * inn :].reshape(out, RANK)
        start += size
    return made


def reference(vector: Array, order: list[str] | None = None, seed: int = 42) -> nn.Sequential:
    net = base()
    for name, (a, b) in factors(vector, list(SHAPES) if order is None else order, seed).items():
        net.get_submodule(name).weight.data += torch.from_numpy(b @ a)
    return net


# -- mathematics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 17, sum(SIZES), 200])
@pytest.mark.parametrize("seed", [42, 2**64 - 1])
def test_it_is_what_the_definition_says(d: int, seed: int) -> None:
    model = model_with(theta_d_length=d, proj_seed=seed)
    net = reference(vector_of(model).detach().numpy(), seed=seed)
    torch.testing.assert_close(model(X), net(X), rtol=1e-11, atol=1e-12)
    assert not torch.allclose(model(X), base()(X), atol=1e-2)
    torch.testing.assert_close(model.merge_and_unload()(X), net(X), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("generator", ["portable", "peft"])
def test_the_map_keeps_lengths_and_angles(generator: str) -> None:
    """Columns from one-hot vectors: each place has one entry, and P^T P is the unit matrix."""
    model = model_with(generator=generator)
    columns = []
    for unit in torch.eye(17, dtype=torch.float64):
        vector_of(model).data.copy_(unit)
        deltas = [layer.slot("default").delta() for layer in model.adapted_layers().values()]
        columns.append(torch.cat([t.flatten() for delta in deltas for t in (delta.a, delta.b)]).detach())
    matrix = torch.stack(columns, 1)
    assert matrix.shape == (sum(SIZES), 17)
    assert (matrix.count_nonzero(1) == 1).all()
    tight = 1e-6 if generator == "peft" else 1e-14  # PEFT's norms are float32 numbers
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(17, dtype=torch.float64), rtol=0, atol=tight)
    counts = matrix.count_nonzero(0)
    assert counts.max() - counts.min() <= 1


def test_numbers_without_a_place_do_nothing() -> None:
    """More numbers than places: those left over get no gradient, and nothing is divided by zero."""
    model = model_with(theta_d_length=sum(SIZES) + 5)
    model(X).sum().backward()
    gradient = vector_of(model).grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient.count_nonzero() == sum(SIZES)


def test_the_gradient_is_that_of_the_definition() -> None:
    model = model_with()
    model(X).square().sum().backward()
    vector, gradient, step = vector_of(model).detach().numpy().copy(), vector_of(model).grad, 1e-6
    assert gradient is not None
    for i in range(17):
        sides = []
        for sign in (1, -1):
            moved = vector.copy()
            moved[i] += sign * step
            with torch.no_grad():
                sides.append(float(reference(moved)(X).square().sum()))
        assert float(gradient[i]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6, abs=1e-7)


def test_the_start() -> None:
    """Uniform within the bound, from torch's generator on the CPU; near the base, and not at it, as in the paper."""
    torch.manual_seed(8)
    model = get_peft_model(base(torch.float32), config(theta_d_length=500, init_theta_d_bound=0.3))
    torch.manual_seed(0)  # what base() sets, and its weights take
    nn.Sequential(*(nn.Linear(inn, out) for out, inn in SHAPES.values()))
    assert torch.equal(vector_of(model), torch.empty(500).uniform_(-0.3, 0.3))
    small = get_peft_model(base(torch.float32), config())
    change = (small(X.float()) - base(torch.float32)(X.float())).abs().max()
    assert 0 < change < 0.02
    assert model.get_nb_trainable_parameters()[0] == 500


def test_it_is_also_the_method_inside_dora() -> None:
    """Rows of W + B A, with lengths of their own that start where the adapter starts."""
    plain, model = model_with(), model_with(use_dora=True)
    torch.testing.assert_close(model(X), plain(X))
    names = {name for name, _ in model.adapter_parameters()}
    assert names == {"unilora_theta_d", *(f"{name}.lora_magnitude_vector" for name in SHAPES)}


# -- refusals ---------------------------------------------------------------------------------------


def test_faults_of_the_configuration_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        config(r=0, theta_d_length=0, proj_seed=-1, generator="numpy", init_theta_d_bound=0, unilora_dropout=1)
    text = str(caught.value)
    for part in (
        "r: expected a whole number >= 1, got 0",
        "theta_d_length: expected a whole number >= 1, got 0",
        "proj_seed: expected a whole number in 0 ... 2**64 - 1, got -1",
        "generator: expected one of ['portable', 'peft', 'stored'], got 'numpy'",
        "init_theta_d_bound: expected a number > 0, got 0: at zero neither factor gets a gradient",
        "unilora_dropout: expected a number in [0, 1), got 1.0",
    ):
        assert part in text
    with pytest.raises(ConfigError, match="site_order: needs generator='portable', got 'peft'"):
        config(generator="peft", site_order=["first"])
    with pytest.raises(ConfigError, match="generator='stored' is for adapters loaded from a file"):
        get_peft_model(base(), config(generator="stored"))
    with pytest.raises(ConfigError, match="'third': adapted here, but not in site_order"):
        get_peft_model(base(), config(site_order=["first", "second"]))


# -- files ------------------------------------------------------------------------------------------


def saved(folder: Path, **options: Any) -> PeftModel:
    model = model_with(torch.float32, **options)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("generator", ["portable", "peft"])
@pytest.mark.parametrize("save_indices", [False, True])
def test_files_of_every_form(generator: str, save_indices: bool, tmp_path: Path) -> None:
    model = saved(tmp_path, generator=generator, save_indices=save_indices, proj_seed=3)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(tensors) == 1 + 4 * 3 * save_indices
    assert torch.equal(tensors["base_model.unilora_theta_d"], vector_of(model).detach())
    ours = not save_indices and generator == "portable"
    assert values["theta_d_length"] == 17
    assert values["peft_type"] == ("KILOTUNE_UNILORA" if ours else "UNILORA")  # PEFT must not take its own indices
    assert ("kilotune" in values) == ours
    again = PeftModel.from_pretrained(base(torch.float32), tmp_path, is_trainable=True)
    assert again.peft_config["default"].generator == ("stored" if save_indices else generator)
    assert torch.equal(again(X.float()), model(X.float()))
    again.save_pretrained(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_file_keeps_the_order(tmp_path: Path) -> None:
    model = saved(tmp_path)
    turned = base(torch.float32, dict(reversed(SHAPES.items())))
    turned.load_state_dict(base(torch.float32).state_dict())
    again = PeftModel.from_pretrained(turned, tmp_path)
    for name, layer in again.adapted_layers().items():
        ours, theirs = model.adapted_layers()[name].slot("default").delta(), layer.slot("default").delta()
        assert torch.equal(ours.a, theirs.a)
        assert torch.equal(ours.b, theirs.b)


def edit(folder: Path, changes: dict[str, Tensor | None] | None = None, **values: Any) -> None:
    """Change a file as another program would, without our checksums of its contents."""
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k in ("format", "kilotune_projections_sha256")}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dictionary
    tensors.update({f"base_model.{key}": value for key, value in (changes or {}).items() if value is not None})
    for key in [key for key, value in (changes or {}).items() if value is None]:
        del tensors[f"base_model.{key}"]
    save_file(tensors, path, metadata)
    text = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**text, **values}))


@pytest.mark.parametrize("generator", ["portable", "peft"])
def test_other_indices_than_at_training_are_noticed(generator: str, tmp_path: Path) -> None:
    saved(tmp_path, generator=generator)
    edit(tmp_path, proj_seed=43)
    with pytest.raises(CheckpointError, match="the indices do not match the checkpoint"):
        PeftModel.from_pretrained(base(torch.float32), tmp_path)


@pytest.mark.filterwarnings("ignore::kilotune.OtherBaseWarning")  # the error says more
def test_another_base_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path / "portable")
    saved(tmp_path / "peft", generator="peft")
    smaller = {"first": (7, 6), "second": (5, 7)}
    with pytest.raises(CheckpointError, match="'third': in site_order, but not adapted here"):
        PeftModel.from_pretrained(base(torch.float32, smaller), tmp_path / "portable")
    with pytest.raises(CheckpointError, match="the indices do not match the checkpoint"):
        PeftModel.from_pretrained(base(torch.float32, {**SHAPES, "third": (6, 5)}), tmp_path / "peft")


A, S = "model.first.unilora_indices_A", "model.second.unilora_scales_B"
BAD: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": ({A: None}, r"first.unilora_indices_A: the model expects \(3, 6\), the file has nothing"),
    "shape": ({A: torch.zeros(6, 3, dtype=torch.int64)}, r"expects \(3, 6\), the file has \(6, 3\)"),
    "too large": ({A: torch.full((3, 6), 17)}, r"expected indices in 0 ... 16, got 17 ... 17"),
    "negative": ({A: torch.full((3, 6), -1)}, r"expected indices in 0 ... 16, got -1 ... -1"),
    "huge": ({A: torch.full((3, 6), 2**32)}, r"expected indices in 0 ... 16, got 4294967296"),
    "float indices": ({A: torch.zeros(3, 6)}, "unilora_indices_A: expected integers, got torch.float32"),
    "integer norms": ({S: torch.ones(5, 3, dtype=torch.int64)}, "unilora_scales_B: expected floats, got torch.int64"),
    "stranger": ({"model.fourth.unilora_indices_A": torch.zeros(1)}, "unexpected: fourth.unilora_indices_A"),
    "vector": ({"unilora_theta_d": torch.zeros(18)}, r"shape of unilora_theta_d: expected \(17,\), got \(18,\)"),
    "no vector": ({"unilora_theta_d": None}, r"missing: unilora_theta_d \(17,\)"),
    "more": ({"unilora_more": torch.zeros(1)}, "unexpected: unilora_more"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_indices_that_do_not_fit_are_refused(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    saved(tmp_path, save_indices=True)
    edit(tmp_path, changes)
    net = base(torch.float32)
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(net, tmp_path)
    assert isinstance(net.first, nn.Linear)


def test_indices_that_the_config_denies_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, save_indices=True)
    edit(tmp_path, save_indices=False)
    with pytest.raises(CheckpointError, match="the config says save_indices=False, but the file holds first.unilora"):
        PeftModel.from_pretrained(base(torch.float32), tmp_path)


# -- with others, and in other forms ----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"generator": "peft"}, {"save_indices": True}], ids=str)
def test_a_copy_is_a_model_of_its_own(options: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, **options)
    model = PeftModel.from_pretrained(base(torch.float32), tmp_path, is_trainable=True)
    y = model(X.float())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert torch.equal(twin(X.float()), y)
        with torch.no_grad():
            vector_of(twin).add_(1.0)
        assert not torch.equal(twin(X.float()), y)
        assert torch.equal(model(X.float()), y)


def test_two_of_them_add_up_and_one_can_go() -> None:
    model = model_with()
    model.add_adapter("other", config(r=1, theta_d_length=5, generator="peft", target_modules=["second"]))
    model.double()
    one = model(X)
    model.set_adapter("other")
    only = {name: layer.slot("other") is not None for name, layer in model.adapted_layers().items()}
    assert only == {"first": False, "second": True, "third": False}
    model.set_adapter(["default", "other"])
    change = model.adapted_layers()["second"].slot("other").delta().weight_change(torch.zeros(1, dtype=torch.float64))
    net = reference(vector_of(model, "default").detach().numpy())
    net.second.weight.data += change.detach()
    torch.testing.assert_close(model(X), net(X))
    model.delete_adapter("other")
    torch.testing.assert_close(model(X), one)


def test_made_on_meta_it_is_drawn_when_it_gets_a_place() -> None:
    model = model_with()
    with torch.device("meta"):
        hollow = get_peft_model(base(), config())
    hollow.to_empty(device="cpu")
    hollow.load_state_dict(model.state_dict())
    torch.testing.assert_close(hollow.double()(X), model(X))


def test_it_can_be_written_as_a_lora_and_for_peft(tmp_path: Path) -> None:
    model = saved(tmp_path / "own")
    y = model(X.float())
    to_lora(model).save(tmp_path / "lora")
    low = PeftModel.from_pretrained(base(torch.float32), tmp_path / "lora")
    assert isinstance(low.peft_config["default"], LoraConfig)
    torch.testing.assert_close(low(X.float()), y)
    to_peft(model).save(tmp_path / "peft")
    again = PeftModel.from_pretrained(base(torch.float32), tmp_path / "peft")
    assert again.peft_config["default"].generator == "stored"
    assert torch.equal(again(X.float()), y)
    assert torch.equal(model(X.float()), y)
    file = open_adapter(tmp_path / "peft")
    with pytest.raises(UnsupportedError, match="unilora: needs the base's shapes"):  # its vector belongs to no layer
        rewrite(file)


def test_it_is_picked_by_name() -> None:
    assert kilotune.get_config("unilora", r=3) == UniLoraConfig(r=3)


def test_inspect_counts_the_vector_as_trained_and_the_indices_as_stored(tmp_path: Path) -> None:
    pytest.importorskip("typer", reason="the command line")
    from tests.support.cli_helpers import as_json

    saved(tmp_path / "seed")
    saved(tmp_path / "whole", save_indices=True)
    seed, whole = (as_json("inspect", tmp_path / name) for name in ("seed", "whole"))
    assert (seed["trained"], seed["stored_projections"], seed["layers"]) == (17, 0, 3)
    assert (whole["trained"], whole["stored_projections"]) == (17, 2 * sum(SIZES))
    assert seed["checksums"]["projections"] == "present, not verified: give --base"
    assert whole["checksums"]["projections"] == "none needed: the matrices are in the file"
