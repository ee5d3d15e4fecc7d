"""Example scripts of PEFT, run on kilotune.peft to their end, with tiny models and data in the place of the hub's.

    python scripts/peft_own_examples.py                         all of them
    python scripts/peft_own_examples.py olora unilora           those whose path has one of these words
    python scripts/peft_own_examples.py --with peft             the same on PEFT itself
    python scripts/peft_own_examples.py --peft FOLDER           from a checkout of PEFT's repository that is there;
                                                                also PEFT_CHECKOUT=FOLDER

PEFT's source package has no examples. They are fetched by git from its repository, at one commit, into a cache, when
they are first needed; nothing of them is kept here. ``peft_own/example_list.py`` says which are run, and what stands
for what in each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_own.example_list import EXAMPLES, Example
from peft_own.source import CACHE, FetchError

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/huggingface/peft"
COMMIT = "5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40"  # of August 2026
SECONDS = 300  # for fetching


class Outcome(NamedTuple):
    """How an example ended; ``fault`` is empty where all is well, ``result`` what was looked at."""

    name: str
    fault: str
    result: dict[str, Any]


def environment(home: Path) -> dict[str, str]:
    """Of a process: no network, the hub's cache at ``home``, one thread."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "scripts")]),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def fault_of(example: Example, result: dict[str, Any]) -> str:
    """What is not as it must be after a script came to its end."""
    if fault := result.get("fault"):
        return str(fault)
    if result["missing"]:
        return f"not written: {', '.join(result['missing'])}"
    if example.trains and not result["changed"]:
        return f"none of {result['of']} parameters changed"
    return ""


def run(chosen: Sequence[Example], examples: Path, on: str, folder: Path) -> list[Outcome]:
    """Run examples, each in a folder of its own in ``folder``.

    Args:
        chosen: of the list.
        examples: the folder ``examples`` of a checkout.
        on: "kilotune" or "peft".
        folder: that is not there, or empty.

    """
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / "hub"
    models = sorted({f"{hub}={kind}" for one in chosen for hub, kind in one.models})
    numbers = [str(EXAMPLES.index(one)) for one in chosen]
    for arguments in (["models", str(home), *models], ["process", on, str(examples), str(folder), *numbers]):
        command = [sys.executable, "-m", f"peft_own.example_{arguments[0]}", *arguments[1:]]
        done = subprocess.run(command, cwd=folder, env=environment(home), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-3000:]}")
    outcomes = []
    for number, one in zip(numbers, chosen):
        told = folder / f"{number}.json"
        seen = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {"fault": "it was ended"}
        outcomes.append(Outcome(one.name, fault_of(one, seen), seen))
    return outcomes


def fetch(cache: Path = CACHE) -> Path:
    """A checkout of PEFT's repository: that which ``PEFT_CHECKOUT`` names, else at the commit, in the cache.

    Raises:
        FetchError: git is not there, or cannot reach the repository.

    """
    if given := os.environ.get("PEFT_CHECKOUT"):
        return Path(given)
    home = cache / f"repository-{COMMIT[:12]}"
    if not home.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            made = Path(name) / "made"
            git("init", "--quiet", str(made))
            git("-C", str(made), "fetch", "--quiet", "--depth", "1", REPOSITORY, COMMIT)
            git("-C", str(made), "checkout", "--quiet", "FETCH_HEAD")
            if not home.exists():
                made.rename(home)
    return home


def git(*arguments: str) -> None:
    """Run git, which asks nobody anything."""
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(["git", *arguments], env=env, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"git {' '.join(arguments)}: {error}") from error
    if done.returncode:
        raise FetchError(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")


def checkout(folder: Path) -> Path:
    """The folder of examples in a checkout of PEFT.

    Raises:
        FetchError: a script is not in it.

    """
    examples = folder.resolve() / "examples"
    missing = [step.path for one in EXAMPLES for step in one.steps if not (examples / step.path).is_file()]
    if missing:
        raise FetchError(f"{folder} is no checkout of PEFT's repository, or of another version: no {missing[0]}")
    return examples


def report(outcomes: Sequence[Outcome], on: str) -> int:
    """Print what became of all; returns how many failed."""
    faults = [outcome for outcome in outcomes if outcome.fault]
    for outcome in faults:
        print(f"FAILED {outcome.name}\n{outcome.fault}\n")
    for outcome in outcomes:
        moved = "FAILED" if outcome.fault else f"{outcome.result['changed']} of {outcome.result['of']} changed"
        print(f"{outcome.name}: {moved}")
    print(f"{len(outcomes) - len(faults)} of {len(outcomes)} ran to their end on {on}")
    return len(faults)


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="PEFT's example scripts on kilotune.peft", allow_abbrev=False)
    parser.add_argument("words", nargs="*", help="only those whose path has one of these")
    parser.add_argument("--peft", type=Path, help="a checkout of PEFT's repository; by default it is fetched")
    parser.add_argument("--with", dest="on", choices=["kilotune", "peft"], default="kilotune", help="what peft is")
    parser.add_argument("--keep", type=Path, help="run in this folder, which must be new, and leave it")
    options = parser.parse_args()
    chosen = [one for one in EXAMPLES if not options.words or any(word in one.name for word in options.words)]
    try:
        examples = checkout(fetch() if options.peft is None else options.peft)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run" if options.keep is None else options.keep.resolve()
        outcomes = run(chosen, examples, options.on, folder)
    return 1 if report(outcomes, options.on) else 0


if __name__ == "__main__":
    sys.exit(main())
