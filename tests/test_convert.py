"""``kilotune.convert``: the same outputs in another form, here and in PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kilotune import (
    AdapterError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    UnsupportedError,
    VeraConfig,
    get_peft_model,
)
from kilotune.adapter_files.files import WEIGHTS_NAME
from kilotune.convert import hollow, to_kilotune, to_lora, to_peft, truncate
from tests.support.cli_helpers import distance, gpt2, llama, logits, shake, tokens

pytestmark = [
    # PEFT reads an attribute that transformers has renamed since.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT warns of its own seed-only form, which is what is tested.
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning"),
]
EXACT = 2e-5  # float32 rounding of two factors, through a whole model


class MLP(nn.Module):
    """Layers of three shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(10, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


LAYERS = ["fc1", "fc2", "fc3"]
X = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
VARIANTS = {
    "nested": VeraConfig(r=8, target_modules=LAYERS, projection_prng_key=11),
    "shape": VeraConfig(r=8, target_modules=LAYERS, sharing="shape", projection_prng_key=11),
    "peft": VeraConfig(r=8, target_modules=LAYERS, generator="peft", projection_prng_key=11),
    "biased": VeraConfig(r=8, target_modules=["fc1", "fc3"], bias="vera_only"),
    "all biases": VeraConfig(r=8, target_modules=["fc1"], bias="all"),
    "whole module": VeraConfig(r=8, target_modules=["fc1"], modules_to_save=["fc3"]),
    "all-linear": VeraConfig(r=8, target_modules="all-linear"),
    "regex": VeraConfig(r=30, target_modules="fc[12]"),  # a rank above every width
}


def adapted(name: str) -> PeftModel:
    return shake(get_peft_model(MLP(), VARIANTS[name]))


def in_peft(folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(MLP(), str(folder)).eval()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- to LoRA -------------------------------------------------------------------------------------------


def test_vera_is_exactly_a_lora_of_the_same_rank(tmp_path: Path, variant: str) -> None:
    model = adapted(variant)
    want = model(X)
    plain = MLP()(X)
    assert distance(want, plain) > 0.05
    result = to_lora(model)
    result.save(tmp_path)
    assert torch.equal(model(X), want), "converting must not change the model"
    assert list(model.peft_config) == ["default"]
    assert dict(result.errors) == {}
    assert result.worst is None
    rank = VARIANTS[variant].r  # type: ignore[attr-defined]
    back = PeftModel.from_pretrained(MLP(), tmp_path)
    config = back.peft_config["default"]
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha) == (rank, rank)
    assert distance(want, back.eval()(X)) < EXACT
    assert distance(want, in_peft(tmp_path)(X)) < EXACT


def test_the_factors_are_those_of_the_paper(tmp_path: Path) -> None:
    """lora_B lora_A against diag(b) B diag(d) A, written out from the definition of the matrices."""
    from kilotune.projections.matrices import unit_rows

    model = adapted("nested")
    to_lora(model).save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    trained = dict(model.adapter_parameters("default"))
    for layer, out, inn in (("fc1", 24, 10), ("fc2", 24, 24), ("fc3", 3, 24)):
        a = (6 / inn) ** 0.5 * torch.from_numpy(unit_rows(11, 0, 8, inn)).double()
        b = (6 / 8) ** 0.5 * torch.from_numpy(unit_rows(11, 1, 8, out)).double().T
        d, scale = trained[f"{layer}.vera_lambda_d"].double(), trained[f"{layer}.vera_lambda_b"].double()
        want = torch.diag(scale) @ b @ torch.diag(d) @ a
        key = f"base_model.model.{layer}"
        got = tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
        assert distance(want, got) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_smaller_rank_is_the_best_one(tmp_path: Path, rank: int) -> None:
    """The error is that of the dense matrix's SVD, which nothing of this rank can beat."""
    model = adapted("shape")
    result = to_lora(model, rank=rank)
    result.save(tmp_path)
    small = PeftModel.from_pretrained(MLP(), tmp_path)
    assert set(result.errors) == set(LAYERS)
    for name, layer in model.adapted_layers().items():
        want = _change(layer).double()
        values = torch.linalg.svdvals(want)
        best = float(values[rank:].norm() / values.norm())
        got = _change(small.adapted_layers()[name]).double()
        measured = float((want - got).norm() / want.norm())
        assert result.errors[name] == pytest.approx(best, rel=1e-5, abs=1e-6)
        assert measured == pytest.approx(best, rel=1e-4, abs=1e-6)
    worst = result.worst
    assert worst is not None
    assert worst[1] == max(result.errors.values()) > (0.5 if rank == 1 else 0)
    with torch.no_grad():
        assert distance(small.eval()(X), in_peft(tmp_path)(X)) < EXACT


def _change(layer: Any) -> Tensor:
    weight = layer.base_matrix()
    change = layer.slot("default").delta().weight_change(weight)
    assert isinstance(change, Tensor)
    return change.detach()


def test_a_lora_can_be_made_smaller_too(tmp_path: Path) -> None:
    config = LoraConfig(r=6, lora_alpha=9, use_rslora=True, target_modules=LAYERS, rank_pattern={"fc3": 3})
    model = shake(get_peft_model(MLP(), config))
    result = to_lora(model, rank=5)
    result.save(tmp_path)
    small = PeftModel.from_pretrained(MLP(), tmp_path).eval()
    assert result.errors["fc3"] < 1e-7  # rank 3 fits into 5
    assert 0 < result.errors["fc1"] < 0.5
    for name, layer in model.adapted_layers().items():
        want, got = _change(layer), _change(small.adapted_layers()[name])
        assert float((want - got).norm() / want.norm()) == pytest.approx(result.errors[name], abs=1e-6)


def test_truncate_on_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    b = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    same_a, same_b, error = truncate(a, b, 9)  # above the product's own rank: padded, exact
    assert same_a.shape == (9, 40)
    assert same_b.shape == (30, 9)
    assert error == 0
    assert torch.allclose(same_b @ same_a, b @ a, atol=1e-12)
    low_a, low_b, error = truncate(a, b, 2)
    values = torch.linalg.svdvals(b @ a)
    assert error == pytest.approx(float(values[2:].norm() / values.norm()))
    assert float((low_b @ low_a - b @ a).norm() / (b @ a).norm()) == pytest.approx(error)
    nothing = truncate(a, torch.zeros_like(b), 2)
    assert nothing[2] == 0.0
    assert not nothing[1].any()


def test_shapes_of_a_7b_model_take_no_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    svd = torch.linalg.svd

    def watched(matrix: Tensor, **options: Any) -> Any:
        seen.append(max(matrix.shape))
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    base = hollow(nn.Sequential(nn.Linear(4096, 11008, device="meta")))
    model = shake(get_peft_model(base, VeraConfig(r=64, target_modules=["0"])))
    result = to_lora(model, rank=16)
    assert seen == [64]
    assert 0 < result.errors["0"] < 1


def test_on_16_bit_bases_the_factors_are_of_float32() -> None:
    """The conversion is of the adapter, not of what a bfloat16 base makes of it."""
    want = to_lora(adapted("nested")).state[1]
    got = to_lora(shake(get_peft_model(MLP().bfloat16(), VARIANTS["nested"]))).state[1]
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_on_transformers_models(tmp_path: Path, make: Any) -> None:
    """Linear and Conv1D, with the task's own head rules, into PEFT."""
    model = shake(get_peft_model(make(), VeraConfig(r=12, task_type="CAUSAL_LM")))
    want = logits(model)
    to_lora(model).save(tmp_path / "lora")
    to_peft(model).save(tmp_path / "peft")
    for folder in ("lora", "peft"):
        assert distance(want, logits(PeftModel.from_pretrained(make(), tmp_path / folder))) < EXACT
        assert distance(want, logits(peft.PeftModel.from_pretrained(make(), str(tmp_path / folder)).eval())) < EXACT


def test_what_cannot_be_a_lora_is_refused() -> None:
    model = shake(get_peft_model(MLP(), LoraConfig(r=4, target_modules=LAYERS)))
    with pytest.raises(UnsupportedError, match="is a LoRA adapter already"):
        to_lora(model)
    with pytest.raises(ConfigError, match="rank 4 is not below the adapter's own 4$"):
        to_lora(model, rank=4)
    vera = adapted("nested")
    with pytest.raises(ConfigError, match="rank 8 is not below the adapter's own 8; leave it out"):
        to_lora(vera, rank=8)
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="expected a whole number >= 1"):
            to_lora(vera, rank=wrong)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="there is no adapter 'other'"):
        to_lora(vera, "other")


def test_a_name_that_ends_like_another_is_not_adapted_by_mistake(tmp_path: Path) -> None:
    """With 'all-linear' and exclusions the LoRA names whole layers, and no other layer may end so."""

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 4)
            self.block = nn.ModuleDict({"fc": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return self.block["fc"](self.fc(x))

    config = VeraConfig(r=3, target_modules="all-linear", exclude_modules=["block.fc"])
    model = shake(get_peft_model(Twin(), config))
    to_lora(model).save(tmp_path)
    back = PeftModel.from_pretrained(Twin(), tmp_path).eval()
    assert list(back.adapted_layers()) == ["fc"]
    x = torch.ones(2, 4)
    assert distance(model(x), back(x)) < EXACT
    assert distance(model(x), peft.PeftModel.from_pretrained(Twin(), str(tmp_path)).eval()(x)) < EXACT


# -- PEFT's form and ours ------------------------------------------------------------------------------


# PEFT takes 'all-linear' for transformers models only.
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "all-linear"])
def test_peft_loads_what_is_converted_for_it(tmp_path: Path, variant: str) -> None:
    model = adapted(variant)
    want = model(X)
    result = to_peft(model)
    result.save(tmp_path)
    assert torch.equal(model(X), want)
    assert distance(want, in_peft(tmp_path)(X)) < EXACT
    assert distance(want, PeftModel.from_pretrained(MLP(), tmp_path).eval()(X)) < EXACT
    assert ("3 pairs" in result.what) == (variant == "shape")


def test_there_and_back_again_gives_the_small_file(tmp_path: Path, variant: str) -> None:
    """Ours -> PEFT's -> ours: the matrices are recognised as those of the seed, and leave the file."""
    model = adapted(variant)
    want = model(X)
    small = tmp_path / "small"
    model.save_pretrained(small)
    to_peft(model).save(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(MLP(), tmp_path / "peft").eval()
    assert loaded.peft_config["default"].generator == "stored"  # type: ignore[attr-defined]
    result = to_kilotune(loaded)
    result.save(tmp_path / "again")
    again = PeftModel.from_pretrained(MLP(), tmp_path / "again").eval()
    config, first = again.peft_config["default"], VARIANTS[variant]
    assert (config.generator, config.r) == (first.generator, first.r)  # type: ignore[attr-defined]
    assert distance(want, again(X)) < 1e-6
    sizes = [(tmp_path / name / WEIGHTS_NAME).stat().st_size for name in ("small", "peft", "again")]
    assert abs(sizes[0] - sizes[2]) <= 8
    assert sizes[1] > sizes[0]


def test_a_file_of_peft_becomes_small_where_its_seed_gives_the_matrices_back(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=8, target_modules=LAYERS, projection_prng_key=5)
    theirs = peft.get_peft_model(MLP(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "vera_lambda" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    want = theirs(X)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(MLP(), tmp_path / "theirs")
    result = to_kilotune(ours)
    assert "PEFT's matrices from the seed" in result.what
    result.save(tmp_path / "small")
    names = set(load_file(tmp_path / "small" / WEIGHTS_NAME))
    assert not any("vera_A" in name for name in names)
    assert distance(want, PeftModel.from_pretrained(MLP(), tmp_path / "small").eval()(X)) < 1e-6


def test_the_small_file_of_pefts_seed_loads_in_peft(tmp_path: Path) -> None:
    model = adapted("peft")
    to_kilotune(model).save(tmp_path)
    assert distance(model(X), in_peft(tmp_path)(X)) < EXACT


def test_matrices_of_no_seed_stay_in_the_file(tmp_path: Path) -> None:
    model = adapted("nested")
    to_peft(model).save(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(MLP(), tmp_path / "peft").eval()
    stored = loaded.installed("default").method.stored
    stored.pair.a[2, 3] += 1e-3  # one number of one matrix
    result = to_kilotune(loaded)
    assert "they stay in the file" in result.what
    result.save(tmp_path / "again")
    tensors = load_file(tmp_path / "again" / WEIGHTS_NAME)
    assert torch.equal(tensors["base_model.vera_A"], stored.pair.a)


def test_a_stacked_file_whose_blocks_mix_is_not_split(tmp_path: Path) -> None:
    """Trained further in PEFT, d is no longer zero outside its block; the pairs must then stay together."""
    to_peft(adapted("shape")).save(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(MLP(), tmp_path / "peft").eval()
    with torch.no_grad():
        next(p for n, p in loaded.adapter_parameters() if n == "fc1.vera_lambda_d").add_(0.1)
    want = loaded(X)
    result = to_kilotune(loaded)
    assert "they stay in the file" in result.what
    result.save(tmp_path / "again")
    assert distance(want, PeftModel.from_pretrained(MLP(), tmp_path / "again").eval()(X)) < 1e-6


def test_lora_is_the_same_in_both(tmp_path: Path) -> None:
    model = shake(get_peft_model(MLP(), LoraConfig(r=4, target_modules=LAYERS)))
    for name, result in (("a", to_peft(model)), ("b", to_kilotune(model))):
        result.save(tmp_path / name)
        assert distance(model(X), in_peft(tmp_path / name)(X)) < EXACT


# -- the hollow base -----------------------------------------------------------------------------------


def test_converting_on_a_hollow_base_gives_the_same_files(tmp_path: Path, variant: str) -> None:
    model = adapted(variant)
    model.save_pretrained(tmp_path / "adapter")
    with torch.device("meta"):
        base = MLP()
    there = PeftModel.from_pretrained(hollow(base), tmp_path / "adapter")
    for convert in (to_lora, to_peft, to_kilotune):
        want, got = convert(model).state, convert(there).state
        assert {**want[0], "inference_mode": True} == {**got[0], "inference_mode": True}
        assert want[1].keys() == got[1].keys()
        assert all(torch.equal(want[1][key], got[1][key]) for key in want[1])
        assert want[2] == got[2]


def test_hollow_weights_take_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10_000, 10_000), nn.BatchNorm1d(10_000))
    held = hollow(model)
    assert held is model
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.device.type == "cpu" for t in tensors)
    assert sum(t.untyped_storage().nbytes() for t in tensors) < 100
    assert model[0].weight.shape == (10_000, 10_000)


def test_a_failed_conversion_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from kilotune.adapter_files import writing

    model = adapted("nested")
    want = copy.deepcopy(model.state_dict())

    def broken(*args: Any) -> None:
        raise UnsupportedError("planted")

    monkeypatch.setattr(writing, "state_of", broken)
    for convert in (to_lora, to_kilotune):
        with pytest.raises(UnsupportedError, match="planted"):
            convert(model)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert all(torch.equal(want[key], value) for key, value in model.state_dict().items())
    assert tokens().shape == (3, 7)


@pytest.mark.parametrize("rank", [None, 1])
def test_values_that_are_not_finite_are_not_converted(rank: int | None) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), VeraConfig(r=3, target_modules=["0"]))
    with torch.no_grad():
        next(iter(dict(model.adapter_parameters()).values()))[0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        to_lora(model, rank=rank)
