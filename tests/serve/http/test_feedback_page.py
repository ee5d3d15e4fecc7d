"""The page, for a user of a service that learns: thumbs, a correction, what was learned, and the way back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kilotune.serve.learning import turns
from kilotune.serve.learning.feedback import Feedback
from tests.support.chromium import Tab, browser, sign_in, tab
from tests.support.feedback_support import SPACE, feedback_serving, rules
from tests.support.http_support import BASE, Running, adapter_folder

HOSTILE = '<img src=x onerror="window.bad=1">'

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with feedback_serving(tmp_path_factory.mktemp("serve")) as (made, _):
        rules(made)
        yield made


@pytest.fixture(scope="module")
def page(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if browser() is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with tab(tmp_path_factory.mktemp("chromium")) as made:
        yield made


def enter(page: Tab, running: Running, who: str) -> None:
    sign_in(page, running.url, running.keys[who], SPACE)


def ask(page: Tab) -> None:
    page.type("#tokens", "6")
    page.click("#go")
    ended = "[...document.querySelectorAll('#answers p')].every(e => e.textContent.includes('ended by'))"
    page.until(f"document.querySelector('#stop').hidden && {ended}")


def shows(page: Tab, selector: str) -> bool:
    return bool(page.run(f"document.querySelector({selector!r}).getClientRects().length > 0"))


def of(model: str, part: str) -> str:
    return f"#answers [data-model='{model}'] {part}"


def feedback(running: Running) -> Feedback:
    assert running.service.training is not None
    return running.service.training.feedback(SPACE)


def test_a_user_says_what_an_answer_was_worth(page: Tab, running: Running) -> None:
    enter(page, running, "ann")
    columns = page.run("[...document.querySelectorAll('#answers article')].map(e => e.dataset.model)")
    assert columns == [BASE, "personal"]
    assert page.text(of(BASE, "h3")) == f"{BASE}, the base alone"
    assert not shows(page, of(BASE, ".say")), "there is no answer yet"
    ask(page)
    page.click(of(BASE, "[data-rating=up]"))
    page.until(f"document.querySelector({of(BASE, '.say .small')!r}).textContent === 'noted'")
    (lesson,) = feedback(running).lessons("ann")
    assert (lesson.kind, lesson.rating) == ("rating", True)
    assert lesson.answer == page.text(of(BASE, "pre"))
    page.click(of(BASE, "[data-correct]"))
    assert page.run(f"document.querySelector({of(BASE, 'textarea')!r}).value") == page.text(of(BASE, "pre"))
    page.click(of(BASE, ".say form button"))  # as it was
    page.until(f"document.querySelector({of(BASE, '.say .small')!r}).textContent.includes('rate it up instead')")
    page.type(of(BASE, "textarea"), "<b>a</b>")
    page.click(of(BASE, ".say form button"))
    page.until(f"document.querySelector({of(BASE, '.say .small')!r}).textContent.includes('will learn it')")
    (lesson,) = feedback(running).lessons("ann")
    assert (lesson.kind, lesson.better) == ("correction", "<b>a</b>")
    ask(page)
    assert not shows(page, of(BASE, ".say form"))
    assert page.text(of(BASE, ".say .small")) == ""


def test_what_was_learned_is_shown_and_there_is_a_way_back(page: Tab, running: Running) -> None:
    enter(page, running, "bob")
    page.until("!document.querySelector('#learned').hidden")
    assert shows(page, "#nothing")
    assert not shows(page, "#back")
    for seed in (1, 2):
        running.catalogue.put(SPACE, "personal:bob", adapter_folder(seed), alias="live")
    documents = feedback(running).documents
    turns.wake(documents, "bob", 3600)
    turns.tell(documents, "bob", "learned", f"learned {HOSTILE}", {"version": 2})
    page.run("learned()")  # in place of the next look, some seconds later
    page.until("document.querySelector('#events').textContent.includes('onerror')")
    assert page.run("document.querySelectorAll('main img').length") == 0
    assert not shows(page, "#nothing")
    page.click("#back")
    page.until("document.querySelector('#back-state').textContent === 'It is what it was before.'")
    assert running.catalogue.aliases(SPACE, "personal:bob") == {"live": 1}


def test_who_is_no_user_sees_nothing_of_it(page: Tab, running: Running) -> None:
    enter(page, running, "plain")
    ask(page)
    assert not shows(page, of(BASE, ".say"))
    assert not shows(page, "#learned")
    assert page.run("window.bad === undefined") is True
    assert [text for text in page.complaints() if "401" not in text and "400" not in text] == []


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_a_phone(page: Tab, running: Running, width: int) -> None:
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 800)
    try:
        enter(page, running, "ann")
        ask(page)
        page.click(of(BASE, "[data-correct]"))
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is beside the window"
        tops = page.run("[...document.querySelectorAll('#answers pre')].map(e => e.getBoundingClientRect().top)")
        assert (len({*map(round, tops)}) == 1) is (width > 800), "side by side where there is room"
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")
