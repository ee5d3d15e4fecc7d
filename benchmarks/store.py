"""A million adapters in one file: how large, how fast to put and to get; and what packing does to outputs.

python benchmarks/store.py [--adapters 1000000] [--url sqlite:///...] [--page-sizes 512,1024,...] [--packing] [--bars]

The adapters are VeRA's of 24 layers, 1,536 numbers or 6,144 bytes each, with a metadata object and a tag. They are put
by ``put_many`` in batches of 1,000, making them included. Then random ones are read, one call of ``get`` each, which
also checks the hash; the store has been closed and opened before. ``--page-sizes`` compares SQLite's page sizes at the
given number of adapters. ``--packing`` trains a small model's adapters and measures what bfloat16 and int8 do to its
outputs. ``--bars``: at least 2,000 adapters a second put, ``get`` under 1 ms (median) and 5 ms (p99), and a file of at
most 1.1 of its payload; exit code 1 where not.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

import _harness as harness
from _harness import Bar, Progress
from kilotune import LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.fleet.store import AdapterStore, Contents, Item, open_store, sqlite

LAYERS, RANK, OUT = 24, 16, 48
READS, WRITES = 5000, 200
CONFIG = {
    "peft_type": "VERA",
    "r": RANK,
    "target_modules": ["q_proj", "v_proj"],
    "save_projection": True,
    "kilotune": {"format": 1, "save_projection": False},
}


@final
@dataclass(frozen=True)
class Result:
    """One store: rates in adapters a second, times in seconds."""

    what: str
    adapters: int
    put_rate: float
    get_median: float
    get_p99: float
    put_median: float
    put_p99: float
    list_rate: float
    read_rate: float
    payload_bytes: int
    store_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes on disk for each byte of numbers and metadata."""
        return self.store_bytes / self.payload_bytes


def contents(row: Tensor) -> Contents:
    """A VeRA adapter of ``row``'s 1,536 numbers."""
    tensors = {}
    for layer, part in enumerate(row.reshape(-1, RANK + OUT)):
        place = f"base_model.model.model.layers.{layer // 2}.self_attn.{'qv'[layer % 2]}_proj"
        tensors[f"{place}.vera_lambda_b"], tensors[f"{place}.vera_lambda_d"] = part[:OUT], part[OUT:]
    return Contents(CONFIG, tensors, {"format": "pt", "kilotune_sha256": ""})


def items(count: int, progress: Progress) -> Iterator[Item]:
    """Adapters with numbers, metadata and a tag of their own."""
    for i in range(count):
        if i % 10_000 == 0:
            progress.show(f"putting {i:,} of {count:,}")
        yield Item(
            f"user-{i:08d}",
            contents(torch.randn(LAYERS * (RANK + OUT))),
            {"user": i, "rows": 40 + i % 60},
            (f"group-{i % 10}",),
        )
    progress.clear()


def times(run: Any, count: int) -> tuple[float, float]:
    """(median, p99) seconds of ``count`` calls."""
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    taken.sort()
    return taken[count // 2], taken[int(count * 0.99)]


def rate(count: int, start: float) -> float:
    """Adapters a second since ``start``."""
    return count / (time.perf_counter() - start)


def measure(url: str, count: int, what: str) -> Result:
    """Fill a store that is not there yet, and read it."""
    with open_store(url) as store:
        start = time.perf_counter()
        store.put_many(items(count, Progress()))
        put_rate = rate(count, start)
    with open_store(url) as store:
        rng = random.Random(0)
        stats = store.stats()
        get = times(lambda: store.get(f"user-{rng.randrange(count):08d}"), READS)
        one = contents(torch.randn(LAYERS * (RANK + OUT)))
        put = times(lambda: store.put(f"user-{rng.randrange(count):08d}", one), WRITES)
        return Result(what, count, put_rate, *get, *put, *_streams(store), stats.payload_bytes, stats.store_bytes)


def _streams(store: AdapterStore) -> tuple[float, float]:
    """(listing, reading in bulk), adapters a second, over the first 50,000."""
    start = time.perf_counter()
    names = [info.name for info in store.ls(limit=50_000)]
    listed = rate(len(names), start)
    start = time.perf_counter()
    return listed, rate(sum(1 for _ in store.get_many(names)), start)


# -- what packing does to outputs -----------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Packing:
    """One adapter, packed: bytes, and how far its outputs are from those of the unpacked one."""

    method: str
    packing: str
    bytes: int
    of_change: float
    of_output: float


def trained(config: Any) -> tuple[nn.Module, PeftModel, Tensor]:
    """(a base, the base with an adapter that was trained on a task, inputs that it has not seen)."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    teacher = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    twin = nn.Sequential(*(type(m)(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in base))
    twin.load_state_dict(base.state_dict())
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(300):
        x = torch.randn(128, 64)
        loss = nn.functional.mse_loss(model(x), teacher(x).detach())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return twin, model.eval(), torch.randn(1024, 64)


def packings() -> list[Packing]:
    """The error of each packing, on outputs, relative to the change that the adapter makes and to the output."""
    found = []
    methods: dict[str, Any] = {
        "VeRA r 64": VeraConfig(r=64, target_modules="all-linear"),
        "LoRA r 8": LoraConfig(r=8, target_modules="all-linear"),
    }
    with tempfile.TemporaryDirectory() as folder, open_store(f"sqlite:///{folder}/a.db") as store, torch.no_grad():
        for method, config in methods.items():
            with torch.enable_grad():
                base, model, x = trained(config)
            wanted, before = model(x), base(x)
            for packing in ("float32", "bfloat16", "int8"):
                info = store.put(method, model, packing=packing)
                loaded = PeftModel.from_pretrained(base, store.get(method).file()).eval()
                error = (loaded(x) - wanted).norm()
                loaded.unload()
                of_change, of_output = float(error / (wanted - before).norm()), float(error / wanted.norm())
                found.append(Packing(method, packing, info.size, of_change, of_output))
    return found


# -- what is printed ------------------------------------------------------------------------------------


def report(chosen: argparse.Namespace, results: Sequence[Result], packed: Sequence[Packing]) -> None:
    """Print the tables, and write them."""
    device = torch.device("cpu")
    heads: list[str]
    print(f"\n{harness.title_of(harness.machine(device))}")
    if results:
        both = ["get ms", "p99", "put ms", "p99"]
        heads = ["", "adapters", "put/s", *both, "ls/s", "get_many/s", "payload MB", "disk/payload"]
        rows = [
            [
                r.what,
                f"{r.adapters:,}",
                f"{r.put_rate:,.0f}",
                *(f"{1e3 * s:.3f}" for s in (r.get_median, r.get_p99, r.put_median, r.put_p99)),
                f"{r.list_rate:,.0f}",
                f"{r.read_rate:,.0f}",
                f"{r.payload_bytes / 1e6:,.1f}",
                f"{r.ratio:.4f}",
            ]
            for r in results
        ]
        print("\n" + harness.table(heads, rows))
    if packed:
        heads = ["", "packing", "bytes", "error / change", "error / output"]
        lines = [[p.method, p.packing, str(p.bytes), f"{p.of_change:.1e}", f"{p.of_output:.1e}"] for p in packed]
        print("\n" + harness.table(heads, lines))
    stem = "store-packing" if packed else "store-pages" if chosen.page_sizes else "store"
    written = harness.write_results(chosen.out, stem, chosen, device, [*results, *packed])
    print(f"\nwritten: {written.name}")


def bars_of(result: Result) -> list[Bar]:
    """What the project promises."""
    return [
        Bar("seconds to put 2,000 adapters", 2000 / result.put_rate, 1.0),
        Bar("milliseconds of a get, median", 1e3 * result.get_median, 1.0),
        Bar("milliseconds of a get, p99", 1e3 * result.get_p99, 5.0),
        Bar("bytes on disk for a byte of payload", result.ratio, 1.1),
    ]


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=1)
    parser.add_argument("--adapters", type=harness.positive, default=1_000_000, help="(1000000)")
    parser.add_argument("--url", help="a store that is not there yet; by default a file that is removed again")
    parser.add_argument("--page-sizes", type=harness.numbers, help="compare SQLite's page sizes")
    parser.add_argument("--packing", action="store_true", help="what packing does to outputs, and nothing else")
    parser.add_argument("--bars", action="store_true", help="what the project promises, and whether it holds")
    chosen = parser.parse_args(words)
    if chosen.device != "cpu" or chosen.rounds != 1:
        parser.error("--device, --rounds: nothing here has turns or computes on a device")
    return chosen


def main(words: Sequence[str] | None = None) -> int:
    """Run with the command line's words; returns the exit code."""
    chosen = options(words)
    harness.device_of(chosen)
    if chosen.packing:
        report(chosen, [], packings())
        return 0
    results = []
    with tempfile.TemporaryDirectory() as folder:
        if chosen.page_sizes:
            for size in chosen.page_sizes:
                sqlite.PAGE_SIZE = size
                results.append(measure(f"sqlite:///{folder}/{size}.db", chosen.adapters, f"pages of {size}"))
        else:
            kind = (chosen.url or "sqlite").partition(":")[0]
            results.append(measure(chosen.url or f"sqlite:///{folder}/a.db", chosen.adapters, kind))
        report(chosen, results, [])
    return harness.judge(bars_of(results[0])) if chosen.bars else 0


if __name__ == "__main__":
    sys.exit(main())
