"""vLLM's HTTP server with the plugin, as a process of its own, asked by OpenAI's client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import vllm_support as support
from vllm_support import Answer, Kind

TOLERANCE = 2e-6
KINDS = {"ann": Kind(), "bob": Kind(rank=8), "cid": Kind(targets=("q_proj", "v_proj")), "eve": Kind()}


class Server:
    """vLLM's server with the plugin, as a process of its own."""

    def __init__(self, folder: Path, script: Path | None = None) -> None:
        self.folder = folder
        self.command = [sys.executable, *(["-m", "kilotune.vllm"] if script is None else [str(script)])]
        self.base = support.base(folder / "base")
        self.url = f"sqlite:///{folder}/store.db"
        self.store = support.store_of(self.url, self.base, KINDS)
        self.run = folder / "run"
        self.log = folder / "server.log"
        self._models: dict[str, Any] = {"base": support.load(self.base)}
        self.start()

    def start(self, **environment: str) -> None:
        """Start the process; :meth:`wait` waits until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = ["--model", str(self.base), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"]
        words += ["--max-model-len", "256", "--max-num-seqs", "32", "--max-loras", "3", "--max-cpu-loras", "4"]
        words += ["--port", str(self.port), "--host", "127.0.0.1", "--store", self.url, "--rank", "16"]
        words += ["--kilotune", json.dumps({"seed": support.SEED})]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.command, *words],
                stdout=log,
                stderr=log,
                env={**os.environ, "KILOTUNE_VLLM_RUN": str(self.run), **environment},
                cwd=self.folder,
                start_new_session=True,
            )
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def wait(self) -> None:
        end = time.monotonic() + 600
        while self.get("/health")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.5)

    def model(self, name: str) -> Any:
        if name not in self._models:
            self._models[name] = support.adapted(self.base, list(KINDS).index(name), KINDS[name])
        return self._models[name]

    def ask(self, model: str, prompt: list[int], count: int = 12) -> Answer:
        """A streamed greedy answer."""
        tokens: list[int] = []
        logprobs: list[float] = []
        stream = self.client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=count,
            temperature=0,
            logprobs=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        for part in stream:
            for choice in part.choices:
                tokens += choice.token_ids or []
                logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
        return Answer(tuple(tokens), tuple(logprobs))

    def check(self, names: list[str], models: dict[str, Any] | None = None, seed: int = 0, count: int = 12) -> None:
        """All at once, each its own answer."""
        prompts = support.prompts(len(names), seed)
        with ThreadPoolExecutor(len(names)) as pool:
            answers = list(pool.map(self.ask, names, prompts, [count] * len(names)))
        for name, prompt, answer in zip(names, prompts, answers, strict=True):
            expected = support.reference((models or {}).get(name) or self.model(name), prompt, count)
            assert support.worst(answer, expected) <= TOLERANCE, name

    def alive(self) -> None:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        self.check(["base", "ann"], seed=9)

    def kill(self) -> None:
        """All its processes at once, as when a machine goes down."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def resident(self) -> int:
        """Bytes of memory of all its processes together."""
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                words = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(words[2]) == self.process.pid:  # its process group
                total += int(words[21]) * os.sysconf("SC_PAGE_SIZE")
        return total

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
        self.store.close()
