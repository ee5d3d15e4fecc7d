"""Each objective against a plain computation in float64, token by token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kilotune.fleet.stepper.losses import KeptLogits
from kilotune.fleet.stepper.objectives import (
    OBJECTIVES,
    Distribution,
    Divergence,
    Dpo,
    Grpo,
    ImportanceSampling,
    Kto,
    Likely,
    Objective,
    Ppo,
    Supervised,
)
from kilotune.fleet.stepper.token_rows import collate

VOCABULARY = 11
Row = dict[str, Any]


def rows_of(seed: int, count: int = 4) -> list[Row]:
    """Rows of several lengths, with everything that any objective asks for; a part of the labels is left out."""
    draws = np.random.default_rng(seed)
    found = []
    for number in range(count):
        length = int(draws.integers(3, 8))
        ids = draws.integers(0, VOCABULARY, length).tolist()
        labels = [token if draws.random() > 0.3 else -100 for token in ids]
        labels[-1] = ids[-1]
        found.append(
            {
                "input_ids": ids,
                "labels": labels,
                "weights": draws.choice([0.0, 0.5, 1.0], length).tolist(),
                "old_logprobs": (-3 * draws.random(length)).tolist(),
                "reference_logprobs": (-3 * draws.random(length)).tolist(),
                "advantages": draws.normal(size=length).tolist(),
                "reference": -5 * draws.random(),
                "good": number % 4 < 2,
            }
        )
    return [{**row, "good": float(row["good"])} for row in found]


def logits_for(rows: Sequence[Row], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    longest = max(len(row["input_ids"]) for row in rows)
    return torch.randn(len(rows), longest, VOCABULARY, generator=generator, dtype=torch.float64, requires_grad=True)


def plain_logprobs(logits: np.ndarray, row: Row) -> dict[int, float]:
    """Place -> the log-probability of its label given what stands before it."""
    found = {}
    for place, label in enumerate(row["labels"]):
        if place and label != -100:
            before = logits[place - 1]
            found[place] = float(before[label] - np.log(np.exp(before).sum()))
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def plain_supervised(rows: Sequence[Row], found: Sequence[dict[int, float]], _: Supervised) -> tuple[float, float]:
    total = -sum(row["weights"][t] * p for row, own in zip(rows, found) for t, p in own.items())
    return total, sum(row["weights"][t] for row, own in zip(rows, found) for t in own)


def plain_dpo(rows: Sequence[Row], found: Sequence[dict[int, float]], how: Dpo) -> tuple[float, float]:
    gains = [sum(own.values()) - row["reference"] for row, own in zip(rows, found)]
    margins = [how.beta * (gains[i] - gains[i + 1]) for i in range(0, len(rows), 2)]
    smooth = how.label_smoothing
    return sum(-(1 - smooth) * math.log(sigmoid(m)) - smooth * math.log(sigmoid(-m)) for m in margins), len(margins)


def plain_kto(rows: Sequence[Row], found: Sequence[dict[int, float]], how: Kto) -> tuple[float, float]:
    gains = [sum(own.values()) - row["reference"] for row, own in zip(rows, found)]
    moved = max(0.0, sum(gains[1::2]) / (len(rows) / 2))
    total = 0.0
    for row, gain in zip(rows[0::2], gains[0::2]):
        if row["good"]:
            total += how.desirable * (1 - sigmoid(how.beta * (gain - moved)))
        else:
            total += how.undesirable * (1 - sigmoid(how.beta * (moved - gain)))
    return total, len(rows) / 2


def plain_policy(
    rows: Sequence[Row], found: Sequence[dict[int, float]], how: ImportanceSampling | Ppo | Grpo
) -> tuple[float, float]:
    totals, tokens = [], 0
    for row, own in zip(rows, found):
        total = 0.0
        for t, p in own.items():
            ratio, advantage = math.exp(p - row["old_logprobs"][t]), row["advantages"][t]
            if isinstance(how, ImportanceSampling):
                total -= ratio * advantage
            else:
                clipped = min(max(ratio, 1 - how.low), 1 + how.high)
                total -= min(ratio * advantage, clipped * advantage)
            if isinstance(how, Grpo):
                apart = row["reference_logprobs"][t] - p
                total += how.beta * (math.exp(apart) - apart - 1)
        totals.append(total / len(own) if isinstance(how, Grpo) else total)
        tokens += len(own)
    return sum(totals), len(rows) if isinstance(how, Grpo) else tokens


CASES = [
    (Supervised(), plain_supervised),
    (Dpo(), plain_dpo),
    (Dpo(beta=0.7, label_smoothing=0.2), plain_dpo),
    (Kto(), plain_kto),
    (Kto(beta=0.5, desirable=1.5, undesirable=0.4), plain_kto),
    (ImportanceSampling(), plain_policy),
    (Ppo(), plain_policy),
    (Ppo(low=0.1, high=0.4), plain_policy),
    (Grpo(), plain_policy),
    (Grpo(beta=0.3, high=0.28), plain_policy),
]


@pytest.mark.parametrize(("objective", "plain"), CASES, ids=lambda one: repr(one) if isinstance(one, Objective) else "")
def test_against_a_plain_computation(objective: Objective, plain: Any) -> None:
    for seed in range(3):
        rows = rows_of(seed)
        logits = logits_for(rows, seed)
        output = type("Output", (), {"logits": logits})()
        given = objective(output, collate(rows))
        found = [plain_logprobs(one, row) for one, row in zip(logits.detach().numpy(), rows)]
        total, count = plain(rows, found, objective)
        assert float(given.totals.detach().sum()) == pytest.approx(total, abs=1e-12)
        assert float(given.counts.sum()) == pytest.approx(count)
        assert objective.count(rows) == pytest.approx(count)
        assert given.told is not None
        for i, own in enumerate(found):
            expected = torch.zeros(logits.shape[1], dtype=torch.float64)
            expected[list(own)] = torch.tensor(list(own.values()), dtype=torch.float64)
            torch.testing.assert_close(given.told[i], expected, rtol=0, atol=1e-12)


# In how far the model has moved, KTO learns nothing, so its gradient is not that of its value.
@pytest.mark.parametrize("objective", [one for one, _ in CASES if not isinstance(one, Kto)], ids=repr)
def test_gradients_against_finite_differences(objective: Objective) -> None:
    rows = rows_of(7, count=2)
    batch = collate(rows)
    logits = logits_for(rows, 7)

    def value(given: Tensor) -> Tensor:
        return objective(type("Output", (), {"logits": given})(), batch).totals.sum()

    assert torch.autograd.gradcheck(value, (logits,), eps=1e-6, atol=1e-6)


def test_kto_learns_nothing_in_how_far_the_model_has_moved() -> None:
    rows = rows_of(7)
    logits = logits_for(rows, 7)
    Kto(beta=0.5)(type("Output", (), {"logits": logits})(), collate(rows)).totals.sum().backward()
    assert logits.grad is not None
    assert float(logits.grad[1::2].abs().max()) == 0 < float(logits.grad[0::2].abs().max())


def plain_divergence(target: np.ndarray, logits: np.ndarray, row: Row, most: int) -> float:
    total = 0.0
    for place in [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]:
        p, q = (np.exp(one[place - 1]) / np.exp(one[place - 1]).sum() for one in (target, logits))
        order, most = np.argsort(-p), min(most, len(p) - 1)
        p, q = (np.append(one[order[:most]], one[order[most:]].sum()) for one in (p, q))
        total += float((p * np.log(p / q)).sum())
    return total


@pytest.mark.parametrize("most", [3, 1000])
@pytest.mark.parametrize("kept", [False, True])
def test_the_divergence_from_another_model(kept: bool, most: int) -> None:
    rows = rows_of(3)
    theirs, ours = logits_for(rows, 1), logits_for(rows, 2)

    def output(logits: Tensor, some: Sequence[Row]) -> Any:
        labels = collate(some)["labels"]
        places = (labels[:, 1:] != -100).any(0).nonzero().squeeze(1)
        return KeptLogits(logits[:, places], places) if kept else logits

    targets = []
    for i, row in enumerate(rows):
        batch = collate([row])
        told = Distribution()(output(theirs[i : i + 1, : len(row["input_ids"])], [row]), batch)
        assert told.told is not None
        assert told.totals.tolist() == [0.0]
        targets.append(Likely.of(told.told[0].detach(), most))
    objective = Divergence(tuple(targets))
    found = objective(output(ours, rows), collate(rows))
    expected = [
        plain_divergence(t.detach().numpy(), o.detach().numpy(), row, most) for t, o, row in zip(theirs, ours, rows)
    ]
    np.testing.assert_allclose(found.totals.detach().numpy(), expected, atol=1e-12)
    assert float(found.counts.sum()) == objective.count(rows)
    itself = objective(output(theirs, rows), collate(rows)).totals.sum()
    (gradient,) = torch.autograd.grad(itself, theirs)
    assert abs(float(itself.detach())) < 1e-12
    assert float(gradient.abs().max()) < 1e-12  # nothing is to be learned where nothing has changed

    def value(given: Tensor) -> Tensor:
        return objective(output(given, rows), collate(rows)).totals.sum()

    assert torch.autograd.gradcheck(value, (ours,), eps=1e-6, atol=1e-6)


def test_what_is_padded_or_left_out_changes_nothing() -> None:
    rows = rows_of(1)
    alone = rows[:1] if len(rows[0]["input_ids"]) < len(rows[1]["input_ids"]) else rows[1:2]
    other = max(rows, key=lambda row: len(row["input_ids"]))
    for objective in (Supervised(), Ppo(), Grpo(beta=0.1)):
        logits = logits_for([alone[0], other], 3)
        both = objective(type("O", (), {"logits": logits})(), collate([alone[0], other]))
        length = len(alone[0]["input_ids"])
        one = objective(type("O", (), {"logits": logits[:1, :length]})(), collate(alone))
        torch.testing.assert_close(both.totals[0], one.totals[0])


def test_the_list_has_them_all() -> None:
    def below(one: type[Objective]) -> set[type[Objective]]:
        return {one, *(deeper for each in one.__subclasses__() for deeper in below(each))}

    assert set(OBJECTIVES.values()) == {one for one in below(Objective) if not inspect.isabstract(one)}
    assert all(OBJECTIVES[name].name == name for name in OBJECTIVES)
    names: Mapping[str, type[Objective]] = OBJECTIVES
    assert set(names) == {"supervised", "dpo", "kto", "importance_sampling", "ppo", "grpo"} | {
        "distribution",
        "divergence",
    }
