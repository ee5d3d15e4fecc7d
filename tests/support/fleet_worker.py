"""A joint training in processes that are killed, by kill -9 after random times, until one comes to its end.

``python fleet_worker.py FOLDER SINK SEED LEAST`` prints how often it was killed, which is at least LEAST times. Each
training is a fork of a process that has done nothing but imports, so that a hundred kills take a minute.

Each life lasts for a random part of the time that one training takes to its end on this machine, which is measured
first, so that a machine of any speed kills it in all of its states. Where a training came to its end too soon (the
machine was busy while that was measured), another one begins in another folder, with half the time. All of those
folders hold whole trainings in the end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from kilotune import LoraConfig
from kilotune.fleet import FleetReport, FleetSettings, Progress, StoreSink, User, fit, open_store
from tests.support.fleet_support import points, stacked
from tests.support.models import Nested

SETTINGS = FleetSettings(
    batch_size=2, users_per_step=3, capacity=4, epochs=2, learning_rate=0.02, patience=3, save_every=3
)
CONFIG = LoraConfig(r=2, target_modules=["up", "down"], lora_dropout=0.1)


def users() -> list[User]:
    """Twelve, two of which are broken."""
    found = []
    for i in range(12):
        data: Any = points(4 + i % 3, i)
        if i in (3, 8):
            data[-1] = {"x": data[-1]["x"], "labels": 7}
        found.append(User(f"u{i}", data, points(3, 50 + i) if i % 2 else None, seed=i))
    return found


def slowly(progress: Progress) -> None:
    """So that there is time to kill it in every state."""
    time.sleep(0.002)


def run(folder: Path | None, sink: Any, resume: bool) -> FleetReport:
    return fit(
        Nested().double(),
        CONFIG,
        users(),
        SETTINGS,
        collate=stacked,
        loss="classification",
        sink=sink,
        folder=folder,
        resume=resume,
        told=[slowly] if folder else (),
    )


def child(place: Path, kind: str) -> None:
    """The training, which goes on with what is there."""
    torch.set_num_threads(1)
    if kind == "folder":
        run(place / "state", place / "adapters", resume=True)
    else:
        with open_store(f"sqlite:///{place / 'a.db'}") as store:
            run(place / "state", StoreSink(store), resume=True)


def killed_until_done(place: Path, kind: str, seed: int, least: int) -> int:
    """How often it was killed before it came to its end."""
    chance = random.Random(seed)
    longest = time_to_the_end(place / "unbroken", kind)
    for attempt in range(20):
        kills = killed(place / f"attempt-{attempt}", kind, chance, longest)
        if kills >= least:
            return kills
        longest /= 2
    raise RuntimeError(f"it was never killed {least} times")


def time_to_the_end(place: Path, kind: str) -> float:
    """Seconds that a training takes when it is left alone; half of them, so that a life is a part of it."""
    start = time.monotonic()
    _, status = os.waitpid(started(place, kind), 0)
    if status:
        raise RuntimeError(f"the training ended with {status}")
    return (time.monotonic() - start) / 2


def started(place: Path, kind: str) -> int:
    """The process of a training that goes on with what is in ``place``."""
    pid = os.fork()
    if not pid:
        try:
            place.mkdir(parents=True, exist_ok=True)
            child(place, kind)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def killed(place: Path, kind: str, chance: random.Random, longest: float) -> int:
    """How often the training in ``place`` was killed, each time after at most ``longest`` seconds, and later more."""
    for kills in range(1000):
        pid = started(place, kind)
        until = time.monotonic() + chance.random() * longest * (1 + kills / 20)
        while time.monotonic() < until:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                if status:
                    raise RuntimeError(f"the training ended with {status}")
                return kills
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    raise RuntimeError("it never came to its end")


if __name__ == "__main__":
    print(killed_until_done(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
