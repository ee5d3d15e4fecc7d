"""Embeddings and classes for many adapters in one batch: each text is what it is alone."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune import LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.errors import AdapterError, ConfigError, StoreError, UnsupportedError
from kilotune.serve.engine.encoders import EncoderEngine, Pooling, pooling_of
from kilotune.serve.engine.interface import AdapterKey, Vector
from kilotune.serve.engine.tenant_adapters import AdapterRegistry
from tests.support.models import randomize, tiny_classifier

TEXTS = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13], [2], [30, 2, 5, 9]]


def encoder() -> Any:
    """The encoder of a tiny BERT."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    return BertModel(config).eval()


class Served:
    """An engine with two adapters of tenant "t"."""

    def __init__(self, folder: Path, base: Any, config: VeraConfig, **options: Any) -> None:
        self.base = base.eval()
        self.models: list[PeftModel] = []
        for seed in (1, 2):
            model = get_peft_model(copy.deepcopy(base), config)
            randomize(model, seed=seed, scale=0.4)
            self.models.append(model.eval())
        own = copy.deepcopy(base)
        self.registry = AdapterRegistry(f"sqlite:///{folder}/a.db", own)
        versions = [self.registry.put("t", f"a{i}", model) for i, model in enumerate(self.models)]
        self.keys = [AdapterKey("t", v.name, v.version, v.sha256) for v in versions]
        self.engine = EncoderEngine(own, self.registry, **options)

    def __enter__(self) -> Served:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()
        self.registry.close()


def together(served: Served, verb: str) -> list[list[Vector]]:
    async def run() -> list[list[Vector]]:
        ask = getattr(served.engine, verb)
        return await asyncio.gather(*(ask(f"t{i}", key, TEXTS) for i, key in enumerate([*served.keys, None])))

    return asyncio.run(run())


@pytest.mark.parametrize("way", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings(tmp_path: Path, way: str, normalize: bool) -> None:
    config = VeraConfig(r=4, target_modules=["query", "value", "dense"])
    with Served(tmp_path, encoder(), config, pooling=Pooling(way, normalize)) as served:
        got = together(served, "embed")
        assert served.engine.stats().steps <= 3  # they were batched
        for model, vectors in zip([*served.models, served.base], got, strict=True):
            for text, vector in zip(TEXTS, vectors, strict=True):
                with torch.no_grad():
                    hidden = model(input_ids=torch.tensor([text])).last_hidden_state[0]
                own = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[way]
                own = own / own.norm() if normalize else own
                torch.testing.assert_close(torch.tensor(vector.values), own, atol=2e-6, rtol=1e-4)
                assert vector.tokens == len(text)
        assert got[0][0] != got[1][0]


@pytest.mark.parametrize("head", [True, False])
def test_classes_with_a_head_of_ones_own_and_without(tmp_path: Path, head: bool) -> None:
    base = tiny_classifier()
    config = VeraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"] if head else None)
    with Served(tmp_path, base, config) as served:
        assert served.engine.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
        got = together(served, "classify")
        for model, vectors in zip([*served.models, served.base], got, strict=True):
            for text, vector in zip(TEXTS, vectors, strict=True):
                with torch.no_grad():
                    own = model(input_ids=torch.tensor([text])).logits[0]
                torch.testing.assert_close(torch.tensor(vector.values), own, atol=2e-6, rtol=1e-4)
        with pytest.raises(UnsupportedError, match="gives no embeddings"):
            together(served, "embed")


def test_small_batches_and_a_text_that_breaks_one(tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules=["query"])
    with Served(tmp_path, encoder(), config, batch_tokens=8) as served:
        base: Any = served.registry.model.get_base_model()

        def hook(module: Any, args: Any) -> None:
            if bool((args[0] == 31).any()):
                raise RuntimeError("planted")

        handle = base.embeddings.word_embeddings.register_forward_pre_hook(hook)

        async def run() -> list[Any]:
            texts = [[[3, 4]], [[31]], [[5]], [[3, 4]]]
            asked = [served.engine.embed("t", served.keys[0], text) for text in texts]
            return await asyncio.gather(*asked, return_exceptions=True)

        good, bad, other, same = asyncio.run(run())
        handle.remove()
        assert isinstance(bad, AdapterError)
        assert good == same != other
        assert served.engine.healthy() is None


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    with Served(tmp_path, encoder(), VeraConfig(r=4, target_modules=["query"])) as served:

        def ask(text: list[int], verb: str = "embed") -> Any:
            return asyncio.run(getattr(served.engine, verb)("t", None, [text]))

        for text in ([], [32], [1] * 33):
            with pytest.raises(ConfigError, match="expected 1 to 32 tokens"):
                ask(text)
        with pytest.raises(UnsupportedError):
            ask([1], "classify")
        with pytest.raises(AdapterError):
            asyncio.run(served.engine.embed("t", AdapterKey("t", "nope", 1, "0" * 64), [[1]]))
    with pytest.raises(StoreError, match="stopped"):
        ask([1])


def test_the_pooling_that_a_folder_names(tmp_path: Path) -> None:
    assert (pooling_of(tmp_path).way, pooling_of(tmp_path).normalize) == ("mean", False)
    kinds = ["Transformer", "Pooling", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 16}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    assert (pooling_of(tmp_path).way, pooling_of(tmp_path).normalize) == ("cls", True)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UnsupportedError, match="max_tokens"):
        pooling_of(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([*listed, {"path": "3", "type": "x.models.Dense"}]))
    with pytest.raises(UnsupportedError, match="Dense"):
        pooling_of(tmp_path)


@pytest.mark.parametrize("head", [True, False])
def test_stacks_beside_others(tmp_path: Path, head: bool) -> None:
    """A personal adapter, with a head of its own that no bank takes or without, on a shared one."""
    base = tiny_classifier()
    config = VeraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"] if head else None)
    style = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["key", "value"]))
    randomize(style, seed=5, scale=2.0)
    with Served(tmp_path, base, config) as served:
        served.registry.put("t", "style", style)
        for i, model in enumerate(served.models):
            model.save_pretrained(tmp_path / f"own-{i}")
            served.keys[i] = AdapterKey.of("t", served.registry.put("t", f"on-{i}", model, on="style"))
        got = together(served, "classify")
        style.save_pretrained(tmp_path / "style")
        for i, vectors in enumerate(got[:2]):
            whole = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "style", adapter_name="style")
            whole.load_adapter(tmp_path / f"own-{i}", "own")
            whole.set_adapter(["style", "own"])
            plain = whole.merge_and_unload().eval()
            for text, vector in zip(TEXTS, vectors, strict=True):
                with torch.no_grad():
                    own = plain(input_ids=torch.tensor([text])).logits[0]
                torch.testing.assert_close(torch.tensor(vector.values), own, atol=5e-6, rtol=1e-4)
                assert (served.models[i](input_ids=torch.tensor([text])).logits[0] - own).abs().max() > 1e-4
