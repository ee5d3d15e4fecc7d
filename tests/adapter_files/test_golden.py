"""Golden adapter folders that PEFT wrote (tests/golden/make_golden.py) load and give PEFT's outputs, without PEFT.

The manifest names the versions that wrote them. Where PEFT is installed, it must still write the same keys and shapes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import kilotune
from tests.golden.net import base, inputs
from tests.support.paths import ROOT

HERE = ROOT / "tests" / "golden"
MANIFEST: dict[str, Any] = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
CASES: dict[str, Any] = MANIFEST["cases"]
ADAPTERS = [(case, adapter) for case, entry in CASES.items() for adapter in entry["adapters"]]
# PEFT multiplies in float32 in a bfloat16 model and we in bfloat16: 8 roundings of 2^-8.
ALLOWED = {"float32": 1e-5, "bfloat16": 8 * 2.0**-8}
each_adapter = pytest.mark.parametrize("case, adapter", ADAPTERS, ids=["-".join(pair) for pair in ADAPTERS])


@pytest.fixture(autouse=True)
def _transformers_for_conv1d(request: pytest.FixtureRequest) -> None:
    """Conv1D is a class of transformers; the other files are tested without it."""
    values = getattr(request.node, "callspec", None)
    if values is not None and CASES.get(values.params.get("case"), {}).get("base") == "conv1d":
        pytest.importorskip("transformers", reason="the base model holds transformers' Conv1D")


def entry_of(case: str, adapter: str) -> dict[str, Any]:
    return CASES[case]["adapters"][adapter]


def plain(case: str) -> nn.Module:
    entry = CASES[case]
    return base(entry["base"], getattr(torch, entry["dtype"]))


def output_of(model: nn.Module, case: str) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs().to(getattr(torch, CASES[case]["dtype"]))).double().flatten()


def check_golden(model: nn.Module, case: str, adapter: str) -> None:
    """The model gives the outputs of the manifest."""
    expected = torch.tensor(entry_of(case, adapter)["output"], dtype=torch.float64)
    error = float((output_of(model, case) - expected).abs().max() / expected.abs().max())
    assert error <= ALLOWED[CASES[case]["dtype"]], f"{case}, {adapter}: the output is off by {error:.3g} of its size"


def loaded(case: str, adapter: str) -> kilotune.PeftModel:
    return kilotune.PeftModel.from_pretrained(plain(case), HERE / entry_of(case, adapter)["folder"], adapter)


@each_adapter
def test_outputs(case: str, adapter: str) -> None:
    model = loaded(case, adapter)
    check_golden(model, case, adapter)
    with model.disable_adapter():
        assert torch.equal(output_of(model, case), output_of(plain(case), case))
    with pytest.raises(AssertionError, match="is off by"):  # the adapter matters
        check_golden(plain(case), case, adapter)


@each_adapter
def test_merged_outputs(case: str, adapter: str) -> None:
    """In float32; into bfloat16 weights a part of the adapter is rounded away."""
    model = loaded(case, adapter).float()
    expected = loaded(case, adapter).float()
    merged = model.merge_and_unload(safe_merge=True)
    x = inputs()
    with torch.no_grad():
        assert torch.allclose(merged(x), expected(x), rtol=0, atol=1e-5 * float(expected(x).abs().max()))
    if CASES[case]["dtype"] == "float32":
        check_golden(merged, case, adapter)


@each_adapter
def test_written_again(case: str, adapter: str, tmp_path: Path) -> None:
    """What we write of it loads again and holds the same tensors (PEFT writes saved modules' biases three times)."""
    model = loaded(case, adapter)
    model.save_pretrained(tmp_path, selected_adapters=[adapter])
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    ours = load_file(folder / "adapter_model.safetensors")
    theirs = load_file(HERE / entry_of(case, adapter)["folder"] / "adapter_model.safetensors")
    repeated = {key for key in theirs if ".original_module." in key or ".modules_to_save." in key}
    assert sorted(ours) == sorted(set(theirs) - repeated)
    for key, value in ours.items():
        assert torch.equal(value.float(), theirs[key].float()), key
    check_golden(kilotune.PeftModel.from_pretrained(plain(case), folder), case, adapter)


@each_adapter
def test_a_changed_value_is_noticed(case: str, adapter: str, tmp_path: Path) -> None:
    """Planted: any one tensor of the file turned round, and the outputs no longer agree."""
    source = HERE / entry_of(case, adapter)["folder"]
    tensors = load_file(source / "adapter_model.safetensors")
    for key in sorted(tensors):
        if ".original_module." in key or ".modules_to_save." in key:
            continue  # PEFT's spare copies: nothing reads them
        changed = {**tensors, key: -tensors[key] - 0.2}
        shutil.copy(source / "adapter_config.json", tmp_path)
        save_file(changed, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        model = kilotune.PeftModel.from_pretrained(plain(case), tmp_path)
        with pytest.raises(AssertionError, match="is off by"):
            check_golden(model, case, adapter)


@each_adapter
def test_files_are_those_of_the_manifest(case: str, adapter: str) -> None:
    entry = entry_of(case, adapter)
    folder = HERE / entry["folder"]
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("adapter_*")}
    assert found == entry["sha256"]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no dictionary
    assert shapes == {key: shape for key, (_, shape) in entry["tensors"].items()}


def test_the_manifest_names_all_files_and_versions() -> None:
    listed = {HERE / entry_of(*pair)["folder"] / name for pair in ADAPTERS for name in entry_of(*pair)["sha256"]}
    assert set(HERE.rglob("adapter_*")) == listed
    assert MANIFEST["versions"]["peft"].startswith("0.21.")
    assert {"torch", "transformers", "safetensors", "python"} < set(MANIFEST["versions"])
    assert max(path.stat().st_size for path in listed) < 8_000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("peft", reason="it writes the files anew")
    spec = importlib.util.spec_from_file_location("make_golden", HERE / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CASES)
def test_peft_writes_the_same_keys_and_shapes(case: str, script: ModuleType, tmp_path: Path) -> None:
    made = script.make(case, tmp_path)
    kept = CASES[case]
    assert set(script.CASES) == set(CASES)
    for adapter, entry in made["adapters"].items():
        assert entry["tensors"] == kept["adapters"][adapter]["tensors"]
        config, old = (
            json.loads((place / entry["folder"] / "adapter_config.json").read_text()) for place in (tmp_path, HERE)
        )
        assert set(config) == set(old), "PEFT's configuration has other keys now"
