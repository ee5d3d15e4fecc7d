"""The comparison itself: costs, then for each contender a search and the winner over several seeds.

::

    settings = load_comparison(Path("digits.yaml"))
    problem = make_problem(settings)
    contenders = contenders_of(settings, problem)
    journal = Journal(folder / "runs.jsonl", run_settings(problem, settings.threads), Trial.from_dict)
    comparison = compare(problem, contenders, settings, journal)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, final

import torch

from ...errors import ConfigError, DivergedError, KilotuneError, ResourceError, gather
from ..images.digits_data import Progress
from ..run_store import Journal
from .costs import Costs, Floor, measure
from .problem import Contender, Problem, Score
from .results import Comparison, Row
from .search import Found, Worth, halve
from .settings import CompareSettings
from .trials import COST, SEARCH, START, TEST, Trial, TrialKey

__all__ = ["compare", "run_settings"]

Store = Journal[Trial]


def run_settings(problem: Problem, threads: int) -> dict[str, Any]:
    """All that decides the numbers of a run beside its :class:`TrialKey`; what the journal is opened with.

    Search, seeds and methods are not among it: runs that are done serve a finer search, more seeds and more methods.
    """
    return {**problem.describe(), "threads": threads, "torch": str(torch.__version__)}


def compare(
    problem: Problem,
    contenders: Sequence[Contender],
    settings: CompareSettings,
    journal: Store | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare.

    Args:
        problem: what is learned.
        contenders: by what; see :func:`contenders_of`.
        settings: search, seeds, threads.
        journal: finished runs, which are not run again; each new one is added. None keeps nothing.
        progress: told of the work done, in optimizer steps.

    Raises:
        ConfigError: contenders that cannot be trained on this problem, all of them, before anything is run.
        KilotuneError: a run could not be kept.
    """
    began = time.perf_counter()
    if journal is None:
        journal = Journal(None, run_settings(problem, settings.threads), Trial.from_dict)
    with _threads(settings.threads), torch.random.fork_rng(devices=[]):
        runner = _Runner(problem, contenders, settings, journal, progress)
        costs = runner.costs()
        start = runner.starts()
        rows = tuple(runner.row(contender, costs[contender.recipe]) for contender in contenders)
    return Comparison(
        title=settings.title or problem.name,
        metric=problem.metric,
        percent=problem.percent,
        larger_is_better=problem.larger_is_better,
        settings=run_settings(problem, settings.threads),
        search={**settings.search.to_dict(), "budget": settings.search.budget},
        steps=problem.steps,
        seeds=settings.all_seeds,
        start=start,
        rows=rows,
        reused=journal.reused,
        seconds=time.perf_counter() - began,
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@final
class _Runner:
    """One comparison: what it runs, and how far it has come."""

    def __init__(
        self,
        problem: Problem,
        contenders: Sequence[Contender],
        settings: CompareSettings,
        journal: Store,
        progress: Progress | None,
    ) -> None:
        self.problem, self.contenders, self.settings = problem, contenders, settings
        self.journal, self.progress = journal, progress
        self.done = 0.0
        each = settings.search.cost + settings.seeds
        self.total = round(each * len(contenders) * problem.steps)

    def _kept(self, key: TrialKey, run: Callable[[], Mapping[str, float]]) -> Trial:
        """The trial, from the journal if it is done."""
        found = self.journal.get(key)
        if found is None:
            began = time.perf_counter()
            try:
                values = run()
            except DivergedError:
                values = {}
            found = Trial(key, values, time.perf_counter() - began)
            self.journal.add(found)
        return found

    # -- before any training -----------------------------------------------------------------------

    def costs(self) -> dict[str, Costs]:
        """Of every contender, by its recipe; so what cannot be trained is found before anything is."""
        floor: list[Floor] = []

        def taken(contender: Contender) -> Callable[[], Mapping[str, float]]:
            def run() -> Mapping[str, float]:
                if not floor:
                    floor.append(Floor(self.problem.bench(None)))
                return measure(self.problem.bench(contender), floor[0]).to_dict()

            return run

        found, faults = {}, []
        for contender in self.contenders:
            self._tell(f"{contender.name}: costs")
            try:
                trial = self._kept(TrialKey(COST, contender.recipe, 0.0, 0.0, 0), taken(contender))
            except ResourceError:  # no room for the run, or no memory: of no method's making
                raise
            except KilotuneError as error:
                faults.append(f"{contender.name}: {error}")
                continue
            found[contender.recipe] = _costs(trial.values)
        if faults:
            raise ConfigError(gather(f"these cannot be trained on {self.problem.name}:", faults))
        return found

    def starts(self) -> tuple[float, ...]:
        """Scores on the test split before any training, one per seed."""
        self._tell("the start")
        return tuple(self._start(seed) for seed in self.settings.all_seeds)

    def _start(self, seed: int) -> float:
        trial = self._kept(TrialKey(START, "", 0.0, 0.0, seed), lambda: _plain(self.problem.start(seed)))
        return trial.values["test"]

    # -- one contender -------------------------------------------------------------------------------

    def row(self, contender: Contender, costs: Costs) -> Row:
        """Search, then the winner over the seeds."""
        found = halve(self.settings.search, lambda rate, share: self._worth(contender, rate, share))
        tests = () if found.rate is None else self._tests(contender, found.rate)
        return Row(contender, costs, found, self._searched(contender, found), tests)

    def _worth(self, contender: Contender, rate: float, share: float) -> Worth:
        trial = self._train(contender, SEARCH, rate, share, self.settings.search.seed)
        if trial.diverged:
            return -math.inf, -math.inf
        sign = 1 if self.problem.larger_is_better else -1
        return sign * trial.values["validation"], -trial.values["loss"]

    def _tests(self, contender: Contender, rate: float) -> tuple[Trial, ...]:
        return tuple(self._train(contender, TEST, rate, 1.0, seed) for seed in self.settings.all_seeds)

    def _searched(self, contender: Contender, found: Found) -> tuple[Trial, ...]:
        """The search's trials, in order: all are in the journal."""
        seed = self.settings.search.seed
        keys = [TrialKey(SEARCH, contender.recipe, one.rate, one.share, seed) for one in found.tries]
        return tuple(trial for key in keys if (trial := self.journal.get(key)) is not None)

    def _train(self, contender: Contender, part: str, rate: float, share: float, seed: int) -> Trial:
        what = f"{contender.name}: seed {seed}" if part == TEST else f"{contender.name}: rate {rate:g}"
        test = part == TEST
        before, steps = self.done, share * self.problem.steps
        self._tell(what)

        def tick(count: int) -> None:
            self.done = min(before + steps, self.done + count)
            self._tell(what)

        key = TrialKey(part, contender.recipe, rate, share, seed)
        trial = self._kept(key, lambda: _plain(self.problem.run(contender, rate, seed, share, test, tick)))
        self.done = before + steps
        self._tell(what)
        return trial

    def _tell(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, round(self.done), self.total)


def _plain(score: Score) -> dict[str, float]:
    """By name; nothing where a score is no number, which counts as diverged."""
    values = {name: value for name, value in asdict(score).items() if value is not None}
    return values if all(map(math.isfinite, values.values())) else {}


def _costs(values: Mapping[str, float]) -> Costs:
    whole = {name: int(values[name]) for name in ("trained", "disk_bytes", "peak_bytes")}
    return Costs(**whole, step_ratio=values["step_ratio"], step_seconds=values["step_seconds"])
