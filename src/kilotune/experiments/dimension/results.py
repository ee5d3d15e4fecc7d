"""What the search for an intrinsic dimension found, as plain data."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, final

from ..run_store import Run

__all__ = ["DimensionResult", "Level", "Outcome", "smallest_reaching"]


def smallest_reaching(values: Sequence[tuple[int, float]], threshold: float) -> int | None:
    """The smallest d whose value, and that of every larger d, is at least the threshold; None if there is none.

    Args:
        values: (d, value) of each d tried.
        threshold: to be reached.
    """
    answer = None
    for d, value in sorted(values, reverse=True):
        if value < threshold:
            break
        answer = d
    return answer


@final
@dataclass(frozen=True)
class Level:
    """One d of one structure (or full training), all its runs.

    Attributes:
        way: "did", "said" or "full".
        d: how many numbers were trained; 0 for full training.
        rate: the learning rate that was chosen.
        at_edge: it is the smallest or the largest that was tried: a better one may lie beyond.
        tuning: the runs that it was chosen by.
        runs: one per seed, at that rate.
    """

    way: str
    d: int
    rate: float
    at_edge: bool
    tuning: tuple[Run, ...]
    runs: tuple[Run, ...]

    @property
    def median(self) -> float:
        """Of the seeds' validation scores; a run that diverged counts as minus infinity."""
        return median(run.value for run in self.runs)

    @property
    def range(self) -> tuple[float, float]:
        """Worst and best validation score."""
        values = [run.value for run in self.runs]
        return min(values), max(values)

    @property
    def test_median(self) -> float | None:
        """Of the seeds' test scores; None if one diverged."""
        values = [run.test for run in self.runs]
        return median(value for value in values if value is not None) if None not in values else None

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types; None stands for a run that diverged."""
        worst, best = (value if abs(value) != float("inf") else None for value in self.range)
        return {
            "d": self.d,
            "rate": self.rate,
            "rate_at_edge": self.at_edge,
            "median": self.median if abs(self.median) != float("inf") else None,
            "worst": worst,
            "best": best,
            "test_median": self.test_median,
            "diverged": sum(run.validation is None for run in self.runs),
        }


@final
@dataclass(frozen=True)
class Outcome:
    """What was found for one structure.

    Attributes:
        structure: "did" or "said".
        threshold: the validation score to be reached.
        floor: a d that fails without being tried, as nothing is trained there.
        levels: every d tried, rising; empty where the untrained model reaches the threshold.
    """

    structure: str
    threshold: float
    floor: int
    levels: tuple[Level, ...]

    @property
    def d90(self) -> int | None:
        """The smallest d tried that reaches the threshold together with all larger ones tried.

        0 where the untrained model reaches it; None where no d does.
        """
        if not self.levels:
            return 0
        return smallest_reaching([(level.d, level.median) for level in self.levels], self.threshold)

    @property
    def below(self) -> int:
        """The largest d that failed: the answer lies above it."""
        failed = [level.d for level in self.levels if level.median < self.threshold]
        return max(failed, default=self.floor)

    @property
    def lucky(self) -> tuple[int, ...]:
        """Every d that reached the threshold although a larger one did not."""
        return tuple(level.d for level in self.levels if level.median >= self.threshold and level.d < self.below)

    @property
    def by_seed(self) -> tuple[int | None, ...]:
        """The same answer from each seed's scores alone, among the d's tried."""
        if not self.levels:
            return ()
        count = len(self.levels[0].runs)
        return tuple(
            smallest_reaching([(level.d, level.runs[i].value) for level in self.levels], self.threshold)
            for i in range(count)
        )

    @property
    def answer(self) -> Level | None:
        """The level of :attr:`d90`."""
        return next((level for level in self.levels if level.d == self.d90), None)

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {
            "structure": self.structure,
            "d": self.d90,
            "largest_that_failed": self.below,
            "d_by_seed": list(self.by_seed),
            "reached_below_a_failure": list(self.lucky),
            "levels": [level.to_dict() for level in self.levels],
        }


@final
@dataclass(frozen=True)
class DimensionResult:
    """The whole measurement.

    Attributes:
        task: its name.
        metric: what a score is.
        percent: scores are shares of 1, shown in percent.
        settings: of the runs, and under "search" of the search.
        layers: adapted layers.
        weights: numbers in them: D, what the subspace is in.
        trained_in_full: numbers that full training trains.
        share: of full training's score that was to be reached.
        threshold: that share of its median.
        start: the model before any training, a run per seed.
        full: full training.
        outcomes: by structure.
        reused: runs that were done before.
        seconds: of this call.
    """

    task: str
    metric: str
    percent: bool
    settings: dict[str, Any]
    layers: int
    weights: int
    trained_in_full: int
    share: float
    threshold: float
    start: tuple[Run, ...]
    full: Level
    outcomes: tuple[Outcome, ...]
    reused: int
    seconds: float

    @property
    def symbol(self) -> str:
        """d90, or what it is called at another share."""
        return f"d{100 * self.share:g}"

    @property
    def start_median(self) -> float:
        """Score before any training."""
        return median(run.value for run in self.start)

    def shown(self, value: float | None) -> str:
        """A score as it is printed."""
        if value is None or abs(value) == float("inf"):
            return "diverged"
        return f"{100 * value:.1f}" if self.percent else f"{value:.4g}"

    @property
    def answers(self) -> list[str]:
        """One sentence per structure."""
        return [self._answer(outcome) for outcome in self.outcomes]

    def _answer(self, outcome: Outcome) -> str:
        head = f"{outcome.structure.upper()}: {self.symbol}"
        if outcome.d90 is None:
            largest = outcome.levels[-1]
            return (
                f"{head} was not found: the largest d tried, {largest.d:,}, gives {self.shown(largest.median)}, and"
                f" {self.shown(self.threshold)} is wanted. Raise --highest, or train longer."
            )
        if outcome.d90 == 0:
            return (
                f"{head} = 0: before any training the model scores {self.shown(self.start_median)}, and"
                f" {self.shown(self.threshold)} is wanted."
            )
        seeds = [d for d in outcome.by_seed if d is not None]
        alone = f"{min(seeds):,} to {max(seeds):,}" if seeds else "none"
        if None in outcome.by_seed:
            alone += f"; not reached in {outcome.by_seed.count(None)} of {len(outcome.by_seed)}"
        text = f"{head} = {outcome.d90:,}; {outcome.below:,} is not enough. Seed by seed: {alone}."
        if outcome.lucky:
            text += f" Not counted, as a larger d failed: {', '.join(f'{d:,}' for d in outcome.lucky)}."
        return text

    @property
    def notes(self) -> list[str]:
        """What a reader should know of this very run."""
        edges = [f"{level.way} {level.d or ''}".strip() for level in self._all_levels() if level.at_edge]
        diverged = sum(run.validation is None for level in self._all_levels() for run in level.runs)
        notes = []
        if edges:
            notes.append(f"The best learning rate was at the end of those tried at: {', '.join(edges)}.")
        if diverged:
            notes.append(f"{diverged} of the reported runs diverged; they count as not reaching the threshold.")
        return notes

    def _all_levels(self) -> list[Level]:
        return [self.full, *(level for outcome in self.outcomes for level in outcome.levels)]

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types. All that may differ between two equal searches stands under "timings"."""
        levels = self._all_levels()
        runs = [*self.start, *(run for level in levels for run in (*level.tuning, *level.runs))]
        plain = [dataclasses.replace(run, seconds=0.0).to_dict() for run in runs]
        for run in plain:
            del run["seconds"]
        return {
            "experiment": "intrinsic-dimension",
            "task": self.task,
            "metric": self.metric,
            "settings": self.settings,
            "adapted_layers": self.layers,
            "adapted_weights": self.weights,
            "trained_in_full": self.trained_in_full,
            "share": self.share,
            "threshold": self.threshold,
            "start_median": self.start_median,
            "full": {name: value for name, value in self.full.to_dict().items() if name != "d"},
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
            "answers": self.answers,
            "notes": self.notes,
            "runs": plain,
            "timings": {"seconds": self.seconds, "runs_reused": self.reused, "runs": sum(run.seconds for run in runs)},
        }

    def to_csv(self) -> str:
        """A line per run: what it was, what it was for, and its scores."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("way", "d", "rate", "seed", "purpose", "validation", "test", "loss"))
        rows = [("reported", run) for run in self.start]
        for level in self._all_levels():
            rows += [*(("tuning", run) for run in level.tuning), *(("reported", run) for run in level.runs)]
        for purpose, run in rows:
            key = run.key
            writer.writerow((key.way, key.d, key.rate, key.seed, purpose, run.validation, run.test, run.loss))
        return out.getvalue()
