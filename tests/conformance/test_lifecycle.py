"""Each cell through merging, disabling, saving, copying and deleting."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import MergeError, MergePrecisionWarning, PeftModel, UnsupportedError, get_peft_model
from kilotune.deltas import Shift
from kilotune.layers.adapted import AdaptedLayer
from tests.conformance.cases import Net
from tests.conformance.cells import CELLS, Cell
from tests.conformance.checks import adapted, bound, count, data, dense, layer_of, layers_of
from tests.conformance.declared import every_cell
from tests.support.models import (
    Snapshot,
    base_bits,
    bits,
    disk,
    freed_at_once,
    is_base,
    places,
    plain_name,
    randomize,
    value_bits,
    watch,
)


def _merges(cell: Cell) -> bool:
    return cell.makes.mergeable and (cell.kind_case.bias_merges or cell.makes is not Shift)


MERGEABLE = [cell for cell in CELLS if _merges(cell)]
NOT_MERGEABLE = [cell for cell in CELLS if not _merges(cell)]
ADDITIVE = [cell for cell in CELLS if cell.makes.additive]
IN_ORDER = [cell for cell in CELLS if not cell.makes.additive and cell.makes.mergeable]
NOT_LINEAR = [cell for cell in CELLS if not cell.makes.additive and not cell.makes.mergeable]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# -- merge -----------------------------------------------------------------------------------------


@every_cell("merge", MERGEABLE, dtype=DTYPES)
def test_merged_is_unmerged_to_rounding_and_unmerging_gives_the_bits_back(cell: Cell, dtype: torch.dtype) -> None:
    model = adapted(cell, dtype)
    base, layer, x = bits(cell.base(dtype)), layer_of(model), data(cell, 4, dtype=dtype)
    y, where, reference = model(x), places(model), dense(cell, model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergePrecisionWarning)  # has its own test
        model.merge_adapter(safe_merge=True)
    assert layer.merged == ("default",)
    assert layer.slot("default") is not None
    merged = model(x)
    torch.testing.assert_close(merged.double(), y.double(), rtol=0, atol=bound(reference, dtype))
    if cell.kind_case.net is Net:  # the merged layer is the plain layer with the formula's weight: no adapter runs
        assert torch.equal(merged, layer.base_layer(x))
    assert not torch.equal(merged, cell.base(dtype)(x))
    with model.disable_adapter():
        assert torch.equal(model(x), cell.base(dtype)(x))
    assert torch.equal(model(x), merged)

    model.unmerge_adapter()
    assert base_bits(model) == base
    assert places(model) == where  # the very tensors, not copies
    assert torch.equal(model(x), y)
    assert layer.merged == ()


class _Taken(torch.autograd.Function):
    """The identity with a backward of its own, which gets its argument as it is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@every_cell("read by code around", MERGEABLE, dtype=DTYPES)
def test_what_code_around_a_layer_reads_in_a_forward_is_the_merged_weight(cell: Cell, dtype: torch.dtype) -> None:
    """And its gradient is the same on both ways: through torch's functions, and through a function of one's own."""
    model = adapted(cell, dtype)
    layers = {name: layer for name, layer in layers_of(model).items() if layer.kind.parameter is None}
    found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def read(module: nn.Module, args: object) -> None:
        for name, layer in layers.items():
            for own in (layer.storage.weight_name, layer.storage.bias_name):
                if isinstance(value := getattr(layer, own, None), Tensor):
                    found[name, own] = value * 1, _Taken.apply(value)  # type: ignore[no-untyped-call]

    handle = model.model.register_forward_pre_hook(read)
    model(data(cell, 4, dtype=dtype))
    handle.remove()
    trained = [parameter for _, parameter in model.adapter_parameters()]
    for value, taken in found.values():
        if value.requires_grad:
            weights = torch.linspace(-1, 1, value.numel(), dtype=dtype).view(value.shape)
            one, two = (
                torch.autograd.grad((made * weights).sum(), trained, retain_graph=True, allow_unused=True)
                for made in (value, taken)
            )
            torch.testing.assert_close(one, two, rtol=0, atol=0)
            assert any(gradient is not None for gradient in one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergePrecisionWarning)
        model.merge_adapter()
    for (name, own), values in found.items():
        for value in values:
            merged = layers[name].base_layer._parameters[own]
            assert merged is not None
            torch.testing.assert_close(value, merged.detach(), rtol=0, atol=bound(merged, dtype))


@every_cell("merge refusals", MERGEABLE)
def test_merging_twice_is_refused_and_changes_nothing(cell: Cell) -> None:
    model = adapted(cell, torch.float32)
    model.merge_adapter()
    before = Snapshot.of(model)
    with pytest.raises(MergeError, match=r"\['default'\] are merged already; call unmerge_adapter\(\) first"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="cannot change the active adapters while"):
        model.set_adapter("default")
    with pytest.raises(MergeError, match="call unmerge_adapter\\(\\) before deleting it"):
        model.delete_adapter("default")
    assert Snapshot.of(model) == before
    model.unmerge_adapter()
    with pytest.raises(MergeError, match="no adapter is merged"):
        model.unmerge_adapter()


@every_cell("merge and unload", MERGEABLE)
def test_merge_and_unload_gives_a_plain_module(cell: Cell) -> None:
    model, x = adapted(cell), data(cell, 4, dtype=torch.float64)
    y = model(x)
    modules = {name: layer for name, layer in layers_of(model).items() if layer.kind.parameter is None}
    biases = [f"{name}.{layer.storage.bias_name}" for name, layer in modules.items()]
    plain = model.merge_and_unload(safe_merge=True)
    fresh = cell.base(torch.float64)
    assert type(plain) is type(fresh)
    assert [type(m) for m in plain.modules()] == [type(m) for m in fresh.modules()]
    assert set(biases) <= set(plain.state_dict()) or cell.makes is not Shift  # a layer without a bias gets one
    gained = set(biases) if cell.makes is Shift else set()
    assert set(plain.state_dict()) == set(fresh.state_dict()) | gained
    torch.testing.assert_close(plain(x), y, rtol=0, atol=bound(y, torch.float64))


@every_cell("not mergeable", NOT_MERGEABLE)
def test_what_cannot_be_in_the_weights_refuses_to_merge(cell: Cell) -> None:
    model = adapted(cell)
    before = Snapshot.of(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="is not linear and cannot be merged|has no place for one"):
            merge()
        assert Snapshot.of(model) == before


@every_cell("safe merge", MERGEABLE, value=[float("nan"), float("inf")])
def test_safe_merge_refuses_values_that_are_not_finite(cell: Cell, value: float) -> None:
    model = adapted(cell, torch.float32)
    parameter = next(p for _, p in model.adapter_parameters())
    with torch.no_grad():
        parameter.view(-1)[0] = value
    before = Snapshot.of(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"safe_merge refused adapters .*nothing was changed") as caught:
            merge(safe_merge=True)
        assert "would hold values that are not finite" in str(caught.value)
        assert Snapshot.of(model) == before


# -- together --------------------------------------------------------------------------------------


@every_cell("together", ADDITIVE)
def test_two_of_a_kind_add_up_and_merge_in_any_order(cell: Cell) -> None:
    model = adapted(cell)
    model.add_adapter("other", cell.config())
    model.double()
    randomize(model, "other", seed=3)
    x, base = data(cell, 4, dtype=torch.float64), cell.base(torch.float64)
    one = model(x)
    model.set_adapter("other")
    two = model(x)
    model.set_adapter(["default", "other"])
    both = model(x)
    if cell.kind_case.whole is None:  # else the output is not linear in the weights
        torch.testing.assert_close(both, one + two - base(x), rtol=0, atol=bound(both, torch.float64))
    assert not torch.equal(both, one)
    assert not torch.equal(both, two)
    if not _merges(cell):  # the refusal has a test of its own
        return
    model.merge_adapter(["other"])
    torch.testing.assert_close(model(x), both, rtol=0, atol=bound(both, torch.float64))
    model.merge_adapter(["default"])
    merged = bits(model)
    torch.testing.assert_close(model(x), both, rtol=0, atol=bound(both, torch.float64))
    model.unmerge_adapter()
    model.merge_adapter(["other", "default"])
    assert bits(model) == merged
    model.unmerge_adapter()
    assert torch.equal(model(x), both)


@every_cell("in order", IN_ORDER)
def test_two_that_rescale_act_in_the_order_of_activation(cell: Cell) -> None:
    """Each on what the one before left: the second on a base into which the first is merged for good, in float64."""
    model = adapted(cell)
    model.add_adapter("other", cell.config())
    model.double()
    randomize(model, "other", seed=3)
    x = data(cell, 4, dtype=torch.float64)
    seen = []
    for names in (["default", "other"], ["other", "default"]):
        model.set_adapter(names)
        both = model(x)
        layers = model.adapted_layers()
        for layer in layers.values():
            weight, bias = layer.base_matrix().double(), layer.base_bias()
            flat = None if bias is None else layer.flat(bias.double())
            for name in names:
                slot = layer.slot(name)
                assert slot is not None
                delta = slot.delta()
                assert delta is not None
                change, shift = delta.weight_change(weight), delta.bias_change(flat)
                weight = weight if change is None else weight + change
                flat = flat if shift is None or flat is None else flat + shift
            merged = layer.merged_with(names)
            if merged.weight is not None:
                torch.testing.assert_close(layer.kind.canonical(layer.base_layer, merged.weight), weight)
        for part in (names[:1], names[1:], names):  # whoever is merged, the output stays
            model.merge_adapter(part)
            torch.testing.assert_close(model(x), both, rtol=0, atol=bound(both, torch.float64))
            model.unmerge_adapter()
        assert torch.equal(model(x), both)
        seen.append(both)


@every_cell("not linear", NOT_LINEAR)
def test_two_that_are_not_linear_are_refused_together(cell: Cell) -> None:
    model = adapted(cell)
    model.add_adapter("other", cell.config())
    with pytest.raises(UnsupportedError, match="'default' and 'other' are both not linear"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]


# -- disable ---------------------------------------------------------------------------------------


@every_cell("disable", dtype=DTYPES)
def test_disabled_is_the_base_to_the_bit(cell: Cell, dtype: torch.dtype) -> None:
    model, base, x = adapted(cell, dtype), cell.base(dtype), data(cell, 4, dtype=dtype)
    y = model(x)
    with model.disable_adapter():
        assert value_bits(model(x)) == value_bits(base(x))
    assert torch.equal(model(x), y)
    assert not torch.equal(y, base(x))


# -- state, files, copies --------------------------------------------------------------------------


@every_cell("state dict")
def test_the_state_dict_holds_the_base_and_the_adapter_and_nothing_else(cell: Cell) -> None:
    model = cell.model()
    own = {key for key in model.state_dict() if ".adapters.default." in key or key.startswith("shared_parameters.")}
    names = [name.rpartition(".")[2] for name, _ in model.adapter_parameters()]
    frozen = sum(len(slot.method.frozen) for layer in layers_of(model).values() for slot in layer.adapters.values())
    assert len(own) == len(names) + frozen
    assert sorted(names) == sorted(key.rpartition(".")[2] for key in own) or frozen
    assert base_bits(model) == bits(cell.base())
    assert not list(model.buffers())
    assert sum(p.numel() for _, p in model.adapter_parameters()) == count(cell, model)
    twin = cell.model()
    randomize(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(data(cell, 3)), model(data(cell, 3)))


@every_cell("files", cost=3, dtype=[torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_bit_identical(cell: Cell, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = cell.model(dtype), data(cell, 4, dtype=dtype)
    randomize(model)
    model.save_pretrained(tmp_path / "one")
    assert sorted(disk(tmp_path / "one")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(disk(tmp_path)) == ["one", "one/adapter_config.json", "one/adapter_model.safetensors"]
    again = PeftModel.from_pretrained(cell.base(dtype), tmp_path / "one", is_trainable=True)
    assert torch.equal(again(x), model(x))
    ours, theirs = dict(model.adapter_parameters()), dict(again.adapter_parameters())
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value_bits(theirs[name]) == value_bits(value)
        assert theirs[name].requires_grad
    again.save_pretrained(tmp_path / "two")
    assert disk(tmp_path / "two") == disk(tmp_path / "one")
    frozen = PeftModel.from_pretrained(cell.base(dtype), tmp_path / "one")
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training


@every_cell("copies", way=["deepcopy", "pickle", "torch.save"])
def test_copies_run_alike_and_live_on_their_own(cell: Cell, way: str) -> None:
    model, x = adapted(cell, torch.float32), data(cell, 4)
    y = model(x)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))  # noqa: S301 - what this test wrote a moment ago
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), y)
    assert not set(places(twin).values()) & set(places(model).values())
    randomize(twin, seed=8)
    assert not torch.equal(twin(x), y)
    assert torch.equal(model(x), y)
    with twin.disable_adapter():
        assert torch.equal(twin(x), cell.base()(x))
        assert torch.equal(model(x), y)
    twin.delete_adapter("default")
    assert torch.equal(twin(x), cell.base()(x))
    assert torch.equal(model(x), y)


@every_cell("copies of merged", MERGEABLE)
def test_a_copy_of_a_merged_model_unmerges_by_itself(cell: Cell) -> None:
    model, x = adapted(cell, torch.float32), data(cell, 4)
    model.merge_adapter()
    y, twin = model(x), copy.deepcopy(model)
    twin.unmerge_adapter()
    assert bits(twin.unload()) == bits(cell.base())
    assert torch.equal(model(x), y)
    model.unmerge_adapter()
    assert bits(model.unload()) == bits(cell.base())


@every_cell("moves", MERGEABLE)
def test_a_merged_model_follows_a_change_of_dtype(cell: Cell) -> None:
    model, x = adapted(cell, torch.float32), data(cell, 4, dtype=torch.float64)
    model.merge_adapter()
    model.double()
    assert model(x).dtype == torch.float64
    with model.disable_adapter():
        assert torch.equal(model(x), cell.base().double()(x))
    model.unmerge_adapter()
    assert bits(model.unload()) == bits(cell.base().double())


@every_cell("meta")
def test_on_meta_it_is_planned_wrapped_and_counted(cell: Cell) -> None:
    with torch.device("meta"):
        base = cell.base()
    model, real = get_peft_model(base, cell.config()), cell.model()
    assert all(p.device.type == "meta" for p in model.parameters())
    shapes = {name: p.shape for name, p in model.adapter_parameters()}
    assert shapes == {name: p.shape for name, p in real.adapter_parameters()}
    assert model.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    if cell.part.name != "experts":  # transformers picks tokens by value, of which there are none on meta
        assert model(data(cell, 4).to("meta")).shape == real(data(cell, 4)).shape


@every_cell("memory", cost=3)
def test_no_weight_of_the_base_is_copied(cell: Cell, tmp_path: Path) -> None:
    base = cell.base()
    where = places(base)
    model = get_peft_model(base, cell.config())
    model(data(cell, 4)).sum().backward()
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again")
    model.add_adapter("more", cell.config())
    model.set_adapter("more")
    model(data(cell, 4))
    held = {plain_name(name): place for name, place in places(model).items() if is_base(name)}
    assert held == where
    for name in ("default", "again", "more"):
        model.delete_adapter(name)
    assert places(base) == where


@every_cell("freed", after=["forward", "merged", "two", "deleted", "released"])
def test_a_model_is_freed_with_its_last_name(cell: Cell, after: str) -> None:
    """The garbage collector may come after the next base was loaded: https://github.com/huggingface/peft/issues/2221."""
    with freed_at_once() as watched:
        base = cell.base()
        model = get_peft_model(base, cell.config())
        watched += watch(model)
        model(data(cell, 4)).sum().backward()
        if after == "merged" and cell in MERGEABLE:
            model.merge_adapter()
            watched += watch(model)
            model.unmerge_adapter()
            model.merge_adapter()
        elif after == "two":
            model.add_adapter("more", cell.config())
            model.set_adapter("more")
            model(data(cell, 4)).sum().backward()
            with model.disable_adapter():
                model(data(cell, 4))
            watched += watch(model)
        elif after == "deleted":
            model.delete_adapter("default")
        elif after == "released":
            base = model.merge_and_unload() if cell in MERGEABLE else model.unload()
        del base, model


@every_cell("delete")
def test_deleting_the_last_adapter_gives_the_very_module_back(cell: Cell) -> None:
    base = cell.base()
    layer = base.get_submodule("layer")
    before = Snapshot.of(base)
    model = get_peft_model(base, cell.config())
    assert base.get_submodule("layer") is not layer
    assert all(isinstance(found, AdaptedLayer) for found in layers_of(model).values())
    model.delete_adapter("default")
    assert base.get_submodule("layer") is layer
    assert model.active_adapters == []
    assert model.unload() is base
    assert Snapshot.of(base) == before
    assert Snapshot.of(cell.model().unload()).bits == before.bits


@every_cell("training", cost=10)
def test_training_lowers_the_loss_and_leaves_the_base_alone(cell: Cell) -> None:
    model = cell.model()
    base = base_bits(model)
    x = data(cell, 64)
    target = adapted(cell, torch.float32)(x).detach()  # what some values of the parameters give exactly
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert base_bits(model) == base


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports use torch.jit
# Methods that act by FFT: it calls the library, and says that it might have been faster.
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators:UserWarning")
@every_cell("inductor", [cell for cell in CELLS if cell.kind == "linear" and cell.bias], quick=False)
def test_inductor_compiles_it(cell: Cell) -> None:
    torch.compiler.reset()
    model, x = adapted(cell, torch.float32), data(cell, 4)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
