"""Intrinsic dimension on models of several layers: against the definition by hand, through files, with others."""

from __future__ import annotations

import copy
import json
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
from kilotune import CheckpointError, ConfigError, LoraConfig, PeftModel, get_peft_model
from kilotune.methods import IntrinsicConfig
from tests.conformance.one_vector import intrinsic as by_hand

SHAPES = {"first": (7, 6), "second": (5, 7), "third": (4, 5)}
X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)


def base(dtype: torch.dtype = torch.float64, sizes: dict[str, tuple[int, int]] = SHAPES) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, (out, inn) in sizes.items():
        net.add_module(name, nn.Linear(inn, out))
    return net.to(dtype)


def config(**options: Any) -> IntrinsicConfig:
    return IntrinsicConfig(**{"d": 11, "target_modules": "all-linear", **options})


def scrambled(model: PeftModel, seed: int = 3, adapter: str | None = None) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in model.adapter_parameters(adapter):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def model_with(**options: Any) -> PeftModel:
    return scrambled(get_peft_model(base(), config(**options)).double())


def vector_of(model: PeftModel, adapter: str | None = None) -> Tensor:
    return dict(model.adapter_parameters(adapter))["intrinsic_vector"]


def reference(made: IntrinsicConfig, vector: np.ndarray[Any, Any], order: list[str] | None = None) -> nn.Sequential:
    """The base with the changes that the definition gives, added to its weights."""
    order = list(SHAPES) if order is None else order
    net = base()
    for name, change in zip(order, by_hand(vector, made, [SHAPES[name] for name in order])):
        net.get_submodule(name).weight.data += torch.from_numpy(change)
    return net


VARIANTS: list[dict[str, Any]] = [
    {"projection": projection, "structure": structure, "d": d, "projection_prng_key": 2**64 - d}
    for projection in ("fastfood", "dense")
    for structure in ("did", "said")
    for d in (4, 11, 70)
]


# -- mathematics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_it_is_what_the_definition_says(options: dict[str, Any]) -> None:
    model = model_with(**options)
    net = reference(config(**options), vector_of(model).detach().numpy())
    torch.testing.assert_close(model(X), net(X), rtol=1e-11, atol=1e-12)
    assert not torch.allclose(model(X), base()(X), atol=1e-2)
    torch.testing.assert_close(model.merge_and_unload()(X), net(X), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS[:4], ids=str)
def test_gradients_are_those_of_the_definition(options: dict[str, Any]) -> None:
    """Central differences of the reference, which is built the long way."""
    model, made = model_with(**options), config(**options)
    model(X).square().sum().backward()
    vector = vector_of(model).detach().numpy().copy()
    gradient, step = vector_of(model).grad, 1e-6
    assert gradient is not None
    for i in range(made.d):
        sides = []
        for sign in (1, -1):
            moved = vector.copy()
            moved[i] += sign * step
            with torch.no_grad():
                sides.append(float(reference(made, moved)(X).square().sum()))
        assert float(gradient[i]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("projection", ["fastfood", "dense"])
def test_the_whole_projection_keeps_lengths_on_average(projection: str) -> None:
    """|P theta|^2 over all the layers together, mean over seeds, is |theta|^2."""
    theta, ratios = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), []
    for seed in range(150):
        model = get_peft_model(base(), config(d=20, projection=projection, projection_prng_key=seed)).double()
        vector_of(model).data.copy_(theta)
        deltas = [layer.slot("default").delta().delta.detach() for layer in model.adapted_layers().values()]
        ratios.append(float(sum(delta.square().sum() for delta in deltas) / theta.square().sum()))
    assert abs(np.mean(ratios) - 1) < 5 * np.std(ratios) / len(ratios) ** 0.5 < 0.2


def test_the_start_is_the_base_and_the_scales_are_counted_in_d() -> None:
    model = get_peft_model(base(torch.float32), config(structure="said", d=5))
    assert vector_of(model).tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert torch.equal(model(X.float()), base(torch.float32)(X.float()))
    assert model.get_nb_trainable_parameters()[0] == 5
    model.eval()
    model(X.float()).sum().backward()
    gradient = vector_of(model).grad
    assert gradient is not None
    assert gradient[:2].count_nonzero() == 2  # theta moves at once, and the scales after it
    assert gradient[2:].count_nonzero() == 0


def test_autograd_keeps_no_more_than_the_weights_changes() -> None:
    """With scales too: they are multiplied into theta, so what comes out of the projection is not kept twice."""
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    sizes = {"first": (64, 64), "second": (64, 64)}
    model = scrambled(get_peft_model(base(torch.float32, sizes), config(d=30, structure="said")))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(torch.randn(1, 64))
    weights = 4 * 2 * 64 * 64
    assert sum(kept.values()) <= 2 * weights + 4 * 64 * 20  # the base's own weights, the changes, vectors


# -- refusals ---------------------------------------------------------------------------------------


def test_as_many_scales_as_numbers_are_refused() -> None:
    for d in (1, 3):
        with pytest.raises(ConfigError, match=f"with 3 layers expected d > 3, got d = {d}; raise d"):
            get_peft_model(base(), config(structure="said", d=d))
    get_peft_model(base(), config(structure="said", d=4))


def test_a_dense_projection_that_is_too_large_is_refused_before_anything_is_drawn() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4096, 4096))
    with pytest.raises(ConfigError, match="16777216 adapted numbers and a vector of 100 takes 6710886400 bytes"):
        get_peft_model(net, config(projection="dense", d=100))
    assert isinstance(net[0], nn.Linear)


def test_faults_of_the_configuration_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        config(d=0, projection="fastfod", structure="sad", projection_prng_key=-1, site_order=["a", "a"], bias="only")
    text = str(caught.value)
    for part in (
        "d: expected a whole number >= 1, got 0",
        "projection: expected one of ['fastfood', 'dense'], got 'fastfod'. Did you mean 'fastfood'?",
        "structure: expected one of ['did', 'said'], got 'sad'. Did you mean 'said'?",
        "projection_prng_key: expected a whole number in 0 ... 2**64 - 1, got -1",
        "site_order: names ['a'] more than once",
        "bias: expected one of ['none', 'all', 'intrinsic_only'], got 'only'",
    ):
        assert part in text
    with pytest.raises(ConfigError, match="site_order: expected a list of layer names or None, got 'first'"):
        config(site_order="first")


# -- the order of the layers ------------------------------------------------------------------------


def test_the_order_of_the_layers_deals_the_numbers_out() -> None:
    order = ["third", "first", "second"]
    model = model_with(site_order=order, structure="said")
    net = reference(config(structure="said"), vector_of(model).detach().numpy(), order)
    torch.testing.assert_close(model(X), net(X), rtol=1e-11, atol=1e-12)
    other = model_with(structure="said")
    assert not torch.allclose(model(X), other(X), atol=1e-3)


def test_an_order_of_other_layers_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        get_peft_model(base(), config(site_order=["first", "second", "fourth"]))
    assert "'fourth': in site_order, but not adapted here" in str(caught.value)
    assert "'third': adapted here, but not in site_order" in str(caught.value)


def test_a_file_keeps_the_order(tmp_path: Path) -> None:
    """A model whose layers are registered in another order gets the same numbers for each layer."""
    model = model_with(structure="said")
    model.save_pretrained(tmp_path)
    turned = base(sizes=dict(reversed(SHAPES.items())))
    turned.load_state_dict(base().state_dict())
    again = PeftModel.from_pretrained(turned, tmp_path)
    assert list(again.adapted_layers()) == list(reversed(SHAPES))
    for name, layer in again.adapted_layers().items():
        ours = model.adapted_layers()[name].slot("default").delta().delta
        assert torch.equal(layer.slot("default").delta().delta, ours), name


# -- files ------------------------------------------------------------------------------------------


def saved(folder: Path, **options: Any) -> PeftModel:
    model = scrambled(get_peft_model(base(torch.float32), config(**options)))
    model.save_pretrained(folder)
    return model


def test_the_file_is_d_numbers_and_a_seed(tmp_path: Path) -> None:
    model = saved(tmp_path, structure="said", projection_prng_key=77)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {"base_model.intrinsic_vector": (11,)}
    assert torch.equal(tensors["base_model.intrinsic_vector"], vector_of(model).detach())
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (values["peft_type"], values["d"], values["projection_prng_key"]) == ("KILOTUNE_INTRINSIC", 11, 77)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        checksum = file.metadata()["kilotune_projections_sha256"]
    assert values["kilotune"] == {"format": 1, "site_order": list(SHAPES), "projections_sha256": checksum}
    again = PeftModel.from_pretrained(base(torch.float32), tmp_path, is_trainable=True)
    assert torch.equal(again(X.float()), model(X.float()))
    again.save_pretrained(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def edit(folder: Path, tensors: dict[str, Tensor] | None = None, **values: Any) -> None:
    """Change a file as another program would, without our checksums of it."""
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k in ("format", "kilotune_projections_sha256")}
        old = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dictionary
    save_file(old if tensors is None else tensors, path, metadata)
    text = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**text, **values}))


def test_a_vector_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    faults: list[tuple[dict[str, Tensor], str]] = [
        ({"base_model.intrinsic_vector": torch.zeros(12)}, r"expected intrinsic_vector \(11,\), .* got \(12,\)"),
        ({"base_model.intrinsic_vector": torch.zeros(11, 1)}, r"got \(11, 1\)"),
        ({"base_model.other": torch.zeros(11)}, r"'intrinsic_vector', got \['other'\]"),
        ({"base_model.intrinsic_vector": torch.zeros(11), "base_model.more": torch.zeros(1)}, "more"),
        ({"base_model.intrinsic_vector": torch.zeros(11, dtype=torch.int64)}, "expected floating-point tensors"),
        ({"base_model.intrinsic_vector": torch.zeros(11), "base_model.model.first.x": torch.zeros(1)}, "unexpected"),
    ]
    for i, (tensors, message) in enumerate(faults):
        folder = tmp_path / str(i)
        saved(folder)
        edit(folder, tensors)
        with pytest.raises(CheckpointError, match=message):
            PeftModel.from_pretrained(base(torch.float32), folder)


@pytest.mark.parametrize(
    "values",
    [
        {"projection_prng_key": 1},
        {"projection": "dense"},
        {"structure": "said"},
        {"kilotune": {"format": 1, "site_order": ["second", "first", "third"]}},
    ],
    ids=str,
)
def test_another_projection_than_at_training_is_noticed(values: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, **values)
    net = base(torch.float32)
    with pytest.raises(CheckpointError, match="the projection does not match the checkpoint"):
        PeftModel.from_pretrained(net, tmp_path)
    assert isinstance(net.first, nn.Linear)


@pytest.mark.filterwarnings("ignore::kilotune.OtherBaseWarning")  # the error says more
def test_another_base_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(CheckpointError, match="'third': in site_order, but not adapted here"):
        PeftModel.from_pretrained(base(torch.float32, {"first": (7, 6), "second": (5, 7)}), tmp_path)
    wider = base(torch.float32, {**SHAPES, "third": (6, 5)})
    with pytest.raises(CheckpointError, match="the projection does not match the checkpoint"):
        PeftModel.from_pretrained(wider, tmp_path)


def test_peft_refuses_the_file(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="it is to refuse the file")
    saved(tmp_path)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(base(torch.float32), tmp_path)


# -- with others, and in other forms ----------------------------------------------------------------


def test_two_of_them_and_a_lora_add_up() -> None:
    """Two adapters of other seeds and sizes, and one of another method, in one model; then one is deleted."""
    model = model_with()
    model.add_adapter("other", config(d=6, structure="said", projection_prng_key=9, target_modules=["second", "third"]))
    model.add_adapter("low", LoraConfig(r=2, target_modules=["first", "third"]))
    model.double()
    for seed, name in enumerate(("other", "low")):
        scrambled(model, seed, name)
    weights = {name: base().get_submodule(name).weight.detach().clone() for name in SHAPES}
    for adapter in ("default", "other", "low"):
        for name, layer in model.adapted_layers().items():
            slot = layer.slot(adapter)
            weights[name] += 0 if slot is None else slot.delta().weight_change(weights[name]).detach()
    net = base()
    for name, weight in weights.items():
        net.get_submodule(name).weight.data.copy_(weight)
    model.set_adapter(["default", "other", "low"])
    torch.testing.assert_close(model(X), net(X))
    assert model.get_nb_trainable_parameters()[0] == 11 + 6 + 2 * (7 + 6 + 4 + 5)
    model.set_adapter("other")
    assert model.report().trainable == 6
    assert model.report().frozen_adapters == 11 + 2 * (7 + 6 + 4 + 5)  # not counted as the base's
    model(X).sum().backward()
    assert vector_of(model, "default").grad is None
    model.delete_adapter("default")
    assert set(model.shared_parameters) == {"other"}


def test_a_copy_is_a_model_of_its_own() -> None:
    model = model_with(structure="said")
    y = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert torch.equal(twin(X), y)
        with torch.no_grad():
            vector_of(twin).add_(1.0)
        assert not torch.equal(twin(X), y)
        assert torch.equal(model(X), y)
        assert vector_of(twin) is twin.shared_parameters["default"]["intrinsic_vector"]


def test_layers_read_the_model_s_own_vector() -> None:
    """What replaces parameters, and does not change them in place, reaches the layers as well."""
    model = model_with()
    name = "shared_parameters.default.intrinsic_vector"
    zero = {name: torch.zeros(11, dtype=torch.float64)}
    assert torch.equal(torch.func.functional_call(model, zero, (X,)), base()(X))
    with torch.device("meta"):
        hollow = get_peft_model(base(), config())
    hollow.to_empty(device="cpu")
    hollow.load_state_dict(model.state_dict())
    torch.testing.assert_close(hollow.double()(X), model(X))


def test_it_trains() -> None:
    """Towards a model that some vector gives exactly."""
    target = model_with(structure="said", d=9)(X).detach()
    model = get_peft_model(base(), config(structure="said", d=9)).double()
    optimizer = torch.optim.Adam([vector_of(model)], lr=0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(X) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_it_is_picked_by_name() -> None:
    assert kilotune.get_config("intrinsic", d=3) == IntrinsicConfig(d=3)
