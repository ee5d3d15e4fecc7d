"""LoRA's starts: the factors themselves, in float64 and against other formulas, and what an adapter makes of them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kilotune import ConfigError, LoraConfig, PeftModel, UnsupportedError, get_peft_model, peft
from kilotune.adapter_files.content import content_sha256, file_of
from kilotune.convert import to_lora
from kilotune.deltas import LowRank
from kilotune.fleet import AdapterBank
from kilotune.kernels.starts import orthogonal, principal
from kilotune.methods._svd import first_qr
from kilotune.train.finished.lora_export import export_lora
from tests.support.models import mlp

X = torch.linspace(-1, 1, 24).view(4, 6)
CPU = torch.device("cpu")


# -- orthogonal ------------------------------------------------------------------------------------


def test_orthogonal_factors_are_not_zero_and_their_product_is() -> None:
    torch.manual_seed(0)
    a, b = orthogonal(6, 40, 30, CPU)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((6, 30), (40, 6), torch.float32, torch.float32)
    # Each is r / 2 normal directions of deviation 1 / 10, spread over the rank's r by orthonormal rows.
    for factor in (a, b.T):
        values = torch.linalg.svdvals(factor.double())
        assert values[3:].max() < 1e-6
        assert float(values[2]) > 0.1
    spread = torch.cat([orthogonal(6, 400, 300, CPU)[i].flatten() for i in (0, 1) for _ in range(20)])
    assert float(spread.square().mean().sqrt()) == pytest.approx(0.1 * 0.5**0.5, rel=0.02)
    assert float((b.double() @ a.double()).abs().max()) < 1e-7


def test_an_orthogonal_start_leaves_the_output_and_trains_both_factors() -> None:
    base = mlp()
    before = base(X).detach()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights="orthogonal"))
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)
    model(X).square().sum().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 1e-6, name


@pytest.mark.parametrize("options", [{"r": 3}, {"r": 4, "rank_pattern": {"0": 1}}])
def test_an_orthogonal_start_needs_even_ranks(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="init_lora_weights='orthogonal': needs even ranks, got (r = 3|.*'0'.* = 1)"):
        LoraConfig(init_lora_weights="orthogonal", **options)


# -- a part of the base ----------------------------------------------------------------------------


def weight(out: int, inn: int, rank: int = 0) -> torch.Tensor:
    """A matrix (out, in) in float64 with singular values 1, 1/2, 1/4, ... (those after ``rank`` are tiny)."""
    generator = torch.Generator().manual_seed(5)
    size = min(out, inn)
    u = torch.linalg.qr(torch.randn(out, size, dtype=torch.float64, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(inn, size, dtype=torch.float64, generator=generator)).Q
    values = 0.5 ** torch.arange(size, dtype=torch.float64)
    values[rank or size :] *= 1e-3
    return u @ torch.diag(values) @ v.T


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_the_principal_part_is_that_of_the_eigenvectors(shape: tuple[int, int]) -> None:
    """The projection of W on its top eigenvectors of W^T W, in equal parts in both factors."""
    w = weight(*shape)
    a, b = principal(w, 3)
    values, vectors = torch.linalg.eigh(w.T @ w)  # ascending
    top = vectors[:, -3:]
    torch.testing.assert_close(b @ a, w @ top @ top.T, rtol=0, atol=1e-12)
    expected = torch.diag(values[-3:].flip(0).sqrt())
    torch.testing.assert_close(a @ a.T, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(b.T @ b, expected, rtol=0, atol=1e-12)


def test_power_iterations_come_to_the_svd_and_are_the_same_each_time() -> None:
    w = weight(90, 60)
    exact = torch.linalg.multi_dot([*reversed(principal(w, 4))])
    torch.manual_seed(1)
    near = principal(w, 4, iterations=2)
    torch.manual_seed(2)
    again = principal(w, 4, iterations=2)
    torch.testing.assert_close(near[1] @ near[0], exact, rtol=0, atol=1e-7)
    assert all(torch.equal(one, other) for one, other in zip(near, again, strict=True))
    assert not torch.equal(near[0], principal(w, 4)[0])


def test_the_triangular_part_is_gram_schmidts() -> None:
    """Q's first columns span those of W, and A is what of W lies in them."""
    w = weight(9, 7)
    b, a = first_qr(w, 3)
    columns: list[torch.Tensor] = []
    for k in range(3):
        left = w[:, k] - sum((q * (q @ w[:, k]) for q in columns), torch.zeros(9, dtype=torch.float64))
        columns.append(left / left.norm())
    q = torch.stack(columns, 1)
    torch.testing.assert_close(b @ a, q @ q.T @ w, rtol=0, atol=1e-12)
    torch.testing.assert_close((b * b).sum(0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    whole = torch.linalg.qr(w)
    sign = whole.R.diagonal()[:3].sign()
    torch.testing.assert_close(b, whole.Q[:, :3] * sign, rtol=0, atol=1e-12)  # of all columns, signs settled
    torch.testing.assert_close(a, sign[:, None] * whole.R[:3], rtol=0, atol=1e-12)
    assert bool((a.diagonal() > 0).all())
    assert torch.equal(first_qr(-w, 3)[0], -b)


def test_the_triangular_part_of_columns_without_numbers() -> None:
    """As LAPACK has it of all columns, which PEFT asks: B A is the same matrix, and nothing is not a number."""
    w = weight(7, 9)
    w[:, 1] = 0.0
    b, a = first_qr(w, 4)
    q, r = torch.linalg.qr(w)
    torch.testing.assert_close(b @ a, q[:, :4] @ r[:4], rtol=0, atol=1e-12)


STARTS = ("pissa", "pissa_niter_3", "olora")


def started(start: str, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    config = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=start, **options)
    return get_peft_model(mlp().to(dtype), config)


def move(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"0": 3}}])
def test_the_start_is_the_part_of_the_weight_and_changes_nothing(start: str, options: dict[str, Any]) -> None:
    base = mlp()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    output = base(X).detach()
    model = started(start, **options)
    assert torch.equal(model(X), output)  # W + 0 exactly
    for name, layer in model.adapted_layers().items():
        slot = layer.slot("default")
        assert slot is not None
        own, w = slot.own(), before[f"{name}.weight"].double()
        rsqrt = 6 / 2**0.5 if "use_rslora" in options else 3.0
        scale = 1.5 if name == "0" and "alpha_pattern" in options else rsqrt
        part = own["lora_B"].double() @ own["lora_A"].double()
        if start == "olora":
            q = torch.linalg.qr(w).Q[:, :2]
            torch.testing.assert_close(part, q @ q.T @ w, rtol=0, atol=1e-6)
        else:
            u, s, vh = torch.linalg.svd(w)
            torch.testing.assert_close(scale * part, u[:, :2] @ torch.diag(s[:2]) @ vh[:2], rtol=0, atol=1e-6)
    for name, parameter in model.get_base_model().named_parameters():
        if name.replace(".base_layer", "") in before:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("start", STARTS)
def test_the_change_is_counted_from_the_start_in_forward_merge_and_gradients(start: str) -> None:
    model = started(start)
    starts = {name: layer.slot("default").own() for name, layer in model.adapted_layers().items()}  # type: ignore[union-attr]
    frozen = {name: (own["lora_A"].detach().clone(), own["lora_B"].detach().clone()) for name, own in starts.items()}
    held = [tensor.clone() for tensor in model.projections.tensors()]
    move(model)
    reference = mlp().double()
    factors: dict[str, torch.Tensor] = {}
    x = X.double()
    for at, module in enumerate(reference):
        if isinstance(module, torch.nn.Linear):
            own, (a0, b0) = starts[str(at)], frozen[str(at)]
            a, b = (own[key].detach().double().requires_grad_() for key in ("lora_A", "lora_B"))
            factors.update({f"{at}.lora_A": a, f"{at}.lora_B": b})
            residual = module.weight.detach() - 3.0 * b0.double() @ a0.double()  # the papers' form
            x = x @ residual.T + 3.0 * x @ a.T @ b.T + module.bias
        else:
            x = module(x)
    output = model(X)
    torch.testing.assert_close(output.double(), x, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    x.square().sum().backward()
    own = dict(model.adapter_parameters())
    assert sorted(own) == sorted(factors)
    for name, factor in factors.items():
        torch.testing.assert_close(own[name].grad.double(), factor.grad, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    assert all(torch.equal(now, then) for now, then in zip(model.projections.tensors(), held, strict=True))
    before = output.detach()
    model.merge_adapter()
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), mlp()(X))
    bare = model.unload()
    for name, parameter in mlp().named_parameters():
        assert torch.equal(bare.get_parameter(name), parameter), name


@pytest.mark.parametrize("start", STARTS)
def test_small_steps_are_not_lost_in_16_bits(start: str) -> None:
    """A factor of size 1 that moves by 1e-4 is the same in bfloat16; the difference to the start is not."""
    model = started(start, torch.bfloat16)
    plain = mlp().to(torch.bfloat16)
    assert torch.equal(model(X.bfloat16()), plain(X.bfloat16()))
    layer = model.adapted_layers()["0"]
    slot = layer.slot("default")
    assert slot is not None
    with torch.no_grad():
        slot.own()["lora_A"].add_(1e-4)
    delta = slot.delta()
    assert isinstance(delta, LowRank)
    got = delta.b.double() @ delta.a.double()
    expected = slot.own()["lora_B"].detach().double() @ torch.full((2, 6), 1e-4, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize("start", STARTS)
def test_other_signs_of_a_file_lose_nothing_in_16_bits(start: str) -> None:
    """Those of a singular vector pair, or of a column of Q, are LAPACK's choice in PEFT, and B0 A0 is the same."""
    model = started(start, torch.bfloat16)
    for layer in model.adapted_layers().values():
        slot = layer.slot("default")
        assert slot is not None
        with torch.no_grad():
            slot.own()["lora_A"][0].neg_()
            slot.own()["lora_B"][:, 0].neg_()
    assert torch.equal(model(X.bfloat16()), mlp().to(torch.bfloat16)(X.bfloat16()))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_file_holds_no_start_and_comes_back(start: str, dora: bool, tmp_path: Path) -> None:
    model = started(start, use_dora=dora)
    move(model)
    expected = model(X).detach()
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "start" in key]
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    closed = start == "pissa_niter_3"  # PEFT would draw another one
    assert (told["peft_type"], told["init_lora_weights"]) == ("KILOTUNE_LORA" if closed else "LORA", start)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    torch.testing.assert_close(loaded(X), expected, rtol=1e-5, atol=1e-5)
    loaded.load_adapter(tmp_path, "other")  # beside another one, whose merge is undone or not
    loaded.merge_adapter()
    loaded.load_adapter(tmp_path, "third")
    loaded.unmerge_adapter()
    loaded.set_adapter("third")
    torch.testing.assert_close(loaded(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_as_a_plain_lora_of_twice_the_rank(start: str, tmp_path: Path) -> None:
    model = started(start)
    move(model)
    made = to_lora(model)
    made.save(tmp_path)
    assert made.state[0]["r"] == 4
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    assert loaded.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match="LoRA adapter already"):
        to_lora(loaded)
    exported = export_lora(model)
    assert exported.rank == 4


def test_an_embedding_starts_plain_beside_layers_that_do_not(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5))
    ids, twin = torch.arange(9), copy.deepcopy(net)
    before = net(ids).detach()
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="pissa"))
    assert torch.equal(model(ids), before)
    slots = [model.adapted_layers()[name].slot("default") for name in "01"]
    assert [sorted(slot.own()) for slot in slots if slot is not None] == [
        ["lora_A", "lora_B"],
        ["lora_A", "lora_B"],
    ]
    assert len(model.projections.extents()) == 1  # the linear layer's alone
    made = to_lora(model)
    factors = {key: value for key, value in made.state[1].items() if "embedding" in key}
    assert {value.shape for value in factors.values()} == {(4, 9), (6, 4)}
    move(model)
    made = to_lora(model)  # with zeros in the place of the ranks that the embedding lacks
    first, second = (made.state[1][key] for key in sorted(factors))
    assert first[:2].any()
    assert not first[2:].any()
    assert second[:, :2].any()
    assert not second[:, 2:].any()
    made.save(tmp_path)
    plain = PeftModel.from_pretrained(twin, tmp_path)
    torch.testing.assert_close(plain(ids), model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4}, "'pissa': the weight has no such rank:.*'2': r = 4 of \\(3, 5\\)"),
        ({"r": 2, "rank_pattern": {"0": 6}}, "'0': r = 6 of \\(5, 6\\)"),
        ({"r": 2, "lora_alpha": 0}, "needs a scale above 0, got lora_alpha = 0"),
        ({"r": 2, "alpha_pattern": {"0": 0}}, "needs a scale above 0, got alpha_pattern\\['0'\\] = 0"),
    ],
)
def test_what_has_no_part_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        get_peft_model(mlp(), LoraConfig(target_modules="all-linear", init_lora_weights="pissa", **options))


@pytest.mark.parametrize(("value", "what"), [(0.0, "is all zeros"), (float("nan"), "holds values that are not finite")])
@pytest.mark.parametrize("start", STARTS)
def test_a_weight_without_values_has_no_part(start: str, value: float, what: str) -> None:
    """So the zeros that stand in for a base that is not there are never taken for it."""
    net = mlp()
    with torch.no_grad():
        net[2].weight.fill_(value)
    with pytest.raises(ConfigError, match=f"the weight of '2' {what}"):
        get_peft_model(net, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=start))
    assert isinstance(net[2], nn.Linear)


@pytest.mark.parametrize("start", ["pissa_niter_", "pissa_niter_0", "pissa_niter_x", "pissa_3", "PISSA", "corda"])
def test_unknown_starts_are_named(start: str) -> None:
    with pytest.raises(ConfigError, match="'pissa', 'pissa_niter_<number>', 'olora' or 'eva'"):
        LoraConfig(init_lora_weights=start)


def test_a_bank_refuses_a_start_that_is_in_no_row() -> None:
    plain = LoraConfig(r=2, target_modules="all-linear")
    started_from = plain.replace(init_lora_weights="pissa")
    with pytest.raises(UnsupportedError, match=r"a part of the base \('pissa'\), which is in no row of a bank"):
        AdapterBank(get_peft_model(mlp(), plain), started_from)


def test_the_content_of_a_file_says_from_where_its_change_is_counted() -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules="all-linear"))
    file = file_of(model.installed("default"))
    told = [content_sha256(replace(file, config=file.config.replace(init_lora_weights=s))) for s in (True, "gaussian")]
    assert told[0] == told[1]
    assert content_sha256(replace(file, config=file.config.replace(init_lora_weights="olora"))) != told[0]


def test_pefts_names_in_any_case() -> None:
    assert LoraConfig.from_dict({"init_lora_weights": "OLoRA"}).init_lora_weights == "olora"
    with pytest.raises(ConfigError, match="'pissa_niter_4': PEFT took a part"):
        LoraConfig.from_file({"peft_type": "LORA", "init_lora_weights": "PiSSA_niter_4"}, {})


def test_the_shim_writes_a_plain_lora_and_shows_no_start(tmp_path: Path) -> None:
    model = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="OLoRA"))
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.mul_(2.0)
    assert model.base_model.model[0].r == {"default": 2}
    assert not [name for name in model.state_dict() if "start" in name]
    state = peft.get_peft_model_state_dict(model)
    assert sorted(state) == [f"base_model.model.{i}.lora_{f}.weight" for i in (0, 2) for f in "AB"]
    with pytest.raises(ConfigError, match="count their change from a part of the base"):
        model.add_weighted_adapter(["default"], [1.0], "new")
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path)
    assert loaded.peft_config["default"].r == 4
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="starts with a part of the base's weights"):
        peft.utils.hotswap.prepare_model_for_compiled_hotswap(model)
    with pytest.raises(ConfigError, match="start with no part of the base"):
        loaded.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path))
