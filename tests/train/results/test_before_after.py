"""What a training changed, as the report tells it: losses and answers are those of transformers with and without it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kilotune.train.results import before_after
from kilotune.train.results.before_after import Compared, Sample, _asked, samples_of
from kilotune.train.results.report import page
from kilotune.train.run import open_session, train
from kilotune.train.settings.config_file import settings_from
from kilotune.train.settings.sections import TrainSettings
from tests.support.generation_support import greedy, loaded, merged
from tests.support.train_support import model_folder, prompts, sentence, write_jsonl

PIECES = {"llama": "causal-lm", "t5": "seq2seq"}


def settings(folder: Path, kind: str, rows: list[dict[str, Any]], **more: Any) -> TrainSettings:
    return settings_from(
        {
            "task": PIECES.get(kind, "text-classification"),
            "output": str(folder / "out"),
            "model": {"base": str(model_folder(kind))},
            "adapter": {"method": "lora", **more.get("adapter", {})},
            "data": {"train": str(write_jsonl(folder / "rows.jsonl", rows)), **more.get("data", {})},
            "training": {"device": "cpu", "max_steps": 25, "learning_rate": 0.02, **more.get("training", {})},
            "logging": {"progress": "quiet", **more.get("logging", {})},
        }
    )


@torch.no_grad()
def loss_of(model: Any, rows: Any) -> float:
    """The mean over the answers' tokens of all rows, each by itself."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["input_ids"].astype("int64"))
        scores = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for at in range(1, len(ids)):
            if row["labels"][at] != -100:
                total -= float(scores[at - 1, ids[at]])
                count += 1
    return total / count


def test_losses_and_answers_with_and_without_the_adapter(tmp_path: Path) -> None:
    chosen = settings(tmp_path, "llama", prompts(30), data={"validation_fraction": 0.2, "test_fraction": 0.2})
    result = train(chosen)
    assert result is not None
    compared = result.compared
    assert compared is not None
    prepared: Any = open_session(chosen).prepared
    base, tuned = loaded("llama", model_folder("llama")), merged("llama", model_folder("llama"), result.folder)
    assert (compared.split, compared.rows) == ("test", 6)
    assert compared.base == pytest.approx(loss_of(base, prepared.test), rel=1e-4)
    assert compared.tuned == pytest.approx(loss_of(tuned, prepared.test), rel=1e-4)
    assert compared.learnt
    assert json.loads((result.folder / "result.json").read_text())["compared"]["base"] == compared.base
    text = (result.folder / "report.html").read_text()
    assert compared.line in text
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    for row in list(prepared.test)[:3]:
        ids, wanted = _asked(row, "prompt")
        assert tokenizer.decode(ids) + tokenizer.decode(wanted) == tokenizer.decode(row["input_ids"])
        for model in (base, tuned):
            said = tokenizer.decode(greedy(model, ids, min(48, len(wanted) + 8)), skip_special_tokens=True)
            assert f"<dd>{said.replace('<', '&lt;') or '(nothing)'}</dd>" in text.replace("&gt;", ">")


def test_a_sequence_to_sequence_model_shows_its_answers_too(tmp_path: Path) -> None:
    rows = [{"source": sentence(i), "target": sentence(i, 3)} for i in range(12)]
    session = open_session(settings(tmp_path, "t5", rows, data={"validation_fraction": 0.25}))
    first, second, third = samples_of(session)
    tokenizer, base = AutoTokenizer.from_pretrained(model_folder("t5")), loaded("t5", model_folder("t5"))
    prepared: Any = session.prepared
    row = prepared.validation[0]
    assert first.prompt == tokenizer.decode(row["input_ids"], skip_special_tokens=True).strip()
    assert first.wanted == tokenizer.decode(row["labels"], skip_special_tokens=True).strip()
    said = greedy(base, row["input_ids"].tolist(), len(row["labels"]) + 8)
    assert first.base == first.tuned == tokenizer.decode(said, skip_special_tokens=True)
    assert second.prompt != third.prompt


def test_texts_are_gone_on_with_from_their_middle(tmp_path: Path) -> None:
    session = open_session(settings(tmp_path, "llama", [{"text": sentence(i)} for i in range(8)]))
    ids, wanted = _asked(session.prepared.train[0], "text")
    whole = session.prepared.train[0]["input_ids"].tolist()
    assert [*ids, *wanted] == whole
    assert abs(len(ids) - len(wanted)) <= 1


def test_where_nothing_was_held_out_rows_of_train_are_taken(tmp_path: Path) -> None:
    result = train(settings(tmp_path, "llama", prompts(70), training={"learning_rate": 1e-7, "max_steps": 2}))
    assert result is not None
    compared = result.compared
    assert compared is not None
    assert (compared.split, compared.rows) == ("train", 64)
    assert not compared.learnt
    text = (result.folder / "report.html").read_text()
    assert "on 64 rows of train, for none were held out" in text
    assert "Nothing was learnt: the loss is " in text
    assert "a higher learning rate (training.learning_rate was 1e-07; try 1e-06), and more steps than 2" in text


@pytest.mark.parametrize(("kind", "adapter"), [("bert", {}), ("llama", {"method": "full", "options": {}})])
def test_where_the_base_is_gone_nothing_is_compared(kind: str, adapter: dict[str, Any], tmp_path: Path) -> None:
    rows = prompts(8) if kind == "llama" else [{"text": sentence(i), "label": str(i % 2)} for i in range(8)]
    result = train(settings(tmp_path, kind, rows, adapter=adapter, training={"max_steps": 1}))
    assert result is not None
    assert result.compared is None
    assert "What it writes" not in (result.folder / "report.html").read_text()


def test_without_a_report_nothing_is_spent_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(settings(tmp_path, "llama", prompts(8), training={"max_steps": 1}, logging={"report": False}))
    assert result is not None
    assert result.compared is None


def test_slow_models_are_asked_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kilotune.train import run

    session = open_session(settings(tmp_path, "llama", prompts(40)))
    clock = iter([0.0, 5.0, 21.0])
    assert len(samples_of(session, clock=lambda: next(clock))) == 2
    asked = []
    compare = run.compare

    def slow(session: Any, trainer: Any, seconds: Any) -> Any:
        asked.append(compare(session, trainer, [80.0]).rows)  # 10 s a row of a batch of 8: two rows, so the least
        asked.append(compare(session, trainer, [8.0]).rows)
        return None

    monkeypatch.setattr(run, "compare", slow)
    train(settings(tmp_path, "llama", prompts(40), training={"max_steps": 1}))
    assert asked == [before_after.LEAST, 20]


def test_the_verdict() -> None:
    kept = Compared("test", 9, base=2.0, tuned=1.0, first=2.0, last=1.0, rate=1e-3, steps=100)
    assert kept.learnt
    assert kept.verdict == ""
    assert kept.line == "loss 1, of the base 2 (on 9 rows of test)"
    same = dataclasses.replace(kept, tuned=1.985)
    assert not same.learnt
    assert "by heart" in same.verdict
    assert "more rows, and fewer steps than 100" in same.verdict
    flat = dataclasses.replace(same, last=1.95)
    assert flat.verdict.startswith("Nothing was learnt: the loss is 1.985, and the base's is 2.")
    assert "training.learning_rate was 0.001; try 0.01" in flat.verdict
    assert "Nothing was learnt" in dataclasses.replace(same, split="train").verdict
    assert "Nothing was learnt" in dataclasses.replace(flat, tuned=float("nan")).verdict


def test_what_a_model_writes_is_escaped(tmp_path: Path) -> None:
    chosen = settings(tmp_path, "llama", prompts(8), training={"max_steps": 1})
    result = train(chosen)
    assert result is not None
    hostile = "<script>alert(1)</script>"
    text = page(open_session(chosen), result, None, {}, [Sample(hostile, hostile, hostile, "")])
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
    assert "(nothing)" in text
