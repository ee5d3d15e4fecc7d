"""A language model's adapter for each user, against one for all, where a user is the source text of one package.

python examples/fleet/packages.py [--base data/compare/base] [--users 12] [--out examples/fleet/results]

The base is the small Llama of ``examples/compare/pretrain.py``, which read sympy, networkx, scikit-learn and scipy; it
is made anew (in half an hour) where it is not there. The users are other packages of ``constraints.txt``, cut into
pieces of whole lines of some 300 characters; train, validation and test are of different files.

**personal**: an adapter for each user, all trained together by ``kilotune.fleet.fit``. **shared**: one adapter for the
rows of all users. Both are VeRA r 64 with as many epochs. The rate of each way is the one that is best on validation,
among powers of 4 around it, and each adapter is that of its best epoch. What is told is the mean loss over a user's
test tokens, in nats; and what slots in bfloat16 change of it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kilotune import VeraConfig
from kilotune.fleet import AdapterBank, Finished, FleetSettings, User, fit, wrap
from kilotune.fleet.stepper.losses import causal_lm

PERSONAL = "personal"
READ_BY_BASE = ("sympy", "networkx", "scikit-learn", "scipy", "kilotune")
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
PIECE, TOKENS = 300, 128
SIZES = {"train": 48, "validation": 16, "test": 32}
RATES = (8e-3, 3.2e-2)  # to begin with; then on, by factors of 4, to the side of the better one
TRIED = 5  # at most
CONFIG = VeraConfig(r=64, target_modules="all-linear")
EPOCHS = 3


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--base", type=Path, default=Path("data/compare/base"))
    options.add_argument("--users", type=int, default=12)
    options.add_argument("--out", type=Path, default=Path("examples/fleet/results"))
    chosen = options.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (chosen.base / "config.json").exists():
        make_base(chosen.base)
    processor = AutoTokenizer.from_pretrained(chosen.base)
    model = AutoModelForCausalLM.from_pretrained(chosen.base).eval()
    people = users(chosen.users, processor)
    print(f"users: {', '.join(people)}", flush=True)
    facts: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in people}}
    adapters: dict[str, dict[str, Any]] = {}
    for way in (PERSONAL, "shared"):
        adapters[way], facts[way] = best(way, model, people)
    found, facts["bfloat16_slots"] = scores(model, adapters, people)
    write(chosen.out, found, facts)


def make_base(out: Path) -> None:
    """By the scripts of the comparison."""
    scripts = Path(__file__).resolve().parent.parent / "compare"
    source = out.parent / "source"
    subprocess.run([sys.executable, str(scripts / "collect_source.py"), "--out", str(source)], check=True)
    subprocess.run([sys.executable, str(scripts / "pretrain.py"), "--data", str(source), "--out", str(out)], check=True)


# -- data ------------------------------------------------------------------------------------------------


def users(count: int, processor: Any) -> dict[str, dict[str, list[list[int]]]]:
    """Package -> split -> rows of tokens: the packages with enough text, in the order of their names' hashes."""
    pinned = {line.partition("==")[0].strip().lower() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()}
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    names = (pinned & installed) - set(READ_BY_BASE)
    found: dict[str, dict[str, list[list[int]]]] = {}
    for name in sorted(names, key=digest):
        pieces = splits(name)
        if all(len(pieces[split]) >= size for split, size in SIZES.items()):
            found[name] = {
                split: [processor.encode(text)[:TOKENS] for text in pieces[split][:size]]
                for split, size in SIZES.items()
            }
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} installed packages have enough source text")


def splits(name: str) -> dict[str, list[str]]:
    """Pieces of a package's files: every third file is for validation and test, by halves."""
    files = [f for f in importlib.metadata.files(name) or [] if f.suffix == ".py" and "test" not in str(f)]
    pieces: dict[str, list[str]] = {split: [] for split in SIZES}
    for number, file in enumerate(sorted(files, key=lambda f: digest(str(f)))[:300]):
        path = Path(str(file.locate()))
        if path.is_file() and path.stat().st_size < 100_000:
            split = ("train", "train", "validation", "train", "train", "test")[number % 6]
            pieces[split] += cut(path.read_text(encoding="utf-8", errors="ignore"))
    return {split: sorted(set(own), key=digest) for split, own in pieces.items()}


def cut(text: str) -> list[str]:
    """Whole lines, some 300 characters together."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            pieces.append(piece[: 2 * PIECE])
            piece = ""
    return pieces


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def collate(rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """Padded on the right."""
    size = max(map(len, rows))
    ids = torch.tensor([row + [0] * (size - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# -- training --------------------------------------------------------------------------------------------


def best(way: str, model: Any, people: dict[str, dict[str, list[list[int]]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(name -> the adapter's file contents, facts) of the rate that is best on validation."""
    tried = {rate: trained(way, model, people, rate) for rate in RATES}
    for _ in range(TRIED - len(RATES)):
        rate = min(tried, key=lambda rate: tried[rate][0])
        if min(tried) < rate < max(tried):
            break
        following = rate / 4 if rate == min(tried) else rate * 4
        tried[following] = trained(way, model, people, following)
    rate = min(tried, key=lambda rate: tried[rate][0])
    facts = {"rate": rate, "seconds": tried[rate][2], "validation": {f"{r:g}": tried[r][0] for r in sorted(tried)}}
    return {name: one.contents for name, one in tried[rate][1].items()}, facts


def trained(way: str, model: Any, people: dict[str, dict[str, list[list[int]]]], rate: float) -> Any:
    """(mean validation loss, name -> what was trained, seconds)."""
    kept: dict[str, Finished] = {}
    start = time.monotonic()
    report = fit(model, CONFIG, of_way(way, people), settings(way, rate), collate=collate, sink=keep(kept))
    if report.failed:
        raise SystemExit(f"{report.failed[0].name}: {report.failed[0].error}")
    loss = statistics.mean(min(loss for _, loss in user.validation) for user in report.users)
    seconds = time.monotonic() - start
    print(f"{way}, rate {rate:g}: validation {loss:.4f}, {seconds:.0f} s", flush=True)
    return loss, kept, seconds


def of_way(way: str, people: dict[str, dict[str, list[list[int]]]]) -> list[User]:
    if way == PERSONAL:
        return [User(name, own["train"], own["validation"]) for name, own in people.items()]
    every = {split: [row for own in people.values() for row in own[split]] for split in SIZES}
    return [User("shared", every["train"], every["validation"])]


def settings(way: str, rate: float) -> FleetSettings:
    size = 4 if way == PERSONAL else 16
    # Rates are compared on all users, so none may be left out.
    return FleetSettings(
        batch_size=size, users_per_step=32, epochs=EPOCHS, learning_rate=rate, seed=0, only_gains=False
    )


def keep(kept: dict[str, Finished]) -> Callable[[Finished], None]:
    def into(one: Finished) -> None:
        kept[one.name] = one

    return into


# -- scores ----------------------------------------------------------------------------------------------


def scores(
    model: Any, adapters: dict[str, dict[str, Any]], people: dict[str, Any]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """(package -> way -> the mean loss over its test tokens, what bfloat16 slots change); all adapters in one bank."""
    narrow = bank_of(model, adapters, torch.bfloat16)
    rounded = {name: run(narrow, own["test"], name) for name, own in people.items()}
    narrow.close()
    bank = bank_of(model, adapters, torch.float32)
    found: dict[str, dict[str, float]] = {}
    errors, losses = [], []
    for name, own in people.items():
        logits = {
            way: run(bank, own["test"], one) for way, one in (("base", None), ("shared", "shared"), (PERSONAL, name))
        }
        found[name] = {way: loss_of(given, own["test"]) for way, given in logits.items()}
        change = logits[PERSONAL] - logits["base"]
        errors.append(float((rounded[name] - logits[PERSONAL]).norm() / change.norm()))
        losses.append(abs(loss_of(rounded[name], own["test"]) - found[name][PERSONAL]))
    bank.close()
    return found, {"error_of_change": statistics.mean(errors), "largest_change_of_a_loss": max(losses)}


def bank_of(model: Any, adapters: dict[str, dict[str, Any]], dtype: torch.dtype) -> AdapterBank:
    """All adapters, in slots of ``dtype``."""
    from kilotune.adapter_files.files import TwoFiles
    from kilotune.adapter_files.reading import parse

    bank = AdapterBank(wrap(model), CONFIG, slots=sum(map(len, adapters.values())), dtype=dtype)
    for held in adapters.values():
        for name, one in held.items():
            bank.put(name, parse(TwoFiles(Path(name), one.config, one.tensors, one.header)))
    return bank


@torch.no_grad()
def run(bank: AdapterBank, rows: list[list[int]], adapter: str | None) -> Tensor:
    """Logits (rows, tokens, vocabulary), 0 where a token is padding."""
    batch = collate(rows)
    mask = batch["attention_mask"]
    names = [adapter] * len(rows)
    logits: Tensor = bank.model(input_ids=batch["input_ids"], attention_mask=mask, adapter_names=names).logits
    return logits * mask.unsqueeze(-1)


def loss_of(logits: Tensor, rows: list[list[int]]) -> float:
    """The mean over the tokens."""
    row = causal_lm(logits, collate(rows))
    return float(row.totals.sum() / row.counts.sum())


def write(out: Path, found: dict[str, dict[str, float]], facts: dict[str, Any]) -> None:
    """``packages.json`` and ``packages.md``."""
    out.mkdir(parents=True, exist_ok=True)
    means = {way: statistics.mean(own[way] for own in found.values()) for way in ("base", "shared", PERSONAL)}
    wins = sum(own[PERSONAL] < own["shared"] for own in found.values())
    body = {
        "test_loss": found,
        "mean": means,
        "personal_better_than_shared": wins,
        **facts,
    }
    (out / "packages.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    lines = ["| package | base | shared | personal |", "|---|--:|--:|--:|"]
    lines += [
        f"| {name} | {own['base']:.3f} | {own['shared']:.3f} | {own['personal']:.3f} |" for name, own in found.items()
    ]
    lines.append(f"| **mean** | {means['base']:.3f} | {means['shared']:.3f} | {means['personal']:.3f} |")
    text = "\n".join(lines)
    (out / "packages.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\npersonal is better than shared for {wins} of {len(found)}")


if __name__ == "__main__":
    main()
