"""The cells of quantised linear layers, as data: every method on every scheme of every storage.

Quantised layers exist in 16 and 32 bits only, and only for ``nn.Linear`` (a vendor's kernels are for linear layers),
so they are held to the dense layer with the dequantised weight, which the other conformance tests hold to formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kilotune import AdapterConfig, PeftModel, get_peft_model
from kilotune.deltas import Delta
from kilotune.kinds import KINDS
from kilotune.storage import Storage, storage_of
from tests.conformance.cases import MethodCase
from tests.conformance.cells import METHOD_CASES, config_of, delta_of

OUT, INN = 48, 64
LINEAR = next(kind for kind in KINDS if kind.name == "linear")


@dataclass(frozen=True)
class StorageCase:
    """One scheme of a storage.

    quantise: turns a plain layer into a quantised one, by the vendor's own way. forward: the relative error of the
    layer's forward against the product with its weight, where gradients run; noisy: the same in eval without
    gradients, where some layers round their input. lost: re-quantising loses less than this of the weight. vendor:
    how far that may be from the vendor's own quantisation, in parts of what is lost: a value at the edge of a step
    may fall to either side, and bitsandbytes rounds to float16 before it makes int8 of it.
    """

    name: str
    storage: str
    quantise: Callable[[nn.Linear], nn.Module]
    forward: float = 1e-5
    noisy: float = 1e-5
    lost: float = 0.15
    vendor: float = 0.2

    @property
    def id(self) -> str:
        return f"{self.storage}-{self.name}"


def _bnb4(quant_type: str, double: bool, compute: torch.dtype | None = None) -> Callable[[nn.Linear], nn.Module]:
    def quantise(plain: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        bias = plain.bias is not None
        layer = bnb.nn.Linear4bit(
            plain.in_features, plain.out_features, bias, compute, compress_statistics=double, quant_type=quant_type
        )
        layer.load_state_dict(plain.state_dict())
        if bias and compute is not None:
            layer.bias.data = layer.bias.data.to(compute)  # else bitsandbytes' forward does that to its own layer
        return layer.to("cpu")

    return quantise


def _bnb8(threshold: float) -> Callable[[nn.Linear], nn.Module]:
    def quantise(plain: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        sizes = (plain.in_features, plain.out_features, plain.bias is not None)
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold)
        layer.load_state_dict(plain.state_dict())
        return layer.to("cpu")

    return quantise


def _torchao(name: str, *, weight: torch.dtype | None = None, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantise(plain: nn.Linear) -> nn.Module:
        import torchao.quantization as ao

        given = dict(options)
        if (group := given.pop("group", None)) is not None:
            given["granularity"] = ao.PerGroup(group)
        if (axis := given.pop("axis", None)) is not None:
            given["granularity"] = ao.PerAxis(axis)
        if given.pop("asymmetric", False):
            given["mapping_type"] = ao.MappingType.ASYMMETRIC
        if weight is not None:
            given["weight_dtype"] = weight
        holder = nn.Sequential(plain)
        ao.quantize_(holder, getattr(ao, name)(**given))
        return holder[0]

    return quantise


STORAGE_SCHEMES: list[StorageCase] = [
    StorageCase("nf4", "bnb-4bit", _bnb4("nf4", False)),
    StorageCase("nf4-double", "bnb-4bit", _bnb4("nf4", True)),
    StorageCase("nf4-bf16", "bnb-4bit", _bnb4("nf4", True, torch.bfloat16), forward=2e-2, noisy=2e-2, vendor=0.5),
    StorageCase("fp4", "bnb-4bit", _bnb4("fp4", False)),
    StorageCase("fp4-double", "bnb-4bit", _bnb4("fp4", True)),
    StorageCase("int8", "bnb-int8", _bnb8(0.0), noisy=2e-2, lost=0.01, vendor=0.5),
    StorageCase("int8-outliers", "bnb-int8", _bnb8(2.0), noisy=2e-2, lost=0.01, vendor=0.5),
    StorageCase("int8", "torchao", _torchao("Int8WeightOnlyConfig", version=2), lost=0.01),
    StorageCase(
        "int8-groups", "torchao", _torchao("Int8WeightOnlyConfig", version=2, group=32), lost=0.01, vendor=0.21
    ),  # the norm of one edge of a step: 0.2004
    StorageCase("float8", "torchao", _torchao("Float8WeightOnlyConfig"), lost=0.05),
    StorageCase("int4", "torchao", _torchao("IntxWeightOnlyConfig", weight=torch.int4, group=32)),
    StorageCase(
        "int4-zeros", "torchao", _torchao("IntxWeightOnlyConfig", weight=torch.int4, group=32, asymmetric=True)
    ),
    StorageCase("int8-rows", "torchao", _torchao("IntxWeightOnlyConfig", weight=torch.int8, axis=0), lost=0.01),
    StorageCase(
        "int8", "torchao-dynamic", _torchao("Int8DynamicActivationInt8WeightConfig", version=2), noisy=2e-2, lost=0.01
    ),
    StorageCase(
        "int4",
        "torchao-dynamic",
        _torchao("Int8DynamicActivationIntxWeightConfig", weight=torch.int4),  # in groups of 32
        noisy=2e-2,
    ),
]

# Schemes that the library has, and whose vendor's kernels run on a GPU only: name -> the reason why no cell is here.
NEEDS_GPU: dict[str, str] = {
    "torchao-dynamic int4 (packed)": "a GPU: torchao's Int4WeightOnlyConfig packs its weight for GPU kernels",
    "torchao-dynamic float8": "a GPU: torchao's Float8DynamicActivationFloat8WeightConfig multiplies in float8",
}


@dataclass(frozen=True)
class Cell:
    """One method, configured, on one scheme of a storage, with or without a bias."""

    case: MethodCase
    scheme: StorageCase
    bias: bool

    @cached_property
    def id(self) -> str:
        return f"{self.case.id}-{self.scheme.id}-{'bias' if self.bias else 'plain'}"

    @cached_property
    def factors(self) -> tuple[str, str, str, str]:
        """Method, kind, bias and storage."""
        return self.case.id, LINEAR.name, "bias" if self.bias else "plain", self.scheme.id

    @property
    def cost(self) -> int:
        """About how many times as long as on a small plain layer a test takes on it."""
        return 5

    def config(self, **options: Any) -> AdapterConfig:
        return config_of(self.case, **{"target_modules": ["layer"], **options})

    def plain(self) -> nn.Linear:
        """The layer before it is quantised."""
        torch.manual_seed(0)
        return nn.Linear(INN, OUT, bias=self.bias)

    def base(self) -> nn.Sequential:
        """``layer``, quantised."""
        return _named(self.scheme.quantise(self.plain()))

    def dense(self) -> nn.Sequential:
        """``layer``, plain, with the dequantised weight."""
        layer, plain = self.base().get_submodule("layer"), self.plain()
        with torch.no_grad():
            plain.weight.copy_(weight_of(layer))
            if self.bias:
                plain.bias.copy_(layer.bias)
        return _named(plain)

    def models(self, **options: Any) -> tuple[PeftModel, PeftModel]:
        """The quantised model and the dense one, with the same random values in their adapters."""
        made = get_peft_model(self.base(), self.config(**options)), get_peft_model(self.dense(), self.config(**options))
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            theirs = dict(made[1].adapter_parameters())
            for name, parameter in made[0].adapter_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
                theirs[name].copy_(parameter)
            held = dict(made[1].named_parameters())
            for name, parameter in made[0].named_parameters():  # what a method draws and does not train
                if ".adapters." in name:
                    held[name].copy_(parameter)
            ours, other = (model.adapted_layers()["layer"].slot("default") for model in made)
            for name in ours.method.frozen:  # drawn at random, or made from the weight as it is read
                other.get_parameter(name).copy_(ours.get_parameter(name))
        return made


def _named(layer: nn.Module) -> nn.Sequential:
    net = nn.Sequential()
    net.add_module("layer", layer)
    return net


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a quantised layer in float32."""
    storage = storage_of(layer)
    assert isinstance(storage, Storage)
    return storage.read(layer, None, torch.float32).detach()


# A method's first case runs on all schemes, its others on these.
MORE_OPTIONS = ("bnb-4bit-nf4-double", "torchao-dynamic-int8")


def _cells() -> list[Cell]:
    found = []
    for listed in METHOD_CASES.values():
        cases = [c for c in listed if delta_of(c).needs <= LINEAR.offers and (not c.kinds or LINEAR.name in c.kinds)]
        for place, case in enumerate(cases):
            schemes = [scheme for scheme in STORAGE_SCHEMES if place == 0 or scheme.id in MORE_OPTIONS]
            found += [
                Cell(case, scheme, bias) for scheme in schemes for bias in ((True, False) if place == 0 else (True,))
            ]
    return found


QUANTISED = _cells()


def first_of_each_delta(cells: Sequence[Cell]) -> list[Cell]:
    """Those of the first method of each delta, in its first configuration."""
    first: dict[type[Delta], MethodCase] = {}
    return [cell for cell in cells if first.setdefault(delta_of(cell.case), cell.case) is cell.case]
