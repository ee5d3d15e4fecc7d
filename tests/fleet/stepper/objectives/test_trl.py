"""Each objective that TRL has too gives the loss of TRL's trainer, on the batch that its trainer makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kilotune import PeftModel
from kilotune.fleet.stepper.objectives import Dpo, Grpo, Kto, Objective
from kilotune.fleet.stepper.objectives._base import token_logprobs
from kilotune.fleet.stepper.token_rows import INPUTS, collate
from tests.support.engine_support import adapted
from tests.support.models import randomize
from tests.support.preferences import BETA, trainer

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:trl")

Row = dict[str, Any]


def learned() -> PeftModel:
    """A model whose adapter does something already."""
    model = adapted("lora")
    randomize(model, scale=1.0)
    return model.eval()


def rows_of(ids: Tensor, mask: Tensor, completion: Tensor) -> list[Row]:
    """TRL's batch as rows; the labels are the completion's tokens."""
    found = []
    for row, there, own in zip(ids, mask.bool(), completion.bool(), strict=True):
        labels = torch.where(own, row, -100)
        found.append({"input_ids": row[there].tolist(), "labels": labels[there].tolist()})
    return found


def logprobs(model: Any, rows: list[Row]) -> Tensor:
    batch = collate(rows)
    with torch.no_grad():
        return token_logprobs(model(**{key: batch[key] for key in INPUTS}), batch["labels"])


def of_base(model: PeftModel, rows: list[Row]) -> Tensor:
    with model.disable_adapter():
        return logprobs(model, rows)


def ours(objective: Objective, model: PeftModel, rows: list[Row]) -> float:
    batch = collate(rows)
    with torch.no_grad():
        found = objective(model(**{key: batch[key] for key in INPUTS}), batch)
    return float(found.totals.sum()) / objective.count(rows)


def theirs(run: Any, inputs: Any) -> float:
    run.model.eval()  # no dropout
    with torch.no_grad():
        return float(run.compute_loss(run.model, inputs))


def test_dpo(tmp_path: Path) -> None:
    model = learned()
    run = trainer("DPO", model, tmp_path, reference="base")
    inputs = next(iter(run.get_train_dataloader()))
    rows = rows_of(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
    half = len(rows) // 2
    rows = [row for pair in zip(rows[:half], rows[half:], strict=True) for row in pair]
    sums = of_base(model, rows).sum(1).tolist()
    rows = [{**row, "reference": total} for row, total in zip(rows, sums, strict=True)]
    expected = theirs(run, inputs)
    assert abs(expected - math.log(2)) > 1e-3
    assert ours(Dpo(beta=BETA), model, rows) == pytest.approx(expected, rel=1e-4)


def test_kto(tmp_path: Path) -> None:
    model = learned()
    run = trainer("KTO", model, tmp_path, reference="base")
    inputs = next(iter(run.get_train_dataloader()))
    own = rows_of(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
    others = rows_of(inputs["KL_input_ids"], inputs["KL_attention_mask"], inputs["KL_completion_mask"])
    good = [float(one) for one in inputs["label"]]
    assert 0 < sum(good) < len(good)
    rows = [row for pair in zip(own, others, strict=True) for row in pair]
    sums = of_base(model, rows).sum(1).tolist()
    told = [one for one in good for _ in range(2)]
    rows = [{**row, "reference": s, "good": g} for row, s, g in zip(rows, sums, told, strict=True)]
    assert ours(Kto(beta=BETA), model, rows) == pytest.approx(theirs(run, inputs), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_grpo(beta: float, tmp_path: Path) -> None:
    model = learned()
    # The penalty is the paper's (equation 4), not the one that TRL corrects by the ratio (DeepSeek-V3.2).
    paper: dict[str, Any] = {"loss_type": "grpo", "use_bias_correction_kl": False}
    run = trainer("GRPO", model, tmp_path, reference="base", beta=beta, epsilon=0.1, **paper)
    run.current_gradient_accumulation_steps = 1
    draws = torch.Generator().manual_seed(0)
    prompt = torch.randint(4, 20, (4, 3), generator=draws)
    answer = torch.randint(4, 20, (4, 5), generator=draws)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 4 + [0], [1] * 5])
    ids, whole = torch.cat([prompt, answer], 1), torch.cat([torch.ones_like(prompt), mask], 1)
    completion = torch.cat([torch.zeros_like(prompt), mask], 1)
    rows = rows_of(ids, whole, completion)
    now, base = logprobs(model, rows), of_base(model, rows)
    old = now + 0.3 * torch.randn(now.shape, generator=draws) * (now != 0)
    advantages = torch.tensor([1.0, -0.5, 0.25, -1.0])
    inputs: dict[str, Any] = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": answer,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old[:, 3:],
        "num_items_in_batch": mask.sum(),
    }
    if beta:
        inputs["ref_per_token_logps"] = base[:, 3:]
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        row["old_logprobs"] = old[i, :length].tolist()
        row["reference_logprobs"] = base[i, :length].tolist()
        row["advantages"] = [float(advantages[i])] * length
    expected = theirs(run, inputs)
    assert ours(Grpo(low=0.1, high=0.1, beta=beta), model, rows) == pytest.approx(expected, rel=1e-4)
    assert ours(Grpo(low=0.5, high=0.5, beta=beta), model, rows) != pytest.approx(expected, rel=1e-3)
