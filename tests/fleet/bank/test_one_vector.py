"""A vector of the whole model as a part of an adapter's row: in banks, beside other forms, never another user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune import LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model
from kilotune.adapter_files.reading import open_adapter
from kilotune.errors import CheckpointError, ConfigError, UnsupportedError
from kilotune.fleet import AdapterBank, open_store, wrap
from kilotune.fleet.bank.adapter_bank import Resident
from kilotune.methods import Shared
from tests.support.models import Nested, randomize, tiny_llama

ALL = "all-linear"
UNI = get_config("unilora", r=2, theta_d_length=256, target_modules=ALL)


def made(config: Any, seed: int, base: Any = None) -> PeftModel:
    model = get_peft_model(Nested() if base is None else base, config)
    randomize(model, seed=seed)
    return model.eval()


def filled(config: Any, tmp_path: Path, count: int = 3) -> tuple[AdapterBank, list[PeftModel]]:
    """A bank of users' adapters out of their files, and each one alone."""
    singles = [made(config, seed) for seed in range(count)]
    bank = AdapterBank(wrap(Nested()).eval(), config, slots=count)
    for i, single in enumerate(singles):
        single.save_pretrained(tmp_path / f"u{i}")
        bank.put(f"u{i}", tmp_path / f"u{i}")
    return bank, singles


def check(bank: AdapterBank, singles: list[PeftModel], shape: tuple[int, ...] = (4, 5, 6)) -> None:
    x, names = torch.randn(shape), ["u2", "u0", None, "u1"]
    with torch.no_grad():
        routed, base = bank.model(x, adapter_names=names), Nested().eval()(x)
        for row, name in enumerate(names):
            own = base[row] if name is None else singles[int(name[1])](x)[row]
            assert torch.allclose(routed[row], own, atol=1e-5, rtol=1e-4), f"row {row} is not {name}'s"
            assert name is None or not torch.allclose(own, base[row], atol=1e-3)


def test_a_row_is_the_vector_and_the_layers_own(tmp_path: Path) -> None:
    bank, _ = filled(UNI, tmp_path)
    assert bank.form.length == 256
    assert bank.bytes_per_adapter == 1024
    (place,) = bank.form.all_places()
    assert (place.name, place.layer, place.shape) == ("unilora_theta_d", "", (256,))
    wanted = open_adapter(tmp_path / "u1").extra["unilora_theta_d"]
    assert torch.equal(bank.get("u1")["unilora_theta_d"], wanted)
    assert not [p for p in bank.model.parameters() if p.numel() == 256], "the form holds numbers of its own"
    with_bias = AdapterBank(wrap(Nested()).eval(), UNI.replace(bias="all"), slots=1)
    assert [place.name for place in with_bias.form.all_places()][:2] == ["unilora_theta_d", "stem.bias"]


def test_a_store_keeps_a_kilobyte_of_it(tmp_path: Path) -> None:
    single = made(UNI, 1)
    with open_store(f"sqlite:///{tmp_path}/a.db", base=Nested()) as store:
        sizes = {packing: store.put("ann", single, packing=packing).size for packing in ("float32", "bfloat16", "int8")}
        assert sizes == {"float32": 1024, "bfloat16": 512, "int8": 260}
        bank = AdapterBank(wrap(Nested()).eval(), UNI, load=lambda name: store.get(name, 1).file())
        x = torch.randn(2, 6)
        with torch.no_grad():
            assert torch.allclose(bank.model(x, adapter_names=["ann", "ann"]), single(x), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6)], ids=["rows", "tokens"])
def test_each_row_has_its_own_vector(shape: tuple[int, ...], tmp_path: Path) -> None:
    check(*filled(UNI, tmp_path), shape)


@pytest.mark.parametrize("config", [UNI, get_config("intrinsic", d=16, target_modules=ALL)], ids=["stacked", "apart"])
def test_anothers_vector_would_be_seen(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the vectors of a batch are those of the next user."""
    bank, singles = filled(config, tmp_path)
    check(bank, singles)

    def wrong(self: Resident, layer: object, which: int | None = None) -> Shared:
        values = self.values.roll(1, 0)
        return self.form.shared(values if which is None else values[which])

    monkeypatch.setattr(Resident, "shared", wrong)
    with pytest.raises(AssertionError, match="row 0 is not u2's"):
        check(bank, singles)


def test_forms_mix_in_one_batch(tmp_path: Path) -> None:
    configs = [UNI, VeraConfig(r=4, target_modules=ALL), LoraConfig(r=2, target_modules=ALL), UNI.replace(r=3)]
    model = wrap(Nested()).eval()
    singles = {}
    for number, config in enumerate(configs):
        bank = AdapterBank(model, config, slots=2)
        for i in range(2):
            name = f"{number}-{i}"
            singles[name] = made(config, 10 * number + i)
            singles[name].save_pretrained(tmp_path / name)
            bank.put(name, tmp_path / name)
    names = [*singles, *reversed(singles)]
    x = torch.randn(len(names), 3, 6)
    with torch.no_grad():
        routed = model(x, adapter_names=names)
        for row, name in enumerate(names):
            assert torch.allclose(routed[row], singles[name](x)[row], atol=1e-5, rtol=1e-4), name


def test_the_order_of_the_layers_is_the_banks_or_refused(tmp_path: Path) -> None:
    """A file says in which order the vector's numbers were dealt out, and a bank's configuration need not."""
    names = list(made(UNI, 0).installed("default").layers)
    made(UNI.replace(site_order=names), 1).save_pretrained(tmp_path / "same")
    made(UNI.replace(site_order=names[::-1]), 1).save_pretrained(tmp_path / "turned")
    bank = AdapterBank(wrap(Nested()).eval(), UNI, slots=2)
    bank.put("same", tmp_path / "same")
    with pytest.raises(ConfigError, match="site_order: the bank has "):
        bank.put("turned", tmp_path / "turned")
    turned = AdapterBank(wrap(Nested()).eval(), UNI.replace(site_order=names[::-1]), slots=2)
    turned.put("turned", tmp_path / "turned")
    with pytest.raises(ConfigError, match="site_order"):
        turned.put("same", tmp_path / "same")


def test_what_is_no_such_vector_is_refused(tmp_path: Path) -> None:
    bank = AdapterBank(wrap(Nested()).eval(), UNI, slots=2)
    for tensors, text in (
        ({}, r"missing: unilora_theta_d \(256,\)"),
        ({"unilora_theta_d": torch.zeros(255)}, r"shape of unilora_theta_d: expected \(256,\), got \(255,\)"),
        ({"unilora_theta_d": torch.full((256,), torch.nan)}, r"(?s)not finite.*unilora_theta_d"),
        ({"unilora_theta_d": torch.zeros(256), "stem.x": torch.zeros(1)}, r"unexpected: stem\.x"),
    ):
        with pytest.raises(CheckpointError, match=text):
            bank.put("ann", tensors)
    made(UNI.replace(save_indices=True), 1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="brings frozen tensors of its own along"):
        bank.put("ann", tmp_path)
    assert not bank.names()


def test_the_models_own_vectors_and_a_banks_do_not_meet(tmp_path: Path) -> None:
    """One adapter in the model, one in the bank, of one configuration."""
    model = made(UNI, 7)
    alone = made(UNI, 7)
    other = made(UNI, 8)
    other.save_pretrained(tmp_path)
    bank = AdapterBank(model, UNI, slots=2)
    bank.put("ann", tmp_path)
    x = torch.randn(3, 6)
    with torch.no_grad():
        routed = model(x, adapter_names=["ann", "default", None])
        assert torch.allclose(routed[0], other(x)[0], atol=1e-5)
        assert torch.allclose(routed[1], alone(x)[1], atol=1e-5)
        assert torch.equal(model(x), alone(x))


def test_a_language_model(tmp_path: Path) -> None:
    singles = [made(UNI, seed, tiny_llama()) for seed in range(3)]
    bank = AdapterBank(wrap(tiny_llama()).eval(), UNI, slots=3, dtype=torch.bfloat16)
    for i, single in enumerate(singles):
        single.save_pretrained(tmp_path / f"u{i}")
        bank.put(f"u{i}", tmp_path / f"u{i}")
    ids = torch.randint(2, 32, (4, 6))
    with torch.no_grad():
        routed = bank.model(input_ids=ids, adapter_names=["u1", "u0", None, "u2"]).logits
        for row, i in ((0, 1), (1, 0), (3, 2)):
            for _, parameter in singles[i].adapter_parameters():
                parameter.data = parameter.data.bfloat16().float()
            own = singles[i](input_ids=ids).logits[row]
            assert torch.allclose(routed[row], own, atol=1e-4)
