"""One forward and backward of many users' rows, and what of it is each user's own.

A pass that fails is run again user by user, so that only who is broken fails; what one row does then is looked for row
by row. Nothing here changes a user's state but the last line of a training pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from ...errors import ResourceError, UnsupportedError, first_line
from ...layers.route import Cohort, Route, RoutedLayer
from ...layers.slot import Slot
from ...model.adapter_model import AdapterModel
from ..bank.forms import ResidentForm
from .adapter_rows import Rows
from .given_adapters import Beneath
from .losses import Loss, RowLoss
from .random_draws import dropped

__all__ = ["Collate", "Outcome", "Part", "Passes", "Trained"]

Collate = Callable[[list[Any]], Mapping[str, Tensor]]


@final
@dataclass(frozen=True, eq=False)
class Part:
    """A user's rows in a pass. slot: the user's row of numbers. numbers: which of the user's rows these are.

    step: the user's own, from 0, and rate: of this step.
    """

    name: str
    slot: int
    seed: int
    step: int
    rate: float
    rows: list[Any]
    numbers: list[int]


@final
@dataclass(frozen=True)
class Outcome:
    """What became of a part: its loss (summed total, count), or the error. model: it failed in model or loss."""

    part: Part
    total: float = 0.0
    count: float = 0.0
    error: str | None = None
    model: bool = False


@final
class Trained(Cohort):
    """Users in training: ``values`` (n, length) are their rows, which want gradients.

    draws: (seed, step) of each user, for dropout; None: no dropout. bounds: where each user's rows begin, and the end.
    """

    def __init__(
        self,
        form: ResidentForm,
        names: tuple[str, ...],
        values: Tensor,
        bounds: Sequence[int],
        draws: Sequence[tuple[int, int]] | None,
    ) -> None:
        device = values.device
        counts = torch.tensor([end - begin for begin, end in pairwise(bounds)])
        index = torch.arange(len(names)).repeat_interleave(counts)
        super().__init__(names, torch.arange(bounds[-1], device=device), index.to(device))
        self.form, self.bounds, self.draws = form, bounds, draws
        self.number = {layer: number for number, layer in enumerate(form.slots)}
        self._slots: dict[tuple[str, int | None], Slot] = {}
        places = form.all_places()
        # One split: its backward joins the parts' gradients once, where slices would each make a whole row of zeros.
        parts = torch.split(values, [place.end - place.begin for place in places], 1)
        self._params: dict[str, dict[str, Tensor]] = {layer: {} for layer in form.slots}
        for place, part in zip(places, parts):
            self._params[place.layer][place.key] = part.view(len(names), *place.shape)

    def slot(self, layer: RoutedLayer, which: int | None = None) -> Slot | None:
        slot = self.form.slot_of(layer)
        if slot is None or self.draws is None:
            return slot
        key = slot.site.name, which
        if key not in self._slots:
            own = Slot(slot.site, slot.method, slot.shared, {})
            own.dropper = partial(self._drop, self.number[slot.site.name], which, self._dropout(slot))
            self._slots[key] = own
        return self._slots[key]

    def params(self, layer: RoutedLayer, which: int | None = None) -> dict[str, Tensor]:
        slot = self.form.slot_of(layer)
        assert slot is not None
        own = self._params[slot.site.name]
        return dict(own) if which is None else {key: value[which] for key, value in own.items()}

    @staticmethod
    def _dropout(slot: Slot) -> float:
        return 0.0 if slot.method is None else float(slot.method.config.dropout)

    def _drop(self, number: int, which: int | None, p: float, x: Tensor) -> Tensor:
        """Dropout on a layer's input (rows, ...) or (rows * tokens, ...), of all users or of one."""
        assert self.draws is not None
        users = range(len(self.names)) if which is None else [which]
        rows = [self.bounds[user + 1] - self.bounds[user] for user in users]
        times = x.shape[0] // sum(rows)
        pieces = []
        for user, own in zip(users, torch.split(x, [count * times for count in rows])):
            apart = own if times == 1 else own.view(-1, times, *own.shape[1:])
            pieces.append(dropped(apart, *self.draws[user], number, p).view(own.shape))
        return torch.cat(pieces)


@final
class Passes:
    """Runs rows of many users through one model.

    Args:
        model: with the form's layers in it, in eval mode.
        form: of the adapters.
        rows: their numbers.
        collate: a list of rows -> a dict of tensors, rows first.
        loss: see :mod:`.losses`.
        on: the adapter beneath all of them, or None.

    """

    def __init__(
        self,
        model: AdapterModel,
        form: ResidentForm,
        rows: Rows,
        collate: Collate,
        loss: Loss,
        on: Beneath | None = None,
    ) -> None:
        self.model, self.form, self.rows, self.collate, self.loss = model, form, rows, collate, loss
        self.on = on
        self.dropout = form.config.dropout
        self.vocabulary = _vocabulary(model.get_base_model())

    # -- passes ----------------------------------------------------------------------------------

    def train(self, parts: Sequence[Part]) -> list[Outcome]:
        """A step for each part's user; those that fail are left as they were."""
        return self._each(parts, self._train)

    def evaluate(self, parts: Sequence[Part]) -> list[Outcome]:
        """The losses alone."""
        return self._each(parts, self._evaluate)

    def without(self, parts: Sequence[Part]) -> list[Outcome]:
        """The losses without the users' own adapters: of the base, or of what is beneath them."""
        return self._each(parts, self._without)

    def _each(self, parts: Sequence[Part], run: Callable[[Sequence[Part]], list[Outcome]]) -> list[Outcome]:
        """``run``, apart for rows with other keys: a collator that goes by the first row would mix them up."""
        groups: dict[Any, list[Part]] = {}
        for part in parts:
            keys = {frozenset(map(str, row)) if isinstance(row, Mapping) else None for row in part.rows}
            groups.setdefault(frozenset(keys), []).append(part)
        return [outcome for group in groups.values() for outcome in self._attempt(group, run)]

    def _attempt(self, parts: Sequence[Part], run: Callable[[Sequence[Part]], list[Outcome]]) -> list[Outcome]:
        try:
            return run(parts)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ResourceError(
                f"a joint step of {len(parts)} users with {sum(len(part.rows) for part in parts)} rows takes more "
                "memory than there is; set a lower users_per_step or batch_size, or cut the rows shorter"
            ) from error
        except Exception as error:
            if len(parts) > 1:
                return [outcome for part in parts for outcome in self._attempt([part], run)]
            return [self._fault(parts[0], error)]

    def _train(self, parts: Sequence[Part]) -> list[Outcome]:
        values = self.rows.take([part.slot for part in parts]).requires_grad_()
        draws = [(part.seed, part.step) for part in parts] if self.dropout else None
        with torch.enable_grad():
            per_row = self._forward(parts, values, draws)
            found, losses = self._judged(parts, per_row)
            good = [i for i, outcome in enumerate(found) if outcome.error is None]
            if not good:
                return found
            losses[good].sum().backward()  # type: ignore[no-untyped-call]
        gradients = values.grad
        if gradients is None:  # nothing that the adapters change reaches the loss
            gradients = torch.zeros_like(values)
        norms = self.rows.norms(gradients)
        for i, norm in enumerate(norms.tolist()):
            if found[i].error is None and not norm < float("inf"):
                error = f"step {parts[i].step + 1}: the gradient is not finite; {_rows(parts[i].numbers)}"
                found[i] = Outcome(parts[i], error=error, model=True)
        good = [i for i, outcome in enumerate(found) if outcome.error is None]
        if good:
            own = [parts[i] for i in good]
            whole = len(good) == len(parts)
            self.rows.step(
                [part.slot for part in own],
                gradients if whole else gradients[good],
                norms if whole else norms[good],
                [part.step + 1 for part in own],
                [part.rate for part in own],
            )
        return found

    @torch.no_grad()
    def _evaluate(self, parts: Sequence[Part]) -> list[Outcome]:
        values = self.rows.take([part.slot for part in parts])
        return self._judged(parts, self._forward(parts, values, None))[0]

    @torch.no_grad()
    def _without(self, parts: Sequence[Part]) -> list[Outcome]:
        return self._judged(parts, self._forward(parts, None, None))[0]

    # -- inside a pass ---------------------------------------------------------------------------

    def _forward(
        self, parts: Sequence[Part], values: Tensor | None, draws: Sequence[tuple[int, int]] | None
    ) -> RowLoss:
        """The loss of each row. values: the users' rows of numbers; None: without their adapters."""
        rows = [row for part in parts for row in part.rows]
        batch = self._checked(self.collate(rows), len(rows))
        if draws is not None:
            _refuse_left_padding(batch)
        device = self.rows.values.device
        batch = {key: value.to(device) for key, value in batch.items()}
        bounds = [0]
        for part in parts:
            bounds.append(bounds[-1] + len(part.rows))
        levels: list[list[Cohort]] = [] if self.on is None else [[self.on.cohort(len(rows), device)]]
        if values is not None:
            levels.append([Trained(self.form, tuple(part.name for part in parts), values, bounds, draws)])
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "inputs")}
        given = [batch["inputs"]] if "inputs" in batch else []
        with self.model.running(Route(len(rows), levels[0] if levels else (), above=levels[1:])):
            output = self.model.model(*given, **inputs)
        found = self.loss(output, batch)
        shapes = (tuple(found.totals.shape), tuple(found.counts.shape))
        if shapes != ((len(rows),), (len(rows),)):
            raise UnsupportedError(f"loss: expected totals and counts of shape ({len(rows)},), got {shapes}")
        return found

    def _checked(self, batch: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """The batch, if rows can be told apart in it and its ids are in the vocabulary (a GPU does not say which)."""
        for key, value in batch.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (count,):
                what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UnsupportedError(f"collate: {key!r}: expected a tensor with {count} rows first, got {what}")
        ids = batch.get("input_ids")
        if ids is not None and self.vocabulary is not None and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocabulary:
                wrong = low if low < 0 else high
                raise ValueError(f"input_ids: {wrong} is not in 0 ... {self.vocabulary - 1}, the model's vocabulary")
        labels = batch.get("labels")
        if labels is not None and not labels.is_floating_point():
            wrong_labels = labels[(labels < 0) & (labels != -100)]
            if wrong_labels.numel():
                raise ValueError(f"labels: {int(wrong_labels[0])} is no class; -100 leaves one out")
        return dict(batch)

    def _judged(self, parts: Sequence[Part], per_row: RowLoss) -> tuple[list[Outcome], Tensor]:
        """(an outcome for each part, the parts' losses (n,))."""
        sizes = [len(part.rows) for part in parts]
        owner = torch.arange(len(parts)).repeat_interleave(torch.tensor(sizes)).to(per_row.totals.device)
        zeros = per_row.totals.new_zeros(len(parts))
        total = zeros.index_add(0, owner, per_row.totals)
        count = zeros.index_add(0, owner, per_row.counts.to(zeros.dtype))
        told = torch.stack([total.detach(), count]).double().tolist()
        found = []
        for i, (part, own) in enumerate(zip(parts, torch.split(per_row.totals.detach(), sizes))):
            error = None
            if told[1][i] <= 0:
                error = f"step {part.step + 1}: nothing to learn (no label) in {_rows(part.numbers)}"
            elif not abs(told[0][i]) < float("inf"):
                wrong = [number for number, loss in zip(part.numbers, own.tolist()) if not abs(loss) < float("inf")]
                error = f"step {part.step + 1}: the loss is not finite; {_rows(wrong or part.numbers)}"
            found.append(Outcome(part, told[0][i], told[1][i], error, model=error is not None))
        return found, total / count

    # -- faults ----------------------------------------------------------------------------------

    def _fault(self, part: Part, error: Exception) -> Outcome:
        """What to tell of a user that failed alone, with the first row that does so by itself."""
        rows, numbers = part.rows, part.numbers
        for number, row in zip(part.numbers, part.rows):
            one = Part(part.name, part.slot, part.seed, part.step, part.rate, [row], [number])
            try:
                with torch.no_grad():
                    self._forward([one], self.rows.take([part.slot]), None)
            except Exception as own:
                rows, numbers, error = [row], [number], own
                break
        told = f"{type(error).__name__}: {first_line(error)}"
        return Outcome(part, error=f"step {part.step + 1}: {_rows(numbers)}: {told}", model=self._collates(rows))

    def _collates(self, rows: list[Any]) -> bool:
        try:
            self._checked(self.collate(rows), len(rows))
        except Exception:
            return False
        return True


def _rows(numbers: Sequence[int]) -> str:
    return f"row {numbers[0]}" if len(numbers) == 1 else f"rows {', '.join(map(str, numbers))}"


def _vocabulary(base: nn.Module) -> int | None:
    """How many ids the model's input embedding has, where it has one."""
    getter = getattr(base, "get_input_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError, TypeError):  # transformers raises where a model has none
        return None
    size = getattr(found, "num_embeddings", None)
    return size if isinstance(size, int) else None


def _refuse_left_padding(batch: Mapping[str, Tensor]) -> None:
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not bool(mask[:, 0].all()):
        raise UnsupportedError(
            "dropout needs batches that are padded on the right, because what is drawn for a token goes by its place; "
            "set the tokenizer's padding_side to 'right', or the dropout to 0"
        )
