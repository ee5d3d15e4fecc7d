"""A training that is killed, at whatever moment, and gone on with, ends with the very bits of an unbroken one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune.errors import CheckpointError, ConfigError
from kilotune.train.run import fit, open_session, train
from kilotune.train.running.events import Event, Listener
from kilotune.train.settings.config_file import settings_from
from kilotune.train.settings.sections import TrainSettings
from kilotune.train.trainer.output_folder import alone, damage_of, find, newest
from kilotune.train.trainer.stopping import Stopped
from tests.support.train_support import model_folder, prompts, write_jsonl

FILE = "adapter_model.safetensors"
EVALUATIONS = ("validation",)  # where a stop brought a checkpoint, and with it a mean loss, of its own


def run_settings(base: Path, data: Path, output: Path, **training: Any) -> TrainSettings:
    """Dropout in base and adapter, accumulation, a schedule, evaluations: all that a resume has to restore."""
    return settings_from(
        {
            "output": str(output),
            "model": {"base": str(base)},
            "adapter": {
                "method": "lora",
                "options": {"r": 2, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]},
            },
            "data": {"train": str(data), "validation_fraction": 0.25},
            "training": {
                "epochs": 3,
                "batch_size": 2,
                "accumulation": 2,
                "learning_rate": 5e-3,
                "schedule": "cosine",
                "weight_decay": 0.01,
                "eval_every": 4,
                "save_every": 3,
                "device": "cpu",
                **training,
            },
            "logging": {"progress": "quiet", "log_every": 2, "report": False},
        }
    )


@pytest.fixture(scope="module")
def base() -> Path:
    return model_folder("llama", dropout=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", prompts(28))


@pytest.fixture(scope="module")
def unbroken(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "out"
    train(run_settings(base, data, output))
    return output


def history(output: Path) -> list[dict[str, Any]]:
    """The records, without what depends on the clock and the process."""
    lines = (output / "logs" / "history.jsonl").read_text().splitlines()
    timed = ("seconds", "memory", "tokens")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def same_run(one: Path, other: Path, kinds: tuple[str, ...] = ("train", "validation")) -> None:
    """The result, the last checkpoint and the records of these kinds are equal, the weights bit by bit."""
    assert (one / FILE).read_bytes() == (other / FILE).read_bytes()
    last = [newest(folder / "checkpoints") for folder in (one, other)]
    assert last[0] is not None
    assert last[1] is not None
    assert last[0].name == last[1].name
    for name in ("model.safetensors", FILE):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()
    assert [r for r in history(one) if r["kind"] in kinds] == [r for r in history(other) if r["kind"] in kinds]
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for name in ("steps", "metrics", "best_step", "trained"):
        assert results[0][name] == results[1][name], name


# -- really killed -------------------------------------------------------------------------------------


def go(settings: TrainSettings, resume: bool) -> None:
    """What the killed process does; its errors are seen by what it does not write."""
    import torch

    torch.set_num_threads(1)
    train(settings, resume=resume)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that begin with transformers imported, so that a kill costs no ten seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["kilotune.train.run", "kilotune.train.trainer.adapter_trainer", "transformers.models.llama"]
    )
    return context


def steps_done(output: Path) -> int:
    path = output / "logs" / "history.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


def killed_at(processes: Any, settings: TrainSettings, resume: bool, step: int, delay: float) -> bool:
    """Run, and kill -9 a moment after ``step`` was written down; whether it was still alive then."""
    process = processes.Process(target=go, args=(settings, resume))
    process.start()
    try:
        output = Path(str(settings.output))
        until = time.monotonic() + 120
        while process.is_alive() and steps_done(output) < step:
            assert time.monotonic() < until, "the training does not get on"
            time.sleep(0.002)
        time.sleep(delay)
        alive = process.is_alive()
        if alive:
            os.kill(process.pid, signal.SIGKILL)
    finally:
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return bool(alive)


@pytest.mark.heavy
def test_kill_9_at_random_steps_and_resume_gives_the_bits_of_an_unbroken_run(
    base: Path, data: Path, unbroken: Path, processes: Any, tmp_path: Path
) -> None:
    settings = run_settings(base, data, tmp_path / "out")
    chance = random.Random(7)
    kills = 0
    for number, step in enumerate(sorted(chance.sample(range(2, 17), 4))):
        kills += killed_at(processes, settings, number > 0, step, chance.uniform(0.0, 0.03))
    assert kills >= 3, "the killer came too late to prove anything"
    assert not (tmp_path / "out" / FILE).exists()
    result = train(settings, resume=True)
    assert result is not None
    assert result.steps == 18
    same_run(tmp_path / "out", unbroken)


# -- every state of the disk that a kill can leave -----------------------------------------------------


WRITTEN = ["adapter_config.json", FILE, "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("left", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (0, 4, 6))])
def test_a_checkpoint_that_was_cut_off_is_passed_over(
    base: Path, data: Path, unbroken: Path, tmp_path: Path, left: int
) -> None:
    output = stopped_after(base, data, tmp_path / "out", 11)
    whole = newest(output / "checkpoints")
    assert whole is not None
    torn = whole.parent / "checkpoint-12"
    torn.mkdir()
    for name in WRITTEN[:left]:
        shutil.copy(whole / name, torn / name)
    if left == len(WRITTEN):
        text = (whole / "trainer_state.json").read_text()
        (torn / "trainer_state.json").write_text(text[: len(text) // 2])
    assert newest(output / "checkpoints") == whole
    train(run_settings(base, data, output), resume=True)
    same_run(output, unbroken, EVALUATIONS)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_lost_a_file_is_told_and_passed_over(
    name: str, base: Path, data: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a machine that lost its power leaves it: the names are there, and what should be in the files is not."""
    output = stopped_after(base, data, tmp_path / "out", 14)
    checkpoint = newest(output / "checkpoints")
    assert checkpoint is not None
    whole = (checkpoint / name).read_bytes()
    for left in (None, b"", whole[: len(whole) // 2], bytes(len(whole))):
        (checkpoint / name).unlink(missing_ok=True)
        if left is not None:
            (checkpoint / name).write_bytes(left)
        assert f"{name} " in str(damage_of(checkpoint, every_byte=False))
        assert newest(output / "checkpoints") != checkpoint
    capsys.readouterr()
    train(run_settings(base, data, output), resume=True)
    assert f"warning: {checkpoint} is damaged, and passed over: {name} cannot be read" in capsys.readouterr().err
    same_run(output, unbroken, EVALUATIONS)


def flip(path: Path, at: float = 0.6) -> None:
    """One bit of a file, as a bad disk or cable leaves it."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def interrupted(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_after(base, data, tmp_path_factory.mktemp("interrupted") / "out", 11)


EVERY = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", FILE, "trainer_state.json"]


@pytest.mark.parametrize("name", [*EVERY, "checksums.json"])
def test_a_flipped_bit_is_found_and_its_file_named(name: str, interrupted: Path, tmp_path: Path) -> None:
    """In files that can be read all the same, and would be trained on."""
    shutil.copytree(interrupted / "checkpoints", tmp_path / "checkpoints")
    whole, told = find(tmp_path / "checkpoints", drop=False)
    assert told == []
    assert whole is not None
    for at in (0.1, 0.5, 0.97):
        before = (whole / name).read_bytes()
        flip(whole / name, at)
        found, (line,) = find(tmp_path / "checkpoints", drop=False)
        assert found is not None
        assert found.name == "checkpoint-8"
        assert re.match(rf"{re.escape(str(whole))} is damaged, and passed over: ({name}|\S+ is not as it)", line)
        assert name == "checksums.json" or f": {name} " in line
        (whole / name).write_bytes(before)
    (whole / name).unlink()
    found, told = find(tmp_path / "checkpoints", drop=False)
    if name == "checksums.json":  # as an older version left it
        assert (found, told) == (whole, [])
    else:
        assert f"{name} is missing" in told[0] or f"{name} cannot be read" in told[0]


def test_a_flipped_bit_of_the_optimizer_is_not_trained_on(
    base: Path, data: Path, unbroken: Path, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    checkpoint = newest(output / "checkpoints")
    assert checkpoint is not None
    flip(checkpoint / "optimizer.pt")
    assert torch.load(checkpoint / "optimizer.pt", weights_only=True), "it can be loaded"
    capsys.readouterr()
    train(run_settings(base, data, output), resume=True)
    told = f"warning: {checkpoint} is damaged, and passed over: optimizer.pt is not as it was written"
    assert told in capsys.readouterr().err
    same_run(output, unbroken, EVALUATIONS)


def test_where_no_checkpoint_is_whole_it_is_told_that_all_begins_anew(interrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(interrupted / "checkpoints", tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").glob("checkpoint-*/optimizer.pt"):
        flip(path)
    found, told = find(tmp_path / "checkpoints", drop=True)
    assert found is None
    assert told[-1] == "no other checkpoint is there, so the training begins anew"
    assert not [*(tmp_path / "checkpoints").glob("checkpoint-*")]


def test_an_older_checkpoint_that_cannot_be_loaded_is_named(
    base: Path, data: Path, interrupted: Path, tmp_path: Path
) -> None:
    """One without checksums, whose file is a whole archive of something else."""
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    checkpoint = newest(output / "checkpoints")
    assert checkpoint is not None
    (checkpoint / "checksums.json").unlink()
    torch.save([1, 2, 3], checkpoint / "optimizer.pt")
    told = rf"optimizer\.pt, or scheduler\.pt, of {re.escape(str(checkpoint))} cannot be loaded: "
    with pytest.raises(CheckpointError, match=told):
        train(run_settings(base, data, output), resume=True)


def test_the_best_checkpoint_is_held_against_its_checksums(
    base: Path, data: Path, unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(unbroken, output)
    (output / "result.json").unlink()
    state = newest(output / "checkpoints")
    assert state is not None
    best = next(path for path in state.parent.glob("checkpoint-*") if path != state)
    known = json.loads((state / "trainer_state.json").read_text())
    known["best_global_step"] = int(best.name.split("-")[1])
    (state / "trainer_state.json").write_text(json.dumps(known))
    (state / "checksums.json").unlink()
    flip(best / "model.safetensors", 0.9)
    with pytest.raises(CheckpointError, match=rf"{best} is damaged: model\.safetensors is not as it was written"):
        train(run_settings(base, data, output), resume=True)


# -- two at once ---------------------------------------------------------------------------------------


def test_two_do_not_train_in_one_folder(base: Path, data: Path, interrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    settings = run_settings(base, data, output)
    told = rf"output: process {os.getpid()} on .* is training in .*out now; wait for it, or take another folder"
    with alone(output):
        for how in ({"resume": True}, {"force": True}):
            with pytest.raises(ConfigError, match=told):
                train(settings, **how)
        with pytest.raises(ConfigError, match=told):
            fit(open_session(settings), resume=True)
        with pytest.raises(ConfigError, match=told):
            fit(open_session(run_settings(base, data, output)))
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    with alone(tmp_path / "new"), pytest.raises(ConfigError, match="is training in .*new now"):
        fit(open_session(run_settings(base, data, tmp_path / "new")))
    train(settings, force=True)
    assert not (output / "checkpoints" / ".lock").exists()


@pytest.mark.heavy
def test_two_processes_that_go_on_at_once(
    base: Path, data: Path, unbroken: Path, interrupted: Path, processes: Any, tmp_path: Path
) -> None:
    """One of them trains, to the bits of an unbroken run; the other is told so. Then one is killed, and lets go."""
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    settings = run_settings(base, data, output)
    both = [processes.Process(target=go, args=(settings, True)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert sorted(process.exitcode == 0 for process in both) == [False, True]
    same_run(output, unbroken, EVALUATIONS)
    (output / FILE).unlink()
    (output / "checkpoints" / ".lock").write_text("left by a kill")
    train(settings, resume=True)
    assert (output / FILE).read_bytes() == (unbroken / FILE).read_bytes()


# -- other than before ---------------------------------------------------------------------------------


def test_another_number_of_processes_is_refused(stopped: Path, base: Path, data: Path) -> None:
    record = stopped / "checkpoints" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "processes": 2}))
    assert "the number of processes: it was 2, and is 1" in refused(run_settings(base, data, stopped))


def stopped_after(base: Path, data: Path, output: Path, step: int) -> Path:
    """A training that its user stopped (Ctrl-C) while ``step`` ran, at no evaluation or checkpoint."""

    class Finger(Listener):
        def hear(self, event: Event) -> None:
            if event.kind == "step" and event.step == step - 1:
                os.kill(os.getpid(), signal.SIGINT)

        def close(self) -> None: ...

    session = open_session(run_settings(base, data, output))
    with pytest.raises(Stopped, match=f"stopped after step {step}, which has a checkpoint.*--resume"):
        fit(session, listeners=[Finger()])
    return output


def test_ctrl_c_writes_a_checkpoint_and_resume_gives_the_same_bits(
    base: Path, data: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)  # a job in the background begins with one that passes it over
    output = stopped_after(base, data, tmp_path / "out", 11)
    assert "stopping after this step" in capsys.readouterr().err
    found = newest(output / "checkpoints")
    assert found is not None
    assert found.name == "checkpoint-11"
    assert not (output / FILE).exists()
    assert signal.getsignal(signal.SIGINT) is before
    train(run_settings(base, data, output), resume=True)
    same_run(output, unbroken, EVALUATIONS)


def test_a_finished_training_is_only_finished_up(base: Path, data: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(unbroken, output)
    for name in (FILE, "adapter_config.json", "result.json"):
        (output / name).unlink()
    result = train(run_settings(base, data, output), resume=True)
    assert result is not None
    assert result.steps == 18
    same_run(output, unbroken)


# -- something is not as it was ------------------------------------------------------------------------


@pytest.fixture
def stopped(base: Path, data: Path, tmp_path: Path) -> Path:
    return stopped_after(base, data, tmp_path / "out", 2)


def refused(settings: TrainSettings) -> str:
    with pytest.raises(ConfigError) as caught:
        train(settings, resume=True)
    return str(caught.value)


def test_other_settings_are_refused_all_at_once(base: Path, data: Path, stopped: Path) -> None:
    said = refused(run_settings(base, data, stopped, learning_rate=1e-3, batch_size=4))
    assert "training.learning_rate: it was 0.005, and is 0.001" in said
    assert "training.batch_size: it was 2, and is 4" in said
    assert "--force" in said


def test_other_rows_are_refused(base: Path, data: Path, stopped: Path) -> None:
    before = data.read_text()
    rows = prompts(28)
    try:
        for row in rows:
            row["completion"] = row["completion"].replace("the", "cat")
        write_jsonl(data, rows)
        assert "of train" in refused(run_settings(base, data, stopped))
    finally:
        data.write_text(before)


def test_another_base_of_the_same_shapes_is_refused(base: Path, data: Path, stopped: Path, tmp_path: Path) -> None:
    other = tmp_path / "base"
    shutil.copytree(model_folder("llama", dropout=0.1, seed=1), other)
    shutil.copy(base / "config.json", other / "config.json")
    settings = run_settings(base, data, stopped)
    record = stopped / "checkpoints" / "run.json"
    values = json.loads(record.read_text())
    values["settings"]["model"]["base"] = str(other)
    record.write_text(json.dumps(values))
    said = refused(settings.replace(model=settings.model.replace(base=str(other))))
    assert "model.base: its weights are not those that the run began with" in said
    assert "rows" not in said
