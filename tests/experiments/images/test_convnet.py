"""The tutorials' network, and its parameter counts in both ways of counting."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from kilotune.experiments.cnn.experiment import adapted, count
from kilotune.experiments.cnn.results import Counts
from kilotune.experiments.images.convnet import LORA_WIDTHS, VERA_WIDTHS, ConvNet, build

CONVOLUTIONS = (3 * 6 * 25 + 6) + (6 * 16 * 25 + 16) + (16 * 32 * 25 + 32)


def base_numbers(widths: tuple[int, ...]) -> int:
    return CONVOLUTIONS + sum(inn * out + out for inn, out in pairwise(widths))


@pytest.mark.parametrize(("widths", "numbers"), [(VERA_WIDTHS, 89_118), (LORA_WIDTHS, 74_838)])
def test_the_networks_have_the_tutorials_numbers(widths: tuple[int, ...], numbers: int) -> None:
    net = ConvNet(widths)
    assert sum(p.numel() for p in net.parameters()) == base_numbers(widths) == numbers
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_third_convolution_is_counted_and_never_called() -> None:
    net = build(VERA_WIDTHS, 0)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = net(images)
    torch.nn.init.constant_(net.conv3_unused.weight, torch.nan)
    assert torch.equal(net(images), before)
    net(images).sum().backward()
    assert net.conv3_unused.weight.grad is None
    assert net.conv2.weight.grad is not None


def test_a_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = build(VERA_WIDTHS, 1), build(VERA_WIDTHS, 1), build(VERA_WIDTHS, 2)
    adapted("lora", copy.deepcopy(one), 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.fc1.weight, same.fc1.weight)
    assert not torch.equal(one.fc1.weight, other.fc1.weight)


def test_counts_are_the_tutorials_and_those_by_memory_location() -> None:
    vera, side_by_side, lora = count()
    assert (vera.trainable, vera.frozen, vera.total, vera.pairs) == (542, 89_118, 89_660, 4)
    assert f"{vera.percent:.2f}" == "0.60"
    assert (vera.shared, vera.total_by_location) == (31_552, 121_212)
    assert (lora.trainable, lora.frozen, lora.total, lora.pairs) == (3_272, 74_838, 78_110, 0)
    assert f"{lora.percent:.2f}" == "4.19"
    assert (lora.shared, lora.total_by_location) == (0, 78_110)
    assert (side_by_side.widths, side_by_side.trainable) == (VERA_WIDTHS, 4_616)
    assert [row.tutorial is not None for row in (vera, side_by_side, lora)] == [True, False, True]


def test_counts_follow_the_formulas() -> None:
    for row in count(seed=9):
        shapes = list(pairwise(row.widths))
        assert row.frozen == base_numbers(row.widths)
        if row.method == "vera":
            assert row.trainable == sum(out + 32 for _, out in shapes)
            assert row.pairs == len(set(shapes))
            assert row.shared == sum(32 * (inn + out) for inn, out in set(shapes))
        else:
            assert row.trainable == sum(4 * (inn + out) for inn, out in shapes)


def test_percentages_and_totals() -> None:
    row = Counts("vera", 32, (4, 2), trainable=10, frozen=90, shared=100, pairs=1)
    assert (row.total, row.percent) == (100, 10.0)
    assert (row.total_by_location, row.percent_by_location) == (200, 5.0)
    assert row.to_dict()["total_by_location"] == 200
