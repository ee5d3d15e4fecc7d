"""A user in training: where it is, what it lost, whether it has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from ...adapter_files.names import check_adapter_name, check_shown, composed
from ...errors import ConfigError, KilotuneError, first_line
from ...projections.matrices import check_seed
from ..stepper.mixed_pass import Part, Setup
from ..stepper.random_draws import order
from ..store import StandsOn
from ..store.names import check_metadata
from ..store.stands_on import METADATA
from .settings import FleetSettings
from .users import User, UserReport

__all__ = ["Member", "admitted", "broken"]

SAVED = (
    "seed",
    "rows",
    "steps",
    "step",
    "losses",
    "validation",
    "best_loss",
    "best_step",
    "worse",
    "ended",
    "error",
    "without",
)


@final
@dataclass
class Member:
    """A user in training.

    rows: how many the data has. steps: in all, and step: done. losses: [sum, steps] of each epoch. worse: evaluations
    since the best one. slot: its row of numbers. without: the validation loss without its adapter.
    """

    user: User
    seed: int
    rows: int
    steps: int
    slot: int = -1
    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int | None = None
    worse: int = 0
    ended: str | None = None
    error: str | None = None
    without: float | None = None
    _order: tuple[int, list[int]] | None = None

    def numbers(self, settings: FleetSettings) -> list[int]:
        """The rows of the step that comes: all rows once in each epoch, in an order of the epoch's own."""
        epoch, batch = divmod(self.step, settings.steps_of_epoch(self.rows))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, order(self.seed, epoch, self.rows)
        first = batch * settings.batch_size
        return self._order[1][first : first + settings.batch_size]

    def part(self, setup: Setup, data: Sequence[Any], numbers: Sequence[int], step: int) -> Part | None:
        """Rows of its data, or of its validation, for a pass; None where one cannot be had, which ends it."""
        rows = []
        for number in numbers:
            try:
                rows.append(data[number])
            except Exception as error:
                what = "row" if data is self.user.data else "validation row"
                self.fail(f"step {step + 1}: {what} {number}: {broken(error)}")
                return None
        return Part(setup, self.user.name, self.slot, self.seed, step, rows, list(numbers))

    def learned(self, loss: float, settings: FleetSettings) -> None:
        """A step is done."""
        if self.step % settings.steps_of_epoch(self.rows) == 0:
            self.losses.append([0.0, 0])
        self.losses[-1][0] += loss
        self.losses[-1][1] += 1
        self.step += 1

    def due(self, settings: FleetSettings) -> bool:
        """Whether it is to be evaluated now."""
        return self.user.validation is not None and settings.evaluates(self.step, self.rows)

    def evaluated(self, loss: float, settings: FleetSettings) -> bool:
        """An evaluation is done; whether it is the best so far."""
        self.validation.append((self.step, loss))
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.worse = loss, self.step, 0
            return True
        self.worse += 1
        if settings.patience is not None and self.worse >= settings.patience and self.step < self.steps:
            self.ended = "stopped early"
        return False

    def kept_loss(self, settings: FleetSettings) -> float | None:
        """The validation loss of the adapter that is its own at the end; None where it was never evaluated."""
        if not self.validation:
            return None
        return self.best_loss if settings.keep_best else self.validation[-1][1]

    def judge(self, settings: FleetSettings) -> None:
        """It has ended; whether what it learned is worth keeping."""
        loss = self.kept_loss(settings)
        if settings.only_gains and loss is not None and self.without is not None and not loss < self.without:
            self.ended = "no gain"

    def fail(self, error: str) -> None:
        """It ends here, without an adapter; the first reason is kept."""
        if self.ended != "failed":
            self.ended, self.error = "failed", error

    def report(self, settings: FleetSettings) -> UserReport:
        """What became of it."""
        return UserReport(
            self.user.name,
            self.ended or "cancelled",
            self.step,
            tuple(total / count for total, count in self.losses),
            tuple(self.validation),
            self.best_step,
            self.error,
            self.without,
            self.kept_loss(settings),
        )

    def to_dict(self) -> dict[str, Any]:
        """In JSON types, without its data and numbers."""
        return {"name": self.user.name, **{name: getattr(self, name) for name in SAVED}}

    @classmethod
    def restored(cls, user: User, saved: Mapping[str, Any]) -> Member:
        """As it was saved, with its data again."""
        told = {"without": None, **saved}  # older ones have none
        member = cls(user, **{name: told[name] for name in SAVED})
        member.validation = [(int(step), float(loss)) for step, loss in member.validation]
        try:
            rows = len(user.data)
        except Exception as error:
            member.fail(f"its data has no length: {broken(error)}")
            return member
        if rows != member.rows:
            member.fail(f"its data has {rows} rows, and had {member.rows} when the training began")
        return member


def admitted(user: User, settings: FleetSettings, on: StandsOn | None = None) -> Member | UserReport:
    """A user as a member, or why it cannot be one. on: what its adapter is to stand on."""
    seed = settings.seed if user.seed is None else user.seed
    try:
        check_shown("adapter name", check_adapter_name(user.name))
        check_metadata(user.metadata)
        _check_apart(user, on)
        check_seed(seed)
        rows = len(user.data)
        held = None if user.validation is None else len(user.validation)
    except KilotuneError as error:
        return UserReport(str(user.name), "failed", error=str(error))
    except Exception as error:
        return UserReport(user.name, "failed", error=f"its data has no length: {broken(error)}")
    if rows == 0 or held == 0:
        return UserReport(user.name, "failed", error="its data has no rows" if rows == 0 else "validation has no rows")
    return Member(user, seed, rows, settings.steps(rows))


def _check_apart(user: User, on: StandsOn | None) -> None:
    """Refuse what would put a user's adapter in the place of the shared one, or its metadata in that of ours."""
    if on is not None and composed(user.name) == composed(on.name):
        raise ConfigError(
            f"the adapter that all users' own stand on is called {on.name!r} too; name the user otherwise"
        )
    if METADATA in user.metadata:
        raise ConfigError(f"metadata: {METADATA!r} is written by the training itself; take another key")


def broken(error: BaseException) -> str:
    """Another library's error, in one line."""
    return f"{type(error).__name__}: {first_line(error)}"
