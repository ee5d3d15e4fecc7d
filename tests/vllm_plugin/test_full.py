"""The long tests of the plugin: other engines, a kill, a soak. KILOTUNE_SOAK: how many seconds the soak takes (60)."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the tests of the plugin run in .venv-vllm: make test-vllm")

import openai
import torch
import vllm_support as support
from vllm_engine import MIXED, TOLERANCE, started
from vllm_server import Server
from vllm_support import Kind

from kilotune.convert import to_lora
from kilotune.fleet.store import open_store

pytestmark = pytest.mark.full


def test_2048_slots_and_128_adapters_in_a_batch(tmp_path: Path) -> None:
    kinds = {f"u{i}": Kind(rank=4) for i in range(128)}
    for engine in started(tmp_path, kinds, max_loras=2048, max_cpu_loras=2048, max_num_seqs=160):
        engine.check([*kinds, None, None], count=4)


def test_vllms_own_lora_is_as_before_and_the_conversion_is_exact(tmp_path: Path) -> None:
    """The plugin is there, and nobody asked for it: stock LoRA, which the same adapters are converted to."""
    from vllm.lora.request import LoRARequest

    names = ["ann", "cid", "dan"]
    options = {"additional_config": {}, "max_loras": 4, "max_lora_rank": 16}  # no base row with all slots full: stock's
    for engine in started(tmp_path, **options):
        requests: dict[str | None, Any] = {None: None}
        for number, name in enumerate(names, 1):
            to_lora(engine.model(name)).save(tmp_path / name)
            requests[name] = LoRARequest(name, number, str(tmp_path / name))
        asked = [None, *names] * 3
        prompts = support.prompts(len(asked))
        answers = engine.ask(prompts, [requests[name] for name in asked])
        for name, prompt, got in zip(asked, prompts, answers, strict=True):
            assert support.worst(got, support.reference(engine.model(name), prompt, 16)) <= TOLERANCE


def test_bfloat16(tmp_path: Path) -> None:
    """Tokens may differ where two are nearly as likely; what they have in common is close to float32's."""
    for engine in started(tmp_path, dtype="bfloat16", max_loras=3):
        prompts = support.prompts(12)
        answers = engine.ask(prompts, [engine.request(name) for name in MIXED[:12]])
        for name, prompt, got in zip(MIXED[:12], prompts, answers, strict=True):
            scores = engine.model(name)(torch.tensor([[*prompt, *got.tokens]])).logits[0].log_softmax(-1)
            for at, (token, logprob) in enumerate(zip(got.tokens, got.logprobs, strict=True)):
                row = scores[len(prompt) - 1 + at]
                assert abs(float(row[token]) - logprob) < 0.1
                assert float(row.max() - row[token]) < 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"settings": {"targets": ["nothing"]}},
        {"settings": {"rank": 0}},
        {"fully_sharded_loras": True},
    ],
    ids=["no-target", "settings", "sharded"],
)
def test_an_engine_that_cannot_serve_does_not_start(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="Engine core initialization failed"):
        next(started(tmp_path, {"ann": Kind()}, **options))


def test_experts_are_refused_at_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM
    from vllm import LLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 2, "max_position_embeddings": 256}
    MixtralForCausalLM(MixtralConfig(vocab_size=support.VOCAB, **sizes, **more)).save_pretrained(tmp_path / "base")
    support.tokenizer().save_pretrained(tmp_path / "base")
    settings = {"rank": 16, "seed": support.SEED, "store": f"sqlite:///{tmp_path}/store.db"}
    open_store(settings["store"]).close()
    options = {"dtype": "float32", "enforce_eager": True, "enable_lora": True, "max_model_len": 128}
    with pytest.raises(RuntimeError, match="Engine core initialization failed"):
        LLM(str(tmp_path / "base"), additional_config={"kilotune": settings}, **options)
    assert "mixtures of experts are not served by kilotune's plugin" in "".join(capfd.readouterr())


def test_a_server_whose_workers_have_no_plugin_answers_nothing(tmp_path: Path) -> None:
    """vLLM only logs that it did not load, and has its own LoRA in our place: then not even the base answers."""
    script = tmp_path / "without.py"
    script.write_text(
        "if __name__ == '__main__':\n"
        "    import os, runpy, sys, kilotune.vllm.__main__ as launcher\n"
        "    words = launcher.server_words(sys.argv[1:])\n"
        "    os.environ.update(VLLM_PLUGINS='none', VLLM_ALLOW_RUNTIME_LORA_UPDATING='1')\n"
        "    sys.argv = ['server', *words]\n"
        "    runpy.run_module(launcher.SERVER, run_name='__main__')\n"
    )
    server = Server(tmp_path, script)
    try:
        server.wait()
        assert server.get("/v1/models")[0] == 503
        for name in ("base", "ann"):
            with pytest.raises(openai.InternalServerError, match="not active"):
                server.ask(name, [1, 2, 3])
    finally:
        server.close()


def test_killed_and_started_again_it_has_every_adapter(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        server.wait()
        server.check(["base", "ann", "bob"])
        models = {"late": support.adapted(server.base, 60)}
        server.store.put("late", models["late"])
        server.kill()
        server.start()
        server.wait()
        server.check(["late", "ann", "base", "bob", "cid"], models)
    finally:
        server.close()


class Soak:
    """Tenants that put, replace, ask, ask badly, and hang up, at random, until the time is over."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.end = time.monotonic() + float(os.environ.get("KILOTUNE_SOAK", "60"))
        self.prompts = support.prompts(4, 11)
        self.models = [support.adapted(server.base, 100 + i) for i in range(8)]
        self.expected = [[support.reference(model, prompt, 6) for prompt in self.prompts] for model in self.models]
        self.base = [support.reference(server.model("base"), prompt, 6) for prompt in self.prompts]
        self.answers = 0
        self.faults: list[str] = []

    def tenant(self, number: int) -> None:
        draw = random.Random(number)
        name = f"t{number}"
        try:
            while time.monotonic() < self.end:
                self.round(name, draw)
        except Exception as error:
            self.faults.append(f"{name}: {error!r}")

    def round(self, name: str, draw: random.Random) -> None:
        chosen, prompt = draw.randrange(len(self.models)), draw.randrange(len(self.prompts))
        version = self.server.store.put(name, self.models[chosen]).version
        for asked in (name, f"{name}@{version}", "base"):
            got = self.server.ask(asked, self.prompts[prompt], 6)
            expected = self.base[prompt] if asked == "base" else self.expected[chosen][prompt]
            if support.worst(got, expected) > TOLERANCE:
                self.faults.append(f"{asked}: {got} is not {expected}")
            self.answers += 1
        kind = draw.randrange(4)
        if kind == 0:
            self.server.store.rm(name)
            with pytest.raises(openai.NotFoundError):
                self.server.ask(name, [1, 2])
        elif kind == 1:
            with pytest.raises(openai.BadRequestError):
                self.server.ask(name, [1] * 5000)
        elif kind == 2:
            stream = self.server.client.completions.create(model=name, prompt=[1, 2], max_tokens=200, stream=True)
            next(iter(stream))
            stream.close()
        else:
            with socket.create_connection(("127.0.0.1", self.server.port)) as raw:
                raw.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 900\r\n\r\n{")


def test_soak(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        server.wait()
        server.check(["base", "ann", "bob", "cid", "eve"] * 2)
        soak = Soak(server)
        threads = [threading.Thread(target=soak.tenant, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(min(20.0, (soak.end - time.monotonic()) / 3))
        before = server.resident()
        for thread in threads:
            thread.join()
        grown = server.resident() - before
        assert soak.faults == []
        assert soak.answers > 20
        assert grown < 100 * 2**20, f"{soak.answers} answers, {grown / 2**20:.0f} MiB more"
        server.alive()
    finally:
        server.close()
