"""The intrinsic dimension of a task: the smallest d that reaches 90 % of full training's score.

Li et al. 2018 (arXiv 1804.08838) train a network from random weights in a random subspace of d dimensions, Aghajanyan
et al. 2020 (arXiv 2012.13255) fine-tune a pretrained one so. A task says which of the two it is.

The search. Full training is tuned and run over some seeds; share (0.9) times the median of its validation scores is the
threshold. Then d is tried on a logarithmic grid, and between the largest d that failed and the next larger one by
bisection, until their ratio is at most 1 + resolution, or nothing is between them. A d reaches the threshold if the
median of its seeds does. **The answer is the smallest d tried that reaches it together with every larger d tried.**
That a larger d is better is not assumed: where a smaller one reached it and a larger one did not, the larger decides,
and the result says so.

At each d the learning rate is chosen on the validation data, with a seed of its own; full training's is chosen alike.
The test data decide nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, final

import torch
from torch import nn

from ...errors import ConfigError, DivergedError, KilotuneError
from ...methods import IntrinsicConfig
from ...model.peft_model import get_peft_model
from ..images.digits_data import Progress
from ..images.tasks import Scores, Task, Tick
from ..images.training import one_thread
from ..run_store import FULL, START, Key, Run, RunStore
from .results import DimensionResult, Level, Outcome
from .settings import Search

__all__ = ["Search", "measure", "run_settings"]

TUNING_SEED = 10_000
"""Added to the first seed: learning rates are chosen with a seed that is not reported."""
WIDENINGS = 2
"""How many learning rates beyond the given ones are tried, where the best one is the smallest or the largest."""


def run_settings(task: Task, search: Search) -> dict[str, Any]:
    """All that decides the numbers of one run beside its :class:`Key`; what a store of finished runs is opened with.

    The grid, the seeds, the learning rates, the share and the resolution are not among it: runs that are done serve
    a search that is finer or wider, too.
    """
    targets = task.targets if isinstance(task.targets, str) else list(task.targets)
    return {**task.describe(), "targets": targets, "projection": search.projection, "torch": str(torch.__version__)}


def measure(
    task: Task, search: Search, store: RunStore | None = None, progress: Progress | None = None
) -> DimensionResult:
    """Search the task's intrinsic dimension.

    Args:
        task: what is trained and scored.
        search: where and how finely to look.
        store: finished runs, which are not run again; each new one is added. None keeps nothing.
        progress: told of the work done, in training steps. The total is an upper bound.

    Raises:
        ConfigError: the search does not fit the model: d beyond the adapted weights.
        KilotuneError: full training diverged or got nowhere, or a run could not be kept.
    """
    began = time.perf_counter()
    if store is None:
        store = RunStore(None, run_settings(task, search))
    with one_thread(), torch.random.fork_rng(devices=[]):
        return _Searcher(task, search, store, progress).result(began)


def _grid(lowest: int, highest: int, points: int) -> list[int]:
    """Whole numbers from lowest to highest, evenly spaced in their logarithm, without repeats."""
    ratio = (highest / lowest) ** (1 / (points - 1))
    return sorted({lowest, highest, *(round(lowest * ratio**i) for i in range(points))})


@final
class _Searcher:
    """One search: what it runs, and how far it has come."""

    def __init__(self, task: Task, search: Search, store: RunStore, progress: Progress | None) -> None:
        self.task, self.search, self.store, self.progress = task, search, store, progress
        adapted = get_peft_model(task.build(search.first_seed), self._config(1, "did", 0)).adapted_layers()
        self.layers = len(adapted)
        self.weights = sum(layer.base_matrix().numel() for layer in adapted.values())
        self.lowest = {"did": 1, "said": self.layers + 1}
        self._check_reach()
        self.done = 0
        self.total = self._runs_at_most() * task.steps

    def _check_reach(self) -> None:
        if self.search.highest > self.weights:
            raise ConfigError(
                f"highest is {self.search.highest:,}, but the {self.layers} adapted layers have only {self.weights:,}"
                " weights, and a subspace cannot have more dimensions; choose a smaller one"
            )
        floor = max(self.lowest[structure] for structure in self.search.structures)
        if self.search.highest <= floor:
            raise ConfigError(
                f"highest is {self.search.highest}, but 'said' counts a scale for each of the {self.layers} layers in"
                f" d, so that d starts at {floor} there; choose a larger one"
            )

    def _config(self, d: int, structure: str, seed: int) -> IntrinsicConfig:
        return IntrinsicConfig(
            d=d,
            structure=structure,
            projection=self.search.projection,
            projection_prng_key=seed,
            target_modules=self.task.targets,
        )

    def _runs_at_most(self) -> int:
        """Trainings, if the bracket is between two points of the grid and no rate is at an edge."""
        search = self.search
        each = search.seeds + (len(search.rates) if len(search.rates) > 1 else 0)
        full = search.seeds + (len(search.full_rates) if len(search.full_rates) > 1 else 0)
        gap = math.log(search.highest / search.lowest) / (search.points - 1)
        halvings = max(0, math.ceil(math.log2(gap / math.log1p(search.resolution))))
        return full + len(search.structures) * (search.points + halvings) * each

    # -- one run ---------------------------------------------------------------------------------

    def run(self, key: Key) -> Run:
        """The run, from the store if it is done."""
        label = key.way if key.way in (FULL, START) else f"{key.way}, d {key.d}"
        before = self.done
        self._tell(label, 0)
        run = self.store.get(key)
        if run is None:
            run = self._train(key, lambda steps: self._tell(label, steps))
            self.store.add(run)
        if key.way != START:
            self.done = before + self.task.steps
            self._tell(label, 0)
        return run

    def _tell(self, label: str, steps: int) -> None:
        self.done += steps
        self.total = max(self.total, self.done)
        if self.progress is not None:
            self.progress(label, self.done, self.total)

    def _train(self, key: Key, tick: Tick) -> Run:
        began = time.perf_counter()
        torch.manual_seed(key.seed)  # whatever the task leaves to the global generator comes out the same again
        model = self._model(key)
        try:
            if key.way != START:
                self.task.fit(model, key.rate, key.seed, tick)
            scores = self.task.scores(model)
        except DivergedError:
            scores = Scores(math.nan, math.nan, math.nan)
        seconds = time.perf_counter() - began
        if not all(map(math.isfinite, (scores.validation, scores.test, scores.loss))):
            return Run(key, None, None, None, seconds)
        return Run(key, scores.validation, scores.test, scores.loss, seconds)

    def _model(self, key: Key) -> nn.Module:
        model = self.task.build(key.seed)
        if key.way in (FULL, START):
            return model
        adapted = get_peft_model(model, self._config(key.d, key.way, key.seed))
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        if trained != key.d:
            raise KilotuneError(f"{trained} numbers would be trained, not d = {key.d}: this is a defect of kilotune")
        return adapted

    # -- one d -----------------------------------------------------------------------------------

    def level(self, way: str, d: int, rates: Sequence[float]) -> Level:
        """Choose the learning rate, then run all seeds with it."""
        tried = self._tuned(way, d, rates)
        best = min(tried, key=_order) if tried else None
        rate = rates[0] if best is None else best.key.rate
        runs = [self.run(Key(way, d, rate, seed)) for seed in self.search.all_seeds]
        ends = [run.key.rate for run in tried]
        edge = len(ends) > 1 and rate in (min(ends), max(ends))
        return Level(way, d, rate, edge, tuple(tried), tuple(runs))

    def _tuned(self, way: str, d: int, rates: Sequence[float]) -> list[Run]:
        """A run per learning rate, and beyond the ends while the best one is at an end; none if there is no choice."""
        if len(rates) == 1:
            return []
        seed = self.search.first_seed + TUNING_SEED
        tried = [self.run(Key(way, d, rate, seed)) for rate in rates]
        for _ in range(WIDENINGS):
            best = min(tried, key=_order).key.rate
            known = sorted(run.key.rate for run in tried)
            if best == known[-1]:
                further = best * known[-1] / known[-2]
            elif best == known[0]:
                further = best * known[0] / known[1]
            else:
                break
            self.total += self.task.steps
            tried.append(self.run(Key(way, d, float(f"{further:.3g}"), seed)))
        return tried

    # -- the search ------------------------------------------------------------------------------

    def result(self, began: float) -> DimensionResult:
        start = [self.run(Key(START, 0, 0.0, seed)) for seed in self.search.all_seeds]
        full = self.level(FULL, 0, self.search.full_rates)
        reference = full.median
        if not 0 < reference < math.inf:
            raise KilotuneError(
                f"full training's median score is {reference:g}, and a share of it says nothing: it diverged or learnt"
                " nothing at every learning rate; try others, or train longer"
            )
        threshold = self.search.share * reference
        outcomes = [
            self._search(structure, threshold, median(run.value for run in start))
            for structure in self.search.structures
        ]
        network = self.task.build(self.search.first_seed)
        return DimensionResult(
            task=self.task.name,
            metric=self.task.metric,
            percent=self.task.percent,
            settings={**run_settings(self.task, self.search), "search": _plain(self.search)},
            layers=self.layers,
            weights=self.weights,
            trained_in_full=sum(p.numel() for p in network.parameters() if p.requires_grad),
            share=self.search.share,
            threshold=threshold,
            start=tuple(start),
            full=full,
            outcomes=tuple(outcomes),
            reused=self.store.reused,
            seconds=time.perf_counter() - began,
        )

    def _search(self, structure: str, threshold: float, start: float) -> Outcome:
        """Grid, then bisection."""
        lowest = self.lowest[structure]
        if start >= threshold:
            return Outcome(structure, threshold, 0, ())
        levels: dict[int, Level] = {}

        def outcome() -> Outcome:
            # below `lowest` nothing is trained (did), or scales of nothing (said): the model is what it was
            return Outcome(structure, threshold, lowest - 1, tuple(levels[d] for d in sorted(levels)))

        for d in _grid(max(lowest, self.search.lowest), self.search.highest, self.search.points):
            levels[d] = self.level(structure, d, self.search.rates)
        while (found := outcome()).d90 is not None:
            low, high = found.below, found.d90
            if high - low <= 1 or high <= low * (1 + self.search.resolution):
                break
            middle = min(max(round(math.sqrt(max(low, 1) * high)), low + 1), high - 1)
            levels[middle] = self.level(structure, middle, self.search.rates)
        return found


def _order(run: Run) -> tuple[float, float, float]:
    """The best first: by score, then by loss, then the smaller rate."""
    return (-run.value, math.inf if run.loss is None else run.loss, run.key.rate)


def _plain(search: Search) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(search).items()}
