"""Personal adapters on shared ones over HTTP: put with ``on``, answered by one name, removed with a warning."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from kilotune import BottleneckConfig, LoraConfig, PeftModel, get_peft_model
from kilotune.fleet.store import open_store
from tests.serve.http.test_http_errors import error
from tests.serve.http.test_management_routes import files_of
from tests.support.generation_support import loaded
from tests.support.http_support import (
    Running,
    adapter_folder,
    base_folder,
    batching,
    expected,
    prompt_ids,
    serving,
    tokenizer,
)

PROMPT = "the old river"


@functools.cache
def style_folder(seed: int) -> Path:
    """A shared adapter of the tiny base, of another form than the others."""
    folder = base_folder().parent / f"style-{seed}"
    model = get_peft_model(loaded("llama", base_folder()), LoraConfig(r=2, target_modules=["o_proj", "up_proj"]))
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=chance))
    model.save_pretrained(folder)
    return folder


@functools.cache
def stacked(style: int, seed: int) -> str:
    """What transformers' own generate writes with both merged in."""
    model = PeftModel.from_pretrained(loaded("llama", base_folder()), style_folder(style), adapter_name="style")
    model.load_adapter(adapter_folder(seed), "own")
    model.set_adapter(["style", "own"])
    whole: Any = model.merge_and_unload().eval()
    ids = prompt_ids(PROMPT)
    made = whole.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False, max_new_tokens=6,
    )  # fmt: skip
    return str(tokenizer().decode(made[0, len(ids) :].tolist(), skip_special_tokens=True))


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path, **batching(tmp_path)) as made:
        yield made


@pytest.fixture
def manager(running: Running) -> Iterator[httpx2.Client]:
    with running.client(running.manager) as client:
        yield client


def put(client: httpx2.Client, name: str, folder: Path, space: str = "ann", **fields: Any) -> httpx2.Response:
    return client.put(f"/manage/{space}/adapters/{name}", files=files_of(folder), data=fields)


def text(running: Running, model: str, space: str = "ann") -> str:
    made = running.openai(space).completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0)
    return str(made.choices[0].text)


def test_one_name_gives_the_stack(running: Running, manager: httpx2.Client) -> None:
    style = put(manager, "style", style_folder(1), alias="live").json()
    assert style["stands_on"] is None
    made = put(manager, "me", adapter_folder(4), on="style")
    assert made.status_code == 201, made.text
    on = {"name": "style", "version": 1, "sha256": style["sha256"], "namespace": "ann", "removed": False}
    assert (made.json()["stands_on"], made.json()["ready"]) == (on, True)
    assert text(running, "me") == stacked(1, 4)
    assert text(running, "me") != expected(4, PROMPT, 6)
    assert running.openai().models.retrieve("me").kilotune["stands_on"] == on
    again = put(manager, "me", adapter_folder(4), on="style/live")
    assert (again.status_code, again.json()["created"]) == (200, False), "the same on the same"
    put(manager, "style", style_folder(2), alias="live")
    assert text(running, "me") == stacked(1, 4), "it stays on the version that it was put on"
    assert put(manager, "me", adapter_folder(4), on="style/live").json()["version"] == 2
    assert text(running, "me") == stacked(2, 4)
    assert text(running, "me/1") == stacked(1, 4)
    (first, second) = manager.get("/manage/ann/adapters/me").json()["versions"]
    assert (first["stands_on"], second["stands_on"]["version"]) == (on, 2)


def test_tenants_stand_on_what_is_shared(running: Running, manager: httpx2.Client) -> None:
    put(manager, "style", style_folder(1), space="@shared")
    for space in ("ann", "bob"):
        made = put(manager, "me", adapter_folder(4), space, on="style")
        assert made.json()["stands_on"]["namespace"] == "@shared"
        assert text(running, "me", space) == stacked(1, 4)
    told = error(manager.delete("/manage/@shared/adapters/style"), 409)["message"]
    assert "2 adapters of other namespaces stand on version 1" in told


def test_what_cannot_be_stood_on_is_told(running: Running, manager: httpx2.Client, tmp_path: Path) -> None:
    put(manager, "style", style_folder(1))
    put(manager, "me", adapter_folder(4), on="style")
    for on, told in (
        ("stlye", "Did you mean 'style'?"),
        ("secret-plans", "there is no such adapter in this namespace"),
        ("style/9", "has no version 9"),
        ("style/", "non-empty"),
        ("a/b/c", "there is no such adapter"),
        ("me", "two levels"),
    ):
        answer = error(put(manager, "x", adapter_folder(5), on=on), 400)
        assert told in answer["message"], on
        assert answer["param"] == "on"
    with open_store(running.catalogue.url, namespace="ann") as store:
        store.get("me").save(tmp_path / "me")
    answer = error(put(manager, "x", tmp_path / "me"), 400)
    assert "trained on top of 'style'" in answer["message"]
    assert [one["name"] for one in manager.get("/manage/ann/adapters").json()["adapters"]] == [
        "letters",
        "me",
        "poems",
        "style",
    ]


def test_what_is_stood_on_goes_by_force_and_fails_alone(running: Running, manager: httpx2.Client) -> None:
    put(manager, "style", style_folder(1))
    put(manager, "me", adapter_folder(4), on="style")
    for query in ("", "?version=1"):
        told = error(manager.delete(f"/manage/ann/adapters/style{query}"), 409)["message"]
        assert "1 adapter ('me') stand on version 1 of it, and would answer no more" in told
    assert manager.delete("/manage/ann/adapters/style?force=true").json() == {"name": "style", "removed": 1}
    with running.client(running.keys["ann"]) as client:
        body = {"model": "me", "prompt": PROMPT, "max_tokens": 2}
        assert "which was removed" in error(client.post("/v1/completions", json=body), 404)["message"]
    assert text(running, "poems") == expected(1, PROMPT, 6)


def test_a_pair_that_cannot_act_together_is_a_bad_request(
    running: Running, manager: httpx2.Client, tmp_path: Path
) -> None:
    neck = get_peft_model(loaded("llama", base_folder()), BottleneckConfig(target_modules=["down_proj"]))
    neck.save_pretrained(tmp_path / "neck")
    assert put(manager, "neck", tmp_path / "neck").status_code == 201
    answer = error(put(manager, "x", tmp_path / "neck", on="neck"), 400)
    assert "cannot be served on top of the adapter that it stands on" in answer["message"]
    assert "both not linear" in answer["message"]
    assert put(manager, "x", adapter_folder(4), on="neck").json()["ready"], "another on top of it can"


def test_another_base_below_is_a_bad_request(running: Running, manager: httpx2.Client, tmp_path: Path) -> None:
    """Put behind the service's back, as by another one with another base."""
    with open_store(running.catalogue.url, namespace="ann") as store:
        other = loaded("llama", base_folder())
        with torch.no_grad():
            other.lm_head.weight.add_(1.0)
        foreign = get_peft_model(other, LoraConfig(r=2, target_modules=["o_proj"]))
        store.put("foreign", foreign)
    answer = error(put(manager, "x", adapter_folder(4), on="foreign"), 422)
    assert "'foreign' (version 1) is of another base model" in answer["message"]
