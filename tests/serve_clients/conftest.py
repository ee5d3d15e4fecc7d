"""Served processes for all clients."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

if importlib.util.find_spec("litellm") is not None:  # else it is another environment, in which all of this is skipped
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    os.environ |= {"LANGSMITH_TRACING": "false", "TOKENIZERS_PARALLELISM": "false"}


class Service(NamedTuple):
    """url: of the API, with /v1. key: of the tenant."""

    url: str
    key: str


@contextmanager
def serving(base: Path, folder: Path, *more: str, **adapters: Path) -> Iterator[Service]:
    from kilotune.fleet import open_store
    from tests.serve.http.test_process import keys, process

    path, tenants, _ = keys(folder, "ann")
    with open_store(f"sqlite:///{folder / 'adapters.db'}", namespace="ann") as store:
        for name, adapter in adapters.items():
            store.put(name, adapter, alias="live")
    with process(base, folder / "adapters.db", folder, "--keys", str(path), "--name", "tiny", *more) as served:
        yield Service(f"{served.url}/v1", tenants["ann"])


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A tiny base with a chat template; "poems" and "letters" are the adapters of seeds 1 and 2."""
    from tests.support.http_support import adapter_folder, base_folder

    folder = tmp_path_factory.mktemp("served")
    with serving(base_folder(), folder, poems=adapter_folder(1), letters=adapter_folder(2)) as made:
        yield made


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A base that has every byte in its vocabulary, so it can write JSON, and a template that has tools."""
    from tests.support.chat_tokenizers import byte_pairs
    from tests.support.guided_support import TEMPLATES, guided_base

    folder = tmp_path_factory.mktemp("writer")
    guided_base().save_pretrained(folder / "base")
    byte_pairs(TEMPLATES["hermes"]).save_pretrained(folder / "base")
    with serving(folder / "base", folder) as made:
        yield made


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A BERT for embeddings; "one" is an adapter of it."""
    from transformers import AutoModel

    from tests.serve.http.test_embedding_routes import adapter
    from tests.support.train_support import model_folder

    folder = tmp_path_factory.mktemp("encoder")
    made = adapter(AutoModel, folder / "one", 1)
    with serving(model_folder("bert"), folder, "--task", "embed", one=made) as served:
        yield served
