"""The tables of the methods, and the cells METHODS x KINDS that follow, the weight in plain floats.

What the tests cannot know of a part, an independent formula or an example of a layer, stands in tables of rows:
methods in ``references/``, layer kinds in ``kind_cases.py``, quantised storages in ``quantised.py``. A method is tested
from the moment it is listed in its registry, a kind and a storage when they have their rows; ``test_tables.py`` names
what is missing.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from kilotune import AdapterConfig, PeftModel, get_config, get_peft_model
from kilotune.deltas import Delta
from kilotune.kinds import KINDS, LayerKind
from kilotune.methods import METHODS, PRESETS, Method, make_method
from kilotune.storage import STORAGES
from tests.conformance.cases import Formula, KindCase, MethodCase, OnOutput
from tests.conformance.kind_cases import KIND_CASES
from tests.conformance.references import collected
from tests.conformance.toys import TOYS

ALL_METHODS: dict[str, type[Method[Any]]] = {**METHODS, **TOYS}
PLAIN_STORAGES = frozenset(storage.name for storage in STORAGES if storage.lossless)  # the others: quantised.py

# -- tables ----------------------------------------------------------------------------------------

# (parameters, config, canonical matrix, bias) -> the adapted matrix and bias.
FORMULAS: dict[str, Formula] = collected("FORMULAS")
# (parameters, config, input, output) -> the adapted output, for what does not act on the weight.
ON_OUTPUT: dict[str, OnOutput] = collected("ON_OUTPUT")


def _method_cases() -> dict[str, list[MethodCase]]:
    """Methods and presets by the name that get_config takes: their rows, or else what the class says."""
    rows: dict[str, list[MethodCase]] = collected("CASES")
    behind = {**{name: name for name in ALL_METHODS}, **{name: method for name, (method, _) in PRESETS.items()}}
    return {
        name: rows.get(name) or [MethodCase(name, dict(ALL_METHODS[method].example), "near")]
        for name, method in behind.items()
    }


METHOD_CASES = _method_cases()

# Cells that are left out, each with its reason: patterns (method, kind[:variant], storage[:variant], test's name).
EXCEPTIONS: dict[tuple[str, str, str, str], str] = {
    **collected("EXCEPTIONS"),
    ("*", "embedding:padding", "*", "gradients"): "padding_idx means that its row gets no gradient, as in torch",
    ("*", "embedding:padding", "*", "parameters act"): "padding_idx means that its row gets no gradient, as in torch",
    ("*", "embedding:by-frequency", "*", "gradients"): "scale_grad_by_freq divides gradients by counts, as in torch",
    (
        "*",
        "experts*",
        "*",
        "compile",
    ): "transformers' eager loop chooses by value; see test_experts.py",
}


# -- cells -----------------------------------------------------------------------------------------


def config_of(case: MethodCase, **options: Any) -> AdapterConfig:
    """The configuration of a case, with more options."""
    given = {**case.options, **options}
    if case.name in TOYS:  # in no registry while pytest collects
        return TOYS[case.name].config_cls(**given)
    return get_config(case.name, **given)


def delta_of(case: MethodCase) -> type[Delta]:
    """The delta that the method makes, configured so."""
    if case.name in TOYS:
        return TOYS[case.name].makes
    return make_method(config_of(case, target_modules=["layer"])).makes


def excepted(method: str, kind: str, storage: str, test: str) -> str | None:
    """Why EXCEPTIONS leaves a test out; None where it runs."""
    for patterns, reason in EXCEPTIONS.items():
        if all(fnmatch.fnmatchcase(a, b) for a, b in zip((method, kind, storage, test), patterns)):
            return reason
    return None


@dataclass(frozen=True)
class Cell:
    """One method, configured, in one kind of layer, with or without a bias.

    kind: its name; a variant's follows after a colon.
    """

    case: MethodCase
    kind: str
    bias: bool
    kind_case: KindCase

    @cached_property
    def id(self) -> str:
        return f"{self.case.id}-{self.kind}-{'bias' if self.bias else 'plain'}"

    @cached_property
    def factors(self) -> tuple[str, str, str, str]:
        """Method, kind, bias and storage."""
        return self.case.id, self.kind, "bias" if self.bias else "plain", "dense"

    @property
    def cost(self) -> int:
        """About how many times as long as on a linear layer a test takes on it."""
        return 4 if self.kind_case.matrices else 1

    @cached_property
    def makes(self) -> type[Delta]:
        return delta_of(self.case)

    @property
    def part(self) -> LayerKind:
        """The layer kind."""
        return self.kind_case.kind or _KINDS[self.kind.partition(":")[0]]

    @property
    def fits(self) -> bool:
        """Whether the kind offers what the method needs."""
        return self.makes.needs <= self.part.offers - self.kind_case.lacks

    def reason(self, test: str) -> str | None:
        """Why EXCEPTIONS leaves ``test`` out here; None where it runs."""
        return excepted(self.case.name, self.kind, "dense", test)

    def config(self, **options: Any) -> AdapterConfig:
        return config_of(self.case, **{**self.kind_case.targets, **options})

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The base model: ``layer``, alone, so that every number can be checked."""
        torch.manual_seed(0)
        return self.kind_case.net(self.kind_case.make(self.bias)).to(dtype)

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
        return get_peft_model(self.base(dtype), self.config(**options))


_KINDS = {kind.name: kind for kind in KINDS}


def _cells() -> list[Cell]:
    found = []
    for cases in METHOD_CASES.values():
        found += [cell for case in cases for cell in _in_kinds(case)]
    return found


def _in_kinds(case: MethodCase) -> list[Cell]:
    found = []
    for kind, variants in KIND_CASES.items():
        if (kind not in _KINDS and variants[0].kind is None) or (case.kinds and kind not in case.kinds):
            continue
        for variant in variants:
            name = f"{kind}:{variant.name}" if variant.name else kind
            found += [Cell(case, name, bias, variant) for bias in variant.biases]
    return found


ALL = _cells()
CELLS = [cell for cell in ALL if cell.fits]
REFUSED = [cell for cell in ALL if not cell.fits]
