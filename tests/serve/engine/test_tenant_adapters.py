"""The adapters of all tenants: checked whole before they can be named, lost and broken ones, a store that goes away."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kilotune import Ia3Config, KilotuneError, LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.adapter_files.files import TwoFiles
from kilotune.adapter_files.reading import AdapterFile
from kilotune.errors import AdapterError, CheckpointError, ConfigError, ResourceError, StoreError
from kilotune.fleet import open_store
from kilotune.fleet.store import records
from kilotune.serve.engine.device_adapters import Turns
from kilotune.serve.engine.interface import AdapterKey
from kilotune.serve.engine.tenant_adapters import AdapterRegistry
from tests.support.models import randomize
from tests.support.serve_support import Served, adapter_of, alone, answer, answers, base_model, greedy, prompt_of


def key_of(namespace: str, version: Any) -> AdapterKey:
    return AdapterKey(namespace, version.name, version.version, version.sha256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's two files."""
    adapter_of(base_model(), 1).save_pretrained(tmp_path / "files")
    return tmp_path / "files"


@pytest.fixture
def registry(tmp_path: Path) -> Any:

    made = AdapterRegistry(f"sqlite:///{tmp_path}/a.db", copy.deepcopy(base_model()), max_norm=100.0)
    yield made
    made.close()


def test_what_is_put_can_be_named_in_its_namespace_alone(registry: AdapterRegistry, folder: Path) -> None:
    version = registry.put("ann", "mine", folder, alias="live", tags=["x"], metadata={"rows": 3})
    assert registry.resolve("ann", "mine") == key_of("ann", version)
    assert registry.resolve("ann", "mine", "live") == registry.resolve("ann", "mine", 1)
    assert registry.there(key_of("ann", version)) is not None  # ready to answer
    assert [v.name for v in registry.ls("ann")] == ["mine"]
    assert registry.ls("bob") == []
    with pytest.raises(AdapterError) as hidden:
        registry.resolve("bob", "mine")
    with pytest.raises(AdapterError) as nobody:
        registry.resolve("bob", "nope")
    assert str(hidden.value).replace("mine", "nope") == str(nobody.value)
    with pytest.raises(AdapterError, match="Did you mean 'mine'"):
        registry.resolve("ann", "mien")


def test_a_name_is_one_in_both_forms_of_its_letters(registry: AdapterRegistry, folder: Path, tmp_path: Path) -> None:
    split, whole = "Jose\u0301", "Jos\u00e9"
    version = registry.put("ann", split, folder)
    assert version.name == whole
    assert registry.resolve("ann", split).version == registry.resolve("ann", whole).version == 1
    assert registry.row(registry.resolve("ann", split)) is registry.there(key_of("ann", version))
    registry.rm("ann", whole)
    assert not registry._resolved  # nor is it named while the store is away
    with pytest.raises(AdapterError, match="with which it shows as another"):
        registry.check("ann", "ann\u202e", folder)


def test_a_put_reads_its_files_once_and_what_it_wrote_once(
    registry: AdapterRegistry, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form that is new, the same again, and other numbers of a form that is known."""
    read: list[Path] = []
    real = records.parse

    def counting(files: TwoFiles) -> AdapterFile:
        read.append(files.folder)
        return real(files)

    monkeypatch.setattr(records, "parse", counting)
    adapter_of(base_model(), 2).save_pretrained(tmp_path / "second")
    for source, expected in (
        (folder, [Path("mine"), Path("mine (version 1)")]),
        (folder, [Path("mine")]),  # it is in memory
        (tmp_path / "second", [Path("mine"), Path("mine (version 2)")]),
    ):
        read.clear()
        registry.put("ann", "mine", source)
        assert read == expected


def test_aliases_move_and_versions_go(registry: AdapterRegistry, folder: Path, tmp_path: Path) -> None:
    adapter_of(base_model(), 2).save_pretrained(tmp_path / "second")
    first = registry.put("ann", "mine", folder, alias="live")
    second = registry.put("ann", "mine", tmp_path / "second")
    assert registry.resolve("ann", "mine", "live").version == first.version
    assert registry.roll_out("ann", "live", {"mine": second.version}) == {"mine": 2}
    assert registry.resolve("ann", "mine", "live").sha256 == second.sha256
    assert registry.roll_back("ann", "live", ["mine"]) == {"mine": 1}
    assert registry.aliases("ann", "mine") == {"live": 1}
    assert registry.rm("ann", "mine", 2) == 1
    with pytest.raises(AdapterError):
        registry.resolve("ann", "mine", 2)
    registry.unalias("ann", "mine", "live")
    with pytest.raises(AdapterError):
        registry.resolve("ann", "mine", "live")


def broken(folder: Path, how: str) -> None:
    """Make a file that must not be taken."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    name = sorted(key for key in tensors if "lambda" in key)[0]
    if how == "a number that is none":
        tensors[name][0] = float("nan")
    elif how == "too large":
        tensors[name] += 1e4
    elif how == "a shape":
        tensors[name] = torch.zeros(tensors[name].shape[0] + 1)
    elif how == "a missing tensor":
        del tensors[name]
    elif how == "a flipped bit":
        data = bytearray(weights.read_bytes())
        data[-3] ^= 1
        weights.write_bytes(bytes(data))
        return
    elif how == "half a file":
        weights.write_bytes(weights.read_bytes()[:-40])
        return
    elif how == "no layer of this model":
        values = json.loads(config.read_text())
        values["target_modules"] = ["no_such_layer"]
        config.write_text(json.dumps(values))
        return
    save_file(tensors, weights)


@pytest.mark.parametrize(
    "how",
    [
        "a number that is none",
        "too large",
        "a shape",
        "a missing tensor",
        "a flipped bit",
        "half a file",
        "no layer of this model",
    ],
)
def test_what_is_broken_never_becomes_visible(registry: AdapterRegistry, folder: Path, how: str) -> None:
    broken(folder, how)
    with pytest.raises(KilotuneError):
        registry.put("ann", "mine", folder, alias="live")
    assert registry.ls("ann") == []
    assert registry.versions("ann", "mine") == []


def test_an_adapter_of_another_base_is_refused(registry: AdapterRegistry) -> None:
    with pytest.raises(CheckpointError, match="another base model"):
        registry.put("ann", "mine", adapter_of(base_model(7), 1))
    assert registry.ls("ann") == []


def test_nothing_of_a_refused_form_stays_in_the_model(registry: AdapterRegistry, folder: Path) -> None:
    registry.put("ann", "mine", folder)
    before = [name for name, _ in registry.model.named_modules()]
    config = VeraConfig(r=8, target_modules=["lm_head_that_is_not_there"])
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, "target_modules": list(config.target_modules)}))
    with pytest.raises(KilotuneError):
        registry.put("ann", "other", folder)
    assert [name for name, _ in registry.model.named_modules()] == before


@pytest.mark.parametrize("rank", [5000, 2**31 - 1])
def test_a_rank_that_its_file_does_not_have_takes_no_memory(
    registry: AdapterRegistry, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank stands in a configuration that anybody can write; the tensors are small."""
    model = get_peft_model(copy.deepcopy(base_model()), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")  # as PEFT writes it: without checksums
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**config, "r": rank}))

    def never(*given: object, **more: object) -> object:
        raise AssertionError("a bank was made for it")

    monkeypatch.setattr("kilotune.serve.engine.device_adapters.AdapterBank", never)
    with pytest.raises(ConfigError, match=f"has rank {rank}; this server takes at most 4096"):
        registry.put("ann", "giant", tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**config, "r": 4000}))
    with pytest.raises(CheckpointError, match="shape of"):
        registry.put("ann", "giant", tmp_path / "lora")
    assert registry.ls("ann") == []


def test_large_adapters_get_fewer_slots_and_too_large_ones_none(tmp_path: Path, folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    row = 4 * sum(tensor.numel() for tensor in tensors.values())  # it has vectors alone
    for bytes_, slots in ((3 * row + 1, 3), (row, 1)):
        made = AdapterRegistry(f"sqlite:///{tmp_path}/a.db", copy.deepcopy(base_model()), slots=8, form_bytes=bytes_)
        made.put("ann", "mine", folder)
        assert made.residents.room == slots + made.residents.whole
        made.close()
    made = AdapterRegistry(f"sqlite:///{tmp_path}/a.db", copy.deepcopy(base_model()), form_bytes=row - 1)
    with pytest.raises(ConfigError, match="form_bytes"):
        made.put("ann", "other", folder)
    made.close()


def test_heads_are_served_from_the_model(tmp_path: Path) -> None:
    base = base_model()
    own = [adapter_with_head(base, seed) for seed in (3, 4)]
    with Served(tmp_path, count=1, whole=2) as served:
        keys = [key_of("t", served.registry.put("t", f"w{i}", model)) for i, model in enumerate(own)]
        asked = [(prompt_of(i), greedy(6), key, "t") for i, key in enumerate([*keys, served.keys[0], None])]
        models = [*own, served.models[0], base]
        assert [one.ids for one in answers(served.engine, asked)] == [
            alone(model, prompt_of(i), 6) for i, model in enumerate(models)
        ]
        more = served.registry.put("t", "w2", adapter_with_head(base, 9))  # the one used longest ago makes way
        (got,) = answers(served.engine, [(prompt_of(5), greedy(6), key_of("t", more), "t")])
        assert got.ids == alone(adapter_with_head(base, 9), prompt_of(5), 6)


def adapter_with_head(base: Any, seed: int) -> PeftModel:

    model = get_peft_model(copy.deepcopy(base), VeraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    randomize(model, seed=seed, scale=0.3)
    return model.eval()


# -- lost, replaced, away ----------------------------------------------------------------------------


def test_a_lost_or_changed_adapter_fails_its_own_requests_only(tmp_path: Path) -> None:
    with Served(tmp_path, count=2) as served:
        registry = served.registry
        forged = AdapterKey("t", "a0", 1, "0" * 64)
        gone = AdapterKey("t", "a9", 1, "1" * 64)

        async def run() -> list[Any]:
            asked = [
                answer(served.engine, prompt_of(1), greedy(6), key, "t") for key in (served.keys[0], forged, gone, None)
            ]
            return await asyncio.gather(*asked, return_exceptions=True)

        good, other, lost, plain = asyncio.run(run())
        assert good.ids == alone(served.models[0], prompt_of(1), 6)
        assert plain.ids == alone(served.base, prompt_of(1), 6)
        assert isinstance(other, CheckpointError)
        assert isinstance(lost, AdapterError)
        assert registry.store_state() is None


def test_replacing_and_removing_change_no_request_that_runs(tmp_path: Path) -> None:
    with Served(tmp_path, count=1, slots=2) as served:
        registry, engine = served.registry, served.engine
        fresh = adapter_of(served.base, 50)

        async def run() -> tuple[Any, Any]:
            task = asyncio.create_task(answer(engine, prompt_of(1), greedy(80), served.keys[0], "t"))
            while engine.stats().running == 0:
                await asyncio.sleep(0.001)
            version = await asyncio.to_thread(registry.put, "t", "a0", fresh)
            await asyncio.to_thread(registry.rm, "t", "a0", 1)
            new = await answer(engine, prompt_of(1), greedy(10), key_of("t", version), "t")
            return await task, new

        old, new = asyncio.run(run())
        assert old.ids == alone(served.models[0], prompt_of(1), 80)
        assert new.ids == alone(fresh, prompt_of(1), 10)
        with pytest.raises(AdapterError):
            registry.resolve("t", "a0", 1)


def test_while_the_store_is_away_what_is_in_memory_answers(tmp_path: Path) -> None:
    with Served(tmp_path, count=2) as served:
        registry = served.registry
        key = registry.resolve("t", "a0")
        registry._rows.clear()
        registry.row(key)  # a1 is in no memory now
        registry.close()  # handles are opened anew
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        for file in tmp_path.glob("adapters.db*"):
            shutil.move(file, hidden / file.name)
        (tmp_path / "adapters.db").mkdir()  # so that no new one can be made in its place
        assert registry.resolve("t", "a0") == key
        with pytest.raises(StoreError):
            registry.resolve("t", "a1")
        assert registry.store_state()
        (good,) = answers(served.engine, [(prompt_of(1), greedy(6), key, "t")])
        assert good.ids == alone(served.models[0], prompt_of(1), 6)
        with pytest.raises(StoreError):
            answers(served.engine, [(prompt_of(1), greedy(6), served.keys[1], "t")])
        (tmp_path / "adapters.db").rmdir()
        for file in hidden.iterdir():
            shutil.move(file, tmp_path / file.name)
        assert registry.resolve("t", "a1") == served.keys[1]
        (back,) = answers(served.engine, [(prompt_of(1), greedy(6), served.keys[1], "t")])
        assert back.ids == alone(served.models[1], prompt_of(1), 6)
        assert registry.store_state() is None


def test_main_memory_is_bounded(tmp_path: Path) -> None:
    with Served(tmp_path, count=4, host_bytes=1, slots=2) as served:
        assert len(served.registry._rows) == 1
        asked = [(prompt_of(i), greedy(5), key, "t") for i, key in enumerate(served.keys)]
        got = [one.ids for one in answers(served.engine, asked)]
        assert got == [alone(model, prompt_of(i), 5) for i, model in enumerate(served.models)]
        assert len(served.registry._rows) == 1


def test_a_busy_form_is_no_place_for_another(tmp_path: Path) -> None:
    with Served(tmp_path, count=1, forms=1) as served:
        row = served.registry.row(served.keys[0])
        held = served.registry.residents.hold(row)
        assert held is not None
        with pytest.raises(ResourceError, match="try again later"):
            served.registry.put("t", "lora", adapter_of(served.base, 1, "lora"))
        assert [v.name for v in served.registry.ls("t")] == ["a0"]
        served.registry.residents.release(held)
        served.registry.put("t", "lora", adapter_of(served.base, 1, "lora"))


def test_no_form_makes_way_for_one_that_cannot_be_served(tmp_path: Path, folder: Path) -> None:
    with Served(tmp_path, count=1, forms=1) as served:
        broken(folder, "no layer of this model")
        with pytest.raises(KilotuneError):
            served.registry.put("t", "bad", folder)
        assert served.registry.there(served.keys[0]) is not None
        (got,) = answers(served.engine, [(prompt_of(1), greedy(4), served.keys[0], "t")])
        assert got.ids == alone(served.models[0], prompt_of(1), 4)


def test_one_read_for_many_who_ask_at_once(tmp_path: Path) -> None:
    with Served(tmp_path, count=1) as served:
        registry = served.registry
        registry._rows.clear()
        reads: list[int] = []
        own = registry._read

        def counted(key: AdapterKey, name: str) -> Any:
            reads.append(1)
            return own(key, name)

        registry._read = counted  # type: ignore[method-assign]
        threads = [threading.Thread(target=registry.row, args=(served.keys[0],)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(reads) == 1


def test_changes_get_their_turn_between_steps() -> None:
    turns = Turns()
    order: list[str] = []
    stop = threading.Event()

    def steps() -> None:
        while not stop.is_set():
            with turns.stepping():
                order.append("step")
                stop.wait(0.001)

    thread = threading.Thread(target=steps)
    thread.start()
    for _ in range(3):
        with turns.changing():
            order.append("change")
            count = len(order)
            stop.wait(0.01)
            assert len(order) == count  # no step meanwhile
    stop.set()
    thread.join()
    assert order.count("change") == 3


def test_changes_and_steps_take_turns() -> None:
    """However many changes wait, and however they come: between two of them a step that waits has its turn."""
    turns, order, stop = Turns(), list[str](), threading.Event()

    def changes() -> None:
        while not stop.is_set():
            with turns.changing():
                order.append("change")
                time.sleep(0.002)

    threads = [threading.Thread(target=changes) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        with turns.stepping():
            order.append("step")
            time.sleep(0.004)  # all changes wait by now
    stop.set()
    for thread in threads:
        thread.join()
    first, last = order.index("step"), len(order) - order[::-1].index("step")
    told = "".join(word[0] for word in order[first:last])
    assert told.count("s") == 20
    assert "ccc" not in told, "at most one that waited, and one that came before the step did"


def test_the_store_is_the_one_that_others_read(registry: AdapterRegistry, folder: Path) -> None:
    version = registry.put("ann", "mine", folder)
    with open_store(registry.url, namespace="ann", base=base_model()) as store:
        assert store.info("mine").sha256 == version.sha256
        assert store.get("mine").form.base == registry.fingerprint


# -- patterns and lists without end --------------------------------------------------------------------

ENDLESS = r"(([a-z._0-9])+)+q_pro"
PATTERNS: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": ENDLESS},
    "exclude_modules": {"exclude_modules": ENDLESS},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": [ENDLESS]},
    "rank_pattern": {"rank_pattern": {ENDLESS: 4}},
    "alpha_pattern": {"alpha_pattern": {ENDLESS: 4}},
}


def changed(place: Path, **config: Any) -> Path:
    """A LoRA's two files with other options, as anybody may write them: without checksums."""
    model = get_peft_model(copy.deepcopy(base_model()), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(place)
    tensors = load_file(place / "adapter_model.safetensors")
    save_file(tensors, place / "adapter_model.safetensors")
    values = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return place


def feedforward(place: Path) -> Path:
    """An IA3's two files with an endless pattern."""
    config = Ia3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(copy.deepcopy(base_model()), config).save_pretrained(place)
    save_file(load_file(place / "adapter_model.safetensors"), place / "adapter_model.safetensors")
    values = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**values, "feedforward_modules": ENDLESS}))
    return place


@pytest.mark.parametrize("field", [*PATTERNS, "feedforward_modules"])
def test_a_pattern_without_end_is_refused_in_time_and_by_the_name_of_its_field(
    registry: AdapterRegistry, tmp_path: Path, field: str
) -> None:
    """As it is put, and where it is in the store already, put there by somebody else."""
    place = tmp_path / "own"
    place = feedforward(place) if field == "feedforward_modules" else changed(place, **PATTERNS[field])
    with pytest.raises(ConfigError, match=rf"{field}: .*takes too long.*may take 1 s"):
        within(4, lambda: registry.put("ann", "own", place))
    assert registry.ls("ann") == []
    with open_store(registry.url, namespace="ann", base=base_model()) as store:
        store.put("own", place)
    key = registry.resolve("ann", "own")
    with pytest.raises(ConfigError, match=rf"{field}: .*takes too long.*may take 1 s"):
        within(4, lambda: registry.row(key))


def test_patterns_that_take_a_process_are_served(registry: AdapterRegistry, tmp_path: Path) -> None:
    """Look-arounds and repeats inside repeats: what they take is what ``re`` says."""
    pattern = r"(?!.*mlp)(?:\w+\.)*(?<=\.)q_proj"
    place = changed(tmp_path / "own", target_modules=pattern, rank_pattern={r"(?:\w+\.)*q_proj": 2}, r=8)
    version = registry.put("ann", "own", place)
    row = registry.there(key_of("ann", version))
    assert row is not None
    wanted = load_file(place / "adapter_model.safetensors")
    assert row.values is not None
    assert row.values.numel() == sum(tensor.numel() for tensor in wanted.values())


COUNT = 150_000
WORDS = [f"no.such.module.of.this.model.{i}" for i in range(COUNT)]
LISTS: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": [*WORDS, "q_proj"]},
    "target_modules, none of them": {"target_modules": WORDS},
    "exclude_modules": {"exclude_modules": WORDS},
    "modules_to_save": {"modules_to_save": WORDS},
    "target_parameters": {"target_modules": None, "target_parameters": WORDS},
    "layers_to_transform": {"layers_to_transform": [*range(2, COUNT), 0, 1]},
    "layers_to_transform, none of them": {"layers_to_transform": [*range(2, COUNT)]},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": WORDS},
    "rank_pattern": {"rank_pattern": dict.fromkeys(WORDS, 2)},
    "alpha_pattern": {"alpha_pattern": dict.fromkeys(WORDS, 2)},
    "options that are not there": dict.fromkeys(WORDS, 2),
}


@pytest.mark.heavy
@pytest.mark.parametrize("what", LISTS)
def test_lists_without_end_take_little_time(registry: AdapterRegistry, tmp_path: Path, what: str) -> None:
    """Megabytes of names: held against all modules one by one they would take minutes."""
    place = changed(tmp_path / "own", **LISTS[what])

    def put() -> None:
        with contextlib.suppress(KilotuneError):
            registry.put("ann", "own", place)

    within(20, put)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    began = time.monotonic()
    try:
        return call()
    finally:
        assert time.monotonic() - began < seconds


def test_an_adapter_of_other_weights_is_refused(registry: AdapterRegistry, tmp_path: Path) -> None:
    """One from a folder, which carries no fingerprint: its file says what base it is of."""
    adapter_of(base_model(1), 1).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"(has other weights|is of another base model)"):
        registry.put("ann", "mine", tmp_path / "other")
    assert registry.ls("ann") == []
    get_peft_model(copy.deepcopy(base_model()).half(), VeraConfig(r=8, target_modules="all-linear")).save_pretrained(
        tmp_path / "half"
    )
    assert registry.put("ann", "mine", tmp_path / "half").version == 1
