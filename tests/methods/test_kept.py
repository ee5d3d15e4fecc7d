"""A method whose trained keys are no fixed set: store, inspect, packing and banks ask the method what each key is.

The planted one is TinyLoRA with PEFT's keys (tests/support/tiny_method.py): ``tinylora_v.0 ... n`` are trained, each
shared by a group of layers, and each layer's factors are frozen.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kilotune import PeftModel, get_peft_model
from kilotune.adapter_files.reading import open_adapter
from kilotune.fleet import AdapterBank, open_store, wrap
from kilotune.fleet.scale import scale
from kilotune.methods import METHODS, Kept
from tests.support.cli_helpers import as_json
from tests.support.models import Nested, randomize
from tests.support.tiny_method import GROUP, Tiny, TinyConfig

LAYERS = 6  # of Nested
SHAPES = [(8, 6), (12, 8), (8, 12), (12, 8), (8, 12), (3, 8)]
CONFIG = TinyConfig(target_modules="all-linear", modules_to_save=None)
VECTORS = [f"base_model.tinylora_v.{i}" for i in range(LAYERS // GROUP)]
TRAINED = CONFIG.u * len(VECTORS)
FROZEN = sum(CONFIG.r * (out + inn) for out, inn in SHAPES)


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, Tiny.name, Tiny)


def model_with(seed: int = 1) -> PeftModel:
    model = get_peft_model(Nested(), CONFIG)
    randomize(model, seed=seed)
    return model.eval()


def test_the_file_says_which_numbers_are_trained(tmp_path: Path) -> None:
    model_with().save_pretrained(tmp_path)
    file = open_adapter(tmp_path)
    assert [key for key, said in file.said.items() if said.kept is Kept.TRAINED] == VECTORS
    assert sum(said.kept is Kept.FROZEN for said in file.said.values()) == 2 * LAYERS
    assert file.brought == []


def test_inspect_counts_them(tmp_path: Path) -> None:
    model_with().save_pretrained(tmp_path)
    done = as_json("inspect", tmp_path)
    assert (done["trained"], done["frozen"], done["stored_projections"]) == (TRAINED, FROZEN, 0)
    assert done["layers"] == LAYERS


@pytest.mark.parametrize("packing", ["float32", "bfloat16", "int8"])
def test_a_store_keeps_them_of_each_adapter(packing: str, tmp_path: Path) -> None:
    models = {name: model_with(seed) for seed, name in enumerate(("ann", "bob"), 1)}
    store = open_store(f"sqlite:///{tmp_path}/adapters.db", packing=packing)
    for name, model in models.items():
        store.put(name, model)
    for name, model in models.items():
        record = store.get(name)
        assert not record.frozen  # nothing that both have in common
        packed = {entry.key: entry.packed for entry in record.form.layout.entries}
        assert set(VECTORS) <= packed.keys()
        assert {packed[key] for key in VECTORS} == {"exact" if packing == "float32" else packing}
        assert record.form.layout.numbers == TRAINED + FROZEN
        again = dict(PeftModel.from_pretrained(Nested(), record.file()).adapter_parameters())
        for (
            key,
            value,
        ) in model.adapter_parameters():  # a bfloat16 number is off by 2^-8 of it, one of int8 by half a step
            allowed = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.51 / 127}[packing]
            value = value.detach()
            assert float((again[key] - value).abs().max()) <= allowed * float(value.abs().max())
    assert store.get("ann").form.sha256 == store.get("bob").form.sha256
    store.close()


def test_what_many_users_cost() -> None:
    assert scale(Nested(), CONFIG, 10).numbers == TRAINED + FROZEN


def test_a_bank_takes_them_under_other_keys_of_a_file(tmp_path: Path) -> None:
    bank = AdapterBank(wrap(Nested()).eval(), CONFIG, slots=2)
    assert bank.form.length == TRAINED + FROZEN
    model = get_peft_model(Nested(), CONFIG)
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    bank.put("ann", tmp_path)
    x = torch.randn(2, 6)
    with torch.no_grad():
        assert torch.allclose(bank.model(x, adapter_names=["ann", None])[0], model(x)[0], atol=1e-5)
        assert not torch.allclose(model(x), Nested()(x), atol=1e-3)
