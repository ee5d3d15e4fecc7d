"""The loss of an evaluation is that of all rows in one batch, whatever the batches are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune.train import DataSettings, ModelSettings, TrainingSettings, TrainSettings, evaluate, open_session
from tests.support.train_support import model_folder, sentence, write_jsonl

ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "causal-lm": ("llama", [{"text": sentence(i, 3 + 2 * i)} for i in range(7)]),
    "text-classification": ("bert", [{"text": sentence(i, 3 + i), "label": "ab"[i > 4]} for i in range(7)]),
    # -100 is a number like any other here, though it marks what is passed over among classes
    "regression": ("bert", [{"text": sentence(i, 3 + i), "label": -100.0 if i == 2 else i**2} for i in range(7)]),
    "token-classification": (
        "bert",
        [{"tokens": sentence(i, 2 + i).split(), "tags": ["XY"[k == 1] for k in range(2 + i)]} for i in range(7)],
    ),
    "seq2seq": ("t5", [{"source": sentence(i, 3 + i), "target": sentence(i, 2 + 2 * i)} for i in range(7)]),
}


@pytest.mark.parametrize("task", ROWS)
def test_the_loss_is_the_mean_over_all_labels_however_rows_are_batched(task: str, tmp_path: Path) -> None:
    kind, rows = ROWS[task]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    settings = TrainSettings(
        task=task,
        output=str(tmp_path / "out"),
        model=ModelSettings(base=str(model_folder(kind))),
        data=DataSettings(train=file, validation=file),
        training=TrainingSettings(batch_size=3, device="cpu"),
    )
    session = open_session(settings)
    held: Any = session.prepared.validation
    with torch.no_grad():
        batch = session.prepared.collate([held[index] for index in range(len(held))])
        wanted = session.model.eval()(**batch).loss.item()
    assert evaluate(session)["loss"] == pytest.approx(wanted, rel=1e-5)
