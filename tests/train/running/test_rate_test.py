"""The learning rate that is taken where none is given: found on what is at hand, and nothing of the test stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune.errors import ConfigError
from kilotune.train.run import fit, open_session
from kilotune.train.running import rate_test
from kilotune.train.running.rate_test import BETTER, FACTORS, LEAST, PART, take_rate
from kilotune.train.settings.config_file import settings_from
from kilotune.train.settings.rates import rate_for
from kilotune.train.settings.sections import TrainSettings
from tests.support.train_support import model_folder, prompts, write_jsonl

ENOUGH = 3 * LEAST * 7  # steps; more than LEAST * 3 / PART


def chosen(folder: Path, output: str = "out", **training: Any) -> TrainSettings:
    given = {"max_steps": ENOUGH, "batch_size": 4, "device": "cpu", "eval_every": None, **training}
    return settings_from(
        {
            "output": str(folder / output),
            "model": {"base": str(model_folder("llama"))},
            "adapter": {"method": "vera", "options": {"r": 4}},
            "data": {"train": str(write_jsonl(folder / "train.jsonl", prompts(16)))},
            "training": given,
            "logging": {"progress": "quiet", "report": False},
        }
    )


def planted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[tuple[float, int]]:
    """Short trainings that come to these losses; gives the rates and steps that are tried."""
    asked: list[tuple[float, int]] = []

    def loss(session: Any, rate: float, steps: int) -> float:
        asked.append((rate, steps))
        return losses[len(asked) - 1]

    monkeypatch.setattr(rate_test, "_loss_after", loss)
    return asked


@pytest.mark.parametrize(
    ("losses", "factor"),
    [
        ([3.0, 2.0, 1.0], 3.0),
        ([1.0, 2.0, 3.0], 1 / 3),
        ([2.0, 1.0, 2.0], 1.0),
        ([2.0, 1.0, 1.0 - BETTER / 2], 1.0),  # not better by enough
        ([2.0, float("inf"), float("inf")], 1 / 3),
        ([float("inf")] * 3, 1.0),
    ],
)
def test_the_best_of_three_is_taken(
    losses: list[float], factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = planted(monkeypatch, losses)
    taken = take_rate(open_session(chosen(tmp_path)))
    steps = int(ENOUGH * PART / 3)
    assert [rate for rate, _ in asked] == pytest.approx([rate_for("vera", steps) * f for f in FACTORS])
    assert {count for _, count in asked} == {steps}
    assert taken.value == pytest.approx(rate_for("vera", ENOUGH) * factor, rel=0.05)
    assert f"learning rate {taken.value:g}: a test of 3 x {steps} steps" in taken.why


def test_a_short_training_has_the_rule_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = planted(monkeypatch, [])
    taken = take_rate(open_session(chosen(tmp_path, max_steps=100)))
    assert (taken.value, asked) == (rate_for("vera", 100), [])
    assert taken.why.endswith("the rule for vera and 100 steps (a test needs 400 steps or more)")
    assert take_rate(open_session(chosen(tmp_path, learning_rate="rule"))).value == rate_for("vera", ENOUGH)
    assert take_rate(open_session(chosen(tmp_path, learning_rate=0.7))).value == 0.7
    assert asked == []


@pytest.mark.full
def test_nothing_of_the_test_stays(tmp_path: Path) -> None:
    session = open_session(chosen(tmp_path))
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    taken = take_rate(session)
    assert len({loss for _, loss in taken.tried}) == 3
    after = session.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # the training afterwards is the one with that rate given
    fit(session)
    other = open_session(chosen(tmp_path, "given", learning_rate=taken.value))
    fit(other)
    given = other.model.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in session.model.state_dict().items())


@pytest.mark.full
def test_who_goes_on_has_the_rate_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = planted(monkeypatch, [3.0, 2.0, 1.0])
    first = fit(open_session(chosen(tmp_path)))
    again = fit(open_session(chosen(tmp_path)), resume=True)
    assert len(asked) == 3
    assert again.learning_rate == first.learning_rate == pytest.approx(3 * rate_for("vera", ENOUGH), rel=0.05)
    history = [json.loads(line) for line in (first.folder / "logs" / "history.jsonl").read_text().splitlines()]
    assert max(entry.get("learning_rate", 0.0) for entry in history) == pytest.approx(first.learning_rate, rel=0.02)


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a number, rule or auto, got 'rul'. Did you mean 'rule'"):
        chosen(tmp_path, learning_rate="rul")
    with pytest.raises(ConfigError, match="learning_rate: expected a number above 0, got 0"):
        chosen(tmp_path, learning_rate=0)
