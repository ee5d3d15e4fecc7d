"""The demo's report: one HTML page that needs nothing but itself, and the numbers beside it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from ..._ui.pages import publish, render
from ..._ui.sizes import readable_bytes
from .charts import draw
from .measuring import BASE
from .results import PeopleResult, Question, Row
from .settings import Training
from .training import SHARED

__all__ = ["page", "write_report"]

MILLION = 1_000_000
DEVICE = 24_000_000_000  # bytes of a common GPU


def write_report(result: PeopleResult, folder: Path) -> list[Path]:
    """Write results.json and report.html into ``folder``.

    Raises:
        KilotuneError: the folder cannot be written to.

    """
    numbers = json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    return publish(folder, {"results.json": (numbers + "\n").encode(), "report.html": page(result).encode()})


def page(result: PeopleResult) -> str:
    """The whole page, as HTML text."""
    settings, gains = result.settings, result.gains()
    return render(
        __package__,
        "page.html",
        people=[{"name": p.name, "title": p.title, "people": ", ".join(p.people)} for p in result.people],
        count=len(result.people),
        text=result.text,
        base=result.base,
        base_numbers=_count(result.base["numbers"]),
        base_bytes=readable_bytes(result.base["bytes"]),
        personal={"how": settings.personal.title, "bytes": readable_bytes(result.personal_bytes)},
        shared={"how": settings.shared.title, "bytes": readable_bytes(result.shared_bytes)},
        blocks=settings.last_blocks,
        sizes=settings.sizes,
        table_rows=[_cells(row) for row in result.rows],
        gain=f"{fmean(gains):.2f}",
        best=sum(map(result.best, result.names)),
        nothing_kept=[person.title for person in result.people if not person.bytes],
        pictures=draw(result),
        questions=[_question(result, i, question) for i, question in enumerate(result.questions)],
        answers={
            "rows": len(result.questions) * len(result.answers.texts),
            "tokens": result.answers.tokens,
            "seconds": f"{result.answers.seconds:.1f}",
            "speed": f"{result.answers.tokens / max(result.answers.seconds, 1e-9):.0f}",
        },
        million=_million(result),
        checks=result.checks,
        failed=len(result.failures),
        trained_now=result.trained_now,
        training_seconds=f"{result.shared.seconds + result.personal.seconds:.0f}",
        seconds=f"{result.seconds['in all']:.0f}",
        settings=_settings(result),
    )


def _count(numbers: int) -> str:
    return f"{numbers / 1e6:.0f} million numbers" if numbers >= MILLION else f"{numbers:,} numbers"


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        f"{row.loss:.3f}",
        f"{row.least:.2f} to {row.most:.2f}",
        readable_bytes(row.bytes) if row.bytes else "",
        f"{row.seconds:.1f}" if row.seconds else "",
    ]


def _question(result: PeopleResult, number: int, question: Question) -> dict[str, Any]:
    """A prompt, what was answered as each, and what each one wrote."""
    titles = {person.name: person.title for person in result.people}
    rows = [
        {
            "who": {BASE: "the base alone", SHARED: "the shared adapter"}.get(name) or titles[name],
            "answer": said[number],
            "wrote": question.said.get(name, ""),
        }
        for name, said in result.answers.texts.items()
    ]
    return {"asked": question.asked, "rows": rows, "all": len(question.said) > 1}


def _million(result: PeopleResult) -> list[list[str]]:
    """What a million people take, and how many fit beside the base."""
    base, free = int(result.base["bytes"]), DEVICE - int(result.base["bytes"]) - result.shared_bytes
    each = {
        f"a personal adapter each, {result.settings.personal.title}": result.personal_bytes,
        f"one each like the shared one, {result.settings.shared.title}": result.shared_bytes,
        "a copy of the model each": base,
    }
    return [
        [name, readable_bytes(size), readable_bytes(MILLION * size), f"{free // size:,}" if size else ""]
        for name, size in each.items()
    ]


def _settings(result: PeopleResult) -> dict[str, str]:
    settings = result.settings
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    return {
        "model": f"{result.base['title']}, {result.base['licence']}; float32, on the CPU",
        "text": f"{result.text['source']}; {result.text['licence']}",
        "rows of each": f"{settings.sizes.train} to train on, {settings.sizes.validation} to stop by, "
        f"{settings.sizes.test} held out for this page",
        "shared adapter": _trained_with(settings.shared, result.numbers[SHARED]),
        "personal adapters": _trained_with(settings.personal, min(result.numbers.values())),
        "adapted": f"all linear layers of the last {settings.last_blocks} blocks",
        "seed": str(settings.seed),
        "seconds of this run": parts,
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }


def _trained_with(how: Training, numbers: int) -> str:
    return (
        f"{how.title}, {numbers:,} numbers, rate {how.rate:g}, {how.batch} rows a step, at most {how.epochs} epochs, "
        "the best of them by the validation rows"
    )
