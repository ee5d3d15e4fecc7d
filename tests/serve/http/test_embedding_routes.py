"""Embeddings and classification over HTTP, through what the command line builds, held to transformers alone."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from kilotune import PeftModel, VeraConfig, get_peft_model
from kilotune.errors import ConfigError
from kilotune.fleet import open_store
from kilotune.serve.http.settings import EngineSettings, ServeSettings
from kilotune.serve.http.startup import build, task_of
from tests.serve.http.test_json_pieces import calls_of_json
from tests.support.cli_helpers import shake
from tests.support.train_support import model_folder, sentence

TEXTS = [sentence(i, 3 + i) for i in range(3)]


def adapter(auto: Any, folder: Path, seed: int, **more: Any) -> Path:
    torch.manual_seed(seed)
    base = auto.from_pretrained(model_folder("bert"))
    model = get_peft_model(base, VeraConfig(r=8, target_modules=["query", "value"], **more))
    shake(model, 0.5).save_pretrained(folder)
    return folder


@contextmanager
def served(store: str, task: str) -> Iterator[Any]:
    import uvicorn

    from kilotune.serve.http.app import create_app
    from kilotune.serve.http.process import listen, url_of

    settings = ServeSettings(port=0, name="bert", namespace="ann")
    listening = listen(settings)
    service = build(str(model_folder("bert")), store, settings, EngineSettings(task=task))
    server = uvicorn.Server(uvicorn.Config(create_app(service), lifespan="off", log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    client = openai.OpenAI(base_url=f"{url_of(listening)}/v1", api_key="none", max_retries=0)
    try:
        yield client
    finally:
        client.close()
        server.should_exit = True
        thread.join(10)
        service.engine.stop()
        service.close()
        listening.close()


def mean(model: Any, text: str) -> np.ndarray[Any, Any]:
    given = AutoTokenizer.from_pretrained(model_folder("bert"))(text, return_tensors="pt")
    with torch.no_grad():
        return np.asarray(model(**given).last_hidden_state[0].mean(0))


def test_embeddings_are_each_adapters_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'adapters.db'}"
    folders = {name: adapter(AutoModel, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    with open_store(url, namespace="ann") as store:
        for name, folder in folders.items():
            store.put(name, folder)
    base = AutoModel.from_pretrained(model_folder("bert")).eval()
    with served(url, "embed") as client:
        for name in ("bert", "one", "two"):
            model = base if name == "bert" else PeftModel.from_pretrained(
                AutoModel.from_pretrained(model_folder("bert")), folders[name]
            ).eval()  # fmt: skip
            made = client.embeddings.create(model=name, input=TEXTS)
            for text, one in zip(TEXTS, made.data):
                np.testing.assert_allclose(one.embedding, mean(model, text), atol=2e-5)
            plain = client.embeddings.create(model=name, input=TEXTS[0], encoding_format="float")
            np.testing.assert_allclose(plain.data[0].embedding, made.data[0].embedding, atol=1e-5)
        tokenizer = AutoTokenizer.from_pretrained(model_folder("bert"))
        assert made.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
        ids = client.embeddings.create(model="two", input=tokenizer(TEXTS[0])["input_ids"])
        np.testing.assert_allclose(ids.data[0].embedding, made.data[0].embedding, atol=1e-5)
        calls = calls_of_json(monkeypatch)
        many = client.embeddings.create(model="one", input=[TEXTS[0]] * 60, encoding_format="float")
        assert len(many.data) == 60
        assert sum(calls) > 60 * len(many.data[0].embedding) > 900 > max(calls), "no call writes it all"
        with pytest.raises(openai.BadRequestError, match="cannot be cut"):
            client.embeddings.create(model="one", input="a", dimensions=3)
        with pytest.raises(openai.BadRequestError, match=r"input\[1\]: has \d+ tokens"):
            client.embeddings.create(model="one", input=["a", "cat " * 500])
        with pytest.raises(openai.NotFoundError, match="Did you mean 'one'"):
            client.embeddings.create(model="ones", input="a")
        with pytest.raises(openai.BadRequestError, match="writes no text"):
            client.completions.create(model="one", prompt="a")


def test_a_classifiers_head_is_its_adapters(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'adapters.db'}"
    folder = adapter(AutoModelForSequenceClassification, tmp_path / "mood", 3, task_type="SEQ_CLS")
    with open_store(url, namespace="ann") as store:
        store.put("mood", folder)
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(model_folder("bert")), folder
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder("bert"))
    with served(url, "classify") as client:
        made = client.post("/classify", body={"model": "mood", "input": TEXTS}, cast_to=dict[str, Any])
    for text, one in zip(TEXTS, made["data"]):
        with torch.no_grad():
            scores = model(**tokenizer(text, return_tensors="pt")).logits[0]
        np.testing.assert_allclose(one["probs"], scores.softmax(-1), atol=1e-5)
        assert one["label"] == f"LABEL_{int(scores.argmax())}"
        assert one["num_classes"] == len(scores)


def test_base64_is_what_openais_client_unpacks() -> None:
    from kilotune.serve.engine.interface import Vector
    from kilotune.serve.http.embedding_routes import _packed

    values = (1.5, -0.25, 3e-8)
    back = np.frombuffer(base64.b64decode(_packed(Vector(values, 3))), dtype="<f4")
    np.testing.assert_array_equal(back, np.asarray(values, dtype=np.float32))


@pytest.mark.parametrize(
    ("architecture", "task"),
    [("LlamaForCausalLM", "generate"), ("GPT2LMHeadModel", "generate"), ("BertModel", "embed"), (None, "embed"),
     ("BertForSequenceClassification", "classify")],
)  # fmt: skip
def test_what_a_base_is_for(architecture: str | None, task: str) -> None:
    from transformers import BertConfig

    config = BertConfig(architectures=None if architecture is None else [architecture])
    assert task_of(config, "auto") == task
    assert task_of(config, "embed") == "embed"


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config

    with pytest.raises(ConfigError, match="cannot be served yet"):
        task_of(T5Config(architectures=["T5ForConditionalGeneration"]), "auto")
