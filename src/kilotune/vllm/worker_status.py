"""What workers tell the resolver: that the plugin is active in them, and what they can serve.

All processes of an engine inherit one folder by the environment variable KILOTUNE_VLLM_RUN. Each worker that serves
VeRA writes ``worker-<rank>.json`` there, and the resolver, in the server's process, serves nothing before all have. So
no adapter is ever asked of an engine in which the plugin is not active, and both sides go by one set of settings.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from ..errors import ConfigError, UnsupportedError
from ..whole_file import replacing
from .layout import Layout, Site
from .settings import KEY, Settings

__all__ = [
    "RUN",
    "Served",
    "announce",
    "begin_anew",
    "clear",
    "folder",
    "inherit",
    "lose",
    "lost",
    "mark_of",
    "served",
    "stamp",
]

RUN = "KILOTUNE_VLLM_RUN"


def inherit() -> bool:
    """Name the folder for this process and those that it starts; whether this process was the first."""
    if os.environ.get(RUN):
        return False
    os.environ[RUN] = str(Path(tempfile.gettempdir()) / f"kilotune-vllm-{os.getpid()}-{secrets.token_hex(8)}")
    return True


def folder() -> Path:
    """The folder of this engine, made if it is not there; nobody else can read it."""
    path = Path(os.environ[RUN])
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ConfigError(f"{RUN}={path}: expected a folder of this user; leave it out, and one is made")
    return path


def begin_anew() -> None:
    """Forget what an engine that is no more has left in a folder that was named by the user."""
    if path := os.environ.get(RUN):
        for pattern in ("worker-*.json", "*.lost"):
            for file in Path(path).glob(pattern):
                file.unlink(missing_ok=True)


def clear() -> None:
    """Remove the folder; for the process that named it, when it ends."""
    shutil.rmtree(os.environ[RUN], ignore_errors=True)


@final
@dataclass(frozen=True)
class Served:
    """What an engine serves. model: the base's folder or id, as vLLM has it. dtype: of rows."""

    settings: Settings
    layout: Layout
    dtype: torch.dtype
    model: str


def announce(rank: int, world: int, model: str, dtype: torch.dtype, settings: Settings, sites: list[Site]) -> None:
    """Say that the worker ``rank`` of ``world`` serves these layers."""
    values = {
        "pid": os.getpid(),
        "world": world,
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "settings": settings.to_dict(),
        "sites": [[site.name, site.out, site.inn] for site in sites],
    }
    with replacing(folder() / f"worker-{rank}.json", shared=True) as fresh:
        fresh.write_text(json.dumps(values))


def stamp() -> int | None:
    """When the first worker told what it serves; None where it did not."""
    try:
        return (Path(os.environ[RUN]) / "worker-0.json").stat().st_mtime_ns
    except (OSError, KeyError):
        return None


def served() -> Served | None:
    """What all workers together serve; None before the last of them is there.

    Raises:
        UnsupportedError: they do not agree.

    """
    told: list[dict[str, Any]] = []
    world = 1
    while len(told) < world:
        try:
            told.append(json.loads((Path(os.environ[RUN]) / f"worker-{len(told)}.json").read_text()))
            os.kill(told[-1]["pid"], 0)  # it may be what an engine that is no more has left
        except (OSError, KeyError):
            return None
        world = told[0]["world"]
    if len({(one["model"], one["dtype"], json.dumps(one["settings"], sort_keys=True)) for one in told}) > 1:
        raise UnsupportedError(f"the workers of this engine have different settings under {KEY!r}")
    settings = Settings.of(told[0]["settings"])
    sites = [Site(str(name), int(out), int(inn)) for one in told for name, out, inn in one["sites"]]
    layout = Layout.of(settings.rank, settings.seed, sites)
    return Served(settings, layout, getattr(torch, told[0]["dtype"]), told[0]["model"])


# -- adapters that a worker could not load ---------------------------------------------------------


def lose(path: str) -> None:
    """Note that a worker has not got the row ``path``; never raises."""
    try:
        mark_of(path).touch()
    except (OSError, ValueError):
        return


def lost(path: str) -> bool:
    """Whether a worker noted that."""
    return mark_of(path).exists()


def mark_of(path: str) -> Path:
    """The file that says so."""
    return Path(os.environ[RUN]) / f"{Path(path).name[:100]}.lost"
