"""Images for the experiment: scikit-learn's digits, scaled up to the size of CIFAR-10's pictures.

Both data sets come as :class:`ImageSet`, 8-bit pictures (N, 3, 32, 32) with labels (N,), so that nothing
after this module knows which one it has. CIFAR-10 itself is read by :mod:`kilotune.experiments.images.cifar`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from ...errors import MissingExtraError

__all__ = ["Data", "ImageSet", "Progress", "digits"]

Progress = Callable[[str, int, int], None]
"""Told of long work: what is being done, how much is done, how much there is (0 if not known)."""

SPLIT_SEED = 0
DIGITS_TEST_SHARE = 1 / 3
TURN_BATCH = 1024


@final
@dataclass(frozen=True)
class ImageSet:
    """Pictures and their classes.

    Attributes:
        images: (N, 3, 32, 32), uint8.
        labels: (N,), int64, each a class number.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> ImageSet:
        """The pictures at these positions."""
        return ImageSet(self.images[rows], self.labels[rows])

    def only(self, classes: Iterable[int]) -> ImageSet:
        """The pictures of these classes, in their order."""
        wanted = torch.isin(self.labels, torch.tensor(sorted(classes)))
        return self.take(wanted.nonzero().flatten())

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (n, 3, 32, 32) of float32 in [-1, 1], as the tutorials scale them, and labels (n,)."""
        rows = torch.arange(len(self)) if order is None else order
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            yield self.images[chunk].to(torch.float32).div_(127.5).sub_(1.0), self.labels[chunk]

    def turned(self, classes: Iterable[int], degrees: float) -> ImageSet:
        """The same pictures, those of ``classes`` turned counter-clockwise; what comes in is black.

        The named shift that makes room for the experiment: bilinear, about the centre, ``degrees`` of 360.
        """
        rows = torch.isin(self.labels, torch.tensor(sorted(classes))).nonzero().flatten()
        if degrees % 360 == 0 or len(rows) == 0:
            return self
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]])
        images = self.images.clone()
        for start in range(0, len(rows), TURN_BATCH):  # in parts: 5,000 float pictures already take 60 MB
            chunk = rows[start : start + TURN_BATCH]
            shape = [len(chunk), 3, 32, 32]
            grid = torch.nn.functional.affine_grid(turn.expand(len(chunk), 2, 3), shape, align_corners=False)
            pictures = self.images[chunk].to(torch.float32)
            turned = torch.nn.functional.grid_sample(pictures, grid, align_corners=False)
            images[chunk] = turned.round().clamp(0, 255).to(torch.uint8)
        return ImageSet(images, self.labels)

    def split(self, share: float, classes: int, seed: int) -> tuple[ImageSet, ImageSet]:
        """(rest, part): a random ``share`` of every class goes to the part, at least one picture of each."""
        generator = np.random.default_rng(seed)
        chosen = torch.zeros(len(self), dtype=torch.bool)
        for label in range(classes):
            rows = (self.labels == label).nonzero().flatten()
            count = max(1, round(share * len(rows)))
            chosen[rows[torch.from_numpy(generator.permutation(len(rows))[:count])]] = True
        return self.take((~chosen).nonzero().flatten()), self.take(chosen.nonzero().flatten())


@final
@dataclass(frozen=True)
class Data:
    """A data set: its name, where it came from, the classes' names, and what is trained and tested on."""

    name: str
    source: str
    class_names: tuple[str, ...]
    train: ImageSet
    test: ImageSet


def digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, scaled up bilinearly to 32x32 in three channels.

    A third of each class is kept for testing; the split is always the same.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "The digits data set") from error
    bunch = load_digits()
    grey = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32))[:, None] * (255.0 / 16.0)
    large = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    everything = ImageSet(images, torch.from_numpy(np.asarray(bunch.target, dtype=np.int64)))
    train, test = everything.split(DIGITS_TEST_SHARE, 10, SPLIT_SEED)
    names = tuple(str(i) for i in range(10))
    return Data("digits", "scikit-learn's load_digits, scaled to 32x32 in three channels", names, train, test)
