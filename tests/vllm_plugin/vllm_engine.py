"""A real engine with the plugin, over a tiny base and a store, with what transformers says beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vllm_support as support
from vllm_support import Answer, Kind

from kilotune.vllm.merged_base import merged_base

TOLERANCE = 2e-6
KINDS = {
    "ann": Kind(),
    "bob": Kind(),
    "cid": Kind(rank=8),  # smaller than the engine's
    "dan": Kind(targets=("q_proj", "v_proj")),
    "eve": Kind(rank=4, targets=("down_proj", "o_proj")),
}
MIXED = [None, *KINDS] * 4


class Engine:
    """An engine over a base and a store, with what transformers says beside it.

    shared: what a shared adapter is called that all others stand on, and that is merged into the base; None: none.
    """

    def __init__(
        self,
        folder: Path,
        kinds: dict[str, Kind],
        *,
        workers: int = 1,
        kv_heads: int = 2,
        shared: str | None = None,
        **options: Any,
    ):
        from vllm import LLM

        self.base = self.plain = support.base(folder / "base", kv_heads=kv_heads)
        self.url = f"sqlite:///{folder}/store.db"
        self.store = support.store_of(self.url, self.base, kinds, shared=shared)
        self.kinds = kinds
        settings = {"rank": 16, "seed": support.SEED, "store": self.url, **options.pop("settings", {})}
        if shared is not None:
            self.base = merged_base(str(self.base), self.store.find_shared(shared))
            settings["on"] = f"{shared}/1"
        self.llm = LLM(
            str(self.base),
            dtype=options.pop("dtype", "float32"),
            enforce_eager=options.pop("enforce_eager", True),
            enable_lora=True,
            max_model_len=256,
            max_num_seqs=options.pop("max_num_seqs", 32),
            tensor_parallel_size=workers,
            additional_config=options.pop("additional_config", {"kilotune": settings}),
            **options,
        )
        self._models: dict[str | None, Any] = {None: support.load(self.base)}

    def model(self, name: str | None) -> Any:
        """The same in transformers."""
        if name not in self._models:
            self._models[name] = support.adapted(self.base, list(self.kinds).index(name), self.kinds[name])
        return self._models[name]

    def ask(self, prompts: list[list[int]], requests: list[Any], count: int = 16) -> list[Answer]:
        """Greedy answers of one batch."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=count, logprobs=0, ignore_eos=True)
        texts = [{"prompt_token_ids": prompt} for prompt in prompts]
        given = self.llm.generate(texts, params, lora_request=requests, use_tqdm=False)
        found = []
        for output in given:
            tokens = tuple(output.outputs[0].token_ids)
            logprobs = [step[token].logprob for token, step in zip(tokens, output.outputs[0].logprobs, strict=True)]
            found.append(Answer(tokens, tuple(logprobs)))
        return found

    def request(self, name: str | None) -> Any:
        from kilotune.vllm.native.resolver import adapter_request

        return None if name is None else adapter_request(name)

    def check(self, names: list[str | None], *, seed: int = 0, count: int = 16) -> None:
        """One batch of mixed adapters is what transformers says of each alone, and not what the base says."""
        prompts = support.prompts(len(names), seed)
        answers = self.ask(prompts, [self.request(name) for name in names], count)
        for name, prompt, got in zip(names, prompts, answers, strict=True):
            expected = support.reference(self.model(name), prompt, count)
            assert support.worst(got, expected) <= TOLERANCE, name
            if name is not None:
                assert support.worst(got, support.reference(self.model(None), prompt, count)) > 1e-3

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def started(tmp: Path, kinds: dict[str, Kind] = KINDS, **options: Any) -> Iterator[Engine]:
    engine = Engine(tmp, kinds, **options)
    yield engine
    engine.close()
