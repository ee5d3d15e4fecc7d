"""kill -9 at random moments of put, alias, roll back, rm and gc: what was acknowledged is there, and nothing by halves.

Few kills here, hundreds in the full tier (`make test-full`). That the check would notice is shown on two planted bugs.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kilotune.fleet.store import open_store
from tests.support.store_crash import PLANTED, Expected, Zygote, kill_rounds, settled
from tests.support.store_support import KINDS, has_postgres, new_url


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_url(request.param, request, tmp_path)


@pytest.mark.heavy
def test_kills_leave_whole_changes(zygote: Zygote, url: str, tmp_path: Path) -> None:
    assert kill_rounds(zygote, url, tmp_path, 20, partial(open_store, url)) > 0


@pytest.mark.heavy
def test_kills_of_two_at_once_leave_whole_changes(zygote: Zygote, url: str, tmp_path: Path) -> None:
    assert kill_rounds(zygote, url, tmp_path, 8, partial(open_store, url), victims=2, longest=0.15) > 0


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_hundreds_of_kills_leave_whole_changes(zygote: Zygote, url: str, tmp_path: Path) -> None:
    assert kill_rounds(zygote, url, tmp_path, 400, partial(open_store, url)) > 100


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_hundreds_of_kills_of_three_at_once(zygote: Zygote, url: str, tmp_path: Path) -> None:
    assert kill_rounds(zygote, url, tmp_path, 150, partial(open_store, url), victims=3, longest=0.3) > 100


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_kills_while_the_store_is_made(zygote: Zygote, tmp_path: Path) -> None:
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        url = f"sqlite:///{folder}/a.db"
        kill_rounds(zygote, url, folder, 1, partial(open_store, url), longest=0.02)


@pytest.mark.heavy
@pytest.mark.parametrize("planted", PLANTED[1:])
def test_a_planted_bug_is_noticed(planted: str, zygote: Zygote, url: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="expected one of|are not there|belong to no version|tags differ|damaged"):
        kill_rounds(zygote, url, tmp_path, 300, partial(open_store, url), planted)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("crashes", [2, pytest.param(15, marks=pytest.mark.full)])
def test_a_server_that_crashes_keeps_what_it_acknowledged(crashes: int, zygote: Zygote, tmp_path: Path) -> None:
    """The server's processes are cut off in the middle, as by a crash, while two clients write."""
    if not has_postgres():
        pytest.skip("PostgreSQL is not installed")
    from tests.support.postgres_server import running

    with running() as server:
        url = server.new_place()
        states = [Expected(), Expected()]
        for number in range(crashes):
            journals = [tmp_path / f"journal-{number}-{i}" for i in range(2)]
            victims = [
                zygote.start(url=url, namespace=f"space-{i}", journal=str(journals[i]), seed=number * 2 + i, planted="")
                for i in range(2)
            ]
            end = time.monotonic() + 60
            while any(not j.exists() or j.read_text().count("refused") < 5 + 3 * number % 11 for j in journals):
                assert time.monotonic() < end
                time.sleep(0.002)
            server.stop(signal.SIGQUIT)
            zygote.end(victims)
            server.start()
            for i in range(2):
                with open_store(url, namespace=f"space-{i}") as store:
                    states[i] = settled(states[i], journals[i], store)
