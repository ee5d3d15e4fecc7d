"""What of an adapter other tools can read, and a LoRA in PEFT's layout, which most of them do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from ...convert import Conversion, to_lora, to_peft
from ...deltas import LowRank, Residual
from ...errors import ConfigError, UnsupportedError
from ...injection.installed_adapter import Installed
from ...methods import LoraConfig
from ...model.peft_model import PeftModel

__all__ = ["LoraExport", "check_low_rank", "check_rank", "export_lora"]

VLLM_RANK = 16  # vLLM's max_lora_rank where nothing is said
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # what it can be set to above that, in vLLM 0.11


@final
@dataclass(frozen=True)
class LoraExport:
    """A LoRA for other tools, in memory until ``conversion.save``.

    rank: the highest of the layers' ranks. notes: what some of the tools cannot do with it.
    """

    conversion: Conversion
    rank: int
    notes: tuple[str, ...]


def check_low_rank(installed: Installed) -> None:
    """Refuse an adapter that is no LoRA, whatever is done with its numbers.

    Raises:
        UnsupportedError: with what the method does instead, and what can be exported.

    """
    method = installed.method
    if method.makes is LowRank:
        return
    if issubclass(method.makes, Residual):
        raise UnsupportedError(
            f"{method.name}: adds layers with an activation of their own, which change no weight, so it can be neither "
            "a LoRA nor merged; it runs in kilotune only"
        )
    raise UnsupportedError(
        f"{method.name}: makes no change of low rank, and that is all that a LoRA can hold; export it --to merged"
    )


def check_rank(rank: Any, full: int) -> None:
    """Refuse a rank that is no approximation of one of rank ``full``.

    Raises:
        ConfigError: it is no whole number from 1 to ``full - 1``.

    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < full:
        raise ConfigError(
            f"rank: expected a whole number from 1 to {full - 1}, below the adapter's own {full}, got {rank!r}; leave "
            "it out to keep the adapter's own"
        )


def export_lora(model: PeftModel, adapter_name: str = "default", rank: int | None = None) -> LoraExport:
    """Any low-rank adapter as a LoRA in PEFT's layout, which PEFT, vLLM and most other tools load.

    Args:
        model: the adapter in its base (whose weights are not read; see :func:`kilotune.convert.hollow`).
        adapter_name: which adapter.
        rank: None for the adapter's own rank, exactly (to float32 rounding); else a smaller one, and the best
            approximation.

    Raises:
        UnsupportedError: the method makes no LoRA, or PEFT has no form for a layer of it.
        CheckpointError: values that are not finite.

    """
    installed = model.installed(adapter_name)
    check_low_rank(installed)
    is_lora = isinstance(installed.config, LoraConfig) and not installed.config.from_base
    conversion = to_peft(model, adapter_name) if is_lora and rank is None else to_lora(model, adapter_name, rank)
    config = conversion.state[0]
    highest = max([int(config["r"]), *map(int, config.get("rank_pattern", {}).values())])
    return LoraExport(conversion, highest, tuple(_notes(installed, highest)))


def _notes(installed: Installed, rank: int) -> list[str]:
    notes = []
    if installed.saved:
        notes.append(
            f"vLLM loads no modules that are trained whole, and this adapter has: {', '.join(installed.saved)}"
        )
    if any(slot.trained_bias is not None for slot in installed.slots().values()):
        notes.append("vLLM loads no trained biases, and this adapter has some")
    if rank > VLLM_RANKS[-1]:
        notes.append(f"vLLM loads no rank above {VLLM_RANKS[-1]}, and this one has {rank}; --rank makes a smaller one")
    elif rank > VLLM_RANK:
        notes.append(f"vLLM needs --max-lora-rank {next(r for r in VLLM_RANKS if r >= rank)} for it")
    return notes
