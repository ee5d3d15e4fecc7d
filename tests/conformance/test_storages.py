"""Every method on every scheme of every storage, held to the dense layer with the dequantised weight."""

from __future__ import annotations

import copy
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kilotune import MergeError, MergePrecisionWarning, PeftModel, get_peft_model
from kilotune.deltas import LowRank, Residual
from kilotune.layers.adapted import AdaptedLayer
from kilotune.storage import STORAGES, storage_of
from tests.conformance.cases import Params
from tests.conformance.cells import FORMULAS, METHOD_CASES, PLAIN_STORAGES, delta_of
from tests.conformance.checks import far
from tests.conformance.declared import every_quantised_cell
from tests.conformance.quantised import INN, OUT, QUANTISED, STORAGE_SCHEMES, Cell, first_of_each_delta, weight_of
from tests.support.models import disk, freed_at_once

NEAR = 1e-5
MERGEABLE = [cell for cell in QUANTISED if cell.case.name in FORMULAS]
pytestmark = pytest.mark.filterwarnings("ignore::kilotune.MergePrecisionWarning")  # has its own test


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, INN, generator=torch.Generator().manual_seed(5))


def layer_of(model: PeftModel) -> AdaptedLayer:
    (layer,) = model.adapted_layers().values()
    return layer


def bits(layer: nn.Module) -> list[bytes]:
    """All bytes that make up the layer: codes, scales, scales of scales, zero points, bias."""
    weight = layer.get_parameter("weight")
    parts: list[Tensor | None] = [layer._parameters.get("bias")]
    if (state := getattr(weight, "quant_state", None)) is not None:
        parts += [weight.data, state.absmax, state.offset, state.state2.absmax if state.nested else None]
    elif hasattr(layer, "state"):
        parts += [weight.data, layer.state.SCB if weight.SCB is None else weight.SCB]
    else:
        parts += [getattr(weight.data, name, None) for name in ("qdata", "scale", "zero_point")]
    return [p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for p in parts if p is not None]


def wanted(cell: Cell, model: PeftModel) -> tuple[Tensor, Tensor | None]:
    """Merged weight and bias by the method's formula, in numpy's float64, from the dequantised weight."""
    layer, slot = layer_of(model).base_layer, layer_of(model).slot("default")
    named = {n.removeprefix("layer."): p for n, p in model.adapter_parameters()} | dict(slot.named_parameters())
    params = Params({name: p.detach().double().numpy() for name, p in named.items()})
    params.fan_in, params.index, params.shapes = INN, 0, ((OUT, INN),)
    bias = None if layer.bias is None else layer.bias.detach().double().numpy()
    trained = params.get("bias", bias)
    weight, new = FORMULAS[cell.case.name](params, cell.config(), weight_of(layer).double().numpy(), trained)
    return torch.from_numpy(np.ascontiguousarray(weight)), None if new is None else torch.from_numpy(new)


# -- training --------------------------------------------------------------------------------------


@every_quantised_cell(training={"train": True, "eval": False})
def test_forward_and_gradients_are_those_of_the_dense_layer(cell: Cell, training: bool) -> None:
    model, twin = (m.train(training) for m in cell.models())
    near, noisy = cell.scheme.forward, cell.scheme.noisy if not training else cell.scheme.forward
    x, same = data(2, 3).requires_grad_(), data(2, 3).requires_grad_()
    y, expected = model(x), twin(same)
    assert y.dtype == torch.float32
    assert far(y, expected) < noisy
    weights = torch.linspace(-1, 1, OUT)
    (y @ weights).sum().backward()
    (expected @ weights).sum().backward()
    assert x.grad is not None
    assert same.grad is not None
    # What comes after the layer's output sees the rounding of its input, where the layer has that.
    assert far(x.grad, same.grad) < (noisy if issubclass(delta_of(cell.case), Residual) else near)
    theirs = dict(twin.adapter_parameters())
    for name, parameter in model.adapter_parameters():
        assert parameter.grad is not None, name
        assert parameter.dtype == torch.float32, name
        bound = noisy * 5 if noisy > near else near * 2  # rows' and residuals' gradients see the noise of the output
        assert far(parameter.grad, theirs[name].grad) < bound, name


@every_quantised_cell()
def test_training_lowers_the_loss_and_leaves_every_bit_of_the_base(cell: Cell) -> None:
    base = cell.base()
    layer = base.get_submodule("layer")
    before = bits(layer)
    model, (_, target) = get_peft_model(base, cell.config()), cell.models()
    x = data(64)
    y = target(x).detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(12):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            model(x)  # an evaluation between two steps must not change the base, or end the training
        model.train()
    assert losses[-1] < 0.9 * losses[0]
    assert bits(layer) == before
    with model.disable_adapter(), torch.no_grad():
        fresh = cell.base().train()
        if (storage := storage_of(fresh.layer)) is not None:
            storage.prepare(fresh.layer)
        assert torch.equal(model(x), fresh(x))
    assert model.unload() is base
    assert base.get_submodule("layer") is layer
    assert type(layer) is type(cell.base().get_submodule("layer"))
    assert bits(layer) == before


# torch's own tracing of autograd functions, of which bitsandbytes has some.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_quantised_cell()
def test_a_model_is_freed_with_its_last_name_but_for_quantised_layers(cell: Cell) -> None:
    """Those are never freed at once, bare ones either: bitsandbytes' weights and torchao's layers know the layer."""
    with freed_at_once() as watched:
        model = get_peft_model(cell.base(), cell.config())
        quantised = set(layer_of(model).base_layer.modules())
        watched += [weakref.ref(module) for module in model.modules() if module not in quantised]
        watched += [weakref.ref(parameter) for _, parameter in model.adapter_parameters()]
        model(data(2, 3)).sum().backward()
        del model, quantised


@every_quantised_cell([c for c in QUANTISED if c.bias and c.case is METHOD_CASES[c.case.name][0]], cost=20)
def test_it_compiles_as_one_graph(cell: Cell) -> None:
    torch.compiler.reset()
    model, _ = cell.models()
    x = data(4)
    model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert far(compiled(x), model(x)) < NEAR
    compiled(x).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.adapter_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.grad is not None
        assert far(grads[name], parameter.grad) < 1e-4, name


# -- merging ---------------------------------------------------------------------------------------


@every_quantised_cell(MERGEABLE)
def test_merging_rounds_the_formula_in_the_same_scheme_and_unmerging_gives_the_bits_back(cell: Cell) -> None:
    model, _ = cell.models()
    layer, x = layer_of(model), data(4)
    near = max(cell.scheme.forward, 1e-6, 100 * cell.case.rounded)
    y, before, held = model(x), bits(layer.base_layer), layer.base_layer.get_parameter("weight")
    with model.disable_adapter():
        alone = model(x)
    weight, bias = wanted(cell, model)
    base = weight_of(layer.base_layer).double()
    model.merge_adapter(safe_merge=True)
    got = weight_of(layer.base_layer).double()
    if torch.equal(weight, base):
        assert model.merge_report.layers == {}
        assert torch.equal(got, base)
    else:
        plain = cell.plain()
        with torch.no_grad():
            plain.weight.copy_(weight)
        # The vendor's own quantisation of the same weight; a sum at the edge of a step may fall to either side.
        vendor = weight_of(cell.scheme.quantise(plain)).double()
        off = (got - weight).norm()
        rough = 10 * cell.case.rounded + (
            1e-3 if cell.scheme.storage == "bnb-int8" else 1e-6
        )  # float16 moves even exact sums
        assert (got - vendor).norm() <= cell.scheme.vendor * off + rough * weight.norm()
        assert off <= cell.scheme.lost * weight.norm()
        report = model.merge_report.layers["layer"]
        assert report.error == pytest.approx(float(off / weight.norm()), rel=max(1e-3, near), abs=1e-6)
        assert report.lost == pytest.approx(float(off / (weight - base).norm()), rel=max(1e-3, near), abs=1e-5)
        assert "layer" in model.merge_report.table()
    if bias is not None:
        assert far(layer.base_layer.bias, bias) < near
    merged = model(x)
    assert far(merged, x.double() @ got.T + (0 if bias is None else bias)) < max(cell.scheme.noisy, 2e-5)
    there = bits(layer.base_layer)
    with model.disable_adapter():
        assert torch.equal(model(x), alone)
        assert bits(layer.base_layer) == there  # which other threads may run
    assert torch.equal(model(x), merged)
    twin = copy.deepcopy(model)
    for one in (twin, model):
        one.unmerge_adapter()
        assert bits(layer_of(one).base_layer) == before
        assert torch.equal(one(x), y)
    assert layer.base_layer.get_parameter("weight") is held


@every_quantised_cell(MERGEABLE)
def test_merging_for_good_asks_which_way_and_goes_both(cell: Cell) -> None:
    model, _ = cell.models()
    twin = copy.deepcopy(model)
    weight, bias = wanted(cell, model)
    before = bits(layer_of(model).base_layer)
    with pytest.raises(MergeError, match="you must choose: dtype=torch.bfloat16 .*; requantize=True"):
        model.merge_and_unload()
    assert bits(layer_of(model).base_layer) == before
    near = cell.scheme.forward + cell.case.rounded
    for dtype, bound in ((torch.float32, near), (torch.bfloat16, 3e-3 + near)):
        dense = copy.deepcopy(model).merge_and_unload(dtype=dtype).layer
        assert type(dense) is nn.Linear
        assert {p.dtype for p in dense.parameters()} == {dtype}
        assert not any(p.requires_grad for name, p in dense.named_parameters() if name == "weight")
        assert far(dense.weight, weight) < bound
        assert (bias is None) == (dense.bias is None)
        assert bias is None or far(dense.bias, bias) < bound
    twin.merge_adapter()
    quantised = model.merge_and_unload(requantize=True, safe_merge=True)
    assert type(quantised.layer) is type(cell.base().layer)
    assert bits(quantised.layer) == bits(layer_of(twin).base_layer)


# -- files and several adapters --------------------------------------------------------------------


@every_quantised_cell()
def test_saved_and_loaded_is_bit_identical_and_fits_the_dense_base(cell: Cell, tmp_path: Path) -> None:
    model, twin = cell.models()
    x = data(4)
    model.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(cell.base(), tmp_path / "one", is_trainable=True)
    assert torch.equal(again(x), model(x))
    again.save_pretrained(tmp_path / "two")
    assert disk(tmp_path / "two") == disk(tmp_path / "one")
    # The file knows nothing of the storage: a dense base takes it, and gives the same change.
    dense = PeftModel.from_pretrained(cell.dense(), tmp_path / "one", is_trainable=True)
    assert far(dense(x), twin(x)) < NEAR


@every_quantised_cell([c for c in first_of_each_delta(MERGEABLE) if c.bias and delta_of(c.case).additive])
def test_several_adapters_switch_add_up_merge_and_go(cell: Cell) -> None:
    model, twin = cell.models()
    before = bits(layer_of(model).base_layer)
    x = data(4)
    for one in (model, twin):
        one.add_adapter("other", cell.config())
    generator, theirs = torch.Generator().manual_seed(3), dict(twin.adapter_parameters("other"))
    with torch.no_grad():
        for name, parameter in model.adapter_parameters("other"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            theirs[name].copy_(parameter)
    for names in ("other", ["default", "other"], "default"):
        for one in (model, twin):
            one.set_adapter(names)
        assert far(model(x), twin(x)) < 2 * cell.scheme.noisy
    model.set_adapter(["default", "other"])
    both = model(x)
    model.merge_adapter(["other"])
    model.merge_adapter(["default"])  # from the base's own bits, not from weights that were rounded once already
    twice = bits(layer_of(model).base_layer)
    model.unmerge_adapter()
    assert torch.equal(model(x), both)
    model.merge_adapter(["other", "default"])
    assert bits(layer_of(model).base_layer) == twice
    model.unmerge_adapter()
    model.delete_adapter("other")
    model.delete_adapter("default")
    assert bits(model.get_base_model().get_submodule("layer")) == before


# -- tables ----------------------------------------------------------------------------------------


def test_every_storage_has_its_cases() -> None:
    schemes = {scheme.storage for scheme in STORAGE_SCHEMES}
    assert schemes | PLAIN_STORAGES == {storage.name for storage in STORAGES}
    for cell in {cell.scheme: cell for cell in QUANTISED}.values():
        storage = storage_of(cell.base().get_submodule("layer"))
        assert storage is not None
        assert storage.name == cell.scheme.storage
        assert not storage.lossless


def test_requantising_warns_and_names_the_worst_layer() -> None:
    cell = next(c for c in QUANTISED if delta_of(c.case) is LowRank and c.scheme.name == "nf4")
    model, _ = cell.models()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MergePrecisionWarning, match=r"re-quantising moved the merged weight of 'layer' by \d+%"):
            model.merge_adapter()
        assert model.merged_adapters == []  # a warning made an error takes it back
        model.merge_and_unload(dtype=torch.float32)
