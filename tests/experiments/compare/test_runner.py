"""A comparison from its problem to its numbers: against trainings by hand, interrupted and resumed, and its costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kilotune import LoraConfig, VeraConfig, get_peft_model
from kilotune.errors import CheckpointError, ConfigError, ResourceError
from kilotune.experiments.compare import costs as costs_module
from kilotune.experiments.compare.costs import Floor, measure
from kilotune.experiments.compare.problem import Bench, Contender
from kilotune.experiments.compare.results import Comparison
from kilotune.experiments.compare.runner import compare, run_settings
from kilotune.experiments.compare.search import Search
from kilotune.experiments.compare.settings import CompareSettings, contenders_of
from kilotune.experiments.compare.trials import COST, SEARCH, TEST, Trial
from kilotune.experiments.run_store import Journal
from tests.support.compare_toy import STEPS, Toy
from tests.support.train_support import files_of_at_most

METHODS = ("full", "head", "lora", "vera")
SETTINGS = CompareSettings(
    seeds=2,
    search=Search(lowest=0.003, highest=0.3, points=3, rounds=2, reduction=2, spare=1),
    methods={"lora": {"r": 2}},
)


def contenders(toy: Toy, names: Sequence[str] = METHODS) -> tuple[Contender, ...]:
    return contenders_of(SETTINGS, toy, names)


def journal(path: Path | None, toy: Toy) -> Journal[Trial]:
    return Journal(path, run_settings(toy, 1), Trial.from_dict)


def run(toy: Toy, path: Path | None = None, names: Sequence[str] = METHODS) -> Comparison:
    return compare(toy, contenders(toy, names), SETTINGS, journal(path, toy))


def without_timings(comparison: Comparison) -> dict[str, Any]:
    plain = comparison.to_dict()
    del plain["timings"]
    return plain


@pytest.fixture(scope="module", autouse=True)
def few_turns() -> Iterator[None]:
    """Times are not looked at here, but in the one test that asks for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs_module, "ROUNDS", 1)
        patch.setattr(costs_module, "LEAST_SECONDS", 1e-4)
        yield


@pytest.fixture(scope="module")
def whole() -> Comparison:
    return run(Toy())


# -- the numbers -------------------------------------------------------------------------------------


def test_a_reported_score_is_that_of_a_training_by_hand(whole: Comparison) -> None:
    row = next(row for row in whole.rows if row.name == "lora")
    rate = row.found.rate
    assert rate is not None
    for seed, trial in zip((0, 1), row.tests, strict=True):
        toy = Toy()
        torch.manual_seed(seed)
        model = get_peft_model(toy.build(0), LoraConfig(r=2, target_modules=["0", "2"]))
        toy.fit(model, rate, seed, 1.0, lambda _: None)
        score = toy.scores(model, True)
        assert trial.values == {"validation": score.validation, "loss": score.loss, "test": score.test}
    assert row.mean == pytest.approx(sum(t.values["test"] for t in row.tests) / 2)


def test_random_matrices_follow_the_seed_unless_they_are_given() -> None:
    toy = Toy()
    made = toy.model_of(Contender("vera", "vera", {"r": 3, "target_modules": ("0", "2")}), 5)
    torch.manual_seed(5)
    by_hand = get_peft_model(toy.build(0), VeraConfig(r=3, target_modules=["0", "2"], projection_prng_key=5))
    for (name, ours), (_, theirs) in zip(made.named_parameters(), by_hand.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert made.peft_config["default"].projection_prng_key == 5
    given = Contender("vera", "vera", {"r": 3, "projection_prng_key": 9})
    assert given.seeded(5)["projection_prng_key"] == 9
    assert Contender("u", "unilora", {}).seeded(4) == {"proj_seed": 4}
    assert Contender("l", "lora", {"r": 2}).seeded(4) == {"r": 2}


def test_the_seeds_give_other_numbers(whole: Comparison) -> None:
    for row in whole.rows:
        assert len(set(row.scores)) == 2, row.name


def test_the_test_split_is_seen_by_the_start_and_the_winners_alone() -> None:
    toy = Toy()
    comparison = run(toy)
    assert toy.tested == 2 + 2 * len(METHODS)
    for row in comparison.rows:
        assert all("test" not in trial.values for trial in row.searched)
        assert all("test" in trial.values for trial in row.tests)
        assert {trial.key.seed for trial in row.searched} == {SETTINGS.search.seed}
        assert [trial.key.seed for trial in row.tests] == [0, 1]


def test_every_method_has_the_budget_that_is_stated(whole: Comparison) -> None:
    for row in whole.rows:
        assert sum(trial.key.budget for trial in row.searched) == SETTINGS.search.cost
    assert SETTINGS.search.budget in whole.notes[0]


def test_the_chosen_rate_is_the_best_on_validation(whole: Comparison) -> None:
    for row in whole.rows:
        full = [trial for trial in row.searched if trial.key.budget == 1]
        best = max(full, key=lambda trial: (trial.values["validation"], -trial.values["loss"]))
        assert row.found.rate == best.key.rate


def test_a_problem_whose_scores_fall_is_searched_the_other_way() -> None:
    class Falls(Toy):
        metric = "loss"
        larger_is_better = False

        def scores(self, model: nn.Module, test: bool) -> Any:
            score = super().scores(model, test)
            return type(score)(score.loss, score.loss, score.loss if test else None)

    comparison = run(Falls(), names=("full", "head"))
    for row in comparison.rows:
        full = [trial for trial in row.searched if trial.key.budget == 1]
        assert row.found.rate == min(full, key=lambda trial: trial.values["validation"]).key.rate
    assert [row.mean for row in comparison.ranked] == sorted(row.mean or 0.0 for row in comparison.rows)


def test_head_trains_the_head_and_nothing_else() -> None:
    model = Toy().model_of(Contender("head", "head"), 0)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["2.weight", "2.bias"]


# -- what goes wrong ---------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_told_together_before_anything_is_run() -> None:
    toy = Toy()
    wrong = (
        Contender("one", "lora", {"target_modules": ("nowhere",)}),
        Contender("fine", "lora", {"target_modules": ("0",)}),
        Contender("two", "bitfit", {"target_modules": ("1",)}),
    )
    with pytest.raises(ConfigError) as caught:
        compare(toy, wrong, SETTINGS)
    text = str(caught.value)
    assert "one: " in text
    assert "two: " in text
    assert "fine: " not in text
    assert "nowhere" in text
    assert toy.fitted == []


def test_a_method_that_diverges_everywhere_is_a_row_and_stops_nobody(tmp_path: Path) -> None:
    toy = Toy(diverges_above=0.0)
    comparison = run(toy, tmp_path / "runs.jsonl", ("full", "lora"))
    for row in comparison.rows:
        assert (row.found.rate, row.mean, row.tests) == (None, None, ())
    assert "full: diverged at every learning rate of full length." in comparison.notes
    assert comparison.front == []
    again = Toy(diverges_above=0.0)
    assert without_timings(run(again, tmp_path / "runs.jsonl", ("full", "lora"))) == without_timings(comparison)
    assert again.fitted == []


def test_a_score_that_is_no_number_counts_as_diverged() -> None:
    class Nan(Toy):
        def scores(self, model: nn.Module, test: bool) -> Any:
            score = super().scores(model, test)
            return score if test else type(score)(float("nan"), score.loss)

    row = run(Nan(), names=("full",)).rows[0]
    assert row.found.rate is None


# -- interrupted and resumed -------------------------------------------------------------------------


@pytest.mark.parametrize("after", [9, *(pytest.param(n, marks=pytest.mark.full) for n in (0, 22))])
def test_an_interrupted_comparison_goes_on_where_it_was(after: int, tmp_path: Path, whole: Comparison) -> None:
    path, stops = tmp_path / "runs.jsonl", Toy(stop_after=after)
    with pytest.raises(KeyboardInterrupt):
        run(stops, path)
    with path.open("ab") as out:
        out.write(b'{"part": "search", "contender": "{\\"me')  # the process died while it wrote
    goes_on = Toy()
    comparison = run(goes_on, path)
    assert without_timings(comparison) == without_timings(whole)
    both = stops.fitted + goes_on.fitted
    assert len(set(both)) == len(both) == len(METHODS) * (3 + 2 + 1 + 2)
    idle = Toy()
    assert without_timings(run(idle, path)) == without_timings(whole)
    assert (idle.fitted, idle.tested) == ([], 0)


@pytest.mark.heavy
@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk_is_no_fault_of_a_method_and_nothing_is_lost(after: int, tmp_path: Path, whole: Comparison) -> None:
    path = tmp_path / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(Toy(stop_after=after), path)
    kept = path.stat().st_size
    with files_of_at_most(kept + 40), pytest.raises(ResourceError, match=r"^could not keep a finished run in .*runs"):
        run(Toy(), path)
    assert without_timings(run(Toy(), path)) == without_timings(whole)


def test_more_seeds_and_methods_cost_only_what_is_new(tmp_path: Path) -> None:
    path, first = tmp_path / "runs.jsonl", Toy()
    run(first, path, ("full",))
    more = Toy()
    compare(more, contenders(more, ("full", "head")), SETTINGS.replace(seeds=3), journal(path, more))
    assert not set(more.fitted) & set(first.fitted)
    assert [seed for _, _, seed, _ in more.fitted if seed == 2] == [2, 2]


def test_another_name_for_the_same_method_is_not_run_again(tmp_path: Path) -> None:
    path, toy = tmp_path / "runs.jsonl", Toy()
    compare(toy, [Contender("a", "lora", {"r": 2, "target_modules": ("0",)})], SETTINGS, journal(path, toy))
    again = Toy()
    compare(again, [Contender("b", "lora", {"target_modules": ["0"], "r": 2})], SETTINGS, journal(path, again))
    assert again.fitted == []
    other = Toy()
    compare(other, [Contender("a", "lora", {"r": 3, "target_modules": ("0",)})], SETTINGS, journal(path, other))
    assert len(other.fitted) == len(toy.fitted)


def test_runs_of_another_problem_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    run(Toy(), path, ("full",))
    with pytest.raises(ConfigError, match="limit"):
        journal(path, Toy(diverges_above=3.0))


@pytest.mark.parametrize(
    "line",
    [
        '{"part": "guess", "contender": "", "rate": 0.0, "budget": 1.0, "seed": 0, "values": {}, "seconds": 1.0}',
        '{"part": "test", "contender": "", "rate": 0.0, "budget": 1.0, "seed": true, "values": {}, "seconds": 1.0}',
        '{"part": "test", "contender": "", "rate": 0.0, "budget": 1.0, "seed": 0, "values": {"a": null}, "seconds": 1}',
        '{"part": "test", "contender": "", "rate": 0.0, "budget": 1.0, "seed": 0, "values": {"a": NaN}, "seconds": 1}',
        '{"part": "test"}',
        "[]",
    ],
)
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    run(Toy(), path, ("full",))
    count = len(path.read_text().splitlines())
    with path.open("a") as out:
        out.write(f"{line}\n")
    with pytest.raises(CheckpointError, match=f"line {count + 1}"):
        journal(path, Toy())


def test_a_trial_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    path, toy = tmp_path / "runs.jsonl", Toy()
    run(toy, path, ("full",))
    kept = [Trial.from_dict(plain) for plain in map(json.loads, path.read_text().splitlines()[1:])]
    assert {trial.key.part for trial in kept} == {"start", COST, SEARCH, TEST}
    for trial in kept:
        assert Trial.from_dict(trial.to_dict()) == trial


def test_progress_rises_to_its_end() -> None:
    told: list[tuple[str, int, int]] = []
    toy = Toy()
    compare(toy, contenders(toy), SETTINGS, None, lambda *args: told.append(args))
    done = [count for _, count, _ in told]
    assert done == list(accumulate(done, max))
    assert told[-1][1] == told[-1][2] == round((SETTINGS.search.cost + 2) * STEPS * len(METHODS))


def test_threads_and_generator_are_left_as_they_were() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    run(Toy(), names=("lora",))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


# -- costs -------------------------------------------------------------------------------------------


def test_trained_numbers_and_bytes_are_those_of_the_files(whole: Comparison, tmp_path: Path) -> None:
    trained = {row.name: row.costs.trained for row in whole.rows}
    assert trained == {
        "full": 6 * 8 + 8 + 8 * 4 + 4,
        "head": 8 * 4 + 4,
        "lora": 2 * (6 + 8 + 8 + 4),
        "vera": 2 * 256 + 12,
    }
    toy = Toy()
    lora = next(c for c in contenders(toy) if c.name == "lora")
    toy.model_of(lora, 0).save_pretrained(tmp_path)
    disk = {row.name: row.costs.disk_bytes for row in whole.rows}
    assert disk["lora"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 4 * trained["full"] < disk["full"] < 4 * trained["full"] + 600  # and safetensors' header


class Wide(nn.Module):
    """A layer whose activations are known: x (T, 256) -> relu -> (T, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 256, bias=False), nn.Linear(256, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.first(x)).mul(self.second.weight).sum()


def test_peak_memory_is_weights_states_gradients_and_activations() -> None:
    x = torch.randn(4096, 256)

    def made() -> Bench:
        model = Wide()
        return Bench(model, lambda: model(x))

    frozen = made()
    frozen.model.requires_grad_(False)
    costs = measure(made(), Floor(frozen))
    weights, activation = 4 * (256 * 256 + 256), 4 * 4096 * 256
    # The worst moment is in the backward of the product: weights and two moments, no gradient of them yet; relu's
    # output, which is kept, the sum's input, and the gradient that is made.
    assert costs.peak_bytes == pytest.approx(3 * weights + 3 * activation, rel=0.01)


def test_the_floor_runs_through_the_model_and_trains_nothing() -> None:
    model, seen = Wide().requires_grad_(False), []
    floor = Floor(Bench(model, lambda: model(torch.ones(2, 256))))
    model.first.register_forward_hook(lambda _m, _a, out: out.register_hook(seen.append) and None)
    floor.step()
    assert len(seen) == 1
    assert all(p.grad is None for p in model.parameters())


def test_times_are_those_of_the_step_against_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes by the work that is done, and is now and then ten times too fast."""
    now, readings = [0.0], [0]

    def clock() -> float:
        readings[0] += 1
        return now[0] * (10 if readings[0] % 11 == 0 else 1)

    def bench(work: float, model: nn.Module) -> Bench:
        def loss() -> torch.Tensor:
            now[0] += work
            out: torch.Tensor = model(torch.ones(2, 256))
            return out

        return Bench(model, loss)

    monkeypatch.setattr(costs_module, "ROUNDS", 15)
    monkeypatch.setattr(costs_module.time, "process_time", clock)
    floor = Floor(bench(0.5, Wide().requires_grad_(False)))
    costs = measure(bench(3.0, Wide()), floor)
    assert costs.step_seconds == pytest.approx(3.0)
    assert costs.step_ratio == pytest.approx(6.0)
