"""The checks of this folder can fail: each fault planted here is one that some implementation has had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kilotune
from kilotune import deltas, kinds
from kilotune.deltas import LowRank
from kilotune.injection import inject
from kilotune.layers import adapted as layer
from kilotune.methods import Export, Lora, Vera, vera
from kilotune.projections.matrices import PeftSource
from tests.peft_parity.files import check_ours_to_peft, check_peft_to_ours
from tests.peft_parity.oracle import Twins, check_forward, check_gradients, check_merge, check_training, twins
from tests.peft_parity.test_selection import check_same_modules

Plant = Callable[[pytest.MonkeyPatch], None]
Change = Callable[[LowRank], LowRank]


def in_delta(method: type[Vera] | type[Lora], change: Change) -> Plant:
    """A fault in what the method makes of its parameters."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = method.delta
        patch.setattr(method, "delta", lambda self, site, params, shared: change(right(self, site, params, shared)))

    return plant


def patched(target: object, name: str, wrong: Any) -> Plant:
    return lambda patch: patch.setattr(target, name, wrong)


def _mlp(method: str, **options: Any) -> Twins:
    return twins("mlp", method, **{"r": 6, "target_modules": "all-linear", **options})


# -- outputs --------------------------------------------------------------------------------------------

FORWARD: dict[str, tuple[str, dict[str, Any], Plant]] = {
    "a gain of 1.001": ("vera", {}, patched(PeftSource, "gain", lambda self, rank, inn: 1.001)),
    "B's rows shifted": ("vera", {}, in_delta(Vera, lambda d: replace(d, b=d.b.roll(1, 0)))),
    "A's columns shifted": ("vera", {}, in_delta(Vera, lambda d: replace(d, a=d.a.roll(1, 1)))),
    "ranks of A and B out of step": ("vera", {}, in_delta(Vera, lambda d: replace(d, b=d.b.roll(1, 1)))),
    "no d": ("vera", {}, in_delta(Vera, lambda d: replace(d, mid=None))),
    "no b": ("vera", {}, in_delta(Vera, lambda d: replace(d, out=None))),
    "d turned round": ("vera", {}, in_delta(Vera, lambda d: replace(d, mid=d.mid.flip(0)))),  # type: ignore[union-attr]
    "no alpha / r": ("lora", {"lora_alpha": 12}, in_delta(Lora, lambda d: replace(d, scale=1.0))),
    "r for its root": (
        "lora",
        {"use_rslora": True},
        patched(Lora, "scale", lambda self, site: self.config.lora_alpha / self.rank(site)),
    ),
    "A rounded to bfloat16": ("lora", {}, in_delta(Lora, lambda d: replace(d, a=d.a.bfloat16().float()))),
    "biases forgotten": ("vera", {"bias": "all"}, patched(layer.AdaptedLayer, "_total_shift", lambda self, s, d: None)),
    "saved modules forgotten": (
        "lora",
        {"modules_to_save": ["head"]},
        patched(inject.SavedModule, "_current", lambda self, now: self.original_module),
    ),
}


@pytest.mark.parametrize("method, options, plant", FORWARD.values(), ids=FORWARD)
def test_planted_in_the_forward(
    method: str, options: dict[str, Any], plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = _mlp(method, **options)
    check_forward(both)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="output"):
        check_forward(both)


def test_an_adapter_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides: equality of two plain models would show nothing."""
    both = _mlp("lora")
    with torch.no_grad():
        for name, parameter in [*both.ours.adapter_parameters(), *both.theirs.named_parameters()]:
            if "lora_B" in name:
                parameter.zero_()
    with pytest.raises(AssertionError, match="moves the output by"):
        check_forward(both)


# -- gradients and training -----------------------------------------------------------------------------


def _detached(name: str) -> Change:
    return lambda d: replace(d, **{name: getattr(d, name).detach()})


def _slowed(tensor: Tensor) -> Tensor:
    """The same value, half the gradient."""
    return 0.5 * tensor + (0.5 * tensor).detach()


GRADIENTS: dict[str, tuple[str, Plant]] = {
    "d without a gradient": ("vera", in_delta(Vera, _detached("mid"))),
    "A without a gradient": ("lora", in_delta(Lora, _detached("a"))),
    "half the gradient of b": ("vera", in_delta(Vera, lambda d: replace(d, out=_slowed(d.out)))),  # type: ignore[arg-type]
    "half the gradient of B": ("lora", in_delta(Lora, lambda d: replace(d, b=_slowed(d.b)))),
    "no gradient to the input": (
        "vera",
        patched(kinds.linear.Linear, "project", lambda self, module, x, matrix: x.detach() @ matrix.T),
    ),
}


@pytest.mark.parametrize("method, plant", GRADIENTS.values(), ids=GRADIENTS)
def test_planted_in_the_gradients(method: str, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    both = _mlp(method)
    check_gradients(both)
    plant(monkeypatch)
    check_forward(both)  # the values are right, only what flows back is not
    with pytest.raises(AssertionError, match="gradient"):
        check_gradients(both)


def test_planted_a_base_weight_that_trains() -> None:
    both = _mlp("vera")
    both.ours.get_base_model().first.base_layer.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="frozen tensors with a gradient"):
        check_gradients(both)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_planted_decay_towards_the_base_bias(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained bias kept as a difference would decay to the base's bias, not to zero as PEFT's."""
    check_training(_mlp("lora", bias="all"), optimizer)
    right = layer.Slot.__init__

    def kept_as_a_difference(self: Any, site: Any, method: Any, shared: Any, params: Mapping[str, Any]) -> None:
        right(self, site, method, shared, params)
        if "bias" in params:
            self.offset = params["bias"].detach().clone()

    monkeypatch.setattr(layer.Slot, "__init__", kept_as_a_difference)
    both = _mlp("lora", bias="all")
    with torch.no_grad():
        for adapted in both.ours.adapted_layers().values():
            slot = adapted.slot("default")
            if slot.trained_bias is not None:
                slot.bias -= slot.offset
    monkeypatch.setattr(
        layer.Slot,
        "trained_bias",
        property(lambda self: self._parameters["bias"] + self.offset if "bias" in self._parameters else None),
    )
    check_forward(both)
    with pytest.raises(AssertionError, match=r"losses|value after"):
        check_training(both, optimizer)


# -- merging --------------------------------------------------------------------------------------------


def _subtracting(self: layer.AdaptedLayer) -> None:
    """Unmerging as PEFT does it: the base's bits are not what they were."""
    if not self._merged:
        return
    merged = [self.slot(name).delta() for name in self._merged if self.slot(name) is not None]  # type: ignore[union-attr]
    weight = self._storage.read(self.base_layer).detach()
    for delta in merged:
        if delta is not None:
            weight = weight - self._kind.native(self.base_layer, delta.weight_change(weight)).detach()
    bias = self._kept.get("bias")
    self._storage.write(self.base_layer, weight, None if bias is None else bias.detach())
    self._kept, self._merged = {}, ()


def _turned(self: LowRank, weight: Tensor) -> Tensor:
    return -deltas.low_rank_matrix(self.a, self.b, self.mid, self.out, self.scale, weight.dtype)


MERGING: dict[str, tuple[str, dict[str, Any], Plant]] = {
    "unmerging by subtraction": ("lora", {}, patched(layer.AdaptedLayer, "unmerge", _subtracting)),
    "the sign": ("vera", {}, patched(LowRank, "weight_change", _turned)),
    "the scale left out": (
        "lora",
        {"lora_alpha": 12},
        patched(LowRank, "weight_change", lambda self, weight: self.b @ self.a),
    ),
    "biases not merged": ("vera", {"bias": "vera_only"}, patched(layer.Slot, "trained_bias", None)),
}


@pytest.mark.parametrize("method, options, plant", MERGING.values(), ids=MERGING)
def test_planted_in_merging(
    method: str, options: dict[str, Any], plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_merge(_mlp(method, **options))
    both = _mlp(method, **options)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_merge(both)


def test_planted_a_transposed_weight_merged_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square Conv1D layers fit both ways, so only the numbers tell."""
    options: dict[str, Any] = {"r": 4, "target_modules": ["attn.c_proj"]}
    check_merge(twins("gpt2", "lora", **options))
    both = twins("gpt2", "lora", **options)
    check_forward(both)
    monkeypatch.setattr(kinds.conv1d.Conv1D, "native", lambda self, module, matrix: matrix)
    monkeypatch.setattr(kinds.conv1d.Conv1D, "canonical", lambda self, module, weight: weight)
    with pytest.raises(AssertionError):
        check_merge(both)


# -- targets and files ----------------------------------------------------------------------------------


def test_planted_an_output_layer_among_all_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    check_same_modules("llama", "lora", target_modules="all-linear")
    monkeypatch.setattr(inject, "_output_names", lambda root: frozenset())
    with pytest.raises(AssertionError, match="modules taken of llama"):
        check_same_modules("llama", "lora", target_modules="all-linear")


def _without_scaling(*args: Any) -> Export:
    """d as it is, although A carries the gain of the largest in."""
    method, sites, params, shared = args
    right = _RIGHT_EXPORT(method, sites, params, shared)
    plain = {f"{name}.vera_lambda_d": own["vera_lambda_d"].detach() for name, own in params.items()}
    return replace(right, tensors={**right.tensors, **plain})


def _blocks_out_of_order(*args: Any) -> Export:
    right = _RIGHT_EXPORT(*args)
    d = {k: v.roll(5) if k.endswith("vera_lambda_d") else v for k, v in right.tensors.items()}
    return replace(right, tensors=d)


_RIGHT_EXPORT = vera._with_portable_projections
EXPORTS: dict[str, tuple[dict[str, Any], Any]] = {
    "no scaling of d": ({}, _without_scaling),
    "blocks out of order": ({"sharing": "shape"}, _blocks_out_of_order),
}


@pytest.mark.parametrize("options, wrong", EXPORTS.values(), ids=EXPORTS)
def test_planted_in_the_export(
    options: dict[str, Any], wrong: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = kilotune.VeraConfig(r=5, save_projection=True, **options)
    check_ours_to_peft("mlp", config, tmp_path / "right")
    monkeypatch.setattr(vera, "_with_portable_projections", wrong)
    with pytest.raises(AssertionError, match="output"):
        check_ours_to_peft("mlp", config, tmp_path / "wrong")


def test_planted_a_key_that_peft_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = kilotune.LoraConfig(r=5)
    monkeypatch.setattr(Lora, "keys", {"lora_A": "lora_A.weight", "lora_B": "lora_C.weight"})
    with pytest.raises((AssertionError, UserWarning), match=r"lora_B|missing"):  # PEFT warns, which is an error here
        check_ours_to_peft("mlp", config, tmp_path)


def test_planted_in_reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A of a file read with the gain of the portable matrices."""
    options: dict[str, Any] = {"r": 5, "target_modules": "all-linear"}
    check_peft_to_ours("mlp", "vera", torch.float32, options, tmp_path / "right")
    from kilotune.projections.matrices import StoredSource

    monkeypatch.setattr(StoredSource, "gain", lambda self, rank, inn: (6 / inn) ** 0.5)
    with pytest.raises(AssertionError, match="output"):
        check_peft_to_ours("mlp", "vera", torch.float32, options, tmp_path / "wrong")
