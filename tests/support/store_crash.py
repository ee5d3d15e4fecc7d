"""Processes that work on a store until they are killed, and what must then be in it.

A *victim* does random changes for ever. Before each it writes what it is about to do into a journal, and behind it that
it was acknowledged. :class:`Expected` replays a journal in plain dictionaries, an implementation of its own of what
each change does. After a kill the store must be exactly what the acknowledged changes make of it, with or without the
one that was under way, and nothing between.

Run as a script this file is the place that victims are forked from, so that none has to import torch first: it reads
a JSON line for each, and answers with the process's number and then, when it has ended, with its exit code.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

NAMES = ("ann", "bob", "cid", "dan")
ALIASES = ("live", "next")
MANY = 12  # adapters in a batch: a wide target
PLANTED = ("", "acknowledged before it is written", "each statement for itself")


# -- what must be there ---------------------------------------------------------------------------------


@dataclass
class Adapter:
    """versions: number -> seed of the contents. aliases: word -> (version, the one before)."""

    versions: dict[int, int] = field(default_factory=dict)
    aliases: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    next: int = 1


class Refused(Exception):
    """The change is not possible, so nothing is changed."""


class Expected:
    """The store in plain dictionaries."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}

    def after(self, change: dict[str, Any]) -> Expected:
        """What it is once ``change`` is done; the same where it is refused."""
        new = copy.deepcopy(self)
        try:
            getattr(new, change["do"])(**{key: value for key, value in change.items() if key != "do"})
        except Refused:
            return self
        return new

    def put(self, items: list[list[Any]], alias: str | None) -> None:
        for name, seed in items:
            adapter = self.adapters.setdefault(name, Adapter())
            adapter.versions[adapter.next] = seed
            if alias is not None:
                adapter.aliases[alias] = (adapter.next, adapter.aliases.get(alias, (None, None))[0])
            adapter.next += 1

    def alias(self, names: list[str], alias: str) -> None:
        for name in names:
            adapter = self._there(name)
            newest, now = max(adapter.versions), adapter.aliases.get(alias, (None, None))[0]
            if now != newest:
                adapter.aliases[alias] = (newest, now)

    def roll_back(self, names: list[str], alias: str) -> None:
        for name in names:
            version, before = self._there(name).aliases.get(alias, (None, None))
            if before is None:
                raise Refused
            self.adapters[name].aliases[alias] = (before, version)

    def rm(self, name: str) -> None:
        self._forget(self._there(name), {max(self.adapters[name].versions)})

    def gc(self, keep: int) -> None:
        for adapter in self.adapters.values():
            named = {version for pair in adapter.aliases.values() for version in pair}
            self._forget(adapter, set(sorted(adapter.versions)[:-keep]) - named)

    def _there(self, name: str) -> Adapter:
        if name not in self.adapters or not self.adapters[name].versions:
            raise Refused
        return self.adapters[name]

    @staticmethod
    def _forget(adapter: Adapter, gone: set[int]) -> None:
        adapter.versions = {v: seed for v, seed in adapter.versions.items() if v not in gone}
        kept = {alias: pair for alias, pair in adapter.aliases.items() if pair[0] not in gone}
        adapter.aliases = {a: (v, None if before in gone else before) for a, (v, before) in kept.items()}

    def seen(self) -> dict[str, Any]:
        """What can be seen from outside."""
        return {
            name: {"versions": a.versions, "aliases": {alias: version for alias, (version, _) in a.aliases.items()}}
            for name, a in self.adapters.items()
            if a.versions
        }


def seen_in(store: Any) -> dict[str, Any]:
    """The same of a real store, every adapter read and held against the numbers that it was made of."""
    import torch

    from tests.support.store_support import contents

    found: dict[str, Any] = {}
    for info in store.ls(versions=True):
        record = store.get(info.name, info.version)
        seed = record.info.metadata["seed"]
        wanted = contents(seed).tensors
        assert all(torch.equal(value, wanted[key]) for key, value in record.tensors().items()), f"{info}: wrong numbers"
        assert record.info.tags == tuple(sorted({"all", f"seed-{seed % 3}"})), f"{info}: wrong tags"
        found.setdefault(info.name, {"versions": {}, "aliases": store.aliases(info.name)})["versions"][info.version] = (
            seed
        )
    tagged = [(info.name, info.version) for info in store.ls(tags=["all"], versions=True)]
    assert tagged == [(name, v) for name in sorted(found) for v in sorted(found[name]["versions"])], "tags differ"
    faults = [str(fault) for fault in store.verify()]
    assert not faults, faults
    return found


def settled(before: Expected, journal: Path, store: Any) -> Expected:
    """What is in the store now, after one victim; AssertionError where that cannot be."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    state, open_change = before, None
    for line in lines:
        if "do" in line:
            open_change = line
        else:
            assert open_change is not None
            after = state.after(open_change)
            assert (after is state) == line["refused"] or after.seen() == state.seen(), (open_change, line)
            state, open_change = after, None
    found = seen_in(store)
    candidates = [state] if open_change is None else [state, state.after(open_change)]
    for candidate in candidates:
        if found == candidate.seen():
            return candidate
    raise AssertionError(f"after {lines[-3:]}: expected one of {[c.seen() for c in candidates]}, found {found}")


# -- victims --------------------------------------------------------------------------------------------


def changes(rng: random.Random) -> Any:
    """Random changes, for ever."""
    while True:
        kind, alias = rng.random(), rng.choice((*ALIASES, None))
        if kind < 0.35:
            yield {"do": "put", "items": [[rng.choice(NAMES), rng.randrange(1000)]], "alias": alias}
        elif kind < 0.55:
            yield {
                "do": "put",
                "items": [[rng.choice(NAMES), rng.randrange(1000)] for _ in range(MANY)],
                "alias": alias,
            }
        elif kind < 0.7:
            yield {"do": "alias", "names": rng.sample(NAMES, rng.randrange(1, 5)), "alias": rng.choice(ALIASES)}
        elif kind < 0.8:
            yield {"do": "roll_back", "names": rng.sample(NAMES, rng.randrange(1, 3)), "alias": rng.choice(ALIASES)}
        elif kind < 0.87:
            yield {"do": "rm", "name": rng.choice(NAMES)}
        else:
            yield {"do": "gc", "keep": rng.randrange(1, 4)}


def do(store: Any, change: dict[str, Any]) -> None:
    """One change, by the store."""
    from kilotune.fleet.store import Item
    from tests.support.store_support import contents

    if change["do"] == "put":
        items = [Item(n, contents(seed), {"seed": seed}, ["all", f"seed-{seed % 3}"]) for n, seed in change["items"]]
        if len(items) == 1:
            one = items[0]
            store.put(one.name, one.adapter, metadata=one.metadata, tags=one.tags, alias=change["alias"])
        else:
            store.put_many(items, alias=change["alias"])
    elif change["do"] == "alias":
        store.roll_out(change["alias"], dict.fromkeys(change["names"]))
    elif change["do"] == "roll_back":
        store.roll_back(change["alias"], change["names"])
    elif change["do"] == "rm":
        store.rm(change["name"], "latest", force=True)
    else:
        store.gc(keep=change["keep"])


def work(url: str, namespace: str, journal: str, seed: int, planted: str) -> None:
    """Be a victim."""
    from kilotune import AdapterError
    from kilotune.fleet.store import open_store

    if planted == PLANTED[2]:
        plant_single_statements()
    out = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(line: dict[str, Any]) -> None:
        os.write(out, json.dumps(line).encode() + b"\n")

    store = open_store(url, namespace=namespace)
    for change in changes(random.Random(seed)):
        note(change)
        if planted == PLANTED[1]:
            note({"refused": False})
        try:
            do(store, change)
            refused = False
        except AdapterError:
            refused = True
        if planted != PLANTED[1]:
            note({"refused": refused})


def plant_single_statements() -> None:
    """The bug of who forgets the transaction: what each statement does is committed by itself."""
    from kilotune.fleet.store import postgres, sqlite

    def broken(many: Callable[..., None], execute: Callable[[Any], Callable[[str], Any]]) -> Callable[..., None]:
        def run(link: Any, sql: str, values: Any) -> None:
            many(link, sql, values)
            execute(link)("COMMIT")
            execute(link)("BEGIN")

        return run

    sqlite.SqliteLink.many = broken(sqlite.SqliteLink.many, lambda link: link.connection.execute)  # type: ignore[method-assign]
    postgres.PostgresLink.many = broken(postgres.PostgresLink.many, lambda link: link.cursor.execute)  # type: ignore[method-assign]


class Zygote:
    """The process that victims are forked from."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()  # it has imported everything

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the victims' parent has ended"
        return json.loads(line)

    def start(self, **options: Any) -> int:
        """Fork a victim; its process number."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(options) + "\n")
        self.process.stdin.flush()
        number: int = self._answer()
        return number

    def kill(self, victims: list[int]) -> None:
        """Kill victims with SIGKILL, and wait until they are gone; AssertionError where one ended by itself."""
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        ended = dict(self._answer() for _ in victims)
        assert set(ended) == set(victims)
        assert set(ended.values()) == {-signal.SIGKILL}, f"a victim failed by itself: {ended}"

    def end(self, victims: list[int]) -> None:
        """Kill what has not ended by itself, and wait until all are gone."""
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        for _ in victims:
            self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def kill_rounds(
    zygote: Zygote,
    url: str,
    folder: Path,
    rounds: int,
    open_store: Callable[..., Any],
    planted: str = "",
    victims: int = 1,
    longest: float = 0.08,
) -> int:
    """Let victims (each in a namespace of its own) work and kill them, ``rounds`` times; how many changes were made."""
    rng = random.Random(rounds)
    states = [Expected() for _ in range(victims)]
    made = 0
    for number in range(rounds):
        journals = [folder / f"journal-{number}-{i}" for i in range(victims)]
        running = [
            zygote.start(
                url=url, namespace=f"space-{i}", journal=str(journals[i]), seed=rng.randrange(2**30), planted=planted
            )
            for i in range(victims)
        ]
        if number % 4:  # else it may be killed while it opens, or makes, the store
            _wait_for(journals)
        time.sleep(rng.uniform(0, longest))
        zygote.kill(running)
        for i in range(victims):
            with open_store(namespace=f"space-{i}") as store:
                states[i] = settled(states[i], journals[i], store)
            made += (
                sum("refused" in line for line in journals[i].read_text().splitlines()) if journals[i].exists() else 0
            )
    return made


def _wait_for(journals: list[Path]) -> None:
    end = time.monotonic() + 60
    while not all(journal.exists() and journal.stat().st_size for journal in journals):
        assert time.monotonic() < end, "the victims do not begin"
        time.sleep(0.001)


def main() -> None:
    """Fork victims as they are asked for, and tell when one has ended."""
    import select

    import kilotune.fleet.store.postgres
    import kilotune.fleet.store.sqlite  # noqa: F401
    from tests.support import store_support

    store_support.adapted()  # and what is made at first use is made
    running: set[int] = set()
    print(json.dumps("ready"), flush=True)
    for _ in itertools.count():
        if select.select([0], [], [], 0.002)[0]:
            line = sys.stdin.buffer.raw.readline()  # type: ignore[attr-defined]
            if not line:
                break
            options = json.loads(line)
            victim = os.fork()
            if victim == 0:
                try:
                    work(**options)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(1)
            running.add(victim)
            print(json.dumps(victim), flush=True)
        for victim in sorted(running):
            if (found := os.waitpid(victim, os.WNOHANG))[0]:
                running.discard(victim)
                print(json.dumps([victim, -os.WTERMSIG(found[1]) if os.WIFSIGNALED(found[1]) else 0]), flush=True)
    for victim in running:
        os.kill(victim, signal.SIGKILL)


if __name__ == "__main__":
    main()
