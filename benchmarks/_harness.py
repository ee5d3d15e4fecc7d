"""What the benchmarks share: turns, ratios, memory, results.

**Times.** Every variant runs once in each round, in an order that moves on by one each round, so a machine that slows
down slows all of them. What is quoted is the median, over the rounds, of the ratio of two variants in the same round.
On CUDA a run is timed between two events with the device idle before and after; elsewhere by the wall clock.

**Memory.** *Kept* is what autograd holds when the forward has ended: the tensors that it saves are counted by hooks,
each storage once, those of the model itself (weights, buffers, frozen projections) and of the input left out. *Live* is
what the allocator has handed out and not got back by then: it sees what code keeps behind autograd's back too. *Peak*
is the most that is handed out at one moment of a whole step, beyond what there was before it; gradients are part of it.
Both come from the allocator's own record: on CUDA its statistics, on the CPU the allocations and releases that the
profiler records. The process's own size is not used: it depends on what the C library gives back, and when.

**FLOPs** are those of the matrix products (and of attention) that a step really runs, two to a multiply-add, counted
while it runs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, final

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: nothing here needs a network
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is: its profiler tells of every start and stop

import torch
from torch import Tensor

MIB = 2**20
RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("torch", "transformers", "peft", "numpy", "kilotune")
Result = TypeVar("Result")
INTERRUPTED = 130  # the exit code of what Ctrl-C ended


# -- options --------------------------------------------------------------------------------------------


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all of them have; ``doc``'s first line says what the script is for."""
    made = argparse.ArgumentParser(description=(doc or "").strip().splitlines()[0])
    made.add_argument("--rounds", type=positive, default=rounds, help=f"turns that each variant gets ({rounds})")
    made.add_argument("--device", default="cpu", help="cpu (the default), or cuda")
    made.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base model (float32)")
    made.add_argument("--threads", type=positive, help="of torch on the CPU; by default as many as torch takes")
    made.add_argument("--out", type=Path, default=RESULTS, help="the folder for results (benchmarks/results)")
    return made


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above zero, got {value}")
    return value


def numbers(text: str) -> list[int]:
    """``1,16,512`` as a list, for argparse."""
    return [positive(word) for word in text.split(",")]


def device_of(chosen: argparse.Namespace) -> torch.device:
    """The device of ``--device``, with torch's threads set; exits with one line where there is no such device."""
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    try:
        device = torch.device(chosen.device)
    except RuntimeError:
        sys.exit(f"error: --device: expected cpu or cuda, got {chosen.device!r}")
    if device.type not in ("cpu", "cuda"):
        sys.exit(f"error: --device: expected cpu or cuda, got {chosen.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: torch finds no CUDA device here")
    return device


# -- times ----------------------------------------------------------------------------------------------


@final
class Progress:
    """One line on stderr: what runs, how far it is, and how long it will take yet."""

    def __init__(self, every: float = 10.0) -> None:
        self.every, self.last = every, -every  # seconds between lines where they cannot be overwritten

    def show(self, text: str) -> None:
        """Show ``text`` in place of the line before."""
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last >= self.every:
            print(text, file=sys.stderr, flush=True)
            self.last = time.monotonic()

    def clear(self) -> None:
        """Leave the line free for what is printed next."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """How long ``run`` takes, until the device has finished too."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    after: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    before.record()
    run()
    after.record()
    torch.cuda.synchronize(device)
    return float(before.elapsed_time(after)) / 1000.0


@final
@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; one value is its own quartiles."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@final
class Idleness:
    """How much of the processors' time went to other processes since this was made; None where it is not told."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of all processors: all there was, what was worked, and what this process worked."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, idle, wait, *interrupts = map(
            int, stat.read_text(encoding="utf-8").split("\n")[0].split()[1:8]
        )
        tick = float(os.sysconf("SC_CLK_TCK"))
        worked = user + nice + system + sum(interrupts)
        own = os.times()
        return (worked + idle + wait) / tick, worked / tick, own.user + own.system

    def others(self) -> float | None:
        """The share of other processes, 0 to 1."""
        now = self._now()
        if now is None or self.start is None or now[0] == self.start[0]:
            return None
        total, worked, own = (b - a for a, b in zip(self.start, now, strict=True))
        return min(1.0, max(0.0, (worked - own) / total))


@final
@dataclass
class Rounds:
    """Seconds of each variant in each round, complete rounds only; ``others``: see :class:`Idleness`."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    others: float | None = None

    def __str__(self) -> str:
        return f"{self.count} rounds{self.beside}"

    @property
    def beside(self) -> str:
        """What other processes had meanwhile, in words to go on with."""
        return "" if self.others is None else f", {self.others:.0%} of the CPU's time to other processes"

    @property
    def count(self) -> int:
        """How many rounds there are."""
        return min((len(taken) for taken in self.seconds.values()), default=0)

    def ratio(self, name: str, to: str) -> Spread | None:
        """How much longer ``name`` takes than ``to`` does in the same round; None where one was not measured."""
        if self.count == 0 or name not in self.seconds or to not in self.seconds:
            return None
        return Spread.of([a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)])


def take_turns(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    into: Rounds,
    progress: Progress,
    title: str,
) -> None:
    """Time each of ``runs`` once a round, the order moved on by one each round; only complete rounds count.

    KeyboardInterrupt goes on to the caller; what was measured by then is in ``into``.
    """
    names = list(runs)
    into.seconds.update({name: [] for name in names})
    start, idleness = time.monotonic(), Idleness()
    for number in range(rounds):
        left = "" if number == 0 else f", about {(time.monotonic() - start) / number * (rounds - number):.0f} s left"
        first = number % len(names)
        taken: dict[str, float] = {}
        for name in names[first:] + names[:first]:
            progress.show(f"{title}: round {number + 1} of {rounds}{left}, {name}")
            taken[name] = seconds_of(runs[name], device)
        for name in names:
            into.seconds[name].append(taken[name])
        into.others = idleness.others()
    progress.clear()


# -- memory and work ------------------------------------------------------------------------------------


@final
class _Box:
    """Holds a saved tensor for autograd: it lives as long as the node of the graph does that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of ``forward``'s result, each storage once.

    Args:
        forward: makes the loss.
        known: tensors whose storages do not count: weights, buffers, frozen projections, the input.

    """
    boxes: list[weakref.ref[_Box]] = []

    def pack(tensor: Tensor) -> _Box:
        box = _Box(tensor.detach())  # with its graph, an output would hold the node that holds the box
        boxes.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        loss = forward()
    left_out = {tensor.untyped_storage().data_ptr() for tensor in known}
    living = [box.tensor.untyped_storage() for ref in boxes if (box := ref()) is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in living}
    del loss  # the graph lived until here
    return sum(size for pointer, size in sizes.items() if pointer not in left_out)


def live_and_peak(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes handed out by the allocator during ``run``: still out while its result lives, and the most at a time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        live, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        del result
        return live - before, peak - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    live = peak = 0
    assert profile.profiler is not None
    for event in profile.profiler.kineto_results.events():  # in the order of time
        if event.name() == "[memory]":
            live += event.nbytes()  # negative for a release
            peak = max(peak, live)
    return live, peak


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Both products over all pairs, as torch counts them on a GPU: a causal mask halves nothing."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[2] * (width + value[3]))


def _attention_backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    return _attention_flops(query, key, value) * 5 // 2  # five products, where the forward has two


def flops_of(run: Callable[[], Result]) -> tuple[int, Result]:
    """FLOPs of the matrix products and of attention in ``run``, and its result."""
    from torch.utils.flop_counter import FlopCounterMode

    # torch has formulas for the GPU's kernels alone.
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        # Its hooks for all modules, which say in whose layer a product is, would have layers run in another way.
        counter.mod_tracker.__exit__()
        result = run()
    return int(counter.get_total_flops()), result


# -- results --------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Bar:
    """One number that the project promises: at most ``limit``. ``excused`` says why it does not apply."""

    what: str
    value: float | None
    limit: float
    excused: str = ""

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or why there is neither."""
        if self.value is None:
            return "not measured"
        return self.excused or ("PASS" if self.value <= self.limit else "FAIL")

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:.3f}"
        return f"{self.verdict:4}  {value:>7}  at most {self.limit:.2f}  {self.what}"


def judge(bars: Sequence[Bar]) -> int:
    """Print every bar; the exit code: 1 where one fails or was not measured, else 0."""
    print("\nBars:")
    for bar in bars:
        print(f"  {bar}")
    return int(any(bar.verdict in ("FAIL", "not measured") for bar in bars))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; the first column to the left, the others to the right."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    texts = [
        "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def processor() -> str:
    """The CPU's model, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on; no name of the host, nor of its user."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not there"
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def title_of(where: Mapping[str, Any]) -> str:
    """The machine in one line, for tables and plots."""
    place = where["gpu"] or f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"
    return f"{place}; torch {where['versions']['torch']}; {where['date']}"


def write_results(folder: Path, stem: str, chosen: argparse.Namespace, device: torch.device, body: Any) -> Path:
    """Write ``<stem>.json``: the machine, the options and what was measured; returns its path."""
    options = {key: value for key, value in vars(chosen).items() if key != "out"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    content = {"machine": machine(device), "options": options, "results": body}
    text = json.dumps(content, indent=1, default=lambda value: asdict(value))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def figure(columns: int, rows: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns), drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def save_figure(made: Any, folder: Path, stem: str) -> Path:
    """Write ``<stem>.png``; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.png"
    made.savefig(path, dpi=110, bbox_inches="tight")
    return path
