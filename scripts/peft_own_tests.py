"""PEFT's own tests, run on ``kilotune.peft`` in the place of ``peft``.

    python scripts/peft_own_tests.py check [-n 2]              what is listed, against what is expected (make test-full)
    python scripts/peft_own_tests.py run test_vera.py -k save  listed tests of these files, with arguments of pytest
    python scripts/peft_own_tests.py run --on peft test_vera.py        the same on PEFT itself
    python scripts/peft_own_tests.py list [test_vera.py ...]   make the lists anew, by running PEFT on its tests

PEFT's source package is fetched by pip and unpacked into a cache when it is first needed; nothing of it is kept here
but node ids, in ``tests/peft_own/``. ``rule.py`` says which of them concern what kilotune has.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peft_own import node_ids, report
from peft_own.source import CACHE, LISTS, ROOT, FetchError, Source, fetch

LISTED, HUB = LISTS / "node_ids", LISTS / "hub"
EXPECTED = LISTS / "expected_failures.txt"
SECONDS = 120  # for one test; PEFT's slowest of those that are listed takes 20


def child(source: Source, on: str, src: Path, arguments: Sequence[str]) -> int:
    """Run pytest on PEFT's tests; returns its exit code."""
    path = [src, ROOT / "scripts", source.packages]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PEFT_OWN_HOME": str(source.home),
        "PEFT_OWN_ON": on,
        "PYTHONHASHSEED": "0",
        "HF_HOME": str(source.models),
        "HF_HUB_OFFLINE": "0",  # the plugin refuses, and notes what was asked for
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-c", str(source.home / "pytest.ini"), "--rootdir", str(source.home)]
    command += ["-p", "peft_own.plugin", f"--timeout={SECONDS}", *arguments]
    return subprocess.run(command, cwd=source.home, env=env).returncode


def files_of(names: Sequence[str]) -> list[str]:
    """The files among arguments, as pytest is to be given them."""
    return [f"tests/{Path(name).name}" for name in names if name.endswith(".py")]


def processes(options: argparse.Namespace) -> list[str]:
    """In how many processes."""
    return ["-n", str(options.workers), "--dist", "worksteal"] if options.workers else []


def run(options: argparse.Namespace, others: Sequence[str]) -> int:
    """Listed tests, as one develops."""
    source = fetch(options.cache)
    files = files_of(others)
    arguments = [word for word in others if not word.endswith(".py")]
    listed = [*node_ids.read(LISTED), *(node_ids.read(HUB) if options.hub else [])]
    if not files:
        files = sorted({f"tests/{node_ids.split(nodeid)[0]}" for nodeid in listed})
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids"
        ids.write_text("\n".join(listed), encoding="utf-8")
        chosen = [] if options.all else [f"--peft-own-ids={ids}"]
        return child(source, options.on, options.src, [*chosen, *processes(options), *arguments, *files])


def make_list(options: argparse.Namespace, others: Sequence[str]) -> int:
    """The lists, by PEFT itself; those of files that are not named stay as they are."""
    source = fetch(options.cache)
    files = files_of(others) or [f"tests/{path.name}" for path in sorted(source.tests.glob("test_*.py"))]
    results = options.results or Path(tempfile.mkdtemp()) / "results.jsonl"
    if not options.keep:
        results.unlink(missing_ok=True)
        arguments = ["-q", "--tb=no", "-r", "N", f"--peft-own-results={results}", *processes(options), *files]
        if (code := child(source, "peft", options.src, arguments)) not in (0, 1):  # 1: tests failed
            print(f"error: pytest ended with {code}; the lists are as they were", file=sys.stderr)
            return 1
    lists = report.judge(report.read(results))
    names = {Path(file).name for file in files}
    for folder, fresh in ((LISTED, lists.listed), (HUB, lists.hub)):
        kept = [nodeid for nodeid in node_ids.read(folder) if node_ids.split(nodeid)[0] not in names]
        node_ids.write(folder, [*kept, *fresh])
    print(report.list_table(lists))
    return 0


def check(options: argparse.Namespace, others: Sequence[str]) -> int:
    """Run what is listed, and hold it to what is expected."""
    source = fetch(options.cache)
    listed = node_ids.read(LISTED)
    files = sorted({f"tests/{node_ids.split(nodeid)[0]}" for nodeid in listed})
    with tempfile.TemporaryDirectory() as folder:
        ids, results = Path(folder) / "ids", options.results or Path(folder) / "results.jsonl"
        ids.write_text("\n".join(listed), encoding="utf-8")
        results.unlink(missing_ok=True)
        arguments = ["-q", "--tb=no", "-r", "N", f"--peft-own-ids={ids}", f"--peft-own-results={results}", *others]
        arguments += ["--continue-on-collection-errors"]  # the tests of such a file count as not run
        child(source, options.on, options.src, [*arguments, *processes(options), *files])
        expected = report.read_expected(EXPECTED.read_text(encoding="utf-8"))
        verdict = report.compare(listed, report.read(results), expected)
    print(report.check_table(verdict), flush=True)
    print("\n".join(report.in_short(verdict.faults)))
    return 1 if verdict.faults else 0


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="PEFT's own tests, run on kilotune.peft", allow_abbrev=False)
    parser.add_argument("verb", choices=["check", "run", "list"])
    parser.add_argument("--on", choices=["kilotune", "peft"], default="kilotune", help="what `import peft` gives")
    parser.add_argument("--src", type=Path, default=ROOT / "src", help="the folder that has kilotune")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where PEFT's source package is unpacked")
    parser.add_argument("--all", action="store_true", help="run: what is not listed, too")
    parser.add_argument("--hub", action="store_true", help="run: what needs the hub, too")
    parser.add_argument("-n", dest="workers", type=int, default=0, help="processes")
    parser.add_argument("--results", type=Path, help="check, list: keep each test's outcome in this file")
    parser.add_argument("--keep", action="store_true", help="list: judge the outcomes in --results, without a run")
    options, others = parser.parse_known_args()
    options.src = options.src.resolve()
    try:
        return {"check": check, "run": run, "list": make_list}[options.verb](options, others)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
