"""A service that learns while it answers: what training costs who is answered, and how many jobs a minute it does.

python benchmarks/learning.py [--model smollm2] [--streams 16] [--tokens 32] [--seconds 20] [--shares 0.25,0.5]
                              [--rank 256] [--row 46] [--pass-tokens 128] [--jobs 256] [--rounds 9]
                              [--seeds 3] [--facts 20] [--controls 20] [--last-blocks 8]
                              [--only beside|jobs|scope|users|corrections] [--bars]

- **beside**: ``--streams`` streams, each one request after the other (32 tokens of prompt, ``--tokens`` of answer) for
  ``--seconds``, alone and while four VeRA adapters of rank ``--rank`` on all linear layers learn rows of ``--row``
  tokens without a pause, at each share of a core; in turns on one engine over one copy of the weights. Tokens a second,
  the time to the first token that 99 of 100 stay within, and how much of the processor training had.
- **jobs**: ``--jobs`` jobs of 16 rows, four steps each, of as many namespaces, sent to a service that runs, from the
  first one's file to the last one's model, on the model of fleet.py; beside PEFT, one by one, from start to the
  adapter's tensors. And beside the base alone, forward and backward of the same rows in passes of the same size, which
  is what no way of mixing comes below.
- **scope**: of corrections.jsonl, scope.jsonl and scope_unseen.jsonl (which nobody had looked at when the bound was
  chosen), how many paraphrases of a question a personal model answers that was taught that question, and how many
  other questions one answers that was taught all of them.
- **users**: as many users as there are facts give one correction each, all at once: how many a minute are learned.
- **corrections**: the facts of corrections.jsonl are taught one after another to one user, in an order of each of
  ``--seeds``, with a pause of 0 and the gate on, by LoRA of rank 8 in the ``--last-blocks``: seconds from the
  correction to the exact greedy answer, and at the end how many facts, paraphrases (by their key word) and controls
  (24 tokens as the base says them) are right.

``--model`` is a folder, a name such as smollm2, or ``toy`` (256 features, 4 layers).

``--bars``: beside training at a share, tokens a second are at least 0.97 of (1 - share / cores) of those alone, and the
first token's 99 % at most 1.5 times; jobs at least 3 times as many a minute as PEFT; a correction within 20 s (median)
and 40 s (95 %), of 20 facts 18 right at the end, 14 paraphrases, 18 of 20 controls; 8 corrections of different users a
minute; exit code 1 where not.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import _harness as harness
import fleet
import kilotune
from _corrections import Taught, judged, teach, together
from _harness import Bar, Progress, Rounds
from _models import Shape, build
from kilotune.fleet import open_store
from kilotune.fleet.stepper.adam import Adam
from kilotune.fleet.stepper.operations import ForwardBackward, OptimStep
from kilotune.fleet.store.documents import Documents
from kilotune.serve.engine.continuous_batching import TransformersEngine
from kilotune.serve.engine.cores import apart, compute_on
from kilotune.serve.engine.interface import Generation, Sampling, Token
from kilotune.serve.engine.tenant_adapters import AdapterRegistry
from kilotune.serve.learning.jobs import FILE, JOB, Asked, JobLimits, Jobs
from kilotune.serve.learning.learner import Learner, LearningSettings
from kilotune.serve.learning.runner import JobRunner
from kilotune.serve.learning.share import Share
from kilotune.serve.learning.training_file import Example, TrainingFile
from kilotune.serve.twin import twin_of

PROMPT, LEARNING = 32, 4
CPU = torch.device("cpu")
ALONE, TOY = "alone", "toy"
PASS = 64  # jobs in a pass
WORDS = ("scope", "users", "corrections")  # what is measured with questions


def base_of(name: str) -> Any:
    """The model that answers and is trained on, loaded as the server does it."""
    if name == TOY:
        return apart(lambda: build(Shape("llama", 256, 4), 512, CPU, torch.float32).eval())
    from kilotune.train.running.base_model import load_base
    from kilotune.train.settings.sections import ModelSettings
    from kilotune.train.tasks import TASKS

    source = ModelSettings(base=name, dtype="float32")
    return apart(lambda: load_base(source, TASKS["causal-lm"](), None, CPU).model.eval())


@dataclass
class Heard:
    """What streams were told. firsts: seconds to first tokens."""

    tokens: int = 0
    firsts: list[float] = field(default_factory=list)


async def _stream(engine: TransformersEngine, number: int, tokens: int, until: float, heard: Heard) -> None:
    draws = random.Random(number)
    while time.monotonic() < until:
        prompt = tuple(draws.randrange(4, 256) for _ in range(PROMPT))
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        asked, first = time.monotonic(), True
        request = Generation(id=f"{number}", tenant=f"t{number}", adapter=None, prompt=prompt, sampling=sampling)
        async for item in engine.generate(request):
            if isinstance(item, Token):
                if first:
                    heard.firsts.append(time.monotonic() - asked)
                    first = False
                heard.tokens += time.monotonic() < until


def streams(engine: TransformersEngine, chosen: argparse.Namespace) -> Heard:
    """All streams for as long as they run."""
    heard = Heard()

    async def run() -> None:
        until = time.monotonic() + chosen.seconds
        await asyncio.gather(*(_stream(engine, i, chosen.tokens, until, heard) for i in range(chosen.streams)))

    asyncio.run(run())
    return heard


def feed(learner: Learner, chosen: argparse.Namespace, vocabulary: int) -> None:
    """Keep each model's queue filled."""
    draws = random.Random(1)
    for i in range(LEARNING):
        ids = [draws.randrange(4, min(256, vocabulary)) for _ in range(chosen.row)]
        row = {"input_ids": ids, "labels": [*([-100] * (chosen.row // 2)), *ids[chosen.row // 2 :]]}
        for _ in range(200):
            learner.submit(f"m{i}", ForwardBackward([row]))
            learner.submit(f"m{i}", OptimStep(Adam(rate=1e-3)))


def beside(chosen: argparse.Namespace, progress: Progress) -> tuple[dict[str, list[Any]], Rounds]:
    """By share, (tokens a second, 99 % of first tokens, cores of training) of each round."""
    base = base_of(chosen.model)
    twin = twin_of(base)
    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        registry = AdapterRegistry(f"sqlite:///{folder}/adapters.db", base)
        engine = TransformersEngine(base, None, registry, max_running=chosen.streams)
        engine.start()
        times, idle = Rounds(), harness.Idleness()
        names: dict[str, float | None] = {ALONE: None, **{f"share {share}": share for share in chosen.shares}}
        for number in range(-1, chosen.rounds):  # the first is for caches
            order = list(names)
            first = number % len(order)
            for name in order[first:] + order[:first]:
                progress.show(f"beside: round {number + 1} of {chosen.rounds}, {name}")
                taken = _one(engine, registry, twin, names[name], chosen)
                if number >= 0:
                    found.setdefault(name, []).append(taken)
            times.others = idle.others()
        engine.stop()
        registry.close()
    progress.clear()
    return found, times


def _one(
    engine: TransformersEngine, registry: AdapterRegistry, twin: Any, share: float | None, chosen: argparse.Namespace
) -> tuple[float, float, float]:
    learner = None
    if share is not None:
        settings = LearningSettings(share=share, pass_tokens=chosen.pass_tokens)
        learner = Learner(twin, registry, engine, settings, engine.cores)
        learner._share = Share(share, saved=0.0)
        learner.start()
        config = kilotune.VeraConfig(r=chosen.rank, target_modules="all-linear")
        for i in range(LEARNING):
            learner.open(f"m{i}", "t", config, seed=i)
        feed(learner, chosen, int(twin.config.vocab_size))
    began = time.monotonic()
    before = 0.0 if learner is None else learner.stats().seconds
    heard = streams(engine, chosen)
    cores = 0.0 if learner is None else (learner.stats().seconds - before) / (time.monotonic() - began)
    if learner is not None:
        learner.stop()
    return heard.tokens / chosen.seconds, statistics.quantiles(heard.firsts, n=100)[98], cores


# -- jobs --------------------------------------------------------------------------------------------------


def jobs(chosen: argparse.Namespace, progress: Progress) -> Rounds:
    """Seconds of a job, ours, PEFT's and the base's alone, in turns; and of ours what its passes took ("passes")."""
    words = argparse.Namespace(
        rows=4,
        steps=4,
        length=32,
        rank=64,
        peft_users=4,
        users=chosen.jobs,
        threads=chosen.threads or torch.get_num_threads(),
    )
    shape = Shape("llama", 128, 4)
    base, theirs = apart(lambda: [build(shape, words.length, CPU, torch.float32).eval() for _ in range(2)])
    times, idle = Rounds({"jobs": [], "passes": [], "peft": [], "base": []}), harness.Idleness()
    with _service(base, words, shape.vocabulary) as ours:
        for number in range(chosen.rounds):
            progress.show(f"jobs: round {number + 1} of {chosen.rounds}")
            runs: list[Callable[[], dict[str, float]]] = [
                ours,
                lambda: {"peft": apart(lambda: _peft(theirs, words, shape.vocabulary))},
                lambda: {"base": apart(lambda: _base(theirs, words, shape.vocabulary))},
            ]
            for run in runs if number % 2 else reversed(runs):
                for name, seconds in run().items():
                    times.seconds[name].append(seconds)
            times.others = idle.others()
    progress.clear()
    return times


def _peft(model: Any, words: argparse.Namespace, vocabulary: int) -> float:
    compute_on(words.threads)
    return float(fleet.peft_users(model, words, vocabulary)[0] / words.peft_users)


def _base(model: Any, words: argparse.Namespace, vocabulary: int) -> float:
    """Forward and backward of the base alone, without any adapter, over the same rows in passes of the same size."""
    compute_on(words.threads)
    model.requires_grad_(False)
    rows = torch.stack([row for number in range(words.users) for row in fleet.data_of(number, words, vocabulary)])
    embedded = model.get_input_embeddings()
    began = time.perf_counter()
    for part in torch.split(rows, PASS * words.rows):
        entering = embedded(part).requires_grad_()
        model(inputs_embeds=entering, labels=part).loss.backward()
    return (time.perf_counter() - began) / float(words.users)


@contextmanager
def _service(model: Any, words: argparse.Namespace, vocabulary: int) -> Iterator[Callable[[], dict[str, float]]]:
    """A service that runs, and what has it do a round of jobs."""
    base = copy.deepcopy(model)
    twin = twin_of(base)
    rows = {f"{i}": fleet.data_of(i, words, vocabulary) for i in range(words.users)}
    with tempfile.TemporaryDirectory() as folder, open_store(f"sqlite:///{folder}/adapters.db") as store:
        registry = AdapterRegistry(f"sqlite:///{folder}/adapters.db", base)
        engine = TransformersEngine(base, None, registry)
        engine.start()
        settings = LearningSettings(pass_tokens=PASS * words.rows * words.length, threads=words.threads)
        learner = Learner(twin, registry, engine, settings)
        learner.start()
        try:
            yield lambda: _jobs(rows, words, Documents(store), learner, registry)
        finally:
            learner.stop()
            engine.stop()
            registry.close()


def _jobs(
    rows: Mapping[str, list[torch.Tensor]],
    words: argparse.Namespace,
    documents: Documents,
    learner: Learner,
    registry: AdapterRegistry,
) -> dict[str, float]:
    def read(data: bytes, form: str, what: str, whose: str, stay: object) -> TrainingFile:
        own = [one.tolist() for one in rows[data.decode()]]
        return TrainingFile(tuple(Example(i, ({"input_ids": ids, "labels": ids},)) for i, ids in enumerate(own)))

    config = kilotune.VeraConfig(r=words.rank, target_modules="all-linear")
    runner = JobRunner(documents, learner, registry, "toy", config, read, JobLimits(), at_once=PASS)
    before, trained = _ended(documents), learner.stats().seconds
    runner.start()
    began = time.perf_counter()
    for name in rows:
        own = documents.within(f"n{name}")
        file = own.add(FILE, {"filename": "a", "purpose": "fine-tune"}, body=[name.encode()])
        Jobs(own).create(
            Asked(model="toy", method="supervised", training_file=file.name, epochs=1, batch_size=words.rows)
        )
    while (ended := _ended(documents) - before) < len(rows):
        time.sleep(0.1)  # who looks takes time of the processor, too
    taken = {"jobs": (time.perf_counter() - began) / ended}
    taken["passes"] = (learner.stats().seconds - trained) / words.threads / ended
    if documents.total(JOB, states=("failed",))[0]:
        raise AssertionError([job.data["error"] for job in documents.ls(JOB, state="failed", limit=3)])
    runner.stop()
    return taken


def _ended(documents: Documents) -> int:
    return documents.total(JOB, states=("succeeded", "failed"))[0]


# -- what comes of it ----------------------------------------------------------------------------------------


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=9)
    parser.add_argument("--model", default="smollm2")
    for name, default in (
        ("streams", 16), ("tokens", 32), ("seconds", 20), ("rank", 256), ("row", 46), ("pass-tokens", 128),
        ("jobs", 256), ("seeds", 3), ("facts", 20), ("controls", 20), ("last-blocks", 8),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=harness.positive, default=default)
    parser.add_argument("--shares", type=lambda text: [float(one) for one in text.split(",")], default=[0.25, 0.5])
    parser.add_argument("--only", choices=("beside", "jobs", *WORDS))
    parser.add_argument("--bars", action="store_true", help="what the project promises, and whether it holds")
    chosen = parser.parse_args(words)
    if chosen.only in WORDS and chosen.model == TOY:
        parser.error(f"--only {chosen.only}: the toy has no words; leave --model out")
    return chosen


def told_beside(found: dict[str, list[Any]], chosen: argparse.Namespace) -> list[Bar]:
    """Print the table; the bars."""
    cores = torch.get_num_threads()
    rows, bars = [], []
    for name, taken in found.items():
        speed, first = (
            harness.Spread.of([one[i] / alone[i] for one, alone in zip(taken, found[ALONE], strict=True)])
            for i in (0, 1)
        )
        had = statistics.median(one[2] for one in taken)
        median = statistics.median(one[0] for one in taken)
        rows.append([name, f"{median:.1f}", str(speed), str(first), f"{had:.2f}"])
        if name != ALONE:
            wanted = 0.97 * (1 - float(name.split()[1]) / cores)
            bars.append(Bar(f"{name}: {wanted:.3f} over tokens a second", wanted / speed.median, 1.0))
            bars.append(Bar(f"{name}: first token's 99 % over alone", first.median, 1.5))
    heads = [
        "training",
        "tokens a second",
        "over alone (quartiles)",
        "first token 99 % over alone",
        "cores of training",
    ]
    print(harness.table(heads, rows))
    return bars


def told_corrections(taught: Sequence[Taught], chosen: argparse.Namespace) -> list[Bar]:
    """Print the table; the bars."""
    rows, seconds = [], [math.inf if one is None else one for each in taught for one in each.seconds]
    for seed, one in enumerate(taught):
        spent = statistics.fmean(one.processor)
        rows.append([f"{seed}", f"{one.facts}", f"{one.paraphrases}", f"{one.controls}", f"{spent:.1f}"])
    print(harness.table(["seed", "facts", "paraphrases", "controls", "CPU seconds a correction"], rows))
    median, late = statistics.median(seconds), sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]
    print(f"\nseconds of a correction: median {median:.1f}, 95 % within {late:.1f}\n")
    part = chosen.facts / 20
    return [
        Bar("correction: median seconds", median, 20.0),
        Bar("correction: 95 % of seconds", late, 40.0),
        Bar("facts: wanted over right", 18 * part / max(min(one.facts for one in taught), 1e-9), 1.0),
        Bar("paraphrases: wanted over right", 14 * part / max(min(one.paraphrases for one in taught), 1e-9), 1.0),
        Bar("controls: wanted over the same", 0.9 * chosen.controls / max(min(o.controls for o in taught), 1e-9), 1.0),
    ]


def with_words(chosen: argparse.Namespace, progress: Progress, body: dict[str, Any], where: str) -> list[Bar]:
    """What is measured with questions, printed and noted in ``body``; the bars."""
    bars = []
    if chosen.only in (None, "scope"):
        body["scope"] = judged(chosen)
        rows = [
            [name, f"{one[0]} of {one[1]}" if one[1] else "", f"{one[2]} of {one[3]}"]
            for name, one in body["scope"].items()
        ]
        print("\n" + harness.table(["questions", "paraphrases answered", "others answered"], rows) + "\n")
    if chosen.only in (None, "users"):
        right, took = together(base_of(chosen.model), chosen, progress.show)
        progress.clear()
        rate = 60 * right / took
        print(f"\n{chosen.model}, {chosen.facts} users at once: {right} learned in {took:.0f} s, {rate:.1f} a minute\n")
        bars.append(Bar("8 corrections over those learned a minute", 8 / max(rate, 1e-9), 1.0))
        body["users"] = {"right": right, "seconds": took}
    if chosen.only in (None, "corrections"):
        taught = [teach(base_of(chosen.model), chosen, seed, progress.show) for seed in range(chosen.seeds)]
        progress.clear()
        print(f"\n{chosen.model}, {chosen.facts} facts taught one after another, {chosen.seeds} seeds; {where}\n")
        bars += told_corrections(taught, chosen)
        body["corrections"] = [vars(one) for one in taught]
    return bars


def main(words: Sequence[str] | None = None) -> int:
    """Run with the command line's words; returns the exit code."""
    chosen = options(words)
    progress, bars = Progress(), []
    where = harness.title_of(harness.machine(CPU))
    body: dict[str, Any] = {}
    if chosen.only in (None, "beside"):
        found, times = beside(chosen, progress)
        told = f"{chosen.streams} streams, {chosen.rounds} rounds of {chosen.seconds} s{times.beside}"
        print(f"\n{chosen.model}, {told}; {where}\n")
        bars += told_beside(found, chosen)
        body["beside"] = found
    if chosen.only in (None, "jobs"):
        times = jobs(chosen, progress)
        ratio = times.ratio("jobs", "peft")
        print(f"\n{chosen.jobs} jobs of 16 rows, {times}: time of a job over PEFT's {ratio}")
        print(f"its passes of training, over all of it: {times.ratio('passes', 'jobs')}")
        print(f"the base alone, forward and backward of the same rows, over PEFT's: {times.ratio('base', 'peft')}\n")
        bars.append(Bar("a job over PEFT", ratio and ratio.median, 1 / 3))
        body["jobs"] = times.seconds
    if chosen.only is None and chosen.model == TOY:
        print("\ncorrections are not measured: the toy has no words\n")
    else:
        bars += with_words(chosen, progress, body, where)
    name = "-".join(part for part in ("learning", chosen.model, chosen.only) if part)
    print("written: " + harness.write_results(chosen.out, name, chosen, CPU, body).name)
    return harness.judge(bars) if chosen.bars else 0


if __name__ == "__main__":
    sys.exit(main())
