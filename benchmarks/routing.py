"""A batch for many adapters at once against the same batch for one, and against PEFT's mixed batches.

python benchmarks/routing.py [--hidden 768] [--layers 4] [--rows 64] [--length 8] [--rank 256] [--resident 4096]
                             [--vocabulary 2000] [--put-hidden 768] [--put-layers 12] [--rounds 9] [--bars]

The model is Llama-shaped and all its linear layers but the prediction are adapted; a batch has ``--rows`` sequences of
``--length`` tokens (512 tokens by default), and a forward without gradients is timed.

- **base**: no adapter.
- **one**: kilotune, one active VeRA adapter, no route. **one, routed**: all rows named for one adapter of a bank.
- **mixed**: a different adapter of a bank for each row, 4 more resident. **mixed, resident**: ``--resident`` adapters
  are in the bank. The route is entered anew for each forward.
- **mixed LoRA 8**: kilotune's LoRA r 8 from a bank. **mixed Uni-LoRA 4**: Uni-LoRA r 4, whose factors
  each layer picks out of the rows' vectors of 256 numbers. **peft LoRA 8**: PEFT's ``adapter_names``.

Beside it: putting one adapter into a bank of a 12-layer, 768-wide model from tensors in memory, with few and with many
resident, and the bytes of an adapter against the formula.

``--bars``: mixed at most 1.10 of one and of one routed; with all resident at most 1.10 of with few; at least 6 times as
fast as PEFT's mixed batch; a put under 1 ms; exit code 1 where not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import _harness as harness
import kilotune
from _harness import Bar, Progress, Rounds
from _models import Shape, build, linear_layers, sample, twin
from kilotune.fleet import AdapterBank, wrap

FEW = 4
PEFT = "peft LoRA 8"
PUTS = 200


def config_of(method: str, rank: int) -> Any:
    """All linear layers but the prediction."""
    if method == "vera":
        return kilotune.VeraConfig(r=rank, target_modules="all-linear")
    if method == "unilora":
        return kilotune.UniLoraConfig(r=rank, theta_d_length=256, target_modules="all-linear")
    return kilotune.LoraConfig(r=rank, target_modules="all-linear")


def random_adapter(bank: AdapterBank, seed: int) -> dict[str, Tensor]:
    """The tensors of an adapter of the bank's form."""
    row = torch.randn(bank.form.length, generator=torch.Generator().manual_seed(seed)) * 0.1
    return bank.form.tensors(row)


def bank_with(base: Any, config: Any, count: int, slots: int) -> AdapterBank:
    """A bank on a model of its own, with adapters u0, u1, ..."""
    bank = AdapterBank(wrap(twin(base)).eval(), config, slots=slots)
    for i in range(count):
        bank.put(f"u{i}", random_adapter(bank, i))
    return bank


def with_one(base: Any, config: Any) -> Any:
    """A model with one active adapter, of random vectors."""
    model = kilotune.get_peft_model(twin(base), config).eval()
    generator = torch.Generator().manual_seed(0)
    for _, parameter in model.adapter_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def peft_with(base: Any, count: int) -> Any:
    """PEFT's model with LoRA adapters u0, u1, ..."""
    import peft

    def config() -> Any:
        return peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)

    model = peft.get_peft_model(twin(base), config(), adapter_name="u0")
    for i in range(1, count):
        model.add_adapter(f"u{i}", config())
    return model.eval()


def forwards(chosen: argparse.Namespace, progress: Progress) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    shape = Shape("llama", chosen.hidden, chosen.layers, chosen.vocabulary)
    base = build(shape, 512, torch.device("cpu"), torch.float32).eval()
    batch = sample(shape, chosen.rows * chosen.length, chosen.length, torch.device("cpu"))
    ids = batch["input_ids"]
    names = [f"u{i}" for i in range(chosen.rows)]
    vera, lora = config_of("vera", chosen.rank), config_of("lora", 8)
    progress.show("making adapters")
    one = with_one(base, vera)
    few = bank_with(base, vera, chosen.rows + FEW, chosen.rows + FEW)
    many = bank_with(base, vera, max(chosen.resident, chosen.rows), max(chosen.resident, chosen.rows))
    stacked = bank_with(base, lora, chosen.rows, chosen.rows)
    vectors = bank_with(base, config_of("unilora", 4), chosen.rows, chosen.rows)
    theirs = peft_with(base, chosen.rows)
    check(few, ids, names)
    check(vectors, ids, names)
    return {
        "base": lambda: base(input_ids=ids),
        f"one VeRA {chosen.rank}": lambda: one(input_ids=ids),
        "one, routed": lambda: few.model(input_ids=ids, adapter_names=["u0"] * chosen.rows),
        "mixed": lambda: few.model(input_ids=ids, adapter_names=names),
        "mixed, resident": lambda: many.model(input_ids=ids, adapter_names=names),
        "mixed LoRA 8": lambda: stacked.model(input_ids=ids, adapter_names=names),
        "mixed Uni-LoRA 4": lambda: vectors.model(input_ids=ids, adapter_names=names),
        PEFT: lambda: theirs(input_ids=ids, adapter_names=names),
    }


def check(bank: AdapterBank, ids: Tensor, names: Sequence[str]) -> None:
    """A mixed batch gives what its rows give alone, and the rows differ."""
    with torch.no_grad():
        mixed = bank.model(input_ids=ids, adapter_names=list(names)).logits
        for row in (0, len(names) - 1):
            alone = bank.model(input_ids=ids[row : row + 1], adapter_names=[names[row]]).logits[0]
            if not torch.allclose(mixed[row], alone, atol=1e-4, rtol=1e-3):
                raise AssertionError(f"row {row} is not what it is alone")
        other = bank.model(input_ids=ids[:1], adapter_names=[names[-1]]).logits[0]
        if torch.allclose(mixed[0], other, atol=1e-2):
            raise AssertionError("two adapters give the same")


def puts(resident: int, rank: int, hidden: int, layers: int) -> list[float]:
    """Seconds of putting single adapters into a bank of a BERT-shaped model."""
    shape = Shape("bert", hidden, layers)
    base = build(shape, 512, torch.device("cpu"), torch.float32)
    targets = sorted({name.rpartition(".")[2] for name in linear_layers(base, shape)})
    bank = AdapterBank(wrap(base), kilotune.VeraConfig(r=rank, target_modules=targets), slots=resident + 1)
    formula = sum(rank + layer.out for layer in (slot.site for slot in bank.form.slots.values()))
    if bank.bytes_per_adapter != 4 * formula:
        raise AssertionError(f"an adapter takes {bank.bytes_per_adapter} bytes, the formula says {4 * formula}")
    adapters = [random_adapter(bank, i) for i in range(8)]
    for i in range(resident):
        bank.put(f"u{i}", adapters[i % 8])
    taken = []
    for i in range(PUTS):
        start = time.perf_counter()
        bank.put("new", adapters[i % 8])
        taken.append(time.perf_counter() - start)
    return taken


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=9)
    parser.add_argument("--hidden", type=harness.positive, default=768)
    parser.add_argument("--layers", type=harness.positive, default=4)
    parser.add_argument("--rows", type=harness.positive, default=64)
    parser.add_argument("--length", type=harness.positive, default=8)
    parser.add_argument("--rank", type=harness.positive, default=256)
    parser.add_argument("--resident", type=harness.positive, default=4096)
    parser.add_argument("--vocabulary", type=harness.positive, default=2000)
    parser.add_argument("--put-hidden", type=harness.positive, default=768)
    parser.add_argument("--put-layers", type=harness.positive, default=12)
    parser.add_argument("--bars", action="store_true", help="what the project promises, and whether it holds")
    return parser.parse_args(words)


def bars_of(times: Rounds, rank: int, put: Sequence[float]) -> list[Bar]:
    """What the project promises."""

    def ratio(name: str, to: str) -> float | None:
        found = times.ratio(name, to)
        return None if found is None else found.median

    faster = ratio("mixed", PEFT)
    return [
        Bar("mixed over one adapter", ratio("mixed", f"one VeRA {rank}"), 1.10),
        Bar("mixed over one adapter, routed", ratio("mixed", "one, routed"), 1.10),
        Bar("mixed, many resident over few", ratio("mixed, resident", "mixed"), 1.10),
        Bar("mixed over PEFT's mixed LoRA 8", faster, 1 / 6),
        Bar("milliseconds of a put, few resident", 1e3 * put[0], 1.0),
        Bar("milliseconds of a put, many resident", 1e3 * put[1], 1.0),
    ]


def draw(times: Rounds, where: str, chosen: argparse.Namespace, stem: str) -> Path:
    """Time over the base's."""
    made, axes = harness.figure(1, 1, 6.5, 2.6)
    axis = axes[0][0]
    names = [name for name in reversed(times.seconds) if name != "base"]
    spreads = [spread for name in names if (spread := times.ratio(name, "base")) is not None]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    colours = ["#d0803c" if name.startswith("peft") else "#2f6db3" for name in names]
    axis.barh(names, [s.median for s in spreads], xerr=errors, color=colours)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_title(f"{chosen.rows} rows of {chosen.length} tokens: time of a forward / the base's", fontsize=9)
    axis.tick_params(labelsize=7)
    made.suptitle(where, fontsize=7)
    return harness.save_figure(made, chosen.out, stem)


def main(words: Sequence[str] | None = None) -> int:
    """Run with the command line's words; returns the exit code."""
    chosen = options(words)
    device, progress, times = torch.device("cpu"), Progress(), Rounds()
    runs = forwards(chosen, progress)
    with torch.no_grad():
        harness.take_turns(runs, chosen.rounds, device, times, progress, "forwards")
    sizes = (chosen.rank, chosen.put_hidden, chosen.put_layers)
    put = [statistics.median(puts(count, *sizes)) for count in (FEW, chosen.resident)]
    where = harness.title_of(harness.machine(device))
    tokens = chosen.rows * chosen.length
    print(f"\nhidden {chosen.hidden}, {chosen.layers} layers, {chosen.rows} rows, {tokens} tokens, {times}; {where}\n")
    rows = [
        [name, *(str(times.ratio(name, to)) for to in ("base", "mixed")), str(times.ratio(PEFT, name))] for name in runs
    ]
    print(harness.table(["forward", "time / base (quartiles)", "/ mixed", "PEFT's time / this"], rows))
    print(f"\nput: {put[0] * 1e3:.3f} ms with {FEW} resident, {put[1] * 1e3:.3f} ms with {chosen.resident}")
    body, stem = {"times": times, "put_seconds": put}, f"routing-{chosen.hidden}-r{chosen.rank}-cpu-float32"
    written = [harness.write_results(chosen.out, stem, chosen, device, body), draw(times, where, chosen, stem)]
    print("written: " + ", ".join(path.name for path in written))
    return harness.judge(bars_of(times, chosen.rank, put)) if chosen.bars else 0


if __name__ == "__main__":
    sys.exit(main())
