"""Models in training over one base that do what they are told, operation by operation, many in one pass.

::

    with Stepper(model, tokens=4096) as stepper:
        stepper.open("ann", VeraConfig(r=64, target_modules="all-linear"))
        scored = stepper.submit("ann", ForwardBackward(rows))
        stepped = stepper.submit("ann", OptimStep(Adam(rate=1e-2)))
        while stepper.work():
            pass
        print(scored.result().loss)

Each model has its own method, rank, targets, seed and what it stands on; its operations are done in the order of their
numbers, whatever the order in which they come. What a model comes to does not depend on who trains beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Any, final

import torch
from torch import nn

from ...adapter_files.names import check_adapter_name, composed
from ...config import AdapterConfig
from ...errors import AdapterError, ConfigError, KilotuneError, ResourceError, UnsupportedError, did_you_mean
from ...model.kept_rows import KeptRows
from ...projections.matrices import check_seed
from ..bank.forms import ResidentForm
from ..store import Contents, Fingerprint
from .adapter_rows import STATE, Rows, start_row
from .given_adapters import Beneath, Existing, beneath, start_of
from .kept_inputs import kept_inputs
from .losses import causal_lm
from .mixed_pass import Outcome, Part, Passes, Setup
from .operations import Forward, ForwardBackward, Keep, Operation, OptimStep, Save, State, Stepped
from .prepared_base import contents_of, form_in, prepared
from .token_rows import checked, collate
from .trainee import Asked, Reading, Trainee, size_of

__all__ = ["Stepper"]

FIRST = 8  # rows of a form, to begin with
FIRST_NUMBERS = 2**22  # or fewer, where they are so many numbers together
TIMES = 5  # numbers, AdamW's two means, the best numbers, and a gradient


@final
class _Home:
    """A form in the model, while somebody trains with it."""

    def __init__(self, rows: Rows, held: ExitStack) -> None:
        self.rows, self.held = rows, held
        self.free = list(range(rows.capacity - 1, -1, -1))
        self.users = 0

    def take(self) -> int:
        """A row that nobody has."""
        if not self.free:
            before = self.rows.capacity
            self.rows.grow(2 * before)
            self.free = list(range(2 * before - 1, before - 1, -1))
        self.users += 1
        return self.free.pop()


@final
class Stepper:
    """See the module. :meth:`submit` may be called from any thread; everything else belongs to one.

    Args:
        model: a causal language model; while this is open it is frozen, in eval mode, and must not run elsewhere.
        tokens: the most that a pass runs, filled up; a single example may have more. One pass is the longest that
            anybody waits who wants the device in between.
        waiting: operations of one model that may wait at once.

    """

    def __init__(self, model: nn.Module, *, tokens: int = 4096, waiting: int = 1024) -> None:
        if tokens < 1 or waiting < 1:
            raise ConfigError(f"tokens, waiting: expected at least 1, got {tokens} and {waiting}")
        self.tokens, self.most_waiting = tokens, waiting
        self.ran = 0  # tokens of all passes, filled up
        self._given = model
        self._held = ExitStack()
        self._lock = threading.Lock()
        self._homes: dict[str, _Home] = {}
        self._beneath: dict[str, Beneath] = {}
        self._trainees: dict[str, Trainee] = {}

    def __enter__(self) -> Stepper:
        self._model = self._held.enter_context(prepared(self._given))
        self._base = Fingerprint.of(self._model)
        self._passes = Passes(self._model)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._trainees):
            self.close(name)
        self._held.close()

    # -- models --------------------------------------------------------------------------------------

    def open(
        self,
        name: str,
        config: AdapterConfig,
        *,
        seed: int = 0,
        on: Existing | None = None,
        start: Existing | None = None,
        state: State | None = None,
        keep_inputs: float | KeptRows = 0.0,
    ) -> None:
        """Begin with a model: an adapter that starts as its method does, or from another one of its form.

        Args:
            name: nobody else's.
            config: of its adapter.
            seed: of its start and its dropout.
            on: the adapter beneath it, frozen.
            start: an adapter to start from.
            state: what a model of this configuration was (:class:`~.operations.Keep`), to go on from.
            keep_inputs: megabytes of what enters the first block that it adapts, kept until it is closed, so that the
                blocks before it run once for each row; or where it is kept, of models that stand on the same. Where it
                adapts the first block there is nothing to keep. Its passes are its own then.

        Raises:
            AdapterError: there is one of this name. ConfigError, TargetError, UnsupportedError: such an adapter cannot
                be trained here; the state is another one's. CheckpointError: ``on`` or ``start`` is damaged.

        """
        if composed(check_adapter_name(name)) in {composed(other) for other in self._trainees}:
            raise AdapterError(f"open({name!r}): there is a model of this name already; close it first")
        check_seed(seed)
        key, home = self._home(config)
        try:
            below = None if on is None else self._on(on, home)
            known = None if below is None else below.known
            if start is None:
                row = start_row(home.rows.form, seed, home.rows.values.dtype)
            else:
                row = start_of(self._model, home.rows.form, start, known)[0]
            home.rows.check_state({} if state is None else state.tensors)
        except BaseException:
            self._leave(key, home)
            raise
        slot = home.take()
        home.rows.begin(slot, row)
        trainee = Trainee(name, Setup(home.rows, collate, causal_lm, below), slot, seed)
        trainee.kept = kept_inputs(self._model, home.rows.form, keep_inputs)
        if state is not None:
            home.rows.take_state(slot, state.tensors)
            trainee.step, trainee.pieces = state.step, state.pieces
        with self._lock:
            self._trainees[name] = trainee

    def close(self, name: str) -> None:
        """Forget a model; what it was told and has not done is cancelled.

        Raises:
            AdapterError: there is none.

        """
        with self._lock:
            trainee = self._found(name)
            del self._trainees[name]
        for asked in trainee.waiting.values():
            if not asked.result.done():
                asked.result.set_exception(AdapterError(f"the model {name!r} was closed"))
        key, home = next((k, h) for k, h in self._homes.items() if h.rows is trainee.setup.home)
        home.rows.forget([trainee.slot])
        home.free.append(trainee.slot)
        home.users -= 1
        self._leave(key, home)

    def _home(self, config: AdapterConfig) -> tuple[str, _Home]:
        key = repr(config)
        if key not in self._homes:
            with ExitStack() as made:
                form = form_in(self._model, config, made)
                layers = list(form.installed.layers.values())
                first = max(1, min(FIRST, FIRST_NUMBERS // max(form.length, 1)))
                rows = Rows(form, first, _dtype(form), layers[0].compute_device())
                self._homes[key] = _Home(rows, made.pop_all())
        return key, self._homes[key]

    def bytes_of(self, config: AdapterConfig) -> int:
        """What a model of this configuration takes while it is open; none is made. Raises as :meth:`open`."""
        home = self._homes.get(repr(config))
        if home is not None:
            return TIMES * home.rows.form.length * home.rows.values.dtype.itemsize
        with ExitStack() as held:
            form = form_in(self._model, config, held)
            return TIMES * form.length * _dtype(form).itemsize

    def _leave(self, key: str, home: _Home) -> None:
        """Take a form out of the model when nobody trains with it any longer."""
        if home.users == 0:
            del self._homes[key]
            home.held.close()

    def _on(self, on: Existing, home: _Home) -> Beneath:
        """What is beneath stays in the model: others may stand on it too."""
        made = beneath(self._model, on, home.rows.form, self._held)
        return self._beneath.setdefault(made.known.sha256, made)

    def _found(self, name: str) -> Trainee:
        if name not in self._trainees:
            raise AdapterError(f"there is no model {name!r}.{did_you_mean(name, self._trainees)}")
        return self._trainees[name]

    # -- operations ----------------------------------------------------------------------------------

    def submit(self, name: str, operation: Operation, number: int | None = None) -> Future[Any]:
        """Tell a model to do something.

        Args:
            name: the model.
            operation: of operations.py.
            number: its place among all that this model is told, from 0; None: after all that is known. Operations are
                done in this order, so one that comes early waits. One number twice is the same operation.

        Returns:
            What comes of it: ``Scored``, ``Stepped`` or ``Contents``, or the error of this operation alone.

        Raises:
            AdapterError: there is no such model, or the number is long past. ConfigError: the operation's rows.
            ResourceError: too many are waiting.

        """
        if isinstance(operation, Forward | ForwardBackward):
            checked(operation.rows, operation.objective, self._passes.vocabulary)
        with self._lock:
            trainee = self._found(name)
            if len(trainee.waiting) >= self.most_waiting:
                raise ResourceError(f"{name!r}: {len(trainee.waiting)} operations are waiting already; try again later")
            place = max(trainee.waiting, default=trainee.next - 1) + 1 if number is None else number
            asked = trainee.ask(place, operation)
        if asked is None:
            raise AdapterError(f"{name!r}: operation {number} is long done, and what came of it is not kept")
        return asked.result

    @property
    def waits(self) -> bool:
        """Whether :meth:`work` has something to do; from any thread."""
        with self._lock:
            return any(trainee.due() is not None for trainee in self._trainees.values())

    def work(self) -> bool:
        """Do what is next: steps of the optimizer, and one pass. False: there was nothing to do."""
        did = self._quick()
        reading = self._chosen()
        if not reading:
            return did
        run: dict[str, Callable[[Sequence[Part]], list[Outcome]]] = {
            "learn": self._passes.learn,
            "evaluate": self._passes.evaluate,
            "without": self._passes.without,
        }
        self._pass(reading, run[_reading(reading[0]).kind])
        self._quick()
        return True

    # -- what needs no pass --------------------------------------------------------------------------

    def _quick(self) -> bool:
        """Steps of the optimizer and saves that are due, until a pass is; whether there were any."""
        did = False
        while True:
            with self._lock:
                due = [(trainee, asked) for trainee in self._trainees.values() if (asked := trainee.due()) is not None]
            steps = [(t, a, a.operation.how) for t, a in due if isinstance(a.operation, OptimStep)]
            saves = [(trainee, asked) for trainee, asked in due if isinstance(asked.operation, Save | Keep)]
            if not steps and not saves:
                return did
            did = True
            for home in {id(t.setup.home): t.setup.home for t, _, _ in steps}.values():
                self._step(home, [one for one in steps if one[0].setup.home is home])
            for trainee, asked in saves:
                kept = isinstance(asked.operation, Keep)
                self._end(trainee, asked, self._kept(trainee) if kept else self._contents(trainee))

    def _step(self, home: Rows, steps: Sequence[tuple[Trainee, Asked, Any]]) -> None:
        ready = []
        for trainee, asked, how in steps:
            if home.has_learned(trainee.slot):
                ready.append((trainee, asked, how))
            else:
                told = f"{trainee.name!r}: nothing was learned since the last step; send a ForwardBackward first"
                self._end(trainee, asked, UnsupportedError(told))
        if not ready:
            return
        slots = [trainee.slot for trainee, _, _ in ready]
        norms = home.learned_norms(slots)
        home.step(slots, [trainee.step + 1 for trainee, _, _ in ready], [how for _, _, how in ready])
        for (trainee, asked, _), norm in zip(ready, norms, strict=True):
            trainee.step += 1
            self._end(trainee, asked, Stepped(trainee.step, norm))

    @staticmethod
    def _kept(trainee: Trainee) -> State:
        rows = trainee.setup.home.state()
        tensors = {name: rows[name][trainee.slot].clone() for name in STATE}
        return State(trainee.step, trainee.pieces, tensors)

    def _contents(self, trainee: Trainee) -> Contents:
        on = trainee.setup.on
        home = trainee.setup.home
        return contents_of(home.form, home.values[trainee.slot], self._base, None if on is None else on.known)

    def _end(self, trainee: Trainee, asked: Asked, result: object) -> None:
        with self._lock:
            trainee.end(asked)
        if asked.result.done():  # closed meanwhile
            return
        if isinstance(result, Exception):
            asked.result.set_exception(result)
        else:
            asked.result.set_result(result)

    # -- passes --------------------------------------------------------------------------------------

    def _chosen(self) -> list[Trainee]:
        """Whose next pieces make a pass: of one kind, those first for whom the least was run; ``tokens`` at most."""
        with self._lock:
            for trainee in self._trainees.values():
                asked = trainee.due()
                if asked is None or trainee.reading is not None:
                    continue
                if isinstance(asked.operation, Forward | ForwardBackward):  # else it came just now
                    trainee.reading = Reading(asked, asked.operation, self.tokens)
            ready = [trainee for trainee in self._trainees.values() if trainee.reading is not None]
        ready.sort(key=lambda trainee: trainee.used)
        chosen: list[Trainee] = []
        rows, longest = 0, 0
        for trainee in ready:
            reading = _reading(trainee)
            if chosen and (reading.kind != _reading(chosen[0]).kind or trainee.kept or chosen[0].kept):
                continue
            own = reading.part(trainee).rows
            most = max(longest, max(len(row["input_ids"]) for row in own))
            if chosen and (rows + len(own)) * most > self.tokens:
                continue
            chosen.append(trainee)
            rows, longest = rows + len(own), most
        return chosen

    def _pass(self, trainees: Sequence[Trainee], run: Callable[[Sequence[Part]], list[Outcome]]) -> None:
        parts = [_reading(trainee).part(trainee) for trainee in trainees]
        for trainee in trainees:
            reading = _reading(trainee)
            if reading.kind == "learn" and len(reading.pieces) > 1 and reading.before is None:
                reading.before = trainee.setup.home.gradient(trainee.slot)
        try:
            with trainees[0].kept or nullcontext():
                outcomes = run(parts)
        except ResourceError as error:
            if len(trainees) > 1:  # each by itself takes less
                for trainee in trainees:
                    self._pass([trainee], run)
                return
            self._fail(trainees[0], error)
            return
        for trainee, outcome in zip(trainees, outcomes, strict=True):
            size = size_of(outcome.part.rows)
            trainee.used += size
            self.ran += size
            self._noted(trainee, outcome)

    def _noted(self, trainee: Trainee, outcome: Outcome) -> None:
        reading = _reading(trainee)
        if outcome.error is not None:
            self._fail(trainee, UnsupportedError(f"{trainee.name!r}: {outcome.error}"))
            return
        if reading.kind == "learn":
            trainee.pieces += 1
        if reading.done(outcome):
            self._end(trainee, reading.asked, reading.scored())

    def _fail(self, trainee: Trainee, error: KilotuneError) -> None:
        """An operation failed: the gradient is what it was before it."""
        reading, home = _reading(trainee), trainee.setup.home
        if reading.kind == "learn" and reading.started:
            home.forget([trainee.slot])
            if reading.before is not None:
                home.learn([trainee.slot], reading.before.unsqueeze(0))
        self._end(trainee, reading.asked, error)


def _dtype(form: ResidentForm) -> torch.dtype:
    """In which its rows are: at least float32."""
    dtype = torch.float32
    for layer in form.installed.layers.values():
        dtype = torch.promote_types(dtype, layer.compute_dtype())
    return dtype


def _reading(trainee: Trainee) -> Reading:
    assert trainee.reading is not None
    return trainee.reading
