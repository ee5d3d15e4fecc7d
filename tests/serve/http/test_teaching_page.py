"""docs/teach.md, as it stands, on the toy: a correction is learned, taken back, and another taught from a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.serve.http.test_process import process
from tests.support.http_support import base_folder
from tests.support.paths import ROOT

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
TOY = {  # what the toy has words for
    "Who waters the ferns on Fridays?": "the cat",
    "Odette does.": "a dog sat",
    "Who waters the ferns on Mondays?": "a dog",
    "Pavel does.": "on the hat",
    "max_tokens=24": "max_tokens=8",
}


@pytest.mark.heavy
def test_the_page_does_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/teach.md").read_text()
    for words, toys in TOY.items():
        assert words in page
        page = page.replace(words, toys)
    more = ("--learn", "--set", "learn_method=lora", "--set", "learn_rank=8")
    with process(base_folder(), tmp_path / "adapters.db", tmp_path, *more) as served:
        there = {'"http://127.0.0.1:8000"': repr(served.url), '"kt-..."': repr(served.document["manager_key"])}
        names: dict[str, Any] = {"__name__": "__main__"}
        told = []
        for block in BLOCK.findall(page):
            for words, ours in there.items():
                block = block.replace(words, ours)
            exec(compile(block, "teach.md", "exec"), names)
            told.append(capsys.readouterr().out.splitlines())
        for client in (names["client"], names["manager"]):
            client.close()
    _, (before,), (learned, after), (back,), (taught,) = told
    assert before.strip() != "a dog sat"
    assert learned.startswith("Version 1 of your model has learned 1 lesson(s) and is live")
    assert after.strip() == "a dog sat"
    assert "held what was taken back, and were removed" in back
    assert taught.strip() == "on the hat"
