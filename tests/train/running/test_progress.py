"""What listeners hear of a training, and what the progress shows of it."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from kilotune.errors import ConfigError, MissingExtraError
from kilotune.train.running.events import Event, Listener, memory_in_use, watching, without_own_output
from kilotune.train.running.progress import MODES, progress_for, readable_seconds


@final
class Ear(Listener):
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = 0

    def hear(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1


@final
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@final
class Net(nn.Module):
    """Something with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.linear(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(folder: Path, callbacks: Sequence[Any], **more: Any) -> Trainer:
    torch.manual_seed(0)
    rows = [{"x": torch.randn(3), "labels": torch.tensor(i % 2)} for i in range(10)]
    values = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "logging_steps": 2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        **more,
    }
    made = Trainer(
        Net(),
        TrainingArguments(output_dir=str(folder), **values),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=list(callbacks),
        compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    without_own_output(made)
    return made


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], list[dict[str, Any]]]:
    """What a listener heard of ten steps in two epochs, and the Trainer's own log."""
    ear, seconds = Ear(), iter(range(10_000))
    with watching([ear], unit="rows", clock=lambda: float(next(seconds))) as callback:
        made = trainer(tmp_path_factory.mktemp("run"), [callback])
        made.train()
        made.evaluate(made.eval_dataset, metric_key_prefix="test")
    assert ear.closed == 1
    return ear.events, made.state.log_history


# -- events --------------------------------------------------------------------------------------------


def test_what_happens_is_told_in_its_order(heard: tuple[list[Event], list[dict[str, Any]]]) -> None:
    events, _ = heard
    told = [f"{e.kind} {e.step}" for e in events if e.kind != "evaluating"]
    one = ["step 1", "step 2", "train 2", "step 3", "step 4", "train 4", "step 5", "validation 5", "save 5"]
    two = ["step 6", "train 6", "step 7", "step 8", "train 8", "step 9", "step 10", "train 10", "validation 10"]
    assert told == ["start 0", *one, *two, "save 10", "end 10", "test 10"]
    assert {(e.steps, e.epochs, e.first, e.unit) for e in events} == {(10, 2.0, 0, "rows")}


def test_the_values_are_those_of_the_trainer_without_its_prefixes(
    heard: tuple[list[Event], list[dict[str, Any]]],
) -> None:
    events, logs = heard
    by_kind = {kind: [e.values for e in events if e.kind == kind] for kind in ("train", "validation", "test", "end")}
    assert [v["loss"] for v in by_kind["train"]] == [log["loss"] for log in logs if "loss" in log]
    assert {frozenset(v) for v in by_kind["train"]} == {frozenset({"loss", "learning_rate", "grad_norm"})}
    assert [v["right"] for v in by_kind["validation"]] == [log["eval_right"] for log in logs if "eval_right" in log]
    assert {frozenset(v) for v in by_kind["validation"] + by_kind["test"]} == {frozenset({"loss", "right"})}
    assert [set(v) for v in by_kind["end"]] == [{"loss"}]


def test_rows_speed_and_time_left_are_counted(heard: tuple[list[Event], list[dict[str, Any]]]) -> None:
    events, _ = heard
    steps = [e for e in events if e.kind == "step"]
    assert [e.seen for e in steps] == [2 * (i + 1) for i in range(10)]
    fourth = steps[3]
    assert fourth.speed == 8 / fourth.seconds
    assert fourth.seconds_left == pytest.approx(fourth.seconds / 4 * 6)
    assert events[0].seconds_left is None
    assert events[0].speed == 0.0
    assert [(e.values["done"], e.values["of"]) for e in events if e.kind == "evaluating"] == [(1.0, 1.0)] * 3


def test_memory_is_told(heard: tuple[list[Event], list[dict[str, Any]]]) -> None:
    import psutil

    here = psutil.Process().memory_info().rss
    assert all(0.2 * here < e.memory < 5 * here for e in heard[0])
    before = memory_in_use(torch.device("cpu"))
    ballast = torch.ones(40_000_000)  # 160 MB
    assert memory_in_use(torch.device("cpu")) - before > 100_000_000
    del ballast


def test_a_resumed_session_counts_its_own_speed(tmp_path: Path) -> None:
    with watching([Ear()], unit="rows") as callback:
        trainer(tmp_path, [callback], max_steps=5).train()
    ear = Ear()
    with watching([ear], unit="rows", clock=iter([0.0, *[10.0] * 1000]).__next__) as callback:
        trainer(tmp_path, [callback]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    steps = [e for e in ear.events if e.kind == "step"]
    assert [(e.first, e.step, e.seen) for e in steps][:2] == [(5, 6, 2), (5, 7, 4)]
    assert steps[0].seconds_left == 0.0, "ten seconds had not passed since the start of this session"


def test_only_the_main_process_is_told(tmp_path: Path) -> None:
    ear = Ear()
    with watching([ear]) as callback:
        made = trainer(tmp_path, [callback], max_steps=2)
        made.state.is_world_process_zero = False
        made.is_world_process_zero = lambda: False
        made.train()
    assert ear.events == []


def test_listeners_are_closed_when_a_training_breaks_off(tmp_path: Path) -> None:
    ears = [Ear(), Ear()]
    with pytest.raises(RuntimeError, match="broken"), watching(ears):
        raise RuntimeError("broken")
    assert [ear.closed for ear in ears] == [1, 1]


# -- what is shown -------------------------------------------------------------------------------------

EVENTS = (
    Event("start", steps=40, epochs=2.0),
    Event("step", step=1, steps=40, seconds=2.0, seen=256),
    Event(
        "train",
        step=10,
        steps=40,
        epoch=0.5,
        seconds=10.0,
        seen=12345,
        memory=2_500_000_000,
        values={"grad_norm": 0.5, "loss": 2.34567, "learning_rate": 2e-4},
    ),
    Event("evaluating", step=10, steps=40, seconds=11.0, values={"done": 3, "of": 7}),
    Event("validation", step=10, steps=40, values={"loss": 2.0, "token_accuracy": 0.5}),
    Event("save", step=10, steps=40),
    Event("validation", step=20, steps=40, values={"loss": 2.5, "token_accuracy": 0.25}),
    Event("validation", step=30, steps=40, values={"loss": 1.5, "token_accuracy": 0.5}),
    Event("end", step=40, steps=40, epoch=2.0, seconds=130.0, seen=50_000, values={"loss": 1.75}),
    Event("test", step=40, steps=40, values={"loss": math.nan}),
)


def shown(mode: str, stream: Any = None, **more: Any) -> str:
    out = stream or io.StringIO()
    listener = progress_for(mode, stream=out, **more)
    for event in EVENTS:
        listener.hear(event)
    listener.close()
    return str(out.getvalue())


def test_lines() -> None:
    assert shown("plain", better=("loss", False)).splitlines() == [
        "training: 40 steps, 2 epochs",
        "step 10/40 (epoch 0.50): loss 2.346, lr 2.00e-04, gradient 0.5, 1,234 tokens/s, 2.5 GB, 30 s left",
        "validation at step 10: loss 2, token accuracy 0.5 (best so far)",
        "checkpoint at step 10",
        "validation at step 20: loss 2.5, token accuracy 0.25",
        "validation at step 30: loss 1.5, token accuracy 0.5 (best so far)",
        "done: 40 steps in 2:10, mean loss 1.75, 385 tokens/s",
        "test at step 40: loss nan",
    ]


def test_half_a_minute_without_a_line_is_the_most() -> None:
    clock = iter([0.0, 10.0, 29.0, 31.0, 31.0, 40.0, 62.0, 62.0, 70.0, 93.0, 93.0])
    out = io.StringIO()
    lines = progress_for("plain", stream=out, clock=lambda: next(clock))
    for step in range(1, 4):
        lines.hear(Event("step", step=step, steps=40, seconds=10.0 * step, seen=100 * step))
    for done in range(1, 3):
        lines.hear(Event("evaluating", step=3, steps=40, values={"done": done, "of": 7}))
    lines.hear(Event("step", step=4, steps=40, seconds=70.0, seen=400))
    lines.hear(Event("evaluating", step=4, steps=40, values={"done": 5}))
    assert out.getvalue().splitlines() == [
        "step 3/40 (epoch 0.00): 10 tokens/s, 6:10 left",
        "evaluating at step 3: batch 2/7",
        "evaluating at step 4: batch 5",
    ]


def test_the_best_is_by_the_metric_that_decides() -> None:
    marks = [line for line in shown("plain", better=("token_accuracy", True)).splitlines() if "best" in line]
    assert [re.sub(":.*", "", line) for line in marks] == ["validation at step 10"], "an equal one is no better"


def test_json_lines_are_json_and_have_everything() -> None:
    lines = [json.loads(line) for line in shown("json").splitlines()]
    assert [line["event"] for line in lines] == [e.kind for e in EVENTS if e.kind not in ("step", "evaluating")]
    assert lines[1] == {
        "event": "train",
        "step": 10,
        "steps": 40,
        "epoch": 0.5,
        "seconds": 10.0,
        "seconds_left": 30.0,
        "tokens": 12345,
        "tokens_per_second": 1234.5,
        "memory": 2_500_000_000,
        "grad_norm": 0.5,
        "loss": 2.34567,
        "learning_rate": 2e-4,
    }
    assert lines[-1]["loss"] == "nan"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("quiet") == ""
    assert capsys.readouterr() == ("", "")


def test_json_goes_to_stdout_and_all_others_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for mode, expected in (("json", True), ("plain", False), ("auto", False)):
        progress_for(mode).hear(EVENTS[0])
        told = capsys.readouterr()
        assert bool(told.out) is expected
        assert bool(told.err) is not expected


def test_the_bar_shows_what_is_asked_for() -> None:
    ticks = iter(range(1000))
    text = shown("bar", Terminal(), better=("loss", False), clock=lambda: float(next(ticks)))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "10/40 loss 2.346, lr 2.00e-04, 1,234 tokens/s, 2.5 GB, 30 s left" in plain
    assert "evaluating: batch 3/7" in plain
    assert "validation at step 30: loss 1.5, token accuracy 0.5 (best so far)" in plain
    assert plain.rstrip().endswith("test at step 40: loss nan"), "after the bar has gone, lines go on"


def test_the_bar_is_drawn_now_and_then_and_at_the_end() -> None:
    out = Terminal()
    bar = progress_for("bar", stream=out, clock=lambda: 0.0)  # no time passes
    bar.hear(EVENTS[0])
    drawn = len(out.getvalue())
    for step in range(1, 40):
        bar.hear(Event("step", step=step, steps=40, seconds=1.0))
    assert len(out.getvalue()) == drawn, "nothing between, for that would be too often"
    bar.hear(Event("step", step=40, steps=40, seconds=1.0))
    assert "40/40" in out.getvalue()
    bar.close()
    bar.close()


def test_auto_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in shown("auto", Terminal())
    assert "\x1b[" not in shown("auto")
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert shown("auto", Terminal()) == shown("plain")
    with pytest.raises(MissingExtraError, match=r"logging\.progress: bar needs the package 'rich'"):
        progress_for("bar")


def test_a_mode_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"logging\.progress: expected one of auto, .*Did you mean 'plain'\?"):
        progress_for("plian")
    from kilotune.train.settings.sections import LogSettings

    for mode in MODES:
        assert LogSettings(progress=mode).progress == mode, "what the settings take is what there is"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (59.4, "59 s"),
        (60, "1:00"),
        (3599.6, "1:00:00"),
        (93784, "26:03:04"),
    ]
    + [(200_000, "2 d 7 h")],
)
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text
