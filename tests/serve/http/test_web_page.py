"""The web page, in a real Chromium: adapters, live numbers, base against adapter; and what it must not do."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.chromium import Tab, browser, tab
from tests.support.http_support import BASE, Running, adapter_folder, batching, expected, serving

PROMPT = "the cat sat on"
HOSTILE = '<img src=x onerror="window.bad=1">'

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, **batching(folder)) as made:
        made.catalogue.put("carl", HOSTILE, adapter_folder(4), tags=["<b>tag</b>"])
        yield made


@pytest.fixture(scope="module")
def page(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if browser() is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with tab(tmp_path_factory.mktemp("chromium")) as made:
        yield made


def enter(page: Tab, running: Running, space: str) -> None:
    page.open(running.url)
    # Until what it asked for has come: what comes later moves what is clicked on by its place.
    page.until("!document.querySelector('#trouble').hidden || document.querySelector('#who').textContent !== ''")
    if page.run("document.querySelector('#key-form').hidden"):
        page.click("#other-key")
    page.type("#key", running.keys[space])
    page.click("#key-form button")
    page.until(f"document.querySelector('#who').textContent === 'namespace {space}'")
    assert page.run("document.querySelector('#key-form').hidden"), "nothing is left to fill in"


def test_without_a_key_it_says_so(page: Tab, running: Running) -> None:
    page.open(running.url)
    page.until("!document.querySelector('#trouble').hidden")
    assert "a valid API key is needed" in page.text("#trouble")
    page.until("document.querySelector('#state').textContent === 'ready'")


def test_base_against_adapter(page: Tab, running: Running, tmp_path: Path) -> None:
    enter(page, running, "ann")
    names = page.run("[...document.querySelectorAll('#adapters td button')].map(e => e.textContent)")
    assert names == ["letters", "poems"]
    page.click("#adapters tr:nth-child(2) button")
    assert page.run("document.querySelector('#adapter').value") == "poems"
    assert page.run("document.querySelector('#live').hidden"), "there is nothing to measure yet"
    page.type("#tokens", "12")
    page.type("#prompt", PROMPT)
    page.click("#chat")
    page.click("#go")
    page.until("document.querySelector('#adapter-note').textContent.includes('ended by')")
    page.until("document.querySelector('#base-note').textContent.includes('ended by')")
    assert page.text("#base-answer") == expected(None, PROMPT, 12)
    assert page.text("#adapter-answer") == expected(1, PROMPT, 12)
    assert page.text("#base-name") == f"Base: {BASE}"
    page.until("document.querySelector('#requests').textContent >= 2")
    page.until("!document.querySelector('#live').hidden")
    page.until("Number(document.querySelector('#rate').textContent) > 0")
    assert page.text("#first").endswith("ms)")
    place = os.environ.get("KILOTUNE_SCREENSHOT")
    if place:
        take_picture(page, running, Path(place))


def take_picture(page: Tab, running: Running, path: Path) -> None:
    """The picture in the docs: with some traffic on it."""

    def traffic() -> None:
        with running.client(running.keys["ann"]) as client:
            for number in range(60):
                body = {"model": ["poems", "letters"][number % 2], "prompt": PROMPT, "max_tokens": 5 + number % 40}
                client.post("/v1/completions", json=body)

    busy = [threading.Thread(target=traffic) for _ in range(3)]
    for one in busy:
        one.start()
    for one in busy:
        one.join()
    page.click("#go")
    page.until("document.querySelector('#adapter-note').textContent.includes('ended by')")
    page.run("window.scrollTo(0, 0)")
    page.picture(path)


def test_a_chat_and_what_is_wrong_are_shown(page: Tab, running: Running) -> None:
    enter(page, running, "bob")
    assert page.run("document.querySelector('#chat').checked"), "the base has a chat template"
    assert page.run("document.querySelector('#prompt').value") == "Hello! What can you do?"
    page.type("#tokens", "12")
    page.type("#adapter", "secret-plan")
    page.click("#go")
    page.until("document.querySelector('#adapter-note').textContent.includes('Did you mean')")
    page.until("document.querySelector('#base-note').textContent.includes('ended by')")
    assert page.text("#base-answer")


def test_names_are_text_and_never_run(page: Tab, running: Running) -> None:
    enter(page, running, "carl")
    page.until(f"document.querySelector('#adapters td button').textContent === {HOSTILE!r}")
    assert page.run("document.querySelectorAll('#adapters img, #adapters b').length") == 0
    assert page.run("window.bad === undefined") is True


def test_it_asks_nobody_else_and_the_browser_has_nothing_to_complain_of(page: Tab, running: Running) -> None:
    outside = [url for url in page.requests() if not url.startswith((running.url, "data:", "about:"))]
    assert outside == []
    complaints = page.complaints()
    expected_ones = ["401", "404"]  # of the first test and of the adapter that is not there
    assert [text for text in complaints if not any(one in text for one in expected_ones)] == []
    assert len(complaints) <= 3
    assert page.run("sessionStorage.length") == 1
    assert page.run("localStorage.length + document.cookie.length") == 0


def test_the_page_itself_allows_no_other_script(running: Running) -> None:
    with httpx2.Client(base_url=running.url) as client:
        answer = client.get("/")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        for name in ("page.js", "page.css"):
            assert client.get(f"/page/{name}").status_code == 200
        for name in ("../app.py", "..%2fapp.py", "index.html/", "nothing"):
            found: Any = client.get(f"/page/{name}")
            assert found.status_code in (401, 404), name
