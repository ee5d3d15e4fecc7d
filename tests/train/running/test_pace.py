"""How long a training is said to take: a model that sleeps takes as long as it sleeps."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kilotune.train.data.rows import Ragged, Rows
from kilotune.train.run import open_session
from kilotune.train.running import pace as module
from kilotune.train.running.base_model import Loaded, adapt
from kilotune.train.running.pace import Pace, about, ordinary_rows, pace_of
from kilotune.train.running.planning import plan_run
from kilotune.train.running.session import Session
from kilotune.train.settings.config_file import settings_from
from kilotune.train.tasks import Prepared
from tests.support.train_support import model_folder, prompts, write_jsonl

NAP = 0.02  # seconds a row


class Sleeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        time.sleep(NAP * len(x))
        return torch.as_tensor(self.linear(x))


def collate(rows: list[Any]) -> dict[str, Tensor]:
    return {"inputs": torch.stack([row[0] for row in rows]), "labels": torch.tensor([row[1] for row in rows])}


def sleeping(method: str = "full", **training: Any) -> Session:
    settings = settings_from(
        {
            "model": {"base": "x"},
            "adapter": {
                "method": method,
                **({} if method == "full" else {"options": {"target_modules": "all-linear"}}),
            },
            "training": {"device": "cpu", "batch_size": 4, **training},
        }
    )
    rows: Any = [(torch.randn(3), i % 2) for i in range(12)]
    prepared = Prepared(rows, rows[:6], rows[:3], collate, None, None, None, "loss", False, 0, (), "")
    model = adapt(Loaded(Sleeper()), settings, None)
    return Session(settings, model, None, prepared, None, loss=nn.functional.cross_entropy)


def test_a_step_takes_as_long_as_it_takes() -> None:
    pace = pace_of(sleeping(accumulation=2), steps=20)
    assert pace is not None
    assert 2 * 4 * NAP <= pace.step < 4 * 4 * NAP  # two batches of four rows
    # 12 rows, 4 a batch, 2 batches a step: 2 steps an epoch, so 10 evaluations of 6 rows, and 3 rows of test at last.
    assert 63 * NAP <= pace.evaluations < 2 * 63 * NAP
    assert pace.seconds == pytest.approx(20 * pace.step + pace.evaluations)
    assert pace.rows == 4
    tested = pace_of(sleeping(), steps=1000)
    assert tested is not None
    assert tested.steps == 1000 + 3 * 50, "the learning rate is tested by three trainings of 5 % of the steps"
    given = pace_of(sleeping(learning_rate=1e-3), steps=1000)
    assert given is not None
    assert given.steps == 1000
    quiet = pace_of(sleeping(eval_every=None), steps=20)
    assert quiet is not None
    assert 3 * NAP <= quiet.evaluations < 2 * 3 * NAP


def test_where_a_row_takes_long_the_rest_is_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG", 2.5 * NAP)
    session = sleeping()
    pace = pace_of(session, steps=3)
    model: Any = session.model
    assert model.calls == [1, 1], "twice, for what comes once is not counted"
    assert pace is not None
    assert 4 * NAP <= pace.step < 8 * NAP
    assert "reckoned from one of its rows" in pace.line()
    monkeypatch.setattr(module, "QUICK", NAP / 2)
    session = sleeping()
    pace_of(session, steps=3)
    model = session.model
    assert model.calls == [1]


def test_what_is_kept_for_the_last_blocks_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_from(
        {
            "model": {"base": str(model_folder("llama"))},
            "adapter": {"method": "lora", "last_blocks": 1},
            "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", prompts(9)))},
            "training": {"device": "cpu", "batch_size": 4, "max_steps": 3, "input_cache": "disk"},
            "output": str(tmp_path / "out"),
        }
    )
    session = open_session(settings)
    times = iter([(0.9, 3.0), (0.1, 1.0)])
    monkeypatch.setattr(module, "time_real", lambda *_: next(times))
    pace = pace_of(session, steps=3)
    assert pace is not None
    assert (pace.step, pace.once) == (1.0, 2.0 * 9 / 4)
    assert pace.seconds == pytest.approx(3 * 1.0 + 4.5)
    monkeypatch.undo()
    in_earnest = pace_of(session, steps=3)
    assert in_earnest is not None
    assert in_earnest.step > 0
    assert not (tmp_path / "out").exists(), "a plan writes nothing"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_model_and_the_dice_stay_as_they_are(method: str, tmp_path: Path) -> None:
    settings = settings_from(
        {
            "model": {"base": str(model_folder("llama", dropout=0.1))},
            "adapter": {"method": method},
            "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", prompts(9)))},
            "training": {"device": "cpu", "batch_size": 4, "max_steps": 3},
        }
    )
    session = open_session(settings)
    session.model.eval()
    before, state = copy.deepcopy(session.model.state_dict()), torch.get_rng_state()
    pace = pace_of(session, steps=3)
    assert pace is not None
    assert pace.step > 0
    after = session.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in session.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not session.model.training
    assert pace_of(dataclasses.replace(session, loss=lambda *_: 1 / 0), steps=3) is None  # told when it starts


def test_the_plan_says_it(tmp_path: Path) -> None:
    settings = settings_from(
        {
            "model": {"base": str(model_folder("llama"))},
            "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", prompts(60)))},
            "training": {"device": "cpu"},
        }
    )
    plan = plan_run(open_session(settings))
    assert plan.pace is not None
    assert plan.pace.line() in plan.lines()
    told = json.loads(json.dumps(plan.to_dict()))["time"]
    assert told["seconds"] == plan.pace.seconds
    assert told["steps"] == plan.steps == 104
    assert (
        "104 steps (batches of 8, 8 an epoch), 13 epochs, so that there are 100 steps (training.epochs)"
        in plan.lines()[1]
    )
    for changes in ({"epochs": 3}, {"max_steps": 24}):
        short = plan_run(open_session(settings.replace(training=settings.training.replace(**changes))))
        assert short.steps == 24
        assert "so that" not in short.lines()[1]


def test_its_words() -> None:
    line = Pace(0.42, 300, 0.0, (8, 34), 8).line()
    assert line == "about 2 min (a step of 8 x 34 tokens takes 0.42 s here)"
    assert "a step of 8 x 34 tokens takes 1,400 s here" in Pace(1400.0, 300, 0.0, (8, 34), 8).line()
    assert (
        Pace(1.0, 10, 10.0, (8, 3, 16, 16), 8).line()
        == "about 20 s (a step of 8 rows takes 1 s here; evaluations 10 s of it)"
    )
    found = [about(seconds) for seconds in (0.2, 1, 44.6, 89, 91, 1800, 5399, 5401, 12600, 40000, 200000)]
    assert found == ["1 s", "1 s", "45 s", "89 s", "2 min", "30 min", "90 min", "1.5 h", "3.5 h", "11 h", "2.5 d"]


def test_the_batch_is_an_ordinary_one() -> None:
    lengths = [4, 4, 4, 4, 4, 4, 4, 4, 4, 60]
    rows = Rows({"input_ids": Ragged([np.ones(n) for n in lengths], np.int32)})
    drawn = np.random.default_rng(3)
    sizes = np.array([max(lengths[i] for i in drawn.integers(10, size=2)) for _ in range(module.DRAWN)])
    found = max(len(row["input_ids"]) for row in ordinary_rows(rows, 2, 3))
    assert abs(found - sizes.mean()) == min(abs(sizes - sizes.mean()))
    assert len(ordinary_rows([1, 2, 3], 8, 0)) == 3
