"""One training step, in time and memory: kilotune, PEFT, full fine-tuning, and the floor beneath them.

python benchmarks/training.py [--model llama|bert] [--hidden 768,1024] [--layers 3] [--tokens 1024,2048,4096]
                              [--ranks 64,256,1024] [--lora-ranks 8,64] [--ways] [--only PATTERN,...] [--rounds 5]
                              [--device cuda --dtype bfloat16] [--bars]

A step is the forward, the loss, the backward, and setting the gradients to None. There is no optimizer in it, for any
variant: what it costs goes by the number of trained parameters alone, so leaving it out favours full fine-tuning.

- **floor**: forward and backward through the frozen model. A gradient is asked for at the output of the input
  embeddings, so that the backward runs through every layer; nothing is trained. The adapted models start at their first
  adapted layer, as in ordinary training: they do not compute the gradient of that layer's input.
- **full**: the weights of the very layers that the others adapt get gradients, and nothing else: less than full
  fine-tuning does, which trains norms, embeddings and the prediction too.
- **peft**, **kilotune**: adapters on all linear layers but the prediction. The vectors that start at zero are given
  random values. ``--ways`` adds kilotune's VeRA in each way forced, beside the one that its cost model picks.

All read the same base weights. Sequences have 512 tokens (Llama) or 64 (BERT). How time, kept and peak memory and FLOPs
are measured stands in ``_harness.py``. Before any of it, each variant is checked: targets, count, adapters active,
a gradient for each parameter.

``--bars`` runs what the project promises (hidden 768 and 1024, 2048 tokens, r 256 and 1024, 9 rounds or more) and says
PASS or FAIL for each; the exit code is 1 when one fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, final

import torch
from torch import Tensor

import _harness as harness
from _harness import MIB, Bar, Progress, Rounds, Spread
from _models import (
    WAYS,
    Shape,
    Variant,
    build,
    check,
    dress,
    frozen_tensors,
    linear_layers,
    logits_of,
    loss_of,
    sample,
    step_of,
)

FLOOR = Variant("none", "floor")
FULL = Variant("none", "full")
BAR_TOKENS = 2048
BAR_ROUNDS = 9
SEQUENCE = {"llama": 512, "bert": 64}


@final
@dataclass
class Measured:
    """What one step of one variant needs, beside time."""

    variant: Variant
    trained: int
    flops: int
    kept: int
    live: int
    peak: int


@final
@dataclass
class Case:
    """All variants on one model at one number of tokens."""

    shape: Shape
    tokens: int
    length: int
    measured: dict[str, Measured] = field(default_factory=dict)
    times: Rounds = field(default_factory=Rounds)

    @property
    def title(self) -> str:
        """For tables and plots."""
        size = f"hidden {self.shape.hidden}, {self.shape.layers} layers"
        return f"{self.shape.kind}, {size}, {self.tokens} tokens"

    def ratio(self, name: Variant, to: Variant) -> Spread | None:
        """Time over time."""
        return self.times.ratio(name.name, to.name)

    def share(self, what: str, name: Variant, to: Variant) -> float | None:
        """``flops``, ``kept`` or ``peak`` of one variant over another's; None where one was not measured."""
        if name.name not in self.measured or to.name not in self.measured:
            return None
        below = getattr(self.measured[to.name], what)
        return float(getattr(self.measured[name.name], what) / below) if below else None


def variants_of(chosen: argparse.Namespace) -> list[Variant]:
    """The variants that the options ask for; the floor is always among them."""
    found = [FLOOR, FULL]
    found += [Variant(library, "lora", rank) for rank in chosen.lora_ranks for library in ("peft", "kilotune")]
    for rank in chosen.ranks:
        found += [Variant("peft", "vera", rank), Variant("kilotune", "vera", rank)]
        found += [Variant("kilotune", "vera", rank, way) for way in (WAYS if chosen.ways else ())]
    if chosen.bars:
        found = [variant for variant in found if variant != Variant("kilotune", "lora", variant.rank)]
    if chosen.only:
        found = [v for v in found if v == FLOOR or any(fnmatch(v.name, pattern) for pattern in chosen.only)]
    return found


def prepare(
    case: Case, base: Any, variant: Variant, batch: dict[str, Tensor], plain: Tensor, device: torch.device
) -> Callable[[], None]:
    """The variant's step, ready to be timed; its memory and FLOPs are in ``case`` then."""
    model = dress(base, variant, case.shape)
    layers = linear_layers(base, case.shape)
    flops, count = harness.flops_of(lambda: check(model, variant, layers, batch, plain))
    step = step_of(model, batch)
    known = [*frozen_tensors(model), *batch.values()]
    kept = harness.kept_bytes(lambda: loss_of(model, batch), known)
    live, _ = harness.live_and_peak(lambda: loss_of(model, batch), device)
    _, peak = harness.live_and_peak(step, device)
    case.measured[variant.name] = Measured(variant, count, flops, kept, live, peak)
    return step


def measure(chosen: argparse.Namespace, device: torch.device, cases: list[Case]) -> None:
    """Fill ``cases``, one by one; what is in it when an exception comes is what was measured."""
    progress = Progress()
    variants = variants_of(chosen)
    for hidden in chosen.hidden:
        shape = Shape(chosen.model, hidden, chosen.layers, chosen.vocabulary)
        for tokens in chosen.tokens:
            length = min(tokens, chosen.sequence or SEQUENCE[chosen.model])
            case = Case(shape, tokens, length)
            cases.append(case)
            base = build(shape, length, device, harness.DTYPES[chosen.dtype])
            batch = sample(shape, tokens, length, device)
            plain = logits_of(base, batch)
            steps = {}
            for i, variant in enumerate(variants):
                progress.show(f"{case.title}: checking {i + 1} of {len(variants)}, {variant.name}")
                steps[variant.name] = prepare(case, base, variant, batch, plain, device)
            harness.take_turns(steps, chosen.rounds, device, case.times, progress, case.title)


# -- what is printed ------------------------------------------------------------------------------------


def rows_of(case: Case) -> list[list[str]]:
    """The table of one case."""
    rows = []
    for measured in case.measured.values():
        variant = measured.variant
        own = case.ratio(variant, FLOOR)
        others = [FULL, Variant("peft", variant.method, variant.rank), Variant("peft", "lora", 8)]
        ratios = [None if variant in (FLOOR, other) else case.ratio(variant, other) for other in others]
        flops, kept = (case.share(what, variant, FLOOR) for what in ("flops", "kept"))
        rows.append(
            [variant.name, f"{measured.trained:,}"]
            + ["-" if own is None else str(own)]
            + ["-" if ratio is None else f"{ratio.median:.3f}" for ratio in ratios]
            + ["-" if flops is None else f"{flops:.3f}"]
            + [f"{measured.kept / MIB:,.0f}", "-" if kept is None else f"{kept:.2f}", f"{measured.peak / MIB:,.0f}"]
        )
    return rows


HEADS = (
    "variant",
    "trained",
    "time / floor (quartiles)",
    "/ full",
    "/ PEFT's same",
    "/ PEFT LoRA 8",
    "FLOPs / floor",
    "kept MiB",
    "/ floor",
    "peak MiB",
)


def bars_of(case: Case) -> list[Bar]:
    """What the project promises, for a case of 2048 tokens or more."""
    small, large = Variant("kilotune", "vera", 256), Variant("kilotune", "vera", 1024)
    found = []

    def add(what: str, value: float | None, limit: float, excused: str = "") -> None:
        found.append(Bar(f"{case.title}: {what}", value, limit, excused))

    def time(variant: Variant, to: Variant) -> float | None:
        ratio = case.ratio(variant, to)
        return None if ratio is None else ratio.median

    add("r 256, step over PEFT VeRA's", time(small, Variant("peft", "vera", 256)), 0.92)
    add("r 256, step over PEFT LoRA r 8's", time(small, Variant("peft", "lora", 8)), 0.97)
    add("r 1024, step over PEFT VeRA's", time(large, Variant("peft", "vera", 1024)), 0.80)
    for variant in (small, large):
        theirs = Variant("peft", "vera", variant.rank)
        add(f"r {variant.rank}, kept over PEFT VeRA's", case.share("kept", variant, theirs), 0.62)
        more = case.share("flops", variant, FULL)
        excused = f"(its FLOPs are {more:.2f} of full's)" if more is not None and more > 1.10 else ""
        add(f"r {variant.rank}, step over full fine-tuning's", time(variant, FULL), 1.10, excused)
    add("r 256, kept over the floor's", case.share("kept", small, FLOOR), 1.10)
    return found


def report(chosen: argparse.Namespace, device: torch.device, cases: Sequence[Case], stem: str) -> None:
    """Print the tables, and write them and the plot."""
    where = harness.title_of(harness.machine(device))
    for case in cases:
        if case.measured:
            print(f"\n{case.title} in sequences of {case.length}, {chosen.dtype}, {case.times}; {where}\n")
            print(harness.table(HEADS, rows_of(case)))
    done = [case for case in cases if case.times.count]
    if done:
        written = [harness.write_results(chosen.out, stem, chosen, device, done), draw(done, chosen, where, stem)]
        print("\nwritten: " + ", ".join(path.name for path in written))


def draw(cases: Sequence[Case], chosen: argparse.Namespace, where: str, stem: str) -> Any:
    """Time and kept memory over the floor's, a row of two plots for each case; returns the file's path."""
    height = max(3.0, 0.28 * max(len(case.measured) for case in cases))
    made, axes = harness.figure(2, len(cases), 6.5, height)
    colours = {"none": "#8a8a8a", "peft": "#d0803c", "kilotune": "#2f6db3"}
    for case, (left, right) in zip(cases, axes, strict=True):
        kinds = [m.variant for m in reversed(case.measured.values())]
        names, colour = [v.name for v in kinds], [colours[v.library] for v in kinds]
        times = [case.ratio(v, FLOOR) or Spread(0.0, 0.0, 0.0) for v in kinds]
        errors = [[t.median - t.low for t in times], [t.high - t.median for t in times]]
        left.barh(names, [t.median for t in times], xerr=errors, color=colour)
        left.set_title(f"{case.title}: time of a step / floor's", fontsize=9)
        right.barh(names, [case.share("kept", v, FLOOR) or 0.0 for v in kinds], color=colour)
        right.set_title("kept for the backward / floor's", fontsize=9)
        for axis in (left, right):
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.tick_params(labelsize=7)
    made.suptitle(f"{where}; {chosen.dtype}", fontsize=8)
    return harness.save_figure(made, chosen.out, stem)


# -- the command line -----------------------------------------------------------------------------------


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--model", choices=SEQUENCE, default="llama", help="the kind of model (llama)")
    parser.add_argument("--hidden", type=harness.numbers, help="sizes, multiples of 64 (768,1024; bert: 768)")
    parser.add_argument("--layers", type=harness.positive, default=3)
    parser.add_argument("--vocabulary", type=harness.positive, default=2000)
    parser.add_argument("--tokens", type=harness.numbers, help="in a step (1024,2048,4096; bert: 2048)")
    parser.add_argument("--sequence", type=harness.positive, help="tokens in a sequence (512; bert: 64)")
    parser.add_argument("--ranks", type=harness.numbers, help="of VeRA (64,256,1024)")
    parser.add_argument("--lora-ranks", type=harness.numbers, help="(8,64)")
    parser.add_argument("--ways", action="store_true", help="kilotune's VeRA in each way forced, too")
    parser.add_argument("--only", type=lambda text: text.split(","), help="patterns of variants' names: 'kilotune*'")
    parser.add_argument("--bars", action="store_true", help="what the project promises, and whether it holds")
    chosen = parser.parse_args(words)
    chosen.hidden = chosen.hidden or ([768, 1024] if chosen.model == "llama" else [768])
    if chosen.bars:
        if chosen.model != "llama" or chosen.only:
            parser.error("--bars is about --model llama, with all of its variants")
        chosen.tokens, chosen.ranks, chosen.lora_ranks = chosen.tokens or [BAR_TOKENS], [256, 1024], [8]
        chosen.rounds = max(chosen.rounds, BAR_ROUNDS)
        if min(chosen.tokens) < BAR_TOKENS:
            print(f"the bars are about {BAR_TOKENS} tokens and more; below, they need not hold", file=sys.stderr)
        if (chosen.device, chosen.dtype) != ("cpu", "float32"):
            print("the bars are about float32 on a CPU; elsewhere, they need not hold", file=sys.stderr)
    chosen.tokens = chosen.tokens or ([1024, 2048, 4096] if chosen.model == "llama" else [2048])
    chosen.ranks = chosen.ranks or [64, 256, 1024]
    chosen.lora_ranks = chosen.lora_ranks or [8, 64]
    return chosen


def main(words: Sequence[str] | None = None) -> int:
    """Run with the command line's words; returns the exit code."""
    chosen = options(words)
    device = harness.device_of(chosen)
    stem = f"training-{chosen.model}-{'bars-' if chosen.bars else ''}{device.type}-{chosen.dtype}"
    cases: list[Case] = []
    interrupted = False
    try:
        measure(chosen, device, cases)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted; measured so far:", file=sys.stderr)
    report(chosen, device, cases, stem)
    if interrupted:
        return harness.INTERRUPTED
    return harness.judge([bar for case in cases for bar in bars_of(case)]) if chosen.bars else 0


if __name__ == "__main__":
    sys.exit(main())
