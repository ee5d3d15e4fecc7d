"""The memory that `kilotune train` says a training takes, beside what it really takes at its peak.

python benchmarks/train_memory.py [--cases PATTERN,...] [--hidden 256] [--layers 4] [--tokens 256] [--steps 3]
                                  [--device cuda]

Each case is a training as a user runs it: a folder with a model (random weights) and its tokenizer, a file of rows, the
settings; `open_session` reads them, `plan_run` makes the plan, `fit` trains with transformers' Trainer, AdamW, an
evaluation and a checkpoint. **Estimate** is the plan's. **Measured** is the weights and the most that the allocator has
handed out at a moment of `fit` beyond what there was before: on the CPU from what torch's profiler records, on CUDA
from the allocator. **Process** is by how much the process grew beyond its size before `fit`, at its largest (Linux
only): it holds what libraries load on their first use and what the C library keeps, and no bar is set on it.

The exit code is 1 where an estimate is off by more than 20 %.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, final

import torch

import _harness as harness
from _harness import MIB, Bar

WITHIN = 0.20
ROWS = 48
VOCABULARY = 2000
HEADS = ("case", "estimate", "measured", "ratio", "activations", "weights", "process")


@final
@dataclass(frozen=True)
class Case:
    """One training. kind: of the model. method, rank: what is trained. checkpointing, precision, quantization, batch:
    as the settings have them. packing: several rows in a sequence."""

    kind: str
    method: str
    batch: int
    rank: int = 0
    checkpointing: bool = False
    precision: str = "float32"
    dtype: str = "float32"
    quantization: str = "none"
    packing: bool = False
    accumulation: int = 1

    @property
    def name(self) -> str:
        """For the table."""
        rank = f" r {self.rank}" if self.rank else ""
        more = [f"batch {self.batch}"]
        more += ["checkpointing"] if self.checkpointing else []
        more += [f"autocast {self.precision}"] if self.precision != "float32" else []
        more += [f"weights {self.dtype}"] if self.dtype != "float32" else []
        more += [self.quantization] if self.quantization != "none" else []
        more += ["packed"] if self.packing else []
        more += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        return f"{self.kind} {self.method}{rank}, {', '.join(more)}"


CASES = (
    Case("llama", "vera", 2, 64),
    Case("llama", "vera", 8, 64),
    Case("llama", "vera", 8, 64, checkpointing=True),
    Case("llama", "vera", 8, 64, precision="bfloat16"),
    Case("llama", "vera", 8, 64, dtype="bfloat16"),
    Case("llama", "vera", 8, 64, packing=True),
    Case("llama", "lora", 2, 8),
    Case("llama", "lora", 8, 8),
    Case("llama", "lora", 8, 8, checkpointing=True),
    Case("llama", "lora", 4, 8, accumulation=2),
    Case("llama", "lora", 4, 8, quantization="nf4"),
    Case("llama", "vera", 4, 64, quantization="nf4", checkpointing=True),
    Case("llama", "dora", 4, 8),
    Case("llama", "full", 4),
    Case("llama", "full", 4, checkpointing=True),
    Case("llama", "full", 2, accumulation=2),
    Case("gpt2", "vera", 4, 64),
    Case("gpt2", "full", 2, checkpointing=True),
    Case("bert", "vera", 8, 64),
    Case("bert", "vera", 8, 64, checkpointing=True),
    Case("bert", "lora", 8, 8, precision="bfloat16"),
    Case("bert", "full", 8),
    Case("bert", "head", 8),
    Case("t5", "lora", 4, 8),
)


def tensors_of(estimate: dict[str, Any]) -> int:
    """The estimate of what the allocator hands out; runs of before it knew the process have that alone."""
    return int(estimate.get("tensors", estimate["peak"]))


@final
@dataclass
class Measured:
    """Bytes. process: None where the system does not tell."""

    case: str
    estimate: dict[str, Any]
    measured: int
    process: int | None
    how: str
    rehearsal_seconds: float

    @property
    def ratio(self) -> float:
        """The estimate over what was measured."""
        return float(tensors_of(self.estimate)) / self.measured

    def row(self) -> list[str]:
        """For the table."""
        sizes = [tensors_of(self.estimate), self.measured]
        told = [f"{size / MIB:.1f} MiB" for size in sizes]
        parts = [f"{self.estimate[name] / MIB:.1f}" for name in ("activations", "weights")]
        return [
            self.case,
            *told,
            f"{self.ratio:.3f}",
            *parts,
            "-" if self.process is None else f"{self.process / MIB:.1f}",
        ]


# -- what is trained ------------------------------------------------------------------------------------


def model_of(kind: str, chosen: argparse.Namespace) -> Any:
    """A model of transformers with random weights."""
    import transformers as t

    wide = {
        "hidden_size": chosen.hidden,
        "num_hidden_layers": chosen.layers,
        "num_attention_heads": chosen.hidden // 64,
    }
    torch.manual_seed(0)
    if kind == "llama":
        inner = 256 * -(-8 * chosen.hidden // (3 * 256))
        config = t.LlamaConfig(**wide, intermediate_size=inner, vocab_size=VOCABULARY, pad_token_id=0)
        return t.LlamaForCausalLM(config)
    if kind == "gpt2":
        config = t.GPT2Config(
            n_embd=chosen.hidden,
            n_layer=chosen.layers,
            n_head=chosen.hidden // 64,
            vocab_size=VOCABULARY,
            pad_token_id=0,
        )
        return t.GPT2LMHeadModel(config)
    if kind == "bert":
        inner = 4 * chosen.hidden
        return t.BertModel(t.BertConfig(**wide, intermediate_size=inner, vocab_size=VOCABULARY, pad_token_id=0))
    config = t.T5Config(
        d_model=chosen.hidden,
        d_kv=64,
        d_ff=4 * chosen.hidden,
        num_layers=chosen.layers,
        num_heads=chosen.hidden // 64,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return t.T5ForConditionalGeneration(config)


def tokenizer() -> Any:
    """One token for each of the words w3, w4, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[EOS]": 1, "[UNK]": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


def write_base(kind: str, folder: Path, chosen: argparse.Namespace) -> Path:
    """The folder of a base model, made once."""
    if not folder.exists():
        model_of(kind, chosen).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def write_rows(kind: str, path: Path, chosen: argparse.Namespace) -> Path:
    """Rows of random words, from a quarter of the longest length on."""
    generator = torch.Generator().manual_seed(1)

    def words(least: int, most: int) -> str:
        count = int(torch.randint(least, most + 1, (1,), generator=generator))
        return " ".join(f"w{int(i)}" for i in torch.randint(3, VOCABULARY, (count,), generator=generator))

    rows: list[dict[str, Any]] = []
    for number in range(ROWS):
        text = words(chosen.tokens // 4, chosen.tokens)
        row: dict[str, Any] = {"text": text}
        if kind == "bert":
            row["label"] = "ab"[number % 2]
        if kind == "t5":
            row = {"source": text, "target": words(4, chosen.tokens // 4)}
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings_of(case: Case, base: Path, rows: Path, output: Path, chosen: argparse.Namespace) -> Any:
    """The settings of one case."""
    from kilotune.train.settings import sections as s

    options: dict[str, Any] = {"r": case.rank} if case.rank else {}
    if case.method != "full" and case.method != "head":
        options["target_modules"] = "all-linear"
    return s.TrainSettings(
        task={"bert": "text-classification", "t5": "seq2seq"}.get(case.kind, "causal-lm"),
        output=str(output),
        model=s.ModelSettings(
            base=str(base),
            dtype=case.dtype,
            quantization=case.quantization,
            gradient_checkpointing=case.checkpointing,
        ),
        adapter=s.AdapterSettings(method=case.method, options=options),
        data=s.DataSettings(train=str(rows), validation_fraction=0.2, max_length=chosen.tokens, packing=case.packing),
        training=s.TrainingSettings(
            batch_size=case.batch,
            accumulation=case.accumulation,
            max_steps=chosen.steps,
            precision=case.precision,
            device=chosen.device,
            eval_every=chosen.steps,
        ),
        logging=s.LogSettings(progress="quiet", report=False),
    )


# -- what it takes --------------------------------------------------------------------------------------


def measure(case: Case, folder: Path, chosen: argparse.Namespace, device: torch.device) -> Measured:
    """Plan one training, and run it."""
    from kilotune.train.run import fit, open_session
    from kilotune.train.running.planning import plan_run

    base = write_base(case.kind, folder / f"base-{case.kind}", chosen)
    rows = write_rows(case.kind, folder / f"{case.kind}.jsonl", chosen)
    session = open_session(settings_of(case, base, rows, folder / f"out-{case.name}", chosen))
    taken: list[Any] = []
    seconds = harness.seconds_of(lambda: taken.append(plan_run(session)), torch.device("cpu"))
    plan = taken[0]
    if plan.memory is None:
        raise SystemExit(f"error: {case.name}: no estimate: {plan.unknown}")
    gc.collect()  # what the last case left would go while this one is measured
    with process_growth() as grown:
        _, peak = harness.live_and_peak(lambda: fit(session), device)
    return Measured(
        case.name, plan.memory.to_dict(), plan.memory.weights + peak, grown.get("bytes"), plan.memory.how, seconds
    )


@contextlib.contextmanager
def process_growth() -> Iterator[dict[str, int]]:
    """By how much the process grows inside, at its largest; nothing where Linux's files are not there."""
    status, found = Path("/proc/self/status"), dict[str, int]()

    def read(name: str) -> int:
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins anew
        before = read("VmRSS")
    except (OSError, AttributeError):
        yield found
        return
    yield found
    found["bytes"] = read("VmHWM") - before


def draw(done: Sequence[Measured], chosen: argparse.Namespace, where: str, stem: str) -> Path:
    """Estimate over what was measured, a point for each case; returns the file's path."""
    made, axes = harness.figure(1, 1, 6.5, 5.0)
    axis = axes[0][0]
    sizes = [each.measured / MIB for each in done]
    ends = [min(sizes) / 1.3, max(sizes) * 1.3]
    axis.fill_between(ends, [e * (1 - WITHIN) for e in ends], [e * (1 + WITHIN) for e in ends], color="#dfe7ef")
    axis.plot(ends, ends, color="#8a8a8a", linewidth=0.8)
    axis.plot(sizes, [tensors_of(each.estimate) / MIB for each in done], "o", color="#2f6db3", markersize=4)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("measured peak, MiB")
    axis.set_ylabel("estimate before the run, MiB (band: within 20 %)")
    made.suptitle(f"{len(done)} trainings; {where}", fontsize=8)
    return harness.save_figure(made, chosen.out, stem)


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=1)
    parser.add_argument("--hidden", type=harness.positive, default=256, help="a multiple of 64 (256)")
    parser.add_argument("--layers", type=harness.positive, default=4)
    parser.add_argument("--tokens", type=harness.positive, default=256, help="in the longest row (256)")
    parser.add_argument("--steps", type=harness.positive, default=3, help="of each training (3)")
    parser.add_argument("--cases", type=lambda text: text.split(";"), help="patterns of names: 'llama*;bert lora*'")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run with the command line's words; returns the exit code."""
    chosen = options(words)
    device = harness.device_of(chosen)
    cases = [case for case in CASES if not chosen.cases or any(fnmatch(case.name, p) for p in chosen.cases)]
    if not cases:
        raise SystemExit(f"error: --cases: none of these is like that: {'; '.join(case.name for case in CASES)}")
    done: list[Measured] = []
    progress, interrupted = harness.Progress(), False
    warnings.filterwarnings("ignore", message=".*profiler.*")
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, case in enumerate(cases, 1):
                progress.show(f"{number} of {len(cases)}: {case.name}")
                done.append(measure(case, Path(folder), chosen, device))
        except KeyboardInterrupt:
            interrupted = True
            print("\ninterrupted; measured so far:", file=sys.stderr)
    progress.clear()
    where = harness.title_of(harness.machine(device))
    print(f"\nhidden {chosen.hidden}, {chosen.layers} layers, {chosen.tokens} tokens at most; {where}\n")
    print(harness.table(HEADS, [each.row() for each in done]))
    for each in done:
        if each.how != "rehearsed":
            print(f"{each.case}: {each.how}")
    if done:
        stem = f"train-memory-{device.type}"
        written = [harness.write_results(chosen.out, stem, chosen, device, done), draw(done, chosen, where, stem)]
        print("\nwritten: " + ", ".join(path.name for path in written))
    code = harness.judge([Bar(f"{each.case}: estimate off by", abs(each.ratio - 1), WITHIN) for each in done])
    return harness.INTERRUPTED if interrupted else code


if __name__ == "__main__":
    sys.exit(main())
