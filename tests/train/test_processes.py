"""Several processes: the same adapter as one, whole or sharded base, and killed and gone on with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.support.cli_helpers import as_json, error
from tests.support.train_support import model_folder, prompts, write_jsonl

FILE = "adapter_model.safetensors"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(*words: object, processes: int = 2) -> subprocess.Popen[str]:
    """``torchrun ... kilotune train ...``"""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [*torchrun, "--master-port", str(free_port()), "-m", "kilotune.cli.main", "train", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def words_for(data: Path, method: str, batch: int, **settings: Any) -> list[Any]:
    values = {
        "device": "cpu",
        "batch_size": batch,
        "epochs": 2,
        "learning_rate": 1e-2,
        "eval_every": 2,
        **settings,
    }
    words = ["--model", model_folder("llama"), "--data", data, "--method", method, "--progress", "quiet"]
    words += ["--set", "data.validation_fraction=0.2", "--set", "logging.report=false", "--set", "logging.log_every=1"]
    return words + [word for name, value in values.items() for word in ("--set", f"training.{name}={value}".lower())]


@pytest.mark.full
@pytest.mark.parametrize(("method", "shard"), [("lora", False), ("vera", False), ("vera", True), ("dora", True)])
def test_two_processes_give_the_adapter_of_one(method: str, shard: bool, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", prompts(40))
    as_json("train", *words_for(data, method, 8), "-o", tmp_path / "one")
    finished(start(*words_for(data, method, 4, shard=shard), "-o", tmp_path / "two"))
    one, two = (load_file(tmp_path / name / FILE) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=2e-6), name
    files = [{p.name for p in (tmp_path / name).rglob("*") if "checkpoints" not in p.parts} for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.full
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_killed_and_resumed_give_the_same_bits(shard: bool, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", prompts(40))
    plain = words_for(data, "lora", 2, shard=shard, epochs=12, eval_every=10)
    plain += ["--set", "adapter.options.lora_dropout=0.1"]
    finished(start(*plain, "-o", tmp_path / "whole"))
    process = start(*plain, "-o", tmp_path / "out")
    history = tmp_path / "out" / "logs" / "history.jsonl"
    until = time.monotonic() + 200
    while not (history.is_file() and '"step": 47' in history.read_text()):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)
    for own in [
        *psutil.Process(process.pid).children(recursive=True),
        process,
    ]:  # torchrun's are in groups of their own
        own.kill()
    process.communicate()
    assert not (tmp_path / "out" / FILE).exists()
    finished(start("-o", tmp_path / "out", "--resume"))
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_sharding_needs_several_processes(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", prompts(8))
    said = error("train", *words_for(data, "lora", 4, shard=True), "-o", tmp_path / "out")
    assert said == (
        "error: training.shard: there is one process only; start several with torchrun or accelerate launch\n"
    )
    assert not (tmp_path / "out").exists()
    said = error("train", *words_for(data, "full", 4, shard=True), "-o", tmp_path / "out")
    assert "is for adapters, not for adapter.method 'full'" in said
