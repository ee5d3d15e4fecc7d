"""How the learning rates of the experiment were chosen; run ``python -m kilotune.experiments.cnn.tuning``.

A quarter of the adapted classes' training pictures is held out. Each method is run at several rates on the
rest, over three seeds, and judged by the cross-entropy on what was held out. The test pictures, on which the
experiment reports, are not looked at here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from statistics import fmean
from types import MappingProxyType

from torch import nn

from ...errors import KilotuneError
from ..images.convnet import VERA_WIDTHS, ConvNet, build
from ..images.digits_data import ImageSet, digits
from ..images.settings import Recipe
from ..images.training import logits_of, one_thread, train
from .experiment import adapted
from .settings import CnnSettings

__all__ = ["RATES", "held_out_loss", "main"]

RATES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "vera": (3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1),
        "lora": (3e-4, 1e-3, 2e-3, 3e-3, 5e-3),
        "full": (1e-4, 3e-4, 1e-3, 3e-3),
    }
)
HELD_OUT_SHARE = 0.25
SEEDS = (100, 101, 102)
"""Not the seeds of the experiment: 0, 1 and 2 by default."""


def held_out_loss(method: str, net: ConvNet, recipe: Recipe, fit: ImageSet, held: ImageSet, seed: int) -> float:
    """Cross-entropy on ``held`` of a copy of ``net`` that was adapted to ``fit``; infinite if it diverged."""
    copied = copy.deepcopy(net)
    model = copied if method == "full" else adapted(method, copied, seed)
    try:
        train(model, fit, recipe, seed)
    except KilotuneError:
        return math.inf
    return nn.functional.cross_entropy(logits_of(model, held), held.labels).item()


def main(say: Callable[[str], object] = print) -> None:
    """Say the held-out loss of every method and rate: each seed's, and their mean."""
    settings = CnnSettings()
    with one_thread():
        data = digits()
        nets = [build(VERA_WIDTHS, seed) for seed in SEEDS]
        for net, seed in zip(nets, SEEDS, strict=True):
            train(net, data.train, settings.pretraining, seed)
        adapting = data.train.only(settings.classes).turned(settings.classes, settings.rotation)
        fit, held = adapting.split(HELD_OUT_SHARE, 10, seed=1)
        say(f"{len(fit)} pictures to adapt to, {len(held)} held out, {settings.adapt_epochs} epochs")
        for method, rates in RATES.items():
            for rate in rates:
                recipe = Recipe(rate, settings.adapt_epochs, settings.batch)
                pairs = zip(nets, SEEDS, strict=True)
                losses = [held_out_loss(method, net, recipe, fit, held, seed) for net, seed in pairs]
                each = "  ".join(f"{loss:.4f}" for loss in losses)
                say(f"{method:5} rate {rate:<7g} held-out loss {fmean(losses):.4f}   ({each})")


if __name__ == "__main__":
    main()
