"""Comparisons of recipes of ``kilotune train``, on tiny models; and the comparisons that are shipped."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kilotune.errors import ConfigError
from kilotune.experiments.compare import costs
from kilotune.experiments.compare.problem import Contender
from kilotune.experiments.compare.problem_settings import RecipeSettings
from kilotune.experiments.compare.recipe import Recipe
from kilotune.experiments.compare.settings import ALL_METHODS, load_comparison
from kilotune.train.run import train
from kilotune.train.settings.config_file import load_settings
from kilotune.train.settings.sections import METHOD_NAMES
from tests.support.cli_helpers import as_json, error
from tests.support.paths import ROOT
from tests.support.train_support import model_folder, sentence, write_jsonl

SHIPPED = ROOT / "examples" / "compare"
VERA = Contender("vera", "vera", {"r": 4, "target_modules": ("query", "value")})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text classification of ten steps an epoch, on a tiny BERT."""
    home = tmp_path_factory.mktemp("recipe")
    rows = [{"text": sentence(i), "label": "even" if i % 2 == 0 else "odd"} for i in range(60)]
    for name, part in (("train", rows[:40]), ("validation", rows[40:50]), ("test", rows[50:])):
        write_jsonl(home / f"{name}.jsonl", part)
    (home / "recipe.yaml").write_text(
        f"task: text-classification\nmodel: {{base: {model_folder('bert')}}}\n"
        f"data: {{train: {home}/train.jsonl, validation: {home}/validation.jsonl, test: {home}/test.jsonl}}\n"
        "training: {epochs: 2, batch_size: 8, head_learning_rate: 0.01, device: cpu, seed: 5}\n"
    )
    return home / "recipe.yaml"


@pytest.fixture(scope="module")
def problem(recipe: Path) -> Recipe:
    return Recipe(RecipeSettings(config=str(recipe)))


def test_a_run_is_what_kilotune_train_does(problem: Recipe, recipe: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    score = problem.run(VERA, 0.02, 3, 1.0, True, steps.append)
    overrides = [
        "adapter={method: vera, options: {r: 4, target_modules: [query, value], projection_prng_key: 3}}",
        "training.learning_rate=0.02",
        "training.seed=3",
        "training.eval_every=null",
        f"output={tmp_path / 'out'}",
        "logging={progress: quiet, report: false}",
    ]
    settings = load_settings(recipe, overrides)
    result = train(settings)
    assert sum(steps) == result.steps == problem.steps == 10
    assert score.test == pytest.approx(result.metrics["test"]["accuracy"], abs=1e-6)


def test_a_budget_shortens_the_run_and_leaves_the_test_split_alone(problem: Recipe) -> None:
    steps: list[int] = []
    score = problem.run(VERA, 0.02, 3, 0.5, False, steps.append)
    assert (sum(steps), score.test) == (5, None)
    assert 0 <= score.validation <= 1


def test_equal_seeds_give_equal_numbers_and_others_do_not(problem: Recipe) -> None:
    first, again, other = (problem.run(VERA, 0.02, seed, 1.0, True, lambda _: None) for seed in (3, 3, 4))
    assert first == again
    assert first.loss != other.loss


def test_the_start_is_the_base_with_a_fresh_head(problem: Recipe) -> None:
    start = problem.start(0)
    assert start.test is not None
    assert start.loss == pytest.approx(0.69, abs=0.2)  # two classes, a small random head


def test_what_is_trained_by_full_head_and_an_adapter(problem: Recipe) -> None:
    counts = {}
    for contender in (Contender("full", "full"), Contender("head", "head"), VERA, None):
        model = problem.bench(contender).model
        name = "frozen" if contender is None else contender.name
        counts[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in problem.bench(None).model.parameters())
    head = 2 * 16 + 2
    assert counts == {"full": whole, "head": head, "vera": 4 * (4 + 16) + head, "frozen": 0}


@pytest.mark.parametrize("contender", [VERA, Contender("full", "full")], ids=lambda one: one.name)
def test_costs_are_taken_with_kept_inputs_too(
    contender: Contender, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding's output reaches the loss in the first forward alone; the floor's backward has to begin later."""
    monkeypatch.setattr(costs, "ROUNDS", 1)
    (tmp_path / "last.yaml").write_text(recipe.read_text() + "adapter: {last_blocks: 1}\n")
    problem = Recipe(RecipeSettings(config=str(tmp_path / "last.yaml")))
    floor = costs.Floor(problem.bench(None))
    for _ in range(2):
        floor.step()
    found = costs.measure(problem.bench(contender), floor)
    assert found.trained > 0
    assert found.step_ratio > 0
    assert all(parameter.grad is None for parameter in floor.bench.model.parameters())


def test_the_description_holds_what_decides_and_nothing_else(problem: Recipe, recipe: Path, tmp_path: Path) -> None:
    said = problem.describe()
    assert said["training"] == {"epochs": 2, "head_learning_rate": 0.01, "device": "cpu"}  # 8 rows are the default
    assert said["rows"] == {"train": 40, "validation": 10, "test": 10}
    assert json.loads(json.dumps(said)) == said
    text = recipe.read_text().replace("seed: 5", "seed: 6, eval_every: 3, keep_checkpoints: 5")
    (tmp_path / "other.yaml").write_text(text)
    assert Recipe(RecipeSettings(config=str(tmp_path / "other.yaml"))).describe() == said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("test: ", "limit: 40, subset: null} #"), "a comparison needs a validation and a test split: give data.test"),
        (("device: cpu", "device: cpu, lora_plus_ratio: 4"), "training.lora_plus_ratio: not all methods have it"),
    ],
)
def test_recipes_that_cannot_be_compared_are_refused(
    change: tuple[str, str], said: str, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(recipe.read_text().replace(", " + change[0], ", " + change[1]))
    text = recipe.read_text().replace(*change)
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        Recipe(RecipeSettings(config=str(tmp_path / "bad.yaml")))


@pytest.mark.heavy
def test_from_the_command_line(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    Path("compare.yaml").write_text(
        f"problem: {{kind: recipe, config: {recipe}}}\n"
        "methods: {head: , vera: {r: 4, target_modules: [query, value]}}\n"
        "search: {lowest: 0.001, highest: 0.1, points: 2, rounds: 1, spare: 0}\nseeds: 1\n"
    )
    document = as_json("compare", "compare.yaml")
    assert document["metric"] == "accuracy"
    assert [method["name"] for method in document["methods"]] == ["head", "vera"]
    said = error("compare", "compare.yaml", "--set", "problem.config=gone.yaml")
    assert "gone.yaml" in said


# -- what is shipped ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "docstrings", "source"])
def test_shipped_comparisons_are_valid(name: str) -> None:
    settings = load_comparison(SHIPPED / f"{name}.yaml")
    for label, options in settings.methods.items():
        assert (options or {}).get("method", label) in METHOD_NAMES
    if settings.problem["kind"] == "recipe":
        assert load_settings(SHIPPED / str(settings.problem["config"])).data.test is not None
    if name != "source":
        assert tuple(settings.methods) == ALL_METHODS


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SHIPPED / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.heavy
def test_docstrings_give_nothing_away_and_splits_are_by_file() -> None:
    collect = script("collect_docstrings")
    texts = [*collect.texts_of("networkx"), *collect.texts_of("scikit-learn")]
    assert len(texts) > 500
    for text in texts:
        assert not re.search(r"numpy|scipy|sklearn|networkx|torch|sympy", text.text, re.IGNORECASE)
        assert "/tests/" not in text.source
    splits = collect.cut(collect.distinct(texts))
    files = {name: {row.source.partition(":")[0] for row in rows} for name, rows in splits.items()}
    assert not files["train"] & files["test"]
    assert not files["train"] & files["validation"]
    assert not files["validation"] & files["test"]
    assert splits == collect.cut(collect.distinct(texts))


def test_texts_of_two_libraries_are_dropped_and_twins_are_taken_once() -> None:
    collect = script("collect_docstrings")
    rows = [
        ("Return the shape of x in both directions.", "numpy", "a.py:f"),
        ("Return the shape of x1_y in both directions.", "numpy", "b.py:g"),
        ("Compute the sum of all values along axis.", "numpy", "a.py:h"),
        ("Compute the sum of all values along axis.", "scipy", "c.py:h"),
    ]
    found = collect.distinct([collect.Text(*row) for row in rows])
    assert len(found) == 2  # "x" and "x1_y" differ: one is a word, the other is code
    assert all(text.text.startswith("Return") for text in found)


def test_pieces_are_whole_lines_and_a_file_is_in_one_split() -> None:
    collect = script("collect_source")
    lines = [f"line {i} of the file, which is some text long\n" for i in range(40)]
    pieces = list(collect.pieces_of("".join(lines)))
    assert "".join(lines).startswith("".join(pieces))
    assert all(collect.PIECE <= len(piece) < 2 * collect.PIECE for piece in pieces)
    names = [f"f{i}.h" for i in range(60)]
    sources: list[tuple[str, str]] = [(name, "".join(f"{name} {line}" for line in lines)) for name in names]
    cut: dict[str, Any] = collect.cut(iter(sources), {"train": (0.5, 1000), "test": (0.5, 1000)})
    homes = {split: {piece.split()[0] for piece in pieces} for split, pieces in cut.items()}
    assert not homes["train"] & homes["test"]
    assert homes["train"] | homes["test"] == set(names)
    assert len(cut["train"]) == len(set(cut["train"]))
