"""Adapters that learn beside an engine that answers: the same numbers, and neither is in the other's way."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune import AdapterConfig, LoraConfig, VeraConfig, get_config
from kilotune.errors import AdapterError, ConfigError, ResourceError, StoreError
from kilotune.fleet.stepper.adam import Adam
from kilotune.fleet.stepper.mixed_pass import Passes
from kilotune.fleet.stepper.operations import Forward, ForwardBackward, OptimStep
from kilotune.fleet.stepper.stepper import Stepper
from kilotune.methods import METHODS
from kilotune.serve.engine.continuous_batching import TransformersEngine
from kilotune.serve.engine.interface import AdapterKey, Finish, Sampling, Token
from kilotune.serve.engine.tenant_adapters import AdapterRegistry
from kilotune.serve.learning.learner import Learner, LearningSettings
from kilotune.serve.twin import twin_of
from tests.support.serve_support import VOCABULARY, adapter_of, alone, answers, base_model, greedy, prompt_of

ALL = "all-linear"
OPTIONS: dict[str, dict[str, Any]] = {
    "ia3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "bitfit": {"target_modules": ["q_proj", "up_proj"]},
    "bottleneck": {"target_modules": ["mlp"]},
    "vblora": {"target_modules": ALL, "vector_length": 4, "num_vectors": 8},
    "unilora": {"target_modules": ALL},  # of more numbers than its example, so that it says something
}
HOW = Adam(rate=3e-2)


def rows(seed: int, count: int = 4) -> list[dict[str, Any]]:
    """Random texts of the vocabulary; the second half of each is learned."""
    found = []
    for number in range(count):
        ids = list(prompt_of(100 * seed + number, 8 + number))
        labels = [*([-100] * 4), *ids[4:]]
        found.append({"input_ids": ids, "labels": labels})
    return found


class Both:
    """An engine and a learner over one copy of the weights."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        own = copy.deepcopy(base_model())
        twin = twin_of(own)
        self.registry = AdapterRegistry(f"sqlite:///{folder}/adapters.db", own)
        self.engine = TransformersEngine(own, None, self.registry)
        self.learner = Learner(twin, self.registry, self.engine, LearningSettings(**settings), self.engine.cores)

    def __enter__(self) -> Both:
        self.engine.start()
        self.learner.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.learner.stop()
        self.engine.stop()
        self.registry.close()

    def learn(self, name: str, batch: Sequence[Any], steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(self.learner.submit(name, ForwardBackward(batch)))
            self.learner.submit(name, OptimStep(HOW))
        return [one.result(timeout=120).loss for one in losses]

    def sample(self, name: str, prompt: Sequence[int], sampling: Sampling) -> list[Token]:
        async def run() -> list[Token]:
            found: list[Any] = [item async for item in self.learner.sample(name, prompt, sampling)]
            assert isinstance(found[-1], Finish)
            assert found[-1].reason == "length", found[-1]
            return found[:-1]

        return asyncio.run(run())


@pytest.fixture
def both(tmp_path: Path) -> Any:
    with Both(tmp_path) as made:
        yield made


@pytest.mark.parametrize("method", METHODS)
def test_trainer_and_sampler_agree(method: str, both: Both) -> None:
    """Bar 4 of the service that learns: log-probabilities within 1e-4, for every method that stacks."""
    config = get_config(method, **OPTIONS.get(method, {**METHODS[method].example, "target_modules": ALL}))
    both.learner.open("m", "ann", config)
    losses = both.learn("m", rows(1), 4)
    assert losses[-1] < losses[0]
    prompt = prompt_of(5)
    tokens = both.sample("m", prompt, greedy(6, logprobs=0))
    text = [*prompt, *(token.id for token in tokens)]
    row = {"input_ids": text, "labels": [*([-100] * len(prompt)), *text[len(prompt) :]]}
    scored = both.learner.submit("m", Forward([row])).result(timeout=60).logprobs[0]
    sampled = torch.tensor([token.logprob for token in tokens], dtype=torch.float64)
    trained = scored.double()[-len(tokens) :]
    assert float((sampled - trained).abs().max()) < 1e-4
    base = both.learner.submit("m", Forward([row], without=True)).result(timeout=60).logprobs[0]
    assert float((base.double()[-len(tokens) :] - trained).abs().max()) > 1e-3  # it has learned something


def test_others_answers_are_as_ever_while_somebody_learns(both: Both) -> None:
    put = both.registry.put("ben", "his", adapter_of(base_model(), 1))
    key = AdapterKey.of("ben", put)
    both.learner.open("m", "ann", VeraConfig(r=8, target_modules=ALL))
    learned = [both.learner.submit("m", ForwardBackward(rows(1))) for _ in range(1)]
    asked = [(prompt_of(i), greedy(8), key if i % 2 else None, "ben") for i in range(6)]
    for _ in range(3):
        learned.append(both.learner.submit("m", OptimStep(HOW)))
        learned.append(both.learner.submit("m", ForwardBackward(rows(1))))
        found = answers(both.engine, asked)
        for i, answer in enumerate(found):
            model = adapter_of(base_model(), 1) if i % 2 else base_model()
            assert answer.ids == alone(model, prompt_of(i), 8)
    assert all(one.result(timeout=60) for one in learned)
    assert both.learner.stats().passes >= 4


def test_a_sample_is_of_what_was_told_before_it(both: Both) -> None:
    both.learner.open("m", "ann", LoraConfig(r=2, target_modules=ALL))
    first = both.sample("m", prompt_of(1), greedy(6, logprobs=0))
    assert [token.id for token in first] == alone(base_model(), prompt_of(1), 6)  # LoRA starts as the base
    both.learner.submit("m", ForwardBackward(rows(1)))
    both.learner.submit("m", OptimStep(Adam(rate=0.1)))
    second = both.sample("m", prompt_of(1), greedy(6, logprobs=0))
    assert [token.logprob for token in first] != [token.logprob for token in second]
    assert len(both.registry.ls("ann")) == 0  # nothing of it is in the store


def test_a_personal_one_learns_and_answers_on_a_shared_one(both: Both) -> None:
    both.registry.put("@shared", "house", adapter_of(base_model(), 7, size=0.3))
    on = both.registry.settle("ann", "house")
    both.learner.open("m", "ann", LoraConfig(r=2, target_modules=ALL), on=on)
    tokens = both.sample("m", prompt_of(1), greedy(6))
    assert [token.id for token in tokens] == alone(adapter_of(base_model(), 7, size=0.3), prompt_of(1), 6)
    losses = both.learn("m", rows(2), 3)
    assert losses[-1] < losses[0]


def test_it_goes_on_from_a_version(both: Both) -> None:
    put = both.registry.put("ann", "hers", adapter_of(base_model(), 3))
    record = both.registry.stored("ann", put)
    config = VeraConfig(r=8, target_modules=ALL)
    both.learner.open("m", "ann", config, start=record)
    tokens = both.sample("m", prompt_of(2), greedy(6))
    assert [token.id for token in tokens] == alone(adapter_of(base_model(), 3), prompt_of(2), 6)


# -- what fails, fails alone -----------------------------------------------------------------------------


def test_memory_that_runs_out_is_the_operations_error(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Passes._learn

    def full(self: Passes, parts: Any) -> Any:
        if any(part.name == "m" for part in parts):
            # As torch says it on a CPU.
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 10 TB")
        return run(self, parts)

    monkeypatch.setattr(Passes, "_learn", full)
    config = LoraConfig(r=2, target_modules=ALL)
    both.learner.open("m", "ann", config)
    both.learner.open("n", "ben", config)
    asked = {name: both.learner.submit(name, ForwardBackward(rows(1))) for name in ("m", "n")}
    with pytest.raises(ResourceError, match="more memory than there is"):
        asked["m"].result(timeout=60)
    assert asked["n"].result(timeout=60).loss > 0
    assert both.engine.healthy() is None
    assert both.learner.healthy() is None
    assert both.learner.stats().failed == 1


def test_faults_are_told_to_who_made_them(both: Both) -> None:
    with pytest.raises(AdapterError, match="no model 'm'"):
        both.learner.submit("m", ForwardBackward(rows(1)))
    both.learner.open("m", "ann", LoraConfig(r=2, target_modules=ALL))
    with pytest.raises(AdapterError, match="there is a model of this name already"):
        both.learner.open("m", "ben", LoraConfig(r=2, target_modules=ALL))
    with pytest.raises(ConfigError, match="input_ids"):
        both.learner.submit("m", ForwardBackward([{"input_ids": [VOCABULARY + 5, 1], "labels": [1, 1]}]))
    waiting = both.learner.submit("m", ForwardBackward(rows(1)), number=7)  # 0 ... 6 never come
    both.learner.close("m")
    with pytest.raises(AdapterError, match="was closed"):
        waiting.result(timeout=60)
    both.learner.open("m", "ann", LoraConfig(r=2, target_modules=ALL))
    assert both.learn("m", rows(1), 1)


def test_so_many_models_and_no_more(tmp_path: Path) -> None:
    with Both(tmp_path, models=1) as both:
        both.learner.open("m", "ann", LoraConfig(r=2, target_modules=ALL))
        with pytest.raises(ResourceError, match="1 models are in training; close one"):
            both.learner.open("n", "ann", LoraConfig(r=2, target_modules=ALL))


def test_who_waits_when_it_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: AdapterConfig = LoraConfig(r=2, target_modules=ALL)
    with Both(tmp_path) as both:
        both.learner.open("m", "ann", config)
        waiting = both.learner.submit("m", ForwardBackward(rows(1)), number=3)
        both.learner.stop()
        with pytest.raises(AdapterError, match="was closed"):
            waiting.result(timeout=60)
        with pytest.raises(StoreError, match="nothing is trained: the learner was stopped"):
            both.learner.open("n", "ann", config)
        assert answers(both.engine, [(prompt_of(1), greedy(4), None, "t")])[0].finish.reason == "length"


def test_a_fault_of_our_own_ends_the_learner_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Stepper) -> bool:
        raise KeyError("ours")

    with Both(tmp_path) as both:
        both.learner.open("m", "ann", LoraConfig(r=2, target_modules=ALL))
        monkeypatch.setattr(Stepper, "work", broken)
        asked = both.learner.submit("m", ForwardBackward(rows(1)))
        with pytest.raises(AdapterError, match="was closed"):
            asked.result(timeout=60)
        both.learner.stop()
        assert "KeyError: 'ours'" in str(both.learner.healthy())
        assert both.engine.healthy() is None


# -- whose turn it is ------------------------------------------------------------------------------------


def test_a_pass_waits_for_its_share_while_the_engine_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is counted as taken: a pass that 'takes' 1000 s is followed by none for as long as there are answers."""
    with Both(tmp_path) as both:
        both.learner.open("m", "ann", LoraConfig(r=2, target_modules=ALL))
        busy = threading.Event()
        busy.set()
        monkeypatch.setattr(Learner, "_busy", lambda self: busy.is_set())
        both.learn("m", rows(1), 1)
        both.learner._share.took(1000.0, True)
        waiting = both.learner.submit("m", ForwardBackward(rows(1)))
        while both.learner.stats().waited == 0:
            time.sleep(0.01)
        assert not waiting.done()
        busy.clear()  # the engine has nothing to do
        assert waiting.result(timeout=60).loss > 0


@pytest.mark.parametrize("name", ["threads", "pass_tokens", "models"])
def test_wrong_settings_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected at least 1, got 0"):
        LearningSettings(**{name: 0})
