"""Counts by memory location: what is shared counts once, on real models, on meta, and on tied weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kilotune import LoraConfig, VeraConfig, count_parameters, get_peft_model
from kilotune.model.parameter_report import readable_bytes
from tests.support.models import Nested, mlp, tiny_llama


def four_layers() -> nn.Sequential:
    """80-120-120-120-10."""
    return nn.Sequential(nn.Linear(80, 120), nn.Linear(120, 120), nn.Linear(120, 120), nn.Linear(120, 10))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_four_layer_example(device: str) -> None:
    with torch.device(device):
        plain, one, other = four_layers(), four_layers(), four_layers()
    assert count_parameters(plain).total == count_parameters(plain).trainable == 39_970
    lora = get_peft_model(one, LoraConfig(r=16, target_modules="all-linear")).report()
    assert (lora.trainable, lora.frozen_base, lora.frozen_shared, lora.pairs) == (12_960, 39_970, 0, 0)
    vera = get_peft_model(other, VeraConfig(r=16, target_modules="all-linear", sharing="shape")).report()
    assert (vera.trainable, vera.frozen_base) == (434, 39_970)
    assert (vera.frozen_shared, vera.pairs) == (16 * (200 + 240 + 130), 3)
    assert (vera.frozen_shared, vera.total) == (9_120, 49_524)
    assert vera.percent == pytest.approx(100 * 434 / 49_524)
    assert vera.percent_of_parameters == pytest.approx(100 * 434 / 40_404)
    assert vera.trainable_bytes == 4 * 434
    assert vera.total_bytes == 4 * 49_524


def test_nested_pairs_count_once_whatever_uses_them() -> None:
    model = get_peft_model(four_layers(), VeraConfig(r=16, target_modules="all-linear"), "a")
    model.add_adapter("b", VeraConfig(r=8, target_modules=["3"]))
    report = model.report()
    assert (report.frozen_shared, report.pairs) == (16 * (120 + 120), 1)
    assert report.trainable == 434
    assert report.frozen_adapters == 8 + 10
    assert report.to_dict()["total"] == report.total == 39_970 + 434 + 18 + 3_840


def test_tied_weights_count_once() -> None:
    pytest.importorskip("transformers")
    tied, free = tiny_llama(tie=True), tiny_llama(tie=False)
    assert count_parameters(free).total - count_parameters(tied).total == 32 * 16
    model: Any = get_peft_model(tied, LoraConfig(r=2, target_modules=["lm_head"]))
    assert model.report().frozen_base == count_parameters(tiny_llama(tie=True)).total
    assert model.report().trainable == 2 * (16 + 32)


def test_modules_trained_whole_count_beside_the_frozen_ones() -> None:
    model = get_peft_model(Nested(), VeraConfig(r=2, target_modules=["stem"], modules_to_save=["head"]))
    report = model.report()
    assert report.trainable == 2 + 8 + 8 * 3 + 3
    assert report.frozen_base == sum(p.numel() for p in Nested().parameters())
    assert model.get_nb_trainable_parameters() == (report.trainable, report.trainable + report.frozen_base)


def test_merging_and_disabling_do_not_change_the_counts_of_what_trains() -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules="all-linear"))
    before = model.report()
    model.merge_adapter()
    assert model.report().trainable == before.trainable
    model.unmerge_adapter()
    with model.disable_adapter():
        assert model.report() == before


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (9_449_472, "9.45 MB"), (302e6, "302 MB"), (9.4e12, "9.4 TB")],
)
def test_bytes_are_readable(count: float, text: str) -> None:
    assert readable_bytes(count) == text
