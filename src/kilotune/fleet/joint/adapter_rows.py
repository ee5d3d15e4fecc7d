"""The adapters of a joint training as rows of numbers, and AdamW on many of them at once.

::

    values, m, v, best (capacity, length)    a row is a user's; one step takes some of them, each with its own
                                             step count, rate, clipping

What is done to a row is what ``torch.optim.AdamW`` and ``clip_grad_norm_`` do to the parameters of a lone adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from ...deltas import Role
from ...layers.slot import BIAS
from ...layers.stacked_sites import start
from ..bank.forms import ResidentForm
from .settings import FleetSettings

__all__ = ["Rows", "start_row"]

CLIP_EPS = 1e-6  # clip_grad_norm_'s


def start_row(form: ResidentForm, seed: int, dtype: torch.dtype) -> Tensor:
    """The row (length,) that ``torch.manual_seed(seed); get_peft_model(base, form.config)`` would start with."""
    layers = form.installed.layers
    device = next(iter(layers.values())).compute_device()
    cuda = [device] if device.type == "cuda" else []
    parts = []
    with torch.no_grad(), torch.random.fork_rng(cuda):
        torch.manual_seed(seed)
        for layer, slot in form.slots.items():
            values = {} if slot.method is None else start(slot.method, slot.site, slot.shared)
            bias = layers[layer].base_bias()
            if bias is not None and BIAS not in values:
                values[BIAS] = bias
            parts += [values[place.key].reshape(-1).to(dtype) for place in form.places[layer]]
    return torch.cat(parts)


@final
class Rows:
    """All users' numbers that are in training.

    Args:
        form: what a row holds.
        settings: of the optimizer.
        dtype: of the rows.
        device: where they are.

    """

    def __init__(self, form: ResidentForm, settings: FleetSettings, dtype: torch.dtype, device: torch.device) -> None:
        shape = (settings.at_once, form.length)
        self.values, self.m, self.v, self.best = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(4))
        self.settings = settings
        self.frozen = self._where(form, lambda key: key in form.made.method.frozen)
        # What optimizer_groups() leaves out of weight decay: biases, and scales whose neutral value is not 0.
        roles = form.made.method.roles
        self.undecayed = self._where(form, lambda key: key == BIAS or roles.get(key) in (Role.ROWS, Role.COLS))

    def _where(self, form: ResidentForm, holds: Callable[[str], bool]) -> Tensor | None:
        """(length,) true where a parameter's name is one of those; None where none is."""
        mask = torch.zeros(form.length, dtype=torch.bool)
        for place in form.all_places():
            mask[place.begin : place.end] = holds(place.key)
        return mask.to(self.values.device) if bool(mask.any()) else None

    def begin(self, slot: int, row: Tensor) -> None:
        """A new user's row."""
        for tensor in (self.m, self.v, self.best):
            tensor[slot].zero_()
        self.values[slot].copy_(row)

    def note_best(self, slot: int) -> None:
        """Keep the row as it is now."""
        self.best[slot].copy_(self.values[slot])

    def take(self, slots: Sequence[int]) -> Tensor:
        """Copies of some rows (n, length)."""
        return self.values.index_select(0, self._index(slots))

    def _index(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(slots, device=self.values.device)

    def norms(self, gradients: Tensor) -> Tensor:
        """(n,) of the gradients (n, length), of which those of what is not trained are set to 0."""
        if self.frozen is not None:
            gradients.masked_fill_(self.frozen, 0.0)
        found: Tensor = torch.linalg.vector_norm(gradients, dim=1)
        return found

    @torch.no_grad()
    def step(
        self, slots: Sequence[int], gradients: Tensor, norms: Tensor, steps: Sequence[int], rates: Sequence[float]
    ) -> None:
        """One step of AdamW for each of ``slots``.

        Args:
            slots: which rows, each once.
            gradients: (n, length); changed.
            norms: (n,) of these.
            steps: of each user, the one that is made now, from 1.
            rates: of each user.

        """
        (beta1, beta2), eps, index = self.settings.betas, self.settings.eps, self._index(slots)
        if self.settings.max_grad_norm is not None:
            gradients.mul_((self.settings.max_grad_norm / (norms + CLIP_EPS)).clamp(max=1.0).unsqueeze(1))
        values, m, v = (tensor.index_select(0, index) for tensor in (self.values, self.m, self.v))
        if self.settings.weight_decay:
            self._decay(values, rates)
        m.lerp_(gradients, 1 - beta1)
        v.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        size = self._column([rate / (1 - beta1**step) for rate, step in zip(rates, steps)])
        root = self._column([(1 - beta2**step) ** 0.5 for step in steps])
        values.sub_(m.div(v.sqrt().div_(root).add_(eps)).mul_(size))
        for whole, part in ((self.values, values), (self.m, m), (self.v, v)):
            whole.index_copy_(0, index, part)

    def _decay(self, values: Tensor, rates: Sequence[float]) -> None:
        kept = self._column([1 - rate * self.settings.weight_decay for rate in rates])
        spared = [mask for mask in (self.undecayed, self.frozen) if mask is not None]
        if not spared:
            values.mul_(kept)
            return
        mask = torch.stack(spared).any(0)
        values.copy_(torch.where(mask, values, values * kept))

    def _column(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=self.values.dtype, device=self.values.device).unsqueeze(1)
