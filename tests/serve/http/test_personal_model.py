"""The model ``personal``: each user's own one, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from kilotune.errors import ConfigError
from kilotune.serve.http.keys import Keyring, read_keys
from kilotune.serve.learning.jobs import FILE, JOB
from tests.support.cli_helpers import as_json, error
from tests.support.feedback_support import ASKED, SPACE, claim, feedback_serving, rules
from tests.support.http_support import BASE, Running, adapter_folder
from tests.support.training_support import chat_lines, said, upload


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    with feedback_serving(tmp_path_factory.mktemp("personal")) as (running, secret):
        store = running.catalogue
        store.put("@shared", "house", adapter_folder(5))
        store.put(SPACE, "style", adapter_folder(4))
        store.put(SPACE, "zebra", adapter_folder(4))
        store.put(SPACE, "personal:bob", adapter_folder(2), alias="live")
        store.put(SPACE, "personal:bob", adapter_folder(3))  # a candidate that nobody is to meet
        store.put(SPACE, "personal:carl", adapter_folder(6), alias="live")
        yield running, secret


@pytest.fixture
def running(made: tuple[Running, str]) -> Running:
    rules(made[0])
    return made[0]


def test_it_is_the_live_version_of_who_asks(made: tuple[Running, str], running: Running) -> None:
    bobs = said(running.openai("bob"), "personal", "the cat")
    assert bobs == said(running.openai("plain"), "personal:bob/1", "the cat")
    assert bobs != said(running.openai("plain"), "personal:bob/2", "the cat")
    assert bobs == said(running.openai("bob"), "personal:bob/live", "the cat")
    with running.client(running.keys["backend"]) as client:
        headers = {"X-Kilotune-User": claim(made[1], "carl")}
        body = {"model": "personal", "messages": ASKED, "max_tokens": 8, "temperature": 0}
        answered = client.post("/v1/chat/completions", json=body, headers=headers).json()
    assert answered["choices"][0]["message"]["content"] == said(running.openai("plain"), "personal:carl", "the cat")
    assert answered["model"] == "personal"


def test_until_there_is_one_it_is_what_it_would_stand_on(running: Running) -> None:
    ann, plain = running.openai("ann"), running.openai("plain")
    assert said(ann, "personal", "the cat") == said(plain, BASE, "the cat")
    assert rules(running, model="style")["model"] == "style"
    assert said(ann, "personal", "the cat") == said(plain, "style", "the cat") != said(plain, BASE, "the cat")
    rules(running, model="house")
    shared = said(ann, "personal", "the cat")
    running.catalogue.put(SPACE, "on-house", adapter_folder(5))  # the same numbers
    assert shared == said(plain, "on-house", "the cat")


def test_responses_and_streams_have_it_too(running: Running) -> None:
    bob = running.openai("bob")
    whole = said(bob, "personal", "the cat")
    made = bob.responses.create(model="personal", input="the cat", max_output_tokens=8, temperature=0)
    assert made.output_text == whole
    stream = bob.chat.completions.create(model="personal", messages=ASKED, max_tokens=8, temperature=0, stream=True)
    with stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_who_is_nobody_is_told_how(running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="kilotune keys add --user") as told:
        said(running.openai("backend"), "personal", "the cat")
    assert told.value.code == "no_user"


@pytest.mark.parametrize("name", ["personal:bob", "personal:bob/live", "personal:bob/1", "personal:nobody"])
def test_no_user_meets_anothers(running: Running, name: str) -> None:
    ann = running.openai("ann")
    told = set()
    for attempt in (
        lambda: said(ann, name, "the cat"),
        lambda: ann.responses.create(model=name, input="the cat"),
        lambda: ann.completions.create(model=name, prompt="the cat"),
        lambda: ann.models.retrieve(name),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            attempt()
        told.add(str(error.value).replace(name, "NAME"))
        assert "Did you mean" not in str(error.value)
    assert said(running.openai("stranger"), "personal", "the cat") == said(ann, BASE, "the cat")


def test_the_test_of_that_can_fail(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kilotune.serve.http.service.others", lambda *_: False)
    bobs = said(running.openai("bob"), "personal", "the cat")
    assert said(running.openai("ann"), "personal:bob/live", "the cat") == bobs


def test_no_name_that_is_nearly_anothers_tells_of_it(running: Running) -> None:
    for name in ("persona:bob", "personal;bob"):
        with pytest.raises(openai.NotFoundError) as error:
            said(running.openai("ann"), name, "the cat")
        assert "personal:bob" not in str(error.value)
        with pytest.raises(openai.NotFoundError, match="personal:bob"):  # who is no user is told
            said(running.openai("plain"), name, "the cat")
    bob = running.openai("bob")
    file = upload(bob, chat_lines([("a", "b")]))
    for name in ("personal:carl", "personal:car"):
        with pytest.raises(openai.NotFoundError) as error:
            bob.fine_tuning.jobs.create(model=name, training_file=file.id)
        assert "Did you mean" not in str(error.value)


def test_files_and_jobs_of_a_user_are_known_to_be_theirs(running: Running) -> None:
    bob, training = running.openai("bob"), running.service.training
    assert training is not None
    file = upload(bob, chat_lines([("a", "b")]))
    job = bob.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    bob.fine_tuning.jobs.cancel(job.id)
    for kind, name in ((FILE, file.id), (JOB, job.id)):
        found = training.documents(SPACE).find(kind, name)
        assert found is not None
        assert found.data["user"] == "bob"
    own = bob.fine_tuning.jobs.create(model="personal", training_file=file.id)
    assert own.model == "personal"  # to colleagues, too, who see the jobs of the namespace
    assert bob.fine_tuning.jobs.cancel(own.id).model == "personal"


def test_lists_name_what_is_ones_own(running: Running) -> None:
    everything = [one.id for one in running.openai("plain").models.list()]
    assert everything[0] == BASE
    assert {"personal:bob", "personal:carl", "style", "zebra"} <= {*everything}
    assert "personal" not in everything
    others = [name for name in everything[1:] if not name.startswith("personal:")]
    for limit in range(1, 8):
        names = [one.id for one in running.openai("ann").models.list(extra_query={"limit": limit})]
        assert names[:2] == [BASE, "personal"][:limit]
        with running.client(running.keys["ann"]) as client:
            pages, after = [], None
            while True:
                page = client.get("/v1/models", params={"limit": limit} | ({"after": after} if after else {})).json()
                pages += [one["id"] for one in page["data"]]
                after = page["last_id"]
                if not page["has_more"]:
                    break
        assert pages == [BASE, "personal", *others]
    assert running.openai("ann").models.retrieve("personal").id == "personal"


def test_no_adapter_can_be_called_so(running: Running) -> None:
    folder = adapter_folder(1)
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    with running.client(running.manager) as manager:
        answered = manager.put(f"/manage/{SPACE}/adapters/personal", files=files)
    assert answered.status_code == 409
    assert "each user's own model" in answered.json()["error"]["message"]


def test_who_needs_no_key_is_one_person() -> None:
    caller = Keyring(None, (), "default").find(None)
    assert caller is not None
    assert (caller.user, caller.signs) == ("me", None)


def test_keys_of_users_are_made_and_read(tmp_path: Any) -> None:
    path = tmp_path / "keys.json"
    assert as_json("keys", "add", path, "--namespace", "acme", "--user", "ann")["user"] == "ann"
    signing = as_json("keys", "add", path, "--namespace", "acme", "--signs")
    assert signing["signs"] is True
    first, second = read_keys(path)
    assert (first.user, first.signs, second.user, second.signs) == ("ann", None, None, signing["secret"])
    assert len(signing["secret"]) >= 43
    assert path.stat().st_mode & 0o777 == 0o600
    listed = as_json("keys", "ls", path)["keys"]
    assert [(one["user"], one["signs"]) for one in listed] == [("ann", False), (None, True)]
    assert signing["secret"] not in str(listed)
    assert Keyring(path).find(signing["key"]) == second
    assert "take one of them" in error("keys", "add", path, "--namespace", "acme", "--user", "ann", "--signs")
    assert "leave --user out" in error("keys", "add", path, "--role", "manager", "--user", "ann")
    assert "leave --signs out" in error("keys", "add", path, "--role", "monitor", "--signs")
    assert "cannot be a part of a model's name" in error("keys", "add", path, "--namespace", "acme", "--user", "a/b")
    text = path.read_text()
    for there, wrong in ((signing["secret"], "short"), ('"ann"', '"a/b"')):
        path.write_text(text.replace(there, wrong))
        with pytest.raises(ConfigError, match="is no file of keys"):
            read_keys(path)


@pytest.mark.parametrize("name", ["personl", "ersonal:bob", "p", "personalbob"])
def test_a_part_of_anothers_name_tells_nothing_of_it(name: str, running: Running) -> None:
    """The nearest names are left out of an error, though the name that was asked for is a part of them."""
    file = upload(running.openai("bob"), chat_lines([("a cat", "sat on")])).id
    with running.client(running.keys["bob"]) as client:
        asked = [
            client.post("/v1/fine_tuning/jobs", json={"model": name, "training_file": file}),
            client.get(f"/v1/models/{name}"),
            client.post("/v1/chat/completions", json={"model": name, "messages": ASKED}),
        ]
    for answered in asked:
        assert answered.status_code == 404, answered.text
        for other in ("carl", "Did you mean"):
            assert other not in answered.text


def test_where_what_it_stands_on_is_gone_nothing_is_told_of_others(running: Running) -> None:
    running.catalogue.put(SPACE, "personal-car", adapter_folder(4))
    rules(running, model="personal-car")
    running.catalogue.rm(SPACE, "personal-car", force=True)
    with running.client(running.keys["ann"]) as client:
        answered = client.post("/v1/chat/completions", json={"model": "personal", "messages": ASKED})
    assert answered.status_code == 404
    assert "personal-car" in answered.text
    assert "personal:" not in answered.text
