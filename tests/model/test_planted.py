"""A check that cannot fail guards nothing: each guard is run against a fault planted in the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import LoraConfig, VeraConfig, get_peft_model
from kilotune.adapter_files import files, writing
from kilotune.injection import tree
from kilotune.kernels import lowrank
from kilotune.layers import active_adapters
from kilotune.layers.adapted import AdaptedLayer
from kilotune.layers.bare import Bare
from kilotune.layers.slot import Slot
from kilotune.methods import Shared, Site
from kilotune.methods.vera import Vera
from kilotune.model.adapter_model import AdapterModel
from kilotune.projections.matrices import Pair, Projections
from tests.support import guards
from tests.support.models import Nested, disk, mlp, randomize

X = torch.linspace(-1, 1, 24).view(4, 6)
VERA, LORA = VeraConfig(r=4, target_modules="all-linear"), LoraConfig(r=2, target_modules="all-linear")
Patch = pytest.MonkeyPatch


def caught(guard: Callable[[], Any], match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        guard()


def test_planted_unmerge_by_subtraction(monkeypatch: Patch) -> None:
    def subtract(self: AdaptedLayer) -> None:
        with torch.no_grad():
            for name in self._merged:
                slot = self.slot(name)
                if slot is not None:
                    change = slot.delta().weight_change(self.base_matrix().float())
                    self.base_layer.weight -= self._kind.native(self.base_layer, change).to(
                        self.base_layer.weight.dtype
                    )
        self._kept, self._merged = {}, ()

    monkeypatch.setattr(AdaptedLayer, "unmerge", subtract)
    caught(lambda: guards.unmerging_is_exact(mlp, VERA, torch.float32), "did not give the base's bits back")


def test_planted_merge_without_the_scale(monkeypatch: Patch) -> None:
    def unscaled(a: Tensor, b: Tensor, mid: Any, out: Any, scale: float, dtype: torch.dtype) -> Tensor:
        return lowrank.low_rank_matrix(a, b, mid, out, 1.0, dtype)

    monkeypatch.setattr("kilotune.deltas.low_rank_matrix", unscaled)
    for config in (VERA, LORA):
        caught(lambda config=config: guards.merging_is_equal(mlp, config, X), "merged gives other outputs")


def test_planted_merge_that_does_nothing(monkeypatch: Patch) -> None:
    monkeypatch.setattr(AdaptedLayer, "merge", lambda self, names: None)
    caught(lambda: guards.unmerging_is_exact(mlp, VERA, torch.float32), "merging changed nothing")


def test_planted_adapter_that_still_runs_when_merged(monkeypatch: Patch) -> None:
    def live(self: AdaptedLayer, now: object) -> list[Slot]:
        return [slot for name in self._state.active if (slot := self.slot(name)) is not None]

    monkeypatch.setattr(AdaptedLayer, "_live", live)
    caught(lambda: guards.merging_is_equal(mlp, VERA, X), "merged gives other outputs")


def test_planted_disable_that_forgets_merged_weights(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Bare, "of", lambda self, merged, *_: merged)
    caught(lambda: guards.disabled_is_the_base(mlp, VERA, X), r"disabled is not the base \(merged=True\)")


def test_planted_nested_disable_that_ends_the_outer_one(monkeypatch: Patch) -> None:
    real = AdapterModel.disable_adapter

    @contextmanager
    def naive(self: AdapterModel) -> Iterator[None]:
        with real(self):
            yield
        active_adapters._HERE.set({})

    monkeypatch.setattr(AdapterModel, "disable_adapter", naive)
    caught(lambda: guards.disabled_is_the_base(mlp, VERA, X), r"the inner context ended the outer one \(merged=False\)")


def test_planted_disable_that_adds_a_zero_change(monkeypatch: Patch) -> None:
    """Adding and taking away again is not exact: bits are compared, not values to rounding."""
    real = AdaptedLayer.forward

    def roundabout(self: AdaptedLayer, *args: Any) -> Tensor:
        y = real(self, *args)
        return (y + 0.1) - 0.1 if self._state.now().disabled else y

    monkeypatch.setattr(AdaptedLayer, "forward", roundabout)
    caught(lambda: guards.disabled_is_the_base(mlp, VERA, X), r"disabled is not the base \(merged=False\)")


def test_planted_wrapper_that_is_skipped(monkeypatch: Patch) -> None:
    """As torch's fast path does: the weights of the parts are read, and the parts are never called."""
    monkeypatch.setattr(tree, "_set_fast_path", lambda module: None)
    monkeypatch.setattr("kilotune.layers.adapted.in_forward", lambda: False)  # they would be read with the adapters
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = get_peft_model(nn.Sequential(layer), VeraConfig(r=2, target_modules=["linear1"]))
    z = torch.linspace(-1, 1, 64).view(2, 4, 8)
    caught(
        lambda: guards.adapters_act(model, lambda: model(z)), r"0\.linear1: its adapter never ran \(training=False\)"
    )


def test_planted_layer_whose_parameters_do_nothing(monkeypatch: Patch) -> None:
    real = Vera.delta

    def one_layer_only(self: Vera, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Any:
        delta = real(self, site, params, shared)
        return delta if site.name == "0" else None

    monkeypatch.setattr(Vera, "delta", one_layer_only)
    model = get_peft_model(mlp(), VERA)
    randomize(model)
    caught(lambda: guards.adapters_act(model, lambda: model(X)), "2: its adapter never ran")


def test_planted_copy_of_a_base_weight(monkeypatch: Patch) -> None:
    real = AdaptedLayer.__init__

    def copying(self: AdaptedLayer, base_layer: nn.Module, *rest: Any) -> None:
        real(self, base_layer, *rest)
        base_layer.weight = nn.Parameter(base_layer.weight.detach().clone())

    monkeypatch.setattr(AdaptedLayer, "__init__", copying)
    caught(lambda: guards.no_base_weight_is_copied(mlp, LORA, X), "wrapping moved a base weight")


def test_planted_unmerge_that_copies(monkeypatch: Patch) -> None:
    real = AdaptedLayer.unmerge

    def copying(self: AdaptedLayer) -> None:
        real(self)
        self.base_layer.weight = nn.Parameter(self.base_layer.weight.detach().clone(), requires_grad=False)

    monkeypatch.setattr(AdaptedLayer, "unmerge", copying)
    caught(lambda: guards.no_base_weight_is_copied(mlp, LORA, X), "unmerging moved a base weight")


def run(model: AdapterModel) -> Tensor:
    result: Tensor = model(X)
    return result


def test_planted_projection_in_the_state_dict(monkeypatch: Patch) -> None:
    real = Projections._derive

    def registering(self: Projections, *place: Any) -> Pair:
        pair = real(self, *place)
        self.register_buffer("a", pair.a)
        return pair

    monkeypatch.setattr(Projections, "_derive", registering)
    model = get_peft_model(Nested(), VeraConfig(r=23, target_modules="all-linear"))
    caught(lambda: guards.frozen_matrices_are_one(model, run), "a projection is registered")


def test_planted_projections_for_each_layer(monkeypatch: Patch) -> None:
    real = Vera.delta

    def own(self: Vera, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Any:
        delta = real(self, site, params, shared)
        return type(delta)(delta.a.clone(), delta.b.clone(), delta.mid, delta.out, delta.scale)

    monkeypatch.setattr(Vera, "delta", own)
    model = get_peft_model(Nested(), VERA)
    caught(lambda: guards.frozen_matrices_are_one(model, run), "a layer uses matrices of its own")


def test_planted_deepcopy_of_the_frozen_matrices(monkeypatch: Patch) -> None:
    real = Projections.__deepcopy__

    def copying(self: Projections, memo: dict[int, Any]) -> Projections:
        twin = real(self, memo)
        twin._copies = {key: Pair(pair.a.clone(), pair.b.clone()) for key, pair in twin._copies.items()}
        return twin

    monkeypatch.setattr(Projections, "__deepcopy__", copying)
    model = get_peft_model(Nested(), VERA)
    caught(lambda: guards.frozen_matrices_are_one(model, run), "deepcopy copied the frozen matrices")


def two(monkeypatch: Patch, settle: Callable[[AdapterModel, bool], None]) -> AdapterModel:
    monkeypatch.setattr(AdapterModel, "_set_requires_grad", settle)
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter("a")
    return model


def test_planted_inactive_adapter_with_a_zero_gradient(monkeypatch: Patch) -> None:
    """Weight decay moves what has a gradient, be it zero."""

    def zeros(self: AdapterModel, train: bool) -> None:
        for name, installed in self._installed.items():
            for _, parameter in installed.parameters():
                parameter.requires_grad_(name in self._state.active)
                parameter.grad = None if name in self._state.active else torch.zeros_like(parameter)

    model = two(monkeypatch, zeros)
    caught(lambda: guards.inactive_adapters_stay(model, X, "b"), "has a gradient")


def test_planted_weight_decay_on_an_inactive_adapter(monkeypatch: Patch) -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    real = torch.optim.AdamW.step

    def decaying(self: torch.optim.AdamW, *args: Any) -> None:
        real(self, *args)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.9)

    monkeypatch.setattr(torch.optim.AdamW, "step", decaying)
    caught(lambda: guards.inactive_adapters_stay(model, X, "b"), "was changed")


def test_planted_loading_with_another_seed(monkeypatch: Patch) -> None:
    real = Vera._source

    def other(self: Vera, site: Site, sites: Sequence[Site]) -> Any:
        source = real(self, site, sites)
        return type(source)(source.seed + 1) if self.expected_checksum else source

    monkeypatch.setattr(Vera, "verify", lambda self, shared: None)
    monkeypatch.setattr(Vera, "_source", other)
    caught(lambda: guards.saved_is_loaded(mlp, VERA, X), "the loaded adapter gives other outputs")


def test_planted_saving_in_16_bits(monkeypatch: Patch) -> None:
    real = files.save_file

    def rounded(tensors: dict[str, Tensor], *rest: Any, **options: Any) -> None:
        real({key: value.bfloat16() for key, value in tensors.items()}, *rest, **options)

    monkeypatch.setattr(files, "save_file", rounded)
    monkeypatch.setattr(files, "tensors_checksum", lambda tensors: "")
    monkeypatch.setattr(writing, "tensors_checksum", lambda tensors: "")
    caught(lambda: guards.saved_is_loaded(mlp, LORA, X), "the loaded adapter gives other outputs")


def test_planted_write_that_is_not_atomic(monkeypatch: Patch, tmp_path: Path) -> None:
    def in_place(folder: Path, config: Any, tensors: Any, metadata: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / files.WEIGHTS_NAME).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write", in_place)
    model = get_peft_model(mlp(), LORA)
    caught(
        lambda: guards.refusal_leaves_the_disk(tmp_path, lambda: model.save_pretrained(tmp_path / "x")), "half-written"
    )
    assert disk(tmp_path) != {}


@pytest.mark.parametrize("config", [VERA, LORA], ids=["vera", "lora"])
def test_the_guards_pass_without_a_fault(config: Any, tmp_path: Path) -> None:
    guards.unmerging_is_exact(mlp, config, torch.float32)
    guards.merging_is_equal(mlp, config, X)
    guards.disabled_is_the_base(mlp, config, X)
    guards.no_base_weight_is_copied(mlp, config, X)
    guards.saved_is_loaded(mlp, config, X)
    model = get_peft_model(mlp(), config, "a")
    guards.adapters_act(model, lambda: model(X))
    model.add_adapter("b", LORA)
    guards.inactive_adapters_stay(model, X, "b")
    if config is VERA:
        guards.frozen_matrices_are_one(get_peft_model(Nested(), VERA.replace(r=23)), run)
