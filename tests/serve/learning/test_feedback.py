"""What users say of answers, as it is kept: whose, once, for how long, and gone when it is taken back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kilotune.errors import AdapterError, ConfigError
from kilotune.fleet.store import open_store
from kilotune.fleet.store.documents import Documents, QuotaError
from kilotune.serve.learning.feedback import (
    ANSWER,
    FEEDBACK,
    PERSON,
    Answered,
    Feedback,
    FeedbackLimits,
    FeedbackRules,
    Lesson,
    Said,
)
from tests.support.store_support import Clock

ASKED = [{"role": "user", "content": "Where is it?"}]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def feedback(tmp_path: Path, clock: Clock) -> Iterator[Feedback]:
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        limits = FeedbackLimits(answer_bytes=1000, text=100, share=1.0)
        yield Feedback(Documents(store, "acme", clock), limits, clock)


def answered(text: str = "On the mat.", user: str = "ann", **more: Any) -> Answered:
    given = {"messages": ASKED, "tools": None, "model": "base", **more}
    return Answered(user=user, text=text, **given)


def kept(feedback: Feedback, text: str = "On the mat.", user: str = "ann", **more: Any) -> str:
    found = feedback.keep(answered(text, user, **more), 60.0)
    assert found is not None
    return found.name


def test_rules_are_off_until_they_are_set(feedback: Feedback) -> None:
    assert feedback.rules() == FeedbackRules()
    assert not feedback.rules().enabled
    rules = FeedbackRules(enabled=True, keep_seconds=5.0, pause_seconds=0.0, model="house/2")
    feedback.set_rules(FeedbackRules(enabled=True))
    feedback.set_rules(rules)
    assert feedback.rules() == rules
    assert not Feedback(feedback.documents.within("other")).rules().enabled
    kept(feedback)
    feedback.add("ann", Said(answer=kept(feedback), rating=True))
    feedback.set_rules(FeedbackRules())
    assert feedback.documents.ls(ANSWER) == []
    assert len(feedback.lessons("ann")) == 1


def test_each_kind_becomes_a_lesson(feedback: Feedback) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    first = kept(feedback, tools=tools, model="style", version=3, on="@shared/house/2")
    second, third = kept(feedback, "In the hat.", version=1), kept(feedback, "On a dog.")
    names = [
        feedback.add("ann", said)[0].name
        for said in (
            Said(
                answer=first, correction="On the hat, \ud83d\ude00.".encode("utf-16", "surrogatepass").decode("utf-16")
            ),
            Said(answer=second, better_than=third),
            Said(answer=third, rating=False),
        )
    ]
    correction, choice, rating = feedback.lessons("ann")
    assert [one.name for one in (correction, choice, rating)] == names
    assert correction == Lesson(
        name=names[0],
        user="ann",
        kind="correction",
        messages=ASKED,
        tools=tools,
        answer="On the mat.",
        better="On the hat, 😀.",
        rating=None,
        model="style",
        version=3,
        on="@shared/house/2",
        created=1_700_000_000.0,
    )
    assert (choice.kind, choice.answer, choice.better, choice.version) == ("choice", "On a dog.", "In the hat.", 1)
    assert (rating.kind, rating.rating, rating.better, rating.version) == ("rating", False, None, None)
    assert feedback.lessons("bob") == []


def test_only_the_user_who_was_answered_may_say_so(feedback: Feedback) -> None:
    hers = kept(feedback)
    other = Feedback(feedback.documents.within("other"))
    told = []
    for who, user, answer in ((feedback, "bob", hers), (other, "ann", hers), (feedback, "ann", f"{hers[:-1]}!")):
        with pytest.raises(AdapterError) as error:
            who.add(user, Said(answer=answer, rating=True))
        told.append(str(error.value).replace(answer, "ID"))
    assert len({*told}) == 1
    his = kept(feedback, "In the hat.", "bob")
    with pytest.raises(AdapterError, match="no answer"):
        feedback.add("ann", Said(answer=hers, better_than=his))
    made, _ = feedback.add("ann", Said(answer=hers, rating=True))
    for who, user in ((feedback, "bob"), (other, "ann")):
        with pytest.raises(AdapterError, match="no feedback"):
            who.remove(made.name, user)
    assert len(feedback.lessons("ann")) == 1


def test_what_is_said_again_takes_the_place_of_what_was_said(feedback: Feedback) -> None:
    answer, beside = kept(feedback), kept(feedback, "In the hat.")
    feedback.add("ann", Said(answer=beside, rating=True))
    first, replaced = feedback.add("ann", Said(answer=answer, rating=True))
    assert not replaced
    second, replaced = feedback.add("ann", Said(answer=answer, correction="No."))
    assert replaced
    assert second.name != first.name
    assert [(one.kind, one.better) for one in feedback.lessons("ann")] == [("rating", None), ("correction", "No.")]
    feedback.add("ann", Said(answer=answer, better_than=beside))
    _, replaced = feedback.add("ann", Said(answer=beside, better_than=answer))  # the other way round
    assert replaced
    assert [(one.kind, one.better) for one in feedback.lessons("ann")] == [("choice", "In the hat.")]


def test_an_answer_is_kept_for_its_time_and_what_was_said_stays(feedback: Feedback, clock: Clock) -> None:
    answer = kept(feedback)
    feedback.add("ann", Said(answer=answer, rating=True))
    clock.now += 61.0
    with pytest.raises(AdapterError, match="for a time"):
        feedback.add("ann", Said(answer=answer, rating=False))
    assert feedback.documents.expire(ANSWER) == 1
    (lesson,) = feedback.lessons("ann")
    assert (lesson.rating, lesson.answer, lesson.messages) == (True, "On the mat.", ASKED)


def test_the_oldest_answers_make_room(feedback: Feedback) -> None:
    names = [kept(feedback, f"{n} {'x' * 150}") for n in range(12)]
    left = [one.name for one in feedback.documents.ls(ANSWER)]
    assert left == names[-len(left) :]
    assert 2 <= len(left) <= 5
    assert feedback.documents.total(ANSWER)[1] <= 1000
    assert feedback.keep(answered("x" * 1000), 60.0) is None
    assert [one.name for one in feedback.documents.ls(ANSWER)] == left


def test_answers_are_not_counted_for_each_one(feedback: Feedback, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    total = Documents.total

    def counting(self: Documents, kind: str, **more: Any) -> tuple[int, int]:
        counted.append(more["parent"])
        return total(self, kind, **more)

    monkeypatch.setattr(Documents, "total", counting)
    large = Feedback(feedback.documents, FeedbackLimits(answer_bytes=16_000, share=1.0))
    for n in range(60):
        kept(large, f"{n} {'x' * 150}")
    for whose in (None, feedback.person("ann")):
        assert 10 <= counted.count(whose) <= 30
    beside = Feedback(feedback.documents, large.limits)  # of another server
    for n in range(60):
        kept(large if n % 2 else beside, f"{n} {'x' * 150}")
    assert 14_000 <= total(feedback.documents, ANSWER)[1] <= 16_000 + 1000


def test_feedback_is_bounded_and_never_goes_by_itself(feedback: Feedback) -> None:
    feedback = Feedback(feedback.documents, FeedbackLimits(answer_bytes=1000, text=100, share=2.0))
    for n in range(5):
        feedback.add("ann", Said(answer=kept(feedback, str(n)), correction="x" * 100))
    answer = kept(feedback, "5")
    with pytest.raises(QuotaError, match="more than the 1000"):
        feedback.add("ann", Said(answer=answer, correction="x" * 100))
    assert len(feedback.lessons("ann")) == 5
    assert feedback.documents.total(FEEDBACK)[1] <= 1000


def test_one_user_takes_a_share_of_the_room_and_no_more(feedback: Feedback) -> None:
    shared = Feedback(feedback.documents, FeedbackLimits(answer_bytes=8000, text=100, pieces=3))
    his = kept(shared, "On a dog.", "bob")
    for n in range(30):
        kept(shared, f"{n} {'x' * 150}")
    assert feedback.documents.total(ANSWER, parent=shared.person("ann"))[1] <= 1000
    shared.add("bob", Said(answer=his, rating=True))  # it is there yet
    for n in range(3):
        last = kept(shared, str(n))
        shared.add("ann", Said(answer=last, correction="x" * 100))
    for limits in (shared.limits, FeedbackLimits(answer_bytes=4000, text=100)):
        bounded = Feedback(feedback.documents, limits)
        answer = kept(bounded, "4")
        with pytest.raises(QuotaError, match="Take some of it back"):
            bounded.add("ann", Said(answer=answer, rating=True))
    made, replaced = shared.add("ann", Said(answer=last, rating=True))  # in place of another one
    assert replaced
    shared.add("bob", Said(answer=kept(shared, "On me.", "bob"), rating=True))
    shared.remove(made.name, "ann")
    shared.add("ann", Said(answer=kept(shared, "5"), rating=True))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, "expected one of"),
        ({"rating": True, "correction": "No."}, "expected one of"),
        ({"correction": " \n"}, "is empty"),
        ({"correction": "x" * 101}, "at most 100"),
        ({"correction": "ß" * 51}, "at most 100"),
        ({"correction": "\ud800"}, "surrogate"),
        ({"correction": "On the mat."}, "is what was answered"),
        ({"better_than": "SELF"}, "another answer"),
        ({"better_than": "SAME"}, "same text"),
        ({"better_than": "OTHER"}, "another prompt"),
    ],
)
def test_what_says_nothing_is_refused(feedback: Feedback, said: dict[str, Any], told: str) -> None:
    places = {
        "SELF": kept(feedback),
        "SAME": kept(feedback),
        "OTHER": kept(feedback, "No.", messages=[{"role": "user", "content": "Who?"}]),
    }
    given = {key: places.get(value, value) if isinstance(value, str) else value for key, value in said.items()}
    with pytest.raises(ConfigError, match=told):
        feedback.add("ann", Said(answer=places["SELF"], **given))
    assert feedback.lessons("ann") == []


def test_what_is_taken_back_is_gone_from_the_disk(feedback: Feedback, tmp_path: Path) -> None:
    def on_disk(text: str) -> bool:
        return any(text.encode() in path.read_bytes() for path in tmp_path.iterdir())

    answer = kept(feedback)
    feedback.add("ann", Said(answer=answer, correction="first secret"))
    made, _ = feedback.add("ann", Said(answer=answer, correction="second secret"))
    assert on_disk("second secret")  # the test can fail
    assert not on_disk("first secret")
    feedback.remove(made.name, "ann")
    assert not on_disk("second secret")
    assert feedback.documents.rm(PERSON, feedback.person("ann"))
    assert feedback.documents.ls(ANSWER) == []
    assert not on_disk("On the mat.")


def test_many_are_read_in_pages(feedback: Feedback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kilotune.serve.learning.feedback.PAGE", 2)
    answers = [kept(feedback, str(n)) for n in range(5)]
    names = [feedback.add("ann", Said(answer=answer, rating=True))[0].name for answer in answers]
    assert [one.name for one in feedback.lessons("ann")] == names
    assert [one.name for one in feedback.ls("ann", limit=2)] == names[:2:-1]
