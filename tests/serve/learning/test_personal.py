"""From feedback to a version that answers: learned, gone on from, taken back, refused, and published once."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kilotune.errors import ResourceError
from kilotune.fleet.store import Record
from kilotune.fleet.store.documents import Documents
from kilotune.serve.engine.interface import AdapterKey
from kilotune.serve.learning.feedback import FeedbackRules
from kilotune.serve.learning.gate import Bounds
from kilotune.serve.learning.personal import _Run
from kilotune.serve.learning.rollback import marks_of, roll_back
from kilotune.serve.learning.scope import Likeness, Scopes, general_questions, lessons_in
from kilotune.serve.learning.study import Pace, Study
from kilotune.serve.learning.turns import LEARNING, Turn, events, turn_name, wake
from kilotune.serve.learning.users import LIVE, model_of
from kilotune.serve.learning.workers import LeftError
from tests.support.http_support import adapter_folder, tokenizer
from tests.support.learning_support import TOY, Learning, learning


def record(school: Learning, user: str, version: int) -> Record:
    return school.registry.stored(school.space, school.registry.info(school.space, model_of(user), version))


def numbers(school: Learning, user: str, version: int) -> bytes:
    return record(school, user, version).packed


def told(school: Learning, user: str) -> list[str]:
    return [one.data["type"] for one in reversed(events(school.documents, user))]


def test_corrections_are_learned_one_after_another_and_the_base_stays(school: Learning) -> None:
    before = school.said("nobody", "the cat")
    first = school.correct("ann", "the cat", "a dog sat")
    event = school.learn("ann")
    assert (event["type"], event["data"]["lessons"], event["data"]["version"]) == ("learned", [first], 1)
    assert school.said("ann", "the cat") == "a dog sat"
    second = school.correct("ann", "a dog", "on the hat")
    event = school.learn("ann")
    assert (event["type"], event["data"]["lessons"]) == ("learned", [second])
    assert school.live("ann") == 2
    assert school.said("ann", "a dog") == "on the hat"
    assert school.said("ann", "the cat") == "a dog sat"  # it was replayed
    assert school.said("nobody", "the cat") == before
    assert event["data"]["gate"]["kl"] <= school.runner.bounds.divergence
    assert len(marks_of(record(school, "ann", 2).info)) == 2
    assert school.learn("ann") == event  # nothing is new
    assert school.versions("ann") == [1, 2]
    counts = school.runner.counts()
    assert (counts.learned, counts.corrections) == (2, 2)
    assert counts.correction_seconds > 0


def test_choices_and_ratings_are_learned_too(school: Learning) -> None:
    school.choose("eve", "the cat", "a dog sat", "on the hat")
    school.rate("eve", "a dog", "the mat", up=True)
    school.rate("eve", "a mat", "the hat", up=False)
    event = school.learn("eve")
    assert event["type"] == "learned"
    assert len(event["data"]["lessons"]) == 3
    assert event["data"]["steps"] > 0


def test_what_cannot_be_rendered_is_told_once_and_stops_nothing(school: Learning) -> None:
    long = school.correct("fay", "the cat", "the dog sat " * 200, "no")
    school.correct("fay", "a dog", "on the hat", "no")
    school.learn("fay")
    assert told(school, "fay") == ["skipped", "learned"]
    skipped = events(school.documents, "fay")[-1].data
    assert skipped["data"]["lessons"] == [long]
    assert "tokens; the model takes 256" in skipped["message"]
    school.learn("fay")
    assert told(school, "fay") == ["skipped", "learned"]


@pytest.mark.heavy
def test_a_newer_correction_of_a_prompt_takes_the_older_ones_place(school: Learning) -> None:
    school.correct("gus", "the cat", "a dog sat", "no")
    school.learn("gus")
    school.correct("gus", "the cat", "on the hat", "a dog sat")
    assert school.learn("gus")["type"] == "learned"  # and it is not held against it that the old one is known less
    assert school.said("gus", "the cat") == "on the hat"


@pytest.mark.heavy
def test_what_was_taken_back_is_in_no_version_and_trained_again_it_is_as_if_it_never_was(
    school: Learning, tmp_path: Path
) -> None:
    lessons = [("the cat", "a dog sat"), ("a dog", "on the hat"), ("a mat", "the cat sat")]
    names = []
    for asked, right in lessons:
        names.append(school.correct("ben", asked, right, "no"))
        school.learn("ben")
    assert school.versions("ben") == [1, 2, 3]
    school.feedback.remove(names[1], "ben")
    event = school.learn("ben")
    assert told(school, "ben")[-2:] == ["taken_back", "learned"]
    assert school.versions("ben") == [1, 4]  # the first never held it
    assert event["data"]["lessons"] == [names[0], names[2]]
    with learning(tmp_path) as other:
        for asked, right in (lessons[0], lessons[2]):
            other.correct("ben", asked, right, "no")
        other.learn("ben")
        assert numbers(other, "ben", 1) == numbers(school, "ben", 4)
    for name in (names[0], names[2]):
        school.feedback.remove(name, "ben")
    assert school.learn("ben")["type"] == "taken_back"
    assert school.versions("ben") == []
    assert school.live("ben") is None


@pytest.mark.parametrize("wiped", [True, False])
def test_numbers_of_what_was_taken_back_leave_the_disk(
    wiped: bool, school: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = f"pia {wiped}"
    name = school.correct(user, "the cat", "a dog sat", "no")
    school.learn(user)
    needle = numbers(school, user, 1)[1000:1040]
    folder = Path(school.url.removeprefix("sqlite:///")).parent

    def on_disk() -> bool:
        return any(needle in path.read_bytes() for path in folder.iterdir() if path.is_file())

    assert on_disk()
    if not wiped:  # the test can fail
        monkeypatch.setattr(Documents, "wipe", lambda _: None)
    school.feedback.remove(name, user)
    assert school.learn(user)["type"] == "taken_back"
    assert on_disk() is not wiped


def test_an_equal_correction_that_still_stands_is_not_taken_back(school: Learning) -> None:
    first = school.correct("hal", "the cat", "a dog sat", "no")
    school.correct("hal", "the cat", "a dog sat", "no")
    school.learn("hal")
    school.feedback.remove(first, "hal")
    assert school.learn("hal")["type"] == "learned"
    assert school.versions("hal") == [1]


def test_where_feedback_was_turned_off_nothing_is_learned_and_what_is_taken_back_goes(school: Learning) -> None:
    name = school.correct("ida", "the cat", "a dog sat", "no")
    school.learn("ida")
    school.correct("ida", "a dog", "on the hat", "no")
    school.feedback.set_rules(FeedbackRules(enabled=False))
    try:
        school.learn("ida")
        assert school.versions("ida") == [1]
        school.feedback.remove(name, "ida")
        school.learn("ida")
        assert school.versions("ida") == []
        assert school.claim() is None
    finally:
        school.feedback.set_rules(FeedbackRules(enabled=True, pause_seconds=0))
    assert woken(school, "ida")["type"] == "learned"  # what was given before, without a word
    assert school.said("ida", "a dog") == "on the hat"


@pytest.mark.heavy
@pytest.mark.parametrize("moment", ["while it learns", "before it is parked"])
def test_rules_that_change_meanwhile_hold(moment: str, school: Learning, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they forbid is not published, and nobody is parked who may learn."""
    user, on, off = f"ned {moment}", FeedbackRules(enabled=True, pause_seconds=0), FeedbackRules(enabled=False)
    school.correct(user, "the cat", "a dog sat", "no")
    wake(school.documents, user, 0)
    at = (Study, "run") if moment == "while it learns" else (Turn, "end")
    first, then = (on, off) if moment == "while it learns" else (off, on)
    school.feedback.set_rules(first)
    claim = school.claim()
    assert claim is not None
    real = getattr(*at)

    def meanwhile(*given: Any) -> None:
        school.feedback.set_rules(then)
        real(*given)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(*at, meanwhile)
            if moment == "while it learns":
                with pytest.raises(LeftError):
                    school.runner._work(claim)
            else:
                school.runner._work(claim)
        assert school.versions(user) == []
        if moment == "while it learns":
            assert woken(school, user) == {}
            assert school.state(user) == "parked"
    finally:
        school.feedback.set_rules(on)
    assert woken(school, user)["type"] == "learned"


@pytest.mark.heavy
def test_what_is_learned_for_one_scope_is_not_published_in_another(
    school: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, everything = (FeedbackRules(enabled=True, pause_seconds=0, scope=scope) for scope in ("near", "all"))
    school.correct("pia", "the cat", "a dog sat", "no")
    wake(school.documents, "pia", 0)
    claim = school.claim()
    assert claim is not None
    plain = Study.run

    def meanwhile(study: Study) -> None:
        school.feedback.set_rules(everything)
        plain(study)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(Study, "run", meanwhile)
            with pytest.raises(LeftError):
                school.runner._work(claim)
        assert school.versions("pia") == []
        assert woken(school, "pia")["type"] == "learned"
    finally:
        school.feedback.set_rules(near)


@pytest.mark.parametrize("scope", ["near", "all"])
def test_what_answers_everything_is_held_to_the_base_more(
    scope: Any, school: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces: list[Pace] = []

    def studied(*given: Any) -> Study:
        paces.append(given[6])
        return Study(*given)

    monkeypatch.setattr("kilotune.serve.learning.personal.Study", studied)
    school.feedback.set_rules(FeedbackRules(enabled=True, pause_seconds=0, scope=scope))
    try:
        school.correct(f"quin {scope}", "the cat", "a dog sat", "no")
        school.learn(f"quin {scope}")
    finally:
        school.feedback.set_rules(FeedbackRules(enabled=True, pause_seconds=0))
    assert paces == [TOY if scope == "near" else TOY.everywhere()]
    assert TOY.everywhere().guard > TOY.guard
    assert TOY.everywhere().guarded > TOY.guarded


def test_questions_of_what_is_taken_back_are_forgotten(school: Learning, monkeypatch: pytest.MonkeyPatch) -> None:
    scopes = Scopes(Likeness(school.learner.embedding, tokenizer(), general_questions()))
    monkeypatch.setattr(school.runner, "scopes", scopes)
    name = school.correct("ria", "the cat", "a dog sat", "no")
    school.learn("ria")
    key = AdapterKey.of(school.space, school.registry.info(school.space, model_of("ria"), 1))
    assert scopes.near(key, ["the cat"], lambda: lessons_in(school.registry, school.feedback, key, "ria"))
    assert list(scopes._held) == [key]
    school.feedback.remove(name, "ria")
    school.learn("ria")
    assert not scopes._held


def woken(school: Learning, user: str) -> dict[str, Any]:
    """The last event, once whoever's turn it is had it, which is this user."""
    claim = school.claim()
    assert claim is not None
    assert claim.document.data["user"] == user
    school.runner._work(claim)
    return school.last(user)


def test_who_has_many_lessons_has_a_turn_for_some_of_them_at_a_time(
    school: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kilotune.serve.learning.personal.AT_A_TIME", 1)
    lessons = [("the cat", "a dog sat"), ("a dog", "on the hat")]
    names = [school.correct("max", asked, right, "no") for asked, right in lessons]
    assert school.learn("max")["data"]["lessons"] == names[:1]
    assert woken(school, "max")["data"]["lessons"] == names[1:]
    assert [school.said("max", asked) for asked, _ in lessons] == [right for _, right in lessons]
    assert school.claim() is None


def test_what_was_said_last_holds_though_it_was_said_before(school: Learning) -> None:
    for right in ("a dog sat", "on the hat", "a dog sat"):
        school.correct("nan", "the cat", right, "no")
    assert school.learn("nan")["type"] == "learned"
    assert school.said("nan", "the cat") == "a dog sat"


def test_what_there_is_no_room_for_is_told_and_tried_again(school: Learning, monkeypatch: pytest.MonkeyPatch) -> None:
    school.correct("oda", "the cat", "a dog sat", "no")

    def full(*_: object, **__: object) -> None:
        raise ResourceError("256 models are in training")

    with monkeypatch.context() as patched:
        patched.setattr(_Run, "_study", full)
        for _ in range(2):
            event = school.learn("oda")
    assert (event["type"], told(school, "oda")) == ("waits", ["waits"])
    assert "tried again in 30 s: 256 models" in event["message"]
    assert school.state("oda") == "queued"
    assert school.learn("oda")["type"] == "learned"


# -- the gate in the way -------------------------------------------------------------------------------------


def test_a_refused_candidate_is_kept_without_the_alias_and_not_tried_again(
    school: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = school.correct("joe", "the cat", "a dog sat", "no")
    with monkeypatch.context() as strict:
        strict.setattr(school.runner, "bounds", Bounds(divergence=1e-9))
        event = school.learn("joe")
        assert event["type"] == "refused"
        assert event["data"]["lessons"] == [first]
        assert "KL from what is live on the guard's texts" in event["message"]
        assert (school.versions("joe"), school.live("joe")) == ([1], None)
        assert "KL" in record(school, "joe", 1).info.metadata["refused"][0]
    school.learn("joe")
    assert school.versions("joe") == [1]
    again = school.correct("joe", "the cat", "a dog sat", "no")  # the very same
    monkeypatch.setattr("kilotune.serve.learning.personal.KEPT", 1)
    with monkeypatch.context() as strict:
        strict.setattr(school.runner, "bounds", Bounds(divergence=1e-8))
        assert school.learn("joe")["type"] == "refused"
    assert len(school.versions("joe")) == 1  # of those that were refused the oldest went
    school.feedback.remove(again, "joe")
    second = school.correct("joe", "a dog", "on the hat", "no")
    event = school.learn("joe")
    assert (event["type"], event["data"]["lessons"], school.live("joe")) == ("learned", [second], 3)


def test_numbers_that_are_not_finite_are_refused(school: Learning, monkeypatch: pytest.MonkeyPatch) -> None:
    school.correct("kim", "the cat", "a dog sat", "no")
    monkeypatch.setattr(school.runner, "pace", replace(school.runner.pace, rate=1e30))
    event = school.learn("kim")
    assert event["type"] == "refused"
    assert "not finite" in event["message"]
    assert school.live("kim") is None


# -- one run at a time, and once -------------------------------------------------------------------------------


def killed(school: Learning, user: str) -> None:
    """Whoever has the turn gives no sign of life any more."""
    school.documents.change(LEARNING, turn_name(school.space, user), lambda one: replace(one, until=1.0))


def test_a_run_that_was_killed_is_taken_up_and_publishes_once(
    school: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = school.correct("lea", "the cat", "a dog sat", "no")
    wake(school.documents, "lea", 0)

    def dies(*_: object, **__: object) -> None:
        raise LeftError

    for method in ("_study", "_publish", "_say_learned"):  # before, after it has learned, after it is live
        claim = school.claim()
        assert claim is not None
        with monkeypatch.context() as patched:
            patched.setattr(_Run, method, dies)
            with pytest.raises(LeftError):
                school.runner._work(claim)
        killed(school, "lea")
    assert school.live("lea") == 1
    assert told(school, "lea") == []
    claim = school.claim()
    assert claim is not None
    school.runner._work(claim)
    assert school.versions("lea") == [1]
    assert told(school, "lea") == ["learned"]
    assert school.last("lea")["data"]["lessons"] == [name]
    assert school.claim() is None


@pytest.mark.parametrize(
    "change", ["rolled back", *(pytest.param(one, marks=pytest.mark.heavy) for one in ("taken back", "taken over"))]
)
def test_what_changes_meanwhile_is_not_published(
    change: str, school: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = f"mia {change}"
    school.correct(user, "the cat", "a dog sat", "no")
    school.learn(user)
    name = school.correct(user, "a dog", "on the hat", "no")
    wake(school.documents, user, 0)
    claim = school.claim()
    assert claim is not None
    run = Study.run

    def meanwhile(study: Study) -> None:
        run(study)
        if change == "taken back":
            school.feedback.remove(name, user)
        elif change == "rolled back":
            roll_back(school.documents, school.registry, user)
        else:
            killed(school, user)
            assert school.everyone.claim(LEARNING, "another", 15) is not None

    with monkeypatch.context() as patched:
        patched.setattr(Study, "run", meanwhile)
        with pytest.raises(LeftError):
            school.runner._work(claim)
    assert school.versions(user) == [1]
    if change == "taken over":
        assert school.state(user) == "running"
        return
    assert school.state(user) == "queued"
    following = school.claim()
    assert following is not None
    school.runner._work(following)
    assert school.live(user) == (1 if change == "taken back" else 2)


@pytest.mark.heavy
def test_a_server_runs_turns_by_itself(tmp_path: Path) -> None:
    with learning(tmp_path) as own:
        own.runner.start()
        try:
            for user in ("ann", "ben"):
                own.correct(user, "the cat", "a dog sat", "no")
                wake(own.documents, user, 0)
            end = time.monotonic() + 60
            while any(own.state(user) != "rests" for user in ("ann", "ben")):
                assert time.monotonic() < end
                time.sleep(0.05)
            assert {own.said(user, "the cat") for user in ("ann", "ben")} == {"a dog sat"}
        finally:
            own.runner.stop()


# -- on a shared one --------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_a_personal_model_stands_on_the_shared_one_of_the_rules_and_follows_it(tmp_path: Path) -> None:
    with learning(tmp_path) as own:
        for seed in (3, 4):
            own.registry.put(own.space, "house", adapter_folder(seed), alias="live" if seed == 3 else None)
        own.feedback.set_rules(FeedbackRules(enabled=True, pause_seconds=0, model="house/live"))
        own.correct("ann", "the cat", "a dog sat", "no")
        own.correct("ann", "a dog", "on the hat", "no")
        assert own.learn("ann")["type"] == "learned"
        stands: Any = own.registry.info(own.space, model_of("ann"), LIVE).stands_on
        assert (stands.name, stands.version) == ("house", 1)
        own.registry.roll_out(own.space, "live", {"house": 2})
        assert own.learn("ann")["type"] == "learned"
        stands = own.registry.info(own.space, model_of("ann"), LIVE).stands_on
        assert (stands.name, stands.version) == ("house", 2)
        own.feedback.set_rules(FeedbackRules(enabled=True, pause_seconds=0, model="nothing"))
        own.correct("ann", "a mat", "the cat", "no")
        event = own.learn("ann")
        assert event["type"] == "failed"
        assert "nothing" in event["message"]
        assert own.state("ann") == "parked"
        own.feedback.set_rules(FeedbackRules(enabled=True, pause_seconds=0, model="house/live"))
        assert woken(own, "ann")["type"] == "learned"
        own.feedback.set_rules(FeedbackRules(enabled=True, pause_seconds=0))  # all of it, on something else
        assert woken(own, "ann")["type"] == "learned"
        assert own.registry.info(own.space, model_of("ann"), LIVE).stands_on is None
