"""What stands in for the hub while PEFT's tests run: tiny models in the hub's cache, small data, and no network.

The cache is that of huggingface_hub, so a hub id finds its stand-in by the hub's own code, which is answered in this
process. Whatever is not there is refused at once, without the waiting of a retry, and noted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

WORDS = [("Love", "fox"), ("Nothing", "dog"), ("A long day without an end", "bird"), ("Time", "river"), ("Hope", "sea")]


def quotes() -> Any:
    """In the place of ybelkada/english_quotes_copy."""
    from datasets import Dataset, DatasetDict

    texts = [f"{word} is what the {other} said of {number}." for number in range(8) for word, other in WORDS]
    return DatasetDict({"train": Dataset.from_dict({"quote": texts, "author": texts, "tags": [[]] * len(texts)})})


def image() -> Any:
    """In the place of huggingface/cats-image."""
    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype("uint8")
    return {"test": {"image": [Image.fromarray(pixels)]}}


class Answer(NamedTuple):
    """Of the hub, to a request."""

    status: int
    headers: dict[str, str]
    content: bytes


DATA: Mapping[str, Callable[[], Any]] = {"ybelkada/english_quotes_copy": quotes, "huggingface/cats-image": image}


class Hub:
    """A hub that has the stand-ins in ``home``, and nothing else; ``asked`` is what it was asked for beside them."""

    def __init__(self, home: Path) -> None:
        self.home = home / "hub"
        self.asked: set[str] = set()

    def files(self, name: str, revision: str) -> tuple[str, Path] | None:
        """(commit, folder) of a stand-in, or None where there is none."""
        folder = self.home / f"models--{name.replace('/', '--')}"
        ref = folder / "refs" / revision
        commit = ref.read_text(encoding="utf-8") if ref.is_file() else revision
        files = folder / "snapshots" / commit
        return (commit, files) if files.is_dir() else None

    def answer(self, path: str) -> Answer:
        """What the hub says to a path, of those that the tests come to."""
        file = re.fullmatch(r"/((?:[\w.-]+/)?[\w.-]+)/resolve/([\w.-]+)/(.+)", path)
        about = re.fullmatch(r"/api/models/((?:[\w.-]+/)?[\w.-]+?)(?:/(revision|tree)/([\w.-]+)(/.+)?)?", path)
        name, revision = (file[1], file[2]) if file else (about[1], about[3] or "main") if about else (path, "")
        found = self.files(name, revision)
        if found is None:
            self.asked.add(name)
            raise ConnectionRefusedError(f"{path}: PEFT's tests run without the hub")
        commit, folder = found
        if (file and not (folder / file[3]).is_file()) or (about and about[4]):  # no folders of chat templates, say
            return Answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
        if file:
            content = (folder / file[3]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return Answer(200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, content)
        there = [(str(one.relative_to(folder)), one.stat().st_size) for one in folder.rglob("*") if one.is_file()]
        tree = [{"type": "file", "path": one, "size": size, "oid": commit} for one, size in there]
        info = {"id": name, "sha": commit, "tags": [], "siblings": [{"rfilename": one} for one, _ in there]}
        return Answer(200, {}, json.dumps(tree if about and about[2] == "tree" else info).encode())

    def install(self) -> None:
        """From here on this is the hub of this process, which asks no network."""
        import datasets
        import huggingface_hub
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils._http import default_client_factory  # of huggingface_hub 2.4

        library: Any = default_client_factory.__globals__["httpx2"]

        def handle(request: Any) -> Any:
            try:
                status, headers, content = self.answer(request.url.path)
            except ConnectionRefusedError as error:
                raise OfflineModeIsEnabled(str(error)) from None
            return library.Response(status, headers=headers, content=content)

        huggingface_hub.set_client_factory(
            lambda: library.Client(transport=library.MockTransport(handle), follow_redirects=True)
        )
        load = datasets.load_dataset

        @functools.wraps(load)
        def load_or_stand_in(path: str, *args: Any, **kwargs: Any) -> Any:
            return DATA[path]() if path in DATA else load(path, *args, **kwargs)

        datasets.load_dataset = load_or_stand_in
