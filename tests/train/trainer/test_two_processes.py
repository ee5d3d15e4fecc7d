"""Two real processes (gloo) under the stock trainers and under ``kilotune train``: the same adapter as one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist

from kilotune import PeftModel
from kilotune.train.trainer.for_trainer import STATE_NAME, for_trainer
from tests.support.cli_helpers import kilotune
from tests.support.engine_support import CASES, adapted, arguments, batches, letters, nf4_llama, weights
from tests.support.models import disk, tiny_llama
from tests.support.paths import ROOT
from tests.support.train_support import model_folder, prompts, write_jsonl
from tests.train.trainer.test_sft_trainer import rows
from tests.train.trainer.test_sharding import launch

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:trl"),
]

RUNS = ["ddp:vera", "ddp:head", "shard:unilora", "shard:dvora", "shard:lora_fa", "native:lora", "sft:lora"]
RUNS += ["checkpointing:lora", "nf4:vera", "accelerate:vera", "accelerate:unilora", "accelerate:lora_fa"]
LONG = 900  # seconds, on a machine that has other work as well
SHARDED = ("shard", "native", "sft", "checkpointing", "accelerate")


# -- the stock trainers ----------------------------------------------------------------------------------


def alone(mode: str, case: str, base: Path, folder: Path) -> dict[str, Tensor]:
    """What one process makes of the whole batches."""
    from transformers import Trainer

    options = batches(case, 8)
    model = adapted(case, 1, nf4_llama(str(base)) if mode == "nf4" else None)
    if mode == "sft":
        trl = pytest.importorskip("trl")
        given = arguments(folder, trl.SFTConfig, bf16=False, max_length=32, **options)
        data = {"train_dataset": rows(), "eval_dataset": rows(), "processing_class": letters()}
        trl.SFTTrainer(model=for_trainer(model), args=given, **data).train()
    else:
        data = {"train_dataset": CASES[case][2], "eval_dataset": CASES[case][2]}
        Trainer(model=for_trainer(model), args=arguments(folder, **options), **data).train()
    return weights(model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """What two processes made of all the runs."""
    folder = tmp_path_factory.mktemp("trained")
    run = launch("trainer_worker.py", str(folder), str(base), *RUNS, "both:vera", timeout=LONG)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return folder


def check(folder: Path, run: str, base: Path, scratch: Path) -> None:
    mode, case = run.split(":")
    expected, start = alone(mode, case, base, scratch), weights(adapted(case, 1))
    for rank in (0, 1):
        found = load_file(folder / f"{mode}-{case}-{rank}.safetensors")
        assert bool(found.pop("kinds").item()) == (mode in SHARDED)
        assert len(found) == 2 * len(expected)
        assert max((value - start[name]).abs().max() for name, value in expected.items()) > 0.05
        for name, value in expected.items():
            torch.testing.assert_close(found[f"whole.{name}"], value, rtol=1e-4, atol=2e-6)
            assert torch.equal(found[f"resumed.{name}"], found[f"whole.{name}"])
    made = folder / f"{mode}-{case}"
    saved = weights(PeftModel.from_pretrained(adapted(case, 1).unload(), made / "out"))
    for name, value in saved.items():
        assert torch.equal(value, load_file(folder / f"{mode}-{case}-0.safetensors")[f"whole.{name}"])
    files = {path.name for path in (made / "checkpoint-2").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"} <= files
    assert (STATE_NAME in files) == (mode != "accelerate")
    assert ("pytorch_model_fsdp.bin" in files) == (mode == "accelerate")


@pytest.mark.full
@pytest.mark.timeout(LONG)
@pytest.mark.parametrize("run", RUNS)
def test_each_engine_in_two_processes_makes_the_adapter_of_one(
    run: str, trained: Path, base: Path, tmp_path: Path
) -> None:
    check(trained, run, base, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(LONG)
def test_sharding_twice_is_refused_before_the_adapters_part(trained: Path) -> None:
    for rank in (0, 1):
        text = (trained / f"both-{rank}.txt").read_text()
        assert "DistributedDataParallel has to average its gradients; the engine was told to shard by itself" in text


# -- kilotune train --------------------------------------------------------------------------------------

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "-m"]


def command(data: Path, output: Path, batch: int, *more: str) -> list[str]:
    settings = ["training.device=cpu", "training.eval_every=2", "training.save_every=2", "logging.report=false"]
    settings += ["data.validation_fraction=0.25", "adapter.options.r=8"]
    flags = [part for setting in settings for part in ("--set", setting)]
    flags += ["--model", str(model_folder("llama")), "--data", str(data), "--output", str(output)]
    return ["train", *flags, "--method", "vera", "--epochs", "2", "--batch-size", str(batch), "--lr", "0.01", *more]


def start(launcher: list[str], arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "kilotune.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", prompts(32))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("one") / "out"
    done = kilotune(*command(data, folder, 8, "--progress", "quiet"))
    assert done.exit_code == 0, done.stderr
    return folder


def same_adapter(folder: Path, other: Path) -> None:
    mine, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, other))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=2e-6)


def names(folder: Path) -> set[str]:
    return {name for name in disk(folder) if "rng_state" not in name}


@pytest.mark.full
@pytest.mark.parametrize(
    ("launcher", "shard"),
    [
        pytest.param(TORCHRUN, True, id="torchrun-shards"),
        pytest.param(TORCHRUN, False, id="torchrun", marks=pytest.mark.full),
        pytest.param(ACCELERATE, True, id="accelerate-shards", marks=pytest.mark.full),
    ],
)
def test_kilotune_train_in_two_processes(
    launcher: list[str], shard: bool, one: Path, data: Path, tmp_path: Path
) -> None:
    more = ["--progress", "plain", *(["--set", "training.shard=true"] if shard else [])]
    process = start(launcher, command(data, tmp_path / "two", 4, *more))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    same_adapter(tmp_path / "two", one)
    assert names(tmp_path / "two") == names(one)
    assert out.count("the adapter of step 6: ") == 1, out
    assert err.count("training: ") == err.count("done: ") == err.count("numbers are trained") == 1, err
    assert err.count("step 6/6") == 1
    assert err.count("2 processes") == 1


@pytest.mark.full
@pytest.mark.timeout(LONG)
def test_two_processes_that_are_killed_go_on_with_resume(one: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    process = start(TORCHRUN, command(data, folder, 4, "--progress", "quiet", "--set", "training.shard=true"))
    written = folder / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    for _ in range(2400):
        if written.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert written.exists(), process.communicate()[1][-3000:]
    os.killpg(process.pid, signal.SIGKILL)  # torchrun and its processes, which it started in its own session
    process.communicate()
    again = start(TORCHRUN, ["train", "--output", str(folder), "--resume", "--progress", "quiet"])
    assert again.wait(timeout=240) == 0, again.communicate()[1][-3000:]
    again.communicate()
    same_adapter(folder, one)


@pytest.mark.full
def test_an_error_is_one_line_of_one_process(data: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "mine.txt").write_text("keep")
    process = start(TORCHRUN, command(data, tmp_path / "two", 4))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("error: output: ") == 1, err
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["mine.txt"]
