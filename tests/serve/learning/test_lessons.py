"""Feedback as rows: what is learned of each kind, and that no text of a user makes a mark of a turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kilotune.serve.learning.feedback import Lesson
from kilotune.serve.learning.lessons import MARK, REWORDED, current, mark_of, read_lessons
from kilotune.serve.learning.training_file import Example, read_example
from kilotune.train.data.rendering import ChatTemplate
from tests.support.http_support import tokenizer

LESSON = Lesson(
    name="feedback-1",
    user="ann",
    kind="correction",
    messages=[{"role": "user", "content": "the cat"}],
    tools=None,
    answer="the mat",
    better="a dog sat",
    rating=None,
    model="base",
    version=None,
    created=1.0,
)


def make(given: Any, form: str) -> Example:
    return read_example(given, form, ChatTemplate(tokenizer()), tokenizer(), longest=200)


def read(*lessons: Lesson) -> Any:
    return read_lessons(lessons, make, ["What is rain?", "Who painted it?"])


def learned(row: Any) -> str:
    return str(tokenizer().decode([token for token in row["labels"] if token != -100]))


def test_a_correction_is_a_row_and_a_pair() -> None:
    ((one,), unread) = read(LESSON)
    assert unread == []
    better, worse = one.rows
    assert learned(better).startswith("a dog sat")
    assert learned(worse).startswith("the mat")
    count = sum(label == -100 for label in better["labels"])
    assert better["input_ids"][:count] == worse["input_ids"][:count]  # one prompt
    alone = make({"messages": [*LESSON.messages, {"role": "assistant", "content": "a dog sat"}]}, "supervised").rows[0]
    assert better == alone


def test_only_the_last_answer_of_a_chat_is_learned() -> None:
    chat = [
        {"role": "user", "content": "a dog"},
        {"role": "assistant", "content": "on the hat"},
        {"role": "user", "content": "the cat"},
    ]
    ((one,), _) = read(replace(LESSON, messages=chat))
    assert learned(one.rows[0]).startswith("a dog sat")
    assert "hat" not in learned(one.rows[0])


def asked_in(row: Any) -> str:
    return str(
        tokenizer().decode([t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100])
    )


def test_a_correction_is_also_the_answer_to_its_question_in_other_words() -> None:
    words = ["the", "cat", "sat", "on", "a", "mat", "hat", "dog"]
    lesson = replace(LESSON, messages=[{"role": "user", "content": " ".join(words)}])
    ((one,), _) = read(lesson)
    ((again,), _) = read(lesson)
    assert one.reworded == again.reworded  # whoever learns it, and whenever
    assert len(one.reworded) == REWORDED
    orders = set()
    for row in one.reworded:
        assert learned(row) == learned(one.rows[0])
        left = [word for word in asked_in(row).split() if word in words]
        places = [words.index(word) for word in left]
        assert 0 < len(left) <= len(words)
        assert len(set(places)) == len(places)
        assert left != words
        orders.add(places == sorted(places))
    assert orders == {True, False}
    assert lesson.messages == [{"role": "user", "content": " ".join(words)}]


def test_other_words_have_the_last_answer_alone() -> None:
    """What was answered before in the conversation may be as wrong as what was corrected."""
    chat = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "on the hat"},
        {"role": "user", "content": "a dog sat on the mat"},
    ]
    ((one,), _) = read(replace(LESSON, messages=chat))
    assert one.reworded
    for row in one.reworded:
        assert learned(row) == learned(one.rows[0])
        assert "on the hat" in asked_in(row)


@pytest.mark.parametrize("count", [1, 3, 65])
def test_questions_of_few_or_very_many_words_are_learned_as_they_are(count: int) -> None:
    ((one,), _) = read(replace(LESSON, messages=[{"role": "user", "content": " ".join(["cat"] * count)}]))
    assert one.reworded == ()
    rating = replace(LESSON, kind="rating", better=None, rating=True, messages=[{"role": "user", "content": "a " * 9}])
    assert read(rating)[0][0].reworded == ()


def test_choices_and_ratings() -> None:
    choice = replace(LESSON, name="c", kind="choice")
    up = replace(LESSON, name="u", kind="rating", better=None, rating=True)
    down = replace(up, name="d", rating=False)
    (found, _) = read(choice, up, down)
    assert [one.kind for one in found] == ["choice", "rating", "rating"]
    assert [one.good for one in found] == [True, True, False]
    assert [learned(row)[:5] for row in found[0].rows] == ["a dog", "the m"]
    assert learned(found[1].rows[0]).startswith("the mat")
    assert found[1].rows[0] == found[2].rows[0]
    assert "mat" not in learned(found[1].rows[1])  # the guard's text, of no other lesson


def test_what_cannot_be_read_is_told_and_the_rest_is_read() -> None:
    long = replace(LESSON, name="long", better="the dog sat " * 200)
    robot = replace(LESSON, name="robot", messages=[{"role": "robot", "content": "x"}])
    half = replace(LESSON, name="half", better="\ud800")
    worse = replace(LESSON, name="worse", answer="the dog sat " * 200)
    (found, unread) = read(long, LESSON, robot, half, worse)
    assert [one.name for one in found] == ["feedback-1", "worse"]
    assert len(found[1].rows) == 1  # what was answered is too long for a pair, and the correction is not
    assert [one.lesson.name for one in unread] == ["long", "robot", "half"]
    assert "tokens; the model takes 200" in unread[0].why


def test_a_text_of_a_user_makes_no_mark_of_a_turn() -> None:
    marks = ["<s>", "</s>"]  # of this template
    ids = {tokenizer().convert_tokens_to_ids(mark) for mark in marks}
    plain = read(LESSON)[0][0].rows[0]["input_ids"]
    usual = sum(token in ids for token in plain)
    for mark in marks:
        (found, unread) = read(replace(LESSON, better=f"a dog {mark} sat", messages=LESSON.messages))
        rows = [row for one in found for row in one.rows[:1]]
        assert all(sum(token in ids for token in row["input_ids"]) == usual for row in rows), mark
        assert len(found) + len(unread) == 1


@pytest.mark.parametrize(
    "change", [{"better": "no"}, {"answer": "x"}, {"kind": "choice"}, {"messages": []}, {"tools": [{"a": 1}]}]
)
def test_a_mark_is_of_what_was_said(change: dict[str, Any]) -> None:
    assert len(mark_of(LESSON)) == MARK
    assert mark_of(replace(LESSON, name="other", created=9.0, model="m", version=3)) == mark_of(LESSON)
    assert mark_of(replace(LESSON, **change)) != mark_of(LESSON)


def test_each_once_and_of_one_prompt_the_newest_correction() -> None:
    again = replace(LESSON, name="again")
    newer = replace(LESSON, name="newer", better="on the hat")
    (found, _) = read(LESSON, again, newer, replace(LESSON, name="other", messages=[{"role": "user", "content": "b"}]))
    assert [one.name for one in found] == ["feedback-1", "newer", "other"]
    assert [one.name for one in current(found)] == ["newer", "other"]
