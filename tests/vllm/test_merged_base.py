"""One shared adapter merged into the base that vLLM loads, and the personal ones on top of it; without vLLM."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kilotune import BottleneckConfig, LoraConfig, PeftModel, get_peft_model
from kilotune.errors import AdapterError, CheckpointError, ConfigError, MergeError, UnsupportedError
from kilotune.fleet.store import open_store
from kilotune.vllm import __main__ as launcher
from kilotune.vllm import worker_status as run
from kilotune.vllm.adapter_source import Source
from kilotune.vllm.layout import Layout
from kilotune.vllm.merged_base import check_merged, merged_base, merged_of
from kilotune.vllm.row_files import read_row
from kilotune.vllm.settings import Settings
from tests.vllm.test_plugin import RANK, SEED, adapter, llama, sites_of

STYLE = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])


def style(number: int) -> PeftModel:
    model = get_peft_model(llama(), STYLE)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A base in a folder, and a store with two shared adapters, people on each, and one on nothing."""
    monkeypatch.setenv("KILOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(run.RUN, str(tmp_path / "run"))
    monkeypatch.setenv("KILOTUNE_VLLM_STORE", "")  # the launcher sets it, which is to be taken back
    base = tmp_path / "base"
    llama().save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    url = f"sqlite:///{tmp_path}/a.db"
    with open_store(url, base=llama()) as store:
        store.put("style", style(1))
        store.put("other", style(2))
        store.put("ann", adapter(llama(), 5), on="style")
        store.put("bob", adapter(llama(), 6), on="other")
        store.put("cid", adapter(llama(), 7))
        yield SimpleNamespace(base=base, store=store, url=url, folder=tmp_path)


def engine(there: SimpleNamespace, model: Path, **settings: Any) -> Source:
    """What the workers of an engine of this model say."""
    made = Settings.of({"rank": RANK, "seed": SEED, "store": there.url, **settings})
    run.announce(0, 1, str(model), torch.float32, made, sites_of(llama()))
    return Source()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def test_the_merged_base_and_a_row_are_the_stack(there: SimpleNamespace) -> None:
    folder = merged_base(str(there.base), there.store.find_shared("style"))
    merged = AutoModelForCausalLM.from_pretrained(folder)
    expected = style(1)
    assert torch.allclose(logits(merged), logits(expected), atol=1e-5)
    assert not torch.allclose(logits(merged), logits(llama()), atol=1e-3)
    assert (folder / "tokenizer.json").read_text() == "{}"
    found = engine(there, folder, on="style/1").find("ann")
    assert found is not None
    row, text = read_row(run.folder(), found.path)
    layout = Layout.from_json(text)
    names = dict(adapter(llama(), 5).named_parameters())
    site = layout.by_name["model.layers.1.mlp.down_proj"]
    b = names[next(key for key in names if "layers.1.mlp.down_proj" in key and "vera_lambda_b" in key)]
    assert torch.equal(row[layout.places[site.name] + RANK :][: site.out], b), "her own numbers, and no others"
    # The personal part on the merged weights is what both are on the base, worked out by PeftModel.
    own = adapter(copy.deepcopy(merged), 5).eval()
    expected.load_adapter(there.store.get("ann").file(), "ann")
    expected.set_adapter(["default", "ann"])
    assert torch.allclose(logits(own), logits(expected), atol=1e-5)


def test_it_is_made_once(there: SimpleNamespace) -> None:
    record = there.store.find_shared("style")
    folder = merged_base(str(there.base), record)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert merged_base(str(there.base), record) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert merged_base(str(there.base), there.store.find_shared("other")) != folder
    merged = merged_of(str(folder))
    assert merged is not None
    assert (merged.on.name, merged.on.version) == ("style", 1)
    assert merged_of(str(there.base)) is None


def test_who_stands_on_something_else_is_refused_with_the_reason(there: SimpleNamespace) -> None:
    folder = merged_base(str(there.base), there.store.find_shared("style"))
    source = engine(there, folder, on="style/1")
    assert source.find("ann") is not None
    with pytest.raises(UnsupportedError, match="stands on 'other'.*one shared adapter a process"):
        source.find("bob")
    with pytest.raises(UnsupportedError, match="trained on the base alone, and this engine's model has 'style'"):
        source.find("cid")
    plain = engine(there, there.base)
    assert plain.find("cid") is not None
    with pytest.raises(UnsupportedError, match="stands on 'style', which is not merged.*--on style"):
        plain.find("ann")


def test_what_is_said_and_what_is_merged_must_agree(there: SimpleNamespace) -> None:
    folder = merged_base(str(there.base), there.store.find_shared("style"))
    assert check_merged("style/1", str(folder)) is not None
    assert check_merged(None, str(there.base)) is None
    for on, model, told in (
        (None, folder, "is not set, and the model .* has 'style/1' merged"),
        ("other/1", folder, "has style/1 merged"),
        ("style/1", there.base, "has nothing merged"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_merged(on, str(model))
    with pytest.raises(ConfigError, match="one shared adapter a process"):
        Settings.of({"rank": 4, "on": ["style/1", "other/1"]})
    with pytest.raises(ConfigError, match="on: expected the shared adapter as NAME/3"):
        Settings.of({"rank": 4, "on": "style"})


def test_what_cannot_be_merged_leaves_nothing(there: SimpleNamespace, tmp_path: Path) -> None:
    neck = get_peft_model(llama(), BottleneckConfig(target_modules=["down_proj"]))
    there.store.put("neck", neck)
    llama(seed=9).save_pretrained(tmp_path / "foreign")
    for model, name, kind, told in (
        (there.base, "neck", MergeError, "is not linear and cannot be merged"),
        (tmp_path / "foreign", "style", CheckpointError, "is of another base model"),
        (there.base, "ann", ConfigError, "two levels"),
        (there.base, "nobody", AdapterError, "there is no such adapter"),
        (tmp_path / "nowhere", "style", CheckpointError, "neither a folder"),
    ):
        with pytest.raises(kind, match=told):
            merged_base(str(model), there.store.find_shared(name))
    left = tmp_path / "cache" / "merged"
    assert not left.exists() or not [path for path in left.iterdir() if path.is_dir()]


def test_the_launcher_merges_and_keeps_the_bases_name(there: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_check", lambda rest: None)  # vLLM is not here
    for words in (["--model", str(there.base)], [f"--model={there.base}"]):
        made = launcher.server_words([*words, "--store", there.url, "--rank", "6", "--on", "style"])
        assert str(there.base) == made[made.index("--served-model-name") + 1]
        folder = made[made.index("--model") + 1] if "--model" in made else made[0].removeprefix("--model=")
        assert merged_of(folder) is not None
        assert '"on": "style/1"' in made[made.index("--additional-config") + 1]
    for words, told in (
        (["--on", "style", "--on", "other"], "one shared adapter a process"),
        (["--on", "style", "--kilotune", '{"on": "other/1"}'], "stands in --kilotune, too"),
        (["--on", "style"], "name that with --model"),
        (["--model", str(there.base), "--on", "stlye"], "Did you mean 'style'"),
    ):
        with pytest.raises((ConfigError, AdapterError), match=told):
            launcher.server_words([*words, "--store", there.url, "--rank", "6"])
