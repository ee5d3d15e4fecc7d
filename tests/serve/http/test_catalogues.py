"""The catalogue that most tests of the service stand on says what the real one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.http_support import batching, serving

ASKS: list[tuple[str, str, Any]] = [
    ("GET", "/manage/ann/adapters/poem", None),
    ("GET", "/manage/ann/adapters/poems", None),
    ("GET", "/manage/zed/adapters/poems", None),
    ("GET", "/manage/zed/adapters", None),
    ("GET", "/manage/ann/adapters/%01", None),
    ("GET", "/manage/ann/adapters?tag=%00", None),
    ("DELETE", "/manage/ann/adapters/poem", None),
    ("DELETE", "/manage/ann/adapters/poems?version=9", None),
    ("DELETE", "/manage/ann/adapters/poems?version=nope", None),
    ("POST", "/manage/ann/aliases/live", {"versions": {"poem": 1}}),
    ("POST", "/manage/ann/aliases/live", {"versions": {"poems": 9}}),
    ("POST", "/manage/ann/aliases/nope/back", {"names": ["poems"]}),
    ("DELETE", "/manage/ann/adapters/poem/aliases/live", None),
    ("DELETE", "/manage/ann/adapters/poems/aliases/nope", None),
    ("GET", "/v1/models/poem", None),
    ("GET", "/v1/models/poems/9", None),
    ("GET", "/v1/models/poems/live", None),
    ("POST", "/v1/completions", {"model": "poem", "prompt": "a", "max_tokens": 1}),
    ("POST", "/v1/completions", {"model": "poems/nope", "prompt": "a", "max_tokens": 1}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "poem", "namespace": "ann"}),
    ("DELETE", "/manage/ann/adapters/poems", None),
    ("DELETE", "/manage/ann/adapters/poems?force=true", None),
]


def test_the_tests_own_catalogue_says_what_the_real_one_does(tmp_path: Path) -> None:
    found = []
    for name in ("plain", "real"):
        (tmp_path / name).mkdir()
        more = batching(tmp_path / name) if name == "real" else {}
        with serving(tmp_path / name, **more) as made, made.client(made.manager) as manager:
            with made.client(made.keys["ann"]) as ann:
                told = []
                for method, path, body in ASKS:
                    client = ann if path.startswith(("/v1/models", "/v1/completions")) else manager
                    answer = client.request(method, path, **({} if body is None else {"json": body}))
                    document = answer.json()
                    told.append((path, answer.status_code, document.get("error") or sorted(document)))
            found.append(told)
    plain, real = found
    assert plain == real
    assert real[0][1:] == real[6][1:], "what is not there is told alike, whatever is asked of it"
    assert real[0][1] == 404
    assert "'poem'" in real[0][2]["message"]
