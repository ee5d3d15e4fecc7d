"""The three files that CONTRIBUTING.md shows are complete: the first two are the library's own, all three are run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilotune import LoraConfig, MergePrecisionWarning, VeraConfig, get_peft_model
from tests.support.paths import ROOT

PAGE = ROOT / "CONTRIBUTING.md"

Loader = Callable[[str], ModuleType]


def examples() -> dict[str, str]:
    """``methods.bitfit`` -> the file's text."""
    text = PAGE.read_text(encoding="utf-8")
    found = {}
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        named = re.findall(r"`src/kilotune/(\w+)/(\w+)\.py`", text[: block.start()])
        found[".".join(named[-1])] = block.group(1)
    return found


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Load an example as if its file were in the library."""

    def loaded(name: str) -> ModuleType:
        path = tmp_path / f"{name}.py"
        path.write_text(examples()[name], encoding="utf-8")
        full = f"kilotune.{name}"
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full, module)
        spec.loader.exec_module(module)
        return module

    return loaded


def list_first(monkeypatch: pytest.MonkeyPatch, package: str, name: str, item: object) -> None:
    """Put ``item`` first into the tuple ``name`` that ``kilotune.<package>`` lists."""
    module = importlib.import_module(f"kilotune.{package}")
    monkeypatch.setattr(module, name, (item, *getattr(module, name)))


def step(model: nn.Module, x: Tensor, rate: float = 0.1) -> None:
    """One optimizer step on the trained parameters, away from their start."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate)
    model(x).square().sum().backward()
    optimizer.step()


def test_the_page_has_one_example_of_each_sort() -> None:
    assert sorted(examples()) == ["kinds.conv1d", "methods.bitfit", "storage.int8_rows"]


PACKAGE = PAGE.parent / "src" / "kilotune"
USE_METHOD = """
import sys, torch, kilotune
from torch import nn
def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
x = torch.linspace(-1, 1, 12).view(2, 6)
plain = base()
model = kilotune.get_peft_model(base(), kilotune.get_config("bitfit", target_modules=["0", "2"]))
assert torch.equal(model(x), plain(x))
assert model.get_nb_trainable_parameters()[0] == 5 + 3
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
model(x).square().sum().backward()
optimizer.step()
one, two = (p.detach() for p in dict(model.adapter_parameters()).values())
assert one.abs().max() > 0 and two.abs().max() > 0
expected = torch.tanh(plain[0](x) + one) @ plain[2].weight.T + two
torch.testing.assert_close(model(x), expected)
model.save_pretrained(sys.argv[1])
assert torch.equal(kilotune.PeftModel.from_pretrained(base(), sys.argv[1])(x), model(x))
torch.testing.assert_close(model.merge_and_unload()(x), expected)
"""
USE_KIND = """
import sys, torch, kilotune
from transformers.pytorch_utils import Conv1D
torch.manual_seed(0)
plain, x = torch.nn.Sequential(Conv1D(5, 6)), torch.linspace(-1, 1, 12).view(2, 6)
before = plain(x)
model = kilotune.get_peft_model(plain, kilotune.LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
assert torch.equal(model(x), before)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
for _ in range(2):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
a, b = (p.detach() for p in dict(model.adapter_parameters()).values())
torch.testing.assert_close(model(x), before + x @ a.T @ b.T)
assert not torch.allclose(model(x), before)
model.save_pretrained(sys.argv[1])
torch.testing.assert_close(model.merge_and_unload()(x), before + x @ a.T @ b.T)
"""


@dataclass(frozen=True)
class Part:
    """A file of the page that is the library's own: what it is listed as, and what is lost without it."""

    name: str  # as in examples()
    imported: str
    entry: str
    before: str  # the text that the entry is put behind
    use: str
    lost: str


PARTS = [
    Part("methods.bitfit", "Bitfit", "Bitfit", "for method in (", USE_METHOD, "unknown method 'bitfit'"),
    Part("kinds.conv1d", "Conv1D", "Conv1D()", "KINDS: tuple[LayerKind, ...] = (", USE_KIND, "Conv1D is not a kind of"),
]


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the copy of the library in ``folder``."""
    check = f"assert kilotune.__file__.startswith({str(folder)!r}), kilotune.__file__"
    code = script.replace("kilotune\n", f"kilotune\n{check}\n", 1)
    words = [sys.executable, "-c", code, str(folder / "saved")]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "part",
    [PARTS[0], *(pytest.param(part, marks=pytest.mark.full) for part in PARTS[1:])],
    ids=lambda part: part.name,
)
def test_the_file_taken_out_and_added_as_the_page_says_is_all_there_is(part: Part, tmp_path: Path) -> None:
    folder, file = part.name.split(".")
    text = examples()[part.name]
    assert text == (PACKAGE / folder / f"{file}.py").read_text(encoding="utf-8")

    copy = tmp_path / "kilotune"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / folder / f"{file}.py").unlink()
    listed = copy / folder / "__init__.py"
    for page in (copy / "__init__.py", listed):  # every trace of it: the import, the public name, the entry
        lines = page.read_text(encoding="utf-8").splitlines()
        public = re.compile(rf' *"?{part.imported}Config"?,')
        kept = [x for x in lines if not x.startswith(f"from .{file} import") and not public.fullmatch(x)]
        page.write_text(re.sub(rf"\b{re.escape(part.entry)},\s*", "", "\n".join(kept) + "\n"), encoding="utf-8")
    assert part.imported not in re.findall(r"\w+", listed.read_text(encoding="utf-8"))
    without = run(tmp_path, part.use)
    assert without.returncode != 0
    assert part.lost in without.stderr

    (copy / folder / f"{file}.py").write_text(text, encoding="utf-8")
    source = listed.read_text(encoding="utf-8")
    assert source.count(part.before) == 1
    source = source.replace("from ._base import", f"from .{file} import {part.imported}\nfrom ._base import", 1)
    listed.write_text(source.replace(part.before, f"{part.before}{part.entry}, "), encoding="utf-8")
    added = run(tmp_path, part.use)
    assert added.returncode == 0, added.stderr


class Int8Linear(nn.Linear):
    """A linear layer whose user keeps int8 weights."""

    def __init__(self, inn: int, out: int) -> None:
        super().__init__(inn, out)
        scale = self.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        whole = (self.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


def test_the_storage_is_read_trained_through_and_written_back(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    list_first(monkeypatch, "storage", "STORAGES", load("storage.int8_rows").Int8Rows())
    torch.manual_seed(0)
    base = Int8Linear(6, 5)
    held = {name: value.clone() for name, value in base.state_dict().items()}
    dense = nn.Linear(6, 5)
    with torch.no_grad():
        dense.weight.copy_(base.weight * base.scale)
        dense.bias.copy_(base.bias)
    x = torch.linspace(-1, 1, 12).view(2, 6).requires_grad_()

    model = get_peft_model(nn.Sequential(base), VeraConfig(r=4, target_modules=["0"]))
    for _ in range(3):
        step(model, x)
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    twin = get_peft_model(nn.Sequential(dense), VeraConfig(r=4, target_modules=["0"]))
    theirs = dict(model.adapter_parameters("default"))
    with torch.no_grad():
        for name, parameter in dict(twin.adapter_parameters("default")).items():
            parameter.copy_(theirs[name])
    torch.testing.assert_close(model(x), twin(x))

    twin.merge_adapter()
    with pytest.warns(MergePrecisionWarning, match="re-quantising moved the merged weight of '0' by"):
        model.merge_adapter()
    # Written back by rounding: off by at most half a step of a row's scale in each weight.
    bound = (base.scale.detach() / 2).flatten() * x.detach().abs().sum(dim=1, keepdim=True)
    assert ((model(x) - twin(x)).abs() <= bound + 1e-6).all()
    model.unmerge_adapter()
    assert all(torch.equal(value, held[name]) for name, value in base.state_dict().items())


def test_two_merges_start_from_the_stored_weight(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    list_first(monkeypatch, "storage", "STORAGES", load("storage.int8_rows").Int8Rows())
    torch.manual_seed(0)

    def merged(*steps: list[str]) -> Tensor:
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(Int8Linear(6, 5)), VeraConfig(r=4, target_modules=["0"]), "a")
        model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        for names in steps:
            model.merge_adapter(names)
        layer = model.get_submodule("0").base_layer
        return (layer.weight * layer.scale).detach()

    assert torch.equal(merged(["a"], ["b"]), merged(["a", "b"]))
