"""Adapters whose numbers are one vector for the whole model, in one batch: run as one, and each with its own vector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kilotune import PeftModel, get_config, get_peft_model
from kilotune.layers.route import Stacked
from kilotune.methods import Shared
from tests.layers.test_routing import CONFIGS, rows_equal, with_adapters
from tests.support.models import Nested, randomize

UNI = CONFIGS["unilora"]


def cohorts(model: PeftModel, names: list[str | None]) -> list[tuple[str, ...]]:
    """Who runs as one in a batch of these rows."""
    with model.route(names):
        state = model._state.now()
        assert state.route is not None
        return [cohort.names for cohort in state.route.cohorts]


def test_they_run_as_one() -> None:
    model = with_adapters(Nested(), [UNI] * 3)
    assert cohorts(model, ["a2", None, "a0", "a1"]) == [("a2", "a0", "a1")]
    assert len(cohorts(with_adapters(Nested(), [CONFIGS["intrinsic"]] * 2), ["a0", "a1"])) == 2  # a whole matrix each


def test_other_indices_run_apart(tmp_path: Path) -> None:
    """Files that bring their indices have one configuration, and the indices are each one's own."""
    config = get_config("unilora", r=3, theta_d_length=16, target_modules="all-linear", save_indices=True)
    for seed in (1, 2):
        model = get_peft_model(Nested(), config.replace(proj_seed=seed))
        randomize(model, seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        weights, said = tmp_path / str(seed) / "adapter_model.safetensors", tmp_path / str(seed) / "adapter_config.json"
        save_file(load_file(weights), weights)  # as PEFT writes it: without checksums
        said.write_text(json.dumps({**json.loads(said.read_text()), "proj_seed": 1}))
    model = PeftModel.from_pretrained(Nested(), tmp_path / "1", "a0").eval()
    for name, seed in (("a1", 2), ("a2", 1)):
        model.load_adapter(tmp_path / str(seed), name)
    assert model.peft_config["a0"] == model.peft_config["a1"]
    randomize(model, "a2")
    rows_equal(model, ["a0", "a1", None, "a2"], torch.randn(4, 3, 6))


def test_the_rows_of_two_dtypes_run_apart() -> None:
    model = with_adapters(Nested(), [UNI] * 2)
    for _, parameter in model.adapter_parameters("a1"):
        parameter.data = parameter.data.double()
    rows_equal(model, ["a0", "a1", "a0"], torch.randn(3, 4, 6))


def test_anothers_vector_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: each row gets the vector of the next adapter."""
    model, x = with_adapters(Nested(), [UNI] * 3), torch.randn(3, 4, 6)
    rows_equal(model, ["a0", "a1", "a2"], x)
    right = Stacked.shared

    def wrong(self: Stacked, layer: object, which: int | None = None) -> Shared:
        found = right(self, layer, which)  # type: ignore[arg-type]
        return found.holding({key: value.roll(1, 0) for key, value in found.trained.items()})

    monkeypatch.setattr(Stacked, "shared", wrong)
    with pytest.raises(AssertionError, match="row 0 is not a0's"):
        rows_equal(model, ["a0", "a1", "a2"], x)
