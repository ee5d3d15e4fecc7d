"""What a service keeps beside adapters, on SQLite and PostgreSQL: whole, apart, one worker each, gone when removed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kilotune.errors import AdapterError, ConfigError, StoreLimitError, UnsupportedError
from kilotune.fleet.store import open_store
from kilotune.fleet.store.documents import Document, Documents, QuotaError
from tests.support.store_support import Clock, Opener, contents


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ann(opened: Opener, clock: Clock) -> Documents:
    return Documents(opened(), "ann", clock)


def test_a_document_comes_back(ann: Documents, opened: Opener, clock: Clock) -> None:
    body = [b"", b"x" * 1_500_000, "Ä\0".encode()]
    made = ann.add("file", {"filename": "a.jsonl", "n": [1, None, "ß"]}, body=body, prefix="file", until=clock.now + 60)
    assert made.name.startswith("file-")
    assert len(made.name) >= 24
    assert made.size == 1_500_003
    for seen in (ann, Documents(opened(), "ann")):
        assert seen.find("file", made.name) == made
        assert b"".join(seen.body("file", made.name)) == b"".join(body)
    assert ann.find("job", made.name) is None
    assert list(ann.body("file", "file-nothing")) == []


def test_a_document_gets_other_bytes(ann: Documents) -> None:
    made = ann.add("file", {"a": 1}, body=[b"x" * 2_500_000])
    assert ann.refill("file", made.name, [b"abc", b"", b"d"]) is True
    assert b"".join(ann.body("file", made.name)) == b"abcd"
    assert ann.find("file", made.name) == replace(made, size=4)
    assert ann.within("ben").refill("file", made.name, [b"e"]) is False
    assert ann.total("file") == (1, 4)


def test_nobody_finds_what_is_anothers(ann: Documents) -> None:
    mine = ann.add("file", {"a": 1}, body=[b"secret"])
    ben = ann.within("ben")
    assert ben.find("file", mine.name) is None
    assert list(ben.body("file", mine.name)) == []
    assert ben.ls("file") == []
    assert ben.change("file", mine.name, lambda one: replace(one, data={})) is None
    assert ben.rm("file", mine.name) is False
    assert ben.total("file") == (0, 0)
    with pytest.raises(AdapterError, match="there is no"):
        ben.add("event", {}, parent=mine.name)
    assert ann.find("file", mine.name) == mine


def test_lists_go_by_the_order_in_which_they_came(ann: Documents) -> None:
    job = ann.add("job", {}, state="queued")
    events = [ann.add("event", {"n": n}, parent=job.name) for n in range(7)]
    ann.add("event", {"n": -1})
    assert [one.data["n"] for one in ann.ls("event", parent=job.name)] == list(range(7))
    page = ann.ls("event", parent=job.name, newest=True, limit=3)
    assert [one.data["n"] for one in page] == [6, 5, 4]
    following = ann.ls("event", parent=job.name, newest=True, limit=3, after=page[-1].name)
    assert [one.data["n"] for one in following] == [3, 2, 1]
    assert [one.data["n"] for one in ann.ls("event", parent=job.name, after=events[4].name)] == [5, 6]
    assert ann.ls("job", state="running") == []


def test_a_change_is_whole_and_nobody_comes_in_between(ann: Documents, opened: Opener) -> None:
    job = ann.add("job", {"n": 0}, state="queued")
    others = [Documents(opened(), "ann") for _ in range(4)]

    def count(seen: Documents) -> None:
        for _ in range(10):
            seen.change("job", job.name, lambda one: replace(one, data={"n": one.data["n"] + 1}))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, others))
    assert ann.find("job", job.name).data == {"n": 40}  # type: ignore[union-attr]

    def fails(one: Document) -> Document:
        raise KeyError("no")

    with pytest.raises(KeyError):
        ann.change("job", job.name, fails)
    assert ann.find("job", job.name).data == {"n": 40}  # type: ignore[union-attr]


def test_each_job_has_one_worker_and_a_dead_ones_is_taken_over(ann: Documents, opened: Opener, clock: Clock) -> None:
    jobs = [ann.add("job", {"n": n}, state="queued") for n in range(6)]
    workers = [Documents(opened(), None, clock) for _ in range(3)]
    taken: list[str] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        for _ in range(20):
            if (one := workers[number].claim("job", f"w{number}", 30)) is not None:
                with lock:
                    taken.append(one.name)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert sorted(taken) == sorted(one.name for one in jobs)  # each once
    assert workers[0].claim("job", "w9", 30) is None
    clock.now += 20
    found = ann.find("job", jobs[0].name)
    assert found is not None
    assert found.state == "running"
    assert workers[0].renew("job", found.name, str(found.owner), 30)
    clock.now += 20  # the others have given no sign of life for 40 s
    again = [workers[0].claim("job", "w9", 30) for _ in range(6)]
    assert [one.name for one in again if one is not None] == [one.name for one in jobs[1:]]
    assert not workers[0].renew("job", jobs[1].name, "w0", 30)


def test_what_belongs_to_it_goes_with_it(ann: Documents) -> None:
    job, other = ann.add("job", {}), ann.add("job", {})
    event = ann.add("event", {}, parent=job.name)
    below = ann.add("note", {}, parent=event.name, body=[b"deep"])
    kept = ann.add("event", {}, parent=other.name)
    assert ann.rm("job", job.name)
    assert not ann.rm("job", job.name)
    assert [ann.find(*one) for one in (("event", event.name), ("note", below.name))] == [None, None]
    assert ann.find("event", kept.name) == kept


def test_what_is_kept_for_a_time_goes(ann: Documents, clock: Clock) -> None:
    short, long = (ann.add("answer", {}, until=clock.now + seconds) for seconds in (10, 100))
    ann.add("answer", {})
    assert ann.expire("answer") == 0
    clock.now += 50
    assert ann.expire("answer") == 1
    assert ann.find("answer", short.name) is None
    assert ann.find("answer", long.name) == long


def test_quotas_hold_for_those_who_come_at_once(ann: Documents, opened: Opener) -> None:
    stores = [Documents(opened(), "ann") for _ in range(4)]

    def put(seen: Documents) -> bool:
        try:
            seen.add("file", {}, body=[b"x" * 400], quota=1000)
        except QuotaError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(put, stores)) == 2
    with pytest.raises(QuotaError, match="400 bytes beside the 800 there are more than the 1000 allowed"):
        ann.add("file", {}, body=[b"x" * 400], quota=1000)
    assert ann.total("file") == (2, 800)
    assert ann.within("ben").add("file", {}, body=[b"x" * 900], quota=1000).size == 900


def test_adapters_are_as_ever_beside_it(ann: Documents, opened: Opener) -> None:
    store = opened()
    store.put("one", contents(1))
    ann.add("file", {})
    assert [version.name for version in opened().ls()] == ["one"]
    assert not list(store.verify())


def test_what_is_removed_is_in_no_file_of_sqlite(tmp_path: Path) -> None:
    secret = b"Ann's secret sentence"
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        ann = Documents(store, "ann")
        kept = ann.add("file", {"filename": "kept"}, body=[b"kept sentence"])
        made = ann.add("file", {"filename": "ann.jsonl"}, body=[secret * 300])
        ann.add("event", {"text": secret.decode()}, parent=made.name)

        def on_disk(text: bytes) -> bool:
            return any(text in file.read_bytes() for file in tmp_path.iterdir())

        assert on_disk(secret)
        ann.rm("file", made.name)
        assert not on_disk(secret)
        assert on_disk(b"kept sentence")
        assert ann.find("file", kept.name) is not None


def test_stores_that_cannot(tmp_path: Path) -> None:
    (tmp_path / "folders").mkdir()
    with (
        open_store(tmp_path / "folders") as folders,
        pytest.raises(UnsupportedError, match="keeps adapters alone; files, jobs and feedback need a store in SQLite"),
    ):
        Documents(folders, "ann")
    url: Any = f"sqlite:///{tmp_path}/a.db"
    open_store(url).close()
    with open_store(url, read_only=True) as only, pytest.raises(StoreLimitError, match="to be read alone"):
        Documents(only, "ann")


def test_one_takes_the_place_of_another(ann: Documents) -> None:
    job, other = ann.add("job", {}), ann.add("job", {})
    first, replaced = ann.swap("word", {"n": 1}, parent=job.name, state="a", body=[b"x" * 60], quota=100)
    assert not replaced
    ann.add("event", {}, parent=first.name)
    beside = [
        ann.add("word", {}, parent=job.name, state="b"),
        ann.add("word", {}, parent=other.name, state="a"),
        ann.within("ben").add("word", {}, state="a"),
    ]
    second, replaced = ann.swap("word", {"n": 2}, parent=job.name, state="a", body=[b"y" * 60], quota=100)
    assert replaced
    assert second.name != first.name
    assert ann.find("word", first.name) is None
    assert ann.ls("event") == []
    assert ann.ls("word") == [*beside[:2], second]
    assert ann.within("ben").ls("word") == beside[2:]
    with pytest.raises(QuotaError):
        ann.swap("word", {"n": 3}, parent=job.name, state="a", body=[b"z" * 101], quota=100)
    assert ann.ls("word", parent=job.name, state="a") == [second]


def test_the_oldest_go_until_the_rest_is_small_enough(ann: Documents) -> None:
    files = [ann.add("file", {}, body=[b"x" * size]) for size in (10, 20, 30, 40)]
    his = ann.within("ben").add("file", {}, body=[b"x" * 99])
    assert ann.shrink("file", 100) == 0
    assert ann.shrink("file", 75) == 2
    assert ann.ls("file") == files[2:]
    assert ann.shrink("file", 0) == 2
    assert ann.within("ben").ls("file") == [his]


def test_what_waits_for_its_time_is_not_taken_before(ann: Documents, clock: Clock) -> None:
    later = ann.add("turn", {}, state="queued", until=clock.now + 10)
    at_once = ann.add("turn", {}, state="queued")
    found = [ann.claim("turn", "w", 30) for _ in range(2)]
    assert [one and one.name for one in found] == [at_once.name, None]
    clock.now += 10
    assert ann.claim("turn", "w", 30).name == later.name


def test_a_document_of_a_known_name_is_made_once(ann: Documents, opened: Opener, clock: Clock) -> None:
    others = [Documents(opened(), "ann", clock) for _ in range(4)]

    def count(seen: Documents) -> None:
        for _ in range(5):
            seen.put("turn", "turn-u", lambda one: Document("", "", "", {"n": 1 if one is None else one.data["n"] + 1}))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, others))
    found = ann.find("turn", "turn-u")
    assert found is not None
    assert (found.data, found.created, ann.total("turn")) == ({"n": 20}, clock.now, (1, 0))

    def fails(one: Document | None) -> Document:
        raise KeyError("no")

    with pytest.raises(KeyError):
        ann.put("turn", "turn-v", fails)
    assert ann.find("turn", "turn-v") is None


def test_who_has_much_that_waits_keeps_nobody_else_waiting(opened: Opener, clock: Clock) -> None:
    everyone = Documents(opened(), clock=clock)
    many, few = everyone.within("many"), everyone.within("few")
    for _ in range(5):
        many.add("turn", {}, state="queued", until=clock.now)
        clock.now += 1
    first = few.add("turn", {}, state="queued", until=clock.now)
    taken = [everyone.claim("turn", "one", 60).namespace for _ in range(3)]
    assert taken == ["many", "few", "many"]
    few.change("turn", first.name, lambda one: replace(one, state="queued", owner=None, until=clock.now))
    assert everyone.claim("turn", "one", 60).namespace == "few"


def test_who_was_first_once_is_not_first_for_good(ann: Documents, clock: Clock) -> None:
    old = ann.add("turn", {}, state="rests")
    new = ann.add("turn", {}, state="queued", until=clock.now)
    clock.now += 1
    ann.change("turn", old.name, lambda one: replace(one, state="queued", until=clock.now))
    assert [ann.claim("turn", "one", 60).name for _ in range(2)] == [new.name, old.name]


def test_all_in_a_state_are_moved_at_once(ann: Documents, clock: Clock) -> None:
    made = [ann.add("turn", {"n": n}, state=state) for n, state in enumerate(("parked", "rests", "running"))]
    other = ann.within("ben").add("turn", {}, state="parked")
    assert ann.move("turn", ("parked", "rests"), "queued", clock.now + 5) == 2
    assert [ann.find("turn", one.name).state for one in made] == ["queued", "queued", "running"]  # type: ignore[union-attr]
    assert ann.within("ben").find("turn", other.name) == other
    assert ann.claim("turn", "one", 60) is None
    clock.now += 6
    assert ann.claim("turn", "one", 60).data == {"n": 0}


def test_what_belongs_to_one_is_counted_and_shrunk_alone(ann: Documents) -> None:
    first, second = (ann.add("person", {}) for _ in range(2))
    for parent in (first, second, first):
        ann.add("answer", {}, parent=parent.name, body=[b"xxxx"])
    assert ann.total("answer", parent=first.name) == (2, 8)
    assert ann.shrink("answer", 4, parent=first.name) == 1
    assert ann.total("answer", parent=second.name) == (1, 4)
    assert ann.total("answer") == (2, 8)


def test_what_strangers_write_is_an_error_of_theirs(ann: Documents) -> None:
    for name in ("a\0b", "\0"):
        assert ann.find("file", name) is None
        assert list(ann.body("file", name)) == []
        assert ann.ls("file", after=name) == []
        assert ann.rm("file", name) is False
        assert ann.change("file", name, lambda one: one) is None
        with pytest.raises(AdapterError, match="there is no"):
            ann.add("file", {}, parent=name)
    for data in ({"a": "\ud800"}, {"\udfff": [1]}):
        with pytest.raises(ConfigError, match="half of a surrogate pair"):
            ann.add("file", data)
    assert ann.total("file") == (0, 0)


def test_many_remove_at_once(tmp_path: Path) -> None:
    """SQLite does not wait for another one that cuts the log."""
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        documents = Documents(store).within("ann")

        def remove(number: int) -> None:
            for _ in range(15):
                made = documents.add("job", {"number": number}, body=[b"x" * 5000])
                assert documents.rm("job", made.name)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(remove, range(6)))
        assert documents.total("job") == (0, 0)


def test_several_things_are_done_together_or_not_at_all(ann: Documents, opened: Opener) -> None:
    seen = Documents(opened(), "ann")

    def half(own: Documents) -> None:
        made = own.add("job", {"n": 1})
        assert own.find("job", made.name) is not None
        own.put("event", "first", lambda found: found or Document("event", "", "", {}, parent=made.name))
        raise QuotaError("no more")

    with pytest.raises(QuotaError):
        ann.together(half)
    assert seen.total("job") == seen.total("event") == (0, 0)

    def whole(own: Documents) -> Document:
        made = own.add("job", {"n": 2}, state="queued", body=[b"abc"])
        own.change("job", made.name, lambda one: replace(one, state="running"))
        own.add("event", {}, parent=made.name)
        assert own.together(lambda inner: inner.total("event")) == (1, 0)
        assert b"".join(own.body("job", made.name)) == b"abc"
        return made

    found = seen.find("job", ann.together(whole).name)
    assert found is not None
    assert found.state == "running"
    assert seen.total("event") == (1, 0)


def test_what_is_removed_together_with_something_is_in_no_file_of_sqlite(tmp_path: Path) -> None:
    secret = b"Ann's secret sentence"
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        ann = Documents(store, "ann")
        made = [ann.add("file", {}, body=[secret * 300]) for _ in range(2)]
        ann.together(lambda own: [own.rm("file", one.name) for one in made])
        assert not any(secret in file.read_bytes() for file in tmp_path.iterdir())


def test_what_need_not_be_off_the_disk_is_gone_all_the_same(ann: Documents, opened: Opener) -> None:
    made = ann.add("state", {"a": 1}, body=[b"abc"])
    ann.add("event", {}, parent=made.name)
    assert ann.rm("state", made.name, erased=False) is True
    assert ann.rm("state", made.name, erased=False) is False
    assert Documents(opened(), "ann").total("event") == (0, 0)
