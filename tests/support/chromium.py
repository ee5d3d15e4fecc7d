"""A headless Chromium for tests, spoken to by its own protocol; Debian's package ``chromium`` is enough."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str | None:
    """The program, where it is installed; ``make test`` tries to."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page."""

    def __init__(self, address: str) -> None:
        import websocket

        self._socket = websocket.create_connection(address, timeout=30, suppress_origin=True)
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        made = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in made, made
        return made["result"].get("value")

    def until(self, script: str, seconds: float = 20) -> Any:
        """Wait until an expression is true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"not in {seconds} s: {script}; complaints: {self.complaints()}"
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def type(self, selector: str, text: str) -> None:
        """Press keys, as a person does."""
        self.run(f"(() => {{ const e = document.querySelector({selector!r}); e.focus(); e.select(); }})()")
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        place = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({selector!r}).textContent"))

    def picture(self, path: Path) -> None:
        """The whole page as a PNG file."""
        made = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(made["data"]))

    def complaints(self) -> list[str]:
        """What the console and the log of the browser say is wrong."""
        found = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning"):
                found.append(str(event["params"]["args"]))
        return found

    def requests(self) -> list[str]:
        """Every address that was asked."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        self._socket.close()


@contextmanager
def tab(folder: Path, size: tuple[int, int] = (1160, 1300)) -> Iterator[Tab]:
    """A browser of its own, with one empty page."""
    program = browser()
    assert program is not None
    words = [
        program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars",
        "--remote-debugging-port=0", f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", "about:blank",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        port = _port(folder, process)
        page = next(one for one in _ask(port) if one["type"] == "page")
        made = Tab(page["webSocketDebuggerUrl"])
        try:
            yield made
        finally:
            made.close()
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(folder: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + 60
    while True:
        found = re.search(rb"DevTools listening on ws://127\.0\.0\.1:(\d+)/", (folder / "log").read_bytes())
        if found:
            return int(found[1])
        assert process.poll() is None, (folder / "log").read_text(errors="replace")
        assert time.monotonic() < end, (folder / "log").read_text(errors="replace")
        time.sleep(0.05)


def _ask(port: int) -> Any:
    import httpx2

    end = time.monotonic() + 20
    while True:
        pages = httpx2.get(f"http://127.0.0.1:{port}/json", timeout=10).json()
        if any(one["type"] == "page" for one in pages) or time.monotonic() > end:
            return pages
        time.sleep(0.05)


def sign_in(page: Tab, url: str, key: str, namespace: str) -> None:
    """Open a service's page, and go in with a key of a namespace."""
    page.open(url)
    # Until what it asked for has come: what comes later moves what is clicked on by its place.
    page.until("!document.querySelector('#trouble').hidden || document.querySelector('#who').textContent !== ''")
    if page.run("document.querySelector('#key-form').hidden"):
        page.click("#other-key")
    page.type("#key", key)
    page.click("#key-form button")
    page.until(f"document.querySelector('#who').textContent === 'namespace {namespace}'")
    assert page.run("document.querySelector('#key-form').hidden"), "nothing is left to fill in"
