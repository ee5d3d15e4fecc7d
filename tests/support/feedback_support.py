"""A service of the tests whose users say what they think of answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jwt

from kilotune.serve.http.keys import Keyring, new_key
from tests.support.http_support import BASE, Running
from tests.support.training_support import training_serving

__all__ = [
    "ASKED",
    "SPACE",
    "answer",
    "asked",
    "call",
    "claim",
    "correct",
    "feedback_serving",
    "rules",
    "user_ring",
    "wait_for",
]

SPACE = "acme"
ASKED = [{"role": "user", "content": "the cat"}]


def user_ring() -> tuple[tuple[Keyring, dict[str, str], str, str], str]:
    """(keys by who has them, as keyring() gives them; the secret of the backend's): ann and bob are users of acme, and
    whoever the backend says; plain is nobody; stranger is an ann of another namespace."""
    made = {
        "ann": new_key("tenant", SPACE, user="ann"),
        "bob": new_key("tenant", SPACE, user="bob", trains=True),
        "backend": new_key("tenant", SPACE, signs=True),
        "plain": new_key("tenant", SPACE),
        "stranger": new_key("tenant", "other", user="ann"),
    }
    manager, monitor = new_key("manager", None), new_key("monitor", None)
    kept = [key for _, key in made.values()] + [manager[1], monitor[1]]
    secret = made["backend"][1].signs
    assert secret is not None
    return (Keyring(None, kept), {name: key for name, (key, _) in made.items()}, manager[0], monitor[0]), secret


@contextmanager
def feedback_serving(folder: Path, **more: Any) -> Iterator[tuple[Running, str]]:
    """(the service, the secret of its backend's key)."""
    ring, secret = user_ring()
    with training_serving(folder, ring=ring, **more) as running:
        yield running, secret


def claim(secret: str, user: Any = "ann", **more: Any) -> str:
    """What the backend says in its header."""
    claims = {"sub": user, "aud": SPACE, "exp": int(time.time()) + 60, **more}
    return jwt.encode({key: value for key, value in claims.items() if value is not None}, secret, algorithm="HS256")


def rules(running: Running, **wanted: Any) -> Any:
    """Set the rules of acme; learning waits for long unless they say otherwise."""
    with running.client(running.manager) as manager:
        told = {"enabled": True, "pause_seconds": 3600, **wanted}
        answered = manager.put(f"/manage/{SPACE}/feedback", json=told)
        assert answered.status_code == 200, answered.text
        return answered.json()


def answer(running: Running, who: str = "ann", **more: Any) -> Any:
    """The first choice of a chat."""
    given = {"model": BASE, "messages": ASKED, "max_tokens": 4, "temperature": 0, **more}
    return running.openai(who).chat.completions.create(**given).choices[0]


def asked(running: Running, who: str, question: str) -> Any:
    """What a user's own model answers."""
    messages = [{"role": "user", "content": question}]
    client = running.openai(who)
    return client.chat.completions.create(model="personal", messages=messages, max_tokens=8, temperature=0).choices[0]


def call(running: Running, who: str, method: str, path: str, **more: Any) -> Any:
    """A request with somebody's key."""
    with running.client(running.keys[who]) as client:
        return client.request(method, path, **more)


def correct(running: Running, who: str, question: str, right: str) -> str:
    """Ask, and say what the right answer is; the name of that."""
    answer = asked(running, who, question).feedback_id
    made = call(running, who, "POST", "/v1/feedback", json={"answer": answer, "correction": right})
    assert made.status_code == 200, made.text
    return str(made.json()["id"])


def wait_for(running: Running, who: str, what: str, count: int = 1) -> dict[str, Any]:
    """The newest event of a kind, once there are so many."""
    end = time.monotonic() + 60
    while True:
        events = call(running, who, "GET", "/v1/feedback/events").json()["data"]
        found = [one for one in events if one["type"] == what]
        if len(found) >= count:
            return dict(found[0])
        assert time.monotonic() < end, events
        time.sleep(0.05)
