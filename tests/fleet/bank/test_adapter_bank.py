"""AdapterBank: adapters as rows of one arena, named in a route."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kilotune import AdapterConfig, LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model
from kilotune.adapter_files.reading import open_adapter
from kilotune.errors import AdapterError, CheckpointError, ConfigError, ResourceError, UnsupportedError
from kilotune.fleet import AdapterBank, wrap
from tests.support.models import Nested, base_bits, randomize, tiny_gpt2, tiny_llama

ALL = "all-linear"
VERA = VeraConfig(r=6, target_modules=ALL)
FORMS: dict[str, AdapterConfig] = {
    "vera": VERA,
    "vera-bias": VeraConfig(r=6, target_modules=ALL, bias="all"),
    "lora": LoraConfig(r=3, target_modules=ALL),
    "dora": LoraConfig(r=3, target_modules=ALL, use_dora=True),
    "ia3": get_config("ia3", target_modules=["up", "down"], feedforward_modules=["down"]),
    "bitfit": get_config("bitfit", target_modules=["stem", "up", "head"]),
    "bottleneck": get_config("bottleneck", target_modules=["mix.up", "mix.down"]),
    "unilora": get_config("unilora", r=3, theta_d_length=32, target_modules=ALL),
    "unilora-bias": get_config("unilora", r=3, theta_d_length=32, target_modules=ALL, bias="all"),
    "unilora-dora": get_config("unilora", r=3, theta_d_length=32, target_modules=ALL, use_dora=True),
    "intrinsic": get_config("intrinsic", d=32, target_modules=ALL),
    "intrinsic-said": get_config("intrinsic", d=32, target_modules=ALL, structure="said"),
}


def made(config: AdapterConfig, seed: int, base: Any = None) -> PeftModel:
    """A model with one adapter, random."""
    model = get_peft_model(Nested() if base is None else base, config)
    randomize(model, seed=seed)
    return model.eval()


def tensors_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.installed("default").parameters()}


def vera_row(bank: AdapterBank, value: float) -> dict[str, Tensor]:
    """All numbers of an adapter are ``value``."""
    return {place.name: torch.full(place.shape, value) for place in bank.form.all_places()}


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_rows_of_a_bank_are_what_the_adapters_are_alone(config: AdapterConfig, tmp_path: Path) -> None:
    x = torch.randn(5, 4, 6)
    singles = [made(config, seed) for seed in range(3)]
    bank = AdapterBank(wrap(Nested()).eval(), config, slots=4)
    singles[0].save_pretrained(tmp_path)
    bank.put("u0", tmp_path)
    bank.put("u1", tensors_of(singles[1]))
    singles[2].save_pretrained(tmp_path / "two")
    bank.put("u2", open_adapter(tmp_path / "two"))
    names = ["u2", None, "u0", "u1", "u2"]
    with torch.no_grad():
        routed = bank.model(x, adapter_names=names)
        base = Nested().eval()(x)
        for row, name in enumerate(names):
            own = base[row] if name is None else singles[int(name[1])](x)[row]
            assert (routed[row] - own).abs().max() <= 1e-5 * own.abs().max(), name  # the products' order is the CPU's
            assert name is None or not torch.allclose(own, base[row], atol=1e-3)


OTHERS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "its matrices in the file": ({"save_projection": True}, UnsupportedError, r"brings frozen .*vera_A.*vera_B"),
    "PEFT's matrices in the file": (
        {"generator": "peft", "save_projection": True},
        UnsupportedError,
        r"brings frozen tensors of its own along",
    ),
    "PEFT's matrices": ({"generator": "peft"}, ConfigError, "generator: the bank has 'portable', the adapter 'peft'"),
    "matrices by shape": ({"sharing": "shape"}, ConfigError, "sharing: the bank has 'nested', the adapter 'shape'"),
    "lengths": ({"use_dora": True}, ConfigError, "use_dora: the bank has False, the adapter True"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_adapter_with_other_frozen_numbers_is_not_of_the_form(other: str, tmp_path: Path) -> None:
    """Those that bring their matrices along were taken, and run with the bank's."""
    options, error, text = OTHERS[other]
    made(VERA.replace(**options), 1).save_pretrained(tmp_path)
    bank = AdapterBank(wrap(Nested()).eval(), VERA, slots=2)
    with pytest.raises(error, match=f"(?s){text}"):
        bank.put("ann", tmp_path)
    assert not bank.names()


def test_a_bank_of_layers_that_store_their_weights_the_other_way_round(tmp_path: Path) -> None:
    """A file says fan_in_fan_out, and a configuration of the user's need not."""
    config = VeraConfig(r=4, target_modules=["c_attn"])
    made(config, 1, tiny_gpt2()).save_pretrained(tmp_path)
    bank = AdapterBank(wrap(tiny_gpt2()).eval(), config, slots=2)
    bank.put("ann", tmp_path)
    assert bank.names() == ["ann"]


def test_two_banks_and_the_models_own_in_one_batch() -> None:
    model = made(VeraConfig(r=4, target_modules=["head"]), 5)
    small, large = AdapterBank(model, VERA.replace(r=3), slots=2), AdapterBank(model, VERA, slots=2)
    x = torch.randn(4, 6)
    one, two = made(VERA.replace(r=3), 1), made(VERA, 2)
    small.put("one", tensors_of(one))
    large.put("two", tensors_of(two))
    with torch.no_grad():
        own = model(x)
        routed = model(x, adapter_names=["two", "default", "one", None])
        for row, expected in enumerate([two(x), own, one(x), Nested().eval()(x)]):
            assert torch.allclose(routed[row], expected[row], atol=1e-5), row


def test_generation_from_a_bank() -> None:
    ids = torch.randint(2, 32, (3, 5))
    more: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    bank = AdapterBank(wrap(tiny_llama()).eval(), VERA, slots=2)
    singles = {}
    for name, seed in (("a", 1), ("b", 2)):
        single = get_peft_model(tiny_llama(), VERA)
        randomize(single, seed=seed, scale=2.0)
        bank.put(name, tensors_of(single))
        singles[name] = single.eval().generate(input_ids=ids, **more)
    routed = bank.model.generate(input_ids=ids, adapter_names=["b", "a", "b"], **more)
    for row, name in enumerate(["b", "a", "b"]):
        assert torch.equal(routed[row], singles[name][row])
    assert not torch.equal(singles["a"], singles["b"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_the_formulas(dtype: torch.dtype) -> None:
    bank = AdapterBank(wrap(Nested()), VERA, slots=7, dtype=dtype)
    numbers = sum(6 + out for out in (8, 12, 8, 12, 8, 3))  # r + out for each linear layer
    assert bank.bytes_per_adapter == numbers * dtype.itemsize
    assert bank.arena.numel() * bank.arena.element_size() == 7 * bank.bytes_per_adapter


def test_bfloat16_slots_round_each_number_once() -> None:
    bank = AdapterBank(wrap(Nested()).eval(), VERA, slots=2, dtype=torch.bfloat16)
    single = made(VERA, 3)
    bank.put("u", tensors_of(single))
    for name, value in bank.get("u").items():
        assert torch.equal(value, tensors_of(single)[name].bfloat16().float()), name
    x = torch.randn(2, 6)
    with torch.no_grad():
        error = (bank.model(x, adapter_names=["u", "u"]) - single(x)).norm() / single(x).norm()
    assert 0 < error < 2e-2


# -- coming and going ----------------------------------------------------------------------------------


def test_adding_moves_nothing_and_a_full_bank_says_so() -> None:
    bank = AdapterBank(wrap(Nested()), VERA, slots=2)
    where = bank.arena.data_ptr()
    bank.put("a", vera_row(bank, 1.0))
    bank.put("b", vera_row(bank, 2.0))
    bank.put("b", vera_row(bank, 3.0))
    assert bank.arena.data_ptr() == where
    with pytest.raises(AdapterError, match=r"no room for adapter 'c'.*2 slots.*evict"):
        bank.put("c", vera_row(bank, 4.0))
    assert bank.get("a")["head.vera_lambda_b"].eq(1.0).all()
    assert bank.get("b")["head.vera_lambda_b"].eq(3.0).all()
    bank.evict("a")
    bank.put("c", vera_row(bank, 4.0))
    assert sorted(bank.names()) == ["b", "c"]
    with pytest.raises(AdapterError, match="'a'"):
        bank.evict("a")


def test_what_is_used_longest_ago_goes_to_the_host_and_comes_back() -> None:
    bank = AdapterBank(wrap(Nested()).eval(), VERA, slots=2, host_bytes=2 * 4 * 87)
    assert bank.form.length == 87
    for i, name in enumerate("abcd"):
        bank.put(name, vera_row(bank, float(i)))
    assert bank.resident() == ["c", "d"]
    with bank.model.route(["a"]):
        assert bank.resident() == ["d", "a"]
    with pytest.raises(AdapterError, match="no room"):
        bank.put("e", vera_row(bank, 5.0))
    assert [bank.get(name)["stem.vera_lambda_d"][0].item() for name in "abcd"] == [0.0, 1.0, 2.0, 3.0]


def test_what_is_nowhere_is_loaded_and_dropped_again() -> None:
    loaded: list[str] = []

    def load(name: str) -> dict[str, Tensor]:
        loaded.append(name)
        if name == "none":
            raise AdapterError("the store has no 'none'")
        return vera_row(bank, float(len(name)))

    bank = AdapterBank(wrap(Nested()).eval(), VERA, slots=2, load=load)
    x = torch.randn(2, 6)
    for names in (["x", "xx"], ["xx", "xxx"], ["x", "xx"]):
        bank.model(x, adapter_names=names)
    assert loaded == ["x", "xx", "xxx", "x"]
    bank.put("mine", vera_row(bank, 9.0))  # nothing could load it again, so it stays
    for names in (["x"], ["xx"], ["xxx"]):
        bank.model(x[:1], adapter_names=names)
    assert "mine" in bank.resident()
    with pytest.raises(AdapterError, match="no 'none'"):
        bank.model(x[:1], adapter_names=["none"])
    with pytest.raises(AdapterError, match="3 adapters.*2 slots"):
        bank.model(torch.randn(3, 6), adapter_names=["x", "xx", "xxx"])


def test_random_comings_and_goings_leave_every_slot_in_use_or_free() -> None:
    come_and_go(20_000, seed=0)


@pytest.mark.full
def test_a_million_of_them() -> None:
    come_and_go(1_000_000, seed=1)


def come_and_go(steps: int, seed: int) -> None:
    bank = AdapterBank(wrap(Nested()), VERA, slots=50)
    row = torch.zeros(bank.form.length)
    generator = random.Random(seed)
    there: dict[str, float] = {}
    for step in range(steps):
        _come_or_go(bank, row, generator, there, step)
    _is_whole(bank, there)


def _come_or_go(bank: AdapterBank, row: Tensor, generator: random.Random, there: dict[str, float], step: int) -> None:
    name = f"u{generator.randrange(80)}"
    if name in there and generator.random() < 0.5:
        bank.evict(name)
        del there[name]
    elif name in there or len(there) < 50:
        row.fill_(step)
        bank._place(name, row)
        there[name] = float(step)


def _is_whole(bank: AdapterBank, there: dict[str, float]) -> None:
    assert sorted(bank.names()) == sorted(there)
    assert len(bank._free) + len(bank._slot_of) == 50
    assert not bank._pins
    assert not bank._left
    assert len(set(bank._free) | set(bank._slot_of.values())) == 50
    for name, value in there.items():
        assert bank.arena[bank._slot_of[name]].eq(value).all()


# -- many threads --------------------------------------------------------------------------------------


USERS = 12


def _write(bank: AdapterBank, stop: threading.Event, seed: int) -> None:
    generator = random.Random(seed)
    while not stop.is_set():
        user = generator.randrange(USERS)
        with contextlib.suppress(AdapterError):  # full, or not there
            if generator.random() < 0.2:
                bank.evict(f"u{user}")
            else:
                bank.put(f"u{user}", vera_row(bank, user + 100.0 * generator.randrange(50)))


def _look(bank: AdapterBank, stop: threading.Event, seed: int, faults: list[str]) -> None:
    generator = random.Random(seed)
    while not stop.is_set():
        names = [f"u{generator.randrange(USERS)}" for _ in range(3)]
        with contextlib.suppress(AdapterError), bank.model.route(names):
            for cohort in bank.model._state.now().route.cohorts:  # type: ignore[union-attr]
                for name, row in zip(cohort.names, cohort.values, strict=True):  # type: ignore[attr-defined]
                    low, high = row.min().item(), row.max().item()
                    if low != high or low % 100 != int(name[1:]):
                        faults.append(f"{name}: {low} ... {high}")


def stress(bank: AdapterBank, seconds: float) -> list[str]:
    """Threads put, replace, evict and read; an adapter's numbers are all equal, and say whose they are."""
    stop, faults = threading.Event(), list[str]()
    threads = [threading.Thread(target=_write, args=(bank, stop, i)) for i in range(3)]
    threads += [threading.Thread(target=_look, args=(bank, stop, i, faults)) for i in range(10, 13)]
    for thread in threads:
        thread.start()
    threading.Event().wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return faults


@pytest.mark.heavy
def test_no_route_sees_half_an_adapter_or_anothers() -> None:
    bank = AdapterBank(wrap(Nested()).eval(), VERA, slots=8, host_bytes=4 * 87 * 2)
    assert stress(bank, 3.0) == []
    assert not bank._pins
    assert len(bank._free) + len(bank._slot_of) == 8


@pytest.mark.heavy
def test_the_stress_sees_a_bank_that_writes_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a row is written piece by piece where it is being read."""

    def careless(self: AdapterBank, name: str, row: Tensor) -> int:
        slot = self._slot_of.get(name)
        if slot is None:
            slot = self._take_slot(name)
            self._slot_of[name] = slot
        for part in range(0, row.shape[0], 16):
            self.arena[slot, part : part + 16] = row[part : part + 16]
        return slot

    bank = AdapterBank(wrap(Nested()).eval(), VERA, slots=12)
    monkeypatch.setattr(AdapterBank, "_place", careless)
    monkeypatch.setattr(bank, "_lock", _NoLock())
    assert stress(bank, 3.0) != []


class _NoLock:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: object) -> None:
        pass


# -- what is refused -----------------------------------------------------------------------------------


def test_what_cannot_be_in_a_bank(tmp_path: Path) -> None:
    before = base_bits(wrap(Nested()))
    model = wrap(Nested())
    with pytest.raises(UnsupportedError, match="modules_to_save"):
        AdapterBank(model, VeraConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
    for options in ({"slots": 0}, {"slots": True}, {"host_bytes": -1}, {"dtype": torch.int8}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            AdapterBank(model, VERA, **options)  # type: ignore[arg-type]
    assert base_bits(model) == before
    assert not model.adapted_layers()


def test_adapters_of_another_form_are_refused_and_change_nothing(tmp_path: Path) -> None:
    bank = AdapterBank(wrap(Nested()), VERA, slots=2)
    for config, message in [
        (VERA.replace(r=5), "r: the bank has 6, the adapter 5"),
        (VERA.replace(projection_prng_key=3), "projection_prng_key"),
        (VERA.replace(target_modules=["head"]), "target_modules"),
        (LoraConfig(r=3, target_modules=ALL), "method"),
    ]:
        made(config, 1).save_pretrained(tmp_path / message[:4])
        with pytest.raises(ConfigError, match=message):
            bank.put("u", tmp_path / message[:4])
    good = vera_row(bank, 1.0)
    for broken, message in [
        ({**good, "head.vera_lambda_b": torch.full((3,), float("nan"))}, r"(?s)not finite.*head\.vera_lambda_b"),
        ({**good, "head.vera_lambda_b": torch.ones(4)}, r"expected \(3,\), got \(4,\)"),
        ({**good, "tail": torch.ones(4)}, "unexpected: tail"),
        ({k: v for k, v in good.items() if not k.startswith("stem")}, r"missing: stem\.vera_lambda_b"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            bank.put("u", broken)
    assert len(bank) == 0
    assert len(bank._free) == 2


def test_names_are_checked() -> None:
    model = made(VERA, 1)
    bank = AdapterBank(model, VERA, slots=2)
    for name in ("", "a/b", "default", "__base__"):
        with pytest.raises(AdapterError, match="name"):
            bank.put(name, vera_row(bank, 1.0))
    bank.put("ann", vera_row(bank, 1.0))
    with pytest.raises(AdapterError, match=r"'anm'.*'ann'"):
        model(torch.randn(1, 6), adapter_names=["anm"])


def test_what_is_no_tensor_and_more_than_there_is_room_for() -> None:
    bank = AdapterBank(wrap(Nested()), VERA, slots=2)
    good = vera_row(bank, 1.0)
    for wrong, message in [
        (good["head.vera_lambda_b"].tolist(), "expected a tensor of real numbers, got builtins.list"),
        (good["head.vera_lambda_b"] * 1j, "got torch.complex64"),
        (good["head.vera_lambda_b"].to("meta"), "one without data"),
        (good["head.vera_lambda_b"].double() * 1e300, "not finite"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            bank.put("u", {**good, "head.vera_lambda_b": wrong})  # type: ignore[dict-item]
    model = wrap(Nested())
    with pytest.raises(ResourceError, match=r"slots: 1000000000000 adapters of torch.float32 take 348 TB"):
        AdapterBank(model, VERA, slots=10**12)
    assert not model.adapted_layers()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_bank_takes_its_memory_as_rows_are_put(dtype: torch.dtype) -> None:
    """A model that is served waits while a bank is made, so gigabytes of zeros are not written then."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux tells what a process has in memory")
    before = resident()
    bank = AdapterBank(wrap(Nested()).eval(), VERA, slots=2**20, dtype=dtype)
    size = bank.arena.numel() * bank.arena.element_size()
    assert size > 180e6
    assert resident() - before < 0.5 * size, "and what is there is a list of the free slots"
    assert bank.arena.dtype == dtype
    assert not bank.arena[:: 2**16].any()
    bank.put("a", vera_row(bank, 0.5))
    assert float(bank.get("a")["head.vera_lambda_b"].abs().sum()) > 0


def test_a_bank_that_was_made_without_gradients_is_one_like_others() -> None:
    model = wrap(Nested()).eval()
    with torch.inference_mode():
        bank = AdapterBank(model, VERA, slots=2)
        bank.put("a", vera_row(bank, 0.3))
    bank.put("b", vera_row(bank, 0.1))
    x = torch.randn(2, 6, requires_grad=True)
    bank.model(x, adapter_names=["a", "b"]).sum().backward()
    assert x.grad is not None


def test_closing_gives_the_layers_back() -> None:
    model = wrap(Nested())
    bank = AdapterBank(model, VERA, slots=2)
    assert model.adapted_layers()
    bank.close()
    assert not model.adapted_layers()
    with pytest.raises(AdapterError, match="no such"), model.route(["u"]):
        pass
    with pytest.raises(AdapterError, match="closed"):
        bank.put("u", {})
    bank.close()
