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
    assert [name for name, _, _ in told] == ["one"] * 3 + ["two"] * 3
    assert [done for _, done, _ in told] == [0, 125, 250, 250, 1000, 1000]
    assert {total for _, _, total in told} == {1000}
    with Meter(None, {"one": 1.0}).part("one") as tick:
        tick(0.5)  # nobody looks
