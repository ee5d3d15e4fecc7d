"""Packed rows against their definition, written again in plain Python; fingerprints of base models."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kilotune import CheckpointError, LoraConfig, MergeError, UnsupportedError, get_peft_model
from kilotune.fleet import Fingerprint
from kilotune.fleet.store.packing import Layout
from tests.support.models import mlp
from tests.support.store_support import adapted, bits, same

WIDTHS = {torch.float64: 8, torch.int64: 8, torch.float32: 4, torch.int32: 4, torch.float16: 2, torch.bfloat16: 2}
WIDTHS |= {torch.int16: 2, torch.int8: 1, torch.uint8: 1, torch.bool: 1}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


@st.composite
def tensors(draw_: st.DrawFn) -> dict[str, Tensor]:
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    count = draw_(st.integers(1, 6))
    return {
        f"key{i}": draw(draw_(shapes), draw_(st.sampled_from(list(WIDTHS))), draw_(st.integers(0, 99)))
        for i in range(count)
    }


@given(tensors())
def test_float32_keeps_every_bit_of_every_type(given_: dict[str, Tensor]) -> None:
    layout = Layout.of(given_, "float32")
    row = layout.pack(given_)
    assert len(row) == layout.size == sum(WIDTHS[value.dtype] * value.numel() for value in given_.values())
    assert same(dict(sorted(layout.unpack(row).items())), dict(sorted(given_.items())))
    assert Layout.from_json(layout.to_json()) == layout


@given(tensors(), st.sampled_from(["bfloat16", "int8"]))
def test_rounded_rows_keep_types_and_shapes(given_: dict[str, Tensor], packing: str) -> None:
    layout = Layout.of(given_, packing)
    row = layout.pack(given_)
    found = layout.unpack(row)
    scales = 0
    for key, value in given_.items():
        assert found[key].dtype == value.dtype
        assert found[key].shape == value.shape
        wanted = as_defined(value, packing)
        assert torch.equal(found[key], wanted), key
        scales += (len(vectors_of(value)) if packing == "int8" and value.dtype in FLOATS else 0) * 4
    width = {"bfloat16": 2, "int8": 1}[packing]
    sizes = [min(WIDTHS[v.dtype], width if v.dtype in FLOATS else 8) * v.numel() for v in given_.values()]
    assert len(row) == sum(sizes) + scales
    flat = layout.vector(row)
    assert flat.dtype == torch.float32
    for key, (begin, end) in layout.places.items():
        assert torch.equal(flat[begin:end], found[key].reshape(-1).float())


def vectors_of(value: Tensor) -> list[list[float]]:
    """The vectors that have a scale each: the tensor itself, or along the longer side of (first, all the others)."""
    if value.numel() == 0:
        return []
    if value.ndim < 2:
        return [value.reshape(-1).tolist()]
    matrix = value.reshape(value.shape[0], -1)
    return (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).tolist()


def as_defined(value: Tensor, packing: str) -> Tensor:
    """What a rounded tensor comes back as, by the definition."""
    if value.dtype not in FLOATS or (packing == "bfloat16" and value.element_size() == 2):
        return value
    if packing == "bfloat16":
        return value.to(torch.bfloat16).to(value.dtype)
    found = []
    for vector in vectors_of(value.float()):
        scale = single(max(map(abs, vector)) / single(127.0))
        found.append([single(max(-127, min(127, round(single(x / scale)))) * scale) if scale else 0.0 for x in vector])
    result = torch.tensor(found, dtype=torch.float32)
    if value.ndim >= 2 and value.numel():
        rows = value.shape[0]
        result = result.T if rows > value.numel() // rows else result
    return result.reshape(value.shape).to(value.dtype)


def single(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def test_the_errors_are_what_the_page_says() -> None:
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 1000)
    for packing in ("bfloat16", "int8"):
        layout = Layout.of({"v": value}, packing)
        error = (layout.unpack(layout.pack({"v": value}))["v"] - value).abs()
        limit = value.abs() * 2.0**-8 if packing == "bfloat16" else value.abs().max() / 127 / 2
        assert bool((error <= limit * (1 + 1e-6)).all())
        assert float(error.max()) > 0


def test_each_vector_has_a_scale_of_its_own() -> None:
    """One large column does not take the others' digits."""
    matrix = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    matrix[:, 0] *= 1e4
    layout = Layout.of({"b": matrix, "d": matrix[:, 1].clone() * 1e-4}, "int8")
    found = layout.unpack(layout.pack({"b": matrix, "d": matrix[:, 1].clone() * 1e-4}))
    for got, wanted in ((found["b"][:, 1], matrix[:, 1]), (found["d"], matrix[:, 1] * 1e-4)):
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 0.5 / 127 * 1.001
    assert layout.size == 64 * 2 + 64 + 3 * 4


def test_modules_saved_whole_are_rounded_to_bfloat16_at_most() -> None:
    given_ = {"a.lora_A.weight": torch.randn(2, 6), "head.weight": torch.randn(3, 5), "head.count": torch.tensor(7)}
    layout = Layout.of(given_, "int8", frozenset({"head.weight", "head.count"}))
    packed = {entry.key: entry.packed for entry in layout.entries}
    assert packed == {"a.lora_A.weight": "int8", "head.weight": "bfloat16", "head.count": "exact"}
    assert int(layout.unpack(layout.pack(given_))["head.count"]) == 7


def test_a_model_names_what_is_saved_whole() -> None:
    """Through a store's own preparation: a LoRA's factors get int8, its biases and its head do not."""
    from kilotune.fleet.store.preparing import Preparer

    config = LoraConfig(r=2, target_modules=["0"], bias="all", modules_to_save=["2"])
    ready = Preparer(None, "int8")("ann", adapted(1, config), None, ())
    packed = {entry.key.removeprefix("base_model.model."): entry.packed for entry in ready.form.layout.entries}
    assert {key: how for key, how in packed.items() if "lora" in key} == {
        "0.lora_A.weight": "int8",
        "0.lora_B.weight": "int8",
    }
    assert {how for key, how in packed.items() if "lora" not in key} == {"bfloat16"}


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite(bad: float) -> None:
    value = {"v": torch.tensor([1.0, bad, 2.0])}
    with pytest.raises(CheckpointError, match="packing 'int8': not all numbers are finite"):
        Layout.of(value, "int8").pack(value)
    exact, rounded = (Layout.of(value, packing) for packing in ("float32", "bfloat16"))
    assert bits(exact.unpack(exact.pack(value))["v"]) == bits(value["v"])
    assert torch.allclose(rounded.unpack(rounded.pack(value))["v"], value["v"], rtol=0, atol=0, equal_nan=True)


def test_rounding_makes_nothing_infinite() -> None:
    value = {"v": torch.tensor([1.0, 3.4e38])}
    with pytest.raises(CheckpointError, match="would become infinite; use 'float32'"):
        Layout.of(value, "bfloat16").pack(value)


def test_a_row_of_another_length_is_refused() -> None:
    layout = Layout.of({"v": torch.zeros(3)}, "float32")
    for row in (b"", b"\0" * 11, b"\0" * 13):
        with pytest.raises(CheckpointError, match="expected 12 bytes"):
            layout.unpack(row)
        with pytest.raises(CheckpointError, match="expected 12 bytes"):
            layout.vector(row)


def test_tensors_of_a_model_are_packed_wherever_they_lie_in_memory() -> None:
    whole = torch.randn(6, 10)
    given_ = {"a": whole[:, ::2], "b": whole.T, "c": whole[0, 3:7], "d": nn.Parameter(torch.randn(3))}
    layout = Layout.of(given_, "float32")
    for key, value in layout.unpack(layout.pack(given_)).items():
        assert torch.equal(value, given_[key]), key


# -- fingerprints ---------------------------------------------------------------------------------------


def entries(model: nn.Module) -> Mapping[str, str]:
    return Fingerprint.of(model).parameters


def test_a_fingerprint_is_of_the_base_whatever_is_in_it() -> None:
    plain = Fingerprint.of(mlp())
    assert set(plain.parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for config in (None, LoraConfig(r=2, target_modules=["0"], bias="all", modules_to_save=["2"])):
        model = adapted(1, config)
        assert Fingerprint.of(model) == plain
        with model.disable_adapter():
            assert Fingerprint.of(model) == plain
    model = adapted(1)
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        Fingerprint.of(model)
    model.unmerge_adapter()
    assert Fingerprint.of(model) == plain
    assert Fingerprint.from_json(plain.to_json()) == plain
    assert Fingerprint.from_json(plain.to_json()).sha256 == plain.sha256


def test_the_same_weights_in_bfloat16_are_the_same_base() -> None:
    model = mlp()
    assert Fingerprint.of(mlp().bfloat16()) == Fingerprint.of(model)
    assert Fingerprint.of(mlp().bfloat16().float()) == Fingerprint.of(model)


@pytest.mark.parametrize("size", [0.02, 1.0])
def test_a_base_that_was_trained_further_is_another(size: float) -> None:
    other = mlp()
    with torch.no_grad():
        other[2].weight.mul_(1 + size)
    with pytest.raises(CheckpointError) as caught:
        Fingerprint.of(mlp()).check(Fingerprint.of(other), "it")
    assert str(caught.value) == "it is of another base model:\n  - 2.weight: other values"


def test_other_shapes_and_names_are_told() -> None:
    right = Fingerprint.of(mlp())
    wide, long = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), nn.Sequential(*mlp(), nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match="2.weight: expected the shape 3x5, this base has 4x5"):
        right.check(Fingerprint.of(wide), "it")
    with pytest.raises(CheckpointError, match="3.weight: only in this base"):
        right.check(Fingerprint.of(long), "it")
    with pytest.raises(CheckpointError, match="2.weight: not in this base"):
        right.check(Fingerprint.of(mlp()[:2]), "it")


def test_a_head_that_the_adapter_brings_does_not_matter() -> None:
    """A new head is drawn anew each time; the adapter has its own."""
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    first, second = mlp(), mlp()
    with torch.no_grad():
        second[2].weight.add_(1)
    from kilotune.fleet.store.preparing import Preparer

    form = Preparer(None, "float32")("ann", get_peft_model(first, config), None, ()).form
    assert form.base is not None
    assert set(form.base.parameters) == {"0.weight", "0.bias"}
    form.base.check(Fingerprint.of(second), "it", form.saved_whole)
    with torch.no_grad():
        second[0].weight.add_(1)
    with pytest.raises(CheckpointError, match="0.weight: other values"):
        form.base.check(Fingerprint.of(second), "it", form.saved_whole)


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(0, 299))
def test_large_weights_are_looked_at_in_many_places(seed: int, block: int) -> None:
    """A change of one row in 300 is seen where the row has as many numbers as there are between two that are read."""
    one = nn.Linear(300, 300)
    before = entries(one)["weight"]
    with torch.no_grad():
        one.weight[block] += 1
        one.weight[(block + 1) % 300] += 1
    assert entries(one)["weight"] != before


def test_quantised_weights_have_a_fingerprint() -> None:
    torchao = pytest.importorskip("torchao.quantization")

    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64))
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model

    assert Fingerprint.of(made(0)) == Fingerprint.of(made(0))
    assert Fingerprint.of(made(0)) != Fingerprint.of(made(1))


def test_weights_that_are_not_there_have_none() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match="'weight' has no values yet"):
        Fingerprint.of(model)
