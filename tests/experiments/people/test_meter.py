"""Parts joined to one bar."""

from __future__ import annotations

from kilotune.experiments.people.meter import Meter


def test_the_bar_goes_forward_to_its_end() -> None:
    told: list[tuple[str, int, int]] = []
    meter = Meter(lambda *words: told.append(words), {"one": 1.0, "two": 3.0})
    with meter.part("one") as tick:
        tick(0.5)
    with meter.part("two") as tick:
        tick(7.0)  # of a guess that was too low
    assert told == [
        ("one", 0, 1000),
        ("one", 125, 1000),
        ("one", 250, 1000),
        ("two", 250, 1000),
        ("two", 1000, 1000),
        ("two", 1000, 1000),
    ]
    with Meter(None, {"one": 1.0}).part("one") as tick:
        tick(0.5)  # nobody looks
