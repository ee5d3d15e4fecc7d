"""What a comparison found, as plain data: rows, the Pareto front, and the tables as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, final

from .costs import Costs
from .problem import Contender
from .search import Found
from .trials import Trial

__all__ = ["Comparison", "Row"]

ONE_STEP_UP = {"lowest": "lower", "highest": "higher"}


@final
@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        contender: what it is.
        costs: what it costs.
        found: its search.
        searched: the search's runs.
        tests: the winner's runs, one per seed; none where every rate diverged.
    """

    contender: Contender
    costs: Costs
    found: Found
    searched: tuple[Trial, ...]
    tests: tuple[Trial, ...]

    @property
    def name(self) -> str:
        """In tables."""
        return self.contender.name

    @property
    def scores(self) -> list[float]:
        """On the test split, of the seeds that did not diverge."""
        return [trial.values["test"] for trial in self.tests if not trial.diverged]

    @property
    def failed(self) -> int:
        """Seeds that diverged."""
        return sum(trial.diverged for trial in self.tests)

    @property
    def mean(self) -> float | None:
        """Of the scores; None where a seed diverged, as a mean of the others would flatter."""
        return fmean(self.scores) if self.scores and not self.failed else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation between the seeds (n - 1); None of fewer than two."""
        return stdev(self.scores) if len(self.scores) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types, without seconds."""
        scores = self.scores
        return {
            "name": self.name,
            "method": self.contender.method,
            "options": dict(self.contender.options),
            **{name: value for name, value in self.costs.to_dict().items() if name != "step_seconds"},
            "rate": self.found.rate,
            "rate_at_edge": self.found.edge,
            "mean": self.mean,
            "deviation": self.deviation,
            "worst_and_best": [min(scores), max(scores)] if scores else None,
            "diverged": self.failed if self.tests else None,
            "scores": {str(trial.key.seed): trial.values.get("test") for trial in self.tests},
            "search": [
                {"rate": t.key.rate, "budget": t.key.budget, **(dict(t.values) or {"diverged": True})}
                for t in self.searched
            ],
        }


@final
@dataclass(frozen=True)
class Comparison:
    """The whole of it.

    Attributes:
        title: what was compared.
        metric: what a score is.
        percent: scores are shares of 1, shown in percent.
        larger_is_better: which way is up.
        settings: of the runs.
        search: of the learning rates; "budget" says in words what each contender's search was given.
        steps: of a run of full length.
        seeds: that are reported.
        start: test scores before any training.
        rows: one per contender.
        reused: runs that were done before.
        seconds: of this call.
    """

    title: str
    metric: str
    percent: bool
    larger_is_better: bool
    settings: dict[str, Any]
    search: dict[str, Any]
    steps: int
    seeds: tuple[int, ...]
    start: tuple[float, ...]
    rows: tuple[Row, ...]
    reused: int
    seconds: float

    @property
    def ranked(self) -> list[Row]:
        """Best mean first; those without one last."""
        scored = [row for row in self.rows if row.mean is not None]
        scored.sort(key=lambda row: row.mean or 0.0, reverse=self.larger_is_better)
        return [*scored, *(row for row in self.rows if row.mean is None)]

    @property
    def front(self) -> list[Row]:
        """Contenders than which none is both smaller on disk and as good, or as small and better; rising in bytes."""
        found: list[Row] = []
        for row in sorted(self.ranked, key=lambda row: row.costs.disk_bytes):  # stable: the better of a size first
            if row.mean is not None and (not found or self._better(row.mean, found[-1].mean or 0.0)):
                found.append(row)
        return found

    def _better(self, one: float, other: float) -> bool:
        return one > other if self.larger_is_better else one < other

    def shown(self, value: float | None) -> str:
        """A score as it is printed."""
        if value is None:
            return "diverged"
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"

    def spread(self, row: Row) -> str:
        """A row's mean and, of several seeds, the standard deviation."""
        if row.mean is None or row.deviation is None:
            return self.shown(row.mean)
        return f"{self.shown(row.mean)} ± {self.shown(row.deviation)}"

    @property
    def work(self) -> float:
        """Seconds of all runs that are part of it, those of before included."""
        return sum(trial.seconds for row in self.rows for trial in (*row.searched, *row.tests))

    @property
    def unit(self) -> str:
        """The metric, and what its numbers are."""
        way = "" if self.larger_is_better else ", less is better"
        return f"{self.metric}{' in %' if self.percent else ''}{way}"

    @property
    def notes(self) -> list[str]:
        """What a reader should know of this very comparison."""
        budget = self.search["budget"]
        count = len(self.seeds)
        first = (
            f"Every method's learning rate was searched with the same budget: {budget} of {self.steps:,} steps, with a "
            f"seed of its own, on the validation split. The winner was then run with {count} other "
            f"seed{'s' if count > 1 else ''}, and only these runs were scored on the test split."
        )
        notes = [first, f"Before any training the test score is {self.shown(fmean(self.start))}."]
        for row in self.rows:
            if row.found.rate is None:
                notes.append(f"{row.name}: diverged at every learning rate of full length.")
            elif row.found.edge is not None:
                notes.append(
                    f"{row.name}: the best learning rate, {row.found.rate:g}, is the {row.found.edge} of all that were "
                    f"tried; a {ONE_STEP_UP[row.found.edge]} one may be better, so its score may be too low."
                )
            if row.failed:
                notes.append(f"{row.name}: {row.failed} of {count} runs diverged.")
        return notes

    # -- files -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types. All that may differ between two equal comparisons stands under "timings"."""
        rows = [row.to_dict() for row in self.rows]
        ratios = {row["name"]: row.pop("step_ratio") for row in rows}
        return {
            "experiment": "compare",
            "title": self.title,
            "metric": self.metric,
            "larger_is_better": self.larger_is_better,
            "settings": self.settings,
            "search": self.search,
            "steps": self.steps,
            "seeds": list(self.seeds),
            "start": list(self.start),
            "methods": rows,
            "pareto_front": [row.name for row in self.front],
            "notes": self.notes,
            "timings": {
                "step_ratio": ratios,
                "step_seconds": {row.name: row.costs.step_seconds for row in self.rows},
                "seconds": self.seconds,
                "runs_reused": self.reused,
                "runs": self.work,
            },
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and cells of the table as it is printed, best first."""
        heads = ["", f"test {self.unit}", "trained", "bytes", "step / floor", "peak MB", "learning rate"]
        front = {row.name for row in self.front}
        cells = [
            [
                f"{row.name}{' *' if row.name in front else ''}",
                self.spread(row),
                f"{row.costs.trained:,}",
                f"{row.costs.disk_bytes:,}",
                f"{row.costs.step_ratio:.2f}",
                f"{row.costs.peak_bytes / 1e6:.1f}",
                _rate(row),
            ]
            for row in self.ranked
        ]
        return heads, cells

    def to_markdown(self) -> str:
        """The table, and the notes under it."""
        heads, cells = self.table()
        lines = [f"| {' | '.join(heads)} |", f"|---{'|---:' * (len(heads) - 1)}|"]
        lines += [f"| {' | '.join(row)} |" for row in cells]
        notes = "\n".join(f"- {note}" for note in [*self.notes, LEGEND])
        return f"# {self.title}\n\n" + "\n".join(lines) + f"\n\n{notes}\n"

    def to_csv(self) -> str:
        """A line per contender, in the order of the config."""
        names = [*_numbers(self.rows[0])] if self.rows else []
        return _csv(
            ["name", "method", *names], ([r.name, r.contender.method, *_numbers(r).values()] for r in self.rows)
        )

    def runs_csv(self) -> str:
        """A line per run."""
        heads = ["name", "part", "rate", "budget", "seed", "validation", "loss", "test", "seconds"]
        rows = [
            [row.name, t.key.part, t.key.rate, t.key.budget, t.key.seed]
            + [t.values.get(name) for name in ("validation", "loss", "test")]
            + [round(t.seconds, 3)]
            for row in self.rows
            for t in (*row.searched, *row.tests)
        ]
        return _csv(heads, rows)


LEGEND = (
    "\\*: on the Pareto front: no other is smaller on disk and as good. Step / floor: a training step's time against "
    "forward and backward through the frozen base. Peak MB: model, optimizer and the most that one step takes beyond."
)


def _rate(row: Row) -> str:
    if row.found.rate is None:
        return "none"
    return f"{row.found.rate:g}{f' ({row.found.edge})' if row.found.edge else ''}"


def _numbers(row: Row) -> dict[str, Any]:
    scores = row.scores
    return {
        "mean": row.mean,
        "deviation": row.deviation,
        "worst": min(scores, default=None),
        "best": max(scores, default=None),
        "seeds": len(scores),
        "diverged": row.failed,
        **asdict(row.costs),
        "rate": row.found.rate,
        "rate_at_edge": row.found.edge,
    }


def _csv(heads: Sequence[str], rows: Any) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return out.getvalue()
