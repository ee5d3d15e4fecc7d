"""The layout of docs/scale.md, simulated: users hashed to workers, each with a least-recently-used bank."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict

import numpy as np
import pytest

from kilotune._ui.sizes import parse_bytes, parse_count
from kilotune.errors import ConfigError
from tests.support.paths import ROOT

USERS, WORKERS, REQUESTS = 200_000, 8, 60_000


def worker_of(user: int, workers: list[int]) -> int:
    """Rendezvous hashing: the worker whose hash with the user is the highest."""
    return max(workers, key=lambda worker: hashlib.blake2b(f"{user}:{worker}".encode(), digest_size=8).digest())


def requests(exponent: float) -> list[int]:
    """Users by Zipf's law, the popular ones spread over all numbers."""
    generator = np.random.default_rng(0)
    ranks = np.arange(1, USERS + 1, dtype=np.float64) ** -exponent
    drawn = generator.choice(USERS, REQUESTS, p=ranks / ranks.sum())
    return [int(user) for user in generator.permutation(USERS)[drawn]]


def test_users_spread_stay_and_move_only_with_their_worker() -> None:
    workers = list(range(WORKERS))
    users = sorted(set(requests(1.1)))[:4000]
    before = {user: worker_of(user, workers) for user in users}
    share = Counter(before.values())
    assert max(share.values()) < 1.15 * len(users) / WORKERS
    after = {user: worker_of(user, [w for w in workers if w != 3]) for user in users}
    assert {user for user in users if before[user] != after[user]} == {user for user in users if before[user] == 3}


@pytest.mark.parametrize(("exponent", "hit", "busiest"), [(0.9, 0.62, 1.2), (1.1, 0.82, 1.8), (1.3, 0.93, 2.7)])
def test_hits_and_load_are_those_of_the_page(exponent: float, hit: float, busiest: float) -> None:
    """Each worker has room for 5 % of the users; hits are counted once half of the requests are through."""
    room = USERS // 20
    banks: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(WORKERS)]
    place: dict[int, int] = {}
    load: Counter[int] = Counter()
    hits = 0
    for number, user in enumerate(requests(exponent)):
        worker = place.setdefault(user, worker_of(user, list(range(WORKERS))))
        bank = banks[worker]
        load[worker] += 1
        hits += number >= REQUESTS // 2 and user in bank
        bank[user] = None
        bank.move_to_end(user)
        if len(bank) > room:
            bank.popitem(last=False)
    assert hits / (REQUESTS / 2) == pytest.approx(hit, abs=0.01)
    assert max(load.values()) * WORKERS / REQUESTS == pytest.approx(busiest, abs=0.05)
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert f"| {exponent} | {hit:.0%} | {busiest} |" in page


@pytest.mark.parametrize(
    ("text", "value"),
    [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5kB", 1500), ("7", 7), ("2tib", 2 * 2**40), ("3 B", 3)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text, "memory") == value


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "1e3GB", "3 GX"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="memory: expected a size"):
        parse_bytes(text, "memory")


def test_counts() -> None:
    assert [parse_count(text, "users") for text in ("7", "1e6", "1_000", "2,000", "1.0")] == [7, 10**6, 1000, 2000, 1]
    for text in ("", "x", "1.5", "inf", "nan"):
        with pytest.raises(ConfigError, match="users: expected a whole number"):
            parse_count(text, "users")
