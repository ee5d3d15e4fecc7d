"""The demo: a model for each of several people over one frozen base.

::

    text ──► a shared adapter on everybody's rows ──► each one's own on top of it ──► a store
    store ──► everybody's held-out rows under everybody's adapter, in mixed batches ──► checks, a report

What was trained is kept in the folder: a second run takes it, an interrupted one goes on.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import final

import torch

from ...errors import CheckpointError, ConfigError
from ...fleet import AdapterStore, open_store
from ...model.frozen_inputs import FrozenInputs
from ...whole_file import hold, holder, let_go, replacing
from ..images.training import one_thread
from . import entering
from .answers_only import AnswersOnly
from .bases import Base, packaged
from .django_teams import teams
from .library_authors import authors
from .measuring import answered, chains_of, differing, loaded, measured
from .meter import Meter, Tick
from .results import PeopleResult, Person, Question
from .settings import TOY, PeopleSettings
from .toy import toy
from .training import PERSONAL, SHARED, Encoded, Trained, is_trained, trained
from .voices import Pair, Rows, Voices, split

__all__ = ["forget", "run"]

RUN, STORE, INPUTS, LOCK = "run.json", "adapters.db", "inputs.safetensors", ".demo.lock"
Report = Callable[[str, int, int], None]
READING, FILLING, MEASURING = "reading the model", "running the frozen blocks", "all texts under all adapters"
TRAINING, TUNING, ANSWERING = "training the shared one", "training the personal ones", "answering as everybody"


def run(settings: PeopleSettings, folder: Path, report: Report | None = None) -> PeopleResult:
    """Run the demo in ``folder``; whether it succeeded is in the result's ``checks``.

    Args:
        settings: what to run.
        folder: for the adapters, and what an interrupted run needs to go on.
        report: hears how far it is: (what is done now, units done, units in all).

    Raises:
        ConfigError: another run's folder, or one that another process is at; the model or the text cannot be had.
        KilotuneError: what the training or the store say.

    """
    with _held(folder), torch.random.fork_rng(devices=[]), ExitStack() as open_:
        _claim(folder, settings)
        if settings.model == TOY:
            open_.enter_context(one_thread())  # so small a model's threads would only wait for one another
        stage = _Stage(settings, folder, report)
        store = open_.enter_context(open_store(f"sqlite:///{folder.absolute() / STORE}"))
        return stage.result(store)


def forget(folder: Path) -> None:
    """Remove what an earlier run has left in ``folder`` to go on with; its report stays until the next one."""
    import shutil

    with _held(folder):
        for name in (RUN, INPUTS, f"{SHARED}.json", f"{PERSONAL}.json", STORE, f"{STORE}-wal", f"{STORE}-shm"):
            (folder / name).unlink(missing_ok=True)
        for part in (SHARED, PERSONAL):
            shutil.rmtree(folder / f"{part}-state", ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    held = hold(folder / LOCK)
    if held is None:
        raise ConfigError(
            f"{holder(folder / LOCK)} is running the demo in {folder}; wait for it, or give another --out"
        )
    try:
        yield
    finally:
        let_go(held, folder / LOCK)


def _claim(folder: Path, settings: PeopleSettings) -> None:
    """Refuse to mix two runs."""
    file = folder / RUN
    if file.exists():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            there, told = known["mark"], known["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); give --restart to begin anew") from error
        if there != settings.mark:
            mine = settings.to_dict()
            differ = [f"{key} {told.get(key)!r} there, {mine[key]!r} now" for key in mine if told.get(key) != mine[key]]
            raise ConfigError(
                f"{folder} holds another run of the demo ({'; '.join(differ)}); give --restart to begin anew, or "
                "another --out"
            )
        return
    with replacing(file, flushed=True) as fresh:
        fresh.write_text(
            json.dumps({"mark": settings.mark, "settings": settings.to_dict()}, indent=1), encoding="utf-8"
        )


@final
class _Stage:
    """One run, part by part."""

    def __init__(self, settings: PeopleSettings, folder: Path, report: Report | None) -> None:
        self.settings, self.folder = settings, folder
        self.seconds: dict[str, float] = {}
        self.meter = Meter(report, _weights(settings))

    @contextmanager
    def part(self, name: str) -> Iterator[Tick]:
        """A part, with its seconds."""
        begun = time.perf_counter()
        with self.meter.part(name) as tick:
            yield tick
        self.seconds[name] = time.perf_counter() - begun

    def result(self, store: AdapterStore) -> PeopleResult:
        """All parts."""
        begun = time.perf_counter()
        with self.part(READING) as tick:
            base, voices = _had(self.settings, self.folder, tick)
            rows = split(voices, self.settings.sizes, self.settings.seed)
            encoded = {name: _encoded(base, voices, own) for name, own in rows.items()}
        kept = entering.recalled(self.folder / INPUTS, base)
        there = is_trained(self.folder, store)
        with AnswersOnly(base) as answers, FrozenInputs(base.model, self.settings.last_blocks, kept) as frozen:
            with self.part(FILLING) as tick:
                if entering.fill(base, encoded, frozen, answers, tick):
                    entering.remember(self.folder / INPUTS, base, kept)
            shared, personal = self._trained(base, encoded, store, answers)
            stored = [name for name in rows if store.versions(name)]
            model = loaded(base, store, [SHARED, *stored])
            chains = chains_of(list(rows), stored)
            with self.part(MEASURING) as tick:
                losses = measured(model, encoded, chains, answers, tick)
                alone = differing(model, encoded, chains, answers, losses)
        questions = _questions(voices, rows, self.settings.questions)
        with self.part(ANSWERING):
            prompts = [base.speech.prompt(question.asked, voices.after) for question in questions]
            said = answered(model, base.speech, prompts, chains, self.settings.longest)
        self.seconds["in all"] = time.perf_counter() - begun
        return PeopleResult(
            settings=self.settings,
            text=_of_text(voices),
            base={"title": base.title, "licence": base.licence, "numbers": base.numbers, "bytes": base.bytes},
            numbers={name: _trained_numbers(store, name) for name in (SHARED, *stored[:1])},
            shared_bytes=store.info(SHARED).size,
            people=_people(voices, store, stored),
            shared=shared,
            personal=personal,
            losses=losses,
            alone=alone,
            questions=questions,
            answers=said,
            seconds=self.seconds,
            faults=tuple(str(fault) for fault in store.verify()),
            trained_now=not there,
            versions=_versions(),
        )

    def _trained(
        self, base: Base, rows: Mapping[str, Encoded], store: AdapterStore, answers: AnswersOnly
    ) -> tuple[Trained, Trained]:
        found = []
        for part, what in ((SHARED, TRAINING), (PERSONAL, TUNING)):
            with self.part(what) as tick:
                found.append(trained(part, base.model, rows, self.settings, store, self.folder, answers, tick))
            if part == SHARED and not store.versions(SHARED):
                raise CheckpointError("the shared adapter is no better than the base on the validation rows")
        return found[0], found[1]


def _weights(settings: PeopleSettings) -> dict[str, float]:
    """How long the parts take, in rows of one pass of the last blocks."""
    sizes, people = settings.sizes, 8
    rows = people * (sizes.train + sizes.validation + sizes.test)
    return {
        READING: 0.1 * rows if settings.model != TOY else 4.0 * rows,
        FILLING: 4.0 * rows,
        TRAINING: 3.0 * people * sizes.train * settings.shared.epochs,
        TUNING: 3.5 * people * sizes.train * settings.personal.epochs,
        MEASURING: people * sizes.test * (people + 2),
        ANSWERING: 0.5 * rows,
    }


def _had(settings: PeopleSettings, folder: Path, tick: Tick) -> tuple[Base, Voices]:
    if settings.model == TOY:
        return toy(folder / TOY, lambda done, steps: tick(done / steps)), authors()
    return packaged(settings.model), teams()


def _encoded(base: Base, voices: Voices, rows: Rows) -> Encoded:
    def of(pairs: tuple[Pair, ...]) -> list[dict[str, list[int]]]:
        return [base.speech.row(pair, voices.after, voices.lead) for pair in pairs]

    return Encoded(of(rows.train), of(rows.validation), of(rows.test))


def _questions(voices: Voices, rows: Mapping[str, Rows], count: int) -> tuple[Question, ...]:
    """The first held-out prompts: of all, where all have answered the same, else of one person each."""
    found = []
    for i, (name, own) in zip(range(count), rows.items()):
        pair = own.test[i]
        said = {other: rows[other].test[i].said for other in rows} if voices.common else {name: pair.said}
        found.append(Question(pair.asked, said))
    return tuple(found)


def _people(voices: Voices, store: AdapterStore, stored: Sequence[str]) -> tuple[Person, ...]:
    return tuple(
        Person(voice.name, voice.title, voice.people, store.info(voice.name).size if voice.name in stored else 0)
        for voice in voices.people
    )


def _of_text(voices: Voices) -> dict[str, str]:
    return {
        "source": voices.source,
        "licence": voices.licence,
        "kind": voices.kind,
        "rule": voices.rule,
        "task": voices.task,
    }


def _trained_numbers(store: AdapterStore, name: str) -> int:
    return sum(tensor.numel() for tensor in store.get(name).file().tensors.values())


def _versions() -> dict[str, str]:
    packages = ("kilotune", "torch", "transformers", "safetensors", "numpy")
    return {"Python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
