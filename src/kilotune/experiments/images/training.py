"""Training and measuring, the same for every way of adapting, and the same numbers for the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...errors import DivergedError
from .digits_data import ImageSet
from .settings import Recipe

__all__ = ["accuracy_among", "count_steps", "logits_of", "one_thread", "per_class", "thin", "train"]

EVALUATION_BATCH = 256
TICK_STEPS = 25


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: at 4 pictures per step it is as fast, and sums do not depend on the core count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_steps(pictures: int, recipe: Recipe) -> int:
    """Optimizer steps that :func:`train` makes on so many pictures."""
    return math.ceil(pictures / recipe.batch) * recipe.epochs


def train(
    model: nn.Module, images: ImageSet, recipe: Recipe, seed: int, tick: Callable[[int], None] | None = None
) -> list[float]:
    """Train whatever in ``model`` requires a gradient, on cross-entropy; shuffles with its own generator.

    Args:
        model: maps (n, 3, 32, 32) to logits (n, classes).
        images: what to train on.
        recipe: learning rate, epochs, batch.
        seed: of the order of the pictures.
        tick: told now and then how many steps were made since it was last called.

    Returns:
        The loss of every step.

    Raises:
        DivergedError: the loss stopped being a finite number.
    """
    optimizer = recipe.optimizer_of([p for p in model.parameters() if p.requires_grad])
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    for _ in range(recipe.epochs):
        for pictures, labels in images.batches(recipe.batch, torch.randperm(len(images), generator=order)):
            loss = nn.functional.cross_entropy(model(pictures), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            if tick is not None and len(losses) % TICK_STEPS == 0:
                _check_finite(losses, recipe)
                tick(TICK_STEPS)
    _check_finite(losses, recipe)
    if tick is not None:
        tick(len(losses) % TICK_STEPS)
    model.eval()
    return losses


def _check_finite(losses: Sequence[float], recipe: Recipe) -> None:
    if losses and not math.isfinite(losses[-1]):
        step = next(i for i, loss in enumerate(losses, start=1) if not math.isfinite(loss))
        raise DivergedError(
            f"training diverged: the loss became {losses[step - 1]} at step {step}, at learning rate"
            f" {recipe.rate:g}; choose a smaller one"
        )


@torch.no_grad()
def logits_of(model: nn.Module, images: ImageSet) -> Tensor:
    """Logits (N, classes) of every picture, in order, with the model in evaluation mode."""
    model.eval()
    return torch.cat([model(pictures) for pictures, _ in images.batches(EVALUATION_BATCH)])


def per_class(logits: Tensor, labels: Tensor, classes: int) -> list[float]:
    """Share of each class's pictures that are answered right; logits (N, classes), labels (N,)."""
    right = logits.argmax(dim=1) == labels
    return [right[labels == label].double().mean().item() for label in range(classes)]


def accuracy_among(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> float:
    """Accuracy on these classes' pictures when no other class may be answered."""
    among = torch.tensor(sorted(classes))
    rows = torch.isin(labels, among)
    answers = among[logits[rows][:, among].argmax(dim=1)]
    return (answers == labels[rows]).double().mean().item()


def thin(values: Sequence[float], points: int) -> list[tuple[int, float]]:
    """At most ``points`` pairs (step, mean of the values since the pair before): a curve to draw."""
    size = max(1, math.ceil(len(values) / points))
    chunks = [values[start : start + size] for start in range(0, len(values), size)]
    return [(min(len(values), (i + 1) * size), sum(chunk) / len(chunk)) for i, chunk in enumerate(chunks)]
