"""A user in training: where it is, what it lost, whether it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from ...adapter_files.names import check_adapter_name, check_shown
from ...errors import KilotuneError, first_line
from ...projections.matrices import check_seed
from ..store.names import check_metadata
from .random_draws import order
from .settings import FleetSettings
from .users import User, UserReport

__all__ = ["Member", "admitted", "broken"]

SAVED = ("seed", "rows", "steps", "step", "losses", "validation", "best_loss", "best_step", "worse", "ended", "error")


@final
@dataclass
class Member:
    """A user in training.

    rows: how many the data has. steps: in all, and step: done. losses: [sum, steps] of each epoch. worse: evaluations
    since the best one. slot: its row of numbers.
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
    _order: tuple[int, list[int]] | None = None

    def numbers(self, settings: FleetSettings) -> list[int]:
        """The rows of the step that comes: all rows once in each epoch, in an order of the epoch's own."""
        epoch, batch = divmod(self.step, settings.steps_of_epoch(self.rows))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, order(self.seed, epoch, self.rows)
        first = batch * settings.batch_size
        return self._order[1][first : first + settings.batch_size]

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

    def fail(self, error: str) -> None:
        """It ends here, without an adapter; the first reason is kept."""
        if self.ended != "failed":
            self.ended, self.error = "failed", error

    def report(self) -> UserReport:
        """What became of it."""
        losses = tuple(total / count for total, count in self.losses)
        ended = self.ended or "cancelled"
        return UserReport(self.user.name, ended, self.step, losses, tuple(self.validation), self.best_step, self.error)

    def to_dict(self) -> dict[str, Any]:
        """In JSON types, without its data and numbers."""
        return {"name": self.user.name, **{name: getattr(self, name) for name in SAVED}}

    @classmethod
    def restored(cls, user: User, saved: Mapping[str, Any]) -> Member:
        """As it was saved, with its data again."""
        member = cls(user, **{name: saved[name] for name in SAVED})
        member.validation = [(int(step), float(loss)) for step, loss in member.validation]
        try:
            rows = len(user.data)
        except Exception as error:
            member.fail(f"its data has no length: {broken(error)}")
            return member
        if rows != member.rows:
            member.fail(f"its data has {rows} rows, and had {member.rows} when the training began")
        return member


def admitted(user: User, settings: FleetSettings) -> Member | UserReport:
    """A user as a member, or why it cannot be one."""
    seed = settings.seed if user.seed is None else user.seed
    try:
        check_shown("adapter name", check_adapter_name(user.name))
        check_metadata(user.metadata)
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


def broken(error: BaseException) -> str:
    """Another library's error, in one line."""
    return f"{type(error).__name__}: {first_line(error)}"
