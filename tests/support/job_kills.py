"""Fine-tuning jobs in processes that are killed at random moments, and what must then have come of them.

Run as a script this is the place that victims are forked from, so that none has to import torch first. A victim serves
a store: it creates the jobs that are not there yet, tells each that was acknowledged, and trains until all have ended,
or it is killed. The last words are one line of JSON: how often it killed, and all faults.

::

    python -m tests.support.job_kills URL KILLS SEED [PLANTED]
    python -m tests.support.job_kills URL servers SEED         two at once; one is killed, and the other takes over
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

JOBS = ("supervised", "validated", "dpo", "reinforcement")
PLANTED = ("", "state without means", "listed twice")
LATE = 60.0  # seconds after which a victim that nobody kills has to be done
EXACT = 1e-9  # of the job's numbers, in float64; the store keeps them in float32


class Served:
    """What a server has, without its HTTP: over a base in float64, with leases of a moment."""

    def __init__(self, url: str, base: Any, at_once: int) -> None:
        from kilotune.serve.engine.continuous_batching import TransformersEngine
        from kilotune.serve.engine.tenant_adapters import AdapterRegistry
        from kilotune.serve.learning import runner, workers
        from kilotune.serve.learning.learner import Learner
        from kilotune.serve.learning.training import Training, TrainingLimits
        from kilotune.serve.twin import twin_of
        from tests.support.http_support import BASE, tokenizer
        from tests.support.training_support import CONFIG

        workers.LEASE, workers.ALIVE, workers.POLL, runner.KEPT_EVERY = 0.8, 0.1, 0.02, 0.1
        twin = twin_of(base)
        self.registry = AdapterRegistry(url, base)
        self.engine = TransformersEngine(self.registry.model.get_base_model(), tokenizer(), self.registry)
        learner, limits = Learner(twin, self.registry, self.engine), TrainingLimits(at_once=at_once)
        self.training = Training(url, learner, self.registry, self.engine, BASE, CONFIG, tokenizer(), limits)
        self.base = BASE

    def start(self) -> None:
        self.engine.start()
        self.training.start()

    def create(self, space: str, kind: str) -> str:
        """A job; its name, once it is acknowledged."""
        from kilotune.serve.learning.jobs import FILE, Asked

        rows = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in (("the cat", "a dog sat"), ("a dog", "the mat"), ("on", "the hat"))
        ]
        grader = {"name": "cat", "input": "{{ sample.output_text }}", "reference": "{{ item.word }}"}
        more: dict[str, Any] = {}
        if kind == "dpo":
            rows = [{"input": {"messages": r["messages"][:1]}, "preferred_output": r["messages"][1:],
                     "non_preferred_output": [{"role": "assistant", "content": "a mat"}]} for r in rows]  # type: ignore[dict-item]  # fmt: skip
        if kind == "reinforcement":
            rows = [{"messages": r["messages"][:1], "word": "cat"} for r in rows[:1]]  # type: ignore[dict-item]
            more = {"grader": {**grader, "type": "string_check", "operation": "like"}, "compute_multiplier": 0.25}
        own = self.training.documents(space)
        told = {"filename": "a", "purpose": "fine-tune"}
        file = own.add(FILE, told, body=["\n".join(map(json.dumps, rows)).encode()]).name
        asked = Asked(
            model=self.base,
            method=kind if kind in ("dpo", "reinforcement") else "supervised",
            training_file=file,
            validation_file=file if kind == "validated" else None,
            epochs=3 if kind == "reinforcement" else 8,
            batch_size=1,
            seed=1,
            suffix=kind,
            **more,
        )
        return self.training.jobs(space).create(asked).name

    def states(self, space: str) -> dict[str, str]:
        return {job.name: job.state for job in self.training.documents(space).ls("job")}


def victim(url: str, base: Any, space: str, missing: Sequence[str], planted: str, out: int, at_once: int = 8) -> None:
    """Serve until all have ended."""
    from kilotune.serve.learning.runner import _Run

    def tell(**what: Any) -> None:
        os.write(out, json.dumps(what).encode() + b"\n")

    plant(planted)
    run = _Run.run

    def told(self: Any) -> None:
        tell(took=self.job.name)
        run(self)

    _Run.run = told  # type: ignore[method-assign]
    served = Served(url, base, at_once)
    served.start()
    tell(up=True)
    for kind in missing:
        tell(created=served.create(space, kind), kind=kind)
    end = time.monotonic() + LATE
    while not (states := served.states(space)) or not set(states.values()) <= {"succeeded", "failed", "cancelled"}:
        if time.monotonic() > end:
            tell(late=states)
            os._exit(1)
        time.sleep(0.02)
    tell(done=True)


def plant(planted: str) -> None:
    """A fault that the kills have to find."""
    from kilotune.serve.learning.job_log import JobLog
    from kilotune.serve.learning.runner import _Run

    kept, succeed = JobLog.kept, _Run._succeed

    def without_means(self: Any) -> Any:
        state = kept(self)
        if state is not None:
            for name in ("m", "v"):
                state.tensors[name].zero_()
        return state

    def told_again(self: Any, version: Any) -> None:
        self.documents.add("checkpoint", {"step": 0, "metrics": {}, "model": version.name}, parent=self.job.name)
        succeed(self, version)

    if planted == PLANTED[1]:
        JobLog.kept = without_means  # type: ignore[method-assign]
    if planted == PLANTED[2]:
        _Run._succeed = told_again  # type: ignore[method-assign]


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """(a process that works and tells, what it tells)."""
    source, out = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(source)
            work(out)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(out)
    return child, source


class Round:
    """Four jobs of a namespace of their own, through as many kills as it takes."""

    def __init__(self, url: str, base: Any, space: str, chance: random.Random, planted: str) -> None:
        self.url, self.base, self.space, self.chance, self.planted = url, base, space, chance, planted
        self.names: dict[str, str] = {}
        self.faults: list[str] = []
        self.done = False
        self.window = 1.0  # seconds within which it is killed

    def run(self, kill: bool) -> bool:
        """One victim; whether it was killed."""
        missing = [kind for kind in JOBS if kind not in self.names]
        child, source = forked(lambda out: victim(self.url, self.base, self.space, missing, self.planted, out))
        until = time.monotonic() + (self.chance.uniform(0.02, self.window) if kill else 2 * LATE)
        rest, killed = b"", False
        while True:
            ready, _, _ = select.select([source], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
                killed, until = True, time.monotonic() + LATE
                continue
            piece = os.read(source, 65536)
            if not piece:
                break
            *lines, rest = (rest + piece).split(b"\n")
            for line in map(json.loads, lines):
                if "created" in line:
                    self.names[line["kind"]] = line["created"]
                self.done = self.done or "done" in line
                if "late" in line:
                    self.faults.append(f"{self.space}: not done in {LATE:g} s: {line['late']}")
        os.close(source)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in (0, -signal.SIGKILL):
            self.faults.append(f"{self.space}: a victim ended with {status}")
        return killed


def looked_at(url: str, space: str, names: dict[str, str], known: dict[str, Any]) -> list[str]:
    """What is wrong with jobs that have ended; known: by kind, the adapter of a run that nobody killed."""
    from kilotune.fleet.store import open_store
    from kilotune.fleet.store.documents import Documents

    faults: list[str] = []

    def see(right: bool, told: object) -> None:
        if not right:
            faults.append(f"{space}: {told}")

    with open_store(url, namespace=space) as store:
        documents = Documents(store).within(space)
        for kind, name in names.items():
            job = documents.find("job", name)
            if job is None or job.state != "succeeded":
                see(False, f"{kind}: {None if job is None else (job.state, job.data['error'])}")
                continue
            model = job.data["fine_tuned_model"]
            listed = [one.data["model"] for one in documents.ls("checkpoint", parent=name)]
            see(len(listed) == 3 == len(set(listed)) and model in listed, f"{kind}: checkpoints {listed}")
            for one in {model, *listed}:
                see(len(store.versions(one)) == 1, f"{kind}: {one} was published {len(store.versions(one))} times")
            events = [one.data for one in documents.ls("event", parent=name, limit=1000)]
            messages, steps = [one["message"] for one in events], [one["data"].get("step") for one in events]
            see(all(steps.count(step) == 1 for step in steps if step), f"{kind}: steps {steps} were told")
            for text in ("The job has successfully completed", f"New fine-tuned model created: {model}"):
                see(messages.count(text) == 1, f"{kind}: {text!r} was told {messages.count(text)} times")
            results = documents.ls("file", parent=name)
            see([one.name for one in results] == job.data["results"] and len(results) == 1, f"{kind}: results")
            see(not documents.ls("jobstate", parent=name), f"{kind}: a state is left")
            text = b"".join(documents.body("file", results[0].name)).decode() if results else ""
            made = (store.get(model).tensors(), text)
            if kind not in known:
                known[kind] = made
            elif kind != "reinforcement":  # whose answers are drawn by float32 sums of whoever is in the batch
                apart = max(float((made[0][key] - known[kind][0][key]).abs().max()) for key in known[kind][0])
                see(apart < 1e-6, f"{kind}: it came to another adapter, {apart:.1e} apart")
                see(
                    len(text.splitlines()) >= len(known[kind][1].splitlines()), f"{kind}: a result file without its end"
                )
    return faults


def prepared() -> Any:
    """The base, before anything is forked."""
    import torch

    from tests.support.generation_support import loaded
    from tests.support.http_support import base_folder, tokenizer

    torch.set_num_threads(1)
    tokenizer()
    return loaded("llama", base_folder()).double()


def main(url: str, kills: int, seed: int, planted: str) -> dict[str, Any]:
    """Rounds until there were so many kills; the first one without any."""
    base, chance = prepared(), random.Random(seed)
    known: dict[str, Any] = {}
    faults: list[str] = []
    done = rounds = 0
    whole, began = 1.0, time.monotonic()
    while rounds == 0 or (done < kills and not faults):
        own = Round(url, base, f"space{rounds}", chance, "" if rounds == 0 else planted)
        own.window = 0.6 * whole
        while not own.done and not own.faults:
            done += own.run(kill=rounds > 0 and done < kills)
        faults += own.faults
        if not faults:
            if sorted(own.names) != sorted(JOBS):
                faults.append(f"{own.space}: of {JOBS} there are {sorted(own.names)}")
            faults += looked_at(url, own.space, own.names, known)
        whole = whole if rounds else time.monotonic() - began
        rounds += 1
    return {"kills": done, "rounds": rounds - 1, "faults": faults}


class Beside:
    """A server beside another one, which has two jobs at once, and all that it has told."""

    def __init__(self, url: str, base: Any, missing: Sequence[str]) -> None:
        self.child, self._source = forked(lambda out: victim(url, base, "both", missing, "", out, at_once=2))
        self._rest = b""
        self.told: list[dict[str, Any]] = []

    def all(self, key: str) -> list[Any]:
        """What it has told under this word."""
        while select.select([self._source], [], [], 0.0)[0] and (piece := os.read(self._source, 65536)):
            *whole, self._rest = (self._rest + piece).split(b"\n")
            self.told += map(json.loads, whole)
        return [line[key] for line in self.told if key in line]

    def until(self, right: Callable[[], bool]) -> bool:
        """Wait; whether it came to that."""
        end = time.monotonic() + LATE
        while not (found := right()) and time.monotonic() < end:
            time.sleep(0.01)
        return found

    def kill(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        os.close(self._source)


def servers(url: str, seed: int) -> dict[str, Any]:
    """Two servers on one store; the first is killed while both train."""
    base, chance = prepared(), random.Random(seed)
    known: dict[str, Any] = {}
    alone = Round(url, base, "alone", chance, "")
    alone.run(kill=False)
    faults = [*alone.faults, *looked_at(url, "alone", alone.names, known)]
    second = Beside(url, base, ())
    second.until(lambda: bool(second.all("up")))
    first = Beside(url, base, JOBS)
    first.until(lambda: len(first.all("created")) == len(JOBS) and bool(first.all("took")) and bool(second.all("took")))
    time.sleep(chance.uniform(0.0, 0.1))
    took = first.all("took"), second.all("took")
    first.kill()
    if set(took[0]) & set(took[1]):
        faults.append(f"both had one job: {took}")
    names = {line["kind"]: line["created"] for line in first.told if "created" in line}
    if not second.until(lambda: bool(second.all("done"))):
        faults.append(f"not all were done: {took}, then {second.all('took')}")
    over = set(took[0]) & set(second.all("took"))
    second.kill()
    faults += looked_at(url, "both", names, known)
    return {"took": [len(one) for one in took], "over": len(over), "faults": faults}


if __name__ == "__main__":
    where, count, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if count == "servers":
        print(json.dumps(servers(where, number)))
    else:
        print(json.dumps(main(where, int(count), number, (sys.argv[4:] or [""])[0])))
