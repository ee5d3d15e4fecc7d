"""The demo's report: one HTML page that needs nothing but itself, and the files next to it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from ..._ui.pages import document, facts, figure, publish, section, table
from .charts import accuracy_chart, loss_chart, sample_strip
from .results import Counts, DemoResult, spread
from .settings import LABELS, LORA_RANK, METHODS, VERA_RANK

__all__ = ["page", "write_report"]


def page(result: DemoResult) -> str:
    """The whole page, as HTML text."""
    sections = [
        _head(result),
        section("Result", _main_table(result) + _accuracy_figure(result)),
        section("How the room was made", _room(result)),
        section("Training", _loss_figure(result)),
        section("Parameters, counted both ways", _counts(result)),
        section("What left zero", _norms(result)),
        section("Checks", _checks(result)),
        section("Seeds and settings", _settings(result)),
        section("How to read this", _notes(result)),
    ]
    return document(f"kilotune demo: {result.settings.data}", sections)


def write_report(result: DemoResult, folder: Path) -> list[Path]:
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


# -- pieces of the page ----------------------------------------------------------------------------


def _names(result: DemoResult, classes: Iterable[int]) -> str:
    *most, last = [result.class_names[c] for c in classes]
    return f"{', '.join(most)} and {last}" if most else last


def _pictures(result: DemoResult) -> str:
    kind = "handwritten digits" if result.settings.data == "digits" else "photographs of CIFAR-10"
    return f"{result.sizes['pretraining']:,} {kind}"


def _head(result: DemoResult) -> str:
    settings, checks = result.settings, result.checks
    adapted = _names(result, settings.classes)
    turned = f", turned by {settings.rotation:g} degrees," if settings.rotation % 360 else ""
    good = not result.failures
    verdict = f"all {len(checks)} checks passed"
    outcome = (
        "Those classes rose, and the others, which no copy was shown again, fell; merging the adapters moved no"
        " output by more than rounding, and saving and loading them none at all."
    )
    if not good:
        verdict = f"{len(result.failures)} of {len(checks)} checks FAILED"
        outcome = "Not everything went as the tutorials report it: see the checks below."
    vera, lora = result.counts[0], result.counts[1]
    return (
        "<h1>One network, adapted with VeRA, with LoRA and in full</h1>\n"
        f'<p class="lead">A small convolutional network was pretrained on {_pictures(result)} in ten classes.'
        f" Three copies of it were then trained on the classes {escape(adapted)} only{turned} one with VeRA"
        f" (rank {VERA_RANK}: {vera.trainable:,} numbers trained), one with LoRA (rank {LORA_RANK}:"
        f" {lora.trainable:,}) and one in full ({vera.frozen:,})."
        f" {outcome}</p>\n"
        f'<p><span class="verdict {"pass" if good else "fail"}">{verdict}</span>'
        f' <span class="small">&nbsp;{settings.seeds} seed{"s" if settings.seeds > 1 else ""},'
        f" {result.seconds:.0f} seconds</span></p>\n"
    )


def _main_table(result: DemoResult) -> str:
    settings = result.settings
    vera, lora = result.counts[0], result.counts[1]
    trained = {"vera": vera.trainable, "lora": lora.trainable, "full": vera.frozen}
    adapted = _names(result, settings.classes)
    head = [
        "",
        "numbers<br>trained",
        "bytes<br>on disk",
        f"{escape(adapted)},<br>accuracy in %",
        "other classes,<br>accuracy in %",
        f"{escape(adapted)}<br>among themselves",
        "training,<br>seconds",
    ]
    rows = []
    for method in (None, *METHODS):
        rows.append(
            [
                LABELS[method] if method else "before",
                f"{trained[method]:,}" if method else "",
                f"{result.seeds[0].runs[method].weight_bytes:,}" if method else "",
                _mean_cell(result.levels(method, settings.classes)),
                _mean_cell(result.levels(method, settings.other_classes)),
                f"{100 * result.among(method):.1f}",
                f"{fmean(seed.runs[method].seconds for seed in result.seeds):.1f}" if method else "",
            ]
        )
    note = "" if settings.seeds == 1 else " Means over the seeds, and under them the lowest and the highest seed."
    return table(head, rows) + (
        f'<p class="small">On {result.sizes["test"]:,} test pictures that were never trained on.{note} "Among'
        ' themselves" is the accuracy when no other class may be answered: what rises there was learnt, and is not'
        " just the habit of never answering the rest.</p>\n"
    )


def _mean_cell(values: Sequence[float]) -> str:
    """The mean in percent, and under it the range over the seeds."""
    mean = f"{100 * fmean(values):.1f}"
    if len(values) == 1:
        return mean
    return f'{mean}<br><span class="range">{100 * min(values):.1f} to {100 * max(values):.1f}</span>'


def _accuracy_figure(result: DemoResult) -> str:
    caption = "Accuracy per class before (grey) and after adapting; the shaded classes are the ones adapted to."
    if result.settings.seeds > 1:
        caption += " Bars are means over the seeds, whiskers reach from the lowest to the highest seed."
    alt = "Bar charts of accuracy per class before and after adapting, a panel per method"
    return figure(accuracy_chart(result), "svg+xml", alt, caption)


def _loss_figure(result: DemoResult) -> str:
    caption = "Training loss, averaged over neighbouring steps."
    if result.settings.seeds > 1:
        caption += " Lines are means over the seeds, shades their range."
    alt = "Loss curves of the pretraining and of the three adaptations"
    return figure(loss_chart(result), "svg+xml", alt, caption)


def _room(result: DemoResult) -> str:
    settings = result.settings
    pretrained = spread([fmean(seed.pretrained) for seed in result.seeds])
    text = f"<p>Of the test pictures as they are, the pretrained network answers {pretrained} % right per class."
    if settings.rotation % 360 == 0:
        text += " Nothing was done to the pictures: what is missing there is the room to rise.</p>\n"
    else:
        straight = spread([fmean(seed.pretrained[c] for c in settings.classes) for seed in result.seeds])
        turned = spread(result.levels(None, settings.classes))
        text += (
            " Classes that are answered well leave no room for a gain. So the adapted classes, and only they, come"
            f" turned by {settings.rotation:g} degrees counter-clockwise from then on, both in what the copies are"
            " trained on and in what is tested, before and after. That takes the pretrained network from"
            f" {straight} % to {turned} % on these classes, and this is the room. It is a chosen shift, of chosen"
            " classes, to show a clear effect; some classes suffer little from turning. The other classes' pictures"
            " stay as they were.</p>\n"
        )
    caption = "A test picture of each class. Framed: the adapted classes."
    return text + figure(sample_strip(result), "png", "Pictures of the ten classes, before and after turning", caption)


def _counts(result: DemoResult) -> str:
    head = [
        "",
        "fully connected<br>part",
        "trained",
        "frozen",
        "<b>as the tutorials:</b><br>in all",
        "trained",
        "random pairs,<br>numbers in all",
        "<b>by memory location:</b><br>in all",
        "trained",
    ]
    text = (
        "<p>The tutorials leave VeRA's frozen random pairs out, because they are not parameters of any layer; by"
        " memory location each pair counts once, however many layers share it. Both count the third convolution,"
        " which is built and never used. The tutorials on VeRA and LoRA have networks of different depth, so their"
        " two tables cannot be compared with each other: the first two rows here are one network (all accuracies"
        " above are of it), and the last is LoRA's own tutorial's network, which is only counted.</p>\n"
    )
    return text + table(head, [_count_row(row) for row in result.counts])


def _count_row(row: Counts) -> list[str]:
    note = "as in its tutorial" if row.tutorial else "side by side"
    return [
        f'<span class="whole">{LABELS[row.method]}, rank {row.rank},<br>{note}</span>',
        f'<span class="whole">{"-".join(str(width) for width in row.widths)}</span>',
        f"{row.trainable:,}",
        f"{row.frozen:,}",
        f"{row.total:,}",
        f"{row.percent:.2f} %",
        f"{row.pairs} pairs,<br>{row.shared:,}" if row.pairs else "none",
        f"{row.total_by_location:,}",
        f"{row.percent_by_location:.2f} %",
    ]


def _norms(result: DemoResult) -> str:
    runs = result.seeds[0].runs
    held = {method: runs[method].adapter for method in ("vera", "lora")}
    rows = []
    for layer in held["vera"].norms if held["vera"] else {}:
        pairs = [held[method].norms[layer] for method in held if held[method]]  # type: ignore[union-attr]
        rows.append([escape(layer), *(f"{value:.4g}" for pair in pairs for value in pair)])
    text = (
        "<p>Both methods start as no change at all: VeRA's vector b and LoRA's matrix B are zero. These are their"
        f" norms in the first seed ({result.seeds[0].seed}), layer by layer.</p>\n"
    )
    head = ["layer", "VeRA: b before", "b after", "LoRA: B before", "B after"]
    return text + table(head, rows)


def _checks(result: DemoResult) -> str:
    rows = [
        [
            f'<span class="verdict tag {"pass" if c.passed else "fail"}">{"pass" if c.passed else "FAIL"}</span>',
            escape(c.name),
            escape(c.detail),
        ]
        for c in result.checks
    ]
    return table(["", "claim", "measured"], rows, "text")


def _settings(result: DemoResult) -> str:
    settings = result.settings
    rates = ", ".join(f"{LABELS[method]} {settings.rates[method]:g}" for method in METHODS)
    shift = f"turned by {settings.rotation:g} degrees" if settings.rotation % 360 else "not changed"
    told = {
        "seeds": ", ".join(str(seed) for seed in settings.all_seeds)
        + " (each draws the weights, the order of the pictures, and the adapters' start)",
        "data": result.source,
        "pictures": ", ".join(f"{count:,} {what}" for what, count in result.sizes.items()),
        "adapted classes": f"{_names(result, settings.classes)}, {shift}",
        "optimizer": f"SGD, momentum {settings.pretraining.momentum:g}, {settings.batch} pictures per step",
        "pretraining": f"{settings.epochs} epochs, learning rate {settings.pretrain_rate:g}",
        "adapting": f"{settings.adapt_epochs} epochs; learning rates: {rates}",
        "VeRA": f"rank {VERA_RANK}, a random pair per shape, on all fully connected layers",
        "LoRA": f"rank {LORA_RANK}, scale 1, on all fully connected layers",
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }
    return facts(told)


def _notes(result: DemoResult) -> str:
    untuned = "" if result.settings.data == "digits" else " For CIFAR-10 no rate was tuned."
    notes = (
        (
            "Adapting to a few classes makes a network forget the rest; that is what the tutorials show, and without"
            " which the run fails. It is a price to know of, not a merit."
        ),
        (
            "The learning rates were chosen per method on a held-out quarter of the digits' adapted training pictures"
            " (<code>python -m kilotune.experiments.demo.tuning</code>), never on the test pictures. VeRA's is some ten"
            f" times LoRA's: its vectors scale fixed random matrices, and have to travel further.{untuned}"
        ),
        (
            "VeRA's file is small because its random pairs are made again from a seed and checked by a checksum; at"
            " this size a third of it is its header. All three files hold float32."
        ),
        (
            f"{result.settings.seeds} seeds on {result.sizes['test']:,} test pictures show the direction, not the last"
            " digit: one picture of a class is more than a point for the digits."
        ),
        (
            "The same settings on the same machine and versions give the same numbers, times aside; training runs on"
            " one thread, so that the number of cores does not matter."
        ),
    )
    return "<ul>\n" + "".join(f"<li>{note}</li>\n" for note in notes) + "</ul>\n"
