"""``adapter.last_blocks``: the same training with what enters the last blocks kept, and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kilotune.errors import ConfigError
from kilotune.train.run import evaluate, fit, open_session
from kilotune.train.settings.config_file import settings_from
from kilotune.train.settings.sections import TrainSettings
from tests.support.train_support import model_folder, prompts, sentence, write_jsonl

FILE = "adapter_model.safetensors"


def chosen(kind: str, task: str, folder: Path, output: str, adapter: dict[str, Any], **training: Any) -> TrainSettings:
    """A short training of a model of four blocks, with validation."""
    causal = task == "causal-lm"
    rows = prompts(16) if causal else [{"text": sentence(i), "label": "ab"[len(sentence(i)) % 2]} for i in range(16)]
    return settings_from(
        {
            "task": task,
            "output": str(folder / output),
            "model": {"base": str(model_folder(kind, layers=4))},
            "adapter": {"last_blocks": 2, **adapter},
            "data": {"train": str(write_jsonl(folder / "train.jsonl", rows)), "validation_fraction": 0.25},
            "training": {"epochs": 3, "batch_size": 4, "learning_rate": 1e-2, "device": "cpu", **training},
            "logging": {"progress": "quiet", "log_every": 1, "report": False},
        }
    )


def evaluated(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "logs" / "history.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if entry["kind"] == "validation"]


LORA = {"method": "lora", "options": {"r": 2, "target_modules": "all-linear"}}
METHODS = {
    "lora": LORA,
    "vera": {"method": "vera", "options": {"r": 8, "target_modules": "all-linear"}},
    "full": {"method": "full"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "task"), [("llama", "causal-lm"), ("bert", "text-classification")])
def test_the_same_training_with_inputs_kept_and_without(kind: str, task: str, method: str, tmp_path: Path) -> None:
    weights = []
    for cache in ("off", "memory", "disk"):
        session = open_session(chosen(kind, task, tmp_path, cache, METHODS[method], input_cache=cache))
        fit(session)
        assert (session.kept is None) == (cache == "off")
        weights.append({n: p.detach().clone() for n, p in session.model.named_parameters() if p.requires_grad})
    assert weights[0]
    moved = 0.0
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
            moved = max(moved, float(value.abs().max()))
    assert moved > 0
    losses = [evaluated(tmp_path / cache) for cache in ("off", "memory", "disk")]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_each_row_is_computed_once(tmp_path: Path) -> None:
    session = open_session(chosen("llama", "causal-lm", tmp_path, "out", LORA))
    ran: list[int] = []
    base = session.model.get_base_model()
    base.model.layers[0].mlp.register_forward_hook(lambda _, args, output: ran.append(output.shape[0]))
    fit(session)
    evaluate(session, "validation")
    assert session.kept is not None
    assert len(session.kept.places) == 16
    assert sum(ran) == 16
    assert all(
        name.startswith(("model.layers.2", "model.layers.3")) for name in session.model.installed("default").layers
    )


def test_the_file_names_these_blocks_as_peft_does(tmp_path: Path) -> None:
    result = fit(open_session(chosen("llama", "causal-lm", tmp_path, "out", LORA)))
    assert all(".layers.2." in name or ".layers.3." in name for name in load_file(Path(result.folder) / FILE))
    assert '"layers_to_transform": [\n    2,\n    3\n  ]' in (Path(result.folder) / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("task", "adapter", "training", "told"),
    [
        ("causal-lm", {"method": "head"}, {}, "adapter.last_blocks: method 'head' trains no block"),
        ("seq2seq", LORA, {}, "a seq2seq model has two lists of blocks"),
        (
            "causal-lm",
            {**LORA, "last_blocks": None},
            {"input_cache": "off"},
            "has no effect without adapter.last_blocks",
        ),
        ("causal-lm", LORA, {"input_cache": "off", "input_cache_mb": 5}, "has no effect with training.input_cache off"),
        ("causal-lm", LORA, {"shard": True}, "training.input_cache: processes that share the weights"),
        ("causal-lm", LORA, {"input_cache": "disc"}, "training.input_cache: expected one of memory, disk, off"),
    ],
)
def test_what_cannot_be_is_refused(
    task: str, adapter: dict[str, Any], training: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        chosen("llama", task, tmp_path, "out", adapter, **training)
    assert told in str(error.value)


def test_more_blocks_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="last_blocks: expected 1 to 3, got 4: model.layers has 4 blocks"):
        open_session(chosen("llama", "causal-lm", tmp_path, "out", {**LORA, "last_blocks": 4}))
