"""The digits: sizes, split, turning, batches."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from kilotune.errors import MissingExtraError
from kilotune.experiments.images.digits_data import Data, ImageSet, digits


@pytest.fixture(scope="module")
def data() -> Data:
    return digits()


def test_digits_are_all_there_once_and_split_by_class(data: Data) -> None:
    assert len(data.train) + len(data.test) == 1797
    rows = [picture.numpy().tobytes() for part in (data.train, data.test) for picture in part.images]
    assert len(set(rows)) == 1797
    everywhere = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    assert everywhere.tolist() == np.bincount(load_digits().target).tolist()
    assert (torch.bincount(data.test.labels).double() / everywhere - 1 / 3).abs().max() < 0.01
    assert data.class_names == tuple("0123456789")


def test_digits_are_scaled_up_in_three_equal_channels(data: Data) -> None:
    images = data.train.images
    assert images.shape[1:] == (3, 32, 32)
    assert images.dtype == torch.uint8
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    assert (images.min(), images.max()) == (0, 255)
    small = sorted(load_digits().images.mean(axis=(1, 2)) / 16)
    large = sorted((torch.cat([images, data.test.images]).double().mean(dim=(1, 2, 3)) / 255).tolist())
    assert np.allclose(small, large, atol=0.03)


def test_the_split_is_always_the_same(data: Data) -> None:
    torch.manual_seed(1)
    again = digits()
    assert torch.equal(again.test.images, data.test.images)
    assert torch.equal(again.test.labels, data.test.labels)


def test_turning_turns_the_chosen_classes_counter_clockwise() -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 4:8, 14:18] = 200  # a block at the top
    turned = ImageSet(images, torch.tensor([3, 5])).turned([3], 90)
    assert torch.equal(turned.images[1], images[1])
    assert turned.images[0, :, 14:18, 4:8].min() == 200  # now at the left
    assert turned.images[0].double().sum() == images[0].double().sum()
    assert torch.equal(images[0], images[1]), "the pictures given were changed"


def test_turning_by_nothing_changes_nothing(data: Data) -> None:
    for degrees in (0.0, 360.0, -720.0):
        assert torch.equal(data.test.turned([1, 2], degrees).images, data.test.images)
    assert torch.equal(data.test.turned([], 30.0).images, data.test.images)


def test_turning_many_pictures_is_turning_each(data: Data) -> None:
    labels = torch.zeros(len(data.train), dtype=torch.int64)  # more than one batch of them
    together = ImageSet(data.train.images, labels).turned([0], 30.0)
    for row in (0, 1023, 1024, len(labels) - 1):
        alone = ImageSet(data.train.images[row : row + 1], labels[:1]).turned([0], 30.0)
        assert torch.equal(together.images[row], alone.images[0])


def test_only_keeps_the_classes_and_the_order(data: Data) -> None:
    kept = data.train.only([7, 2])
    wanted = [row for row, label in enumerate(data.train.labels.tolist()) if label in (2, 7)]
    assert torch.equal(kept.images, data.train.images[wanted])
    assert set(kept.labels.tolist()) == {2, 7}


def test_batches_are_scaled_and_ordered(data: Data) -> None:
    order = torch.tensor([5, 0, 9])
    (first, labels), (second, _) = data.test.batches(2, order)
    assert first.shape == (2, 3, 32, 32)
    assert second.shape == (1, 3, 32, 32)
    assert torch.equal(labels, data.test.labels[[5, 0]])
    assert torch.allclose(first[0], data.test.images[5] / 127.5 - 1)
    assert first.min() >= -1
    assert first.max() <= 1


def test_split_takes_a_share_of_every_class() -> None:
    labels = torch.tensor([0] * 8 + [1] * 4)
    images = torch.arange(12, dtype=torch.uint8).reshape(12, 1, 1, 1).expand(12, 3, 32, 32)
    rest, part = ImageSet(images, labels).split(0.25, 2, seed=0)
    assert torch.bincount(part.labels).tolist() == [2, 1]
    assert sorted(rest.images[:, 0, 0, 0].tolist() + part.images[:, 0, 0, 0].tolist()) == list(range(12))


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'scikit-learn': pip install 'kilotune\[demo\]'"):
        digits()
