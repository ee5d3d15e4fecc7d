"""A step of vLLM for many users at once: the base, native VeRA by our plugin, and vLLM's own LoRA, in one run.

python benchmarks/vllm_decode.py [--hidden 512] [--layers 12] [--vocabulary 8192] [--rows 64] [--tokens 24]
                                 [--rank 64] [--large 256] [--lora-rank 16] [--rounds 5]

It runs in .venv-vllm (``make test-vllm`` sets that up), wherever it is called from. Every engine is a process of its
own and stays up; they decode in turns: ``--rows`` sequences, each with its own adapter. A step is the time for
``--tokens`` more tokens, divided by them.

- **base**: an engine without adapters. **base, VeRA on**: requests without an adapter, in the engine of VeRA.
- **VeRA r**: natively, by the plugin. **as LoRA r**: the same adapters converted to LoRA, which is exact, in vLLM's own
  LoRA. **LoRA r**: vLLM's own, of the small rank that is usual.

Beside it: the bytes of a slot, and how long a new adapter takes from the store into a slot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch

import _harness as harness
from _harness import Progress, Rounds

PYTHON = Path(__file__).resolve().parent.parent / ".venv-vllm" / "bin" / "python"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FEW = 4  # tokens before those that count
CPU = torch.device("cpu")


def options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__, rounds=5)
    numbers = {"hidden": 512, "layers": 12, "vocabulary": 8192, "rows": 64, "tokens": 24, "rank": 64, "large": 256}
    for name, value in {**numbers, "lora-rank": 16}.items():
        parser.add_argument(f"--{name}", type=harness.positive, default=value)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


# -- what the engines read ---------------------------------------------------------------------------


def prepare(chosen: argparse.Namespace, folder: Path) -> None:
    """The base, and adapters with numbers of their own: in a store for VeRA, in folders for LoRA."""
    import kilotune
    from kilotune.convert import to_lora
    from kilotune.fleet.store import open_store

    base = llama(chosen)
    base.save_pretrained(folder / "base")
    for rank in (chosen.rank, chosen.large):
        config = kilotune.VeraConfig(r=rank, target_modules=list(TARGETS))
        model = kilotune.get_peft_model(llama(chosen), config)
        with open_store(store_url(folder, rank), base=base) as store:
            for user in range(chosen.rows):
                draw(model, user)
                store.put(f"u{user}", model)
                if rank == chosen.rank:
                    to_lora(model).save(folder / f"lora-{rank}" / f"u{user}")
    model = kilotune.get_peft_model(
        llama(chosen), kilotune.LoraConfig(r=chosen.lora_rank, target_modules=list(TARGETS))
    )
    for user in range(chosen.rows):
        draw(model, user)
        model.save_pretrained(folder / f"lora-{chosen.lora_rank}" / f"u{user}")


def llama(chosen: argparse.Namespace) -> Any:
    """The same base at each call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, chosen.hidden // 64)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=chosen.vocabulary,
            hidden_size=chosen.hidden,
            intermediate_size=-(-8 * chosen.hidden // 192) * 64,
            num_hidden_layers=chosen.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            max_position_embeddings=512,
        )
    )


def draw(model: Any, user: int) -> None:
    """Give an adapter numbers, as if it had been trained."""
    generator = torch.Generator().manual_seed(user)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def store_url(folder: Path, rank: int) -> str:
    """Where the adapters of a rank are."""
    return f"sqlite:///{folder}/vera-{rank}.db"


# -- one engine, in a process of its own ---------------------------------------------------------------


def serve(chosen: argparse.Namespace) -> int:
    """Start the engine that ``--engine`` names, and run what each line of stdin asks for: ``adapters`` or ``base``."""
    kind, _, word = str(chosen.engine).partition(":")
    folder, rank = chosen.folder, int(word or 0)
    llm = engine(chosen, kind, rank)
    print(json.dumps({"ready": True}), flush=True)
    requests: list[Any] = [None] * chosen.rows
    load = None
    for line in sys.stdin:
        if line.strip() == "adapters" and requests[0] is None and kind != "base":
            start = time.perf_counter()
            requests = [request(kind, folder, rank, user) for user in range(chosen.rows)]
            for one in requests:
                llm.llm_engine.add_lora(one)
            load = (time.perf_counter() - start) / chosen.rows
        asked = requests if line.strip() == "adapters" else [None] * chosen.rows
        few, many = (seconds(llm, chosen, asked, count) for count in (FEW, FEW + chosen.tokens))
        print(json.dumps({"step": (many - few) / chosen.tokens, "load": load}), flush=True)
    return 0


def engine(chosen: argparse.Namespace, kind: str, rank: int) -> Any:
    """vLLM with the adapters' machinery of this kind."""
    from vllm import LLM

    more: dict[str, Any] = {}
    if kind != "base":
        more = {"enable_lora": True, "max_loras": chosen.rows, "max_cpu_loras": chosen.rows}
    if kind == "vera":
        more["additional_config"] = {"kilotune": {"rank": rank, "store": store_url(chosen.folder, rank)}}
    elif kind == "lora":
        more["max_lora_rank"] = next(size for size in (8, 16, 32, 64, 128, 256, 512) if size >= rank)
    return LLM(
        str(chosen.folder / "base"),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=chosen.rows,
        disable_log_stats=True,
        **more,
    )


def request(kind: str, folder: Path, rank: int, user: int) -> Any:
    """The adapter of a user, as vLLM is asked for it."""
    if kind == "vera":
        from kilotune.vllm.native.resolver import adapter_request

        return adapter_request(f"u{user}")
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"u{user}", user + 1, str(folder / f"lora-{rank}" / f"u{user}"))


def seconds(llm: Any, chosen: argparse.Namespace, requests: list[Any], count: int) -> float:
    """How long ``count`` tokens for every row take."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    texts: Any = [{"prompt_token_ids": [1 + row % 100, 2, 3, 4]} for row in range(chosen.rows)]
    start = time.perf_counter()
    llm.generate(texts, params, lora_request=requests, use_tqdm=False)
    return time.perf_counter() - start


@final
class Child:
    """An engine's process, asked line by line."""

    def __init__(self, name: str, words: Sequence[str], folder: Path) -> None:
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parent)
        command = [sys.executable, __file__, *words, "--engine", name, "--folder", str(folder)]
        self.log = (folder / f"{name.replace(':', '-')}.log").open("wb")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment, text=True
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next line; what vLLM itself prints is passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"error: an engine ended; its log is {self.log.name}")

    def ask(self, what: str) -> dict[str, Any]:
        """Run a round."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


# -- all of them ---------------------------------------------------------------------------------------


def slot_bytes(chosen: argparse.Namespace, kind: str, rank: int) -> int:
    """Bytes of one slot in float32, by the shapes: d and b for VeRA, both factors for LoRA."""
    from torch import nn

    found = 0
    with torch.device("meta"):
        model = llama(chosen)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            inn, out = module.in_features, module.out_features
            found += rank + out if kind == "vera" else rank * (inn + out)
    return 4 * found


def measure(chosen: argparse.Namespace, words: Sequence[str], folder: Path) -> tuple[Rounds, dict[str, Any]]:
    """All engines up, then in turns; (steps, what else there is by name)."""
    engines = {
        "base": ("base", "base"),
        "base, VeRA on": (f"vera:{chosen.large}", "base"),
        f"VeRA {chosen.rank}": (f"vera:{chosen.rank}", "adapters"),
        f"VeRA {chosen.large}": (f"vera:{chosen.large}", "adapters"),
        f"as LoRA {chosen.rank}": (f"lora:{chosen.rank}", "adapters"),
        f"LoRA {chosen.lora_rank}": (f"lora:{chosen.lora_rank}", "adapters"),
    }
    progress, rounds, more = Progress(), Rounds(), dict[str, Any]()
    children: dict[str, Child] = {}
    try:
        for name in dict.fromkeys(engine for engine, _ in engines.values()):
            progress.show(f"starting {name}")
            children[name] = Child(name, words, folder)
        for title, (name, what) in engines.items():
            kind, _, rank = name.partition(":")
            load = children[name].ask(what)["load"]  # warm
            if what == "adapters":
                more[title] = {"slot bytes": slot_bytes(chosen, kind, int(rank)), "load seconds": load}
        rounds.seconds = {title: [] for title in engines}
        for number in range(chosen.rounds):
            order = list(engines)[number % len(engines) :] + list(engines)[: number % len(engines)]
            for title in order:
                progress.show(f"round {number + 1} of {chosen.rounds}, {title}")
                name, what = engines[title]
                rounds.seconds[title].append(children[name].ask(what)["step"])
    finally:
        progress.clear()
        for child in children.values():
            child.end()
    return rounds, more


def main(words: Sequence[str]) -> int:
    """Returns the exit code."""
    chosen = options(words)
    if chosen.engine:
        return serve(chosen)
    if not PYTHON.exists():
        print("vLLM is not here: `make test-vllm` sets up .venv-vllm for it; nothing is measured")
        return 0
    if Path(sys.prefix).resolve() != PYTHON.parent.parent.resolve():
        return subprocess.run([str(PYTHON), __file__, *words]).returncode
    with tempfile.TemporaryDirectory() as folder:
        prepare(chosen, Path(folder))
        rounds, more = measure(chosen, words, Path(folder))
    rows = []
    for title, taken in rounds.seconds.items():
        step, ratio = harness.Spread.of(taken), rounds.ratio(title, "base")
        slot, load = (more.get(title, {}).get(key) for key in ("slot bytes", "load seconds"))
        told = ["" if slot is None else f"{slot / 1e6:.2f} MB", "" if load is None else f"{load * 1e3:.1f} ms"]
        rows.append([title, f"{step.median * 1e3:.1f} ms", str(ratio), f"{1 / (ratio or step).median:.2f}", *told])
    heads = ("", "a step", "times the base", "throughput", "a slot", "store to slot")
    print(f"{chosen.rows} rows, each its own adapter, {harness.title_of(harness.machine(CPU))}\n")
    print(harness.table(heads, rows))
    path = harness.write_results(chosen.out, "vllm-decode", chosen, CPU, {"seconds": rounds.seconds, "more": more})
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
