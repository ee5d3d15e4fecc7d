"""What a hub id brings beside an adapter's two files comes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

from kilotune.adapter_files.files import fetch_own
from kilotune.adapter_files.own_files import OWN_FILES, TEMPLATE
from kilotune.errors import CheckpointError


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.example"))


def test_those_that_are_there_are_brought(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = list[tuple[Any, ...]]()

    def download(repo: str, name: str, revision: str | None = None) -> str:
        asked.append((repo, name, revision))
        if name != TEMPLATE:
            raise RemoteEntryNotFoundError("not there", response=answer(404))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    fetch_own("ann/adapter", "main")
    assert asked == [("ann/adapter", name, "main") for name in OWN_FILES]
    asked.clear()
    fetch_own(tmp_path)
    assert asked == []


def test_a_hub_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise HfHubHTTPError("no", response=answer(500))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja of 'ann/adapter' cannot be had from the hub"):
        fetch_own("ann/adapter")
