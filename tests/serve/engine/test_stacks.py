"""Personal adapters on shared ones: one name gives both, in any mixed batch, and each fails by itself."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune import BottleneckConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.errors import AdapterError, ConfigError, ResourceError, UnsupportedError
from kilotune.fleet import open_store
from kilotune.serve.engine.continuous_batching import TransformersEngine
from kilotune.serve.engine.interface import AdapterKey, Generation
from kilotune.serve.engine.running_requests import Run
from kilotune.serve.engine.tenant_adapters import AdapterRegistry
from tests.support.models import randomize
from tests.support.serve_support import alone, answer, answers, base_model, greedy, prompt_of

SHARED = "@shared"
VERA = VeraConfig(r=8, target_modules="all-linear")
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
OTHER = LoraConfig(r=3, target_modules=["v_proj", "up_proj"])
DORA = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], use_dora=True)


def made(config: Any, seed: int, size: float = 0.5) -> PeftModel:
    """A model of its own with one random adapter."""
    model = get_peft_model(copy.deepcopy(base_model()), config)
    randomize(model, seed=seed, scale=size)
    return model.eval()


def merged(folder: Path, *models: PeftModel) -> Any:
    """The adapters of these models, the lowest first, merged into one plain model by PeftModel."""
    whole: Any = copy.deepcopy(base_model())
    names = [f"part-{i}" for i in range(len(models))]
    for name, model in zip(names, models, strict=True):
        model.save_pretrained(folder / name)
    whole = PeftModel.from_pretrained(whole, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        whole.load_adapter(folder / name, name)
    whole.set_adapter(names)
    return whole.merge_and_unload().eval()


class Stacks:
    """An engine, its adapters, and the plain model that each of them is."""

    def __init__(self, folder: Path, **options: Any) -> None:
        own = copy.deepcopy(base_model())
        running = options.pop("max_running", 64)
        self.folder = folder
        self.registry = AdapterRegistry(f"sqlite:///{folder}/adapters.db", own, **options)
        self.engine = TransformersEngine(own, None, self.registry, max_running=running)
        self.keys: dict[str, AdapterKey | None] = {"base": None}
        self.models: dict[str, Any] = {"base": base_model()}
        self.parts: dict[str, PeftModel] = {}

    def put(self, name: str, config: Any, seed: int, on: str | None = None, space: str = "t") -> AdapterKey:
        model = made(config, seed)
        version = self.registry.put(space, name, model, on=on)
        self.parts[name] = model
        below = [] if on is None else [self.parts[on]]
        self.models[name] = merged(self.folder / f"of-{name}", *below, model)
        key = self.keys[name] = AdapterKey.of(space, version)
        return key

    def check(self, names: list[str], count: int = 6) -> None:
        """All at once, twice: each answer is that of the merged model."""
        prompts = {name: prompt_of(7) for name in names}  # one prompt, so that caches could be shared
        for _ in range(2):
            asked = [(prompts[name], greedy(count), self.keys[name]) for name in names]
            for name, got in zip(names, answers(self.engine, asked), strict=True):
                assert got.finish.reason == "length", (name, got.finish)
                assert got.ids == alone(self.models[name], prompts[name], count), name


@pytest.fixture
def stacks(tmp_path: Path) -> Iterator[Stacks]:
    served = Stacks(tmp_path, max_norm=1e4)
    served.engine.start()
    yield served
    served.engine.stop()
    served.registry.close()


def test_a_mixed_batch_gives_what_each_merged_stack_gives(stacks: Stacks) -> None:
    """The base, shared ones alone, people on each of them, of one form and of others, and one by himself."""
    stacks.put("style", LORA, 1)
    stacks.put("other", OTHER, 2)
    stacks.put("third", VERA, 3)
    for i, on in enumerate(("style", "style", "other", "third")):
        stacks.put(f"vera-{i}", VERA, 10 + i, on)
    stacks.put("lora", LORA, 20, "style")  # of the form of what it stands on
    stacks.put("upside-down", LORA, 21, "third")  # a LoRA on a VeRA, beside a VeRA on a LoRA
    stacks.put("dora", DORA, 22, "style")
    stacks.put("alone", VERA, 23)
    names = list(stacks.keys)
    stacks.check(names)
    texts = {tuple(alone(stacks.models[name], prompt_of(7), 6)) for name in names}
    assert len(texts) > len(names) // 2, "they differ, or the test would see nothing"


def test_a_shared_adapter_is_on_the_device_once(stacks: Stacks) -> None:
    stacks.put("style", LORA, 1)
    people = [f"p{i}" for i in range(5)]
    for i, name in enumerate(people):
        stacks.put(name, VERA, 10 + i, "style")
    before = stacks.registry.residents.resident  # those that were tried, and what they were tried on
    stacks.check(people)
    assert stacks.registry.residents.resident == before + len(people)
    rows = [stacks.registry.row(stacks.keys[name]) for name in people]  # type: ignore[arg-type]
    assert len({row.below for row in rows}) == 1
    bank = stacks.registry.row(stacks.keys["p0"]).home.bank  # type: ignore[arg-type, union-attr]
    sizes = {stacks.registry.row(stacks.keys[name]).bytes for name in people}  # type: ignore[arg-type]
    assert sizes == {bank.form.length * 4}, "a row costs what the personal part costs"


def test_the_shared_one_stays_while_rows_stand_on_it(tmp_path: Path) -> None:
    served = Stacks(tmp_path, slots=2)
    served.put("style", LORA, 1)
    served.put("ann", VERA, 2, "style")
    residents = served.registry.residents
    row = served.registry.row(served.keys["ann"])  # type: ignore[arg-type]
    held = residents.hold(row)
    assert held is not None
    assert held.below is not None
    served.put("x", LORA, 3)
    served.put("y", LORA, 4)
    free = residents.hold(served.registry.row(served.keys["x"]))  # type: ignore[arg-type]
    assert free is not None
    assert residents.hold(served.registry.row(served.keys["y"])) is None, "its two slots are taken"  # type: ignore[arg-type]
    residents.release(held)
    assert residents.hold(served.registry.row(served.keys["y"])) is not None, "and now one is free"  # type: ignore[arg-type]
    assert [home.users for home in {*row.homes}].count(0) == 1
    served.registry.close()


def test_where_slots_are_few_stacks_take_turns(tmp_path: Path) -> None:
    """Each takes both slots of the one form, so they run one after the other, and none waits for ever."""
    served = Stacks(tmp_path, slots=2, forms=1)
    for i in range(3):
        served.put(f"style-{i}", LORA, i)
        served.put(f"p{i}", LORA, 10 + i, f"style-{i}")
    served.engine.start()
    try:
        served.check(["p0", "p1", "p2", "style-1"])
    finally:
        served.engine.stop()
        served.registry.close()


def test_two_of_one_form_need_two_slots(tmp_path: Path) -> None:
    served = Stacks(tmp_path, slots=1)
    served.put("style", LORA, 1)
    with pytest.raises(ConfigError, match="of one form, of which the device takes one adapter"):
        served.put("ann", LORA, 2, "style")
    served.put("bob", VERA, 2, "style")
    served.registry.close()


def test_what_cannot_act_together_is_not_put(stacks: Stacks) -> None:
    neck = BottleneckConfig(target_modules=["down_proj"])
    stacks.registry.put("t", "neck", made(neck, 1))
    with pytest.raises(UnsupportedError, match="cannot be served on top of the adapter that it stands on"):
        stacks.registry.put("t", "ann", made(neck, 2), on="neck")
    with pytest.raises(AdapterError, match="on='nobody': there is no such adapter"):
        stacks.registry.put("t", "ann", made(VERA, 2), on="nobody")
    stacks.put("style", LORA, 1)
    stacks.put("ann", VERA, 2, "style")
    with pytest.raises(ConfigError, match="two levels"):
        stacks.registry.put("t", "bob", made(VERA, 3), on="ann")
    assert [version.name for version in stacks.registry.ls("t")] == ["ann", "neck", "style"]


def test_a_folder_that_stands_on_one_is_not_put_alone(stacks: Stacks, tmp_path: Path) -> None:
    stacks.put("style", LORA, 1)
    stacks.put("ann", VERA, 2, "style")
    with open_store(stacks.registry.url, namespace="t") as store:
        store.get("ann").save(tmp_path / "ann")
    with pytest.raises(ConfigError, match="trained on top of 'style'"):
        stacks.registry.put("t", "bob", tmp_path / "ann")
    stacks.registry.put("t", "bob", tmp_path / "ann", on="style")


def test_a_broken_stack_fails_its_own_requests_alone(stacks: Stacks) -> None:
    stacks.put("style", LORA, 1)
    stacks.put("ann", VERA, 2, "style")
    stacks.put("other", LORA, 3)
    stacks.put("bob", VERA, 4, "other")
    gone = stacks.keys["bob"]
    assert gone is not None
    with stacks.registry._lock:  # so that it has to be read again
        stacks.registry._rows.clear()
    with open_store(stacks.registry.url, namespace="t") as store:
        store.rm("other", force=True)
    with pytest.raises(AdapterError, match="stands on 'other' \\(version 1\\), which was removed"):
        stacks.registry.resolve("t", "bob")
    with pytest.raises(AdapterError, match="'other' \\(version 1\\), which was removed"):
        asyncio.run(answer(stacks.engine, [1, 2], greedy(2), gone))
    stacks.check(["ann", "style", "base"])


def test_a_stack_whose_numbers_blow_up_ends_alone(stacks: Stacks) -> None:
    stacks.put("style", LORA, 1)
    stacks.put("ann", VERA, 2, "style")
    bad = made(VERA, 3)
    stacks.parts["bad"] = bad
    version = stacks.registry.put("t", "bad", bad, on="style")
    key = AdapterKey.of("t", version)
    row = stacks.registry.row(key)
    assert row.values is not None
    row.values.fill_(float("inf"))  # behind the checks' back
    prompts = prompt_of(3)
    broken, good = answers(stacks.engine, [(prompts, greedy(4), key), (prompts, greedy(4), stacks.keys["ann"])])
    assert broken.finish.reason == "error"
    assert good.ids == alone(stacks.models["ann"], prompts, 4)


def test_tenants_stand_on_what_is_shared_and_share_its_place(stacks: Stacks) -> None:
    stacks.put("style", LORA, 1, space=SHARED)
    stacks.put("ann", VERA, 2, "style", space="a")
    stacks.put("bob", VERA, 3, "style", space="b")
    ann, bob = stacks.keys["ann"], stacks.keys["bob"]
    assert ann is not None
    assert bob is not None
    assert ann.on == bob.on == AdapterKey.of(SHARED, stacks.registry.info(SHARED, "style"))
    stacks.check(["ann", "bob", "base"])
    assert stacks.registry.row(ann).below is stacks.registry.row(bob).below
    stacks.put("private", LORA, 4, space="a")
    with pytest.raises(AdapterError, match="there is no such adapter"):
        stacks.registry.put("b", "eve", made(VERA, 5), on="private")


def test_what_is_cached_of_a_prompt_is_of_both() -> None:
    shared = AdapterKey("t", "style", 1, "1" * 64)
    key = AdapterKey("t", "ann", 1, "2" * 64, shared)
    keys = [
        key,
        dataclasses.replace(key, on=None),
        dataclasses.replace(key, on=dataclasses.replace(shared, sha256="3")),
    ]
    sampling = greedy(1)
    owners = {
        Run(
            Generation(id="", tenant="t", adapter=k, prompt=(1,), sampling=sampling), None, None, None, frozenset()
        ).owner
        for k in (*keys, shared, None)
    }
    assert len(owners) == 5


def test_a_new_version_of_the_shared_one_changes_nobody(stacks: Stacks) -> None:
    stacks.put("style", LORA, 1)
    stacks.put("ann", VERA, 2, "style")
    before = stacks.registry.resolve("t", "ann")
    stacks.registry.put("t", "style", made(LORA, 9), alias="live")
    assert stacks.registry.resolve("t", "ann") == before == stacks.keys["ann"]
    stacks.check(["ann"])


def test_forms_that_make_way_take_their_stacks_along(tmp_path: Path) -> None:
    """A form in use stays; one that nobody uses goes, and who stands on it is read again."""
    served = Stacks(tmp_path, forms=2)
    served.put("style", LORA, 1)
    served.put("ann", VERA, 2, "style")
    served.engine.start()
    try:
        served.check(["ann"])
        served.put("other", OTHER, 3)  # the third form: that of the style or of ann goes
        served.check(["other"])
        served.check(["ann"])
        row = served.registry.row(served.keys["ann"])  # type: ignore[arg-type]
        held = served.registry.residents.hold(row)
        assert held is not None
        with pytest.raises(ResourceError, match="forms of adapters"):
            served.put("fourth", DORA, 5)
        served.registry.residents.release(held)
    finally:
        served.engine.stop()
        served.registry.close()


@pytest.mark.parametrize("config", [VERA, LORA], ids=["vera", "lora"])
def test_the_test_would_see_a_part_missing(config: Any, tmp_path: Path) -> None:
    shared, own = made(LORA, 1), made(config, 2)
    whole = merged(tmp_path, shared, own)
    ids = torch.tensor([prompt_of(7)])
    logits = [model(input_ids=ids).logits for model in (whole, shared, own)]
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)
