"""The table of docs/deploy.md: how many tenants' adapters one GPU holds, by arithmetic. python scripts/capacity.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kilotune import AdapterConfig, LoraConfig, VeraConfig
from kilotune.fleet.scale import scale
from kilotune.plan import load_base

BASES = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-13b")
CARD, CACHE = 80 * 10**9, 16 * 10**9  # bytes of the card; of them for keys and values
TARGETS = {"query and value": ["q_proj", "v_proj"], "all linear": "all-linear"}
FORMS: dict[str, Callable[[Any], AdapterConfig]] = {
    "VeRA r 64": lambda targets: VeraConfig(r=64, target_modules=targets),
    "VeRA r 256": lambda targets: VeraConfig(r=256, target_modules=targets),
    "VeRA r 1024": lambda targets: VeraConfig(r=1024, target_modules=targets),
    "LoRA r 16": lambda targets: LoraConfig(r=16, target_modules=targets),
}


def rows(bases: Sequence[str] = BASES) -> list[tuple[str, str, str, float, int]]:
    """(base, targets, method, MB of an adapter in bfloat16, adapters beside base and cache)."""
    found = []
    for name in bases:
        for targets, chosen in TARGETS.items():
            for form, make in FORMS.items():
                base = load_base(name, dtype="bfloat16")
                config = make(chosen)
                numbers = scale(base.model, config, 1).numbers
                free = CARD - CACHE - base.bytes_by_dtype()["bfloat16"]
                found.append((name, targets, form, 2 * numbers / 1e6, free // (2 * numbers)))
    return found


def table(bases: Sequence[str] = BASES) -> str:
    """The lines of the page, in Markdown."""
    lines = ["| base | targets | method | one adapter, bfloat16 | tenants on one card |", "|---|---|---|---|---|"]
    for base, targets, form, size, count in rows(bases):
        lines.append(f"| {base} | {targets} | {form} | {size:.3g} MB | {count:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
