"""The shared adapter and the personal ones on top of it, trained together and kept in a store; both can be resumed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import nn

from ...errors import CheckpointError
from ...fleet import AdapterStore, FleetReport, FleetSettings, Progress, StoreSink, User, UserReport, fit
from ...model.last_blocks import in_last_blocks
from ...whole_file import replacing
from .answers_only import AnswersOnly
from .meter import Tick
from .settings import PeopleSettings, Training

__all__ = ["PERSONAL", "SHARED", "Encoded", "Trained", "is_trained", "trained"]

SHARED, PERSONAL = "shared", "personal"
ALIAS = "demo"
SAVE_EVERY = 20  # joint steps
Curve = tuple[tuple[int, Mapping[str, float]], ...]


@final
@dataclass(frozen=True)
class Encoded:
    """A person's rows as token numbers."""

    train: list[dict[str, list[int]]]
    validation: list[dict[str, list[int]]]
    test: list[dict[str, list[int]]]

    @property
    def all(self) -> list[dict[str, list[int]]]:
        """All three."""
        return [*self.train, *self.validation, *self.test]


@final
@dataclass(frozen=True)
class Trained:
    """What one joint training came to, earlier sessions of an interrupted one included.

    users: everybody's report. seconds: in all. curve: (joint step, the losses of its users by name).
    """

    users: tuple[UserReport, ...]
    seconds: float
    curve: Curve

    def of(self, name: str) -> UserReport:
        """One user's report."""
        return next(user for user in self.users if user.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"seconds": self.seconds, "users": [user.to_dict() for user in self.users], "curve": list(self.curve)}

    @staticmethod
    def from_dict(told: Mapping[str, Any]) -> Trained:
        """The inverse of :meth:`to_dict`."""
        users = tuple(map(UserReport.from_dict, told["users"]))
        return Trained(users, told["seconds"], tuple((step, losses) for step, losses in told["curve"]))


def trained(
    part: str,
    model: nn.Module,
    rows: Mapping[str, Encoded],
    settings: PeopleSettings,
    store: AdapterStore,
    folder: Path,
    answers: AnswersOnly,
    tick: Tick,
) -> Trained:
    """Train the shared adapter on everybody's rows, or (``part`` personal) each one's own on top of it.

    What was trained is taken from ``folder`` and the store; what was interrupted goes on.
    """
    file = folder / f"{part}.json"
    known = _read(file)
    if _is_whole(known, store):
        return Trained.from_dict(known)
    how = settings.shared if part == SHARED else settings.personal
    begun, before = time.monotonic(), float(known.get("seconds", 0.0))
    curve: dict[int, Mapping[str, float]] = dict(known.get("curve", ()))
    users = _users(part, rows, settings.seed)
    try:
        report = fit(
            model,
            in_last_blocks(model, how.config().replace(base_model_name_or_path=settings.model), settings.last_blocks),
            users,
            _settings(how, len(users), settings.seed),
            collate=answers.collate,
            loss=answers.loss,
            sink=StoreSink(store, ALIAS),
            folder=folder / f"{part}-state",
            resume=True,
            told=[_teller(tick, sum(len(user.data) for user in users) * how.epochs, curve)],
            on=store.get(SHARED) if part == PERSONAL else None,
        )
    except BaseException:
        _write(file, {"seconds": before + time.monotonic() - begun, "curve": sorted(curve.items())})
        raise
    _check(report)
    order = {user.name: number for number, user in enumerate(users)}
    found = sorted(report.users, key=lambda user: order[user.name])
    result = Trained(tuple(found), before + time.monotonic() - begun, tuple(sorted(curve.items())))
    _write(file, result.to_dict())
    shutil.rmtree(folder / f"{part}-state", ignore_errors=True)
    return result


def is_trained(folder: Path, store: AdapterStore) -> bool:
    """Whether both parts are there."""
    return all(_is_whole(_read(folder / f"{part}.json"), store) for part in (SHARED, PERSONAL))


def _is_whole(known: Mapping[str, Any], store: AdapterStore) -> bool:
    """Whether what was written down of a part is all of it, and the store has its adapters."""
    users: list[dict[str, Any]] = known.get("users", [])
    return bool(users) and all(store.versions(user["name"]) for user in users if user["ended"] != "no gain")


def _users(part: str, rows: Mapping[str, Encoded], seed: int) -> list[User]:
    if part == PERSONAL:
        return [User(name, own.train, own.validation, seed) for name, own in rows.items()]
    together = [row for own in rows.values() for row in own.train], [row for o in rows.values() for row in o.validation]
    return [User(SHARED, *together, seed)]


def _settings(how: Training, users: int, seed: int) -> FleetSettings:
    return FleetSettings(
        batch_size=how.batch,
        users_per_step=users,
        epochs=how.epochs,
        learning_rate=how.rate,
        patience=how.patience,
        seed=seed,
        save_every=SAVE_EVERY,
    )


def _teller(tick: Tick, rows: float, curve: dict[int, Mapping[str, float]]) -> Callable[[Progress], None]:
    def told(progress: Progress) -> None:
        if progress.kind == "step":
            curve[progress.step] = {name: round(loss, 4) for name, loss in progress.losses.items()}
            tick(progress.rows / rows)

    return told


def _check(report: FleetReport) -> None:
    if report.failed:
        faults = "; ".join(f"{user.name}: {user.error}" for user in report.failed)
        raise CheckpointError(f"the demo's adapters could not be trained: {faults}")


def _read(file: Path) -> dict[str, Any]:
    """What was written there, or nothing where nothing was, or it is damaged: then it is trained again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, told: Mapping[str, Any]) -> None:
    with replacing(file, flushed=True) as fresh:
        fresh.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
