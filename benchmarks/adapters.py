"""Putting adapters into a model: the first, the second, ... the thousandth, new and from a folder; kilotune and PEFT.

python benchmarks/adapters.py [--method vera|lora] [--rank 256] [--hidden 64] [--layers 4] [--adapters 1000]
                              [--peft-adapters 100] [--rounds 3] [--bars]

The model is Llama-shaped, all its linear layers are adapted (28 with 4 layers). *New*: the first is ``get_peft_model``,
which wraps the model and makes the projections, the others are ``add_adapter``. *Loaded*: the first is
``PeftModel.from_pretrained``, the others ``load_adapter``, all from one folder. The times of the n-th are the median
over the rounds, each with a fresh model; for n of 10 and more, of the last tenth of the adapters up to it in each
round, so that one slow call does not decide. PEFT is run to ``--peft-adapters`` only: each of its adapters takes longer
than the one before it.

``--bars``: the 1,000th (the last of ``--adapters``) takes at most 1.5 times the first; exit code 1 where not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch

import _harness as harness
import kilotune
from _harness import Bar, Progress, Spread
from _models import Shape, build, linear_layers, twin

LIMIT = 1.5
MARKS = (1, 2, 3, 10, 30, 100, 300, 1000, 3000, 10000)


@final
@dataclass
class Series:
    """Seconds of the first, second, ... adapter, a list for each round."""

    name: str
    rounds: list[list[float]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """How many adapters every round has."""
        return min((len(taken) for taken in self.rounds), default=0)

    def drop_unfinished(self) -> None:
        """Forget a last round that was broken off, unless there is no other."""
        self.rounds = [taken for taken in self.rounds if len(taken) == len(self.rounds[0])]

    def at(self, number: int) -> Spread:
        """Seconds of adapter ``number`` (from 1), over the rounds."""
        first = number - max(1, number // 10)
        return Spread.of([statistics.median(taken[first:number]) for taken in self.rounds])

    def ratio(self, number: int, to: int) -> float | None:
        """How much longer adapter ``number`` took than adapter ``to``."""
        return self.at(number).median / self.at(to).median if number <= self.length else None


def config_of(library: str, method: str, rank: int) -> Any:
    """The same configuration for both libraries, new at every call."""
    if library == "peft":
        import peft

        if method == "vera":
            return peft.VeraConfig(r=rank, target_modules="all-linear")
        return peft.LoraConfig(r=rank, target_modules="all-linear")
    if method == "vera":
        return kilotune.VeraConfig(r=rank, target_modules="all-linear")
    return kilotune.LoraConfig(r=rank, target_modules="all-linear")


@final
class Adding:
    """Puts adapters into a model of its own, one at each call: new ones, or from a folder."""

    def __init__(self, base: Any, library: str, method: str, rank: int, folder: Path | None) -> None:
        self.base, self.library, self.method, self.rank, self.folder = twin(base), library, method, rank, folder
        self.model: Any = None

    def __call__(self, number: int) -> float:
        """Put in adapter ``number`` (from 1); the seconds it took, without making the config."""
        config, name = config_of(self.library, self.method, self.rank), f"adapter-{number}"
        put = self._first if self.model is None else self._next
        return harness.seconds_of(lambda: put(config, name), torch.device("cpu"))

    def _first(self, config: Any, name: str) -> None:
        import peft

        library = peft if self.library == "peft" else kilotune
        if self.folder is None:
            self.model = library.get_peft_model(self.base, config, adapter_name=name)
        else:
            self.model = library.PeftModel.from_pretrained(self.base, str(self.folder), adapter_name=name)

    def _next(self, config: Any, name: str) -> None:
        if self.folder is None:
            self.model.add_adapter(name, config)
        else:
            self.model.load_adapter(str(self.folder), name)

    def check(self, count: int, layers: int) -> None:
        """That ``count`` adapters are there, in ``layers`` layers."""
        where = self.model.base_model.targeted_module_names if self.library == "peft" else self.model.adapted_layers()
        if len(self.model.peft_config) != count or len(where) != layers:
            raise AssertionError(f"{self.library}: {len(self.model.peft_config)} adapters in {len(where)} layers")


def measure(chosen: argparse.Namespace, found: dict[str, Series]) -> None:
    """Fill ``found``, round by round."""
    shape = Shape("llama", chosen.hidden, chosen.layers)
    base = build(shape, 512, torch.device("cpu"), harness.DTYPES[chosen.dtype])
    layers = len(linear_layers(base, shape))
    progress = Progress()
    limits = {"kilotune": chosen.adapters, "peft": min(chosen.adapters, chosen.peft_adapters)}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {library: Path(temporary) / library for library in limits}
        for library, folder in folders.items():
            made = Adding(base, library, chosen.method, chosen.rank, None)
            made(1)  # and what is made at first use is made
            made.model.save_pretrained(str(folder), selected_adapters=["adapter-1"])
        kinds: list[tuple[str, str, Path | None]] = [
            (f"{library} {what}", library, folders[library] / "adapter-1" if what == "loaded" else None)
            for what in ("new", "loaded")
            for library in limits
        ]
        for number in range(chosen.rounds):
            first = number % len(kinds)
            for name, library, source in kinds[first:] + kinds[:first]:
                adding = Adding(base, library, chosen.method, chosen.rank, source)
                taken: list[float] = []
                found.setdefault(name, Series(name)).rounds.append(taken)
                for i in range(1, limits[library] + 1):
                    taken.append(adding(i))
                    progress.show(f"round {number + 1} of {chosen.rounds}: {name}, {i} of {limits[library]}")
                adding.check(limits[library], layers)
    progress.clear()


# -- what is printed ------------------------------------------------------------------------------------


def marks(chosen: argparse.Namespace, found: dict[str, Series]) -> list[int]:
    """The adapters that get a column."""
    most = max(series.length for series in found.values())
    return sorted({number for number in (*MARKS, most) if number <= most})


def rows_of(series: Series, numbers: Sequence[int]) -> list[str]:
    """One line of the table."""
    times = [f"{series.at(n).median * 1e3:.1f}" if n <= series.length else "-" for n in numbers]
    last = series.length
    ratios = [series.ratio(last, to) if last > to else None for to in (1, 2)]
    return [series.name, *times, str(last), *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]


def report(chosen: argparse.Namespace, found: dict[str, Series], stem: str) -> None:
    """Print the table; write it and the plot."""
    for series in found.values():
        series.drop_unfinished()
    done = {name: series for name, series in found.items() if series.length}
    if not done:
        return
    device = torch.device("cpu")
    where, numbers = harness.title_of(harness.machine(device)), marks(chosen, done)
    what = f"{chosen.method} r {chosen.rank}, hidden {chosen.hidden}, {chosen.layers} layers"
    print(f"\nMilliseconds to put in the n-th adapter; {what}; {chosen.rounds} rounds at most; {where}\n")
    heads = ["", *(f"n = {number}" for number in numbers), "last", "last / first", "last / second"]
    print(harness.table(heads, [rows_of(series, numbers) for series in done.values()]))
    written = [harness.write_results(chosen.out, stem, chosen, device, list(done.values())), draw(done, where, chosen)]
    print("\nwritten: " + ", ".join(path.name for path in written))


def draw(found: dict[str, Series], where: str, chosen: argparse.Namespace) -> Path:
    """Milliseconds against the adapter's number, both logarithmic; returns the file's path."""
    made, axes = harness.figure(1, 1, 8.0, 5.0)
    axis = axes[0][0]
    for name, series in found.items():
        middle = [statistics.median(taken[i] for taken in series.rounds) * 1e3 for i in range(series.length)]
        colour = "#d0803c" if name.startswith("peft") else "#2f6db3"
        style = ":" if name.endswith("loaded") else "-"
        axis.plot(range(1, series.length + 1), middle, color=colour, linestyle=style, linewidth=1.0, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("adapter number")
    axis.set_ylabel("milliseconds to put it in")
    axis.legend()
    axis.set_title(where, fontsize=8)
    return harness.save_figure(made, chosen.out, f"adapters-{chosen.method}")


def bars_of(found: dict[str, Series]) -> list[Bar]:
    """What the project promises: the last adapter at most 1.5 times the first."""
    bars = []
    for name in ("kilotune new", "kilotune loaded"):
        series = found.get(name, Series(name))
        value = series.ratio(series.length, 1) if series.length > 1 else None
        bars.append(Bar(f"{name}: adapter {series.length} over the first", value, LIMIT))
    return bars


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--method", choices=("vera", "lora"), default="vera")
    parser.add_argument("--rank", type=harness.positive, default=256)
    parser.add_argument("--hidden", type=harness.positive, default=64, help="a multiple of 64 (64)")
    parser.add_argument("--layers", type=harness.positive, default=4)
    parser.add_argument("--adapters", type=harness.positive, default=1000, help="of kilotune (1000)")
    parser.add_argument("--peft-adapters", type=harness.positive, default=100, help="of PEFT (100)")
    parser.add_argument("--bars", action="store_true", help="what the project promises, and whether it holds")
    chosen = parser.parse_args(words)
    if chosen.device != "cpu":
        parser.error("--device: only cpu; nothing here computes")
    return chosen


def main(words: Sequence[str] | None = None) -> int:
    """Run with the command line's words; returns the exit code."""
    chosen = options(words)
    harness.device_of(chosen)
    found: dict[str, Series] = {}
    interrupted = False
    try:
        measure(chosen, found)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted; measured so far:", file=sys.stderr)
    report(chosen, found, f"adapters-{chosen.method}")
    if interrupted:
        return harness.INTERRUPTED
    return harness.judge(bars_of(found)) if chosen.bars else 0


if __name__ == "__main__":
    sys.exit(main())
