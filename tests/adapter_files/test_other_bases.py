"""An adapter loaded into a base of equal shapes and other weights: told by a warning, refused by strict_base."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kilotune import CheckpointError, LoraConfig, OtherBaseWarning, PeftModel, VeraConfig, get_peft_model
from kilotune.adapter_files.reading import open_adapter
from kilotune.convert import hollow, rewrite, to_lora
from kilotune.fleet import AdapterBank, FleetSettings, StoreSink, User, fit, open_store, wrap
from tests.support.fleet_support import points, stacked
from tests.support.models import Nested, Snapshot, randomize, tiny_llama

WEIGHTS = "adapter_model.safetensors"
X = torch.linspace(-1, 1, 24).view(4, 6)
CONFIG = LoraConfig(r=2, target_modules=["up", "stem"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of Nested()."""
    return written(Nested(), tmp_path / "adapter")


def written(base: nn.Module, folder: Path, config: Any = CONFIG) -> Path:
    model = get_peft_model(base, config)
    randomize(model)
    model.save_pretrained(folder)
    return folder


def header(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return dict(file.metadata())


def test_the_same_weights_give_no_warning(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        PeftModel.from_pretrained(Nested().to(dtype), folder, strict_base=True)
        written(Nested().to(dtype), folder.parent / str(dtype))
        PeftModel.from_pretrained(Nested(), folder.parent / str(dtype), strict_base=True)


def named(seed: int, name: str) -> Any:
    model = tiny_llama(seed=seed)
    model.config._name_or_path = name
    return model


def test_other_weights_are_a_warning_that_names_both(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    written(named(0, "maker/right"), tmp_path, config)
    told = (
        r"trained on 'maker/right' \(weights .{8} \.\.\.\), and this base, 'maker/wrong', has other weights \(.{8} \."
    )
    with pytest.warns(OtherBaseWarning, match=told):
        model = PeftModel.from_pretrained(named(1, "maker/wrong"), tmp_path)
    assert model.active_adapters == ["default"]
    with pytest.warns(OtherBaseWarning, match=told):
        model.load_adapter(tmp_path, "again")
    PeftModel.from_pretrained(named(0, "maker/copy"), tmp_path)  # a name is nothing


def test_a_base_without_a_name(folder: Path) -> None:
    with pytest.warns(OtherBaseWarning, match=r"on a base without a name \(.*and this base, 'Nested', has other"):
        PeftModel.from_pretrained(Nested(seed=1), folder)


def test_the_warning_points_at_the_callers_line(folder: Path) -> None:
    model = get_peft_model(Nested(seed=1), CONFIG)
    with pytest.warns(OtherBaseWarning) as caught:
        model.load_adapter(folder, "other")
    assert caught[0].filename == __file__


def test_strict_base_refuses_them_and_leaves_the_model(folder: Path) -> None:
    model = get_peft_model(Nested(seed=1), CONFIG)
    before = Snapshot.of(model)
    with pytest.raises(CheckpointError, match="has other weights"):
        model.load_adapter(folder, "other", strict_base=True)
    assert Snapshot.of(model) == before
    base = Nested(seed=1)
    plain = Snapshot.of(base)
    with pytest.raises(CheckpointError, match="has other weights"):
        PeftModel.from_pretrained(base, folder, strict_base=True)
    assert Snapshot.of(base) == plain


def test_a_file_without_a_mark_loads_as_it_did(folder: Path) -> None:
    """One of PEFT's, an older one of ours, one whose header another tool wrote, one of a later version's."""
    tensors, whole = load_file(folder / WEIGHTS), header(folder)
    old = {key: value for key, value in whole.items() if key != "kilotune_base"}
    for metadata in (None, {"format": "pt"}, old, {**whole, "kilotune_base": "9later"}, {**whole, "kilotune_base": ""}):
        save_file(tensors, folder / WEIGHTS, metadata)
        PeftModel.from_pretrained(Nested(seed=1), folder, strict_base=True)


def test_it_takes_less_than_a_hundred_bytes(folder: Path) -> None:
    """And PEFT has nothing to say of it: tests/peft_parity/files.py, where every warning is an error."""
    with_it = (folder / WEIGHTS).read_bytes()
    entry = re.search(rb'"kilotune_base":"[^"]*",?', with_it)
    assert entry is not None
    assert len(entry.group()) < 100
    assert "kilotune_base" not in json.loads((folder / "adapter_config.json").read_text())


def test_a_head_that_the_adapter_brings_does_not_matter(tmp_path: Path) -> None:
    written(Nested(), tmp_path, CONFIG.replace(modules_to_save=["head"]))
    base = Nested()
    nn.init.normal_(base.head.weight)
    PeftModel.from_pretrained(base, tmp_path, strict_base=True)


def test_while_merged_it_is_still_the_base(folder: Path) -> None:
    model = PeftModel.from_pretrained(Nested(), folder)
    model.merge_adapter()
    model.load_adapter(folder, "again", strict_base=True)
    model.save_pretrained(folder.parent / "saved", selected_adapters=["again"])
    assert header(folder.parent / "saved" / "again")["kilotune_base"] == header(folder)["kilotune_base"]
    merged = model.merge_and_unload()
    with pytest.warns(OtherBaseWarning):
        PeftModel.from_pretrained(merged, folder)


def test_where_the_base_is_not_here_the_files_mark_stays(folder: Path) -> None:
    with torch.device("meta"):
        far = Nested()
    model = PeftModel.from_pretrained(far, folder, strict_base=True)
    assert model.installed("default").base == header(folder)["kilotune_base"]
    model = PeftModel.from_pretrained(hollow(far_again()), folder, strict_base=True)
    model.save_pretrained(folder.parent / "copy")
    assert header(folder.parent / "copy") == header(folder)


def far_again() -> nn.Module:
    with torch.device("meta"):
        return Nested()


def test_conversions_keep_it(tmp_path: Path) -> None:
    written(Nested(), tmp_path / "vera", VeraConfig(r=3, target_modules=["up", "stem"]))
    mark = header(tmp_path / "vera")["kilotune_base"]
    model = PeftModel.from_pretrained(hollow(far_again()), tmp_path / "vera")
    to_lora(model).save(tmp_path / "lora")
    rewrite(open_adapter(tmp_path / "lora")).save(tmp_path / "again")
    assert header(tmp_path / "lora")["kilotune_base"] == mark == header(tmp_path / "again")["kilotune_base"]


# -- many adapters -------------------------------------------------------------------------------------


def test_a_store_keeps_it(folder: Path) -> None:
    store = open_store(f"sqlite:///{folder.parent}/adapters.db")
    store.put("folder", folder)
    store.put("model", PeftModel.from_pretrained(Nested(), folder))
    for name in ("folder", "model"):
        record = store.get(name)
        PeftModel.from_pretrained(Nested(), record.file(), strict_base=True)
        record.save(folder.parent / name)
        for source in (record.file(), folder.parent / name):
            with pytest.warns(OtherBaseWarning):
                PeftModel.from_pretrained(Nested(seed=1), source)
    store.close()


def test_a_store_with_a_base_refuses_it(folder: Path) -> None:
    """One from a folder was taken to be of the store's base."""
    url = f"sqlite:///{folder.parent}/adapters.db"
    with open_store(url, base=Nested()) as store:
        store.put("right", folder)
    with open_store(url, base=Nested(seed=1)) as store:
        with pytest.raises(CheckpointError, match=r"'wrong': the adapter is of another base model: the weights"):
            store.put("wrong", folder)
        written(Nested(), folder.parent / "headed", CONFIG.replace(modules_to_save=["head"]))
        store.put("cannot be told", folder.parent / "headed")  # its head was left out of the mark


def test_joint_training_says_it(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/adapters.db")
    users, settings = [User("ann", points(4, 0), None, seed=1)], FleetSettings(max_steps=1, batch_size=2)
    fit(Nested().double(), CONFIG, users, settings, collate=stacked, loss="classification", sink=StoreSink(store))
    PeftModel.from_pretrained(Nested(), store.get("ann").file(), strict_base=True)
    with pytest.raises(CheckpointError, match="has other weights"):
        PeftModel.from_pretrained(Nested(seed=1), store.get("ann").file(), strict_base=True)
    store.close()


def test_a_bank_tells(folder: Path) -> None:
    AdapterBank(wrap(Nested()).eval(), CONFIG, slots=2).put("ann", folder)
    with pytest.warns(OtherBaseWarning, match="this base, 'Nested', has other weights"):
        AdapterBank(wrap(Nested(seed=1)).eval(), CONFIG, slots=2).put("ann", folder)
