"""Loading and unloading adapters as vLLM's clients ask for it, and what must never be opened for it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kilotune.errors import ConfigError
from kilotune.serve.http import adapter_folders
from kilotune.serve.http.http_errors import ApiError
from kilotune.serve.http.keys import Keyring, new_key
from kilotune.serve.http.settings import ServeSettings
from tests.support.http_support import BASE, Running, adapter_folder, batching, expected, serving

PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the operator allows, with two adapters in it."""
    folder = tmp_path_factory.mktemp("allowed")
    for seed in (4, 5):
        shutil.copytree(adapter_folder(seed), folder / f"run-{seed}")
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, **batching(folder), adapter_folder=(str(place),), max_adapter=10**6) as made:
        yield made


@pytest.fixture(scope="module")
def manager(running: Running) -> Iterator[httpx2.Client]:
    with running.client(running.manager) as client:
        yield client


def load(client: httpx2.Client, name: str, path: Path | str, **more: Any) -> httpx2.Response:
    body = {"lora_name": name, "lora_path": str(path), "namespace": "ann", **more}
    return client.post("/v1/load_lora_adapter", json=body)


def unload(client: httpx2.Client, name: str, **more: Any) -> httpx2.Response:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name, "namespace": "ann", **more})


def written(running: Running, model: str) -> str:
    made = running.openai("ann").completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0)
    return str(made.choices[0].text)


def told(answer: httpx2.Response, status: int, param: str = "lora_path") -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    return str(error["message"])


def versions(manager: httpx2.Client, name: str) -> list[dict[str, Any]]:
    answer = manager.get(f"/manage/ann/adapters/{name}")
    found: list[dict[str, Any]] = [] if answer.status_code == 404 else answer.json()["versions"]
    return found


# -- what is served ----------------------------------------------------------------------------------


def test_a_folder_is_loaded_answers_and_is_unloaded(running: Running, manager: httpx2.Client, place: Path) -> None:
    made = load(manager, "fresh", place / "run-4")
    assert (made.status_code, made.text) == (200, "Success: LoRA adapter 'fresh' added successfully.")
    assert made.headers["content-type"].startswith("text/plain")
    assert written(running, "fresh") == expected(4, PROMPT, 8)
    assert "fresh" in [model.id for model in running.openai("ann").models.list()]
    gone = unload(manager, "fresh")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'fresh' removed successfully.")
    assert told(unload(manager, "fresh"), 404, "lora_name") == "The lora adapter 'fresh' cannot be found."
    assert len(list((place / "run-4").iterdir())) == 2
    assert load(manager, "fresh", place / "run-4").status_code == 200, "and again"
    assert unload(manager, "fresh").status_code == 200


def test_a_second_load_takes_the_place_only_where_it_is_told_to(
    running: Running, manager: httpx2.Client, place: Path
) -> None:
    load(manager, "step", place / "run-4")
    again = "The lora adapter 'step' has already been loaded. If you want to load the adapter in place, set "
    assert told(load(manager, "step", place / "run-5"), 400, "lora_name").startswith(again)
    assert written(running, "step") == expected(4, PROMPT, 8)
    assert load(manager, "step", place / "run-5", load_inplace=True).status_code == 200
    assert written(running, "step") == expected(5, PROMPT, 8)
    assert [one["version"] for one in versions(manager, "step")] == [2], "what was in this place is not kept"
    assert load(manager, "step", place / "run-5", load_inplace=True).status_code == 200
    assert [one["version"] for one in versions(manager, "step")] == [2], "the same again is no new version"
    manager.post("/manage/ann/aliases/live", json={"versions": {"step": 2}})
    assert load(manager, "step", place / "run-4", load_inplace=True).status_code == 200
    assert [one["version"] for one in versions(manager, "step")] == [2, 3], "what somebody has named stays"
    assert written(running, "step/live") == expected(5, PROMPT, 8)
    assert written(running, "step") == expected(4, PROMPT, 8)
    assert unload(manager, "step").status_code == 200


def test_what_was_put_is_not_unloaded(running: Running, manager: httpx2.Client, place: Path) -> None:
    assert "DELETE /manage/ann/adapters/poems" in told(unload(manager, "poems"), 409, "lora_name")
    assert load(manager, "poems", place / "run-4", load_inplace=True).status_code == 200
    assert written(running, "poems") == expected(4, PROMPT, 8)
    assert "version 1" in told(unload(manager, "poems"), 409, "lora_name")
    assert manager.delete("/manage/ann/adapters/poems?version=2").status_code == 200
    assert written(running, "poems") == expected(1, PROMPT, 8)


def test_what_the_store_has_is_loaded_by_its_own_name(running: Running, manager: httpx2.Client) -> None:
    for name, path in (("letters", "letters"), ("letters", "letters/1"), ("poems/live", "poems/live")):
        answer = load(manager, name, path)
        if "/" in name:
            assert "must not be a path" in told(answer, 400, "lora_name")
        else:
            assert answer.text == f"Success: LoRA adapter '{name}' added successfully."
    assert "answers by that name" in told(load(manager, "letters", "poems"), 400, "lora_name")
    assert "nobody" in told(load(manager, "nobody", "nobody"), 404)
    assert "secret-plans" in told(load(manager, "secret-plans", "secret-plans"), 404), "another namespace's"


def test_several_loads_of_one_name_make_one(running: Running, manager: httpx2.Client, place: Path) -> None:
    async def all_of_them() -> list[int]:
        async with httpx2.AsyncClient(
            base_url=running.url, headers={"Authorization": f"Bearer {running.manager}"}, timeout=60
        ) as client:
            body = {"lora_name": "race", "lora_path": str(place / "run-4"), "namespace": "ann"}
            asked = [client.post("/v1/load_lora_adapter", json=body) for _ in range(4)]
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert sorted(asyncio.run(all_of_them())) == [200, 400, 400, 400]
    assert unload(manager, "race").status_code == 200


def test_where_an_alias_is_what_requests_mean_a_load_is_meant(tmp_path: Path, place: Path) -> None:
    with serving(tmp_path, adapter_folder=(str(place),), version="live") as made, made.client(made.manager) as manager:
        for run, more in (("run-4", {}), ("run-5", {"load_inplace": True})):
            assert load(manager, "step", place / run, **more).status_code == 200
            assert written(made, "step") == expected(int(run[-1]), PROMPT, 8)
        assert unload(manager, "step").status_code == 200
        assert manager.get("/manage/ann/adapters/step").status_code == 404


# -- who may, and in whose name ----------------------------------------------------------------------


def test_it_needs_a_managers_key(running: Running, place: Path) -> None:
    for key in (running.keys["ann"], running.monitor):
        with running.client(key) as client:
            assert load(client, "x", place / "run-4").status_code == 403
            assert unload(client, "x").status_code == 403
    with running.client() as nobody:
        assert load(nobody, "x", place / "run-4").status_code == 401


def test_the_namespace_is_the_keys_or_is_named(tmp_path: Path, running: Running, place: Path) -> None:
    with running.client(running.manager) as client:
        body = {"lora_name": "x", "lora_path": str(place / "run-4")}
        answer = client.post("/v1/load_lora_adapter", json=body)
        assert "say whose adapter" in told(answer, 400, "namespace")
    anns, bobs = new_key("manager", "ann"), new_key("tenant", "bob")
    ring = Keyring(None, [anns[1], bobs[1]]), {"bob": bobs[0]}, anns[0], ""
    with serving(tmp_path, adapter_folder=(str(place),), ring=ring) as made, made.client(anns[0]) as client:
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert client.get("/manage/ann/adapters/x").status_code == 200
        assert told(load(client, "x", place / "run-4", namespace="bob"), 403, "namespace")
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "x", "lora_int_id": 1}).status_code == 200


def test_without_keys_it_is_the_one_namespace(tmp_path: Path, place: Path) -> None:
    manager = new_key("manager", None)
    ring = Keyring(None, [manager[1]], "default"), {"default": "any"}, manager[0], ""
    with serving(tmp_path, adapter_folder=(str(place),), keys=None, ring=ring) as made:
        with made.client(manager[0]) as client:
            body = {"lora_name": "x", "lora_path": str(place / "run-5")}
            assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        made_text = made.openai("default").completions.create(model="x", prompt=PROMPT, max_tokens=8, temperature=0)
        assert made_text.choices[0].text == expected(5, PROMPT, 8)


# -- what is refused ---------------------------------------------------------------------------------


def test_it_is_off_unless_the_operator_allows_a_folder(tmp_path: Path, place: Path) -> None:
    with serving(tmp_path) as made, made.client(made.manager) as client:
        assert "--adapter-folder" in told(load(client, "x", place / "run-4"), 403)


def test_nothing_outside_of_the_allowed_folders_is_opened(
    running: Running, manager: httpx2.Client, place: Path, tmp_path: Path
) -> None:
    """By dots, by links of folders or files, or by a name that only begins alike; what is there is told of none."""
    outside = shutil.copytree(adapter_folder(6), tmp_path / "outside")
    beside = shutil.copytree(adapter_folder(6), Path(f"{place}-beside"))
    (place / "link").symlink_to(outside)
    (place / "half").mkdir()
    shutil.copy(outside / "adapter_config.json", place / "half")
    (place / "half" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    paths = [
        outside, beside, place / "link", place / "half", f"{place}/../{outside.name}", f"{place}/run-4/../../x",
        place / "link" / "..", tmp_path / "nothing", "/", "/proc/self/fd", "/etc",
    ]  # fmt: skip
    messages = {told(load(manager, "x", path), 403) for path in paths}
    assert len(messages) == 1
    shutil.rmtree(beside)


def test_links_inside_are_followed(running: Running, manager: httpx2.Client, place: Path) -> None:
    """As in a hub's cache, where files of a snapshot are links."""
    (place / "snapshot").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (place / "snapshot" / name).symlink_to(Path("..") / "run-5" / name)
    (place / "newest").symlink_to("snapshot")
    for path in (place / "newest", f"{place}/run-4/../newest/.", f"{place}//snapshot/"):
        assert load(manager, "linked", path).status_code == 200
        assert written(running, "linked") == expected(5, PROMPT, 8)
        assert unload(manager, "linked").status_code == 200


def test_what_is_no_plain_file_is_not_read(manager: httpx2.Client, place: Path) -> None:
    """Nor waited for: a pipe that nobody writes to, a socket, a folder, a loop of links."""

    def folder(name: str) -> Path:
        made = shutil.copytree(place / "run-4", place / name)
        (made / "adapter_model.safetensors").unlink()
        return made

    os.mkfifo(folder("pipe") / "adapter_model.safetensors")
    (folder("folder") / "adapter_model.safetensors").mkdir()
    loop = folder("loop") / "adapter_model.safetensors"
    loop.symlink_to(loop)
    here, before = socket.socket(socket.AF_UNIX), os.getcwd()
    try:
        os.chdir(folder("socket"))  # a socket's path is short
        here.bind("adapter_model.safetensors")
    finally:
        os.chdir(before)
    try:
        for name in ("pipe", "folder", "loop", "socket"):
            assert "adapter_model.safetensors" in told(load(manager, "x", place / name), 400)
    finally:
        here.close()


@pytest.mark.parametrize("path", ["nothing", "run-4/adapter_config.json", "empty", "run-4/deeper"])
def test_a_folder_without_an_adapter_is_not_found(manager: httpx2.Client, place: Path, path: str) -> None:
    (place / "empty").mkdir(exist_ok=True)
    assert told(load(manager, "x", place / path), 404).startswith("No adapter found for ")


def test_what_is_wrong_in_it_is_the_callers_error(manager: httpx2.Client, place: Path) -> None:
    for name, change in (
        ("cut", lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 40)),
        ("no-config", lambda folder: (folder / "adapter_config.json").write_text("[]")),
    ):
        change(shutil.copytree(place / "run-4", place / name))
        assert str(place) not in told(load(manager, "x", place / name), 400).replace(str(place / name), "")
    with (shutil.copytree(place / "run-4", place / "large") / "adapter_model.safetensors").open("ab") as file:
        file.truncate(2 * 10**6)
    assert "at most 1000000" in told(load(manager, "x", place / "large"), 413)
    assert versions(manager, "x") == [], "nothing of it was kept"


@pytest.mark.parametrize(
    ("change", "param", "part"),
    [
        ({"lora_name": ""}, "lora_name", "at least 1"),
        ({"lora_name": "a/b"}, "lora_name", "must not be a path"),
        ({"lora_name": BASE}, "lora_name", "conflicts with a served base model"),
        ({"lora_path": ""}, "lora_path", "at least 1"),
        ({"lora_path": "/a\0b"}, "lora_path", "control characters"),
        ({"is_3d_lora_weight": True}, "is_3d_lora_weight", "not served"),
        ({"load_in_place": True}, "load_in_place", "Did you mean 'load_inplace'?"),
        ({"lora_path": None}, "lora_path", "valid string"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    manager: httpx2.Client, place: Path, change: dict[str, Any], param: str, part: str
) -> None:
    body = {"lora_name": "x", "lora_path": str(place / "run-4"), "namespace": "ann", **change}
    assert part in told(manager.post("/v1/load_lora_adapter", json=body), 400, param)


def test_a_folder_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder that is there"):
        ServeSettings(adapter_folder=(str(tmp_path / "nothing"),))
    with pytest.raises(ConfigError, match="expected a list of folders"):
        ServeSettings(adapter_folder=str(tmp_path))


def test_what_is_looked_at_is_what_is_opened(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that becomes a link between the two is not followed out."""
    outside = shutil.copytree(adapter_folder(6), tmp_path / "outside")
    moved = shutil.copytree(place / "run-4", place / "moved")
    own = adapter_folders._place

    def late(path: str, allowed: Any) -> Any:
        found = own(path, allowed)
        if moved.is_dir() and not moved.is_symlink():
            shutil.rmtree(moved)
            moved.symlink_to(outside)
        return found

    monkeypatch.setattr(adapter_folders, "_place", late)
    with pytest.raises(ApiError) as refused, adapter_folders.opened(str(moved), [str(place)], 10**6):
        raise AssertionError("opened")
    assert refused.value.status in (400, 404)
