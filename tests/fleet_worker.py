"""A joint training in processes that are killed, by kill -9 after random times, until one comes to its end.

``python fleet_worker.py FOLDER SINK SEED SECONDS`` prints how often it was killed. Each training is a fork of a process
that has done nothing but imports, so that a hundred kills take a minute.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fleet_support import points, stacked
from kilotune import LoraConfig
from kilotune.fleet import FleetReport, FleetSettings, Progress, StoreSink, User, fit, open_store
from models import Nested

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


def killed_until_done(place: Path, kind: str, seed: int, longest: float) -> int:
    """How often it was killed before it came to its end."""
    chance = random.Random(seed)
    for kills in range(1000):
        pid = os.fork()
        if not pid:
            child(place, kind)
            os._exit(0)
        until = time.monotonic() + chance.random() * longest * (1 + kills / 50)
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
    print(killed_until_done(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
