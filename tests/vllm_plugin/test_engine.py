"""The plugin in a real engine, against transformers with our adapters; one engine serves many tests, for it is slow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the tests of the plugin run in .venv-vllm: make test-vllm")

import vllm_support as support
from vllm_engine import KINDS, MIXED, TOLERANCE, Engine, started


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Two slots and room for three in memory, for five adapters: all are put out and brought back all the time."""
    yield from started(tmp_path_factory.mktemp("one"), max_loras=2, max_cpu_loras=3)


def test_base_and_more_adapters_than_slots_in_one_batch(engine: Engine) -> None:
    engine.check(MIXED[:20])


def test_base_alone_is_the_base(engine: Engine) -> None:
    engine.check([None] * 6, seed=1)


def test_base_rows_stay_the_base_while_all_slots_are_full(engine: Engine) -> None:
    """Pitfall 3: stock LoRA on a CPU gives them the last slot's adapter."""
    engine.check(["ann", "bob", None, None, "ann", "bob", None], seed=2)


def test_an_adapter_whose_file_is_gone_goes_on(engine: Engine) -> None:
    """Pitfall 1: put out of all caches and asked for again, with its file lost, it ends a stock engine."""
    engine.check(list(KINDS), seed=3)
    for name in KINDS:
        Path(engine.request(name).lora_path).unlink()
    engine.check([*KINDS, *KINDS], seed=4)


def test_what_cannot_be_loaded_harms_nobody_else_and_is_never_the_base(engine: Engine, tmp_path: Path) -> None:
    """Pitfall 2: workers never raise. What gets the poison row is told apart from any answer: its scores are NaN."""
    from vllm.lora.request import LoRARequest

    outside = tmp_path / "adapter_model.safetensors"
    outside.write_bytes(b"no adapter")
    bad = [
        LoRARequest("nowhere", 901, "/nonexistent/row"),
        LoRARequest("outside", 902, str(outside)),
        LoRARequest("traversal", 903, "../../etc/passwd"),
    ]
    assert [engine.llm.llm_engine.add_lora(request) for request in bad] == [False, False, False]
    assert engine.llm.llm_engine.pin_lora(999) is False
    prompts = support.prompts(4, 5)
    for request in bad:
        answers = engine.ask(prompts, [engine.request("ann"), request, None, engine.request("bob")])
        for i, name in ((0, "ann"), (2, None), (3, "bob")):
            assert support.worst(answers[i], support.reference(engine.model(name), prompts[i], 16)) <= TOLERANCE
        assert all(value != value for value in answers[1].logprobs)
    engine.check(MIXED[:8], seed=6)


def test_the_cache_holds_no_poison(engine: Engine) -> None:
    """Blocks that a lost adapter's tokens were in are used again by others, many times over."""
    from vllm.lora.request import LoRARequest

    lost = LoRARequest("lost", 904, "/nonexistent/row")
    for seed in range(3):
        prompts = support.prompts(12, 20 + seed)
        engine.ask(prompts, [lost] * len(prompts), 8)
        engine.check(MIXED[:12], seed=40 + seed, count=8)


def test_a_new_version_under_the_same_name_is_used_at_once(engine: Engine) -> None:
    """Pitfall 5: nothing of the old one is left in the prefix cache, for the name and the path are of the content."""
    prompt = [5] * 48  # whole blocks, which are kept
    first = engine.request("ann")
    before = engine.ask([prompt], [first])[0]
    assert support.worst(before, support.reference(engine.model("ann"), prompt, 16)) <= TOLERANCE
    replacement = support.adapted(engine.base, 77)
    engine.store.put("ann", replacement)
    second = engine.request("ann")
    assert (second.lora_name, second.lora_path) != (first.lora_name, first.lora_path)
    expected = support.reference(replacement, prompt, 16)
    # Both at once: a request that runs keeps its version.
    old, new = engine.ask([prompt, prompt], [first, second])
    assert support.worst(new, expected) <= TOLERANCE
    assert support.worst(old, support.reference(engine.model("ann"), prompt, 16)) <= TOLERANCE
    engine.store.rm("ann", 2)
    assert engine.request("ann").lora_name == first.lora_name


def test_prefixes_are_not_shared_between_adapters(engine: Engine) -> None:
    prompt = list(range(40, 90))
    for name in ("bob", "cid", None, "bob", "eve", None):
        got = engine.ask([prompt], [engine.request(name)], 8)[0]
        assert support.worst(got, support.reference(engine.model(name), prompt, 8)) <= TOLERANCE


@pytest.mark.parametrize("kv_heads", [2, pytest.param(1, id="replicated")])
def test_two_workers(tmp_path: Path, kv_heads: int) -> None:
    """Tensor parallel: split key-value heads, and one that both have; a bad adapter leaves the replies in step."""
    from vllm.lora.request import LoRARequest

    for engine in started(tmp_path, workers=2, kv_heads=kv_heads, max_loras=3):
        engine.check(MIXED[:20])
        for number in (905, 906):
            assert engine.llm.llm_engine.add_lora(LoRARequest("bad", number, "/nonexistent/row")) is False
        assert engine.llm.llm_engine.add_lora(engine.request("bob")) is True
        engine.check(MIXED[:6], seed=1)
