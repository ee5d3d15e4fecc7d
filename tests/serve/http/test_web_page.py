"""The web page, in a real Chromium: the same prompt side by side, adapters, live numbers; and what it must not do."""

from __future__ import annotations

import copy
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kilotune.serve.http.prompts import Prompts
from tests.support.chromium import Tab, browser, sign_in, tab
from tests.support.http_support import BASE, Running, adapter_folder, batching, expected, serving, tokenizer

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
    sign_in(page, running.url, running.keys[space], space)


def test_without_a_key_it_says_so(page: Tab, running: Running) -> None:
    page.open(running.url)
    page.until("!document.querySelector('#trouble').hidden")
    assert "a valid API key is needed" in page.text("#trouble")
    assert shows(page, "#key-form")
    assert not shows(page, "#list")
    page.until("document.querySelector('#state').textContent === 'ready'")


def column(model: str, part: str) -> str:
    return f"#answers [data-model='{model}'] {part}"


def answered(page: Tab) -> None:
    ended = "[...document.querySelectorAll('#answers p')].every(e => e.textContent.includes('ended by'))"
    page.until(f"document.querySelector('#stop').hidden && {ended}")


def shows(page: Tab, selector: str) -> bool:
    """Whether somebody sees it: what is hidden by name may still be drawn."""
    return bool(page.run(f"document.querySelector({selector!r}).getClientRects().length > 0"))


def columns(page: Tab) -> list[str]:
    found: list[str] = page.run("[...document.querySelectorAll('#answers article')].map(e => e.dataset.model)")
    return found


def test_the_same_prompt_side_by_side(page: Tab, running: Running, tmp_path: Path) -> None:
    enter(page, running, "ann")
    assert not shows(page, "#key-form"), "the key is in its corner"
    names = page.run("[...document.querySelectorAll('#adapters td button')].map(e => e.textContent)")
    assert names == ["letters", "poems"]
    assert columns(page) == [BASE, "letters", "poems"], "there is something to compare from the beginning"
    assert not shows(page, "#live"), "there is nothing to measure yet"
    page.type("#tokens", "12")
    page.type("#prompt", PROMPT)
    page.click("#chat")
    page.click("#go")
    answered(page)
    for seed, model in ((None, BASE), (2, "letters"), (1, "poems")):
        assert page.text(column(model, "pre")) == expected(seed, PROMPT, 12)
    assert page.text(column(BASE, "h3")) == f"{BASE}, the base alone"
    page.until("document.querySelector('#requests').textContent >= 3")
    page.until("!document.querySelector('#live').hidden")
    page.until("Number(document.querySelector('#rate').textContent) > 0")
    assert page.text("#first").endswith("ms)")
    place = os.environ.get("KILOTUNE_SCREENSHOT")
    if place:
        take_picture(page, running, Path(place))


def test_who_is_asked_is_chosen(page: Tab, running: Running) -> None:
    """By the list, by a field that takes versions and aliases, and taken away by their signs."""
    enter(page, running, "ann")
    page.click("#adapters tr:nth-child(1) button")
    assert columns(page) == [BASE, "poems"]
    assert page.run("[...document.querySelectorAll('#adapters td button')].map(e => e.ariaPressed)") == [
        "false",
        "true",
    ]
    page.type("#adapter", "letters/1")
    page.click("#add")
    page.type("#adapter", "poems/live")
    page.click("#chosen button:nth-child(1)")
    page.type("#tokens", "6")
    page.type("#prompt", PROMPT)
    page.click("#chat")
    page.click("#go")
    answered(page)
    assert columns(page) == ["poems", "letters/1", "poems/live"], "what stands in the field is asked, too"
    assert page.text(column("letters/1", "pre")) == expected(2, PROMPT, 6)
    assert page.text(column("poems/live", "pre")) == page.text(column("poems", "pre")) == expected(1, PROMPT, 6)
    for i in range(8):
        page.run(f"document.querySelector('#adapter').value = 'poems/{i + 10}'")
        page.click("#add")
    assert len(columns(page)) == 8
    assert "take one away first" in page.text("#trouble")


def test_answers_can_be_stopped(page: Tab, running: Running) -> None:
    enter(page, running, "ann")
    page.run("window.fetched = window.fetch; window.fetch = (path, more) => path.includes('completions') "
             "? new Promise((_, no) => more.signal.addEventListener('abort', () => no(new Error()))) "
             ": window.fetched(path, more)")  # fmt: skip
    page.click("#go")
    page.until("!document.querySelector('#stop').hidden")
    assert page.run("document.querySelector('#go').disabled")
    page.click("#stop")
    page.until("[...document.querySelectorAll('#answers p')].every(e => e.textContent === 'stopped')")
    page.until("document.querySelector('#stop').hidden && !document.querySelector('#go').disabled")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_a_phone_and_can_be_read_in_the_dark(page: Tab, running: Running, width: int, dark: bool) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 800)
    page.send("Emulation.setEmulatedMedia", features=[scheme])
    try:
        enter(page, running, "ann")
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is beside the window"
        tops = page.run("[...document.querySelectorAll('#answers pre')].map(e => e.getBoundingClientRect().top)")
        assert (len({*map(round, tops)}) == 1) is (width > 800), "side by side where there is room"
        shades = page.run(
            "['color', 'backgroundColor'].map(k => Math.max(...getComputedStyle(document.body)[k].match(/\\d+/g)))"
        )
        assert (shades[0] > 180, shades[1] < 80) == (dark, dark)
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")
        page.send("Emulation.setEmulatedMedia", features=[])


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
    answered(page)
    page.run("window.scrollTo(0, 0)")
    page.picture(path)


def test_a_chat_and_what_is_wrong_are_shown(page: Tab, running: Running) -> None:
    enter(page, running, "bob")
    assert page.run("document.querySelector('#chat').checked"), "the base has a chat template"
    assert page.run("document.querySelector('#prompt').value") == "Hello! What can you do?"
    page.type("#tokens", "12")
    page.type("#adapter", "secret-plan")
    page.click("#go")
    page.until(f"document.querySelector({column('secret-plan', 'p')!r}).textContent.includes('Did you mean')")
    page.until(f"document.querySelector({column(BASE, 'p')!r}).textContent.includes('ended by')")
    assert page.text(column(BASE, "pre"))


def test_names_are_text_and_never_run(page: Tab, running: Running) -> None:
    enter(page, running, "carl")
    page.until(f"document.querySelector('#adapters td button').textContent === {HOSTILE!r}")
    assert columns(page) == [BASE, HOSTILE]
    assert page.run("document.querySelectorAll('main img, #adapters b').length") == 0
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


def test_a_chat_is_offered_where_only_an_adapter_has_a_template(page: Tab, tmp_path: Path) -> None:
    bare = copy.deepcopy(tokenizer())
    bare.chat_template = None
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_folder(1), folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    prompts = Prompts(bare, 96, own_templates=True)
    with serving(tmp_path, **batching(tmp_path), prompts=prompts, own_chat_templates=True) as running:
        running.catalogue.put("ann", "plain", adapter_folder(2))
        enter(page, running, "ann")
        assert page.run("document.querySelector('#chat').disabled && !document.querySelector('#chat').checked")
        running.catalogue.put("ann", "talks", folder)
        enter(page, running, "ann")
        assert page.run("!document.querySelector('#chat').disabled && document.querySelector('#chat').checked")
        page.type("#tokens", "6")
        page.type("#prompt", PROMPT)
        page.click("#go")
        answered(page)
        for model, plain in ((BASE, True), ("plain", True), ("talks", False)):
            assert page.text(column(model, "p")).startswith("as a text, without a chat template") is plain
