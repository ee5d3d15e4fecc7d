"""The API against its own document: schemathesis asks everything that the document allows, and what it forbids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from tests.support.http_support import BASE, Running, adapter_folder, batching, serving

CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
]
FEW = settings(
    max_examples=5, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, **batching(folder), max_tokens=8) as made:
        yield made


@pytest.fixture(scope="module")
def api(running: Running) -> Any:
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    return schema.exclude(path="/manage/drain")  # after which there is nothing to see


@pytest.mark.heavy
def test_nothing_that_the_document_allows_or_forbids_is_answered_wrongly(api: Any, running: Running) -> None:
    count, faults = 0, []
    for found in api.get_all_operations():
        for mode in schemathesis.GenerationMode:
            cases = found.ok().as_strategy(generation_mode=mode)
            try:
                given(cases)(FEW(lambda case: asked(case, running)))()
            except Unsatisfiable:  # a request without a body and parameters cannot be wrong
                continue
            except (Exception, BaseExceptionGroup) as error:
                faults.append(f"{found.ok().label}, {mode}: {getattr(error, 'exceptions', error)}"[:1500])
            count += 1
    assert faults == [], "\n\n".join(faults)
    assert count >= 25


def asked(case: Any, running: Running) -> None:
    """Ask, and hold what comes against the document."""
    managing = case.path.startswith(("/manage", "/metrics")) or case.path.endswith("load_lora_adapter")
    key = running.manager if managing else running.keys["ann"]
    model = case.body.get("model") if isinstance(case.body, dict) else None
    if isinstance(model, str) and 1 <= len(model) <= 400:  # one that breaks the document stays as it is
        case.body["model"] = [BASE, "poems", "letters/1"][len(case.body["model"]) % 3]  # else few get past their names
    case.call_and_validate(headers={"Authorization": f"Bearer {key}"}, checks=CHECKS)


def test_afterwards_all_is_as_it_was(running: Running) -> None:
    with httpx2.Client(base_url=running.url) as client:
        assert client.get("/health").json() == {"status": "ok"}
    assert running.service.gate.count == 0
    made = running.openai().completions.create(model="poems", prompt="the cat", max_tokens=2)
    assert made.usage.completion_tokens == 2
    assert adapter_folder(1).is_dir()


def test_the_document_names_the_key_and_the_errors(running: Running) -> None:
    with httpx2.Client(base_url=running.url) as client:
        found = client.get("/openapi.json").json()
    chat = found["paths"]["/v1/chat/completions"]["post"]
    assert chat["security"] == [{"key": []}]
    assert {"200", "400", "401", "404", "413", "429", "503", "504"} <= set(chat["responses"])
    assert "HTTPValidationError" not in str(found["paths"])
    assert set(found["paths"]) >= {"/v1/models", "/v1/completions", "/v1/embeddings", "/v1/classify", "/manage/drain"}
