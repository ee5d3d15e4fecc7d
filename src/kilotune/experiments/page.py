"""The experiment's report: one HTML page that needs nothing but itself, and the files next to it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from ..errors import KilotuneError
from .charts import accuracy_chart, loss_chart, sample_strip
from .results import Counts, DemoResult, spread
from .settings import LABELS, LORA_RANK, METHODS, VERA_RANK

__all__ = ["check_folder", "document", "figure", "page", "publish", "section", "table", "write_report"]

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #22262d;
  background: #f4f5f7; margin: 0; }
main { max-width: 1060px; margin: 0 auto; padding: 36px 44px 56px; background: #fff; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 42px 0 8px; padding-top: 18px; border-top: 1px solid #e3e6ea; }
p, li { max-width: 820px; }
.lead { font-size: 17.5px; color: #3b424d; }
.small { font-size: 14px; color: #5a626e; }
.verdict { display: inline-block; padding: 5px 14px; border-radius: 999px; font-weight: 600;
  font-size: 15px; }
.pass { background: #e2f4e8; color: #11613a; } .fail { background: #fde5e3; color: #a01c12; }
table { border-collapse: collapse; width: 100%; margin: 14px 0; font-size: 14.5px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; border-bottom: 1px solid #e3e6ea; text-align: right; vertical-align: top; }
th { font-weight: 600; color: #4a525e; vertical-align: bottom; border-bottom: 2px solid #c9ced6; }
th:first-child, td:first-child { text-align: left; }
.text td, .text th { text-align: left; }
td .tag { padding: 1px 9px; font-size: 13px; }
.range { color: #5a626e; font-size: 12.5px; }
.whole { white-space: nowrap; }
.scroll { overflow-x: auto; }
figure { margin: 18px 0; } figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: 14px; color: #5a626e; margin-top: 6px; max-width: 820px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; font-size: 14.5px; }
dt { color: #5a626e; } dd { margin: 0; }
@media (max-width: 700px) { main { padding: 22px 16px 40px; } }
@media print { body { background: #fff; } main { max-width: none; padding: 0; }
  figure { break-inside: avoid; } }
"""


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


def document(title: str, parts: Iterable[str]) -> str:
    """A page of these parts, which are HTML already, that needs nothing but itself."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


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


def check_folder(folder: Path) -> None:
    """Fail before the training, rather than after it, when a report cannot be written into ``folder``.

    Raises:
        KilotuneError: it is a file, or neither it nor the folder above may be written to.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise KilotuneError(f"the report cannot be written into {folder}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise KilotuneError(f"the report cannot be written into {folder}: no permission to write to {nearest}")


def publish(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files below ``folder``: all of them aside first, then each renamed into place, in order.

    Raises:
        KilotuneError: one could not be written; then nothing is left aside.
    """
    ready: list[tuple[Path, Path]] = []
    try:
        for name, content in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            ready.append((Path(aside), target))
            with os.fdopen(descriptor, "wb") as out:
                out.write(content)
        for part, target in ready:
            part.chmod(0o644)
            part.replace(target)
    except OSError as error:
        raise KilotuneError(f"could not write the report into {folder}: {error}") from error
    finally:
        for part, _ in ready:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
    return [target for _, target in ready]


# -- pieces of the page ----------------------------------------------------------------------------


def section(title: str, content: str) -> str:
    """A heading and what is under it, HTML already."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}</section>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def figure(picture: bytes, kind: str, alt: str, caption: str) -> str:
    """A picture within the page, and its caption."""
    data = base64.b64encode(picture).decode("ascii")
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


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
    facts = {method: runs[method].adapter for method in ("vera", "lora")}
    rows = []
    for layer in facts["vera"].norms if facts["vera"] else {}:
        pairs = [facts[method].norms[layer] for method in facts if facts[method]]  # type: ignore[union-attr]
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
    facts = {
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
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in facts.items())
    return f"<dl>\n{items}</dl>\n"


def _notes(result: DemoResult) -> str:
    untuned = "" if result.settings.data == "digits" else " For CIFAR-10 no rate was tuned."
    notes = (
        (
            "Adapting to a few classes makes a network forget the rest; that is what the tutorials show, and without"
            " which the run fails. It is a price to know of, not a merit."
        ),
        (
            "The learning rates were chosen per method on a held-out quarter of the digits' adapted training pictures"
            " (<code>python -m kilotune.experiments.tuning</code>), never on the test pictures. VeRA's is some ten"
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
