"""The plugin behind the HTTP server, asked by the client of OpenAI; one server serves all tests, for it is slow."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the tests of the plugin run in .venv-vllm: make test-vllm")

import openai
import torch
import vllm_support as support
from vllm_server import KINDS, Server
from vllm_support import Kind

from kilotune import LoraConfig, VeraConfig, get_peft_model
from kilotune.fleet.store import open_store

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    try:
        made.wait()
        yield made
    finally:
        made.close()


def test_tenants_get_their_own_answers_in_one_mixed_stream(server: Server) -> None:
    server.check(["base", *KINDS, "ann", "bob", "base"] * 2)


def trained(server: Server, text: str, steps: int = 40) -> tuple[Any, float, float]:
    """An adapter trained on a text, and the loss before and after."""
    config = VeraConfig(r=16, projection_prng_key=support.SEED, target_modules=support.LINEAR, vera_dropout=0.0)
    torch.manual_seed(0)
    model = get_peft_model(support.load(server.base), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    tokens = torch.tensor(support.tokenizer()(text)["input_ids"])
    rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    losses = []
    for step in range(steps):
        batch = rows[[(step * 8 + i) % len(rows) for i in range(8)]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses[0], losses[-1]


def test_two_adapters_trained_on_real_text_and_put_into_the_running_server(server: Server) -> None:
    texts = {
        "lawyer": (ROOT / "LICENSE").read_text(),
        "coder": (ROOT / "src/kilotune/projections/matrices.py").read_text(),
    }
    models = {}
    for name, text in texts.items():
        models[name], before, after = trained(server, text)
        assert after < before - 0.5
        server.store.put(name, models[name])
    server.check(["lawyer", "coder", "base", "ann"] * 4, models, seed=3)
    prompt = support.tokenizer()("the License")["input_ids"]
    assert support.worst(server.ask("lawyer", prompt), server.ask("coder", prompt)) > 0.1


def test_a_roll_out_holds_for_the_next_request_and_a_roll_back_too(server: Server) -> None:
    models = {f"zoe@{number}": support.adapted(server.base, 50 + number) for number in (1, 2)}
    server.store.put("zoe", models["zoe@1"], alias="live")
    server.check(["zoe@live", "zoe"], dict.fromkeys(("zoe", "zoe@live"), models["zoe@1"]))
    server.store.put("zoe", models["zoe@2"], alias="live")
    expected = {"zoe": models["zoe@2"], "zoe@live": models["zoe@2"], **models}
    server.check(["zoe", "zoe@live", "zoe@1", "zoe@2", "base"] * 2, expected)
    server.store.roll_back("live", ["zoe"])
    server.check(["zoe@live", "zoe"], {**expected, "zoe@live": models["zoe@1"]})
    server.store.rm("zoe", force=True)
    with pytest.raises(openai.NotFoundError):
        server.ask("zoe", [1, 2, 3])


def test_unknown_and_strange_names_are_not_found(server: Server) -> None:
    for name in ("nobody", "ann@99", "ann@other", "../../etc/passwd", "default/ann", "ann/../bob", "a" * 300, "ann\n"):
        with pytest.raises(openai.NotFoundError):
            server.ask(name, [1, 2, 3])
    server.alive()


def test_bad_adapters_are_errors_with_their_reason_and_harm_nobody(server: Server, tmp_path: Path) -> None:
    """Never the base's answer, never the end of the engine."""
    other = support.base(tmp_path / "other", seed=5)
    with open_store(server.url) as store:
        store.put("foreign", support.adapted(other, 1))
        store.put("seed", support.adapted(server.base, 1, Kind(seed=support.SEED + 1)))
        store.put("large", support.adapted(server.base, 1, Kind(rank=17)))
        store.put("lora", get_peft_model(support.load(server.base), LoraConfig(target_modules=["q_proj"])))
        broken = support.adapted(server.base, 1)
        with torch.no_grad():
            next(value for name, value in broken.named_parameters() if "vera_lambda_b" in name)[3] = float("nan")
        store.put("broken", broken)
    reasons = {
        "foreign": "another base",
        "seed": "projection_prng_key",
        "large": "rank",
        "lora": "LORA",
        "broken": "nan",
    }
    for _ in range(2):
        for name, reason in reasons.items():
            with pytest.raises(openai.BadRequestError, match=reason):
                server.ask(name, [1, 2, 3])
        server.alive()


def test_rows_that_vanish_before_the_worker_has_them(server: Server) -> None:
    """Somebody removes files as fast as they appear: an error or the right answer, and never anything else."""
    stop = threading.Event()

    def remove() -> None:
        while not stop.is_set():
            for path in server.run.glob("*.row.safetensors"):
                path.unlink(missing_ok=True)

    thread = threading.Thread(target=remove)
    thread.start()
    models = {f"gone{i}": support.adapted(server.base, 70 + i) for i in range(6)}
    said: list[tuple[int, str]] = []
    try:
        for name, model in models.items():
            server.store.put(name, model)
            try:
                server.check([name], models)
            except openai.InternalServerError as error:
                said.append((error.status_code, str(error)))
    finally:
        stop.set()
        thread.join()
    assert all(status == 503 and "lost" in text for status, text in said)
    server.check([*models, "base", "ann"], models)
    server.check([*models, "base", "ann"] * 2, models, seed=1)
    if not said:
        pytest.skip("the worker was faster than the removal each time, so every answer was right and nothing was shown")


def test_many_bad_loads_and_then_a_good_one(server: Server) -> None:
    """vLLM's own end point for loading takes any path on the server: it is closed."""
    for _ in range(3):
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/v1/load_lora_adapter",
            json.dumps({"lora_name": "x", "lora_path": str(server.base)}).encode(),
            {"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=20)
    server.alive()


def test_what_we_add_to_the_metrics_is_bounded(server: Server) -> None:
    text = server.get("/metrics")[1]
    ours = [line for line in text.splitlines() if line.startswith("kilotune_vllm_requests_total{")]
    assert len(ours) == 5
    assert not any(name in line for name in KINDS for line in ours)


def test_several_prompts_in_one_request(server: Server) -> None:
    """It goes through the same gate, and the answer says which version it is of."""
    prompts = [[1, 2, 3], [4, 5, 6]]
    answer = server.client.completions.create(
        model="bob",
        prompt=prompts,
        max_tokens=4,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        assert tuple(choice.token_ids) == support.reference(server.model("bob"), prompt, 4).tokens
    assert answer.model.startswith("bob@1.")
