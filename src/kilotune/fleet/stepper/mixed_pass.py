"""One forward and backward of many adapters' rows, and what of it is each adapter's own.

::

    parts   rows of adapters of whatever forms, on top of whatever    one batch, one forward
    losses  each part's own, by its own function of its rows          one backward of their sum
    rows    what each adapter has learned                             its row of the gradient

A pass that fails is run again part by part, so that only who is broken fails; what one row does then is looked for row
by row. Nothing here changes an adapter's numbers: a pass adds to what its row has learned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ...errors import ResourceError, UnsupportedError, first_line, is_out_of_memory
from ...injection.installed_adapter import MODEL
from ...layers.route import Cohort, Route, RoutedLayer
from ...layers.slot import Slot
from ...methods import Shared
from ...model.adapter_model import AdapterModel
from ..bank.forms import ResidentForm
from .adapter_rows import Rows
from .given_adapters import Beneath
from .losses import IGNORED, KeptLogits, Loss, RowLoss
from .random_draws import dropped

__all__ = ["Collate", "Outcome", "Part", "Passes", "Setup", "Trained"]

Collate = Callable[[list[Any]], Mapping[str, Tensor]]


@final
class Setup(NamedTuple):
    """How an adapter is trained. home: the rows of its form. collate: a list of rows -> a dict of tensors, rows first.

    loss: see :mod:`.losses`. on: the adapter beneath it, or None. inputs: what of a batch goes into the model; None:
    all but its labels. labelled: the loss takes :class:`~.losses.KeptLogits`, of tokens whose next one has a label.
    """

    home: Rows
    collate: Collate
    loss: Loss
    on: Beneath | None = None
    inputs: frozenset[str] | None = None
    labelled: bool = False


@final
@dataclass(frozen=True, eq=False)
class Part:
    """An adapter's rows in a pass. slot: its row in ``setup.home``. numbers: what its rows are called in errors.

    step: its own, from 0. divisor: what the sum of its rows' losses is divided by; None: by the sum of their counts.
    """

    setup: Setup
    name: str
    slot: int
    seed: int
    step: int
    rows: list[Any]
    numbers: list[int]
    divisor: float | None = None


@final
@dataclass(frozen=True)
class Outcome:
    """What became of a part: its loss (summed total, count), or the error. model: it failed in model or loss.

    told: what the loss function tells of each row beside it, (rows, ...); None where it tells nothing.
    """

    part: Part
    total: float = 0.0
    count: float = 0.0
    error: str | None = None
    model: bool = False
    told: Tensor | None = None


@final
class Trained(Cohort):
    """Adapters of one form in training: ``values`` (n, length) are their rows, which want gradients.

    draws: (seed, step) of each, for dropout; None: no dropout. bounds: where each one's rows begin, and the end.
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
        super().__init__(names, torch.arange(bounds[0], bounds[-1], device=device), index.to(device))
        self.form, self.bounds, self.draws = form, bounds, draws
        self.number = {layer: number for number, layer in enumerate(form.slots)}
        self._slots: dict[tuple[str, int | None], Slot] = {}
        places = form.all_places()
        # One split: its backward joins the parts' gradients once, where slices would each make a whole row of zeros.
        parts = torch.split(values, [place.end - place.begin for place in places], 1)
        self._params: dict[str, dict[str, Tensor]] = {layer: {} for layer in form.places}
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

    def shared(self, layer: RoutedLayer, which: int | None = None) -> Shared:
        if not (own := self._params[MODEL]):
            return self.form.installed.shared
        picked = own if which is None else {key: value[which] for key, value in own.items()}
        return self.form.installed.shared.holding(picked)

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
    """Runs rows of many adapters through one model.

    Args:
        model: with the layers of their forms in it, in eval mode.

    """

    def __init__(self, model: AdapterModel) -> None:
        self.model = model
        base = model.get_base_model()
        self.vocabulary = _vocabulary(base)
        self._keeps = "logits_to_keep" in inspect.signature(base.forward).parameters

    # -- passes ----------------------------------------------------------------------------------

    def learn(self, parts: Sequence[Part]) -> list[Outcome]:
        """Forward and backward: each part's adapter has learned from its rows then; those that fail have not."""
        return self._each(parts, self._learn)

    def evaluate(self, parts: Sequence[Part]) -> list[Outcome]:
        """The losses alone."""
        return self._each(parts, self._evaluate)

    def without(self, parts: Sequence[Part]) -> list[Outcome]:
        """The losses without the adapters: of the base, or of what is beneath them."""
        return self._each(parts, self._without)

    def _each(self, parts: Sequence[Part], run: Callable[[Sequence[Part]], list[Outcome]]) -> list[Outcome]:
        """``run``, apart for rows with other keys: a collator that goes by the first row would mix them up.

        Within a run, parts of one form and loss stand beside each other; the outcomes are in the order of ``parts``.
        """
        groups: dict[Any, list[int]] = {}
        for i, part in enumerate(parts):
            keys = {frozenset(map(str, row)) if isinstance(row, Mapping) else None for row in part.rows}
            groups.setdefault((id(part.setup.collate), part.setup.inputs, frozenset(keys)), []).append(i)
        found: dict[int, Outcome] = {}
        for group in groups.values():
            order = _together(parts, group)
            found.update(zip(order, self._attempt([parts[i] for i in order], run), strict=True))
        return [found[i] for i in range(len(parts))]

    def _attempt(self, parts: Sequence[Part], run: Callable[[Sequence[Part]], list[Outcome]]) -> list[Outcome]:
        try:
            return run(parts)
        except Exception as error:
            if not is_out_of_memory(error):
                if len(parts) > 1:
                    return [outcome for part in parts for outcome in self._attempt([part], run)]
                return [self._fault(parts[0], error)]
            raise ResourceError(
                f"a joint step of {len(parts)} users with {sum(len(part.rows) for part in parts)} rows takes more "
                "memory than there is; set a lower users_per_step or batch_size, or cut the rows shorter"
            ) from error

    def _learn(self, parts: Sequence[Part]) -> list[Outcome]:
        values = self._values(parts, wanted=True)
        with torch.enable_grad():
            found, losses = self._forward(parts, values, draw=True)
            good = [i for i, outcome in enumerate(found) if outcome.error is None]
            if not good:
                return found
            torch.stack([losses[i] for i in good]).sum().backward()  # type: ignore[no-untyped-call]
        first = 0
        for home, own in values.items():
            members = range(first, first + own.shape[0])
            first += own.shape[0]
            self._learned(home, own, list(members), found)
        return found

    def _learned(self, home: Rows, values: Tensor, members: list[int], found: list[Outcome]) -> None:
        """Hand the gradients of one form's adapters over, but for those that are not finite. members: of ``found``."""
        gradients = values.grad
        if gradients is None:  # nothing that the adapters change reaches the loss
            gradients = torch.zeros_like(values)
        norms = home.norms(gradients)
        good = []
        for row, (i, norm) in enumerate(zip(members, norms.tolist(), strict=True)):
            part = found[i].part
            if found[i].error is None and not norm < float("inf"):
                error = f"step {part.step + 1}: the gradient is not finite; {_rows(part.numbers)}"
                found[i] = Outcome(part, error=error, model=True)
            elif found[i].error is None:
                good.append(row)
        slots = [found[members[row]].part.slot for row in good]
        if len(good) < len(members):
            gradients, norms = gradients[good], norms[good]
        home.learn(slots, gradients, norms)

    @torch.no_grad()
    def _evaluate(self, parts: Sequence[Part]) -> list[Outcome]:
        return self._forward(parts, self._values(parts))[0]

    @torch.no_grad()
    def _without(self, parts: Sequence[Part]) -> list[Outcome]:
        return self._forward(parts, None)[0]

    # -- inside a pass ---------------------------------------------------------------------------

    def _values(self, parts: Sequence[Part], wanted: bool = False) -> dict[Rows, Tensor]:
        """Form after form, the numbers (n, length) of its adapters. wanted: so are their gradients."""
        return {
            home: home.take([part.slot for part in own]).requires_grad_(wanted)
            for home, own in groupby(parts, key=lambda part: part.setup.home)
        }

    def _forward(
        self, parts: Sequence[Part], values: Mapping[Rows, Tensor] | None, draw: bool = False
    ) -> tuple[list[Outcome], list[Tensor]]:
        """(an outcome, a loss) for each part. values: see :meth:`_values`; None: without their adapters.

        draw: dropout is on.
        """
        rows = [row for part in parts for row in part.rows]
        batch = self._checked(parts[0].setup.collate(rows), len(rows))
        if draw and any(part.setup.home.form.config.dropout for part in parts):
            _refuse_left_padding(batch)
        device = parts[0].setup.home.values.device
        batch = {key: _moved(value, device) for key, value in batch.items()}
        bounds = [0]
        for part in parts:
            bounds.append(bounds[-1] + len(part.rows))
        levels = [level for level in (_beneath(parts, bounds, device), _own(parts, bounds, values, draw)) if level]
        wanted = parts[0].setup.inputs
        inputs = {
            key: value
            for key, value in batch.items()
            if key not in ("labels", "inputs") and (wanted is None or key in wanted)
        }
        given = [batch["inputs"]] if "inputs" in batch else []
        places = self._places(parts, batch, draw)
        if places is not None:
            inputs["logits_to_keep"] = places
        with self.model.running(Route(len(rows), levels[0] if levels else (), above=levels[1:])):
            output = self.model.model(*given, **inputs)
        if places is not None:
            output = KeptLogits(output.logits, places)
        return self._judged(parts, bounds, output, batch)

    def _places(self, parts: Sequence[Part], batch: Mapping[str, Tensor], draw: bool) -> Tensor | None:
        """The tokens whose logits the losses need, where these are not all; None: all are made.

        Not with dropout: what is drawn for a token goes by its place, and a layer of the head would see other places.
        """
        labels = batch.get("labels")
        able = self._keeps and labels is not None and labels.ndim == 2 and all(part.setup.labelled for part in parts)
        if labels is None or not able or (draw and any(part.setup.home.form.config.dropout for part in parts)):
            return None
        places = (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)
        return places if 0 < len(places) < labels.shape[1] - 1 else None

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
            wrong_labels = labels[(labels < 0) & (labels != IGNORED)]
            if wrong_labels.numel():
                raise ValueError(f"labels: {int(wrong_labels[0])} is no class; -100 leaves one out")
        return dict(batch)

    def _judged(
        self, parts: Sequence[Part], bounds: Sequence[int], output: Any, batch: Mapping[str, Tensor]
    ) -> tuple[list[Outcome], list[Tensor]]:
        """(an outcome, a loss) for each part: each run of parts with one loss function is judged by it at once."""
        found: list[Outcome] = []
        losses: list[Tensor] = []
        for _, numbered in groupby(range(len(parts)), key=lambda i: id(parts[i].setup.loss)):
            own = list(numbered)
            loss = parts[own[0]].setup.loss
            rows = slice(bounds[own[0]], bounds[own[-1] + 1])
            whole = len(own) == len(parts)
            given = (
                (output, batch) if whole else (_some(output, rows, bounds[-1]), {k: v[rows] for k, v in batch.items()})
            )
            per_row = loss(*given)
            shapes, count = (tuple(per_row.totals.shape), tuple(per_row.counts.shape)), rows.stop - rows.start
            if shapes != ((count,), (count,)):
                raise UnsupportedError(f"loss: expected totals and counts of shape ({count},), got {shapes}")
            outcomes, each = _summed([parts[i] for i in own], per_row)
            found += outcomes
            losses += each
        return found, losses

    # -- faults ----------------------------------------------------------------------------------

    def _fault(self, part: Part, error: Exception) -> Outcome:
        """What to tell of a user that failed alone, with the first row that does so by itself."""
        rows, numbers = part.rows, part.numbers
        for number, row in zip(part.numbers, part.rows):
            one = replace(part, rows=[row], numbers=[number])
            try:
                with torch.no_grad():
                    self._forward([one], self._values([one]))
            except Exception as own:
                rows, numbers, error = [row], [number], own
                break
        told = f"{type(error).__name__}: {first_line(error)}"
        return Outcome(part, error=f"step {part.step + 1}: {_rows(numbers)}: {told}", model=self._collates(part, rows))

    def _collates(self, part: Part, rows: list[Any]) -> bool:
        try:
            self._checked(part.setup.collate(rows), len(rows))
        except Exception:
            return False
        return True


def _together(parts: Sequence[Part], numbers: Iterable[int]) -> list[int]:
    """Numbers of parts in an order in which those of one form, and of these those of one loss, are neighbours."""
    homes: dict[Rows, dict[int, list[int]]] = {}
    for i in numbers:
        setup = parts[i].setup
        homes.setdefault(setup.home, {}).setdefault(id(setup.loss), []).append(i)
    return [i for losses in homes.values() for own in losses.values() for i in own]


def _beneath(parts: Sequence[Part], bounds: Sequence[int], device: torch.device) -> list[Cohort]:
    """The adapters that some of the parts stand on, each with all its rows."""
    rows: dict[Beneath, list[Tensor]] = {}
    for part, (begin, end) in zip(parts, pairwise(bounds), strict=True):
        if part.setup.on is not None:
            rows.setdefault(part.setup.on, []).append(torch.arange(begin, end))
    return [on.cohort(torch.cat(own), device) for on, own in rows.items()]


def _own(
    parts: Sequence[Part], bounds: Sequence[int], values: Mapping[Rows, Tensor] | None, draw: bool
) -> list[Cohort]:
    """The adapters of the parts themselves, form by form."""
    made: list[Cohort] = []
    if values is None:
        return made
    first = 0
    for home, numbers in values.items():
        own = parts[first : first + numbers.shape[0]]
        draws = [(part.seed, part.step) for part in own] if draw and home.form.config.dropout else None
        span = bounds[first : first + len(own) + 1]
        made.append(Trained(home.form, tuple(part.name for part in own), numbers, span, draws))
        first += len(own)
    return made


def _summed(parts: Sequence[Part], per_row: RowLoss) -> tuple[list[Outcome], list[Tensor]]:
    """(an outcome, a loss) for each of the parts whose rows these are."""
    sizes = [len(part.rows) for part in parts]
    owner = torch.arange(len(parts)).repeat_interleave(torch.tensor(sizes)).to(per_row.totals.device)
    zeros = per_row.totals.new_zeros(len(parts))
    total = zeros.index_add(0, owner, per_row.totals)
    count = zeros.index_add(0, owner, per_row.counts.to(zeros.dtype))
    numbers = torch.stack([total.detach(), count]).double().tolist()
    told = [None] * len(parts) if per_row.told is None else torch.split(per_row.told.detach(), sizes)
    found = []
    for i, (part, own) in enumerate(zip(parts, torch.split(per_row.totals.detach(), sizes))):
        error = None
        if part.divisor is None and numbers[1][i] <= 0:
            error = f"step {part.step + 1}: nothing to learn (no label) in {_rows(part.numbers)}"
        elif not abs(numbers[0][i]) < float("inf"):
            wrong = [number for number, loss in zip(part.numbers, own.tolist()) if not abs(loss) < float("inf")]
            error = f"step {part.step + 1}: the loss is not finite; {_rows(wrong or part.numbers)}"
        found.append(Outcome(part, numbers[0][i], numbers[1][i], error, model=error is not None, told=told[i]))
    divisors = [count[i] if part.divisor is None else part.divisor for i, part in enumerate(parts)]
    return found, [one / divisor for one, divisor in zip(total.unbind(), divisors, strict=True)]


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """On the device; Apple's have no float64."""
    return value.float().to(device) if device.type == "mps" and value.dtype == torch.float64 else value.to(device)


def _some(output: Any, rows: slice, count: int) -> Any:
    """What a model returned, for some of its rows."""
    if isinstance(output, Tensor):
        return output[rows]
    if isinstance(output, KeptLogits):
        return output._replace(logits=output.logits[rows])
    logits = output.logits
    if logits.shape[0] != count:
        raise UnsupportedError(f"the model's logits have {logits.shape[0]} rows for a batch of {count}")
    return SimpleNamespace(logits=logits[rows])


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
