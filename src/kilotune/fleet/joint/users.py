"""Who is trained in a joint training, and what became of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from ..stepper.given_adapters import Existing

__all__ = ["ENDINGS", "FleetReport", "Progress", "User", "UserReport"]

ENDINGS = ("done", "stopped early", "no gain", "cancelled", "failed")


@final
@dataclass(frozen=True, eq=False)
class User:
    """One user of a joint training.

    name: of the adapter; at most 200 bytes, no slash. data: rows, each of which ``collate`` takes. validation: rows to
    evaluate on, or None. seed: of the adapter's start, the order of the rows and dropout; None: the settings' seed.
    metadata: goes into a store beside the adapter. start: an adapter of the same method and configuration to go on
    from, given as the training's ``start`` is; None: that one.
    """

    name: str
    data: Sequence[Any]
    validation: Sequence[Any] | None = None
    seed: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    start: Existing | None = None


@final
@dataclass(frozen=True)
class UserReport:
    """What became of a user.

    ended: one of :data:`ENDINGS`. steps: of the user's own. losses: the mean training loss of each epoch begun.
    validation: (step, loss) of each evaluation. best_step: the step whose adapter it is, where there was validation;
    error: why it failed. without: the validation loss without the user's adapter: of the base, or of what it stands on.
    with_own: the validation loss of the adapter that is kept; or is not, where it is no gain ("no gain").
    """

    name: str
    ended: str
    steps: int = 0
    losses: tuple[float, ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None
    error: str | None = None
    without: float | None = None
    with_own: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> UserReport:
        """The inverse of :meth:`to_dict`."""
        validation = tuple((int(step), float(loss)) for step, loss in values["validation"])
        return UserReport(**{**values, "losses": tuple(values["losses"]), "validation": validation})


@final
@dataclass(frozen=True)
class Progress:
    """How far a joint training is.

    kind: "step", "save", or how a user ended. step: joint steps so far. done, failed: users. active: in training now.
    total: users in all, or None where that is not known. rows, seconds: since this process began. losses: of the users
    of this step, by name; of a user that ended, its last one. name, error: of a user that ended.
    """

    kind: str
    step: int
    done: int
    failed: int
    active: int
    total: int | None
    rows: int
    seconds: float
    losses: Mapping[str, float]
    name: str | None = None
    error: str | None = None

    @property
    def speed(self) -> float:
        """Training rows per second."""
        return self.rows / self.seconds if self.seconds > 0 else 0.0


@final
@dataclass(frozen=True)
class FleetReport:
    """What a joint training did: its users in the order in which they ended, earlier sessions' included.

    steps: joint steps in all. rows, seconds: of this session.
    """

    users: tuple[UserReport, ...]
    steps: int
    rows: int
    seconds: float

    def __getitem__(self, name: str) -> UserReport:
        """One user's report; KeyError where there is none."""
        for user in self.users:
            if user.name == name:
                return user
        raise KeyError(name)

    @property
    def no_gain(self) -> tuple[UserReport, ...]:
        """Those for whom nothing was kept, because their adapter did no better than none."""
        return tuple(user for user in self.users if user.ended == "no gain")

    @property
    def failed(self) -> tuple[UserReport, ...]:
        """Those that failed."""
        return tuple(user for user in self.users if user.ended == "failed")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "users": [user.to_dict() for user in self.users]}
