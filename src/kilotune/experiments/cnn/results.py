"""What the experiment measured, as plain data, and the checks that decide whether it succeeded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, final

from torch import Tensor

from .settings import LABELS, METHODS, CnnSettings

__all__ = ["AdapterFacts", "Check", "CnnResult", "Counts", "MethodRun", "SeedRun", "checks_of", "spread"]

LEAST_GAIN = 0.10
"""Mean accuracy that the adapted classes must gain, over the seeds: 10 points."""
LEAST_PRICE = 0.05
"""Mean accuracy that the other classes must lose, over the seeds: 5 points."""
MERGE_TOLERANCE = 1e-4
"""Largest change of an output by merging, against the largest output: some hundred float32 roundings."""

Curve = list[tuple[int, float]]


@final
@dataclass(frozen=True)
class Counts:
    """Parameters of one adapted network, in both ways of counting.

    Attributes:
        method: "vera" or "lora".
        rank: its rank.
        widths: the network's fully connected part.
        trainable: numbers that are trained.
        frozen: numbers of the base network, all frozen.
        shared: numbers of the frozen random pairs, each counted once; the tutorials leave them out.
        pairs: frozen random pairs.
        tutorial: (trainable, frozen, total) that the tutorial prints for this very network, if it has one.
    """

    method: str
    rank: int
    widths: tuple[int, ...]
    trainable: int
    frozen: int
    shared: int
    pairs: int
    tutorial: tuple[int, int, int] | None = None

    @property
    def total(self) -> int:
        """As the tutorials count: without the shared pairs."""
        return self.trainable + self.frozen

    @property
    def total_by_location(self) -> int:
        """Every number in memory once, the shared pairs too."""
        return self.total + self.shared

    @property
    def percent(self) -> float:
        """Trained share of :attr:`total`, in percent."""
        return 100 * self.trainable / self.total

    @property
    def percent_by_location(self) -> float:
        """Trained share of :attr:`total_by_location`, in percent."""
        return 100 * self.trainable / self.total_by_location

    def to_dict(self) -> dict[str, Any]:
        """Fields and sums, in plain JSON types."""
        return {
            **dataclasses.asdict(self),
            "total_as_tutorial": self.total,
            "percent_as_tutorial": self.percent,
            "total_by_location": self.total_by_location,
            "percent_by_location": self.percent_by_location,
        }


@final
@dataclass(frozen=True)
class AdapterFacts:
    """What is measured of an adapter, and cannot be of full fine-tuning.

    Attributes:
        norms: per layer, the norm of what starts at zero (VeRA's b, LoRA's B) before and after training.
        base_intact: with the adapter switched off, all outputs are the pretrained network's, bit for bit.
        merge_difference: largest change of an output by merging, against the largest output.
        merge_changes: test pictures that the merged network answers differently.
        unmerge_exact: after unmerging, all outputs are what they were, bit for bit.
    """

    norms: dict[str, tuple[float, float]]
    base_intact: bool
    merge_difference: float
    merge_changes: int
    unmerge_exact: bool


@final
@dataclass(frozen=True)
class MethodRun:
    """One copy of one pretrained network, adapted by one method.

    Attributes:
        after: accuracy per class after adapting, 0 to 1.
        among: accuracy on the adapted classes when only they may be answered.
        losses: training loss, as (step, mean of the steps up to it).
        seconds: of training.
        reload_exact: saved and loaded again, all outputs are what they were, bit for bit.
        weight_bytes: of the saved weights' file.
        folder_bytes: of everything that was saved.
        adapter: what is measured of adapters only.
    """

    after: list[float]
    among: float
    losses: Curve
    seconds: float
    reload_exact: bool
    weight_bytes: int
    folder_bytes: int
    adapter: AdapterFacts | None = None


@final
@dataclass(frozen=True)
class SeedRun:
    """One seed: a network pretrained on ten classes, and its adapted copies.

    Attributes:
        seed: the seed.
        pretrained: accuracy per class on the test pictures as they were pretrained on (not turned).
        before: the same with the adapted classes' pictures turned: where the copies start.
        among: accuracy on the adapted classes before, when only they may be answered.
        losses: of the pretraining, as (step, mean of the steps up to it).
        seconds: of the pretraining.
        runs: by method.
    """

    seed: int
    pretrained: list[float]
    before: list[float]
    among: float
    losses: Curve
    seconds: float
    runs: dict[str, MethodRun]

    def change(self, method: str, classes: Iterable[int]) -> float:
        """Mean change of accuracy on these classes by a method."""
        after = self.runs[method].after
        return fmean(after[c] - self.before[c] for c in classes)


@final
@dataclass(frozen=True)
class Check:
    """One claim, whether it held, and the numbers."""

    name: str
    passed: bool
    detail: str


@final
@dataclass(frozen=True)
class CnnResult:
    """The whole experiment.

    Attributes:
        settings: what it was run with.
        source: where the pictures come from.
        class_names: the ten classes' names.
        sizes: pictures to pretrain on, to adapt to, and to test on.
        counts: parameters of VeRA's and LoRA's networks.
        seeds: one entry per seed.
        versions: of Python and the packages that decide the numbers.
        seconds: of everything.
        adapters: the first seed's saved adapters, as file name -> content.
        samples: one test picture per class as pretrained on, and as tested after, each (10, 3, 32, 32) uint8.
    """

    settings: CnnSettings
    source: str
    class_names: tuple[str, ...]
    sizes: dict[str, int]
    counts: list[Counts]
    seeds: list[SeedRun]
    versions: dict[str, str]
    seconds: float
    adapters: dict[str, bytes]
    samples: tuple[Tensor, Tensor]

    @property
    def checks(self) -> list[Check]:
        """Every check, in order of reading."""
        return checks_of(self.settings, self.counts, self.seeds)

    @property
    def failures(self) -> list[Check]:
        """The checks that did not hold."""
        return [check for check in self.checks if not check.passed]

    def levels(self, method: str | None, classes: Iterable[int]) -> list[float]:
        """Per seed, mean accuracy on these classes after a method, or before any (None)."""
        chosen = list(classes)
        return [fmean((run.runs[method].after if method else run.before)[c] for c in chosen) for run in self.seeds]

    def among(self, method: str | None) -> float:
        """Mean accuracy on the adapted classes when only they may be answered, per stage as above."""
        return fmean(run.runs[method].among if method else run.among for run in self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types. All that may differ between two equal runs stands under "timings"."""
        seeds = [dataclasses.asdict(run) for run in self.seeds]
        timings: dict[str, Any] = {"total_seconds": self.seconds, "seeds": []}
        for seed in seeds:
            adapting = {method: run.pop("seconds") for method, run in seed["runs"].items()}
            timings["seeds"].append({"pretraining": seed.pop("seconds"), **adapting})
        return {
            "experiment": "convnet",
            "settings": self.settings.to_dict(),
            "source": self.source,
            "class_names": list(self.class_names),
            "pictures": self.sizes,
            "counts": [counts.to_dict() for counts in self.counts],
            "summary": self._summary(),
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "passed": not self.failures,
            "seeds": seeds,
            "versions": self.versions,
            "timings": timings,
        }

    def _summary(self) -> dict[str, Any]:
        adapted, others = self.settings.classes, self.settings.other_classes
        stages: dict[str, str | None] = {"before": None, **{method: method for method in METHODS}}
        return {
            stage: {
                "adapted": fmean(self.levels(method, adapted)),
                "others": fmean(self.levels(method, others)),
                "all": fmean(self.levels(method, range(10))),
                "adapted_among_themselves": self.among(method),
            }
            for stage, method in stages.items()
        }


def spread(values: Sequence[float]) -> str:
    """Mean and range of shares in percent, such as ``41.0 (31.2 to 54.4)``; one value stands alone."""
    mean = f"{100 * fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def checks_of(settings: CnnSettings, counts: Sequence[Counts], seeds: Sequence[SeedRun]) -> list[Check]:
    """Every check of the experiment, from its numbers alone."""
    return [
        *[_gains(method, settings, seeds) for method in METHODS],
        *[_pays(method, settings, seeds) for method in METHODS],
        *[_left_zero(method, seeds) for method in ("vera", "lora")],
        *[_invariants(method, seeds) for method in ("vera", "lora")],
        _reloads(seeds),
        _sizes(seeds),
        *[_counts(row) for row in counts if row.tutorial is not None],
    ]


def _points(values: Sequence[float]) -> str:
    each = ", ".join(f"{100 * value:+.1f}" for value in values)
    return f"{100 * fmean(values):+.1f} points on average (seed by seed {each})"


def _gains(method: str, settings: CnnSettings, seeds: Sequence[SeedRun]) -> Check:
    gains = [seed.change(method, settings.classes) for seed in seeds]
    single = {c: fmean(seed.change(method, [c]) for seed in seeds) for c in settings.classes}
    passed = fmean(gains) >= LEAST_GAIN and min(gains) > 0 and min(single.values()) > 0
    wanted = f"wanted: {100 * LEAST_GAIN:.0f} or more, every seed and every class up"
    return Check(f"{LABELS[method]}: the adapted classes gain", passed, f"{_points(gains)}; {wanted}")


def _pays(method: str, settings: CnnSettings, seeds: Sequence[SeedRun]) -> Check:
    changes = [seed.change(method, settings.other_classes) for seed in seeds]
    passed = fmean(changes) <= -LEAST_PRICE and max(changes) < 0
    wanted = f"wanted: {-100 * LEAST_PRICE:.0f} or less, every seed down"
    return Check(f"{LABELS[method]}: the other classes pay", passed, f"{_points(changes)}; {wanted}")


def _facts(method: str, seeds: Sequence[SeedRun]) -> list[AdapterFacts]:
    return [facts for seed in seeds if (facts := seed.runs[method].adapter) is not None]


def _left_zero(method: str, seeds: Sequence[SeedRun]) -> Check:
    norms = [norm for facts in _facts(method, seeds) for norm in facts.norms.values()]
    passed = bool(norms) and all(before == 0.0 and after > 0.0 for before, after in norms)
    before, after = [pair[0] for pair in norms], [pair[1] for pair in norms]
    detail = "no layer was measured"
    if norms:
        detail = f"norms over all layers and seeds: {max(before):g} before,"
        detail += f" {min(after):.3g} to {max(after):.3g} after"
    return Check(f"{LABELS[method]}: {'b' if method == 'vera' else 'B'} left zero in every layer", passed, detail)


def _invariants(method: str, seeds: Sequence[SeedRun]) -> Check:
    all_facts = _facts(method, seeds)
    moved = [facts.merge_difference for facts in all_facts]
    faults = [
        *(["the base moved"] if not all(facts.base_intact for facts in all_facts) else []),
        *(["merging moved the outputs"] if not all(value <= MERGE_TOLERANCE for value in moved) else []),
        *(["unmerging did not give the outputs back"] if not all(f.unmerge_exact for f in all_facts) else []),
    ]
    detail = (
        f"merging moved no output by more than {max(moved):.1e} of the largest one, and changed"
        f" {sum(facts.merge_changes for facts in all_facts)} answers; unmerged, and with the adapter off,"
        " outputs are bit for bit what they were"
    )
    return Check(
        f"{LABELS[method]}: merging moves nothing, the base is intact", not faults, "; ".join(faults) or detail
    )


def _reloads(seeds: Sequence[SeedRun]) -> Check:
    wrong = [f"{LABELS[m]} (seed {seed.seed})" for seed in seeds for m in METHODS if not seed.runs[m].reload_exact]
    detail = f"not equal: {', '.join(wrong)}" if wrong else "all outputs equal, bit for bit"
    return Check("saved and loaded again, every copy is the same", not wrong, detail)


def _sizes(seeds: Sequence[SeedRun]) -> Check:
    sizes = [tuple(seed.runs[method].weight_bytes for method in METHODS) for seed in seeds]
    vera, lora, full = sizes[0]
    passed = all(v < lo < f for v, lo, f in sizes)
    detail = f"{vera:,} bytes against {lora:,} and {full:,}"
    return Check("VeRA's file is smaller than LoRA's, LoRA's than the network's", passed, detail)


def _counts(row: Counts) -> Check:
    assert row.tutorial is not None
    counted = (row.trainable, row.frozen, row.total)
    detail = f"{row.trainable:,} trained of {row.total:,}, {row.percent:.2f} %"
    if counted != row.tutorial:
        detail += ", but the tutorial has {:,}, {:,} frozen and {:,} in all".format(*row.tutorial)
    return Check(f"{LABELS[row.method]}: parameters as in the tutorial's table", counted == row.tutorial, detail)
