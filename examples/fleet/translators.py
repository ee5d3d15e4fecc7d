"""What a model of one's own is worth, alone and on top of a shared one: ten people, three seeds, SmolLM2.

python examples/fleet/translators.py [--people 10] [--seeds 3] [--rows 40] [--out examples/fleet/results/translators]

The people are teams of Django's translators, as in the demo: who is in it, and which of their messages, is decided by
rules that look at no text. Every way below is trained by ``kilotune.fleet.fit`` on the same rows at the learning rate
that kilotune's rule gives (nothing is tuned here), for as many epochs; of each adapter the best epoch on the user's 16
validation rows is taken, even where it is worse than without. What is told is the mean loss over the tokens of a user's
24 test answers, in nats.

The last four of 30 blocks are adapted, and what enters them is kept. Finished parts are kept in ``runs.jsonl``: the
same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kilotune import AdapterConfig, get_config
from kilotune.experiments.people.answers_only import AnswersOnly
from kilotune.experiments.people.bases import Base, packaged
from kilotune.experiments.people.django_teams import teams
from kilotune.experiments.people.entering import fill
from kilotune.experiments.people.settings import Sizes
from kilotune.experiments.people.training import Encoded
from kilotune.experiments.people.voices import split
from kilotune.experiments.run_store import Journal
from kilotune.fleet import FleetSettings, User, fit, open_store
from kilotune.fleet.store import AdapterStore
from kilotune.model.frozen_inputs import FrozenInputs
from kilotune.model.kept_rows import KeptRows
from kilotune.model.last_blocks import in_last_blocks
from kilotune.model.peft_model import PeftModel

MODEL, LAST_BLOCKS, EPOCHS = "smollm2", 4, 3.0
VALIDATION, TEST = 16, 24
FEW = 7  # rows of each user, where a user has next to none
VERA: dict[str, Any] = {"method": "vera", "r": 256}


def lora(rank: int) -> dict[str, Any]:
    return {"method": "lora", "r": rank, "lora_alpha": rank}


@dataclass(frozen=True)
class Way:
    """How the adapters of all people are made.

    common: one adapter from everybody's rows, else one for each from their own. on, start: the common way beneath it,
    or that it starts from. few: of so few rows. neighbour: each text is also read under the next one's adapter.
    """

    title: str
    options: Mapping[str, Any]
    common: bool = False
    on: str | None = None
    start: str | None = None
    few: bool = False
    neighbour: bool = False


WAYS = {
    "shared": Way("one LoRA 8 for all", lora(8), common=True),
    "shared-vera": Way("one VeRA 256 for all", VERA, common=True),
    "own-vera": Way("VeRA 256 of one's own, alone", VERA),
    "own-lora": Way("LoRA 4 of one's own, alone", lora(4)),
    "on-vera": Way("VeRA 256 of one's own on the LoRA 8", VERA, on="shared", neighbour=True),
    "on-ia3": Way("IA3 of one's own on the LoRA 8", {"method": "ia3"}, on="shared"),
    "on-lora": Way("LoRA 1 of one's own on the LoRA 8", lora(1), on="shared"),
    "on-common": Way("one VeRA 256 for all on the LoRA 8", VERA, common=True, on="shared"),
    "started": Way("VeRA 256 of one's own, started from that for all", VERA, start="shared-vera"),
    "few-own": Way(f"{FEW} rows: VeRA 256 of one's own, alone", VERA, few=True),
    "few-on": Way(f"{FEW} rows: VeRA 256 of one's own on the LoRA 8", VERA, on="shared", few=True),
}


@dataclass(frozen=True)
class Part:
    """One way with one seed, finished. losses: by person; of the next one's adapter in ``neighbours``."""

    seed: int
    way: str
    losses: dict[str, float]
    neighbours: dict[str, float]
    gains: int
    numbers: int
    bytes: int
    seconds: float

    @property
    def key(self) -> tuple[int, str]:
        return self.seed, self.way

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(told: Mapping[str, Any]) -> Part:
        return Part(**told)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--people", type=int, default=10)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rows", type=int, default=40)
    options.add_argument("--out", type=Path, default=Path("examples/fleet/results/translators"))
    chosen = options.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": MODEL, "last_blocks": LAST_BLOCKS, "epochs": EPOCHS, "people": chosen.people, "rows": chosen.rows
    }  # fmt: skip
    journal = Journal(chosen.out / "runs.jsonl", settings, Part.from_dict)
    base, kept = packaged(MODEL), KeptRows(4000.0)
    for seed in range(chosen.seeds):
        missing = [way for way in ("base", *WAYS) if journal.get((seed, way)) is None]
        if missing:
            one_seed(base, kept, seed, chosen, journal)
    write(chosen.out, chosen.seeds, journal)


def one_seed(base: Base, kept: KeptRows, seed: int, chosen: argparse.Namespace, journal: Journal[Part]) -> None:
    """All ways with one seed. The shared adapters are kept in a store, so that a later way finds them."""
    voices = teams(chosen.people)
    rows = split(voices, Sizes(chosen.rows, VALIDATION, TEST), seed)
    people = {
        name: Encoded(
            *([base.speech.row(pair, voices.after, voices.lead) for pair in part]
              for part in (own.train, own.validation, own.test))
        )
        for name, own in rows.items()
    }  # fmt: skip
    with (
        AnswersOnly(base) as answers,
        FrozenInputs(base.model, LAST_BLOCKS, kept) as frozen,
        open_store(f"sqlite:///{(chosen.out / f'seed-{seed}.db').absolute()}") as store,
    ):
        fill(base, people, frozen, answers, lambda part: None)
        run = Run(base, people, answers, store, seed)
        for way in ("base", *WAYS):
            if journal.get((seed, way)) is None:
                part = run.part(way)
                journal.add(part)
                mean = statistics.mean(part.losses.values())
                print(f"seed {seed}, {way}: {mean:.3f} nats, {part.seconds:.0f} s", flush=True)


@dataclass(frozen=True)
class Run:
    """One seed: the model, everybody's rows, and the store of what is trained."""

    base: Base
    people: Mapping[str, Encoded]
    answers: AnswersOnly
    store: AdapterStore
    seed: int

    def part(self, name: str) -> Part:
        """One way, trained and measured."""
        begun = time.perf_counter()
        if name == "base":
            return self._measured(name, {}, {}, 0, begun)
        way = WAYS[name]
        report = fit(
            self.base.model,
            config(self.base, way),
            self._users(name, way),
            FleetSettings(
                batch_size=16 if way.common else 4,
                users_per_step=32,
                epochs=EPOCHS,
                seed=self.seed,
                only_gains=False,
            ),
            collate=self.answers.collate,
            loss=self.answers.loss,
            sink=self.store,
            on=None if way.on is None else self.store.get(way.on),
            start=None if way.start is None else self.store.get(way.start),
        )
        if report.failed:
            raise SystemExit(f"{name}: {report.failed[0].name}: {report.failed[0].error}")
        gains = sum(own.with_own is not None and own.with_own < (own.without or math.inf) for own in report.users)
        chains = {person: self._chain(name, way, person) for person in self.people}
        return self._measured(name, chains, self._neighbours(name, way), gains, begun)

    def _users(self, name: str, way: Way) -> list[User]:
        if not way.common:
            count = FEW if way.few else None
            return [
                User(f"{name}-{person}", own.train[:count], own.validation, self.seed)
                for person, own in self.people.items()
            ]
        train = [row for own in self.people.values() for row in own.train]
        return [User(name, train, [row for own in self.people.values() for row in own.validation], self.seed)]

    def _chain(self, name: str, way: Way, person: str) -> list[str]:
        own = name if way.common else f"{name}-{person}"
        return [own] if way.on is None else [way.on, own]

    def _neighbours(self, name: str, way: Way) -> dict[str, list[str]]:
        if not way.neighbour:
            return {}
        following = [*list(self.people)[1:], next(iter(self.people))]
        return {person: self._chain(name, way, other) for person, other in zip(self.people, following, strict=True)}

    def _measured(
        self, name: str, chains: Mapping[str, list[str]], others: Mapping[str, list[str]], gains: int, begun: float
    ) -> Part:
        names = list(dict.fromkeys(one for chain in (*chains.values(), *others.values()) for one in chain))
        numbers = size = 0
        if names:
            own = next(iter(chains.values()))[-1]
            numbers = sum(tensor.numel() for tensor in self.store.get(own).file().tensors.values())
            size = self.store.info(own).size
        return Part(
            self.seed, name, self._losses(names, chains), self._losses(names, others) if others else {}, gains, numbers,
            size, time.perf_counter() - begun,
        )  # fmt: skip

    @torch.no_grad()
    def _losses(self, names: Sequence[str], chains: Mapping[str, list[str]]) -> dict[str, float]:
        """Everybody's test loss under a chain of their own; the base where there is none."""
        model: Any = self.base.model
        if names:
            wrapped = PeftModel.from_pretrained(model, self.store.get(names[0]).file(), names[0])
            for name in names[1:]:
                wrapped.load_adapter(self.store.get(name).file(), name)
            model = wrapped.eval()
        found = {}
        for person, own in self.people.items():
            given = self.answers.collate(own.test)
            if names:
                model.set_adapter(chains[person], inference_mode=True)
            output = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False)
            loss = self.answers.loss(output, given)
            found[person] = float(loss.totals.sum() / loss.counts.sum())
        if names:
            model.unload()
        return found


def config(base: Base, way: Way) -> AdapterConfig:
    values = {key: value for key, value in way.options.items() if key != "method"}
    made = get_config(way.options["method"], **values, target_modules="all-linear", task_type="CAUSAL_LM")
    return in_last_blocks(base.model, made.replace(base_model_name_or_path=MODEL), LAST_BLOCKS)


COLUMNS = (("mean", "", "deviation"), ("gain", "+", "error"))

# -- the tables ------------------------------------------------------------------------------------------


def write(out: Path, seeds: int, journal: Journal[Part]) -> None:
    """``translators.md`` and ``translators.json``."""
    parts = {
        way: [part for seed in range(seeds) if (part := journal.get((seed, way))) is not None]
        for way in ("base", *WAYS)
    }
    rows = [line(way, own, parts["shared"]) for way, own in parts.items()]
    lines = [
        "| way | test loss | against the LoRA 8 for all | better for | numbers | bytes |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        loss, gain = (f"{row[what]:{sign}.3f} ± {row[error]:.3f}" for what, sign, error in COLUMNS)
        lines.append(
            f"| {row['title']} | {loss} | {gain} | {row['better']} of {row['cases']} | {row['numbers']:,} | "
            f"{row['bytes']:,} |"
        )
    text = "\n".join(lines)
    (out / "translators.md").write_text(text + "\n", encoding="utf-8")
    body = {"rows": rows, "of_each": each(parts)}
    (out / "translators.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(text)


def line(way: str, own: Sequence[Part], shared: Sequence[Part]) -> dict[str, Any]:
    """One way: the mean of people and its deviation between seeds; the paired difference and its standard error."""
    means = [statistics.mean(part.losses.values()) for part in own]
    pairs = [
        one.losses[person] - other.losses[person]
        for one, other in zip(own, shared, strict=True)
        for person in one.losses
    ]
    by_person = [
        statistics.mean(one.losses[person] - other.losses[person] for one, other in zip(own, shared, strict=True))
        for person in own[0].losses
    ]
    others = [value for part in own for value in part.neighbours.values()]
    return {
        "way": way,
        "title": "the base" if way == "base" else WAYS[way].title,
        "mean": statistics.mean(means),
        "deviation": statistics.stdev(means) if len(means) > 1 else 0.0,
        "gain": statistics.mean(pairs),
        "error": statistics.stdev(by_person) / math.sqrt(len(by_person)),
        "better": sum(pair < 0 for pair in pairs),
        "cases": len(pairs),
        "would_be_stored": sum(part.gains for part in own),
        "neighbours": statistics.mean(others) if others else None,
        "numbers": own[0].numbers,
        "bytes": own[0].bytes,
        "seconds": [round(part.seconds) for part in own],
    }


def each(parts: Mapping[str, Sequence[Part]]) -> dict[str, dict[str, list[float]]]:
    """Person -> way -> the loss of each seed."""
    people = list(parts["base"][0].losses)
    return {person: {way: [part.losses[person] for part in own] for way, own in parts.items()} for person in people}


if __name__ == "__main__":
    main()
