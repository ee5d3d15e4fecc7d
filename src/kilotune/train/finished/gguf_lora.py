"""GGUF LoRA, which llama.cpp loads beside a base in GGUF (``--lora FILE``).

::

    W + B A      the adapted matrix, (out, in); A (r, in), B (out, r)
    P W          what llama.cpp has: the same matrix, the rows of some layers in another order P
    lora_a = A (r, in),  lora_b = P B (out, r)      and llama.cpp adds  (alpha / r) lora_b lora_a

Names, orders and metadata are those of llama.cpp's own converters (``convert_lora_to_gguf.py`` and ``conversion/``, as
of October 2026), so a file fits the base that they make. The names of tensors come with the package ``gguf``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ...convert import low_rank_deltas, truncate
from ...deltas import LowRank
from ...errors import CheckpointError, MissingExtraError, UnsupportedError, gather
from ...injection.installed_adapter import Installed
from ...methods import LoraConfig
from ...model.peft_model import PeftModel
from ...whole_file import replacing
from .lora_export import check_low_rank, check_rank

__all__ = ["FAMILIES", "Family", "GgufLora", "gguf_lora", "write_gguf"]

Order = Callable[[Any, int], Tensor]
"""(the model's config, the number of rows) -> which row of transformers' matrix stands at each place, (rows,)."""


def _rotary(heads: Callable[[Any], int]) -> Order:
    """Transformers rotates the halves of a head against each other, llama.cpp's Llama neighbours: interleave them."""

    def order(config: Any, rows: int) -> Tensor:
        return torch.arange(rows).reshape(heads(config), 2, -1).transpose(1, 2).reshape(-1)

    return order


def _query_key_value(config: Any, rows: int) -> Tensor:
    """GPT-NeoX keeps q, k and v of each head together; llama.cpp all q, then all k, then all v."""
    return torch.arange(rows).reshape(config.num_attention_heads, 3, -1).transpose(0, 1).reshape(-1)


@final
@dataclass(frozen=True)
class Family:
    """One architecture as llama.cpp has it.

    Attributes:
        architecture: its name in GGUF.
        orders: last part of a layer's name -> the order of its rows; the others keep theirs.
        refusal: config -> why a model of this kind cannot be exported, or None.
    """

    architecture: str
    orders: Mapping[str, Order]
    refusal: Callable[[Any], str | None] = lambda config: None


_LLAMA = Family(
    "llama",
    {"q_proj": _rotary(lambda c: int(c.num_attention_heads)), "k_proj": _rotary(lambda c: int(c.num_key_value_heads))},
)


def _one_key_for_all_heads(config: Any) -> str | None:
    return None if config.multi_query else "llama.cpp has GPT-BigCode with multi_query only, and this model is without"


FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": Family("gpt2", {}),
    "gpt_bigcode": Family("starcoder", {}, _one_key_for_all_heads),
    "gpt_neox": Family("gptneox", {"query_key_value": _query_key_value}),
    "gemma": Family("gemma", {}),
    "gemma2": Family("gemma2", {}),
    "gemma3_text": Family("gemma3", {}),
    "phi3": Family("phi3", {}),
    "qwen2": Family("qwen2", {}),
    "qwen3": Family("qwen3", {}),
    "starcoder2": Family("starcoder2", {}),
}
"""transformers' ``model_type`` -> how llama.cpp has it."""


@final
@dataclass(frozen=True)
class GgufLora:
    """A LoRA as it will stand in a GGUF file.

    Attributes:
        architecture: of the base, as llama.cpp names it.
        alpha: llama.cpp scales each layer's change by alpha / r.
        tensors: name -> the tensor, float32; ``lora_a`` and ``lora_b`` of one matrix follow each other.
        rank: the highest of the layers' ranks.
        errors: layer -> the relative error of its change; empty where nothing was approximated.
    """

    architecture: str
    alpha: float
    tensors: Mapping[str, Tensor]
    rank: int
    errors: Mapping[str, float]


def gguf_lora(model: PeftModel, adapter_name: str = "default", rank: int | None = None) -> GgufLora:
    """Any low-rank adapter of a transformers language model as a LoRA for llama.cpp.

    Args:
        model: the adapter in its base (whose weights are not read; see :func:`kilotune.convert.hollow`).
        adapter_name: which adapter.
        rank: None for the adapter's own rank, exactly (to float32 rounding); else a smaller one, and the best
            approximation.

    Raises:
        UnsupportedError: what GGUF cannot hold, each with its reason.
        CheckpointError: values that are not finite.
        MissingExtraError: the package gguf is not installed.

    """
    installed = model.installed(adapter_name)
    base = model.get_base_model()
    family = _family(base)
    check_low_rank(installed)
    _check(installed, base)
    places = _places(installed, base, family)
    deltas = low_rank_deltas(installed)
    if broken := [name for name, delta in deltas.items() if not _finite(delta)]:
        raise CheckpointError(gather(f"adapter {adapter_name!r} holds values that are not finite:", broken))
    errors: dict[str, float] = {}
    if rank is not None:
        check_rank(rank, max(delta.a.shape[0] for delta in deltas.values()))
        deltas, errors = _truncated(deltas, rank)
    alpha = _alpha(deltas, own=rank is None and isinstance(installed.config, LoraConfig))
    tensors: dict[str, Tensor] = {}
    for name, delta in sorted(deltas.items(), key=lambda item: places[item[0]]):
        a, b = _factors(delta, alpha)
        if (order := family.orders.get(name.rpartition(".")[2])) is not None:
            b = b[order(_config(base), b.shape[0])]
        if places[name] == "token_embd.weight":
            a = a.T  # llama.cpp looks rows up in it, one a token
        tensors[f"{places[name]}.lora_a"] = a.float().contiguous()
        tensors[f"{places[name]}.lora_b"] = b.float().contiguous()
    ranks = max(delta.a.shape[0] for delta in deltas.values())
    return GgufLora(family.architecture, alpha, tensors, ranks, errors)


# -- what can be exported --------------------------------------------------------------------------


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "export", "writing GGUF") from error
    return gguf


def _config(base: nn.Module) -> Any:
    return getattr(base, "config", None)


def _family(base: nn.Module) -> Family:
    kind = str(getattr(_config(base), "model_type", None))
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"a {type(base).__name__} (model_type {kind!r}) cannot be exported to GGUF: the names and orders of its "
            f"weights are known for {', '.join(FAMILIES)}. Llama.cpp's own converter may take it merged: --to merged"
        )
    family = FAMILIES[kind]
    if reason := family.refusal(_config(base)):
        raise UnsupportedError(reason)
    return family


def _check(installed: Installed, base: nn.Module) -> None:
    """Refuse what a GGUF LoRA has no place for, all of it at once."""
    slots = installed.slots()
    faults = [f"{name}: is trained whole, and a GGUF LoRA holds only changes of low rank" for name in installed.saved]
    faults += [
        f"{name}.bias: is trained, and a GGUF LoRA holds no biases"
        for name, slot in slots.items()
        if slot.trained_bias is not None
    ]
    if getattr(_config(base), "tie_word_embeddings", False):
        ends = [base.get_input_embeddings(), base.get_output_embeddings()]  # type: ignore[operator]
        faults += [
            f"{name}: input and output share this weight, and llama.cpp has one tensor for both, so a change of one of "
            "them cannot be said"
            for name in slots
            if any(installed.layers[name] is end for end in ends)
        ]
    if faults:
        raise UnsupportedError(gather("this adapter cannot be exported to GGUF; --to merged can:", faults))


def _places(installed: Installed, base: nn.Module, family: Family) -> dict[str, str]:
    """Layer -> its tensor's name in llama.cpp."""
    gguf = _gguf()
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[family.architecture], int(_config(base).num_hidden_layers))
    prefix = getattr(base, "base_model_prefix", "")
    found, faults = {}, []
    for layer in installed.slots():
        # A headless model has no "model." before its layers' names.
        tries = [names.get_name(name, (".weight",)) for name in (f"{layer}.weight", f"{prefix}.{layer}.weight")]
        place = next((name for name in tries if name is not None), None)
        if place is None:
            faults.append(f"{layer}: llama.cpp's {family.architecture} has no tensor for it")
        elif place.startswith("position_embd"):
            faults.append(f"{layer}: llama.cpp reads the table of positions without adapters")
        else:
            found[layer] = place
    if faults:
        raise UnsupportedError(gather("this adapter cannot be exported to GGUF; --to merged can:", faults))
    return found


# -- the numbers -----------------------------------------------------------------------------------


def _finite(delta: LowRank) -> bool:
    parts = (delta.a, delta.b, delta.mid, delta.out)
    return all(bool(torch.isfinite(part).all()) for part in parts if part is not None)


def _alpha(deltas: Mapping[str, LowRank], own: bool) -> float:
    """The one number of the file: a LoRA's ``own`` alpha where all its layers share it, else the highest rank."""
    alphas = {round(delta.scale * delta.a.shape[0], 9) for delta in deltas.values()}
    alpha = alphas.pop() if own and len(alphas) == 1 else 0.0
    # llama.cpp takes an alpha of 0 for "do not scale".
    return alpha if alpha > 0 else float(max(delta.a.shape[0] for delta in deltas.values()))


def _factors(delta: LowRank, alpha: float) -> tuple[Tensor, Tensor]:
    """(A (r, in), B (out, r)), float64, such that the change is alpha / r B A."""
    a, b = delta.a.detach().double(), delta.b.detach().double()
    if delta.mid is not None:
        a = delta.mid.double().unsqueeze(-1) * a
    if delta.out is not None:
        b = delta.out.double().unsqueeze(-1) * b
    ratio = delta.scale * a.shape[0] / alpha
    return a, b if abs(ratio - 1) < 1e-9 else ratio * b


def _truncated(deltas: Mapping[str, LowRank], rank: int) -> tuple[dict[str, LowRank], dict[str, float]]:
    """The best approximations of rank ``rank``; layers that have no more stay as they are."""
    made, errors = {}, {}
    for name, delta in deltas.items():
        own = delta.a.shape[0]
        a, b, error = (
            truncate(*_factors(delta, float(own)), rank) if rank < own else (*_factors(delta, float(own)), 0.0)
        )
        made[name], errors[name] = LowRank(a=a, b=b), error
    return made, errors


# -- the file --------------------------------------------------------------------------------------


def write_gguf(lora: GgufLora, path: Path, *, dtype: torch.dtype = torch.float32, name: str | None = None) -> None:
    """Write ``lora`` to ``path``, whole or not at all.

    Args:
        lora: from :func:`gguf_lora`.
        path: the file; what is there is replaced.
        dtype: float32, bfloat16 or float16.
        name: what the file says it is, in ``general.name``.

    Raises:
        CheckpointError: a value that ``dtype`` cannot hold, or the file cannot be written.

    """
    lost = [key for key, value in lora.tensors.items() if not bool(torch.isfinite(value.to(dtype)).all())]
    if lost:
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(gather(f"these hold values that {kind} cannot; take float32 or bfloat16:", lost))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as fresh:
            _write(lora, fresh, dtype, name)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def _write(lora: GgufLora, path: Path, dtype: torch.dtype, name: str | None) -> None:
    gguf = _gguf()
    types = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    }
    kind, file_type = types[dtype]
    writer = gguf.GGUFWriter(path, lora.architecture)
    with contextlib.closing(writer):
        writer.add_type(gguf.GGUFType.ADAPTER)
        if name is not None:
            writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.alpha)
        for key, value in lora.tensors.items():
            writer.add_tensor(key, gguf.quantize(value.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
