"""The tables of the methods, and the cells METHODS x KINDS that follow, the weight in plain floats.

What the tests cannot know of a part, an independent formula or an example of a layer, stands in tables of rows:
methods here, layer kinds in ``kind_cases.py``, quantised storages in ``quantised.py``. A part is tested from the moment
it is listed in its registry and has its rows; ``test_tables.py`` names what is missing.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from kilotune import AdapterConfig, PeftModel, get_config, get_peft_model
from kilotune.deltas import Delta
from kilotune.kinds import KINDS, LayerKind
from kilotune.methods import METHODS, PRESETS, Method, make_method
from kilotune.storage import STORAGES
from tests.conformance import residuals
from tests.conformance.cases import Array, KindCase, Layer, MethodCase, Params
from tests.conformance.kind_cases import KIND_CASES
from tests.conformance.one_vector import one_intrinsic, unilora, vblora
from tests.conformance.rescaled import dora, ia3, loraxs
from tests.conformance.toys import TOYS

ALL_METHODS: dict[str, type[Method[Any]]] = {**METHODS, **TOYS}
PLAIN_STORAGES = frozenset(storage.name for storage in STORAGES if storage.lossless)  # the others: quantised.py

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
        shapes = getattr(params, "shapes", ()) or ((out, inn),)  # PEFT draws for the largest, and cuts
        most_out, most_in = (max(sizes) for sizes in zip(*shapes, strict=True))
        a = nn.init.kaiming_uniform_(torch.empty(rank, most_in), generator=generator).double().numpy()[:, :inn]
        b = nn.init.kaiming_uniform_(torch.empty(most_out, rank), generator=generator).double().numpy()[:out]
    else:
        block = 1 + inn * 2**32 + out if config.sharing == "shape" else 0
        fan_in = getattr(params, "fan_in", 0) or inn
        a = math.sqrt(6 / fan_in) * unit_matrix(config.projection_prng_key, 0, rank, inn, block)
        b = math.sqrt(6 / rank) * unit_matrix(config.projection_prng_key, 1, rank, out, block).T
    return weight + np.diag(params["vera_lambda_b"]) @ b @ np.diag(params["vera_lambda_d"]) @ a, bias


def lora(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """alpha / r (or sqrt(r)) B A, less that of a start from the base."""
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    change = np.einsum("or,ri->oi", params["lora_B"], params["lora_A"])
    if "lora_start_A" in params:
        change = change - params["lora_start_B"] @ params["lora_start_A"]
    return weight + scale * change, bias


def bitfit(params: Params, config: Any, weight: Array, bias: Array | None) -> Layer:
    """The weight as it is, and the bias (zero where there is none) shifted."""
    return weight, params["bitfit_delta"] if bias is None else bias + params["bitfit_delta"]


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

LENGTHS = ("*.lora_magnitude_vector", "*.bias")  # what DoRA's gradient is exact for; test_dora.py has the rest
# Methods and presets by the name that get_config takes.
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
        MethodCase("lora", {"r": 2, "init_lora_weights": "pissa"}),
    ],
    "intrinsic": [
        MethodCase("intrinsic", {"d": 13}),
        MethodCase("intrinsic", {"d": 21, "structure": "said", "projection_prng_key": 2**64 - 1}),
        MethodCase("intrinsic", {"d": 25, "structure": "said", "projection": "dense", "bias": "intrinsic_only"}),
    ],
    "unilora": [
        MethodCase("unilora", {"r": 3, "theta_d_length": 11, "init_theta_d_bound": 0.5}, "moved"),
        MethodCase("unilora", {"r": 2, "theta_d_length": 7, "generator": "peft", "init_weights": False}, "moved"),
        MethodCase("unilora", {"theta_d_length": 3, "save_indices": True, "bias": "unilora_only"}, "moved"),
    ],
    "vblora": [  # each piece takes all vectors, so that all logits have gradients; test_vblora.py has the rest
        MethodCase("vblora", {"r": 2, "num_vectors": 2, "vector_length": 1, "init_vector_bank_bound": 1.0}, "moved"),
        MethodCase("vblora", {"num_vectors": 3, "topk": 3, "vector_length": 1, "init_logits_std": 1}, "moved"),
        MethodCase("vblora", {"r": 3, "num_vectors": 2, "vector_length": 1, "bias": "vblora_only"}, "moved"),
    ],
    "bitfit": [MethodCase("bitfit")],
    "dora": [
        MethodCase("dora", {"r": 2, "lora_alpha": 16}, exact_gradient=LENGTHS),
        MethodCase("dora", {"r": 3, "init_lora_weights": False, "bias": "lora_only"}, "moved", exact_gradient=LENGTHS),
    ],
    "dvora": [
        MethodCase("dvora", {"r": 4}, exact_gradient=LENGTHS),
        MethodCase("dvora", {"r": 3, "generator": "peft", "projection_prng_key": 11}, exact_gradient=LENGTHS),
    ],
    "ia3": [
        MethodCase("ia3", {"feedforward_modules": []}),
        MethodCase("ia3", {"feedforward_modules": ".*"}, "near"),
        MethodCase("ia3", {"feedforward_modules": [], "init_ia3_weights": False}, "moved"),
    ],
    "loraxs": [
        MethodCase("loraxs", {"r": 2, "lora_alpha": 64, "svd_iterations": 0}, "moved"),
        MethodCase("loraxs", {"r": 3, "save_factors": False, "bias": "loraxs_only"}, "moved"),
        MethodCase("loraxs", {"r": 4, "start": "random", "projection_prng_key": 7}, "moved"),
    ],
    "lora_fa": [MethodCase("lora_fa", {"r": 2, "lora_alpha": 16})],
    **residuals.CASES,
    "toy_full": [MethodCase("toy_full"), MethodCase("toy_full", {"bias": "all"})],
    "toy_rescale": [
        MethodCase("toy_rescale", {"rows": True}),
        MethodCase("toy_rescale", {"rows": True, "scale_bias": True}),
        MethodCase("toy_rescale", {"cols": True}, "near"),
        MethodCase("toy_rescale", {"rows": True, "inner": "low_rank"}),
        MethodCase("toy_rescale", {"rows": True, "cols": True, "inner": "full", "scale_bias": True}, "near"),
    ],
    "toy_shift": [MethodCase("toy_shift")],
    "toy_residual": [MethodCase("toy_residual"), MethodCase("toy_residual", {"source": "input"}, kinds=("linear",))],
}

# (parameters, config, canonical matrix, bias) -> the adapted matrix and bias.
FORMULAS: dict[str, Callable[[Params, Any, Array, Array | None], Layer]] = {
    "vera": vera,
    "lora": lora,
    "bitfit": bitfit,
    "dora": dora(lora),
    "dvora": dora(vera),
    "ia3": ia3,
    "loraxs": loraxs(unit_matrix),
    "lora_fa": lora,
    "intrinsic": one_intrinsic,
    "unilora": unilora,
    "vblora": vblora,
    "toy_full": toy_full,
    "toy_rescale": toy_rescale,
    "toy_shift": toy_shift,
}
# (parameters, config, input, output) -> the adapted output, for what does not act on the weight.
ON_OUTPUT: dict[str, Callable[[Params, Any, Array, Array], Array]] = {
    "toy_residual": toy_residual,
    **dict.fromkeys(residuals.CASES, residuals.bottleneck),
}
# The number of trained numbers in one layer.
COUNTS: dict[str, Callable[[Any, int, int], int]] = {
    "vera": lambda config, out, inn: config.r + out,
    "lora": lambda config, out, inn: config.r * (out + inn),
    "intrinsic": lambda config, out, inn: config.d,
    "unilora": lambda config, out, inn: config.theta_d_length,
    "vblora": lambda config, out, inn: config.num_vectors * config.r * (out + inn) // config.vector_length,
    "bitfit": lambda config, out, inn: out,
    "dora": lambda config, out, inn: config.r * (out + inn) + out,
    "dvora": lambda config, out, inn: config.r + 2 * out,
    "ia3": lambda config, out, inn: inn if config.feedforward_modules else out,
    "loraxs": lambda config, out, inn: config.r**2,
    "lora_fa": lambda config, out, inn: config.r * out,
    **residuals.COUNTS,
    "toy_full": lambda config, out, inn: out * inn,
    "toy_rescale": lambda config, out, inn: (
        out * config.rows + inn * config.cols + {"": 0, "low_rank": 3 * (out + inn), "full": out * inn}[config.inner]
    ),
    "toy_shift": lambda config, out, inn: out,
    "toy_residual": lambda config, out, inn: 3 * out + 3 * (out if config.source == "output" else inn),
}
# What is trained once for the whole model beside the layers' numbers.
MODEL_COUNTS: dict[str, Callable[[Any], int]] = {"vblora": lambda config: config.num_vectors * config.vector_length}

# Cells that are left out, each with its reason: patterns (method, kind[:variant], storage[:variant], test's name).
_NO_FEATURES = "no input to read: ids, or a window, in place of the features of one place of the output"
EXCEPTIONS: dict[tuple[str, str, str, str], str] = {
    **{
        (
            method,
            "attention",
            "*",
            "read by PEFT",
        ): "PEFT 0.21 adds the change of out_proj twice (huggingface/peft#3774)"
        for method in ("lora", "lora_fa")
    },
    (
        "lora_fa",
        "experts*",
        "*",
        "kept in files",
    ): "which factor of an expert stands under which of PEFT's keys, its module decides",
    **{("parallel", kind, "*", "*"): _NO_FEATURES for kind in ("conv?d", "conv?d:*", "embedding*")},
    ("*", "embedding:padding", "*", "gradients"): "padding_idx means that its row gets no gradient, as in torch",
    ("*", "embedding:padding", "*", "parameters act"): "padding_idx means that its row gets no gradient, as in torch",
    ("*", "embedding:by-frequency", "*", "gradients"): "scale_grad_by_freq divides gradients by counts, as in torch",
    (
        "*",
        "experts*",
        "*",
        "compile",
    ): "transformers' eager loop chooses by value; see test_experts.py",
    **{
        (method, "attention*", "*", "parameters act"): "a key's bias moves all scores of a query alike: no gradient"
        for method in ("bitfit", "toy_shift")
    },
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
    for name, cases in METHOD_CASES.items():
        if name in METHODS or name in PRESETS or name in TOYS:  # else test_tables.py names it
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
