"""Who takes documents and keeps them: one claim at a time, whoever slept meanwhile."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from kilotune.fleet.store import open_store
from kilotune.fleet.store.documents import Documents
from kilotune.serve.learning import workers
from kilotune.serve.learning.workers import Claim, Workers


def test_who_slept_over_a_lease_has_no_claim_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the same server takes the document again."""
    for name, value in (("LEASE", 0.2), ("ALIVE", 0.5), ("POLL", 0.01)):  # its signs of life come too late
        monkeypatch.setattr(workers, name, value)
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        documents = Documents(store)
        made = documents.within("ann").add("job", {}, state="queued")
        claims: list[Claim] = []
        end = threading.Event()

        def work(claim: Claim) -> None:
            claims.append(claim)
            end.wait(20)

        own = Workers(documents, "job", work, 2)
        own.start()
        until = time.monotonic() + 20
        while len(claims) < 2 or not claims[0].over:
            assert time.monotonic() < until
            time.sleep(0.02)
        found = documents.find("job", made.name)
        assert found is not None
        assert claims[0].owner != claims[1].owner
        assert found.owner != claims[0].owner
        end.set()
        own.stop()


def test_no_more_are_taken_than_there_are_places_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait are taken several at once, one of each namespace first."""
    monkeypatch.setattr(workers, "POLL", 0.01)
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        documents = Documents(store)
        for space in ("ann", "ann", "ann", "ben"):
            documents.within(space).add("job", {}, state="queued")
        begun: list[str] = []
        end = threading.Event()

        def work(claim: Claim) -> None:
            begun.append(claim.document.namespace)
            end.wait(20)

        own = Workers(documents, "job", work, 2)
        own.start()
        until = time.monotonic() + 20
        while len(begun) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.1)  # a third one would come now
        assert sorted(begun) == ["ann", "ben"]
        assert documents.total("job", states=["queued"])[0] == 2
        end.set()
        own.stop()
