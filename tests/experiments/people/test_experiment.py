"""The demo's run: its folder, what is taken up again, what is refused; and the whole short form with its checks."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kilotune.errors import CheckpointError, ConfigError
from kilotune.experiments.people import experiment, toy, training
from kilotune.experiments.people.experiment import forget, run
from kilotune.experiments.people.results import PeopleResult
from kilotune.experiments.people.settings import PeopleSettings, chosen
from tests.support.people_support import tiny


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that has learned next to nothing, unless a test wants more of it."""
    monkeypatch.setattr(toy, "STEPS", 4)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeopleResult]:
    """A run from its beginning to its end."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "STEPS", 4)
        return folder, run(tiny(), folder)


def check_same(one: PeopleResult, other: PeopleResult) -> None:
    """The same losses, but for roundings in another order, and the same trainings."""
    for name, losses in one.losses.items():
        assert other.losses[name] == pytest.approx(losses, abs=1e-5), name
    for ours, theirs in ((one.shared, other.shared), (one.personal, other.personal)):
        assert [step for step, _ in ours.curve] == [step for step, _ in theirs.curve]
        for user in ours.users:
            assert theirs.of(user.name).ended == user.ended
            assert dict(theirs.of(user.name).validation) == pytest.approx(dict(user.validation), abs=1e-5)


@pytest.mark.heavy
def test_a_run_has_everything_and_leaves_what_the_next_needs(done: tuple[Path, PeopleResult]) -> None:
    folder, found = done
    assert len(found.names) == 8
    assert set(found.losses) == {"base", "shared", *found.names}
    assert found.trained_now
    assert {user.name for user in found.personal.users} == set(found.names)
    assert [check.name.split()[0] for check in found.checks if check.passed][-2:] == ["a", "the"]
    assert len(found.questions) == 2
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert left == {"run.json", "adapters.db", "inputs.safetensors", "shared.json", "personal.json", "toy"}


@pytest.mark.heavy
def test_a_second_run_trains_nothing_and_finds_the_same(
    done: tuple[Path, PeopleResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = done
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("it trained again"))
    monkeypatch.setattr(toy, "_train", lambda *_: pytest.fail("it made the base again"))
    again = run(tiny(), folder)
    assert not again.trained_now
    check_same(again, found)
    assert again.answers.texts == found.answers.texts
    assert again.shared.seconds == found.shared.seconds


@pytest.mark.heavy
def test_another_run_s_folder_is_refused_until_it_is_forgotten(done: tuple[Path, PeopleResult], tmp_path: Path) -> None:
    folder, _ = done
    with pytest.raises(ConfigError, match=r"holds another run of the demo \(seed 0 there, 1 now\); give --restart"):
        run(tiny(1), folder)
    held = experiment.hold(folder / experiment.LOCK)
    assert held is not None
    with pytest.raises(ConfigError, match="is running the demo in"):
        run(tiny(), folder)
    experiment.let_go(held, folder / experiment.LOCK)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="run.json is damaged"):
        run(tiny(), tmp_path)
    (tmp_path / "keep.txt").write_text("mine")
    forget(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"keep.txt"}


@pytest.mark.heavy
@pytest.mark.parametrize("part", ["shared", "personal"])
def test_an_interrupted_run_goes_on_to_the_same_end(
    done: tuple[Path, PeopleResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    _, found = done
    fit, steps = training.fit, 0

    def interrupt(progress: Any) -> None:
        nonlocal steps
        steps += progress.kind == "step"
        if steps == 2:
            raise KeyboardInterrupt

    def interrupted(*words: Any, told: Any, on: Any, **more: Any) -> Any:
        mine = (on is None) == (part == "shared")
        return fit(*words, told=[*told, interrupt] if mine else told, on=on, **more)

    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), tmp_path)
    assert json.loads((tmp_path / f"{part}.json").read_text())["seconds"] > 0
    assert (tmp_path / f"{part}-state").is_dir()
    again = run(tiny(), tmp_path)
    check_same(again, found)
    assert not list(tmp_path.glob("*-state"))


@pytest.mark.heavy
def test_what_is_damaged_is_made_again(done: tuple[Path, PeopleResult]) -> None:
    folder, found = done
    file = folder / "inputs.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    (folder / "personal.json").write_text("[1")
    again = run(tiny(), folder)  # the personal part is trained again, as new versions
    check_same(again, found)
    assert again.trained_now


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2])
def test_the_short_form_passes_its_checks_from_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.undo()  # a base that has learned
    found = run(chosen(True, seed), tmp_path)
    assert [check.detail for check in found.failures] == []


def test_a_seed_that_is_none_is_an_error() -> None:
    assert chosen(False, 3).seed == 3
    with pytest.raises(ConfigError, match=r"the demo cannot be run:\n  - seed"):
        chosen(True, -1)


def test_the_mark_tells_settings_apart() -> None:
    settings: PeopleSettings = tiny()
    assert settings.mark == tiny().mark
    assert replace(settings, personal=replace(settings.personal, rate=0.5)).mark != settings.mark


def test_without_transformers_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kilotune.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="transformers"):
        run(tiny(), tmp_path)
