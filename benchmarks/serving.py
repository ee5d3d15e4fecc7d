"""Many adapters served at once beside the base alone: throughput, first tokens, and adapters put while it runs.

python benchmarks/serving.py [--hidden 1024] [--layers 4] [--ranks 64,256] [--streams 64] [--tokens 32] [--rounds 5]
                             [--registered 4096] [--requests 800] [--clients 8] [--puts 20] [--shorts 20]
                             [--engine-only | --long-only] [--bars]

The model is Llama-shaped, with random weights and a tokenizer of bytes; all its linear layers but the prediction are
adapted with VeRA. It is saved to a temporary folder, and the store is an SQLite file there.

- **engine**: ``--streams`` requests at once, each of 32 tokens of prompt and ``--tokens`` of answer, for as many
  adapters and for the base alone, in turns on one engine in this process.
- **HTTP**: the same through ``kilotune serve`` in a process of its own, streamed; this process is the client.
- **first token**: ``--requests`` requests of ``--clients`` clients, each for an adapter drawn at random, to a server
  with 16 and to one with ``--registered`` adapters in its store, in turns of 100; of the time to the first token what
  99 of 100 stay within.
- **put**: an adapter is put through the API, and answers: from the first byte of the put to the first token.
- **long prompts**: the first token of ``--shorts`` short requests of one tenant, one after the other, alone and while
  another tenant sends prompts of 6,000 tokens without a pause, three at once; and how many tokens of such prompts a
  second are read alone. With 512 features and 6 layers, whatever the other sizes.

``--bars``: with adapters at least 0.75 of the base's throughput at r 64, at least 0.6 at r 256, at both levels; first
tokens with many registered at most 1.3 of with 16; a put answers within 100 ms (median); beside long prompts each
short request has its first token within 3 times of what it takes alone (median), or 1.5 s more where that is more; exit
code 1 where not.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import _harness as harness
import kilotune
from _harness import Bar, Progress, Rounds
from _models import Shape, build, twin
from kilotune.adapter_files.writing import state_of
from kilotune.fleet import open_store
from kilotune.fleet.store import Contents, Fingerprint
from kilotune.fleet.store.adapter_store import Item
from kilotune.serve.engine.continuous_batching import TransformersEngine
from kilotune.serve.engine.interface import AdapterKey, Generation, Sampling
from kilotune.serve.engine.tenant_adapters import AdapterRegistry
from kilotune.serve.http.keys import add_key

PROMPT = 32
FEW = 16
TURN = 100  # requests before it is the other server's turn
CPU = torch.device("cpu")
SUM = "kilotune_sha256"
LIMITS = {64: 0.75, 256: 0.6}
LONG = 6000  # tokens of a long prompt
FLOOD = 3  # of them at once
PAUSE = 0.3  # seconds between short requests, so that they come at any moment of a step


def tokenizer() -> Any:
    """One token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i + 4 for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


class Adapters:
    """Random adapters of one form, made as they are needed."""

    def __init__(self, base: Any, rank: int) -> None:
        config = kilotune.VeraConfig(r=rank, target_modules="all-linear")
        self.model = kilotune.get_peft_model(twin(base), config)
        self.config, self.tensors, header = state_of(self.model.installed("default"))
        self.header = {key: value for key, value in header.items() if key != SUM}
        self.base = Fingerprint.of(base)

    def contents(self, seed: int) -> Contents:
        """One of them."""
        generator = torch.Generator().manual_seed(seed)
        own = {key: 0.02 * torch.randn(value.shape, generator=generator) for key, value in self.tensors.items()}
        return Contents(self.config, own, self.header, self.base)

    def fill(self, url: str, count: int) -> list[AdapterKey]:
        """Put so many into a store, as u0, u1, ...; their keys."""
        with open_store(url, base=self.base) as store:
            store.put_many(Item(f"u{i}", self.contents(i)) for i in range(count))
            return [AdapterKey("default", v.name, v.version, v.sha256) for v in store.ls()]


# -- the engine ------------------------------------------------------------------------------------------


async def _stream(engine: TransformersEngine, i: int, key: AdapterKey | None, tokens: int) -> None:
    prompt = tuple(random.Random(i).randrange(4, 256) for _ in range(PROMPT))
    sampling = Sampling(max_tokens=tokens, temperature=0.0)
    request = Generation(id=str(i), tenant=f"t{i}", adapter=key, prompt=prompt, sampling=sampling)
    async for _ in engine.generate(request):
        pass


def engine_runs(
    engine: TransformersEngine, keys: Sequence[AdapterKey | None], tokens: int
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""

    async def together(own: Sequence[AdapterKey | None]) -> None:
        await asyncio.gather(*(_stream(engine, i, key, tokens) for i, key in enumerate(own)))

    return {
        "base": lambda: asyncio.run(together([None] * len(keys))),
        "adapters": lambda: asyncio.run(together(keys)),
    }


def engine_level(base: Any, rank: int, folder: Path, chosen: argparse.Namespace, progress: Progress) -> Rounds:
    """Base and adapters in turns, after a round of each that is not counted."""
    url = f"sqlite:///{folder}/engine-{rank}.db"
    keys = Adapters(base, rank).fill(url, chosen.streams)
    registry = AdapterRegistry(url, twin(base))
    engine = TransformersEngine(registry.model.get_base_model(), None, registry, max_running=chosen.streams)
    engine.start()
    runs, times = engine_runs(engine, keys, chosen.tokens), Rounds()
    for run in engine_runs(engine, keys, 4).values():
        run()
    harness.take_turns(runs, chosen.rounds, CPU, times, progress, f"engine, r {rank}")
    engine.stop()
    registry.close()
    return times


# -- over HTTP -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A server: its address, and keys of a tenant, of another one, and of a manager."""

    address: str
    tenant: str
    other: str
    manager: str

    def client(self, key: str | None = None) -> Any:
        """A client with the tenant's key, or another one, and as many connections as it needs."""
        import httpx2

        headers = {"Authorization": f"Bearer {key or self.tenant}"}
        limits = httpx2.Limits(max_connections=None)
        return httpx2.AsyncClient(base_url=self.address, timeout=600, limits=limits, headers=headers)


@contextmanager
def server(model: Path, store: str, threads: int | None) -> Iterator[Place]:
    """``kilotune serve`` in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", str(model), "--store", store, "--port", str(port), "--name", "base"]
    keys = model / f"keys-{port}.json"
    named = [
        add_key(keys, role, space)[0] for role, space in (("tenant", "default"), ("tenant", "b"), ("manager", None))
    ]
    place = Place(f"http://127.0.0.1:{port}", *named)
    words += ["--keys", str(keys)]
    more = ["--set", "max_requests=512", "--set", "max_requests_per_tenant=512"]
    run = "import sys, torch; n = int(sys.argv.pop(1)); n and torch.set_num_threads(n); import kilotune.cli.main as m; "
    run += "sys.exit(m.main())"
    command = [sys.executable, "-c", run, str(threads or 0), *words, *more]
    with open(model / "server.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(place.address, process)
        yield place
    finally:
        process.terminate()
        process.wait(60)


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server is ready."""
    for _ in range(3000):
        if process.poll() is not None:
            raise RuntimeError("the server ended; see server.log")
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=10):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError("the server did not become ready")


async def ask(client: Any, name: str, i: int, tokens: int, prompt: int = PROMPT) -> tuple[float, int]:
    """(seconds to the first token, tokens) of one streamed answer."""
    letters = "".join(chr(random.Random(i).randrange(97, 123)) for i in range(i, i + prompt))
    body = {"model": name, "prompt": letters, "max_tokens": tokens, "temperature": 0, "stream": True}
    start, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                first = first or time.perf_counter() - start
                count += 1
    return first, count


async def all_at_once(place: Place, names: Sequence[str], tokens: int) -> None:
    """One stream for each name, all together."""
    async with place.client() as client:
        await asyncio.gather(*(ask(client, name, i, tokens) for i, name in enumerate(names)))


async def first_tokens(place: Place, names: Sequence[str], chosen: argparse.Namespace, seed: int) -> list[float]:
    """Seconds to the first token of a turn's requests, of clients that ask one thing after the other."""
    draws = random.Random(seed)
    todo = iter([(i, draws.choice(names)) for i in range(seed * TURN, (seed + 1) * TURN)])
    found: list[float] = []
    async with place.client() as client:

        async def work() -> None:
            for i, name in todo:
                found.append((await ask(client, name, i, 4))[0])

        await asyncio.gather(*(work() for _ in range(chosen.clients)))
    return found


async def puts(place: Place, folders: Sequence[Path]) -> list[tuple[float, float]]:
    """(seconds of the put, seconds from its start to the first token of its answer) of each."""
    taken = []
    own = {"Authorization": f"Bearer {place.manager}"}
    async with place.client() as client:
        for i, folder in enumerate(folders):
            start = time.perf_counter()
            files = {
                "config": (folder / "adapter_config.json").read_bytes(),
                "weights": (folder / "adapter_model.safetensors").read_bytes(),
            }
            answer = await client.put(f"/manage/default/adapters/new{i}", files=files, headers=own)
            if answer.status_code != 201:
                raise RuntimeError(answer.text)
            middle = time.perf_counter()
            first, _ = await ask(client, f"new{i}", i, 1)
            taken.append((middle - start, middle - start + first))
    return taken


def http_level(
    base: Any, rank: int, folder: Path, chosen: argparse.Namespace, progress: Progress, lone: bool
) -> dict[str, Any]:
    """Throughput at this rank; with ``lone`` first tokens and puts as well."""
    made = Adapters(base, rank)
    few, many = (f"sqlite:///{folder}/{word}-{rank}.db" for word in ("few", "many"))
    made.fill(few, max(FEW, chosen.streams))
    names = [f"u{i}" for i in range(chosen.streams)]
    times = Rounds()
    found: dict[str, Any] = {}
    with server(folder / "model", few, chosen.threads) as place:
        runs: dict[str, Callable[[], object]] = {
            "base": lambda: asyncio.run(all_at_once(place, ["base"] * chosen.streams, chosen.tokens)),
            "adapters": lambda: asyncio.run(all_at_once(place, names, chosen.tokens)),
        }
        for run in runs.values():
            run()
        harness.take_turns(runs, chosen.rounds, CPU, times, progress, f"HTTP, r {rank}")
        if lone:
            folders = []
            for i in range(chosen.puts):
                folders.append(folder / f"new{i}")
                save(made, 10_000 + i, folders[-1])
            found["puts"] = asyncio.run(puts(place, folders))
            progress.show(f"registering {chosen.registered} adapters")
            made.fill(many, chosen.registered)
            with server(folder / "model", many, chosen.threads) as other:
                found["few"], found["many"] = both(place, other, chosen, progress)
    return {"times": times, **found}


def both(few: Place, many: Place, chosen: argparse.Namespace, progress: Progress) -> tuple[list[float], list[float]]:
    """First tokens of both servers, in turns after one that is not counted."""
    every = [f"u{i}" for i in range(chosen.registered)]
    found: tuple[list[float], list[float]] = ([], [])
    turns = -(-chosen.requests // TURN)
    for turn in range(turns + 1):
        progress.show(f"first tokens, turn {turn} of {turns}")
        for place, names, taken in ((few, every[:FEW], found[0]), (many, every, found[1]))[:: 1 if turn % 2 else -1]:
            taken += asyncio.run(first_tokens(place, names, chosen, turn))[: None if turn else 0]
    return found


async def short_ones(place: Place, flooded: bool, count: int) -> list[float]:
    """Seconds to the first tokens of short requests, alone or beside another tenant's long prompts."""
    found, seeds = list[float](), iter(range(10**6, 10**9, LONG))
    async with place.client() as client, place.client(place.other) as other:

        async def flood() -> None:
            while True:
                await ask(other, "base", next(seeds), 1, LONG)

        floods = [asyncio.create_task(flood()) for _ in range(FLOOD if flooded else 0)]
        await asyncio.sleep(2.0 if flooded else 0.0)
        for i in range(count):
            found.append((await ask(client, "u0", i, 1, 10))[0])
            await asyncio.sleep(PAUSE)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
    return found


def long_level(folder: Path, chosen: argparse.Namespace, progress: Progress) -> dict[str, list[float]]:
    """Short requests alone, and beside long prompts; long prompts alone."""
    base = build(Shape("llama", 512, 6), 8192, CPU, torch.float32).eval()
    base.save_pretrained(folder / "long")
    tokenizer().save_pretrained(folder / "long")
    store = f"sqlite:///{folder}/long.db"
    Adapters(base, 64).fill(store, 1)
    with server(folder / "long", store, chosen.threads) as place:
        asyncio.run(short_ones(place, False, 3))
        progress.show("short requests alone")
        alone = asyncio.run(short_ones(place, False, chosen.shorts))
        progress.show("long prompts alone")
        seconds = asyncio.run(long_alone(place))
        progress.show("short requests beside long prompts")
        beside = asyncio.run(short_ones(place, True, chosen.shorts))
    return {"alone": alone, "beside": beside, "long": seconds}


async def long_alone(place: Place) -> list[float]:
    """Seconds to the first token of long prompts, one after the other; the first one is not counted."""
    async with place.client(place.other) as other:
        return [(await ask(other, "base", LONG * i, 1, LONG))[0] for i in range(4)][1:]


def save(made: Adapters, seed: int, folder: Path) -> None:
    """An adapter as two files."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in made.model.adapter_parameters():
        parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    made.model.save_pretrained(folder)


def p99(seconds: Sequence[float]) -> float:
    """What 99 of 100 stay within."""
    return statistics.quantiles(seconds, n=100, method="inclusive")[98]


# -- all of it -------------------------------------------------------------------------------------------


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--hidden", type=harness.positive, default=1024)
    parser.add_argument("--layers", type=harness.positive, default=4)
    parser.add_argument("--ranks", type=harness.numbers, default=[64, 256])
    parser.add_argument("--streams", type=harness.positive, default=64)
    parser.add_argument("--tokens", type=harness.positive, default=32)
    parser.add_argument("--registered", type=harness.positive, default=4096)
    parser.add_argument("--requests", type=harness.positive, default=800)
    parser.add_argument("--clients", type=harness.positive, default=8)
    parser.add_argument("--puts", type=harness.positive, default=20)
    parser.add_argument("--shorts", type=harness.positive, default=20)
    parser.add_argument("--engine-only", action="store_true", help="not through HTTP")
    parser.add_argument("--long-only", action="store_true", help="short requests beside long prompts, and nothing else")
    parser.add_argument("--bars", action="store_true", help="what the project promises, and whether it holds")
    return parser.parse_args(words)


def bars_of(engine: dict[int, Rounds], http: dict[int, dict[str, Any]], long: dict[str, list[float]]) -> list[Bar]:
    """What the project promises; times over the base's, so limits are the inverse of the throughput's."""
    bars = []
    if long:
        alone = statistics.median(long["alone"])
        what = "seconds to the first token of a short request beside another's long prompts, at most"
        bars.append(Bar(what, max(long["beside"]), max(3 * alone, alone + 1.5)))
    for where, by_rank in (("engine", engine), ("HTTP", {rank: one["times"] for rank, one in http.items()})):
        for rank, times in by_rank.items():
            if rank in LIMITS:
                found = times.ratio("adapters", "base")
                what = f"{where}, r {rank}: time for all adapters over the base's"
                bars.append(Bar(what, None if found is None else found.median, 1 / LIMITS[rank]))
    for one in http.values():
        if "many" in one:
            bars.append(Bar("p99 of first tokens, many registered over 16", p99(one["many"]) / p99(one["few"]), 1.3))
            total = statistics.median(total for _, total in one["puts"])
            bars.append(Bar("milliseconds of a put and its first token, median", 1e3 * total, 100.0))
    return bars


def report(
    chosen: argparse.Namespace,
    engine: dict[int, Rounds],
    http: dict[int, dict[str, Any]],
    long: dict[str, list[float]],
) -> None:
    """Tables on stdout."""
    rows = []
    for where, by_rank in (("engine", engine), ("HTTP", {rank: one["times"] for rank, one in http.items()})):
        for rank, times in by_rank.items():
            speed = [
                chosen.streams * chosen.tokens / statistics.median(times.seconds[name]) for name in ("base", "adapters")
            ]
            ratio = times.ratio("adapters", "base")
            rows.append([f"{where}, r {rank}", f"{speed[0]:.0f}", f"{speed[1]:.0f}", str(ratio)])
    if rows:
        print(harness.table(["", "base, tokens/s", "adapters, tokens/s", "time / base (quartiles)"], rows))
    for one in http.values():
        if "many" in one:
            for word, count in (("few", FEW), ("many", chosen.registered)):
                middle = statistics.median(one[word])
                print(
                    f"first token, {count} registered: median {1e3 * middle:.0f} ms, p99 {1e3 * p99(one[word]):.0f} ms"
                )
            put, total = (1e3 * statistics.median(each) for each in zip(*one["puts"], strict=True))
            worst = 1e3 * max(each for _, each in one["puts"])
            print(f"put: {put:.0f} ms; to the first token of its answer {total:.0f} ms, at most {worst:.0f} ms")
    if long:
        for word in ("alone", "beside"):
            middle, worst = 1e3 * statistics.median(long[word]), 1e3 * max(long[word])
            where = "alone" if word == "alone" else "beside another tenant's long prompts"
            print(f"first token of short requests {where}: median {middle:.0f} ms, at most {worst:.0f} ms")
        print(f"long prompts alone: {LONG / statistics.median(long['long']):.0f} tokens/s")


def main(words: Sequence[str] | None = None) -> int:
    """Run with the command line's words; returns the exit code."""
    chosen = options(words)
    device, progress = harness.device_of(chosen), Progress()
    shape = Shape("llama", chosen.hidden, chosen.layers)
    base = build(shape, 512, device, torch.float32).eval()
    engine: dict[int, Rounds] = {}
    http: dict[int, dict[str, Any]] = {}
    long: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base.save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        for i, rank in enumerate([] if chosen.long_only else chosen.ranks):
            engine[rank] = engine_level(base, rank, folder, chosen, progress)
            if not chosen.engine_only:
                http[rank] = http_level(base, rank, folder, chosen, progress, lone=i == 0)
        if not chosen.engine_only:
            long = long_level(folder, chosen, progress)
    progress.clear()
    where = harness.title_of(harness.machine(device))
    size = "" if chosen.long_only else f"hidden {chosen.hidden}, {chosen.layers} layers, {chosen.streams} streams; "
    print(f"\n{size}{where}\n")
    report(chosen, engine, http, long)
    body = {"engine": engine, "http": http, "long": long}
    print("written: " + harness.write_results(chosen.out, "serving-cpu-float32", chosen, device, body).name)
    return harness.judge(bars_of(engine, http, long)) if chosen.bars else 0


if __name__ == "__main__":
    sys.exit(main())
