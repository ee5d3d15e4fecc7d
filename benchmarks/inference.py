"""A forward without gradients: the base model, and adapters on it, merged and not; kilotune and PEFT.

python benchmarks/inference.py [--model llama|bert] [--hidden 1024] [--layers 3] [--tokens 1,16,512,2048]
                               [--ranks 256,1024] [--lora-ranks 8] [--rounds 9] [--device cuda --dtype bfloat16]

The tokens of a forward are one sequence up to 512, several of 512 above. Each variant's forward is run often enough in
one go for the base model's to take ``--least`` seconds (0.1), as often for all of them. *Merged* models have weights of
their own, since their adapter is in them; all others read the same.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch

import _harness as harness
from _harness import Progress, Rounds
from _models import Shape, Variant, build, dress, sample

SEQUENCE = 512
BASE = "base"


@final
@dataclass
class Case:
    """All variants at one number of tokens. repeats: forwards in each of the times."""

    shape: Shape
    tokens: int
    repeats: int = 1
    times: Rounds = field(default_factory=Rounds)


def variants_of(chosen: argparse.Namespace) -> list[Variant]:
    """The adapters that the options ask for."""
    kinds = [("vera", rank) for rank in chosen.ranks] + [("lora", rank) for rank in chosen.lora_ranks]
    return [Variant(library, method, rank) for method, rank in kinds for library in ("peft", "kilotune")]


def models_of(base: Any, shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """Every model to be timed, by name, the base first; merged ones after they were seen to say the same."""
    models = {BASE: base}
    batch = sample(shape, 8, 8, next(base.parameters()).device)
    tolerance = 1e-3 if base.dtype == torch.float32 else 0.1
    for variant in variants_of(chosen):
        beside = models[variant.name] = dress(base, variant, shape).eval()
        merged = models[f"{variant.name} merged"] = dress(base, variant, shape, share=False).eval()
        merged.merge_adapter()
        with torch.no_grad():
            plain, one, other = (model(**batch).logits.double() for model in (base, beside, merged))
        change, apart = float((one - plain).norm()), float((one - other).norm())
        if change == 0.0 or apart > tolerance * float(one.norm()):
            raise AssertionError(f"{variant.name}: changes the output by {change}, merged by {apart} otherwise")
    return models


def forwards(model: Any, ids: torch.Tensor, repeats: int) -> Callable[[], None]:
    """``repeats`` forwards, one after the other."""

    def run() -> None:
        with torch.inference_mode():
            for _ in range(repeats):
                model(input_ids=ids)

    return run


def measure(chosen: argparse.Namespace, device: torch.device, cases: list[Case]) -> None:
    """Fill ``cases``, one by one."""
    shape = Shape(chosen.model, chosen.hidden, chosen.layers, chosen.vocabulary)
    progress = Progress()
    progress.show("building the models")
    models = models_of(build(shape, SEQUENCE, device, harness.DTYPES[chosen.dtype]).eval(), shape, chosen)
    for tokens in chosen.tokens:
        ids = sample(shape, tokens, SEQUENCE, device)["input_ids"]
        for model in models.values():
            forwards(model, ids, 2)()  # the first ones pay for what is made at first use
        once = harness.seconds_of(forwards(models[BASE], ids, 1), device)
        case = Case(shape, tokens, max(1, math.ceil(chosen.least / once)))
        cases.append(case)
        runs = {name: forwards(model, ids, case.repeats) for name, model in models.items()}
        harness.take_turns(runs, chosen.rounds, device, case.times, progress, f"{tokens} tokens")


def report(chosen: argparse.Namespace, device: torch.device, cases: Sequence[Case], stem: str) -> None:
    """Print one table, a column of ratios for each number of tokens; write it and the plot."""
    done = [case for case in cases if case.times.count]
    if not done:
        return
    where, shape = harness.title_of(harness.machine(device)), done[0].shape
    print(f"\n{shape.kind}, hidden {shape.hidden}, {shape.layers} layers, {chosen.dtype}; time of a forward over the")
    print(f"base model's, median (quartiles); {where}\n")
    heads = ["variant", *(f"{case.tokens} tokens" for case in done)]
    base = [f"{harness.Spread.of(case.times.seconds[BASE]).median / case.repeats * 1e3:.2f} ms" for case in done]
    rows = [[f"{BASE} (time)", *base]]
    for name in done[0].times.seconds:
        if name != BASE:
            rows.append([name, *(str(case.times.ratio(name, BASE) or "-") for case in done)])
    print(harness.table(heads, rows))
    print("\n" + "; ".join(f"{case.tokens} tokens: {case.times}" for case in done))
    written = [harness.write_results(chosen.out, stem, chosen, device, done), draw(done, chosen, where, stem)]
    print("written: " + ", ".join(path.name for path in written))


def draw(cases: Sequence[Case], chosen: argparse.Namespace, where: str, stem: str) -> Any:
    """Time over the base's against the number of tokens, a line for each variant; returns the file's path."""
    made, axes = harness.figure(1, 1, 8.0, 5.0)
    axis = axes[0][0]
    colours = ["#2f6db3", "#d0803c", "#3c8f5a", "#9a4fb0", "#c0504d"]
    names = [name for name in cases[0].times.seconds if name != BASE]
    kinds = sorted({name.removesuffix(" merged").split(" ", 1)[1] for name in names})
    for name in names:
        library, kind = name.removesuffix(" merged").split(" ", 1)
        found = [case.times.ratio(name, BASE) for case in cases]
        axis.plot(
            [case.tokens for case in cases],
            [ratio.median for ratio in found if ratio is not None],
            color=colours[kinds.index(kind) % len(colours)],
            linestyle=":" if name.endswith(" merged") else "-",
            marker="o" if library == "kilotune" else "x",
            label=name,
        )
    axis.set_xscale("log")
    axis.set_xlabel("tokens in a forward")
    axis.set_ylabel("time / base model's")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))  # beside the lines, not on them
    axis.set_title(f"{where}; {chosen.dtype}", fontsize=8)
    return harness.save_figure(made, chosen.out, stem)


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=9)
    parser.add_argument("--model", choices=("llama", "bert"), default="llama", help="the kind of model (llama)")
    parser.add_argument("--hidden", type=harness.positive, default=1024, help="a multiple of 64 (1024)")
    parser.add_argument("--layers", type=harness.positive, default=3)
    parser.add_argument("--vocabulary", type=harness.positive, default=2000)
    parser.add_argument("--tokens", type=harness.numbers, default=[1, 16, 512, 2048], help="(1,16,512,2048)")
    parser.add_argument("--ranks", type=harness.numbers, default=[256, 1024], help="of VeRA (256,1024)")
    parser.add_argument("--lora-ranks", type=harness.numbers, default=[8], help="(8)")
    parser.add_argument("--least", type=float, default=0.1, help="seconds that the base model runs in one go (0.1)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run with the command line's words; returns the exit code."""
    chosen = options(words)
    device = harness.device_of(chosen)
    cases: list[Case] = []
    interrupted = False
    try:
        measure(chosen, device, cases)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted; measured so far:", file=sys.stderr)
    report(chosen, device, cases, f"inference-{chosen.model}-{device.type}-{chosen.dtype}")
    return harness.INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
