"""What a run of PEFT's tests came to: held to what is listed and expected, and tables of it."""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import rule
from .node_ids import split

LEAST = 0.9  # of what is listed has to pass


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Outcomes by node id; of a test that ran twice, the last one."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["id"]: line for line in map(json.loads, lines)}


# -- the lists ----------------------------------------------------------------------------------------------


class Lists(NamedTuple):
    """What a run on PEFT itself gives: the tests that concern us, those of them that need the hub, and the rest."""

    listed: list[str]
    hub: list[str]
    rest: dict[str, str]


def seen_of(line: Mapping[str, Any]) -> rule.Seen:
    """What the plugin noted of a test."""
    seen = line["seen"]
    made = tuple(rule.Made(name, options) for name, options in seen["made"])
    return rule.Seen(frozenset(seen["parameters"]), made, frozenset(seen["names"]))


def wants_the_hub(nodeid: str, line: Mapping[str, Any]) -> bool:
    """Whether a test failed for want of the hub: of something that has no stand-in here."""
    asked = line["seen"]["asked"] or "on the Hub" in line["why"]  # the second is what datasets says when asked again
    return nodeid in rule.WANTS_THE_HUBS or (line["outcome"] == "failed" and bool(asked))


def judge(results: Mapping[str, Mapping[str, Any]]) -> Lists:
    """Sort tests by the rule."""
    lists = Lists([], [], {})
    for nodeid, line in results.items():
        why = rule.why_not(seen_of(line)) if "seen" in line else "crashed on PEFT"
        if why is None and line["outcome"] == "passed":
            lists.listed.append(nodeid)
        elif why is None and wants_the_hub(nodeid, line):
            lists.hub.append(nodeid)
        else:
            lists.rest[nodeid] = why or f"{line['outcome']} on PEFT: {line['why'][:100]}"
    return lists


def list_table(lists: Lists) -> str:
    """How many of each file."""
    columns = {"listed": lists.listed, "hub": lists.hub, "other": list(lists.rest)}
    counts = {name: Counter(split(nodeid)[0] for nodeid in ids) for name, ids in columns.items()}
    files = sorted(set().union(*counts.values()))
    lines = [f"{file:40}" + "".join(f"{counts[name][file]:8}" for name in columns) for file in files]
    total = f"{'all':40}" + "".join(f"{len(ids):8}" for ids in columns.values())
    return "\n".join([f"{'file':40}" + "".join(f"{name:>8}" for name in columns), *lines, total])


# -- the check ----------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """A line of expected_failures.txt."""

    pattern: str
    reason: str


class Verdict(NamedTuple):
    """What a check came to."""

    passed: list[str]
    failed: list[str]  # and expected to
    faults: list[str]
    listed: list[str]


def read_expected(text: str) -> list[Expected]:
    """The patterns that fail, and why: blocks of a reason behind '#', and of patterns beneath it.

    Raises:
        ValueError: a pattern without a reason.

    """
    found, reason, after = [], "", False
    for line in text.splitlines():
        if line.startswith("#"):
            reason = f"{reason} {line[1:].strip()}" if not after else line[1:].strip()
            after = False
        elif line.strip():
            if not reason:
                raise ValueError(f"expected_failures.txt: no reason stands above {line!r}")
            found.append(Expected(line.strip(), reason.strip()))
            after = True
        else:
            reason, after = "", False
    return found


def matches(pattern: str, nodeid: str) -> bool:
    """Whether a pattern takes a node id: ``*`` is any text; brackets are meant as they stand."""
    return fnmatch.fnmatchcase(nodeid, pattern.replace("[", "[[]"))


def compare(listed: Sequence[str], results: Mapping[str, Mapping[str, Any]], expected: Sequence[Expected]) -> Verdict:
    """Hold outcomes to what is listed: a listed test passes, or is expected to fail and does."""
    verdict = Verdict([], [], [], list(listed))
    used: set[Expected] = set()
    for nodeid in listed:
        entry = next((one for one in expected if matches(one.pattern, nodeid)), None)
        used |= {entry} if entry else set()
        line = results.get(nodeid, {"outcome": "not run", "why": ""})
        if line["outcome"] == "passed":
            verdict.passed.append(nodeid)
            verdict.faults.extend([f"passes, and is expected to fail: {nodeid}"] if entry else [])
        else:
            verdict.failed.append(nodeid)
            verdict.faults.extend([] if entry else [f"{line['outcome']}: {nodeid}: {line['why']}"])
    verdict.faults.extend(f"expected to fail, and not listed: {one.pattern}" for one in expected if one not in used)
    if len(verdict.passed) < LEAST * len(listed):
        share = len(verdict.passed) / len(listed)
        verdict.faults.append(f"{share:.1%} of what is listed passes; {LEAST:.0%} is the least")
    return verdict


def in_short(faults: Sequence[str], most: int = 60) -> list[str]:
    """Faults as lines; where there are very many, one of each reason, and how many there are of it."""
    if len(faults) <= most:
        return list(faults)
    groups: dict[str, list[str]] = {}
    for fault in faults:
        what, _, rest = fault.partition(": ")
        reason = re.sub(r"\d+|0x[0-9a-f]+", "#", rest.partition(": ")[2])[:80]
        groups.setdefault(f"{what}: {reason}", []).append(fault)
    ordered = sorted(groups.values(), key=len, reverse=True)
    lines = [f"{len(group):6} x {group[0][:400]}" for group in ordered[:most]]
    return [*lines, *([f"and {len(ordered) - most} reasons more"] if len(ordered) > most else [])]


def by_file(nodeids: Iterable[str]) -> Counter[str]:
    """How many of each file."""
    return Counter(split(nodeid)[0] for nodeid in nodeids)


def check_table(verdict: Verdict) -> str:
    """How many of each file are listed, pass, and do not."""
    listed, passed, failed = by_file(verdict.listed), by_file(verdict.passed), by_file(verdict.failed)
    head = f"{'file':40}{'listed':>8}{'pass':>8}{'not':>8}"
    lines = [f"{file:40}{listed[file]:8}{passed[file]:8}{failed[file]:8}" for file in sorted(listed)]
    share = len(verdict.passed) / max(len(verdict.listed), 1)
    total = f"{'all':40}{len(verdict.listed):8}{len(verdict.passed):8}{len(verdict.failed):8}   {share:.1%} pass"
    return "\n".join([head, *lines, total])
