"""Do the learning rates that kilotune takes by itself learn? Held against a grid, on four models.

python benchmarks/defaults.py [--only smollm2/vera] [--grid-only] [--seeds 3] [--out benchmarks/results] [--threads 1]

Each case is a model, a method and a length of training. It is run at each rate of a grid (factors of 10^(1/2), on until
the best is not at an end) with one seed, then at the best of these and at the rate that ``kilotune train`` would take
without ``--learning-rate``, with three seeds. A case holds where the mean loss at that rate is within 5 %, or one
standard deviation of the seeds, of that at the grid's best. The bar: nine of ten cases hold.

What is run is kept in a file of results, a line each, so the script goes on where it was stopped, and says how much of
the grid there is. The data: examples/compare/collect_summaries.py (smollm2), collect_docstrings.py (minilm),
collect_source.py and pretrain.py (toy); docs/compare.md says how. Cases whose data is not there are passed over, and
told.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kilotune.errors import DivergedError
from kilotune.experiments.compare.digits import Digits
from kilotune.experiments.compare.problem import Contender, Problem
from kilotune.experiments.compare.problem_settings import DigitsSettings, RecipeSettings
from kilotune.experiments.compare.recipe import Recipe

STEP = math.sqrt(10)
CLOSE, SHARE = 1.05, 0.9  # of the grid's best loss; of the cases
ALL: Mapping[str, Any] = {"target_modules": "all-linear"}
SEARCHED = 7  # seed of the grid; the reported ones are 0, 1, 2

LANGUAGE: Mapping[str, Mapping[str, Any]] = {
    "vera": {"r": 256, **ALL},
    "vera-64": {"method": "vera", "r": 64, **ALL},
    "lora": {"r": 8, **ALL},
    "lora-1": {"method": "lora", "r": 1, **ALL},
    "ia3": {**ALL},
    "unilora": {"theta_d_length": 2048, **ALL},
}
SMALL: Mapping[str, Mapping[str, Any]] = {
    **LANGUAGE,
    "loraxs": {"r": 32, **ALL},
    "dvora": {"r": 256, **ALL},
    "dora": {"r": 8, **ALL},
    "bitfit": {},
    "bottleneck": {"width": 16},
}
DATA = Path("data/compare")


@dataclass(frozen=True)
class Model:
    """What is learned, on which model. steps: lengths of training. centre: of each method's grid, in powers of 10."""

    name: str
    methods: Mapping[str, Mapping[str, Any]]
    steps: tuple[int, ...]
    recipe: Mapping[str, Any] | None = None


def causal(base: str, data: str, **more: Any) -> dict[str, Any]:
    """A recipe of ``kilotune train``."""
    where = DATA / data
    return {
        "task": "causal-lm",
        "model": {"base": base},
        "data": {s: f"{where}/{n}.jsonl" for s, n in (("train", "train"), ("validation", "validation"))}
        | {"test": f"{where}/test.jsonl", "max_length": 64, "plain": True},
        **more,
    }


def training(batch: int) -> dict[str, Any]:
    """As ``kilotune train`` trains by default."""
    return {"epochs": 100, "batch_size": batch, "device": "cpu", "eval_batch_size": None}


MODELS = (
    Model(
        "smollm2",
        LANGUAGE,
        (40, 160),
        {**causal("smollm2", "summaries"), "adapter": {"last_blocks": 4}, "training": training(4)},
    ),
    Model(
        "minilm",
        SMALL,
        (100, 400),
        {
            "task": "text-classification",
            "model": {"base": str(DATA / "minilm")},
            "data": {
                **{s: str(DATA / "docstrings" / f"{s}.jsonl") for s in ("train", "validation", "test")},
                "max_length": 24,
            },
            "training": training(8),
        },
    ),
    Model(
        "toy",
        {k: v for k, v in SMALL.items() if k != "bitfit"},
        (40, 160),
        {
            "task": "causal-lm",
            "model": {"base": str(DATA / "base")},
            "data": {
                **{s: str(DATA / "source" / f"cpp-{s}.jsonl") for s in ("train", "validation", "test")},
                "max_length": 128,
                "limit": 640,
            },
            "training": training(8),
        },
    ),
    Model("digits", {name: {} for name in ("vera", "lora", "ia3", "unilora", "dvora", "bitfit", "bottleneck")}, (0,)),
)


def problem_of(model: Model, steps: int) -> Problem:
    """The problem of a model.

    Raises:
        OSError, KilotuneError: its data is not there.
    """
    if model.recipe is None:
        return Digits(DigitsSettings(epochs=8))
    recipe = {**model.recipe, "training": {**model.recipe["training"], "max_steps": steps}}
    recipe["training"].pop("epochs")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        return Recipe(RecipeSettings(config=str(path)))


@dataclass(frozen=True)
class Case:
    """A problem and a contender. key: in the file of results."""

    key: str
    problem: Problem
    contender: Contender
    steps: int


def cases_of(model: Model) -> Iterator[Case]:
    kept = None
    for steps in model.steps:
        problem = problem_of(model, steps)
        if isinstance(problem, Recipe):  # what goes into the last blocks is the same for all lengths
            kept = problem.kept = problem.kept if kept is None else kept
        for name, options in model.methods.items():
            chosen = dict(problem.usual(name)) | dict(options)
            method = chosen.pop("method", name)
            yield Case(f"{model.name}/{name}/{problem.steps}", problem, Contender(name, method, chosen), problem.steps)


class Results:
    """Runs that are over, a line each."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, {}
        if path.is_file():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self.known[entry["case"], f"{entry['rate']:.3g}", entry["seed"]] = entry

    def loss(self, case: Case, rate: float, seed: int) -> float:
        """The validation loss after a training; infinite where it did not end in numbers."""
        key = (case.key, f"{rate:.3g}", seed)
        if key not in self.known:
            begun = time.monotonic()
            try:
                loss = case.problem.run(case.contender, rate, seed, 1.0, False, lambda _: None).loss
            except DivergedError:
                loss = math.inf
            entry = {"case": case.key, "rate": rate, "seed": seed, "loss": loss if loss < math.inf else None}
            self.known[key] = entry = {**entry, "seconds": round(time.monotonic() - begun, 1)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(f"{case.key}: rate {rate:.3g}, seed {seed}: {loss:.4f} ({entry['seconds']} s)", file=sys.stderr)
        found = self.known[key]["loss"]
        return math.inf if found is None else float(found)


def grid_of(case: Case, results: Results, least: float, most: float) -> dict[float, float]:
    """Loss at each rate; the grid goes on past an end that is the best."""
    count = round(math.log(most / least) / math.log(STEP)) + 1
    rates = [least * STEP**i for i in range(count)]
    losses = {rate: results.loss(case, rate, SEARCHED) for rate in rates}
    for _ in range(6):
        best = min(losses, key=losses.__getitem__)
        if best == min(losses):
            rate = best / STEP
        elif best == max(losses):
            rate = best * STEP
        else:
            break
        losses[rate] = results.loss(case, rate, SEARCHED)
    return dict(sorted(losses.items()))


def own_rate(case: Case) -> float:
    """The rate that ``kilotune train`` takes by itself."""
    from kilotune.train.settings.rates import rate_for

    return rate_for(case.contender.method, steps=case.steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose names begin so, with commas between")
    parser.add_argument("--grid-only", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    results = Results(chosen.out / "defaults.jsonl")
    rows, held = [], []
    for model in MODELS:
        wanted = chosen.only.split(",")
        if not any(f"{model.name}/".startswith(only[: len(model.name) + 1]) for only in wanted):
            continue
        try:
            cases = list(cases_of(model))
        except Exception as error:
            print(f"{model.name}: passed over: {error}", file=sys.stderr)
            continue
        for case in cases:
            if not case.key.startswith(tuple(wanted)):
                continue
            centre = own_rate(case)
            base = 10 ** (round(2 * math.log10(centre)) / 2)
            losses = grid_of(case, results, base / STEP, base * STEP)
            best = min(losses, key=losses.__getitem__)
            row = {"case": case.key, "best": best, "grid": losses[best], "own": centre}
            if not chosen.grid_only:
                seeds = range(chosen.seeds)
                at_best = [results.loss(case, best, seed) for seed in seeds]
                at_own = [results.loss(case, centre, seed) for seed in seeds]
                spread = statistics.stdev(at_best) if len(at_best) > 1 else 0.0
                limit = max(statistics.fmean(at_best) * CLOSE, statistics.fmean(at_best) + spread)
                held.append(statistics.fmean(at_own) <= limit)
                row |= {"loss at best": statistics.fmean(at_best), "sd": spread}
                row |= {"loss at own": statistics.fmean(at_own), "holds": held[-1]}
            rows.append(row)
    for row in rows:
        print(" | ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()))
    every = sum(len(model.steps) * len(model.methods) for model in MODELS)
    searched = {case for case, _, seed in results.known if seed == SEARCHED}
    print(f"of {every} cases, {len(searched)} are searched, by {len(results.known)} runs in {results.path}")
    if not held:
        return 0
    share = sum(held) / len(held)
    print(f"{'PASS' if share >= SHARE else 'FAIL'}: {sum(held)} of {len(held)} cases hold (bar {SHARE:.0%})")
    return 0 if share >= SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
