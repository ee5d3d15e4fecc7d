"""The cells METHODS x KINDS x STORAGES, as data, straight from the registries.

A method, kind or storage is tested from the moment it is listed. What the tests cannot know of it, an
independent formula or an example of a layer, stands in the tables here; ``test_tables.py`` names what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from conformance.toys import TOYS
from kilotune import AdapterConfig, PeftModel, get_peft_model
from kilotune.kinds import KINDS, LayerKind
from kilotune.methods import METHODS, Method
from kilotune.storage import STORAGES, Storage

OUT, INN = 5, 6
ALL_METHODS: dict[str, type[Method[Any]]] = {**METHODS, **TOYS}
Array = np.ndarray[Any, np.dtype[np.float64]]
Params = Mapping[str, Array]
Layer = tuple[Array, Array | None]


# -- independent arithmetic: nothing of the library, no torch --------------------------------------


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x64-10 (Salmon et al. 2011), in plain integers."""
    mask, (k0, k1), (c0, c1, c2, c3) = 2**64 - 1, key, counter
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & mask, (p0 >> 64) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0, c1, c2, c3


def unit_matrix(seed: int, which: int, rows: int, columns: int, block: int = 0) -> Array:
    """U_A (which 0) or U_B (which 1) from the definition in DESIGN section 3."""
    result = np.empty((rows, columns))
    for k in range(rows):
        words: list[int] = []
        step = 0
        while len(words) < columns:
            step += 1  # the counter is raised before its first block
            for output in philox((seed, which), (step, 0, k, block)):
                words += [output & 0xFFFFFFFF, output >> 32]
        result[k] = [(word >> 8) * 2.0**-23 - 1.0 for word in words[:columns]]
    return result


def vera(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """The paper's equation 2, with whichever matrices the config asks for."""
    rank, (out, inn) = config.r, weight.shape
    if config.generator == "peft":
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        a = nn.init.kaiming_uniform_(torch.empty(rank, inn), generator=generator).double().numpy()
        b = nn.init.kaiming_uniform_(torch.empty(out, rank), generator=generator).double().numpy()
    else:
        block = 1 + inn * 2**32 + out if config.sharing == "shape" else 0
        a = math.sqrt(6 / inn) * unit_matrix(config.projection_prng_key, 0, rank, inn, block)
        b = math.sqrt(6 / rank) * unit_matrix(config.projection_prng_key, 1, rank, out, block).T
    return weight + np.diag(params["vera_lambda_b"]) @ b @ np.diag(params["vera_lambda_d"]) @ a, bias


def lora(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """alpha / r (or sqrt(r)) B A."""
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return weight + scale * np.einsum("or,ri->oi", params["lora_B"], params["lora_A"]), bias


def toy_full(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    return weight + params["change"], bias


def toy_shift(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    return weight, params["shift"] if bias is None else bias + params["shift"]


def toy_rescale(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    out, inn = weight.shape
    inner = params.get("change", np.zeros((out, inn)))
    if "a" in params:
        inner = 2.0 * params["b"] @ params["a"]
    rows, cols = params.get("rows", np.ones(out)), params.get("cols", np.ones(inn))
    scaled = rows * bias if config.scale_bias and bias is not None else bias
    return np.diag(rows) @ (weight + inner) @ np.diag(cols), scaled


def toy_residual(params: Params, config: Any, x: Array, y: Array) -> Array:
    """Acts on the output, not on the weight."""
    source = y if config.source == "output" else x
    result: Array = y + np.tanh(source @ params["down"].T) @ params["up"].T
    return result


# -- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodCase:
    """One way to configure a method.

    start: 'exact' (the output is the base's bits), 'near' (up to rounding) or 'moved' until it is trained.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    start: str = "exact"


METHOD_CASES: dict[str, list[MethodCase]] = {
    "vera": [
        MethodCase("vera", {"r": 4}),
        MethodCase("vera", {"r": 7, "projection_prng_key": 2**64 - 1, "sharing": "shape", "d_initial": 0.5}),
        MethodCase("vera", {"r": 3, "generator": "peft", "projection_prng_key": 11}),
        MethodCase("vera", {"r": 2, "init_weights": False, "bias": "vera_only"}, "moved"),
    ],
    "lora": [
        MethodCase("lora", {"r": 2, "lora_alpha": 16}),
        MethodCase("lora", {"r": 4, "use_rslora": True, "init_lora_weights": "gaussian"}),
        MethodCase("lora", {"r": 3, "init_lora_weights": False, "bias": "lora_only"}, "moved"),
    ],
    "toy_full": [MethodCase("toy_full"), MethodCase("toy_full", {"bias": "all"})],
    "toy_rescale": [
        MethodCase("toy_rescale", {"rows": True}),
        MethodCase("toy_rescale", {"rows": True, "scale_bias": True}),
        MethodCase("toy_rescale", {"cols": True}, "near"),
        MethodCase("toy_rescale", {"rows": True, "inner": "low_rank"}),
        MethodCase("toy_rescale", {"rows": True, "cols": True, "inner": "full", "scale_bias": True}, "near"),
    ],
    "toy_shift": [MethodCase("toy_shift")],
    "toy_residual": [MethodCase("toy_residual"), MethodCase("toy_residual", {"source": "input"})],
}

# (parameters, config, canonical matrix, bias) -> the adapted matrix and bias.
FORMULAS: dict[str, Callable[[Params, Any, Array, Array | None], Layer]] = {
    "vera": vera,
    "lora": lora,
    "toy_full": toy_full,
    "toy_rescale": toy_rescale,
    "toy_shift": toy_shift,
}
# (parameters, config, input, output) -> the adapted output, for what does not act on the weight.
ON_OUTPUT: dict[str, Callable[[Params, Any, Array, Array], Array]] = {"toy_residual": toy_residual}
# The number of trained numbers in one layer.
COUNTS: dict[str, Callable[[Any, int, int], int]] = {
    "vera": lambda config, out, inn: config.r + out,
    "lora": lambda config, out, inn: config.r * (out + inn),
    "toy_full": lambda config, out, inn: out * inn,
    "toy_rescale": lambda config, out, inn: (
        out * config.rows + inn * config.cols + {"": 0, "low_rank": 3 * (out + inn), "full": out * inn}[config.inner]
    ),
    "toy_shift": lambda config, out, inn: out,
    "toy_residual": lambda config, out, inn: 3 * out + 3 * (out if config.source == "output" else inn),
}


@dataclass(frozen=True)
class KindCase:
    """An example of a layer kind: how to make one, and its plain mathematics.

    dense: (x, canonical matrix, bias or None) -> y in numpy. optional_bias: it also exists without a bias.
    features: (out, in). keyword: the name of its forward's input.
    """

    make: Callable[[bool], nn.Module]
    dense: Callable[[Array, Array, Array | None], Array]
    canonical: Callable[[Array], Array]
    optional_bias: bool = True
    features: tuple[int, int] = (OUT, INN)
    keyword: str = "input"


def _conv1d(bias: bool) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(OUT, INN)
    nn.init.normal_(layer.bias)
    return layer


def _norm(bias: bool) -> nn.Module:
    layer = nn.LayerNorm(OUT)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def _norm_dense(x: Array, matrix: Array, bias: Array | None) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    y: Array = matrix * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return y if bias is None else y + bias


def _affine(x: Array, matrix: Array, bias: Array | None) -> Array:
    y: Array = np.einsum("...i,oi->...o", x, matrix)
    return y if bias is None else y + bias


KIND_CASES: dict[str, KindCase] = {
    "linear": KindCase(lambda bias: nn.Linear(INN, OUT, bias=bias), _affine, lambda weight: weight),
    "conv1d-transformers": KindCase(_conv1d, _affine, lambda weight: weight.T, optional_bias=False, keyword="x"),
    "biased": KindCase(_norm, _norm_dense, lambda weight: weight, optional_bias=False, features=(OUT, OUT)),
}

# How a plain layer is brought into a storage.
STORAGE_CASES: dict[str, Callable[[nn.Module], nn.Module]] = {"dense": lambda module: module}

# Cells that are left out, each with its reason: (method, kind, storage, the test's name or '*').
EXCEPTIONS: dict[tuple[str, str, str, str], str] = {}


# -- cells -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One method, configured, in one kind of layer with one storage, with or without a bias."""

    case: MethodCase
    kind: LayerKind
    storage: Storage
    bias: bool

    @property
    def id(self) -> str:
        options = "-".join(f"{key}={value}" for key, value in self.case.options.items())
        return f"{self.case.name}[{options}]-{self.kind.name}-{self.storage.name}-{'bias' if self.bias else 'plain'}"

    @property
    def fits(self) -> bool:
        """Whether the kind offers what the method needs."""
        return self.method.makes.needs <= self.kind.offers

    @property
    def method(self) -> type[Method[Any]]:
        return ALL_METHODS[self.case.name]

    def config(self, **options: Any) -> AdapterConfig:
        return self.method.config_cls(**{"target_modules": ["layer"], **self.case.options, **options})

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """``layer``, alone, so that every number can be checked."""
        torch.manual_seed(0)
        layer = STORAGE_CASES[self.storage.name](KIND_CASES[self.kind.name].make(self.bias))
        return _named(layer.to(dtype))

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
        return get_peft_model(self.base(dtype), self.config(**options))


def _named(layer: nn.Module) -> nn.Sequential:
    net = nn.Sequential()
    net.add_module("layer", layer)
    return net


def _cells() -> list[Cell]:
    found = []
    for name in ALL_METHODS:
        for case in METHOD_CASES.get(name, [MethodCase(name)]):
            for kind in KINDS:
                if kind.name not in KIND_CASES:
                    continue
                for storage in STORAGES:
                    biases = (True, False) if KIND_CASES[kind.name].optional_bias else (True,)
                    found += [Cell(case, kind, storage, bias) for bias in biases if storage.name in STORAGE_CASES]
    return found


ALL = _cells()
CELLS = [cell for cell in ALL if cell.fits]
REFUSED = [cell for cell in ALL if not cell.fits]
