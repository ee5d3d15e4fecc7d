"""The adapters of one form that are in training as rows of numbers, and AdamW on many of them at once.

::

    values, m, v, best (capacity, length)    a row is an adapter's; one step takes some of them, each with its own
                                             step count, rate, clipping
    gradients                                of those alone that have learned something since their last step

What is done to a row is what ``torch.optim.AdamW`` and ``clip_grad_norm_`` do to the parameters of a lone adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from ...deltas import Role
from ...errors import ConfigError
from ...injection.installed_adapter import MODEL
from ...layers.slot import BIAS
from ...layers.stacked_sites import start
from ..bank.forms import ResidentForm
from .adam import Adam

__all__ = ["STATE", "Rows", "start_row"]

STATE = ("values", "m", "v")
"""What a row is between two steps, beside its best."""
CLIP_EPS = 1e-6  # clip_grad_norm_'s


def start_row(form: ResidentForm, seed: int, dtype: torch.dtype) -> Tensor:
    """The row (length,) that ``torch.manual_seed(seed); get_peft_model(base, form.config)`` would start with."""
    layers = form.installed.layers
    device = next(iter(layers.values())).compute_device()
    cuda = [device] if device.type == "cuda" else []
    parts = []
    with torch.no_grad(), torch.random.fork_rng(cuda):
        # torch.manual_seed notes for each kind of device that there could be what has called it, which takes long.
        alone = all(layer.compute_device().type == "cpu" for layer in layers.values())
        (torch.default_generator.manual_seed if alone else torch.manual_seed)(seed)
        sites = [slot.site for slot in form.slots.values() if slot.method is not None]
        model = form.made.method.init_model(sites) if form.places[MODEL] else {}
        shared = form.installed.shared.holding(model)
        parts += [model[place.key].reshape(-1).to(dtype) for place in form.places[MODEL]]
        for layer, slot in form.slots.items():
            values = {} if slot.method is None else start(slot.method, slot.site, shared)
            bias = layers[layer].base_bias()
            if bias is not None and BIAS not in values:
                values[BIAS] = bias
            parts += [values[place.key].reshape(-1).to(dtype) for place in form.places[layer]]
    return torch.cat(parts)


@final
class _Learned(NamedTuple):
    """One adapter's gradient: a row of what a pass has made. norms: (n,) of those; None where they are not known."""

    gradients: Tensor
    row: int
    norms: Tensor | None


@final
class Rows:
    """The numbers of all adapters of one form that are in training.

    Args:
        form: what a row holds.
        capacity: how many rows there are; :meth:`grow` makes it more.
        dtype: of the rows.
        device: where they are.

    """

    def __init__(self, form: ResidentForm, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (capacity, form.length)
        self.values, self.m, self.v, self.best = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(4))
        self.form = form
        self._learned: dict[int, _Learned] = {}
        self.frozen = self._where(form, lambda key: key in form.made.method.frozen)
        # What optimizer_groups() leaves out of weight decay: biases, and scales whose neutral value is not 0.
        roles = form.made.method.roles
        self.undecayed = self._where(form, lambda key: key == BIAS or roles.get(key) in (Role.ROWS, Role.COLS))

    @property
    def capacity(self) -> int:
        """How many rows there are."""
        return self.values.shape[0]

    def state(self) -> dict[str, Tensor]:
        """By name, all that a row is between two steps: (capacity, length) each."""
        return {"values": self.values, "m": self.m, "v": self.v, "best": self.best}

    def grow(self, capacity: int) -> None:
        """Have room for so many rows; those that are there stay."""
        more = capacity - self.capacity
        self.values, self.m, self.v, self.best = (
            torch.cat([tensor, tensor.new_zeros(more, tensor.shape[1])])
            for tensor in (self.values, self.m, self.v, self.best)
        )

    def _where(self, form: ResidentForm, holds: Callable[[str], bool]) -> Tensor | None:
        """(length,) true where a parameter's name is one of those; None where none is."""
        mask = torch.zeros(form.length, dtype=torch.bool)
        for place in form.all_places():
            mask[place.begin : place.end] = holds(place.key)
        return mask.to(self.values.device) if bool(mask.any()) else None

    def begin(self, slot: int, row: Tensor) -> None:
        """A new adapter's row."""
        self.forget([slot])
        for tensor in (self.m, self.v, self.best):
            tensor[slot].zero_()
        self.values[slot].copy_(row)

    def check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse numbers that are not a row's; none at all are.

        Raises:
            ConfigError: these are another form's.

        """
        shape = self.values.shape[1:]
        wrong = [name for name in STATE if name not in tensors or tensors[name].shape != shape]
        if tensors and wrong:
            raise ConfigError(f"state: {wrong[0]}: expected {shape[0]} numbers, as this configuration has")

    def take_state(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """What :meth:`check_state` has seen, instead of the row's start."""
        for name in STATE:
            self.state()[name][slot].copy_(tensors[name])

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

    # -- gradients ---------------------------------------------------------------------------------

    def learn(self, slots: Sequence[int], gradients: Tensor, norms: Tensor | None = None) -> None:
        """Add to what some rows have learned. gradients: (n, length), taken over; norms: (n,) of these."""
        for row, slot in enumerate(slots):
            known = self._learned.get(slot)
            if known is None:
                self._learned[slot] = _Learned(gradients, row, norms)
            else:
                total = known.gradients[known.row] + gradients[row]
                self._learned[slot] = _Learned(total.unsqueeze(0), 0, None)

    def has_learned(self, slot: int) -> bool:
        """Whether a row has a gradient."""
        return slot in self._learned

    def gradient(self, slot: int) -> Tensor | None:
        """A copy of a row's gradient (length,); None where it has none."""
        known = self._learned.get(slot)
        return None if known is None else known.gradients[known.row].clone()

    def learned_norms(self, slots: Sequence[int]) -> list[float]:
        """The L2 norms of the gradients of rows that have one."""
        found = []
        for slot in slots:
            gradients, row, norms = self._learned[slot]
            found.append(torch.linalg.vector_norm(gradients[row]) if norms is None else norms[row])
        return [float(norm) for norm in torch.stack(found).tolist()]

    def forget(self, slots: Sequence[int]) -> None:
        """Drop the gradients of some rows."""
        for slot in slots:
            self._learned.pop(slot, None)

    def _taken(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(gradients (n, length) that may be changed, their norms (n,)), which are not kept any longer."""
        found = [self._learned.pop(slot) for slot in slots]
        first = found[0]
        whole = all(one.gradients is first.gradients and one.row == i for i, one in enumerate(found))
        if whole and len(found) == first.gradients.shape[0]:  # one pass of the very same: no copy
            gradients, norms = first.gradients, first.norms
        else:
            gradients = torch.stack([one.gradients[one.row] for one in found])
            known = [one.norms[one.row] for one in found if one.norms is not None]
            norms = torch.stack(known) if len(known) == len(found) else None
        return gradients, torch.linalg.vector_norm(gradients, dim=1) if norms is None else norms

    @torch.no_grad()
    def step(self, slots: Sequence[int], steps: Sequence[int], how: Sequence[Adam]) -> None:
        """One step of AdamW for each of ``slots`` with what it has learned, which is then gone.

        Args:
            slots: which rows, each once.
            steps: of each, the number of the step that is made now, from 1.
            how: of each.

        """
        kinds: dict[tuple[object, ...], list[int]] = {}
        for i, one in enumerate(how):
            kinds.setdefault(one.kind, []).append(i)
        for own in kinds.values():
            self._step([slots[i] for i in own], [steps[i] for i in own], [how[i] for i in own])

    def _step(self, slots: Sequence[int], steps: Sequence[int], how: Sequence[Adam]) -> None:
        """Of a kind: all but the rates is the same."""
        (beta1, beta2), eps, most = how[0].betas, how[0].eps, how[0].max_grad_norm
        gradients, norms = self._taken(slots)
        index, rates = self._index(slots), [one.rate for one in how]
        if most is not None:
            gradients.mul_((most / (norms + CLIP_EPS)).clamp(max=1.0).unsqueeze(1))
        values, m, v = (tensor.index_select(0, index) for tensor in (self.values, self.m, self.v))
        if how[0].weight_decay:
            self._decay(values, rates, how[0].weight_decay)
        m.lerp_(gradients, 1 - beta1)
        v.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        size = self._column([rate / (1 - beta1**step) for rate, step in zip(rates, steps)])
        root = self._column([(1 - beta2**step) ** 0.5 for step in steps])
        values.sub_(m.div(v.sqrt().div_(root).add_(eps)).mul_(size))
        for whole, part in ((self.values, values), (self.m, m), (self.v, v)):
            whole.index_copy_(0, index, part)

    def _decay(self, values: Tensor, rates: Sequence[float], weight_decay: float) -> None:
        kept = self._column([1 - rate * weight_decay for rate in rates])
        spared = [mask for mask in (self.undecayed, self.frozen) if mask is not None]
        if not spared:
            values.mul_(kept)
            return
        mask = torch.stack(spared).any(0)
        values.copy_(torch.where(mask, values, values * kept))

    def _column(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=self.values.dtype, device=self.values.device).unsqueeze(1)
