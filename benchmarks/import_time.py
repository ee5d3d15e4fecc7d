"""What `import kilotune` costs beside `import torch`, which it needs: fresh interpreters, taken in turns.

python benchmarks/import_time.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

STATEMENTS = ("import torch, numpy, safetensors", "import kilotune")


def seconds(statement: str) -> float:
    """Wall time of a fresh interpreter that runs ``statement``."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    for statement in STATEMENTS:
        seconds(statement)  # warm the file cache
    times: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for _ in range(rounds):
        for statement in STATEMENTS:
            times[statement].append(seconds(statement))
    print(f"{rounds} rounds in turns")
    for statement, taken in times.items():
        span = f"{min(taken):.2f} to {max(taken):.2f} s"
        print(f"  {statement:34} median {statistics.median(taken):.2f} s ({span})")
    base, ours = (times[statement] for statement in STATEMENTS)
    ratios = [mine / theirs for mine, theirs in zip(ours, base, strict=True)]
    print(f"  ratio                              median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
