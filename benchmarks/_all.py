"""What `make bench` runs, one script after the other: python benchmarks/_all.py [SCRIPT ...], by default all of them.

The exit code is 1 when one fails or a bar does not hold; the others run all the same. Ctrl-C ends all.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

HERE = Path(__file__).resolve().parent
INTERRUPTED = 130


@final
@dataclass(frozen=True)
class Run:
    """A script with its options, and the minutes that it takes on two idle cores."""

    minutes: float
    words: tuple[str, ...]


# What the project promises comes first.
RUNS = (
    Run(7, ("training", "--bars")),
    Run(45, ("training", "--ways")),
    Run(5, ("training", "--model", "bert", "--ways")),
    Run(5, ("inference",)),
    Run(3, ("adapters", "--bars")),
    Run(4, ("routing", "--bars")),
    Run(15, ("store", "--bars")),
    Run(0.2, ("store", "--packing")),
    Run(5, ("fleet", "--bars")),
    Run(15, ("serving", "--bars")),
    Run(30, ("learning", "--bars")),
    Run(0.2, ("projections",)),
    Run(0.2, ("merge_loss",)),
    Run(0.5, ("qlora_merge",)),
    Run(4, ("train_memory",)),
    Run(1, ("import_time",)),
    Run(9, ("vllm_decode",)),
    Run(150, ("defaults",)),
)


def call(command: Sequence[str]) -> int:
    """Run ``command`` to its end, which after Ctrl-C is to print what it has; its exit code."""
    with subprocess.Popen(command) as process:
        interrupted = False
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                interrupted = True
            else:
                return INTERRUPTED if interrupted else code


def main(words: Sequence[str]) -> int:
    """Run the scripts named, or all; returns the exit code."""
    names = dict.fromkeys(run.words[0] for run in RUNS)
    unknown = [word for word in words if word not in names]
    if unknown:
        print(f"error: no benchmark {unknown[0]!r}; there are {', '.join(names)}", file=sys.stderr)
        return 2
    chosen = [run for run in RUNS if not words or run.words[0] in words]
    print(
        f"{len(chosen)} benchmarks, about {sum(run.minutes for run in chosen):.0f} minutes on 2 idle cores", flush=True
    )
    failed = []
    for run in chosen:
        title = " ".join(run.words)
        print(f"\n== {title} (about {run.minutes:g} minutes)", flush=True)
        start = time.monotonic()
        code = call([sys.executable, str(HERE / f"{run.words[0]}.py"), *run.words[1:]])
        print(f"-- {title}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
        if code == INTERRUPTED:
            return code
        if code:
            failed.append(title)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall ran, and every bar holds")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
