"""lm-evaluation-harness: a task scored through the service has the numbers of its own model on the same folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("clients have an environment of their own: make test-clients", allow_module_level=True)

import lm_eval
from lm_eval.tasks import TaskManager

from tests.support.http_support import base_folder, reference, tokenizer

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
ROWS = [
    {"text": "the cat sat on", "choices": ["the mat", "a dog", "it"], "gold": 0},
    {"text": "a big red", "choices": ["dog", "house ran", "mat mat mat"], "gold": 1},
    {"text": "the dog ran to the", "choices": ["house", "cat", "big"], "gold": 2},
    {"text": "it", "choices": ["sat", "ran", "the the"], "gold": 0},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return TaskManager(include_path=str(folder), include_defaults=False)


def scored(tasks: TaskManager, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=["tiny_choice", "tiny_rolling"], task_manager=tasks,
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    assert found is not None
    return dict(found)


@pytest.mark.parametrize(("model", "seed"), [("tiny", None), ("poems", 1)])
def test_its_numbers_are_those_of_its_own_model(
    service: Any, tasks: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, seed: int | None
) -> None:
    folder = base_folder()
    if seed is not None:
        folder = tmp_path / "merged"
        reference(seed).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    monkeypatch.setenv("OPENAI_API_KEY", service.key)
    asked = {
        "model": model, "base_url": f"{service.url}/completions", "tokenizer": str(folder),
        "tokenizer_backend": "huggingface", "num_concurrent": 4, "max_retries": 1, "max_length": 60,
    }  # fmt: skip
    served = scored(tasks, "local-completions", asked)
    alone = scored(tasks, "hf", {"pretrained": str(folder), "dtype": "float32", "device": "cpu", "max_length": 60})
    assert values(served) == pytest.approx(values(alone), abs=1e-3)
    assert served["results"]["tiny_choice"]["acc,none"] == alone["results"]["tiny_choice"]["acc,none"]
    assert served["results"]["tiny_rolling"]["byte_perplexity,none"] == pytest.approx(
        alone["results"]["tiny_rolling"]["byte_perplexity,none"], rel=1e-4
    )
    assert greedy(served) == greedy(alone)


def values(found: dict[str, Any]) -> list[float]:
    """Every log-likelihood that was asked for, in order."""
    choices = [float(one[0][0]) for sample in found["samples"]["tiny_choice"] for one in sample["resps"]]
    return choices + [float(one[0]) for sample in found["samples"]["tiny_rolling"] for one in sample["resps"]]


def greedy(found: dict[str, Any]) -> list[str]:
    """Whether each continuation is the likeliest one."""
    return [str(one[0][1]) for sample in found["samples"]["tiny_choice"] for one in sample["resps"]]
