"""For the tests of the HTTP service: a plain engine without batching, a catalogue over a store, and running servers.

The plain engine runs each request by itself through ``model.forward``, so what it answers is also what the real
engine's answers are held to.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import queue
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import torch

from kilotune import PeftModel, VeraConfig, get_peft_model
from kilotune.fleet import wrap
from kilotune.fleet.store import AdapterStore, Contents, SharedVersion, Version, open_store
from kilotune.fleet.store.preparing import contents_of
from kilotune.serve.engine.interface import AdapterKey, Engine, EngineStats, Finish, Generation, Token, Vector
from kilotune.serve.http.app import create_app
from kilotune.serve.http.keys import Key, Keyring, new_key
from kilotune.serve.http.prompts import Prompts
from kilotune.serve.http.service import Service
from kilotune.serve.http.settings import ServeSettings
from tests.support.generation_support import base_of, loaded

BASE = "tiny"


class PlainEngine(Engine):
    """One request at a time a step, in turns, by the whole forward. delay: seconds of each step."""

    generates, embeds, labels = True, False, None

    def __init__(self, model: PeftModel, tokenizer: Any, catalogue: StoreCatalogue, delay: float = 0.0) -> None:
        self.model, self.tokenizer, self.catalogue, self.delay = model.eval(), tokenizer, catalogue, delay
        self.max_length = 64
        self.fault: Exception | None = None
        self.asked: list[Generation] = []
        self.left: list[str] = []  # ids whose client went away
        self._jobs: queue.Queue[Any] = queue.Queue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._loaded: dict[str, str] = {}
        self.tokens = self.running = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self, drain: float = 0.0) -> None:
        until = time.monotonic() + drain
        while self.running and time.monotonic() < until:
            time.sleep(0.01)
        self._stopping.set()
        self._jobs.put(None)
        self._thread.join(10)

    def healthy(self) -> str | None:
        return None if self.fault is None else str(self.fault)

    def stats(self) -> EngineStats:
        return EngineStats(self._jobs.qsize(), self.running, self.tokens, self.tokens, 0.0, len(self._loaded), 64)

    def _work(self) -> None:
        active: list[Any] = []
        while not self._stopping.is_set() or active:
            while not active or not self._jobs.empty():
                job = self._jobs.get()
                if job is None:
                    for one in active:
                        one.end("cancelled")
                    return
                active.append(job)
            time.sleep(self.delay)
            active = [job for job in active if not self._step(job)]
            if self._stopping.is_set():
                for one in active:
                    one.end("cancelled")
                return

    def _step(self, job: _Job) -> bool:
        """Whether it is done."""
        if job.gone:
            self.left.append(job.request.id)
            return True
        if job.request.deadline is not None and time.monotonic() > job.request.deadline:
            return job.end("deadline")
        try:
            key = job.request.adapter
            chain = [] if key is None else [self._adapter(each) for each in (key.on, key) if each is not None]
            with torch.no_grad(), self.model.route([chain]):
                logits = self.model(input_ids=torch.tensor([job.ids])).logits[0, -1].float()
        except Exception as error:
            return job.fail(error)
        self.tokens += 1
        return job.take(logits, self.tokenizer)

    def _adapter(self, key: AdapterKey) -> str:
        name = f"{key.namespace}-{key.sha256[:16]}"
        if key.sha256 not in self._loaded:
            self.model.load_adapter(self.catalogue.store(key.namespace).get(key.name, key.version).file(), name)
            self._loaded[key.sha256] = name
        return self._loaded[key.sha256]

    async def generate(self, request: Generation) -> AsyncIterator[Token | Finish]:
        self.asked.append(request)
        job = _Job(request, asyncio.get_running_loop())
        self.running += 1
        self._jobs.put(job)
        try:
            while True:
                event = await job.out.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finish):
                    return
        finally:
            self.running -= 1
            job.gone = True

    async def embed(self, tenant: str, adapter: AdapterKey | None, texts: Sequence[Sequence[int]]) -> list[Vector]:
        raise NotImplementedError

    async def classify(self, tenant: str, adapter: AdapterKey | None, texts: Sequence[Sequence[int]]) -> list[Vector]:
        raise NotImplementedError


class _Job:
    def __init__(self, request: Generation, loop: asyncio.AbstractEventLoop) -> None:
        self.request, self.loop = request, loop
        self.out: asyncio.Queue[Any] = asyncio.Queue()
        self.ids, self.new, self.shown = list(request.prompt), [], ""
        self.gone = False
        seed = request.sampling.seed
        self.chance = torch.Generator().manual_seed(torch.seed() % 2**31 if seed is None else seed)

    def tell(self, event: Any) -> None:
        self.loop.call_soon_threadsafe(self.out.put_nowait, event)

    def end(self, reason: Any, text: str = "") -> bool:
        self.tell(Finish(reason, text, None, len(self.request.prompt), len(self.new)))
        return True

    def fail(self, error: Exception) -> bool:
        self.tell(error)
        return True

    def take(self, logits: torch.Tensor, tokenizer: Any) -> bool:
        wanted = self.request.sampling
        logprobs = logits.log_softmax(-1)
        number = draw(logits, wanted, self.chance)
        self.ids.append(number)
        self.new.append(number)
        ends = {*wanted.stop_token_ids, *(() if wanted.ignore_eos else (tokenizer.eos_token_id,))}
        whole = tokenizer.decode([n for n in self.new if n not in ends], clean_up_tokenization_spaces=False)
        cut = min((whole.find(stop) for stop in wanted.stop if stop in whole), default=None)
        text = whole if cut is None else whole[:cut]
        held = (
            0
            if cut is not None
            else max((k for s in wanted.stop for k in range(1, len(s)) if whole.endswith(s[:k])), default=0)
        )
        text = text[: len(text) - held].rstrip("\ufffd")
        more, self.shown = text[len(self.shown) :], text
        top: tuple[tuple[int, float], ...] = ()
        if wanted.logprobs:
            best = logprobs.topk(wanted.logprobs)
            top = tuple(zip(best.indices.tolist(), best.values.tolist()))
        self.tell(Token(number, more, None if wanted.logprobs is None else float(logprobs[number]), top))
        if number in ends or cut is not None:
            return self.end("stop")
        if len(self.new) >= wanted.max_tokens:
            return self.end("length", whole[len(text) :])
        return False


def draw(logits: torch.Tensor, wanted: Any, chance: torch.Generator) -> int:
    """One token, by temperature, top_k and top_p."""
    if wanted.temperature == 0:
        return int(logits.argmax())
    chances = (logits / wanted.temperature).softmax(-1)
    ordered, places = chances.sort(descending=True)
    keep = ordered.cumsum(-1) - ordered < wanted.top_p
    if wanted.top_k is not None:
        keep &= torch.arange(len(ordered)) < wanted.top_k
    kept = ordered * keep
    return int(places[torch.multinomial(kept / kept.sum(), 1, generator=chance)])


class StoreCatalogue:
    """The adapters of a store, without a cache."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._stores: dict[str, AdapterStore] = {}
        self.away: Exception | None = None

    def store(self, namespace: str) -> AdapterStore:
        if self.away is not None:
            raise self.away
        if namespace not in self._stores:
            self._stores[namespace] = open_store(self.url, namespace=namespace)
        return self._stores[namespace]

    def resolve(self, namespace: str, name: str, which: Any) -> AdapterKey:
        info = self.store(namespace).info(name, which)
        return dataclasses.replace(AdapterKey.of(namespace, info), name=name)

    def put(self, namespace: str, name: str, adapter: Any, **more: Any) -> Version:
        return self.store(namespace).put(name, adapter, **more)

    def settle(self, namespace: str, on: str) -> SharedVersion:
        return self.store(namespace).settle(on)

    def check(self, namespace: str, name: str, adapter: Any, on: Any = None) -> Contents:
        return contents_of(adapter)

    def keep(self, namespace: str, name: str, contents: Contents, **more: Any) -> tuple[Version, bool]:
        return self.store(namespace).put_once(name, contents, **more)

    def load(self, key: AdapterKey) -> None:
        self.store(key.namespace).get(key.name, key.version)

    def own_files(self, key: AdapterKey) -> Mapping[str, bytes]:
        record = self.store(key.namespace).get(key.name, key.version)
        return dict(record.files or (self.store(key.namespace).shared_of(record.info).files if key.on else {}))

    def info(self, namespace: str, name: str, which: Any = None) -> Version:
        return self.store(namespace).info(name, which)

    def versions(self, namespace: str, name: str) -> list[Version]:
        return self.store(namespace).versions(name)

    def aliases(self, namespace: str, name: str) -> dict[str, int]:
        return self.store(namespace).aliases(name)

    def ls(self, namespace: str, pattern: str | None = None, **more: Any) -> list[Version]:
        return list(self.store(namespace).ls(pattern, **more))

    def rm(self, namespace: str, name: str, which: Any = None, *, force: bool = False) -> int:
        return self.store(namespace).rm(name, which, force=force)

    def roll_out(self, namespace: str, alias: str, versions: Mapping[str, Any]) -> dict[str, int]:
        return self.store(namespace).roll_out(alias, versions)

    def roll_back(self, namespace: str, alias: str, names: Iterable[str]) -> dict[str, int]:
        return self.store(namespace).roll_back(alias, names)

    def unalias(self, namespace: str, name: str, alias: str) -> None:
        self.store(namespace).unalias(name, alias)

    def store_state(self) -> str | None:
        return None if self.away is None else str(self.away)

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


# -- models and adapters -----------------------------------------------------------------------------


@functools.cache
def base_folder() -> Path:
    """A tiny Llama with a tokenizer and a chat template; made once, so only read it."""
    return base_of("llama", Path(tempfile.mkdtemp(prefix="kilotune-serve-")) / "base", template=True)


@functools.cache
def adapter_folder(seed: int) -> Path:
    """An adapter of it, another one for each seed."""
    folder = base_folder().parent / f"adapter-{seed}"
    model = get_peft_model(
        loaded("llama", base_folder()), VeraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(0.7 * torch.randn(parameter.shape, generator=chance))
    model.save_pretrained(folder)
    return folder


@functools.cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_folder())


def prompt_ids(text: str) -> list[int]:
    """As the service has it: no special token in front with this tokenizer."""
    return [*tokenizer()(text, add_special_tokens=False)["input_ids"]]


@functools.cache
def reference(seed: int | None) -> Any:
    """The base, or the base with the adapter of this seed merged in: a plain model of transformers."""
    model = loaded("llama", base_folder())
    return model if seed is None else PeftModel.from_pretrained(model, adapter_folder(seed)).merge_and_unload().eval()


def expected(seed: int | None, text: str, count: int) -> str:
    """What transformers' own generate writes, greedy."""
    ids = prompt_ids(text)
    made = reference(seed).generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False, max_new_tokens=count,
    )  # fmt: skip
    return str(tokenizer().decode(made[0, len(ids) :].tolist(), skip_special_tokens=True))


# -- servers -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Running:
    """A service in this process. keys: by namespace; manager: for all namespaces; monitor: for the metrics."""

    url: str
    service: Service
    engine: Any
    catalogue: StoreCatalogue
    keys: dict[str, str]
    manager: str
    monitor: str
    clients: dict[str, Any] = dataclasses.field(default_factory=dict)

    def client(self, key: str | None = None, **more: Any) -> httpx2.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=30, **more)

    def openai(self, namespace: str = "ann") -> Any:
        """OpenAI's own client, with the key of a namespace; closed with the service."""
        import openai

        if namespace not in self.clients:
            key = self.keys[namespace]
            self.clients[namespace] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)
        return self.clients[namespace]


def batching(folder: Path, **options: Any) -> dict[str, Any]:
    """The real engine and the real registry, for :func:`serving`."""
    from kilotune.serve.engine.continuous_batching import TransformersEngine
    from kilotune.serve.engine.tenant_adapters import AdapterRegistry

    registry = AdapterRegistry(f"sqlite:///{folder / 'adapters.db'}", loaded("llama", base_folder()))
    engine = TransformersEngine(
        registry.model.get_base_model(), tokenizer(), registry, **{"max_running": 16, **options}
    )
    return {"engine": engine, "catalogue": registry}


def keyring(*namespaces: str) -> tuple[Keyring, dict[str, str], str, str]:
    """(the ring, tenants' keys by namespace, a manager's, a monitor's)."""
    made = {space: new_key("tenant", space) for space in namespaces}
    manager, monitor = new_key("manager", None), new_key("monitor", None)
    kept: list[Key] = [key for _, key in made.values()] + [manager[1], monitor[1]]
    return Keyring(None, kept), {space: key for space, (key, _) in made.items()}, manager[0], monitor[0]


@contextmanager
def serving(
    folder: Path,
    *,
    engine: Any = None,
    catalogue: Any = None,
    delay: float = 0.0,
    ring: Any = None,
    prompts: Prompts | None = None,
    base: str = BASE,
    **settings: Any,
) -> Iterator[Running]:
    """A service with the tiny base, over a store in ``folder``; ann has the adapters of seeds 1 and 2, bob one of 3.

    prompts: of another base, for which there are no adapters.
    """
    import uvicorn

    from kilotune.serve.http.connections import Wire
    from kilotune.serve.http.process import listen, url_of

    catalogue = catalogue or StoreCatalogue(f"sqlite:///{folder / 'adapters.db'}")
    if engine is None:
        engine = PlainEngine(wrap(loaded("llama", base_folder())), tokenizer(), catalogue, delay)
    if prompts is None:
        catalogue.put("ann", "poems", adapter_folder(1), alias="live")
        catalogue.put("ann", "letters", adapter_folder(2))
        catalogue.put("bob", "secret-plans", adapter_folder(3))
    engine.start()
    keys, tenants, manager, monitor = ring or keyring("ann", "bob", "carl")
    chosen = ServeSettings(**{"port": 0, "keys": "in memory", **settings})
    made_prompts = prompts or Prompts(tokenizer(), 96, chosen.own_chat_templates)
    service = Service(engine, catalogue, made_prompts, keys, chosen, base)
    listening = listen(chosen)
    config = uvicorn.Config(
        create_app(service), http=Wire, ws="none", lifespan="off", log_config=None, access_log=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        made = Running(url_of(listening), service, engine, catalogue, tenants, manager, monitor)
        yield made
    finally:
        for client in made.clients.values():
            client.close()
        server.should_exit = True
        thread.join(15)
        engine.stop()
        service.close()
        listening.close()
        assert not thread.is_alive()
