"""A service of the tests that trains: files and jobs over the tiny base, beside its real engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kilotune import AdapterConfig, LoraConfig
from kilotune.serve.engine.continuous_batching import TransformersEngine
from kilotune.serve.engine.tenant_adapters import AdapterRegistry
from kilotune.serve.http.keys import Key, Keyring, new_key
from kilotune.serve.http.prompts import Prompts
from kilotune.serve.learning.learner import Learner, LearningSettings
from kilotune.serve.learning.training import Training, TrainingLimits
from kilotune.serve.twin import twin_of
from tests.support.generation_support import loaded
from tests.support.http_support import BASE, Running, base_folder, serving, tokenizer

__all__ = ["CONFIG", "chat_lines", "done", "said", "training_serving", "upload"]

CONFIG = LoraConfig(r=8, target_modules="all-linear")
SPACES = ("ann", "bob", "carl")


def _ring() -> tuple[Keyring, dict[str, str], str, str]:
    """As keyring(), with tenants' keys that train; carl's does not."""
    made = {space: new_key("tenant", space, trains=space != "carl") for space in SPACES}
    manager, monitor = new_key("manager", None), new_key("monitor", None)
    kept: list[Key] = [key for _, key in made.values()] + [manager[1], monitor[1]]
    return Keyring(None, kept), {space: key for space, (key, _) in made.items()}, manager[0], monitor[0]


@contextmanager
def training_serving(
    folder: Path,
    config: AdapterConfig = CONFIG,
    limits: TrainingLimits | None = None,
    ring: Any = None,
    **settings: Any,
) -> Iterator[Running]:
    """A service with the tiny base that trains. ring: other keys, as keyring() gives them."""
    url = f"sqlite:///{folder / 'adapters.db'}"
    base = loaded("llama", base_folder())
    twin = twin_of(base)
    registry = AdapterRegistry(url, base)
    engine = TransformersEngine(registry.model.get_base_model(), tokenizer(), registry, max_running=16)
    prompts = Prompts(tokenizer(), int(base.config.vocab_size))
    with serving(
        folder, engine=engine, catalogue=registry, prompts=prompts, ring=ring or _ring(), **settings
    ) as running:
        learner = Learner(twin, registry, engine, LearningSettings(), engine.cores)
        training = Training(url, learner, registry, engine, BASE, config, tokenizer(), limits)
        training.start()
        running.service.training = training
        running.service.metrics.learns(training)
        yield running


def chat_lines(pairs: Sequence[tuple[str, str]]) -> bytes:
    """A training file: questions and their answers."""
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def upload(client: Any, data: bytes, name: str = "train.jsonl") -> Any:
    """A file of a client's."""
    return client.files.create(file=(name, data), purpose="fine-tune")


def done(client: Any, job: Any, seconds: float = 120) -> Any:
    """A job, once it has ended."""
    end = time.monotonic() + seconds
    while job.status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < end, job
        time.sleep(0.05)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def said(client: Any, model: str, question: str, count: int = 8) -> str:
    """The greedy answer of a model."""
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=count, temperature=0
    )
    return str(answer.choices[0].message.content)
