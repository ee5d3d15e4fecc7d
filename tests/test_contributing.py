"""The three files that CONTRIBUTING.md shows are complete: each is run here as it stands on the page."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kilotune
from kilotune import LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model

PAGE = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"

Loader = Callable[[str], ModuleType]


def examples() -> dict[str, str]:
    """``methods.row_scale`` -> the file's text."""
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
    assert sorted(examples()) == ["kinds.pointwise", "methods.row_scale", "storage.int8_rows"]


def test_the_method_trains_saves_loads_and_merges(
    load: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load("methods.row_scale")
    monkeypatch.setitem(kilotune.methods.METHODS, "row_scale", module.RowScale)

    def base() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))

    x = torch.linspace(-1, 1, 12).view(2, 6)
    plain = base()
    model = get_peft_model(base(), get_config("row_scale", target_modules="all-linear"))
    torch.testing.assert_close(model(x), plain(x))
    assert model.get_nb_trainable_parameters()[0] == 5 + 3
    step(model, x)

    one, two = (p.detach() for p in dict(model.adapter_parameters("default")).values())
    assert not torch.equal(one, torch.ones(5))
    weights = plain[0].weight * one[:, None], plain[2].weight * two[:, None]
    expected = F.linear(torch.tanh(F.linear(x, weights[0], plain[0].bias)), weights[1])
    torch.testing.assert_close(model(x), expected)

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(again(x), model(x))
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)

    with pytest.raises(kilotune.errors.ConfigError, match=r"start.*-1"):
        get_config("row_scale", start=-1)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2, target_modules=["0", "2"]), VeraConfig(r=4, target_modules=["0", "2"])],
    ids=["lora", "vera"],
)
def test_the_layer_kind_is_adapted_and_merged(
    load: Loader, monkeypatch: pytest.MonkeyPatch, config: LoraConfig | VeraConfig
) -> None:
    list_first(monkeypatch, "kinds", "KINDS", load("kinds.pointwise").Pointwise())
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1, bias=False))
    x = torch.linspace(-1, 1, 2 * 3 * 5 * 5).view(2, 3, 5, 5)
    before = base(x).detach()
    model = get_peft_model(base, config)
    torch.testing.assert_close(model(x), before)
    for _ in range(3):
        step(model, x)
    after = model(x).detach()
    assert (after - before).abs().max() > 1e-3

    # The same numbers through a linear layer, which has its own tests.
    linear = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        for i in (0, 2):
            linear[i].weight.copy_(base[i].weight.flatten(1))
        linear[0].bias.copy_(base[0].bias)
    twin = get_peft_model(linear, config)
    theirs = dict(model.adapter_parameters("default"))
    with torch.no_grad():
        for name, parameter in dict(twin.adapter_parameters("default")).items():
            parameter.copy_(theirs[name])
    expected = twin(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


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
