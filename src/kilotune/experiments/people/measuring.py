"""Everybody's held-out text under everybody's adapter, in batches that mix them; and prompts answered as each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, final

import torch

from ...fleet import AdapterStore
from ...model.peft_model import PeftModel
from .answers_only import AnswersOnly
from .bases import Base, Speech
from .meter import Tick
from .training import SHARED, Encoded

__all__ = ["BASE", "Answers", "Chain", "Losses", "answered", "chains_of", "differing", "loaded", "measured"]

Chain = tuple[str, ...]
"""The adapters that a row runs with, the lowest first; none: the base alone."""
ROWS = 48  # in one batch, each row as often as there are adapters
BASE = "base"
Losses = dict[str, dict[str, float]]
"""By adapter ("base", "shared", a name), then by whose text it is: nats a token."""


def chains_of(people: Sequence[str], stored: Sequence[str]) -> dict[str, Chain]:
    """What is compared: the base, the shared adapter, and each one's own on top of it, or nothing on top."""
    own = {name: (SHARED, name) if name in stored else (SHARED,) for name in people}
    return {BASE: (), SHARED: (SHARED,), **own}


def loaded(base: Base, store: AdapterStore, names: Sequence[str]) -> PeftModel:
    """``base`` with the store's adapters in it."""
    first, *others = names
    model = PeftModel.from_pretrained(base.model, store.get(first).file(), first)
    for name in others:
        model.load_adapter(store.get(name).file(), name)
    return model.eval()


@torch.no_grad()
def measured(
    model: PeftModel, rows: Mapping[str, Encoded], chains: Mapping[str, Chain], answers: AnswersOnly, tick: Tick
) -> Losses:
    """The mean over the tokens of each one's test rows, under each chain; all of them in the same batches."""
    totals = {name: dict.fromkeys(rows, 0.0) for name in chains}
    counts = dict.fromkeys(rows, 0)
    each = [(owner, row) for owner, own in rows.items() for row in own.test]
    done = 0
    for batch in _batches(each, max(1, ROWS // len(chains))):
        together = [row for _, row in batch for _ in chains]
        given = answers.collate(together)
        with model.route([list(chain) for _ in batch for chain in chains.values()]):
            output = model.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False)
        found = answers.loss(output, given)
        for i, (owner, _) in enumerate(batch):
            for j, name in enumerate(chains):
                totals[name][owner] += float(found.totals[i * len(chains) + j])
            counts[owner] += int(found.counts[i * len(chains)])
        done += len(batch)
        tick(done / len(each))
    return {name: {owner: own[owner] / counts[owner] for owner in rows} for name, own in totals.items()}


def _batches(each: Sequence[tuple[str, dict[str, list[int]]]], size: int) -> Iterator[list[tuple[str, Any]]]:
    """Rows of about one length together: what fills them up is work for nothing."""
    ordered = sorted(each, key=lambda one: len(one[1]["input_ids"]))
    for _, batch in groupby(enumerate(ordered), key=lambda numbered: numbered[0] // size):
        yield [one for _, one in batch]


@torch.no_grad()
def differing(
    model: PeftModel, rows: Mapping[str, Encoded], chains: Mapping[str, Chain], answers: AnswersOnly, losses: Losses
) -> float:
    """How far the first and last one's own loss is from what it is without a mixed batch, in nats a token."""
    found = []
    for name in (next(iter(rows)), next(reversed(list(rows)))):
        model.set_adapter(list(chains[name]), inference_mode=True)
        total = count = 0.0
        for batch in _batches([(name, row) for row in rows[name].test], 8):
            given = answers.collate([row for _, row in batch])
            own = answers.loss(model(**{key: given[key] for key in ("input_ids", "attention_mask")}), given)
            total, count = total + float(own.totals.sum()), count + float(own.counts.sum())
        found.append(abs(total / count - losses[name][name]))
    return max(found)


# -- answers -------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Answers:
    """What each answered. texts: by adapter, an answer for each prompt. tokens, seconds: of all of them together."""

    texts: dict[str, list[str]]
    tokens: int
    seconds: float


@torch.no_grad()
def answered(
    model: PeftModel, speech: Speech, prompts: Sequence[list[int]], chains: Mapping[str, Chain], longest: int
) -> Answers:
    """Every prompt by every chain, greedily, in one batch."""
    width = max(map(len, prompts))
    rows = [prompt for _ in chains for prompt in prompts]
    ids = torch.tensor([[speech.end] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    begun = time.perf_counter()
    written: Any = model.generate(
        input_ids=ids,
        attention_mask=mask,
        adapter_names=[list(chain) for chain in chains.values() for _ in prompts],
        max_new_tokens=longest,
        do_sample=False,
        eos_token_id=speech.end,
        pad_token_id=speech.end,
    )
    seconds = time.perf_counter() - begun
    new = [_until(row, speech.end) for row in written[:, width:].tolist()]
    texts = {
        name: [speech.text(row).strip() for row in new[i * len(prompts) : (i + 1) * len(prompts)]]
        for i, name in enumerate(chains)
    }
    return Answers(texts, sum(map(len, new)), seconds)


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row
