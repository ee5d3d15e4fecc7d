"""How long it takes to make the frozen matrices: rows of U_A from a seed, on one core.

python benchmarks/projections.py [--rows 1000] [--columns 16384] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from kilotune.projections.matrices import unit_rows


def peft_rows(seed: int, rows: int, columns: int) -> None:
    """The same number of numbers from torch's generator, as PEFT draws them: not the same on every machine."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    torch.empty(rows, columns).uniform_(-1, 1, generator=generator)


def seconds_of_rounds(rounds: int, rows: int, columns: int) -> tuple[list[float], list[float]]:
    """Seconds of each round, ours and torch's, taken in turns."""
    ours, theirs = [], []
    for seed in range(rounds):
        start = time.perf_counter()
        unit_rows(seed, 0, rows, columns)
        middle = time.perf_counter()
        peft_rows(seed, rows, columns)
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--columns", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    unit_rows(0, 0, 8, chosen.columns)  # warm
    ours, theirs = seconds_of_rounds(chosen.rounds, chosen.rows, chosen.columns)
    million = chosen.rows * chosen.columns / 1e6
    print(f"{chosen.rows} rows of {chosen.columns}, {million:.1f} M numbers, {chosen.rounds} rounds, one core")
    for name, times in (("kilotune.projections.matrices.unit_rows", ours), ("torch uniform_ (PEFT's way)", theirs)):
        middle = statistics.median(times)
        span = f"{min(times):.3f} to {max(times):.3f} s"
        print(f"  {name:32} median {middle:.3f} s ({span}), {million / middle:.0f} M numbers a second")
    print(f"  versions: torch {torch.__version__}, numpy {np.__version__}")


if __name__ == "__main__":
    main()
