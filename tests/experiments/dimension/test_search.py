"""The search for an intrinsic dimension: on tasks whose answer is known, interrupted and resumed, and its report."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kilotune import IntrinsicConfig, get_peft_model
from kilotune.errors import CheckpointError, ConfigError, DivergedError, KilotuneError
from kilotune.experiments.dimension.report import score_chart, score_page, write_dimension_report
from kilotune.experiments.dimension.results import DimensionResult, smallest_reaching
from kilotune.experiments.dimension.search import TUNING_SEED, Search, measure, run_settings
from kilotune.experiments.images.settings import ImageSettings
from kilotune.experiments.images.tasks import ImageTask, Scores, Task, Tick
from kilotune.experiments.images.training import logits_of, one_thread
from kilotune.experiments.run_store import Key, Run, RunStore
from tests.support.paths import ROOT

ONE_RATE: dict[str, Any] = {"rates": (1.0,), "full_rates": (1.0,)}


class Constraints(Task):
    """The toy of Li et al. 2018, section 2: 1,000 numbers in ten groups of 100, and group k must sum to k.

    Ten linear constraints: full training solves it, and a random subspace holds a solution from d = 10 on, and (but
    with probability 0) none below. The score is exp(-loss), as in their figure 2.
    """

    name = "ten constraints on a thousand numbers"
    metric = "exp(-loss)"
    percent = False
    targets = ("numbers",)
    steps = 1
    groups = 10

    def describe(self) -> dict[str, Any]:
        return {"task": "constraints", "groups": self.groups}

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return _Numbers()

    def loss(self, model: nn.Module) -> torch.Tensor:
        sums = model(torch.eye(25)).T.reshape(self.groups, -1).sum(dim=1)
        return (sums - torch.arange(1.0, self.groups + 1)).square().sum()

    def fit(self, model: nn.Module, rate: float, seed: int, tick: Tick) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.LBFGS(trained, lr=rate, max_iter=400, tolerance_change=0, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = self.loss(model)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()

        optimizer.step(closure)
        tick(1)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        loss = self.loss(model).item()
        return Scores(math.exp(-loss), math.exp(-loss), loss)


class _Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Linear(25, 40, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.numbers(x)
        return out


def constraints(**changes: Any) -> DimensionResult:
    search = Search(lowest=2, highest=50, points=4, resolution=0.01, **{**ONE_RATE, **changes})
    return measure(Constraints(), search)


@pytest.mark.full
@pytest.mark.parametrize("projection", ["fastfood", "dense"])
def test_ten_constraints_have_dimension_ten_and_a_scale_costs_one_more(projection: str) -> None:
    result = constraints(projection=projection)
    did, said = result.outcomes
    assert (did.structure, did.d90, did.below) == ("did", 10, 9)
    # SAID spends one of its numbers on the scale of the one layer, and lambda P theta spans no more than P theta does.
    assert (said.structure, said.d90, said.below) == ("said", 11, 10)
    assert did.by_seed == (10, 10, 10)
    assert result.full.median == pytest.approx(1.0, abs=1e-3)
    assert result.start_median < 1e-6
    assert (result.layers, result.weights, result.trained_in_full) == (1, 1000, 1000)
    assert "DID: d90 = 10; 9 is not enough" in result.answers[0]


@pytest.mark.parametrize("structure", ["did", "said"])
def test_each_score_is_the_best_that_the_subspace_holds(structure: str) -> None:
    """What is measured at d is what least squares in float64 says of the nearest point of that very subspace."""
    search = Search(structures=(structure,), lowest=5, highest=12, points=2, resolution=0.3, **ONE_RATE)
    (outcome,) = measure(Constraints(), search).outcomes
    assert len(outcome.levels) > 2
    for level in outcome.levels:
        for run in level.runs:
            task = Constraints()
            base = task.build(run.key.seed)
            start = base.numbers.weight.detach().double().clone()  # type: ignore[union-attr]
            config = IntrinsicConfig(
                d=level.d, structure=structure, projection_prng_key=run.key.seed, target_modules=["numbers"]
            )
            model = get_peft_model(base, config)
            (vector,) = (p for p in model.parameters() if p.requires_grad)
            columns = []
            for i in range(level.d - (structure == "said")):
                with torch.no_grad():
                    vector[: level.d - (structure == "said")] = 0.0
                    vector[i] = 1.0
                moved = model(torch.eye(25)).detach().double().T
                columns.append((moved - start).reshape(10, 100).sum(1).numpy())
            wanted = np.arange(1.0, 11.0) - start.reshape(10, 100).sum(1).numpy()
            matrix = np.stack(columns, axis=1)
            nearest = matrix @ np.linalg.lstsq(matrix, wanted, rcond=None)[0]
            assert run.validation == pytest.approx(math.exp(-float(((wanted - nearest) ** 2).sum())), abs=5e-3)


# -- the search, on scores that are given ------------------------------------------------------------


class Given(Task):
    """Nothing is trained: the score is a function of how many numbers would be, of the rate and of the seed."""

    name = "given scores"
    targets = ("0", "2", "4")
    steps = 3

    def __init__(self, score: Callable[[int, float, int], float], start: float = 0.1, full: float = 1.0) -> None:
        self.score, self.start, self.full = score, start, full
        self.fitted: list[tuple[int, float, int]] = []
        self.last: tuple[int, float, int] | None = None

    def describe(self) -> dict[str, Any]:
        return {"task": "given", "full": self.full}

    def build(self, seed: int) -> nn.Module:
        self.last = None
        layers: list[nn.Module] = [nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5)]
        return nn.Sequential(*layers)

    def fit(self, model: nn.Module, rate: float, seed: int, tick: Tick) -> None:
        d = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.last = (d, rate, seed)
        self.fitted.append(self.last)
        tick(self.steps)

    def scores(self, model: nn.Module) -> Scores:
        if self.last is None:
            return Scores(self.start, self.start, 1.0)
        value = self.full if self.last[0] == FULL_COUNT else self.score(*self.last)
        if math.isnan(value):
            raise DivergedError("training diverged")
        return Scores(value, -value, 1 - value)  # a test score that would mislead whoever chose by it


FULL_COUNT = 2 * (40 * 40 + 40) + 40 * 5 + 5
PLAIN: dict[str, Any] = {"structures": ("did",), **ONE_RATE}


def searched(score: Callable[[int, float, int], float], start: float = 0.1, **changes: Any) -> DimensionResult:
    return measure(Given(score, start), Search(**{**PLAIN, "highest": 2000, **changes}))


@pytest.mark.parametrize("truth", [1, 2, 3, 9, 10, 11, 57, 316, 317, 1999, 2000])
@pytest.mark.parametrize("resolution", [1e-9, 0.1, 0.5])
def test_a_step_is_found_to_the_stated_resolution(truth: int, resolution: float) -> None:
    (outcome,) = searched(lambda d, rate, seed: float(d >= truth), resolution=resolution).outcomes
    assert outcome.d90 is not None
    assert outcome.below < truth <= outcome.d90
    assert outcome.d90 <= max(outcome.below + 1, outcome.below * (1 + resolution))


def test_said_counts_its_scales_and_starts_above_them() -> None:
    (outcome,) = searched(lambda d, rate, seed: 1.0, structures=("said",), lowest=1).outcomes
    assert (outcome.d90, outcome.below, outcome.levels[0].d) == (4, 3, 4)


def test_the_answer_is_the_smallest_that_all_larger_ones_join() -> None:
    generator = random.Random(0)
    for _ in range(300):
        table = [(d, generator.random()) for d in generator.sample(range(1, 100), generator.randint(1, 8))]
        wanted = [d for d, _ in table if all(value >= 0.4 for other, value in table if other >= d)]
        assert smallest_reaching(table, 0.4) == (min(wanted) if wanted else None)


def test_a_dip_decides_against_what_was_reached_below_it() -> None:
    def dips(d: int, rate: float, seed: int) -> float:
        return float(d >= 20 and not 300 <= d <= 700)

    result = searched(dips, resolution=0.01)
    (outcome,) = result.outcomes
    assert outcome.d90 is not None
    assert 700 < outcome.d90 <= 708
    assert outcome.lucky
    assert all(20 <= d < 300 for d in outcome.lucky)
    assert "Not counted, as a larger d failed: " in result.answers[0]


def test_when_no_d_reaches_it_the_result_says_so() -> None:
    result = searched(lambda d, rate, seed: 0.89)
    (outcome,) = result.outcomes
    assert outcome.d90 is None
    assert outcome.by_seed == (None, None, None)
    assert "DID: d90 was not found: the largest d tried, 2,000, gives 89.0, and 90.0 is wanted" in result.answers[0]
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["outcomes"][0]["d"] is None


def test_when_the_untrained_model_reaches_it_nothing_is_tried() -> None:
    result = searched(lambda d, rate, seed: 1.0, start=0.95)
    (outcome,) = result.outcomes
    assert (outcome.d90, outcome.levels, outcome.by_seed) == (0, (), ())
    assert result.answers == ["DID: d90 = 0: before any training the model scores 95.0, and 90.0 is wanted."]
    assert "nothing was tried" in score_page(result, score_chart(result))


def test_the_median_of_the_seeds_decides_and_the_seeds_are_shown() -> None:
    result = searched(lambda d, rate, seed: float(d >= (50, 100, 400)[seed]), resolution=1e-9)
    (outcome,) = result.outcomes
    assert outcome.d90 == 100
    assert outcome.by_seed[0] is not None
    assert outcome.by_seed[0] <= outcome.by_seed[1] == 100  # among the d's tried, which lie close to the answer
    assert outcome.by_seed[2] is not None
    assert outcome.by_seed[2] >= 400


def test_the_share_moves_the_threshold() -> None:
    result = searched(lambda d, rate, seed: min(1.0, d / 1000), share=0.5, resolution=1e-9)
    assert (result.symbol, result.threshold, result.outcomes[0].d90) == ("d50", 0.5, 500)


def test_the_rate_is_chosen_on_validation_with_a_seed_of_its_own_and_beyond_the_end_if_need_be() -> None:
    def best_at(rate: float) -> float:
        return 1.0 - abs(math.log10(rate) - math.log10(3.0)) / 4

    task = Given(lambda d, rate, seed: best_at(rate))
    search = Search(
        structures=("did",),
        lowest=10,
        highest=20,
        points=2,
        resolution=1.0,
        seeds=2,
        rates=(0.01, 0.1, 1.0),
        full_rates=(1.0,),
    )
    (outcome,) = measure(task, search).outcomes
    level = outcome.levels[-1]
    assert [run.key.rate for run in level.tuning] == [0.01, 0.1, 1.0, 10.0]
    assert {run.key.seed for run in level.tuning} == {TUNING_SEED}
    assert [(run.key.rate, run.key.seed) for run in level.runs] == [(1.0, 0), (1.0, 1)]
    assert not level.at_edge
    assert level.test_median == -best_at(1.0)

    task = Given(lambda d, rate, seed: 0.95 - 1e-3 / rate)
    result = measure(task, search)
    level = result.outcomes[0].levels[-1]
    assert [run.key.rate for run in level.tuning] == [0.01, 0.1, 1.0, 10.0, 100.0]
    assert level.at_edge
    assert "end of those tried at: did 1, did 2, did 3, did 10, did 20." in result.notes[0]


def test_a_run_that_diverges_fails_and_the_search_goes_on() -> None:
    def bursts(d: int, rate: float, seed: int) -> float:
        return math.nan if rate > 0.5 or (d < 100 and seed == 2) else 0.95

    result = searched(bursts, rates=(0.1, 1.0), resolution=1e-9)
    (outcome,) = result.outcomes
    assert all(level.rate < 0.5 for level in outcome.levels)
    assert outcome.d90 == 1  # two of three seeds reach it: so does the median
    assert outcome.by_seed[2] is not None
    assert outcome.by_seed[2] >= 100
    assert "of the reported runs diverged" in result.notes[-1]
    assert "diverged" in score_page(result, score_chart(result))
    with pytest.raises(KilotuneError, match="full training's median score is -inf"):
        measure(Given(lambda *_: 1.0, full=math.nan), Search(**PLAIN, highest=2000))


def test_another_error_is_not_taken_for_a_divergence() -> None:
    class Broken(Given):
        def scores(self, model: nn.Module) -> Scores:
            raise KilotuneError("the data went away")

    with pytest.raises(KilotuneError, match="the data went away"):
        measure(Broken(lambda *_: 1.0), Search(**PLAIN, highest=2000))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"highest": 10**6}, "the 3 adapted layers have only 3,400 weights"),
        ({"structures": ("said",), "lowest": 1, "highest": 4}, "d starts at 4 there"),
    ],
)
def test_a_search_that_does_not_fit_the_model_is_refused_before_any_training(
    changes: dict[str, Any], reason: str
) -> None:
    task = Given(lambda *_: 1.0)
    with pytest.raises(ConfigError, match=reason):
        measure(task, Search(**{**PLAIN, **changes}))
    assert task.fitted == []


def test_all_faults_of_a_search_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Search(
            structures=("dud",),
            lowest=0,
            highest=0,
            points=1,
            resolution=0.0,
            share=1.5,
            seeds=0,
            first_seed=-1,
            rates=(0.1, 0.1),
            full_rates=(),
            projection="densse",
        )
    text = str(caught.value)
    for name in ("lowest", "highest", "points", "resolution", "share", "seeds", "first_seed", "rates", "full_rates"):
        assert f"- {name} is " in text
    assert "dense" in text
    assert "dud" in text


def test_progress_rises_to_an_upper_bound() -> None:
    told: list[tuple[str, int, int]] = []
    measure(
        Given(lambda d, rate, seed: float(d >= 50)),
        Search(**{**PLAIN, "highest": 2000}),
        progress=lambda *args: told.append(args),
    )
    done = [steps for _, steps, _ in told]
    assert done == list(accumulate(done, max))
    assert all(steps <= total for _, steps, total in told)
    assert done[-1] > 0.7 * told[-1][2]


# -- finished runs on disk ---------------------------------------------------------------------------


def stored(path: Path | None, task: Task, search: Search, restart: bool = False) -> RunStore:
    return RunStore(path, run_settings(task, search), restart)


def without_timings(result: DimensionResult) -> dict[str, Any]:
    plain = result.to_dict()
    del plain["timings"]
    return plain


def wavy(d: int, rate: float, seed: int) -> float:
    return min(1.0, 0.2 + math.log(d * rate) / 8 + 0.01 * (seed % 7))


SEARCH = Search(highest=2000, rates=(0.1, 1.0, 2.0), full_rates=(1.0, 2.0), resolution=0.05)


@pytest.mark.full
def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path) -> None:
    whole_task = Given(wavy)
    whole = measure(whole_task, SEARCH)

    class Stops(Given):
        def fit(self, model: nn.Module, rate: float, seed: int, tick: Tick) -> None:
            if len(self.fitted) == 17:
                raise KeyboardInterrupt
            super().fit(model, rate, seed, tick)

    path, stops = tmp_path / "here" / "runs.jsonl", Stops(wavy)
    with pytest.raises(KeyboardInterrupt):
        measure(stops, SEARCH, stored(path, stops, SEARCH))
    with path.open("ab") as out:
        out.write(b'{"way": "did", "d": 4')  # the process died while it wrote
    task = Given(wavy)
    store = stored(path, task, SEARCH)
    assert store.reused == 17 + SEARCH.seeds
    again = measure(task, SEARCH, store)
    assert stops.fitted + task.fitted == whole_task.fitted
    assert without_timings(again) == without_timings(whole)
    assert len(path.read_text().splitlines()) == 1 + store.count
    idle = Given(wavy)
    assert without_timings(measure(idle, SEARCH, stored(path, idle, SEARCH))) == without_timings(whole)
    assert idle.fitted == []


@pytest.mark.full
def test_a_wider_search_uses_what_is_there_and_runs_the_rest(tmp_path: Path) -> None:
    path, task = tmp_path / "runs.jsonl", Given(wavy)
    measure(task, SEARCH, stored(path, task, SEARCH))
    finer, more = dataclasses.replace(SEARCH, resolution=0.01, seeds=4), Given(wavy)
    result = measure(more, finer, stored(path, more, finer))
    assert not set(more.fitted) & set(task.fitted)
    assert without_timings(result) == without_timings(measure(Given(wavy), finer))


def test_runs_of_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    path, task = tmp_path / "runs.jsonl", Given(wavy)
    measure(task, SEARCH, stored(path, task, SEARCH))
    before = path.read_bytes()
    other, dense = Given(wavy, full=0.8), dataclasses.replace(SEARCH, projection="dense")
    with pytest.raises(ConfigError) as caught:
        stored(path, other, dense)
    text = str(caught.value)
    assert "full: 1.0 there, 0.8 now" in text
    assert 'projection: "fastfood" there, "dense" now' in text
    assert "--restart" in text
    assert path.read_bytes() == before
    store = stored(path, other, dense, restart=True)
    assert path.read_bytes() == before  # nothing is lost before there is something new
    store.add(Run(Key("did", 5, 0.1, 0), 0.5, 0.5, 1.0, 0.1))
    assert stored(path, other, dense).count == 1
    with pytest.raises(ConfigError, match="other settings"):
        stored(path, task, SEARCH)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "null",
        '{"way": "did", "d": 5, "rate": 0.1, "seed": 0, "validation": 0.5, "test": 0.5, "loss": 1.0}',
        '{"way": "did", "d": 5, "rate": 0.1, "seed": 0, "validation": "x", "test": 0.5, "loss": 1.0, "seconds": 1}',
        '{"way": "did", "d": 5, "rate": 0.1, "seed": 0, "validation": NaN, "test": 0.5, "loss": 1.0, "seconds": 1}',
        '{"way": "did", "d": true, "rate": 0.1, "seed": 0, "validation": 1, "test": 0.5, "loss": 1.0, "seconds": 1}',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path, task = tmp_path / "runs.jsonl", Given(wavy)
    store = stored(path, task, SEARCH)
    for seed in range(3):
        store.add(Run(Key("did", 5, 0.1, seed), None, None, None, 0.1))
    assert stored(path, task, SEARCH).count == 3
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text("".join(f"{text}\n" for text in lines))
    with pytest.raises(CheckpointError, match=r"runs.jsonl, line 3: this is no finished run"):
        stored(path, task, SEARCH)
    path.write_text("not ours\n")
    with pytest.raises(CheckpointError, match=r"line 1: "):
        stored(path, task, SEARCH)


def test_two_searches_in_one_folder_do_not_spoil_each_other(tmp_path: Path) -> None:
    path, task = tmp_path / "runs.jsonl", Given(wavy)
    first, second = stored(path, task, SEARCH), stored(path, task, SEARCH)
    for seed in range(2):
        first.add(Run(Key("did", 5, 0.1, seed), 0.5, 0.5, 1.0, 0.1))
    late = stored(path, task, SEARCH)
    late.add(Run(Key("did", 6, 0.1, 0), 0.5, 0.5, 1.0, 0.1))
    before = path.read_bytes()
    for store in (first, second):
        with pytest.raises(KilotuneError, match="another process writes to it"):
            store.add(Run(Key("did", 7, 0.1, 0), 0.5, 0.5, 1.0, 0.1))
    assert path.read_bytes() == before
    assert stored(path, task, SEARCH).count == 3


def test_a_run_that_cannot_be_kept_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    task = Given(wavy)
    with pytest.raises(KilotuneError, match="could not keep a finished run"):
        stored(tmp_path / "file" / "runs.jsonl", task, SEARCH).add(Run(Key("did", 5, 0.1, 0), 0.5, 0.5, 1.0, 0.1))


# -- the image tasks ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_task() -> ImageTask:
    return ImageTask.of(ImageSettings(epochs=1))


def test_the_pictures_are_split_three_ways_without_overlap(digits_task: ImageTask) -> None:
    assert digits_task.sizes == {"training": 899, "validation": 299, "test": 599}
    parts = (digits_task.fit_on, digits_task.validation, digits_task.test)
    assert [len(part) for part in parts] == [899, 299, 599]
    assert digits_task.steps == math.ceil(899 / 32)


def test_full_training_is_adam_on_everything_that_is_used(digits_task: ImageTask) -> None:
    with one_thread():
        ours = digits_task.build(3)
        used = sum(p.numel() for p in ours.parameters() if p.requires_grad)
        assert used == 456 + 2416 + 48_120 + 10_164 + 850
        digits_task.fit(ours, 1e-3, 3, lambda steps: None)
        theirs, order = digits_task.build(3), torch.Generator().manual_seed(3)
        optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3)
        for rows in torch.randperm(899, generator=order).split(32):
            pictures = digits_task.fit_on.images[rows].float() / 127.5 - 1
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(theirs(pictures), digits_task.fit_on.labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        scores = digits_task.scores(ours)
        right = (logits_of(theirs, digits_task.test).argmax(1) == digits_task.test.labels).sum().item()
        assert scores.test == pytest.approx(right / 599)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_a_pretrained_start_is_good_upright_and_worse_turned(digits_task: ImageTask) -> None:
    task = ImageTask.of(ImageSettings(start="pretrained", rotation=60.0, pretrain_epochs=4, epochs=1))
    assert task.name == "digits from a pretrained network, turned by 60 degrees"
    with one_thread():
        model = task.build(0)
        upright, turned = digits_task.scores(model).validation, task.scores(model).validation
    assert upright > 0.8
    assert turned < 0.5
    assert torch.equal(task.pretrain_on.images, digits_task.fit_on.images)  # not what is validated on, even upright
    again = task.build(0)
    assert again is not model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_wrong_settings_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        ImageSettings(data="digit", start="pretraned", epochs=0, batch=0, rotation=math.nan, data_dir=Path("nowhere"))
    text = str(caught.value)
    for part in (
        "data is 'digit'",
        "'digits'?",
        "start is 'pretraned'",
        "epochs is 0",
        "batch is 0",
        "rotation is nan",
    ):
        assert part in text
    with pytest.raises(ConfigError, match="a pretrained start needs a rotation"):
        ImageSettings(start="pretrained")


SMALL = Search(lowest=30, highest=300, points=2, resolution=3.0, seeds=2, rates=(0.1,), full_rates=(0.003,))


@pytest.fixture(scope="module")
def small() -> DimensionResult:
    """A search that takes seconds; its numbers mean nothing, but everything runs."""
    return measure(ImageTask.of(ImageSettings(epochs=1)), SMALL)


@pytest.mark.heavy
def test_digits_are_searched_and_the_same_again(small: DimensionResult) -> None:
    assert [outcome.structure for outcome in small.outcomes] == ["did", "said"]
    assert small.layers == 5
    assert small.weights == 450 + 2400 + 48_000 + 10_080 + 840
    assert all(outcome.levels[-1].median > outcome.levels[0].median for outcome in small.outcomes)
    torch.manual_seed(9)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    again = measure(ImageTask.of(ImageSettings(epochs=1)), dataclasses.replace(SMALL, structures=("said",)))
    assert [outcome.to_dict() for outcome in again.outcomes] == [small.outcomes[1].to_dict()]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


# -- the report --------------------------------------------------------------------------------------


class Text(HTMLParser):
    """The text of a page, and whether its tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.full
def test_the_report_holds_what_was_measured(small: DimensionResult, tmp_path: Path) -> None:
    files = write_dimension_report(small, tmp_path)
    assert [path.name for path in files] == ["scores.svg", "scores.csv", "results.json", "report.html"]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(small.to_dict()))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "scores.csv").read_text())))
    assert len(rows) == len(small.to_dict()["runs"])
    for outcome in small.outcomes:
        for level in outcome.levels:
            mine = [
                float(row["validation"])
                for row in rows
                if (row["way"], row["d"], row["purpose"]) == (outcome.structure, str(level.d), "reported")
            ]
            assert mine == [run.validation for run in level.runs]
    page = Text()
    page.feed((tmp_path / "report.html").read_text())
    assert page.open == []
    for answer in small.answers:
        assert answer in page.text
    assert "61,770 weights of 5 layers" in page.text
    assert "62,006" in page.text
    assert not re.search(r"(src|href)=\"(?!data:)", (tmp_path / "report.html").read_text())


@pytest.mark.full
def test_names_are_escaped(small: DimensionResult) -> None:
    hostile = "<script>alert(1)</script>"
    settings = {**small.settings, hostile: hostile}
    text = score_page(dataclasses.replace(small, task=hostile, metric='" onload="', settings=settings), b"")
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4, "both titles, a setting and its value"
    assert 'onload="' not in text
    Text().feed(text)


@pytest.mark.full
def test_equal_results_draw_equal_pictures(small: DimensionResult) -> None:
    assert score_chart(small) == score_chart(small)
    assert score_chart(small).startswith(b"<?xml")


@pytest.mark.full
def test_the_pages_example_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "intrinsic-dimension.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", page, re.DOTALL)
    assert found
    exec(compile(found[1], "docs/intrinsic-dimension.md", "exec"), {})
    assert capsys.readouterr().out == found[2]
