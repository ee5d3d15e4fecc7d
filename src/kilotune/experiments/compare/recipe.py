"""A recipe of ``kilotune train``: any transformers model on any data, each method trained as that command does it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from ...config import FrozenDict
from ...errors import ConfigError
from ...model.frozen_inputs import FrozenInputs
from ...model.kept_rows import KeptRows
from ...train.run import Session, evaluate, fit, open_session
from ...train.running.events import Event, Listener
from ...train.settings.config_file import load_settings
from ...train.settings.fields import Section
from ...train.settings.sections import AdapterSettings, LogSettings, TrainSettings
from ...train.tasks import Prepared
from ...train.trainer.from_settings import best_by, quiet, total_steps
from .problem import Bench, Contender, Problem, Score, Tick
from .problem_settings import RecipeSettings

__all__ = ["Recipe"]

# Settings of a training that the comparison decides, or that decide nothing of its numbers.
BETWEEN = ("eval_every", "save_every", "early_stopping", "load_best", "eval_batch_size", "best_metric")
OURS = ("seed", "learning_rate", "workers", "keep_checkpoints", *BETWEEN)
SHARES = ("accuracy", "f1", "precision", "recall", "exact")  # metrics that are shares of 1


RATIO = "training.lora_plus_ratio"
BARE = Contender("full", "full")  # the model without an adapter


@final
class Recipe(Problem):
    """The recipe's data are read once; the seed of a run decides all but the splits."""

    def __init__(self, settings: RecipeSettings) -> None:
        given = load_settings(Path(settings.config))
        for name, value in (("adapter.start", given.adapter.start), (RATIO, given.training.lora_plus_ratio)):
            if value is not None:
                raise ConfigError(f"{settings.config}: {name}: not all methods have it, so a comparison cannot")
        self.base = given
        run = given.training
        disk = tempfile.gettempdir() if run.input_cache == "disk" else None
        off = given.adapter.last_blocks is None or run.input_cache == "off"
        self.kept = None if off else KeptRows(run.input_cache_mb, disk)
        first = _opened(self._settings(BARE, 1.0, given.training.seed, 1.0, None))
        self.prepared: Prepared = first.prepared
        missing = [name for name in ("validation", "test") if getattr(self.prepared, name) is None]
        if missing:
            raise ConfigError(
                f"{settings.config}: a comparison needs a validation and a test split: give data.{missing[0]}, or "
                f"data.{missing[0]}_fraction"
            )
        self.origin = hashlib.sha256(json.dumps(dict(first.start), sort_keys=True, default=str).encode()).hexdigest()
        self.metric, self.larger_is_better = best_by(given, self.prepared)
        self.percent = self.metric.startswith(SHARES)
        self.steps = total_steps(given, self.prepared)
        self.name = f"{given.task}: {Path(settings.config).stem}"

    def describe(self) -> dict[str, Any]:
        given = self.base
        adapter = {} if given.adapter.last_blocks is None else {"last_blocks": given.adapter.last_blocks}
        parts = {section.SECTION: _chosen(section) for section in (given.model, given.data, given.training)}
        for name in OURS:
            parts["training"].pop(name, None)
        return {
            "problem": "recipe",
            "task": given.task,
            **parts,
            **adapter,
            "base_and_data": self.origin,
            "rows": self._rows(),
        }

    def _rows(self) -> dict[str, int]:
        splits: dict[str, Any] = {name: getattr(self.prepared, name) for name in ("train", "validation", "test")}
        return {name: len(rows) for name, rows in splits.items()}

    def _settings(
        self, contender: Contender, rate: float, seed: int, budget: float, folder: Path | None
    ) -> TrainSettings:
        run, changes = self.base.training, {}
        if not contender.is_adapter:  # one rate is all that they have
            changes = {"head_learning_rate": None}
        steps = run.max_steps if folder is None else max(1, round(budget * self.steps))
        return self.base.replace(
            output=None if folder is None else str(folder),
            adapter=AdapterSettings(
                method=contender.method,
                options=FrozenDict(contender.seeded(seed)),
                last_blocks=None if contender.method == "head" else self.base.adapter.last_blocks,
            ),
            training=run.replace(
                learning_rate=rate,
                seed=seed,
                max_steps=steps,
                **dict.fromkeys(BETWEEN),
                **changes,
            ),
            logging=LogSettings(progress="quiet", csv=False, report=False),
        )

    def run(self, contender: Contender, rate: float, seed: int, budget: float, test: bool, tick: Tick) -> Score:
        with tempfile.TemporaryDirectory(prefix="kilotune-compare-") as name:
            settings = self._settings(contender, rate, seed, budget, Path(name) / "run")
            session = self._open(settings, dataclasses.replace(self.prepared, validation=None, test=None))
            fit(session, listeners=[_Ticker(tick)])
            return self._score(session, test)

    def start(self, seed: int) -> Score:
        return self._score(self._open(self._settings(BARE, 1.0, seed, 1.0, None), self.prepared))

    def _open(self, settings: TrainSettings, prepared: Prepared) -> Session:
        """A session; what goes into the last blocks of the one base is kept for all of them."""
        session = _opened(settings, prepared)
        session.kept = self.kept
        return session

    def _score(self, session: Session, test: bool = True) -> Score:
        session.prepared = self.prepared
        held = evaluate(session, "validation")
        seen = evaluate(session, "test")[self.metric] if test else None
        return Score(held[self.metric], held["loss"], seen)

    def bench(self, contender: Contender | None) -> Bench:
        session = _opened(self._settings(contender or BARE, 1.0, 0, 1.0, None), self.prepared)
        model = session.model if contender is not None else session.model.requires_grad_(False)
        rows: Any = self.prepared.train
        batch = self.prepared.collate([rows[i] for i in range(min(len(rows), self.base.training.batch_size))])
        last = session.settings.adapter.last_blocks
        if last is None or self.kept is None:
            return Bench(model.train(), lambda: _loss(model, batch))
        frozen = FrozenInputs(model, last, self.kept)

        def loss() -> Tensor:
            with frozen:
                return _loss(model, batch)

        return Bench(model.train(), loss)


def _opened(settings: TrainSettings, prepared: Prepared | None = None) -> Session:
    """As :func:`open_session`; what transformers tells of each loading, a comparison would tell a hundred times."""
    with quiet():
        return open_session(settings, prepared)


def _chosen(section: Section) -> dict[str, Any]:
    """What is not as it is by default."""
    defaults = section.defaults()
    return {name: value for name, value in section.to_dict().items() if value != defaults[name]}


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    loss: Tensor = model(**{name: value.to(device) for name, value in batch.items()}).loss
    return loss


@final
class _Ticker(Listener):
    """Passes the steps on."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def hear(self, event: Event) -> None:
        if event.kind == "step":
            self.tick(1)

    def close(self) -> None:
        """Nothing is open."""
