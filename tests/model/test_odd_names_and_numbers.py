"""Names, options and numbers that nobody expects: refused in one clear line, or computed right."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import (
    AdapterError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    TargetError,
    VeraConfig,
    get_peft_model,
)
from kilotune.methods.vera import Vera
from kilotune.projections.matrices import PortableSource, Projections, unit_rows
from tests.support.models import Snapshot, disk, mlp, randomize

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
X = torch.linspace(-1, 1, 24).view(4, 6)
Patch = pytest.MonkeyPatch


def change_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# -- names and values ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["漢" * 180, "a\ud800", CONFIG, WEIGHTS], ids=["bytes", "surrogate", CONFIG, WEIGHTS])
def test_adapter_names_that_no_folder_can_have(name: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"])
    base, model = mlp(), get_peft_model(mlp(), config)
    model.save_pretrained(tmp_path)
    before, wrapped = Snapshot.of(base), Snapshot.of(model)
    for add in (
        lambda: get_peft_model(base, config, name),
        lambda: PeftModel.from_pretrained(base, tmp_path, adapter_name=name),
        lambda: model.add_adapter(name, config),
        lambda: model.load_adapter(tmp_path, name),
    ):
        with pytest.raises(AdapterError, match="adapter name") as caught:
            add()
        str(caught.value).encode()  # the message itself can be printed
    assert Snapshot.of(base) == before
    assert Snapshot.of(model) == wrapped


def test_a_long_name_of_another_script_names_a_folder(tmp_path: Path) -> None:
    name = "漢" * 60
    get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]), name).save_pretrained(tmp_path)
    PeftModel.from_pretrained(mlp(), tmp_path, subfolder=name)


STRANGE = [1.5, math.inf, -math.inf, math.nan, "x", True, [1.5], [math.nan], ["x"], [True], [None], {"0": 1}, [[0]]]


@pytest.mark.parametrize("value", STRANGE, ids=str)
def test_layers_to_transform_that_are_no_indices(value: Any) -> None:
    for cls in (VeraConfig, LoraConfig):
        with pytest.raises(ConfigError, match="layers_to_transform: "):
            cls(target_modules=["0"], layers_to_transform=value)


def test_a_set_of_names_and_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="target_modules: expected a list of module names"):
        LoraConfig(target_modules={"0", 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [True, 5, 1.5, "w", {"w": 1}], ids=str)
def test_target_parameters_of_any_kind_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="target_parameters: "):
        LoraConfig(target_modules=["0"], target_parameters=value)


@pytest.mark.parametrize("name", ["9" * 300, int("9" * 300), "漢" * 180], ids=range(3))
def test_a_config_that_names_a_file_no_disk_can_hold(name: Any, tmp_path: Path) -> None:
    get_peft_model(mlp(), VeraConfig(r=3, target_modules=["0"])).save_pretrained(tmp_path)
    section = json.loads((tmp_path / CONFIG).read_text())["kilotune"]
    change_config(tmp_path, kilotune={**section, "weights": name})
    with pytest.raises(CheckpointError, match="cannot read|is not there") as caught:
        PeftModel.from_pretrained(mlp(), tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("spelling", ["All-Linear", "ALL-LINEAR", "all-linear"])
def test_all_linear_is_taken_in_any_case(spelling: str, tmp_path: Path) -> None:
    model = get_peft_model(mlp(), VeraConfig(r=2, target_modules=spelling))
    assert list(model.adapted_layers()) == ["0", "2"]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "all-linear"


@pytest.mark.parametrize("spelling", ["all_linear", "all linear", "alllinear"])
def test_a_near_miss_of_all_linear_is_told(spelling: str) -> None:
    with pytest.raises((ConfigError, TargetError), match="'all-linear'"):
        get_peft_model(mlp(), VeraConfig(r=2, target_modules=spelling))


def test_one_selected_adapter_may_be_given_as_its_name(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("more", LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "one", selected_adapters="default")
    assert sorted(disk(tmp_path / "one")) == [CONFIG, WEIGHTS]
    with pytest.raises(AdapterError, match="'defualt'.*Did you mean 'default'"):
        model.save_pretrained(tmp_path / "none", selected_adapters="defualt")


PATTERNS: list[dict[str, Any]] = [
    {"rank_pattern": {"0": 3, r"\d+": 5}},
    {"alpha_pattern": {"0": 3.5}},
    {"rank_pattern": {}, "alpha_pattern": {}},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_patterns_are_a_frozen_copy(patterns: dict[str, Any]) -> None:
    given = copy.deepcopy(patterns)
    config = LoraConfig(r=2, target_modules="all-linear", **given)
    twin = LoraConfig(r=2, target_modules="all-linear", **copy.deepcopy(patterns))
    for name, value in given.items():
        value["2"] = "nonsense"
        held = getattr(config, name)
        assert dict(held) == patterns[name]
        for change in (
            lambda held=held: held.__setitem__("0", 9),
            lambda held=held: held.__delitem__("0"),
            lambda held=held: held.update({"0": 9}),
            lambda held=held: held.setdefault("9", 9),
            lambda held=held: held.pop("0"),
            lambda held=held: held.clear(),
            lambda held=held: held.popitem(),
            lambda held=held: held.__ior__({"0": 9}),
        ):
            with pytest.raises((TypeError, AttributeError)):
                change()
        with pytest.raises(TypeError):
            held["0"] = 9
        assert dict(held) == patterns[name]
    again = pickle.loads(pickle.dumps(config))  # noqa: S301 -- our own bytes
    for same in (twin, copy.copy(config), copy.deepcopy(config), again, config.replace(r=2)):
        assert same == config
        assert hash(same) == hash(config)
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert len({config, twin}) == 1
    assert config.replace(rank_pattern={"2": 7}) != config


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "value", [{5: 3}, {None: 3}, {"0": [3]}, {"0": {}}, {"0": "3"}, {"(": 3}, [("0", 3)], 5], ids=str
)
def test_patterns_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        LoraConfig(r=2, target_modules="all-linear", **{name: value})


# -- narrow dtypes ---------------------------------------------------------------------------------

SIZE = 3 * 64 * 64
WORST = 255.0 * torch.from_numpy(unit_rows(0, 0, 1, SIZE) > 0)  # the picture that one row of A answers most to
PIXELS = torch.cat([(torch.arange(4 * SIZE) * 37 % 256).view(4, SIZE), WORST]).float()
WIDE = VeraConfig(r=256, target_modules="all-linear")


def pixels(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, 8)).to(dtype)


def a_fresh_adapter_changes_nothing(dtype: torch.dtype, autocast: bool) -> None:
    x = PIXELS.to(dtype)
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        expected = pixels(dtype)(x)
        model = get_peft_model(pixels(dtype), WIDE)
        y = model(x)
        y.float().square().mean().backward()
    assert bool(torch.isfinite(y).all()), "not finite"
    assert torch.equal(y, expected), "b = 0 changes the output"
    grads = [parameter.grad for _, parameter in model.adapter_parameters()]
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads), "a gradient is not finite"


NARROW = [(torch.float16, False), (torch.float32, True), (torch.bfloat16, False), (torch.float32, False)]


@pytest.mark.parametrize(("dtype", "autocast"), NARROW, ids=str)
def test_many_large_inputs_in_a_narrow_dtype(dtype: torch.dtype, autocast: bool) -> None:
    a_fresh_adapter_changes_nothing(dtype, autocast)


@pytest.mark.parametrize(("dtype", "autocast"), NARROW[:2], ids=str)
def test_planted_matrices_without_the_exponent(dtype: torch.dtype, autocast: bool, monkeypatch: Patch) -> None:
    monkeypatch.setattr(PortableSource, "exponent", lambda self, extent: 0)
    with pytest.raises(AssertionError, match="not finite"):
        a_fresh_adapter_changes_nothing(dtype, autocast)


def dense_reference(model: PeftModel, base: nn.Linear, x: Tensor) -> Tensor:
    """W x + diag(b) B diag(d) A x in float64, from the definition of the matrices."""
    own = {name.rpartition(".")[2]: p.detach().double() for name, p in model.adapter_parameters()}
    rank, inn, out = own["vera_lambda_d"].numel(), base.in_features, base.out_features
    a = torch.from_numpy(unit_rows(0, 0, rank, inn)).double() * (6.0 / inn) ** 0.5
    b = torch.from_numpy(unit_rows(0, 1, rank, out)).double().T * (6.0 / rank) ** 0.5
    change = own["vera_lambda_b"].diag() @ b @ own["vera_lambda_d"].diag() @ a
    assert base.bias is not None
    return (x.double() @ (base.weight.double() + change).T + base.bias.double()).detach()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.float64, 1e-6)])
def test_the_exponent_changes_no_result(dtype: torch.dtype, bound: float) -> None:
    model = get_peft_model(pixels(dtype), WIDE)
    randomize(model, scale=0.1)
    expected = dense_reference(model, pixels(dtype)[0], PIXELS.to(dtype))
    scale = float(expected.abs().max())
    with torch.no_grad():
        assert float((model(PIXELS.to(dtype)).double() - expected).abs().max()) < bound * scale
        plain = model.merge_and_unload()
        assert float((plain(PIXELS.to(dtype)).double() - expected).abs().max()) < bound * scale


def test_a_pair_is_the_matrices_and_a_power_of_two() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(5000, 7), nn.Linear(7, 9)), VeraConfig(r=4, target_modules=["0", "1"])
    )
    (holder,) = (m for m in model.modules() if isinstance(m, Projections))
    (source,) = holder.extents()
    a, b, exponent = holder.pair(source, torch.device("cpu"), torch.float32)
    assert type(exponent) is int
    assert exponent > 0
    assert torch.equal(a, torch.from_numpy(unit_rows(0, 0, 4, 5000)) * 2.0**-exponent)
    assert torch.equal(a * 2.0**exponent, torch.from_numpy(unit_rows(0, 0, 4, 5000)))
    assert torch.equal(b, torch.from_numpy(unit_rows(0, 1, 4, 9)))


def test_an_adapter_that_needs_more_leaves_the_others_bits_alone() -> None:
    """The exponent grows with the largest input; in float32 a power of two moves no bit."""
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3), nn.Identity())
    base.wide = nn.Linear(40_000, 2)
    base.forward = lambda x: base[1](base[0](x))
    model = get_peft_model(base, VeraConfig(r=3, target_modules=["0", "1"]))
    randomize(model)
    y = model(X)
    model.add_adapter("wide", VeraConfig(r=5, target_modules=["wide"]))
    assert torch.equal(model(X), y)


def test_planted_vera_without_its_exponent(monkeypatch: Patch) -> None:
    """A delta that forgets 2^exponent is found by the dense reference."""
    real = Vera.delta

    def forgetting(self: Vera, site: Any, params: Any, shared: Any) -> Any:
        delta = real(self, site, params, shared)
        return type(delta)(delta.a, delta.b, delta.mid, delta.out, shared.source(site).gain(256, site.inn))

    monkeypatch.setattr(Vera, "delta", forgetting)
    with pytest.raises(AssertionError):
        test_the_exponent_changes_no_result(torch.float32, 1e-5)
