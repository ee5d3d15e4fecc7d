"""``kilotune train`` and ``kilotune init``: what a new user types, and what is said when it is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kilotune.train.settings.config_file import load_settings
from kilotune.train.settings.sections import TASK_NAMES
from tests.support.cli_helpers import as_json, error, kilotune
from tests.support.train_support import model_folder, pictures, prompts, sentence, write_jsonl

FILE = "adapter_model.safetensors"
SHORT = ["--set", "training.device=cpu", "--set", "logging.report=false", "--progress", "quiet"]


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder("llama")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", prompts(12))


# -- three flags, no YAML --------------------------------------------------------------------------------


def test_a_model_and_a_file_are_enough(model: Path, data: Path, tmp_path: Path) -> None:
    done = kilotune("train", "--model", model, "--data", data, "--output", tmp_path / "out", *SHORT)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    assert json.loads((tmp_path / "out" / "result.json").read_text())["steps"] == 100, "12 rows, as often as that takes"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "KILOTUNE_VERA"  # only a seed, which PEFT would take for other numbers
    assert config["base_model_name_or_path"] == str(model)
    assert done.stderr == "", "quiet"
    assert load_settings(tmp_path / "out" / "kilotune-train.yaml").model.base == str(model)


def test_at_the_end_it_says_what_came_out_and_what_to_do_with_it(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "-m",
        model,
        "-d",
        data,
        "-o",
        out,
        "--set",
        "training.device=cpu",
        "--set",
        "data.validation_fraction=0.25",
    ]
    done = kilotune("train", *words, "--set", "training.max_steps=2", "--progress", "plain")
    assert done.exit_code == 0, done.stderr
    first, scores, compared, *verdict, report, attempt = done.stdout.splitlines()
    assert re.fullmatch(rf"the adapter of step \d: {out}, \d+\.\d+ kB", first)
    assert scores.startswith("validation: loss 4.")
    assert re.fullmatch(r"loss 4\.\d+, of the base 4\.\d+ \(on 3 rows of validation\)", compared)
    assert [text.partition(":")[0] for text in verdict] in ([], ["Nothing was learnt"])
    assert report == f"report: {out / 'report.html'}"
    assert attempt == f"try it: kilotune chat {out} --base {model}"
    page = (out / "report.html").read_text()
    assert str(model) in page
    assert (out / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_one_document_and_flags_reach_the_settings(model: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--method", "lora", "--epochs", "1", "--lr", "1e-3", "--batch-size", "4", "--set", "adapter.options.r=2"]
    result = as_json("train", "-m", model, "-d", data, "-o", tmp_path / "out", *flags, *SHORT)
    assert result["steps"] == 3
    assert result["folder"] == str(tmp_path / "out")
    assert result["adapter_bytes"] == (tmp_path / "out" / FILE).stat().st_size
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    made = load_settings(tmp_path / "out" / "kilotune-train.yaml")
    assert (made.training.epochs, made.training.learning_rate, made.training.batch_size) == (1, 1e-3, 4)
    assert made.adapter.method == "lora"


def test_several_files_and_a_validation_file(model: Path, data: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "more.jsonl", prompts(4))
    done = ["train", "-m", model, "-d", data, "-d", other, "--validation", other, "-o", tmp_path / "out", *SHORT]
    result = as_json(*done, "--set", "training.max_steps=2")
    assert "loss" in result["metrics"]["best"]
    assert load_settings(tmp_path / "out" / "kilotune-train.yaml").data.train == (str(data), str(other))


def test_dry_run_prints_the_plan_and_writes_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    short = [*SHORT, "--epochs", "3"]
    done = kilotune("train", "-m", model, "-d", data, "-o", tmp_path / "out", *short, "--dry-run")
    assert done.exit_code == 0
    assert "numbers are trained" in done.stderr
    assert "6 steps" in done.stderr, "12 rows in batches of 8, three epochs"
    assert "learn >" in done.stderr, "one example is shown, with what is learned"
    plan = as_json("train", "-m", model, "-d", data, "-o", tmp_path / "out", *short, "--dry-run")
    assert (plan["steps"], plan["rows"], plan["tokens_per_epoch"]) == (6, 12, 3 * plan["tokens"] // 9)
    assert plan["memory"]["peak"] > plan["memory"]["weights"] > 0
    assert "learn >" in plan["example"]
    assert not (tmp_path / "out").exists()


def test_json_lines_for_machines(model: Path, data: Path, tmp_path: Path) -> None:
    short = [word if word != "quiet" else "json" for word in SHORT]
    done = kilotune("train", "-m", model, "-d", data, "-o", tmp_path / "out", *short, "--set", "training.max_steps=2")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events[:2]] == ["plan", "learning rate"]
    assert [event["event"] for event in events[-2:]] == ["end", "result"]
    assert "take one of them" in error("train", "-m", model, "-d", data, "-o", tmp_path / "b", *short, "--json")


# -- a config file -----------------------------------------------------------------------------------------


def test_a_config_file_with_overrides(model: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    assert (
        kilotune("init", "-f", config, "-m", model, "-d", data, "-o", tmp_path / "a", "--method", "lora").exit_code == 0
    )
    result = as_json("train", config, *SHORT, "-o", tmp_path / "b", "--set", "training.max_steps=1")
    assert result["folder"] == str(tmp_path / "b")
    assert not (tmp_path / "a").exists()
    text = config.read_text().replace("epochs: null", "epocs: 3.0")
    config.write_text(text)
    said = error("train", config, *SHORT)
    assert said == (f"error: {config}: training.epocs: there is no such setting. Did you mean 'training.epochs'?\n")


def test_resume_needs_the_folder_alone(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = as_json("train", "-m", model, "-d", data, "-o", out, *SHORT, "--epochs", "3")
    (out / FILE).unlink()
    again = as_json("train", "-o", out, "--resume")
    assert (again["steps"], again["metrics"]) == (first["steps"], first["metrics"])
    assert (out / FILE).exists()
    said = error("train", "-m", model, "-d", data, "-o", out, *SHORT)
    assert "is there and not empty; --resume goes on with it, --force starts anew in it, or take another folder" in said
    said = error("train", "-o", out, "--resume", "--lr", "0.5")
    assert "training.learning_rate: it was None, and is 0.5" in said
    assert as_json("train", "-m", model, "-d", data, "-o", out, *SHORT, "--force", "--epochs", "1")["steps"] == 2


# -- what is said when it is wrong -------------------------------------------------------------------------


def test_nothing_given_says_what_to_give() -> None:
    said = error("train")
    assert "kilotune init writes one" in said
    assert "--model (model.base), --data (data.train), --output (output)" in said
    assert "--output" not in error("train", "-o", "x").replace("--output (output)", "")


def test_one_line_each(model: Path, data: Path, tmp_path: Path) -> None:
    plain = ["train", "-m", model, "-d", data, "-o", tmp_path / "out", *SHORT]
    for words, said in (
        (["--task", "causal"], "task: expected one of causal-lm"),
        (["--set", "training.epoch=3"], "Did you mean 'training.epochs'?"),
        (["--set", "training.epochs"], "expected KEY=VALUE"),
        (["--method", "lorra"], "Did you mean 'lora'?"),
        (["--set", "adapter.options.rank=3"], "Did you mean 'r'?"),
        (["--data", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--epochs", "many"], "a valid number"),
        (["--resume"], "there is no training in"),
    ):
        line = error(*plain, *words)
        assert said in line, (words, line)
        assert line.count("\n") == 1, line
    assert not (tmp_path / "out").exists()


def test_a_broken_line_of_the_data_is_named(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion"\n')
    said = error("train", "-m", model, "-d", rows, "-o", tmp_path / "out", *SHORT)
    assert f"{rows}:2" in said


# -- init --------------------------------------------------------------------------------------------------


def test_init_writes_a_file_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [{"text": sentence(i), "label": "ab"[i % 2]} for i in range(20)]
    kinds: dict[str, tuple[str, Path]] = {
        "causal-lm": ("gpt2", write_jsonl(tmp_path / "lm.jsonl", prompts(8))),
        "text-classification": ("bert", write_jsonl(tmp_path / "texts.jsonl", texts)),
        "image-classification": ("vit", pictures(tmp_path / "images", 10)),
    }
    for task, (kind, data) in kinds.items():
        done = kilotune("init", task, "-f", f"{task}.yaml", "-m", model_folder(kind), "-d", data, "-o", f"out-{task}")
        assert done.exit_code == 0, done.stderr
        assert f"kilotune train {task}.yaml" in done.stdout
        assert as_json("train", f"{task}.yaml", *SHORT, "--set", "training.max_steps=1")["steps"] == 1


def test_init_overwrites_nothing_and_knows_its_tasks(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for task in TASK_NAMES:
        assert as_json("init", task, "-f", file, "--force") == {"file": str(file), "task": task}
        assert load_settings(file).task == task
    before = file.read_text()
    assert "--force overwrites it" in error("init", "-f", file)
    assert file.read_text() == before
    assert "Did you mean 'seq2seq'?" in error("init", "seq2sec", "-f", tmp_path / "d.yaml")
    assert "Did you mean 'lora'?" in error("init", "-f", tmp_path / "d.yaml", "--method", "loraa")
    assert not (tmp_path / "d.yaml").exists()
    assert as_json("init", "-f", tmp_path / "new" / "c.yaml")["task"] == "causal-lm"
    assert error("init", "-f", file / "c.yaml").startswith(f"error: cannot write {file / 'c.yaml'}: ")


# -- a process of its own ------------------------------------------------------------------------------------


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kilotune.cli.main", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(out: Path, step: int) -> None:
    path = out / "logs" / "history.jsonl"
    until = time.monotonic() + 200
    while not (path.is_file() and f'"step": {step}' in path.read_text()):
        assert time.monotonic() < until, "the training does not get on"
        time.sleep(0.01)


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_stopped_and_resumed_by_the_command_line(number: int, code: int, model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", prompts(64))
    plain: list[Any] = ["-m", model, "-d", data, "--batch-size", "1", "--epochs", "4", "--set", "logging.log_every=1"]
    plain += ["--set", "training.save_every=25", *SHORT]
    whole = as_json("train", *plain, "-o", tmp_path / "whole")
    process = start("train", *plain, "-o", tmp_path / "out")
    wait_for_step(tmp_path / "out", 40)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    if code == 130:
        assert "\nstopped after step" in stderr
        assert "Go on with --resume" in stderr
    process = start("train", "-o", tmp_path / "out", "--resume", "--json")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["steps"] == whole["steps"] == 256
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


@pytest.mark.full
def test_nothing_but_ours_is_printed(model: Path, data: Path, tmp_path: Path) -> None:
    process = start("train", "-m", model, "-d", data, "-o", tmp_path / "out", "--set", "training.device=cpu")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    first, *others = (line.partition(":")[0] for line in stdout.splitlines())
    assert re.fullmatch(r"the adapter of step \d+", first)
    assert others[0].startswith("loss ")
    assert others[1:] == ["report", "try it"]
    assert stderr.startswith("causal-lm, vera on ")
    for word in ("torchao", "Loading weights", "Warning", "warning", "W1"):
        assert word not in stderr, stderr
