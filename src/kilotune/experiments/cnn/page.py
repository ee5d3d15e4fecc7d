"""The experiment's report: one HTML page that needs nothing but itself, and the files next to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..._ui.pages import publish, render
from .charts import accuracy_chart, loss_chart, sample_strip
from .results import CnnResult, Counts, spread
from .settings import LABELS, LORA_RANK, METHODS, VERA_RANK

__all__ = ["page", "write_report"]


def page(result: CnnResult) -> str:
    """The whole page, as HTML text."""
    settings = result.settings
    vera, lora = result.counts[0], result.counts[1]
    kind = "handwritten digits" if settings.data == "digits" else "photographs of CIFAR-10"
    straight = [fmean(seed.pretrained[c] for c in settings.classes) for seed in result.seeds]
    return render(
        __package__,
        "page.html",
        data=settings.data,
        pretrained_on=f"{result.sizes['pretraining']:,} {kind}",
        tested_on=f"{result.sizes['test']:,}",
        adapted=_adapted(result),
        turned=_turned(result),
        vera={"rank": VERA_RANK, "trained": f"{vera.trainable:,}"},
        lora={"rank": LORA_RANK, "trained": f"{lora.trainable:,}"},
        all_numbers=f"{vera.frozen:,}",
        seeds=settings.seeds,
        first_seed=result.seeds[0].seed,
        seconds=f"{result.seconds:.0f}",
        methods=[_method_row(result, method) for method in (None, *METHODS)],
        accuracy={
            "pretrained": spread([fmean(seed.pretrained) for seed in result.seeds]),
            "straight": spread(straight),
            "turned": spread(result.levels(None, settings.classes)),
        },
        pictures={
            "accuracy": accuracy_chart(result),
            "samples": sample_strip(result),
            "losses": loss_chart(result),
        },
        counts=[_count_row(row) for row in result.counts],
        norms=_norms(result),
        checks=result.checks,
        failed=len(result.failures),
        settings=_settings(result),
    )


def write_report(result: CnnResult, folder: Path) -> list[Path]:
    """Write report.html, results.json and the first seed's adapters into ``folder``, all or nothing of each.

    Raises:
        KilotuneError: the folder cannot be written to.
    """
    files = {
        **{f"adapters/{name}": content for name, content in result.adapters.items()},
        "results.json": (json.dumps(result.to_dict(), indent=2) + "\n").encode(),
        "report.html": page(result).encode(),
    }
    return publish(folder, files)


# -- what the page says ----------------------------------------------------------------------------


def _adapted(result: CnnResult) -> str:
    *most, last = [result.class_names[c] for c in result.settings.classes]
    return f"{', '.join(most)} and {last}" if most else last


def _turned(result: CnnResult) -> str:
    """Degrees by which the adapted classes were turned; empty where they were not."""
    return f"{result.settings.rotation:g}" if result.settings.rotation % 360 else ""


def _method_row(result: CnnResult, method: str | None) -> dict[str, Any]:
    """What a method did, or for None what there was before."""
    settings = result.settings
    vera, lora = result.counts[0], result.counts[1]
    trained = {"vera": vera.trainable, "lora": lora.trainable, "full": vera.frozen}
    return {
        "name": LABELS[method] if method else "before",
        "trained": f"{trained[method]:,}" if method else "",
        "bytes": f"{result.seeds[0].runs[method].weight_bytes:,}" if method else "",
        "levels": [_percent(result.levels(method, which)) for which in (settings.classes, settings.other_classes)],
        "among": f"{100 * result.among(method):.1f}",
        "seconds": f"{fmean(seed.runs[method].seconds for seed in result.seeds):.1f}" if method else "",
    }


def _percent(values: Sequence[float]) -> tuple[str, str]:
    """The mean in percent, and the range over the seeds; one seed has none."""
    ends = f"{100 * min(values):.1f} to {100 * max(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}", ends


def _count_row(row: Counts) -> dict[str, Any]:
    return {
        "name": f"{LABELS[row.method]}, rank {row.rank}",
        "note": "as in its tutorial" if row.tutorial else "side by side",
        "widths": "-".join(str(width) for width in row.widths),
        "tutorials": [f"{row.trainable:,}", f"{row.frozen:,}", f"{row.total:,}", f"{row.percent:.2f} %"],
        "pairs": row.pairs,
        "shared": f"{row.shared:,}",
        "by_location": [f"{row.total_by_location:,}", f"{row.percent_by_location:.2f} %"],
    }


def _norms(result: CnnResult) -> list[list[str]]:
    """A row for each layer: its name, then before and after, for VeRA and for LoRA."""
    held = [run.adapter.norms for run in result.seeds[0].runs.values() if run.adapter]
    return [[layer, *(f"{value:.4g}" for norms in held for value in norms[layer])] for layer in held[0]]


def _settings(result: CnnResult) -> dict[str, str]:
    settings = result.settings
    rates = ", ".join(f"{LABELS[method]} {settings.rates[method]:g}" for method in METHODS)
    shift = f"turned by {turned} degrees" if (turned := _turned(result)) else "not changed"
    return {
        "seeds": ", ".join(str(seed) for seed in settings.all_seeds)
        + " (each draws the weights, the order of the pictures, and the adapters' start)",
        "data": result.source,
        "pictures": ", ".join(f"{count:,} {what}" for what, count in result.sizes.items()),
        "adapted classes": f"{_adapted(result)}, {shift}",
        "optimizer": f"SGD, momentum {settings.pretraining.momentum:g}, {settings.batch} pictures per step",
        "pretraining": f"{settings.epochs} epochs, learning rate {settings.pretrain_rate:g}",
        "adapting": f"{settings.adapt_epochs} epochs; learning rates: {rates}",
        "VeRA": f"rank {VERA_RANK}, a random pair per shape, on all fully connected layers",
        "LoRA": f"rank {LORA_RANK}, scale 1, on all fully connected layers",
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }
