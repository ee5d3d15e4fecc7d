"""Embeddings of an adapter, as LangChain and litellm ask for them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("litellm") is None:
    pytest.skip("clients have an environment of their own: make test-clients", allow_module_level=True)

import litellm
from langchain_openai import OpenAIEmbeddings
from openai import OpenAI

from tests.support.train_support import sentence

TEXTS = [sentence(i, 3 + i) for i in range(3)]


@pytest.mark.parametrize("model", ["tiny", "one"])
def test_they_are_those_that_openais_own_client_gets(encoder: Any, model: str) -> None:
    """Which are held to transformers in test_embedding_routes.py."""
    with OpenAI(base_url=encoder.url, api_key=encoder.key, max_retries=0) as client:
        wanted = [one.embedding for one in client.embeddings.create(model=model, input=TEXTS).data]
    asked = {"model": f"openai/{model}", "api_base": encoder.url, "api_key": encoder.key, "num_retries": 0}
    made = litellm.embedding(input=TEXTS, **asked)
    found = [one["embedding"] for one in made.data]
    # LangChain counts tokens with a tokenizer of OpenAI's, for models of OpenAI's, unless it is told not to.
    chain = OpenAIEmbeddings(
        base_url=encoder.url, api_key=encoder.key, model=model, max_retries=0, check_embedding_ctx_length=False
    )
    for one, other, third in zip(found, chain.embed_documents(TEXTS), wanted, strict=True):
        assert one == pytest.approx(third, abs=1e-5)
        assert other == pytest.approx(third, abs=1e-5)
    assert chain.embed_query(TEXTS[0]) == pytest.approx(wanted[0], abs=1e-5)
