"""Joint training: adapters of many users, trained in batches that mix them, each as if it were trained alone.

::

    users ──► members (at most ``capacity``, in turns) ──► a joint step of ``users_per_step`` of them:
                  next rows of each | one batch, one forward | each one's own loss, clipping, AdamW | evaluation
              ──► ended: adapter to the sink, report, next user

Only the rows' numbers differ between users, so the base runs once for all of them (layers/routing.py), and a member's
gradient is its row of the gradient of the sum of all losses: no member's loss depends on another's numbers.

The base runs in eval mode: its own dropout is off. Dropout on an adapter's input draws from streams of the user's own.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from os import PathLike
from typing import final

import torch
from torch import Tensor, nn

from ...adapter_files.names import composed
from ...config import AdapterConfig
from ...errors import AdapterError, ConfigError, KilotuneError, UnsupportedError, did_you_mean
from ...model.adapter_model import AdapterModel
from ...model.frozen_inputs import FrozenInputs
from ...model.kept_rows import KeptRows
from ...model.last_blocks import in_last_blocks
from ..stepper.adapter_rows import Rows, start_row
from ..stepper.given_adapters import Existing, beneath, start_of
from ..stepper.losses import Loss, causal_lm, loss_of
from ..stepper.mixed_pass import Collate, Outcome, Part, Passes, Setup
from ..stepper.prepared_base import contents_of, form_in, prepared
from ..store import AdapterStore, Fingerprint
from .members import Member, admitted
from .saved_state import StateFolder
from .settings import FleetSettings
from .sinks import Finished, Sink, sink_of
from .users import FleetReport, Progress, User, UserReport

__all__ = ["JointTraining", "fit"]

KEPT = ("done", "stopped early")  # the endings with an adapter
LOOKED_FOR = 8  # adapters of those who ended last, of which one must be in the sink


def fit(
    model: nn.Module,
    config: AdapterConfig,
    users: Iterable[User],
    settings: FleetSettings | None = None,
    *,
    collate: Collate,
    loss: str | Loss = "causal-lm",
    sink: Sink | AdapterStore | str | PathLike[str] | Callable[[Finished], object],
    folder: str | PathLike[str] | None = None,
    resume: bool = False,
    told: Sequence[Callable[[Progress], None]] = (),
    on: Existing | None = None,
    start: Existing | None = None,
) -> FleetReport:
    """Train an adapter for each of ``users``, many at once; see :class:`JointTraining` for the arguments.

    A user whose data is broken fails alone; the report says why.
    """
    training = JointTraining(
        model, config, settings, collate=collate, loss=loss, sink=sink, folder=folder, resume=resume, told=told, on=on,
        start=start,
    )  # fmt: skip
    return training.run(users)


@final
class JointTraining:
    """A joint training, which other threads may :meth:`add` users to while it runs.

    Args:
        model: any base model, or one with adapters; what it was (modes, frozen weights) it is again afterwards.
        config: of all the adapters: of a method whose adapters are a row of numbers for each layer, and can be routed.
        settings: how each is trained; the defaults where None.
        collate: a list of rows -> a dict of tensors, rows first: the arguments of the model's forward (``inputs``: the
            one without a name), and ``labels``, which go to the loss. It decides how rows are padded.
        loss: "causal-lm", "classification", or a function of the model's output and the batch (losses.py).
        sink: where finished adapters go: an adapter store, a folder, or a function of a :class:`~.sinks.Finished`.
        folder: where its state is kept, so that it can be resumed; None: nowhere.
        resume: go on with the training in ``folder``, given the same users again; who has ended is passed over.
        told: hear how far it is, in the training's own thread.
        on: an adapter that runs, frozen, beneath every user's own: the name of one in the model, a folder, a name in
            the store that is the sink ("house-style", "house-style/3"), or one that was read (``store.get(name)``).
            What is trained is then of use on top of that one alone.
        start: an adapter of the same method and configuration, given likewise, from which each user's own starts; a
            user's own ``start`` goes before it. It is trained on, and nothing is left of it beside the result.

    Raises:
        ConfigError: the arguments. TargetError, UnsupportedError: such adapters cannot be trained together.

    """

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig,
        settings: FleetSettings | None = None,
        *,
        collate: Collate,
        loss: str | Loss = "causal-lm",
        sink: Sink | AdapterStore | str | PathLike[str] | Callable[[Finished], object],
        folder: str | PathLike[str] | None = None,
        resume: bool = False,
        told: Sequence[Callable[[Progress], None]] = (),
        on: Existing | None = None,
        start: Existing | None = None,
    ) -> None:
        if resume and folder is None:
            raise ConfigError("resume: needs the folder of the training that is to go on")
        self.settings = FleetSettings() if settings is None else settings
        if not isinstance(self.settings, FleetSettings):
            raise ConfigError(f"settings: expected FleetSettings, got {type(settings).__name__}")
        self._model, self._config, self._collate, self._loss = model, config, collate, loss_of(loss)
        self._sink, self._folder, self._resume, self._told = sink_of(sink), folder, resume, tuple(told)
        self._given_on, self._given_start, self._lock = on, start, threading.Lock()
        self._added: deque[User] = deque()
        self._cancelled: set[str] = set()
        self._known: set[str] = set()  # names, as stores keep them
        self._open, self._started, self._exhausted = True, False, False
        self._queue: deque[Member] = deque()
        self._ended: list[Member] = []
        self._reports: list[UserReport] = []
        self._free = list(range(self.settings.at_once - 1, -1, -1))
        self._steps = self._rows_done = self._failed = self._good = 0
        self._total: int | None = None
        self._consistent = False  # whether members and rows agree, so that the state may be written

    # -- from other threads ------------------------------------------------------------------------

    def add(self, user: User) -> None:
        """Let a user join; it begins when there is room, before those that are still to come from ``users``.

        Raises:
            AdapterError: the training is over, or has or had a user of this name.

        """
        with self._lock:
            if not self._open:
                raise AdapterError(f"add({user.name!r}): the training is over; start another one")
            if composed(user.name) in self._known:
                raise AdapterError(f"add({user.name!r}): the training has a user of this name already")
            self._known.add(composed(user.name))
            self._added.append(user)
            if self._total is not None:
                self._total += 1

    def cancel(self, name: str) -> None:
        """Let a user leave without an adapter, at the next step; one that has ended stays as it ended.

        Raises:
            AdapterError: there is no such user, and none is to come.

        """
        with self._lock:
            if self._started and self._exhausted and composed(name) not in self._known:
                raise AdapterError(f"cancel({name!r}): there is no such user.{did_you_mean(name, self._known)}")
            self._cancelled.add(name)

    # -- the run -------------------------------------------------------------------------------------

    def run(self, users: Iterable[User] = ()) -> FleetReport:
        """Train ``users`` (taken as there is room for them) and those that are added, until all have ended.

        Raises:
            UnsupportedError: the model or the loss cannot run such batches. ResourceError: out of memory.
            KilotuneError, OSError: what the sink or the state raise; resumed, it goes on from there.

        """
        with self._lock:
            if self._started:
                raise ConfigError("run(): a joint training runs once; make another one")
            self._started = True
            self._total = len(users) + len(self._added) if isinstance(users, Sequence) else None
        self._begun = time.monotonic()
        with ExitStack() as held:
            model = held.enter_context(prepared(self._model, self._given_on))
            self._install(model, held)
            try:
                self._loop(iter(users))
            except BaseException:
                if self._consistent and self._state is not None:
                    self._save()
                raise
            finally:
                with self._lock:
                    self._open = False
        seconds = time.monotonic() - self._begun
        return FleetReport(tuple(self._reports), self._steps, self._rows_done, seconds)

    def _install(self, model: AdapterModel, held: ExitStack) -> None:
        last = self.settings.last_blocks
        config = self._config if last is None else in_last_blocks(model.get_base_model(), self._config, last)
        self._form = form_in(model, config, held)
        layers = list(self._form.installed.layers.values())
        dtype = torch.float32
        for layer in layers:
            dtype = torch.promote_types(dtype, layer.compute_dtype())
        self._rows = Rows(self._form, self.settings.at_once, dtype, layers[0].compute_device())
        if last is not None:  # what is beneath all is frozen, so what enters the last blocks stays the same with it
            held.enter_context(FrozenInputs(model, last, KeptRows(self.settings.input_cache_mb)))
        store, start, given = self._sink.store, self._given_start, self._given_on
        on = None if given is None else beneath(model, given, self._form, held, store)
        self._on = None if on is None else on.known
        self._start = None if start is None else start_of(model, self._form, start, self._on, store)
        self._setup = Setup(self._rows, self._collate, self._loss, on, labelled=self._loss is causal_lm)
        self._adapted, self._base, self._passes = model, Fingerprint.of(model), Passes(model)
        self._state: StateFolder | None = None
        if self._folder is not None:
            identity = {
                "settings": {**self.settings.to_dict(), "rate of 100 steps": self.settings.rate(self._config, 100)},
                "config": self._form.config.to_dict(),
                "base": self._base.sha256,
                "dtype": str(dtype),
                "on": None if self._on is None else self._on.sha256,
                "start": None if self._start is None else self._start[1].sha256,
            }
            self._state = StateFolder(self._folder, identity, self._resume)
            held.callback(self._state.close)
        if on is not None:
            self._sink.stand_on(on.known, on.file)

    def _loop(self, users: Iterator[User]) -> None:
        self._restore(users)
        while True:
            self._consistent = True
            self._admit(users)
            self._deliver()
            if not self._queue:
                with self._lock:
                    if not self._added and self._exhausted:
                        self._open = False
                        break
                continue
            self._consistent = False
            self._step()
            self._consistent = True
            self._deliver()
            if self._state is not None and self._steps % self.settings.save_every == 0:
                self._save()
        if self._state is not None:
            self._save()

    # -- joining and leaving -------------------------------------------------------------------------

    def _next(self, users: Iterator[User]) -> User | None:
        """The next user that is new: added ones first."""
        while True:
            with self._lock:
                if self._added:
                    return self._added.popleft()
            user = next(users, None)
            with self._lock:
                if user is None:
                    self._exhausted = True
                    return None
                if isinstance(user, User) and composed(user.name) not in self._known:
                    self._known.add(composed(user.name))
                    return user
            if not isinstance(user, User):
                raise ConfigError(f"users: expected User objects, got a {type(user).__name__}")
            if user.name not in self._before:  # those that an earlier session saw to the end are passed over
                error = "a user of this name is in the training already"
                self._report(UserReport(user.name, "failed", error=error), note=False)

    def _admit(self, users: Iterator[User]) -> None:
        for member in self._queue:
            if member.user.name in self._cancelled:
                member.ended = "cancelled"
        while self._free:
            user = self._next(users)
            if user is None:
                return
            if user.name in self._cancelled:
                self._report(UserReport(user.name, "cancelled"))
            elif (report := self._acknowledged(user.name)) is not None:
                self._report(report)
            else:
                self._begin(user)

    def _acknowledged(self, name: str) -> UserReport | None:
        """The report of a user whose adapter the sink has, and of whom nothing else is known: it was killed then."""
        return self._sink.find(name, self._state.run) if self._state is not None and self._resume else None

    def _begin(self, user: User) -> None:
        member = admitted(user, self.settings, self._on)
        if isinstance(member, Member):
            try:
                row = self._start_row(member)
            except (KilotuneError, OSError) as error:
                member = UserReport(user.name, "failed", error=" ".join(str(error).split()))
        if isinstance(member, UserReport):
            self._report(member)
            return
        member.slot = self._free.pop()
        self._rows.begin(member.slot, row)
        self._queue.append(member)

    def _start_row(self, member: Member) -> Tensor:
        """Where a user's adapter starts: as it says itself, as the training says, or as its method does."""
        if member.user.start is not None:
            return start_of(self._adapted, self._form, member.user.start, self._on, self._sink.store)[0]
        if self._start is not None:
            return self._start[0]
        return start_row(self._form, member.seed, self._rows.values.dtype)

    def _restore(self, users: Iterator[User]) -> None:
        """The members as they were saved, with their data from ``users``."""
        self._before: set[str] = set()
        if self._state is None:
            return
        for report in self._state.finished:
            self._before.add(report.name)
            self._known.add(composed(report.name))
            self._reports.append(report)
            self._failed += report.ended == "failed"
        self._refuse_another_sink(self._state)
        self._steps, saved, tensors = self._state.load()
        waiting = {one["name"]: i for i, one in enumerate(saved) if one["name"] not in self._before}
        if len(waiting) > self.settings.at_once:
            raise ConfigError(f"fleet.capacity: {len(waiting)} users are in training, so it must be at least that")
        found: dict[str, Member] = {}
        new: list[User] = []
        while len(found) < len(waiting) and (user := self._next(users)) is not None:
            if user.name not in waiting:
                new.append(user)
                continue
            i = waiting[user.name]
            if (known := self._acknowledged(user.name)) is not None:
                del waiting[user.name]
                self._report(known)
                continue
            member = Member.restored(user, saved[i])
            member.slot = self._free.pop()
            for name, tensor in self._rows.state().items():
                tensor[member.slot].copy_(tensors[name][i])
            found[user.name] = member
        if missing := [name for name in waiting if name not in found]:
            raise ConfigError(
                f"users: {', '.join(missing[:10])} of the training in {self._folder} are not among them; give them "
                "again, or cancel() them after they have joined"
            )
        self._queue.extend(found[name] for name in waiting)
        with self._lock:
            self._added.extendleft(reversed(new))

    def _refuse_another_sink(self, state: StateFolder) -> None:
        """Who has ended is passed over, so their adapters would be missing where these go."""
        good = [report.name for report in state.finished if report.ended in KEPT][-LOOKED_FOR:]
        if good and self._sink.remembers and not any(self._sink.find(name, state.run) for name in good):
            raise ConfigError(
                f"sink: the adapter of {good[-1]!r}, whom this training has seen to the end, is not there; go on with "
                f"the sink of before, or begin anew in another folder than {state.folder}"
            )

    # -- one step ------------------------------------------------------------------------------------

    def _step(self) -> None:
        count = min(self.settings.users_per_step, len(self._queue))
        picked = [self._queue.popleft() for _ in range(count)]
        self._queue.extend(picked)
        by_name = {member.user.name: member for member in picked}
        parts = [part for member in picked if (part := self._part(member)) is not None]
        outcomes = self._passes.learn(parts)
        self._refuse_if_nobody_can(outcomes)
        self._take_steps([by_name[outcome.part.name] for outcome in outcomes if outcome.error is None])
        self._steps += 1
        losses = {}
        for outcome in outcomes:
            member = by_name[outcome.part.name]
            if outcome.error is not None:
                member.fail(outcome.error)
                continue
            losses[outcome.part.name] = outcome.total / outcome.count
            member.learned(losses[outcome.part.name], self.settings)
            self._rows_done += len(outcome.part.rows)
        self._good += len(losses)
        self._evaluate([m for m in picked if m.ended is None and m.due(self.settings)])
        for member in picked:
            if member.ended is None and member.step >= member.steps:
                member.ended = "done"
        self._tell("step", losses)

    def _part(self, member: Member) -> Part | None:
        return member.part(self._setup, member.user.data, member.numbers(self.settings), member.step)

    def _take_steps(self, members: Sequence[Member]) -> None:
        """Of the optimizer, with what each has learned."""
        steps = [member.step + 1 for member in members]
        self._rows.step(
            [m.slot for m in members], steps, [self.settings.adam(self._config, m.step, m.steps) for m in members]
        )

    def _refuse_if_nobody_can(self, outcomes: Sequence[Outcome]) -> None:
        """Where the very first step fails for all in the model or the loss, it is not the users that are broken."""
        if self._good or len(outcomes) < 2 or not all(outcome.model for outcome in outcomes):
            return
        raise UnsupportedError(
            f"no user's first batch can be run; check the model, collate and loss. {outcomes[0].part.name!r}: "
            f"{outcomes[0].error}"
        )

    # -- evaluation ----------------------------------------------------------------------------------

    def _evaluate(self, members: Sequence[Member]) -> None:
        """The validation losses of some members, and at first what they are without their adapters."""
        new = [member for member in members if member.without is None]
        for member, loss in zip(new, self._losses(new, self._passes.without)):
            member.without = loss
        left = [member for member in members if member.ended is None]
        for member, loss in zip(left, self._losses(left, self._passes.evaluate)):
            if loss is not None and member.evaluated(loss, self.settings):
                self._rows.note_best(member.slot)

    def _losses(self, members: Sequence[Member], run: Callable[[Sequence[Part]], list[Outcome]]) -> list[float | None]:
        """The validation losses of some members, in passes that mix them; None of those that fail."""
        sums = {member.user.name: [0.0, 0.0] for member in members}
        by_name = {member.user.name: member for member in members}
        pieces: list[Part] = []
        for member in members:
            data = member.user.validation or ()
            for first in range(0, len(data), self.settings.batch_size):
                numbers = range(first, min(first + self.settings.batch_size, len(data)))
                part = member.part(self._setup, data, numbers, member.step - 1)
                if part is None:
                    break
                pieces.append(part)
        for first in range(0, len(pieces), self.settings.users_per_step):
            for outcome in run(pieces[first : first + self.settings.users_per_step]):
                if outcome.error is not None:
                    by_name[outcome.part.name].fail(f"validation at {outcome.error}")
                sums[outcome.part.name][0] += outcome.total
                sums[outcome.part.name][1] += outcome.count
        found = [(member.ended, sums[member.user.name]) for member in members]
        return [total / count if ended is None else None for ended, (total, count) in found]

    # -- the end of a user, and the state ---------------------------------------------------------------

    def _deliver(self) -> None:
        ended = [member for member in self._queue if member.ended is not None]
        if not ended:
            return
        for member in ended:
            if member.ended in KEPT:
                member.judge(self.settings)
        good = [member for member in ended if member.ended in KEPT]
        reports = {member.user.name: member.report(self.settings) for member in ended}
        run = "" if self._state is None else self._state.run
        if good:
            finished = [self._finished(member, reports[member.user.name], run) for member in good]
            for member, fault in zip(good, self._sink.put(finished)):
                if fault is not None:
                    member.fail(f"the adapter cannot be kept: {fault}")
                    reports[member.user.name] = member.report(self.settings)
        if self._state is not None:
            self._state.note(list(reports.values()))
        for member in ended:
            self._queue.remove(member)
            self._free.append(member.slot)
            self._report(reports[member.user.name], note=False)

    def _finished(self, member: Member, report: UserReport, run: str) -> Finished:
        best = self.settings.keep_best and member.best_step is not None
        row = (self._rows.best if best else self._rows.values)[member.slot]
        contents = contents_of(self._form, row, self._base, self._on)
        return Finished(member.user.name, contents, report, run, dict(member.user.metadata), self._on)

    def _report(self, report: UserReport, note: bool = True) -> None:
        if note and self._state is not None:
            self._state.note([report])
        self._reports.append(report)
        self._failed += report.ended == "failed"
        last = {report.name: report.losses[-1]} if report.losses else {}
        self._tell(report.ended, last, report.name, report.error)

    def _save(self) -> None:
        assert self._state is not None
        slots = [member.slot for member in self._queue]
        tensors = {name: tensor[slots] for name, tensor in self._rows.state().items()}
        self._state.save(self._steps, [member.to_dict() for member in self._queue], tensors)
        self._tell("save", {})

    def _tell(self, kind: str, losses: dict[str, float], name: str | None = None, error: str | None = None) -> None:
        if not self._told:
            return
        seconds, done = time.monotonic() - self._begun, len(self._reports) - self._failed
        counts = (self._steps, done, self._failed, len(self._queue), self._total, self._rows_done)
        for listener in self._told:
            listener(Progress(kind, *counts, seconds, losses, name, error))
