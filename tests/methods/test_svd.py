"""Factors of a weight's SVD: the mathematics, their one home in a model, and how they are known again."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kilotune import CheckpointError, ConfigError, LoraXsConfig, PeftModel, get_peft_model
from kilotune.fleet.bank.adapter_bank import AdapterBank
from kilotune.methods import _svd
from kilotune.methods._svd import TIE, TOLERANCE, Fingerprint, Split, WeightSource, top_svd
from kilotune.projections.matrices import Pair
from tests.support.models import mlp, randomize

X = torch.linspace(-1, 1, 24).view(4, 6)
BARE = {"target_modules": "all-linear", "save_factors": False}


def with_values(values: list[float], out: int, inn: int, seed: int = 0) -> Tensor:
    """A matrix (out, in) with these singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, len(values))))[0] for n in (out, inn))
    return torch.from_numpy((u * np.array(values)) @ v.T)


# -- mathematics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 10])
@pytest.mark.parametrize(("out", "inn"), [(60, 90), (90, 60), (7, 9), (5, 5)])
def test_the_vectors_are_numpys_up_to_sign(out: int, inn: int, iterations: int) -> None:
    weight = with_values([0.6**i for i in range(min(out, inn))], out, inn)
    found = top_svd(weight, 3, iterations, 0)
    u, s, vh = np.linalg.svd(weight.numpy())
    signs = np.sign((found.vh.numpy() * vh[:3]).sum(1))
    np.testing.assert_allclose(found.vh, signs[:, None] * vh[:3], atol=1e-12)
    np.testing.assert_allclose(found.u, u[:, :3] * signs, atol=1e-12)
    np.testing.assert_allclose(found.s, s[:3], rtol=1e-12)
    assert found.following == pytest.approx(s[3])
    assert (np.take_along_axis(found.vh.numpy(), np.abs(found.vh.numpy()).argmax(1)[:, None], 1) > 0).all()


@pytest.mark.parametrize("iterations", [0, 10])
@pytest.mark.parametrize("split", list(Split))
def test_signs_of_the_library_beneath_do_not_matter(
    split: Split, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = with_values([0.9**i for i in range(60)], 60, 80)
    plain = WeightSource(4, iterations, 0, split).made(weight).pair
    svd = torch.linalg.svd

    def flipped(matrix: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = svd(matrix, **options)
        signs = torch.tensor([-1.0, 1.0], dtype=s.dtype).repeat(len(s))[: len(s)]
        return u * signs, s, vh * signs.unsqueeze(-1)

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    again = WeightSource(4, iterations, 0, split).made(weight).pair
    assert plain is not None
    assert again is not None
    assert torch.equal(plain.a, again.a)
    assert torch.equal(plain.b, again.b)


def test_of_two_equal_entries_the_first_decides_the_sign() -> None:
    """A vector (1, -1) / sqrt(2), whose largest entry the rounding would choose."""
    v = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0]], dtype=torch.float64) / 2**0.5
    weight = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)) @ v
    for noise in (1e-15, -1e-15):
        found = top_svd(weight * (1 + noise * torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)), 1, 0, 0)
        assert found.vh[0, 0] > 0.7


@pytest.mark.parametrize("iterations", [0, 10])
def test_other_numbers_of_threads_make_the_same_fingerprint(iterations: int) -> None:
    weight = with_values([0.97**i for i in range(80)], 120, 80)
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            pair = WeightSource(6, iterations, 0, Split.EVEN).made(weight).pair
            assert pair is not None
            made.append(Fingerprint.of([pair]))
    finally:
        torch.set_num_threads(threads)
    assert made[0].distance(made[1]) < 1e-6 < TOLERANCE / 1000


@pytest.mark.parametrize(
    ("values", "rank", "expected"),
    [
        ([4.0, 3.0, 2.0, 1.0], 3, ()),
        ([4.0, 3.0, 3.0 * (1 + TIE / 8), 1.0], 3, (2,)),  # inside
        ([4.0, 3.0, 2.0, 2.0], 3, (3,)),  # at the cut
        ([4.0, 3.0, 2.0, 2.0], 2, ()),  # beyond it
        ([4.0, 3.0, 0.0, 0.0], 3, (3,)),  # of a weight of lower rank
        ([4.0, 3.0, 2.0, 1.0], 4, ()),
    ],
)
def test_ties_are_told(values: list[float], rank: int, expected: tuple[int, ...]) -> None:
    assert top_svd(with_values(values, 4, 9), rank, 0, 0).ties() == expected


# -- the one home --------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by one with each SVD of a layer."""
    calls: list[Any] = []
    real = _svd.top_svd

    def counting(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(_svd, "top_svd", counting)
    return calls


def test_twenty_adapters_share_one_copy_and_one_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model = get_peft_model(mlp(), LoraXsConfig(r=3, target_modules="all-linear"))
    one = model.report()
    assert len(calls) == 2
    for i in range(19):
        model.add_adapter(f"other{i}", LoraXsConfig(r=3, target_modules="all-linear"))
    many = model.report()
    assert len(calls) == 2
    assert many.frozen_shared == one.frozen_shared == 3 * (6 + 5 + 5 + 3)
    assert many.trainable + many.frozen_adapters == 20 * 2 * 9
    for i in range(19):
        model.delete_adapter(f"other{i}")
    assert model.report().frozen_shared == one.frozen_shared
    model.delete_adapter("default")
    assert model.report().frozen_shared == 0


def test_another_rank_is_another_entry() -> None:
    model = get_peft_model(mlp(), LoraXsConfig(r=3, target_modules=["0"]))
    model.add_adapter("two", LoraXsConfig(r=2, target_modules=["0"]))
    assert model.report().frozen_shared == (3 + 2) * (6 + 5)


@pytest.mark.parametrize("by", ["data", "no_grad", "another tensor"])
def test_factors_of_a_weight_that_was_changed_are_new_ones(by: str) -> None:
    model = get_peft_model(mlp(), LoraXsConfig(r=3, target_modules=["0"]))
    weight = model.adapted_layers()["0"].base_layer.weight
    assert isinstance(weight, nn.Parameter)
    if by == "data":  # hidden from PyTorch's version counters
        weight.data.mul_(2.0)
    elif by == "no_grad":
        with torch.no_grad():
            weight.mul_(2.0)
    else:
        model.adapted_layers()["0"].base_layer.weight = nn.Parameter(weight.detach() * 2.0)
    model.add_adapter("new", LoraXsConfig(r=3, target_modules=["0"]))
    old, new = (_factors(model, name)["0"] for name in ("default", "new"))
    torch.testing.assert_close(new.b, 2.0 * old.b)
    torch.testing.assert_close(new.a, old.a)


def _factors(model: PeftModel, adapter: str = "default") -> dict[str, Pair]:
    shared: Any = model.installed(adapter).shared
    return {name: _svd.pair_of(source) for name, source in shared.sources.items()}


def test_merged_adapters_leave_the_factors_those_of_the_base() -> None:
    model = get_peft_model(mlp(), LoraXsConfig(r=3, target_modules="all-linear"))
    randomize(model)
    model.merge_adapter()
    model.add_adapter("new", LoraXsConfig(r=3, target_modules="all-linear"))
    for old, new in zip(_factors(model).values(), _factors(model, "new").values(), strict=True):
        assert old.a is new.a


def test_copies_and_pickles_keep_them_and_share_what_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(mlp(), LoraXsConfig(r=3, **BARE))
    randomize(model)
    expected = model(X)
    twin = copy.deepcopy(model)
    assert all(a.a is b.a for a, b in zip(_factors(model).values(), _factors(twin).values(), strict=True))
    twin.delete_adapter("default")
    assert torch.equal(model(X), expected)
    calls = counted(monkeypatch)
    twin = copy.deepcopy(model)
    twin.add_adapter("more", LoraXsConfig(r=3, **BARE))  # of equal weights, in other tensors
    assert not calls
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(X), expected)
    again.add_adapter("more", LoraXsConfig(r=3, **BARE))
    assert not calls


def test_they_follow_the_model_and_come_back_to_the_bit() -> None:
    model = get_peft_model(mlp(), LoraXsConfig(r=3, target_modules="all-linear"))
    randomize(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(X)
    model.bfloat16()
    assert model(X.bfloat16()).dtype == torch.bfloat16
    model.float().load_state_dict(before)
    assert torch.equal(model(X), expected)


# -- meta ----------------------------------------------------------------------------------------------


def test_a_base_without_weights_says_so_when_it_runs() -> None:
    with torch.device("meta"):
        base = mlp()
    model = get_peft_model(base, LoraXsConfig(r=3, target_modules="all-linear"))
    assert model(X.to("meta")).shape == (4, 3)
    model.to_empty(device="cpu")
    with pytest.raises(ConfigError, match="'0' was on the meta device when the adapter was added.*load the base's"):
        model(X)


def test_a_file_with_factors_brings_them_to_a_base_without_weights(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), LoraXsConfig(r=3, target_modules="all-linear"))
    randomize(model)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        base = mlp()
    empty = PeftModel.from_pretrained(base, tmp_path)
    assert all(torch.equal(a.b, b.b) for a, b in zip(_factors(model).values(), _factors(empty).values(), strict=True))


# -- known again ---------------------------------------------------------------------------------------


def planted(count: int, rank: int = 4) -> list[Pair]:
    """Factors of so many sites."""
    made = []
    for i in range(count):
        pair = WeightSource(rank, 0, 0, Split.EVEN).made(with_values([0.8**k for k in range(12)], 20, 12, i)).pair
        assert pair is not None
        made.append(pair)
    return made


def test_a_fingerprint_is_written_in_48_characters_and_read_back() -> None:
    found = Fingerprint.of(planted(3))
    assert len(found.write()) == 48
    again = Fingerprint.read(found.write())
    assert again is not None
    assert found.distance(again) < 1e-6
    assert Fingerprint.read("ab" * 32) is None
    with pytest.raises(CheckpointError, match="expected 8 numbers"):
        Fingerprint.read("svd1:abcd")


def test_it_measures_by_how_much_the_vectors_have_moved() -> None:
    pairs, generator = planted(20), torch.Generator().manual_seed(0)

    def moved(t: Tensor, by: float) -> Tensor:
        noise = torch.randn(t.shape, generator=generator)
        return t + by * t.norm(dim=1, keepdim=True) * noise / noise.norm(dim=1, keepdim=True)

    for by in (1e-4, 1e-3, 1e-2):
        other = [Pair(moved(pair.a, by), moved(pair.b, by)) for pair in pairs]
        assert by / 2.5 < Fingerprint.of(pairs).distance(Fingerprint.of(other)) < 2.5 * by


@pytest.mark.parametrize("fault", ["one sign", "one layer", "two layers swapped", "a vector turned", "twice as large"])
def test_it_tells_one_wrong_vector_of_many(fault: str) -> None:
    pairs = planted(100)
    right, wrong = Fingerprint.of(pairs), list(pairs)
    sign = torch.tensor([1.0, 1.0, -1.0, 1.0]).unsqueeze(-1)
    turn = torch.eye(4)
    turn[1:3, 1:3] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    if fault == "one sign":
        wrong[70] = Pair(pairs[70].a * sign, pairs[70].b * sign)
    elif fault == "one layer":
        wrong[70] = planted(102)[101]
    elif fault == "two layers swapped":
        wrong[70], wrong[3] = wrong[3], wrong[70]
    elif fault == "a vector turned":
        wrong[70] = Pair(turn @ pairs[70].a, turn @ pairs[70].b)
    else:
        wrong[70] = Pair(pairs[70].a, 2.0 * pairs[70].b)
    assert right.distance(Fingerprint.of(wrong)) > 5 * TOLERANCE


def test_one_sign_among_a_hundred_thousand_vectors_is_told() -> None:
    """As in a model of billions, by the sums alone: they move by 2 sqrt(2) / sqrt(vectors)."""
    pairs = planted(30)
    right = np.array(Fingerprint.of(pairs).sums) * np.sqrt(30 * 8)
    pairs[7] = Pair(pairs[7].a * torch.tensor([-1.0, 1, 1, 1]).unsqueeze(-1), pairs[7].b)
    pairs[7] = Pair(pairs[7].a, pairs[7].b * torch.tensor([-1.0, 1, 1, 1]).unsqueeze(-1))
    wrong = np.array(Fingerprint.of(pairs).sums) * np.sqrt(30 * 8)
    assert np.sqrt(((right - wrong) ** 2).mean() / 100_000) > TOLERANCE


def test_a_base_in_float16_passes_and_one_in_four_bits_does_not() -> None:
    weight = with_values([0.95**i for i in range(100)], 100, 120).float()
    distance = []
    scale = weight.abs().amax(1, keepdim=True) / 7
    for other in (weight.half(), (weight / scale).round() * scale):
        pairs = [WeightSource(8, 10, 0, Split.EVEN).made(w).pair for w in (weight, other)]
        assert pairs[0] is not None
        assert pairs[1] is not None
        distance.append(Fingerprint.of([pairs[0]]).distance(Fingerprint.of([pairs[1]])))
    assert distance[0] < TOLERANCE < distance[1]


# -- files ---------------------------------------------------------------------------------------------


def tied_base() -> nn.Sequential:
    base = mlp()
    with torch.no_grad():
        base[0].weight.copy_(with_values([3.0, 2.0, 2.0, 1.0], 5, 6))
    return base


def test_ties_are_refused_where_the_file_would_have_no_factors(tmp_path: Path) -> None:
    base = tied_base()
    with pytest.raises(ConfigError, match=r"save_factors=True, which keeps them in the file.*\n?.*'0': number 2"):
        get_peft_model(base, LoraXsConfig(r=3, **BARE))
    assert type(base[0]) is nn.Linear
    model = get_peft_model(base, LoraXsConfig(r=3, target_modules="all-linear"))
    randomize(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tied_base(), tmp_path)(X), model(X))


def test_a_base_of_the_same_numbers_in_another_dtype_is_known_again(tmp_path: Path) -> None:
    exact = mlp().half()  # what float32 holds as well
    model = get_peft_model(copy.deepcopy(exact).float(), LoraXsConfig(r=3, **BARE))
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(exact), tmp_path)
    torch.testing.assert_close(again(X.half()).float(), model(X), rtol=0.02, atol=0.02)


def test_the_fingerprint_of_the_training_stays_however_often_a_file_is_rewritten(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), LoraXsConfig(r=3, **BARE))
    model.save_pretrained(tmp_path / "one")
    near = mlp()
    with torch.no_grad():
        near[0].weight.mul_(1.0 + 1e-4)
    again = PeftModel.from_pretrained(near, tmp_path / "one", is_trainable=True)
    again.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "adapter_config.json").read_text() for name in ("one", "two"))
    assert one == two
    shared: Any = again.installed("default").shared
    assert _svd.fingerprint_of(shared.sources) not in one
    assert '"factors":"svd1:' in one


@pytest.mark.filterwarnings("ignore::kilotune.OtherBaseWarning")  # the error says more
def test_older_files_with_a_checksum_load_as_before(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), LoraXsConfig(r=3, **BARE))
    randomize(model)
    model.installed("default").method.expected_checksum = _svd.factors_checksum(_factors(model))
    model.save_pretrained(tmp_path / "old")
    again = PeftModel.from_pretrained(mlp(), tmp_path / "old", is_trainable=True)
    assert torch.equal(again(X), model(X))
    again.save_pretrained(tmp_path / "new")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    with pytest.raises(CheckpointError, match="not those of the training .expected SHA-256"):
        PeftModel.from_pretrained(mlp(seed=1), tmp_path / "old")


# -- banks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [True, False])
def test_a_bank_holds_r_squared_numbers_a_layer(saved: bool, tmp_path: Path) -> None:
    config = LoraXsConfig(r=3, target_modules="all-linear", save_factors=saved)
    model = get_peft_model(mlp(), config)
    randomize(model)
    expected = model(X)
    model.save_pretrained(tmp_path)
    other = get_peft_model(mlp(), LoraXsConfig(r=3, target_modules="all-linear"))
    bank = AdapterBank(other, LoraXsConfig(r=3, target_modules="all-linear"), slots=4)
    assert bank.form.length == 2 * 9
    bank.put("a", tmp_path)
    torch.testing.assert_close(other(X, adapter_names=["a"] * 4), expected)
    bank.close()


@pytest.mark.filterwarnings("ignore::kilotune.OtherBaseWarning")
@pytest.mark.parametrize("saved", [True, False])
def test_a_bank_refuses_adapters_of_other_factors(saved: bool, tmp_path: Path) -> None:
    config = LoraXsConfig(r=3, target_modules="all-linear", save_factors=saved)
    get_peft_model(mlp(seed=1), config).save_pretrained(tmp_path)
    other = get_peft_model(mlp(), LoraXsConfig(r=3, target_modules="all-linear"))
    bank = AdapterBank(other, LoraXsConfig(r=3, target_modules="all-linear"), slots=4)
    with pytest.raises(CheckpointError, match="are not those of"):
        bank.put("a", tmp_path)
    bank.close()
