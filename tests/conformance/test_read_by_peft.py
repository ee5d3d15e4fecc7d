"""What PEFT makes of each method's file: it refuses it, or does what the method does; never anything else.

A file without its frozen random numbers looks like one of PEFT's own, which would draw others for the seed and not
notice. The writer closes every file of which the method does not say that PEFT reads it, so that forgetting it is safe.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kilotune import AdapterConfig, PeftModel, get_config, get_peft_model
from kilotune.adapter_files import writing
from kilotune.config import CLOSED
from kilotune.methods import METHODS
from tests.conformance.cells import CELLS, Cell
from tests.conformance.checks import EPSILON, adapted, data
from tests.conformance.declared import every_cell
from tests.support.models import Nested, randomize
from tests.support.tiny_method import Tiny, TinyConfig

peft = pytest.importorskip("peft")
X = torch.linspace(-1, 1, 24).view(4, 6)
# The variants of a kind are left out: PEFT ignores the padding of a convolution, and gives no option to say so.
PLAIN = [cell for cell in CELLS if ":" not in cell.kind]


def says_closed(folder: Path) -> bool:
    return str(json.loads((folder / "adapter_config.json").read_text())["peft_type"]).startswith(CLOSED)


def loaded_by_peft(base: nn.Module, folder: Path) -> nn.Module | None:
    """PEFT's model, or None where it refuses the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it draws numbers from a seed, or misses keys: the outputs tell
        try:
            model: nn.Module = peft.PeftModel.from_pretrained(base, folder)
        except (KeyError, ValueError, TypeError, NotImplementedError, RuntimeError):
            return None
    return model.eval()


def check(model: nn.Module, base: nn.Module, x: torch.Tensor, folder: Path) -> bool:
    """Whether PEFT loads what ``model`` wrote; where it does, it does the same."""
    theirs = loaded_by_peft(base, folder)
    if theirs is None:
        return False
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(theirs(x), y, rtol=0, atol=EPSILON[torch.float32] * (1 + float(y.abs().max())))
    return True


@every_cell("read by PEFT", PLAIN)
def test_peft_refuses_a_file_or_does_what_we_do(cell: Cell, tmp_path: Path) -> None:
    model = adapted(cell, torch.float32).eval()
    model.save_pretrained(tmp_path)
    read = check(model, cell.base().eval(), data(cell, 4), tmp_path)
    assert not (read and says_closed(tmp_path))
    if cell.kind == "linear":  # what is said to be PEFT's is read there
        assert read is not says_closed(tmp_path)


# Methods whose numbers may be those that PEFT draws.
DRAWN = [name for name, method in METHODS.items() if "generator" in {f.name for f in fields(method.config_cls)}]
TARGETS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "names": {"target_modules": ["down", "stem"]},
    "a pattern": {"target_modules": r"blocks\.1\..*(up|down)|head"},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["stem", "up"]},
    "of one block": {"target_modules": ["up", "down"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "beside a head": {"target_modules": ["up", "stem"], "modules_to_save": ["head"], "bias": "all"},
}


OPTIONS: dict[str, dict[str, Any]] = {"randlora": {"sparse": True}}  # PEFT's dense ones depend on the machine


def config(method: str, generator: str, targets: str) -> AdapterConfig:
    options = {**METHODS[method].example, **OPTIONS.get(method, {})}
    return get_config(method, **{**options, "generator": generator, **TARGETS[targets]})


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("generator", ["peft", "portable"])
@pytest.mark.parametrize("method", DRAWN)
def test_numbers_drawn_for_several_layers(method: str, generator: str, targets: str, tmp_path: Path) -> None:
    """Which numbers PEFT draws depends on the layers, their order and the largest of them."""
    model = get_peft_model(Nested(), config(method, generator, targets))
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    assert check(model, Nested(), X, tmp_path) is (generator == "peft")
    assert torch.equal(PeftModel.from_pretrained(Nested(), tmp_path)(X), model(X))


# -- a method that says nothing --------------------------------------------------------------------


def adapted_by_tiny(monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    monkeypatch.setitem(METHODS, Tiny.name, Tiny)
    model = get_peft_model(Nested(), TinyConfig(target_modules="all-linear"))
    randomize(model)
    return model.eval()


def test_a_method_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = adapted_by_tiny(monkeypatch)
    model.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="KILOTUNE_TINYLORA"):
        peft.PeftModel.from_pretrained(Nested(), tmp_path)
    assert not check(model, Nested(), X, tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Nested(), tmp_path)(X), model(X))


def test_a_method_that_is_wrong_about_peft_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The checks of this file can fail: PEFT draws other numbers for the seeds of these files."""
    monkeypatch.setattr(writing, "CLOSED", "")
    model = adapted_by_tiny(monkeypatch)
    model.save_pretrained(tmp_path / "tiny")
    with pytest.raises(AssertionError, match="not close"):
        check(model, Nested(), X, tmp_path / "tiny")
    for method in (name for name in DRAWN if METHODS[name] is not Tiny):
        model = get_peft_model(Nested(), config(method, "portable", "all"))
        randomize(model)
        model.eval().save_pretrained(tmp_path / method)
        with pytest.raises(AssertionError, match="not close"):
            check(model, Nested(), X, tmp_path / method)
