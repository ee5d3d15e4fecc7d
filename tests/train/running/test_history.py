"""The history of a training: written line by line, read back, gone on from without a step twice."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from kilotune.errors import CheckpointError, KilotuneError, MissingExtraError
from kilotune.train.running.events import Event, watching, without_own_output
from kilotune.train.running.history import History, read_history, tensorboard_callback


def record(kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "epoch": step / 10, "seconds": float(step), **values}


def told(history: History, *records: dict[str, Any]) -> History:
    for each in records:
        history.add(each)
    history.close()
    return history


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def trainer(folder: Path, callbacks: list[Any], **more: Any) -> Trainer:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **size))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 8, 3, 8, 6, 7, 8, 4, 5, 6, 7, 8):
        ids = torch.randint(1, 20, (8,), generator=generator)
        mask = (torch.arange(8) < length).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask > 0, ids, -100)})
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        logging_steps=2,
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        include_num_input_tokens_seen="non_padding",
        num_train_epochs=2,
        dataloader_pin_memory=False,
        **more,
    )
    made = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=callbacks)
    without_own_output(made)
    return made


def test_what_the_trainer_logs_is_what_is_written(tmp_path: Path) -> None:
    history = History(tmp_path / "logs")
    with watching([history]) as callback:
        made = trainer(tmp_path, [callback])
        made.train()
        made.evaluate(made.eval_dataset, metric_key_prefix="test")
    logs = made.state.log_history
    found = read_history(tmp_path / "logs" / "history.jsonl")
    assert found == history.records
    assert [r["kind"] for r in found] == (["train", "train", "validation"] * 3) + ["end", "test"]
    losses = [(log["step"], log["loss"], log["learning_rate"], log["grad_norm"]) for log in logs if "loss" in log]
    train = [r for r in found if r["kind"] == "train"]
    assert [(r["step"], r["loss"], r["learning_rate"], r["grad_norm"]) for r in train] == losses
    evaluated = [(log["step"], log["eval_loss"]) for log in logs if "eval_loss" in log]
    assert [(r["step"], r["loss"]) for r in found if r["kind"] == "validation"] == evaluated
    # 75 tokens an epoch that are no padding, 6 steps an epoch
    assert [r["tokens"] for r in found if r["step"] in (6, 12) and r["kind"] == "train"] == [75, 150]
    assert all(set(r) <= {*history.columns} for r in found)
    rows = table(tmp_path / "logs")
    assert [row["loss"] for row in rows] == [str(r["loss"]) for r in found]
    assert rows[0]["grad_norm"] == str(found[0]["grad_norm"])
    assert rows[2]["grad_norm"] == ""


def test_a_run_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    whole = History(tmp_path / "whole")
    with watching([whole]) as callback:
        trainer(tmp_path / "a", [callback]).train()

    class Killed(Exception): ...

    broken = History(tmp_path / "logs")

    class Kill:
        def hear(self, event: Event) -> None:
            if event.kind == "train" and event.step == 6:
                raise Killed

        def close(self) -> None: ...

    with pytest.raises(Killed), watching([broken, Kill()]) as callback:  # type: ignore[list-item]
        trainer(tmp_path / "b", [callback]).train()
    assert [r["step"] for r in read_history(broken.path)] == [2, 4, 4, 6]

    resumed = History(tmp_path / "logs", resume_step=4)
    with watching([resumed]) as callback:
        trainer(tmp_path / "b", [callback]).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))

    def measured(history: History) -> list[tuple[Any, ...]]:
        return [(r["kind"], r["step"], r["loss"]) for r in read_history(history.path) if r["kind"] != "end"]

    assert measured(resumed) == measured(whole)
    assert len(table(tmp_path / "logs")) == len(resumed.records)
    seconds = [r["seconds"] for r in resumed.records]
    assert seconds == sorted(seconds), "the second session goes on counting"


def test_a_finished_run_that_is_finished_up_again_has_no_second_end(tmp_path: Path) -> None:
    told(History(tmp_path), record("train", 5, loss=1.0), record("end", 10), record("test", 10, loss=2.0))
    again = told(History(tmp_path, resume_step=10), record("test", 10, loss=2.0))
    assert [r["kind"] for r in read_history(again.path)] == ["train", "test"]


def test_nothing_is_written_before_something_happens(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    history = History(folder)
    history.hear(Event("step", step=1))
    assert not folder.exists()
    history.hear(Event("start"))
    assert (folder / "history.jsonl").read_text() == ""


def test_a_new_run_begins_an_empty_file(tmp_path: Path) -> None:
    told(History(tmp_path), record("train", 1, loss=1.0))
    told(History(tmp_path), record("train", 2, loss=1.0))
    assert [r["step"] for r in read_history(tmp_path / "history.jsonl")] == [2]


def test_a_line_that_was_cut_in_two_is_left_out_and_written_again(tmp_path: Path) -> None:
    history = told(History(tmp_path), record("train", 1, loss=1.0), record("train", 2, loss=1.0))
    with history.path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [r["step"] for r in read_history(history.path)] == [1, 2]
    again = told(History(tmp_path, resume_step=2), record("train", 3, loss=1.0))
    assert [r["step"] for r in read_history(again.path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "train"}', '{"kind": "x", "step": 1, "seconds": 1}', "", "7"])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    history = told(History(tmp_path), record("train", 1, loss=1.0))
    with history.path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(CheckpointError, match=r"history\.jsonl:2: expected a record of a training"):
        read_history(history.path)
    with pytest.raises(CheckpointError, match=":2:"):
        History(tmp_path, resume_step=1)


def test_numbers_that_are_not_finite_come_back_and_the_file_is_json(tmp_path: Path) -> None:
    history = told(History(tmp_path), record("train", 1, loss=math.nan, a=math.inf, b=-math.inf))
    (line,) = history.path.read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["loss"] == "nan"
    (back,) = read_history(history.path)
    assert math.isnan(back["loss"])
    assert (back["a"], back["b"]) == (math.inf, -math.inf)
    assert table(tmp_path)[0]["a"] == "inf"


def test_the_table_grows_by_columns_and_keeps_its_rows(tmp_path: Path) -> None:
    told(History(tmp_path), record("train", 1, loss=1.5), record("validation", 1, accuracy=0.5, loss=2.0))
    first, second = table(tmp_path)
    assert (first["loss"], first["accuracy"], second["accuracy"]) == ("1.5", "", "0.5")
    assert not list(tmp_path.glob(".*")), "nothing is left aside"
    told(History(tmp_path / "none", csv=False), record("train", 1, loss=1.5))
    assert not (tmp_path / "none" / "history.csv").exists()


def test_every_record_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    history = History(tmp_path)
    for step in range(3):
        history.add(record("train", step, loss=1.0))
        assert [r["step"] for r in read_history(history.path)] == list(range(step + 1))
        assert [int(row["step"]) for row in table(tmp_path)] == list(range(step + 1))
    history.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    history = told(History(tmp_path), record("train", 1, loss=1.0))
    history.file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(KilotuneError, match=r"cannot write .*history\.jsonl: No space left on device"):
        history.add(record("train", 2, loss=1.0))


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(KilotuneError, match=r"cannot write .*logs"):
        told(History(tmp_path / "logs"), record("train", 1))


def test_tensorboard_gets_what_the_trainer_logs(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = tensorboard_callback(tmp_path / "board")
    made = trainer(tmp_path, [board], max_steps=4)
    made.train()
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    losses = [(log["step"], log["loss"]) for log in made.state.log_history if "loss" in log]
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(s, pytest.approx(v)) for s, v in losses]
    assert [e.step for e in read.Scalars("eval/loss")] == [4]
    again = trainer(tmp_path, [tensorboard_callback(tmp_path / "board", resume_step=2)], max_steps=4)
    again.train()
    both = EventAccumulator(str(tmp_path / "board"), purge_orphaned_data=True)
    both.Reload()
    assert [e.step for e in both.Scalars("train/loss")].count(4) == 1, "what comes again is hidden"


def test_tensorboard_that_is_absent_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"logging\.tensorboard needs .*kilotune\[tensorboard\]"):
        tensorboard_callback(tmp_path)
