"""The parts of the vLLM plugin that need no vLLM; tests/vllm_plugin has what runs inside it (make test-vllm)."""

from __future__ import annotations

import asyncio
import json
import math
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kilotune import LoraConfig, VeraConfig, get_peft_model
from kilotune.errors import CheckpointError, ConfigError, KilotuneError, ResourceError, StoreError, UnsupportedError
from kilotune.fleet.store import AdapterStore, Fingerprint, open_store
from kilotune.projections.matrices import unit_rows
from kilotune.vllm import worker_status as run
from kilotune.vllm.adapter_source import Found, Source
from kilotune.vllm.arena import Arena, FusedLayer, Routes, poison_row
from kilotune.vllm.base_fingerprint import check_base, fingerprint_of_files
from kilotune.vllm.gate import Gate
from kilotune.vllm.layout import Cut, Layout, Part, Site
from kilotune.vllm.plugin import TESTED, _factory, version_fault
from kilotune.vllm.row_files import Spill, read_row, row_name, write_row
from kilotune.vllm.settings import Settings
from tests.support.store_support import KINDS, new_url

RANK, SEED = 6, 3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(*, seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def sites_of(model: nn.Module) -> list[Site]:
    return [
        Site(name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS
    ]


def adapter(base: nn.Module, number: int = 0, **options: Any) -> Any:
    """The base with an adapter that changes what it says."""
    values = {"r": 4, "projection_prng_key": SEED, "target_modules": list(TARGETS), "vera_dropout": 0.0}
    model = get_peft_model(base, VeraConfig(**{**values, **options}))
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "vera_lambda" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
    return model.eval()


# -- the row and the arena -------------------------------------------------------------------------


def qkv(worker: int = 0, workers: int = 1) -> list[Part]:
    """A fused layer of 16 inputs with parts of 16, 8 and 8 outputs."""
    parts, at = [], 0
    for name, out in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        own = out // workers
        parts.append(Part(Site(f"l.{name}", out, 16), (worker * own, (worker + 1) * own), at, (0, 16)))
        at += own
    return parts


def down(worker: int = 0, workers: int = 1) -> list[Part]:
    own = 24 // workers
    return [Part(Site("l.down_proj", 16, 24), (0, 16), 0, (worker * own, (worker + 1) * own))]


def by_hand(site: Site, d: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The change of one layer from the definition: diag(b) B diag(d) A x, in double precision."""
    rank = len(d)
    a = math.sqrt(6 / site.inn) * unit_rows(SEED, 0, rank, site.inn).astype(np.float64)
    matrix = math.sqrt(6 / rank) * unit_rows(SEED, 1, rank, site.out).astype(np.float64).T
    return (x.astype(np.float64) @ a.T * d) @ matrix.T * b


def numbers_for(sites: list[Site], rank: int, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {s.name: (torch.randn(rank, generator=generator), torch.randn(s.out, generator=generator)) for s in sites}


@pytest.mark.parametrize("workers", [1, 2])
def test_tokens_of_several_adapters_get_their_own_change(workers: int) -> None:
    """Two workers' parts together are the whole; a smaller rank is served beside the engine's."""
    sites = [part.site for part in (*qkv(), *down())]
    layout = Layout.of(RANK, SEED, sites)
    given = [numbers_for(sites, rank, seed) for seed, rank in enumerate((RANK, 4, RANK))]
    x, inner = torch.randn(7, 16), torch.randn(7, 24)
    ids = [11, 0, 12, 13, 11, 13, 0]
    fused, summed = torch.zeros(workers, 7, 32 // workers), torch.zeros(7, 16)
    for worker in range(workers):
        cut = Cut(RANK, SEED, {"l.qkv": qkv(worker, workers), "l.down": down(worker, workers)})
        arena = Arena(4, cut, torch.device("cpu"), torch.float32)
        for slot, numbers in zip((2, 0, 3), given, strict=True):
            arena.set_lora(slot, cut.local(layout.row(numbers), layout.to_json()))
        routes = Routes(16, arena)
        routes.set(ids, [12, None, 11, 13])
        FusedLayer(routes, RANK, "l.qkv", qkv(worker, workers)).add(x, fused[worker])
        part = torch.zeros(7, 16)
        columns = down(worker, workers)[0].columns
        FusedLayer(routes, RANK, "l.down", down(worker, workers)).add(inner[:, slice(*columns)], part)
        summed += part
    for token, number in enumerate(ids):
        if number == 0:
            assert not fused[:, token].any()
            assert not summed[token].any()
            continue
        numbers = given[number - 11]
        for part in qkv():
            d, b = (value.numpy() for value in numbers[part.site.name])
            expected = by_hand(part.site, d, b, x[token].numpy())
            own = len(expected) // workers
            at = part.at // workers
            got = fused[:, token, at : at + own].reshape(-1).numpy()
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
        d, b = (value.numpy() for value in numbers["l.down_proj"])
        expected = by_hand(sites[-1], d, b, inner[token].numpy())
        np.testing.assert_allclose(summed[token].numpy(), expected, rtol=2e-5, atol=2e-5)


def small_arena(slots: int = 2) -> tuple[Cut, Arena]:
    cut = Cut(RANK, SEED, {"l.qkv": qkv(), "l.down": down()})
    return cut, Arena(slots, cut, torch.device("cpu"), torch.float32)


def test_an_adapter_that_is_not_there_is_neither_the_base_nor_another() -> None:
    _, arena = small_arena()
    routes = Routes(8, arena)
    routes.set([5, 0, 9], [9, None])
    assert routes.index.tolist() == [arena.poison, arena.zero, 0, *[arena.zero] * 5]
    assert not routes.idle
    routes.set([0, 0], [9, None])
    assert routes.idle
    assert routes.index.tolist() == [arena.zero] * 8
    routes.set([], [9, None])
    assert routes.idle


def test_the_products_compile_into_one_graph_that_follows_the_routes() -> None:
    """A step that is compiled while nothing has an adapter serves those that come later."""
    cut, arena = small_arena()
    routes = Routes(8, arena)
    fused = FusedLayer(routes, RANK, "l.qkv", qkv())
    for slot in range(2):
        arena.set_lora(slot, torch.randn(cut.numbers))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape[0], 32)
        fused.add(x, out)
        return out

    x = torch.randn(4, 16)
    for ids in ([0, 0, 0, 0], [5, 0, 6, 5], [6, 6, 6, 0]):
        routes.set(ids, [5, 6])
        expected = torch.zeros(4, 32)
        fused.add(x, expected)
        torch.testing.assert_close(step(x), expected)
        assert expected.any() == any(ids)


def test_an_empty_slot_is_poison_and_poison_is_never_kept() -> None:
    """NaN in what the cache keeps would reach others, when its block is used again."""
    cut, arena = small_arena()
    assert torch.equal(arena.row(0).isnan(), poison_row(cut).isnan())
    begin = cut.begins["l.down"] + RANK
    assert poison_row(cut).isnan().nonzero().flatten().tolist() == list(range(begin, begin + 16))
    arena.set_lora(0, torch.ones(cut.numbers))
    arena.reset_lora(0)
    assert torch.equal(arena.row(0).isnan(), poison_row(cut).isnan())
    assert not arena.row(arena.zero).any()
    alone = Cut(RANK, SEED, {"l.qkv": qkv()})
    assert poison_row(alone).isnan().nonzero().flatten().tolist() == list(range(3 * RANK, 3 * RANK + 16))  # q alone


def test_poison_is_there_whatever_the_targets_are() -> None:
    """NaN in the last block, or finite numbers there; and never in a block before it."""
    kept = qkv()[1:]
    for layers, begin in (
        ({"m.0.a.qkv": qkv(), "m.0.b.down": down(), "m.1.a.qkv": kept}, "m.1.a.qkv"),
        ({"m.0.a.qkv": kept, "m.1.a.qkv": kept}, "m.1.a.qkv"),
    ):
        cut = Cut(RANK, SEED, layers)
        row = poison_row(cut)
        assert not row.isnan().any()
        assert not row[: cut.begins[begin]].any()
        assert row[cut.begins[begin] :].all()
    mixed = Cut(RANK, SEED, {"m.0.b.down": down(), "m.1.a.qkv": qkv(), "m.1.b.o": down()[:0]})
    assert poison_row(mixed).isnan().sum() == 16
    assert not poison_row(mixed)[: mixed.begins["m.1.a.qkv"]].any()
    assert not poison_row(Cut(RANK, SEED, {"m.0.b.down": down()}, final=False)).any()


def test_a_row_of_another_engine_is_refused() -> None:
    cut, _ = small_arena()
    sites = [part.site for part in (*qkv(), *down())]
    for other in (
        Layout.of(RANK + 1, SEED, sites),
        Layout.of(RANK, SEED + 1, sites),
        Layout.of(RANK, SEED, sites[1:]),
        Layout.of(RANK, SEED, [Site("l.q_proj", 17, 16), *sites[1:]]),
        Layout.of(RANK, SEED, [*sites, Site("m.down_proj", 4, 4096)]),  # its A is held smaller
    ):
        with pytest.raises(CheckpointError, match="this engine of"):
            cut.local(torch.zeros(other.numbers), other.to_json())


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_files_are_named_by_their_content(tmp_path: Path, dtype: torch.dtype) -> None:
    layout = Layout.of(RANK, SEED, [part.site for part in qkv()])
    row = torch.randn(layout.numbers).to(dtype)
    path = write_row(tmp_path, row, layout)
    again, text = read_row(tmp_path, str(path))
    assert torch.equal(again, row)
    assert Layout.from_json(text) == layout
    assert write_row(tmp_path, row, layout) == path
    assert write_row(tmp_path, row + 1, layout) != path
    assert row_name(row, Layout.of(RANK, SEED + 1, layout.sites).to_json()) != path.name
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_damaged_or_foreign_row_file_is_refused(tmp_path: Path) -> None:
    layout = Layout.of(RANK, SEED, [part.site for part in qkv()])
    path = write_row(tmp_path, torch.zeros(layout.numbers), layout)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    outside = tmp_path / "inside"
    outside.mkdir()
    (outside / path.name).write_bytes(path.read_bytes())
    for place in (str(outside / path.name), str(tmp_path / "x.row.safetensors"), "/etc/passwd", "", "\0", f"{path}/.."):
        with pytest.raises(CheckpointError):
            read_row(tmp_path, place)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        read_row(tmp_path, str(path))
    path.write_bytes(data[:50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_row(tmp_path, str(path))


def test_a_worker_keeps_its_rows_whatever_happens_to_files_and_disk(tmp_path: Path) -> None:
    spill = Spill(1000, torch.bfloat16, str(tmp_path))
    rows = {f"r{i}": torch.randn(1000).to(torch.bfloat16) for i in range(8)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for i, (key, row) in enumerate(rows.items()):
        if i == 5:  # the disk is full from here on
            resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 2000 + 700, limit[1]))
        try:
            spill.put(key, row)
            spill.put(key, torch.zeros_like(row))  # what is there stays
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []  # no name that somebody could remove
    assert len(spill) == 8
    for key, row in rows.items():
        kept = spill.get(key)
        assert kept is not None
        assert torch.equal(kept, row)
    assert spill.get("other") is None
    spill.close()


@pytest.mark.parametrize("tied", [False, True])
def test_the_fingerprint_of_the_files_is_that_of_the_model(tmp_path: Path, tied: bool) -> None:
    model = llama(tied=tied)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    files = fingerprint_of_files(str(tmp_path))
    check_base(Fingerprint.of(model), files, "the adapter")
    assert set(files.parameters) == set(Fingerprint.of(model).parameters) - ({"lm_head.weight"} if tied else set())
    with pytest.raises(CheckpointError, match="other values"):
        check_base(Fingerprint.of(llama(seed=1, tied=tied)), files, "the adapter")
    with pytest.raises(CheckpointError, match="no safetensors files"):
        fingerprint_of_files(str(tmp_path.parent))


# -- admission and names ---------------------------------------------------------------------------


@pytest.fixture
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace]:
    """A store (of SQLite, or of the fixture's parameter), and a worker that said what it serves; no vLLM."""
    monkeypatch.setenv(run.RUN, str(tmp_path / "run"))
    monkeypatch.delenv("KILOTUNE_VLLM_STORE", raising=False)
    base = llama()
    base.save_pretrained(tmp_path / "base")
    url = new_url(getattr(request, "param", "sqlite"), request, tmp_path)
    store = open_store(url)

    def announce(**settings: Any) -> Source:
        made = Settings.of({"rank": RANK, "seed": SEED, "store": url, **settings})
        run.announce(0, 1, str(tmp_path / "base"), torch.float32, made, sites_of(base))
        return Source()

    yield SimpleNamespace(store=store, announce=announce, base=tmp_path / "base", url=url, folder=tmp_path)
    store.close()


def test_an_adapter_of_the_store_becomes_a_row_of_its_numbers(engine: SimpleNamespace) -> None:
    model = adapter(llama(), 5)
    engine.store.put("ann", model)
    source = engine.announce()
    found = source.find("ann")
    assert found is not None
    assert source.find(found.name) == found
    row, text = read_row(run.folder(), found.path)
    layout = Layout.from_json(text)
    assert layout.sites == tuple(sorted(sites_of(llama())))
    site = layout.by_name["model.layers.1.mlp.down_proj"]
    names = dict(model.named_parameters())
    b = names[next(key for key in names if "layers.1.mlp.down_proj" in key and "vera_lambda_b" in key)]
    begin = layout.places[site.name]
    assert torch.equal(row[begin + RANK : begin + RANK + site.out], b)
    assert not row[begin + 4 : begin + RANK].any()  # its own rank is 4


def broken(engine: SimpleNamespace) -> dict[str, str]:
    """Adapters that must be refused, and what the refusal says."""
    store: AdapterStore = engine.store
    base = llama()
    store.put("lora", get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))
    store.put("seed", adapter(llama(), projection_prng_key=SEED + 1))
    store.put("rank", adapter(llama(), r=RANK + 1))
    store.put("shape", adapter(llama(), sharing="shape"))
    store.put("peft", adapter(llama(), generator="peft"))
    store.put("dora", adapter(llama(), use_dora=True))
    store.put("bias", adapter(llama(), bias="all"))
    store.put("head", adapter(llama(), modules_to_save=["lm_head"]))
    store.put("layer", adapter(llama(), target_modules=["q_proj", "lm_head"]))
    store.put("foreign", adapter(llama(seed=1)))
    for name, value in (("nan", math.nan), ("infinite", math.inf), ("huge", 1e4)):
        model = adapter(llama())
        with torch.no_grad():
            next(value for key, value in model.named_parameters() if "vera_lambda_b" in key)[0] = value
        store.put(name, model)
    adapter(base).save_pretrained(engine.folder / "files")
    store.put("baseless", engine.folder / "files")
    return {
        "lora": "its method is LORA",
        "seed": "projection_prng_key",
        "rank": "the engine's largest is 6",
        "shape": "sharing='shape'",
        "peft": "generator='peft'",
        "dora": "DoRA",
        "bias": "trains biases",
        "head": "modules of its own",
        "layer": "no layer that this engine adapts",
        "foreign": "other values",
        "nan": "finite numbers",
        "infinite": "finite numbers",
        "huge": "at most 1000",
        "baseless": "what base it was trained on",
    }


def test_what_cannot_be_served_is_refused_with_its_reason(engine: SimpleNamespace) -> None:
    """Pitfalls 2 and 4: all is checked before any worker hears of it."""
    expected = broken(engine)
    source = engine.announce()
    for name, said in expected.items():
        with pytest.raises((CheckpointError, UnsupportedError), match=said):
            source.find(name)
    assert not list(run.folder().glob("*.row.safetensors"))
    assert engine.announce(require_base=False).find("baseless") is not None


def test_other_frozen_matrices_are_noticed(engine: SimpleNamespace) -> None:
    """Pitfall 4: with the same seed and rank too, as if another version had drawn others."""
    adapter(llama()).save_pretrained(engine.folder / "files")
    path = engine.folder / "files" / "adapter_model.safetensors"
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        metadata = dict(opened.metadata())
    metadata["kilotune_projections_sha256"] = "0" * 64
    save_file(tensors, path, metadata)
    engine.store.put("other", engine.folder / "files")
    with pytest.raises(CheckpointError, match="other frozen matrices"):
        engine.announce(require_base=False).find("other")


@pytest.mark.parametrize("engine", KINDS, indirect=True)
def test_names_versions_and_aliases(engine: SimpleNamespace) -> None:
    for number in range(2):
        engine.store.put("ann", adapter(llama(), number), alias="live" if number == 0 else None)
    source = engine.announce()
    names = {asked: source.find(asked) for asked in ("ann", "ann@1", "ann@2", "ann@latest", "ann@live")}
    assert all(names.values())
    assert names["ann"] == names["ann@2"] == names["ann@latest"]
    assert names["ann@live"] == names["ann@1"] != names["ann"]
    assert names["ann"].name.startswith("ann@2.")  # type: ignore[union-attr]
    assert engine.announce(alias="live").find("ann") == names["ann@1"]
    for strange in ("bob", "ann@3", "ann@other", "", "@", "ann@", "../ann", "a/ann", "ann\n", "ann@1@2", "x" * 500):
        assert source.find(strange) is None or strange == "ann@", strange
    pinned = names["ann@1"].name  # type: ignore[union-attr]
    assert engine.announce().find(pinned) == names["ann@1"]  # by a server that was started anew
    assert engine.announce().find(pinned[:-1] + ("0" if pinned[-1] != "0" else "1")) is None


def test_a_pattern_keeps_names_in(engine: SimpleNamespace) -> None:
    """Pitfall 6."""
    for name in ("ann", "weird name"):
        engine.store.put(name, adapter(llama()))
    assert engine.announce().find("weird name") is None
    assert engine.announce(pattern=r"[a-z ]+").find("weird name") is not None
    assert engine.announce(pattern="bob").find("ann") is None


def test_namespaces(engine: SimpleNamespace) -> None:
    with open_store(engine.url, namespace="one") as one, open_store(engine.url, namespace="two") as two:
        one.put("ann", adapter(llama(), 1))
        two.put("ann", adapter(llama(), 2))
    many = engine.announce(namespace=None)
    first, second = many.find("one/ann"), many.find("two/ann@1")
    assert first is not None
    assert second is not None
    assert first.path != second.path
    assert first.name.startswith("one/ann@1.")
    assert many.find("ann") is None
    assert many.find("three/ann") is None
    single = engine.announce(namespace="two")
    assert single.find("ann") is not None
    assert single.find("ann").path == second.path  # type: ignore[union-attr]
    assert single.find("one/ann") is None


def test_the_number_of_adapters_is_bounded(engine: SimpleNamespace) -> None:
    """Pitfall 7: what we add is; a version that is here already is no new one."""
    for number in range(3):
        engine.store.put(f"u{number}", adapter(llama(), number))
    engine.store.put("u0", adapter(llama(), 0))
    source = engine.announce(max_adapters=2)
    assert source.find("u0") is not None
    assert source.find("u0@1") is not None  # the same content, the same row
    assert source.find("u1") is not None
    with pytest.raises(ResourceError, match="takes no more"):
        source.find("u2")
    assert source.find("u1") is not None


def test_a_store_that_goes_away_and_comes_back(engine: SimpleNamespace) -> None:
    for number in range(2):
        engine.store.put(f"u{number}", adapter(llama(), number))
    engine.store.close()
    source = engine.announce()
    here = source.find("u0")
    assert here is not None
    path = engine.folder / "adapters.db"
    data = path.read_bytes()
    source._stores.clear()
    path.write_bytes(b"no database" * 1000)
    assert source.find("u0") == here
    assert source.find(here.name) == here
    with pytest.raises(StoreError):
        source.find("u1")
    path.write_bytes(data)
    source._stores.clear()
    assert source.find("u1") is not None


def test_a_folder_that_is_cleared_away_is_made_again(engine: SimpleNamespace) -> None:
    """As by what cleans the system's temporary folder: the engine goes on."""
    for number in range(2):
        engine.store.put(f"u{number}", adapter(llama(), number))
    source = engine.announce()
    first = source.find("u0")
    shutil.rmtree(run.folder())
    assert source.find("u0") == first
    second = source.find("u1")
    assert second is not None
    read_row(run.folder(), second.path)


def test_nothing_is_served_before_all_workers_are_there(engine: SimpleNamespace) -> None:
    engine.store.put("ann", adapter(llama()))
    settings = Settings.of({"rank": RANK, "seed": SEED, "store": engine.url})
    sites = sites_of(llama())
    source = Source()
    assert source.find("ann") is None
    run.announce(0, 2, str(engine.base), torch.float32, settings, sites[:7])
    assert source.served() is None
    run.announce(1, 2, str(engine.base), torch.float32, settings, sites[7:])
    served = source.served()
    assert served is not None
    assert served.layout.sites == tuple(sorted(sites))
    run.announce(1, 2, str(engine.base), torch.bfloat16, settings, sites[7:])
    with pytest.raises(UnsupportedError, match="different settings"):
        Source().served()


def test_a_row_that_a_worker_lost_is_made_anew(engine: SimpleNamespace) -> None:
    engine.store.put("ann", adapter(llama()))
    source = engine.announce()
    found = source.find("ann")
    assert found is not None
    Path(found.path).write_bytes(b"damaged")
    run.lose(found.path)
    assert run.lost(found.path)
    assert source.renew("ann", found) == found
    assert not run.lost(found.path)
    read_row(run.folder(), found.path)
    run.lose("\0")  # never raises
    run.lose("x" * 5000)


# -- settings, the entry point, the launcher -------------------------------------------------------


def test_settings_say_all_that_is_wrong() -> None:
    bad = {"rnak": 3, "seed": -1, "targets": ["q_proj", "a.b"], "pattern": "(", "max_adapters": True, "max_abs": 0}
    with pytest.raises(ConfigError) as caught:
        Settings.of(bad)
    said = str(caught.value)
    for part in ("'rnak'. Did you mean 'rank'?", "rank: is missing", "seed:", "targets:", "pattern:", "max_adapters:"):
        assert part in said
    for value in ([], None, "x"):
        with pytest.raises(ConfigError, match="expected an object"):
            Settings.of(value)
    made = Settings.of({"rank": 4})
    assert Settings.of(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("version", ["0.33.0", "0.31.1", "1.0", "0.320.1", "", "dev"])
def test_an_unknown_version_is_refused_where_we_are_asked_for_and_left_alone_elsewhere(version: str) -> None:
    made = _factory(lambda config, *rest: ("stock", *rest), version)
    assert made(SimpleNamespace(additional_config={}), 1, 2) == ("stock", 1, 2)
    assert made(SimpleNamespace(additional_config=None), 1) == ("stock", 1)
    with pytest.raises(UnsupportedError, match="tested with 0.32 only"):
        made(SimpleNamespace(additional_config={"kilotune": {"rank": 4}}), 1)


def test_known_versions() -> None:
    assert [version_fault(f"{version}{rest}") for version in TESTED for rest in ("", ".0", ".1+cpu")] == [None] * 3


def test_the_launcher_checks_its_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from kilotune.vllm.__main__ import main

    monkeypatch.delenv("KILOTUNE_VLLM_STORE", raising=False)
    for words, said in (
        (["--store", "sqlite:///x.db"], "rank: is missing"),
        (["--rank", "4"], "--store: is missing"),
        (["--store", "s", "--rank", "4", "--additional-config={}"], "--additional-config"),
        (["--store", "s", "--rank", "4", "--api-server-count", "2"], "--api-server-count"),
        (["--store", "s", "--kilotune", "[1"], "expected a JSON object"),
    ):
        monkeypatch.delenv("KILOTUNE_VLLM_STORE", raising=False)
        assert main(words) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert main(["--store", "s", "--rank", "4"]) == 2
    assert "VLLM_PLUGINS" in capsys.readouterr().err
    monkeypatch.delenv("KILOTUNE_VLLM_STORE")


# -- the gate --------------------------------------------------------------------------------------


class Inner:
    """What stands behind the gate: it answers with what it got, in two parts."""

    def __init__(self) -> None:
        self.got: list[tuple[str, Any]] = []
        self.meanwhile: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        if scope["method"] == "POST":
            message = await receive()
            body = message["body"]
            lengths = [value for key, value in scope["headers"] if key == b"content-length"]
            assert lengths == [str(len(body)).encode()]
        self.got.append((scope["path"], json.loads(body) if body.startswith(b"{") else body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if self.meanwhile:
            self.meanwhile()
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})


def ask(gate: Gate, path: str, body: bytes = b"", method: str = "POST") -> tuple[int, bytes]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"Content-Length" if method != "POST" else b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "path": path, "method": method, "headers": headers}
    asyncio.run(gate(scope, receive, send))
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert len(starts) == 1
    assert sent[0] is starts[0]
    return starts[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def message_of(body: bytes) -> str:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def test_without_the_plugin_nothing_is_answered_but_health(engine: SimpleNamespace) -> None:
    inner = Inner()
    gate = Gate(inner, Source())
    for path, method in (("/v1/models", "GET"), ("/v1/completions", "POST"), ("/tokenize", "POST")):
        status, body = ask(gate, path, b"{}", method)
        assert status == 503
        assert "not active" in message_of(body)
    assert inner.got == []
    assert ask(gate, "/health", method="GET")[0] == 200


def test_the_gate_names_the_very_version(engine: SimpleNamespace) -> None:
    engine.store.put("ann", adapter(llama(), 1))
    source, inner = engine.announce(), Inner()
    gate = Gate(inner, source)
    assert ask(gate, "/v1/completions", b'{"model": "ann", "prompt": "x"}') == (200, b"one two")
    first = inner.got[-1][1]["model"]
    assert first.startswith("ann@1.")
    assert inner.got[-1][1]["prompt"] == "x"
    engine.store.put("ann", adapter(llama(), 2))
    ask(gate, "/v1/completions", b'{"model": "ann"}')
    assert inner.got[-1][1]["model"].startswith("ann@2.")
    for body in (b'{"model": "base"}', b"{}", b"no json", b"[1]", b'{"model": 3}', b""):
        assert ask(gate, "/v1/completions", body)[0] == 200
        assert inner.got[-1][1] == (json.loads(body) if body.startswith(b"{") else body)
    status, body = ask(gate, "/v1/load_lora_adapter", b'{"lora_name": "x", "lora_path": "/etc"}')
    assert status == 403
    assert "come from the store" in message_of(body)


def test_the_gate_gives_reasons(engine: SimpleNamespace) -> None:
    expected = broken(engine)
    inner = Inner()
    gate = Gate(inner, engine.announce(max_adapters=1))
    for name, said in expected.items():
        status, body = ask(gate, "/v1/completions", json.dumps({"model": name}).encode())
        assert status == 400
        assert said in message_of(body)
    engine.store.put("ann", adapter(llama(), 1))
    engine.store.put("bob", adapter(llama(), 2))
    assert ask(gate, "/v1/completions", b'{"model": "ann"}')[0] == 200
    assert ask(gate, "/v1/completions", b'{"model": "bob"}')[0] == 503
    assert len(inner.got) == 1


def test_an_adapter_that_was_lost_on_its_way_is_an_error_and_then_made_anew(engine: SimpleNamespace) -> None:
    engine.store.put("ann", adapter(llama(), 1))
    source, inner = engine.announce(), Inner()
    gate = Gate(inner, source)
    found = source.find("ann")
    assert isinstance(found, Found)
    inner.meanwhile = lambda: run.lose(found.path)  # as a worker does, before the first token
    status, body = ask(gate, "/v1/completions", b'{"model": "ann"}')
    assert status == 503
    assert "lost" in message_of(body)
    inner.meanwhile = None
    assert ask(gate, "/v1/completions", b'{"model": "ann"}') == (200, b"one two")
    assert not run.lost(found.path)


def test_what_we_count_is_bounded(engine: SimpleNamespace) -> None:
    """Pitfall 7: no name is ever a label."""
    prometheus = pytest.importorskip("prometheus_client")
    gate = Gate(Inner(), engine.announce())
    for number in range(50):
        ask(gate, "/v1/completions", json.dumps({"model": f"nobody{number}"}).encode())
    text = prometheus.generate_latest().decode()
    ours = [line for line in text.splitlines() if line.startswith("kilotune_vllm_requests_total{")]
    assert len(ours) == 5
    assert "nobody" not in text


def test_the_engines_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(run.RUN, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert run.inherit()
    assert not run.inherit()
    try:
        folder = run.folder()
        assert folder.stat().st_mode & 0o077 == 0
        folder.rmdir()
        target = tmp_path / "elsewhere"
        target.mkdir()
        folder.symlink_to(target)
        with pytest.raises(KilotuneError, match="expected a folder of this user"):
            run.folder()
        folder.unlink()
    finally:
        os.environ.pop(run.RUN)
