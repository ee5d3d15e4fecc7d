"""A fine-tuning as a whole: each task on a tiny model, each method by name, and what is in the folder afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kilotune
from kilotune import LoraConfig, get_peft_model
from kilotune.errors import ConfigError, TargetError
from kilotune.methods import METHODS, PRESETS
from kilotune.train.run import Session, evaluate, fit, open_session, train
from kilotune.train.running.base_model import load_base, set_padding
from kilotune.train.running.events import Event, Listener
from kilotune.train.settings.config_file import settings_from
from kilotune.train.settings.rates import rate_for
from kilotune.train.settings.sections import TrainSettings
from kilotune.train.tasks import TASKS
from kilotune.train.trainer.output_folder import newest
from tests.support.models import tiny_llama
from tests.support.train_support import model_folder, pictures, prompts, sentence, write_jsonl

FILE = "adapter_model.safetensors"
CPU = torch.device("cpu")


def settings(kind: str, task: str, train_data: Path, output: Path, **parts: Any) -> TrainSettings:
    """Settings of a short training; ``parts`` are more keys of each section."""
    training = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "device": "cpu", **parts.pop("training", {})}
    return settings_from(
        {
            "task": task,
            "output": str(output),
            "model": {"base": str(model_folder(kind)), **parts.pop("model", {})},
            "adapter": {"method": "lora", "options": {"r": 2}, **parts.pop("adapter", {})},
            "data": {"train": str(train_data), **parts.pop("data", {})},
            "training": training,
            "logging": {"progress": "quiet", "log_every": 1, "report": False},
        }
    )


def rows_for(task: str, folder: Path, count: int = 16) -> Path:
    if task == "image-classification":
        return pictures(folder / "images", count // 2)
    if task == "causal-lm":
        rows = prompts(count)
    elif task == "seq2seq":
        rows = [{"source": sentence(i), "target": sentence(i, 3)} for i in range(count)]
    elif task == "token-classification":
        rows = [
            {"tokens": sentence(i).split(), "tags": ["A" if len(w) > 3 else "B" for w in sentence(i).split()]}
            for i in range(count)
        ]
    elif task == "regression":
        rows = [{"text": sentence(i), "label": len(sentence(i)) / 10} for i in range(count)]
    else:
        rows = [{"text": sentence(i), "label": "long" if len(sentence(i)) > 21 else "short"} for i in range(count)]
    return write_jsonl(folder / "train.jsonl", rows)


TASK_CASES = [
    ("llama", "causal-lm"),
    ("gpt2", "causal-lm"),
    ("gpt_bigcode", "causal-lm"),
    ("bert", "text-classification"),
    ("bert", "regression"),
    ("bert", "token-classification"),
    ("gpt2", "text-classification"),
    ("vit", "image-classification"),
    ("t5", "seq2seq"),
]


def output_of(model: Any, session: Session) -> torch.Tensor:
    batch = session.prepared.collate([session.prepared.train[i] for i in range(3)])
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**batch).logits
    return logits


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "task"), TASK_CASES)
def test_each_task_learns_and_its_adapter_gives_the_trained_model_again(kind: str, task: str, tmp_path: Path) -> None:
    chosen = settings(kind, task, rows_for(task, tmp_path), tmp_path / "out", training={"learning_rate": 2e-2})
    session = open_session(chosen)
    heads = {name for name, module in session.model.installed("default").saved.items()}
    before = {
        name: parameter.detach().clone()
        for name, parameter in session.model.get_base_model().named_parameters()
        if not parameter.requires_grad
    }
    first = evaluate(session, "train")["loss"]
    result = fit(session)
    assert evaluate(session, "train")["loss"] < first
    assert result.steps == 8
    after = dict(session.model.get_base_model().named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # The way that somebody else would load it: the base from its folder, the adapter from the other.
    assert TASKS[task] is type(session.task)
    with torch.random.fork_rng():
        torch.manual_seed(1234)  # a fresh head is drawn otherwise, so what the adapter does not bring shows
        loaded = load_base(chosen.model, session.task, session.prepared, CPU)
    set_padding(loaded.model, session.processor)
    again = kilotune.PeftModel.from_pretrained(loaded.model, result.folder)
    assert torch.equal(output_of(again, session), output_of(session.model, session))
    assert set(loaded.fresh) <= heads
    assert result.adapter_bytes == (result.folder / FILE).stat().st_size
    assert not list(result.folder.rglob("*.bin"))


def test_a_pooler_that_the_files_lack_is_trained_and_saved(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    whole = BertModel.from_pretrained(model_folder("bert"))
    base = tmp_path / "masked-lm"
    masked = BertForMaskedLM(BertConfig.from_pretrained(model_folder("bert")))
    masked.bert.load_state_dict(
        {k: v for k, v in whole.state_dict().items() if not k.startswith("pooler")}, strict=True
    )
    masked.save_pretrained(base)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model_folder("bert")).save_pretrained(base)
    task = "text-classification"
    chosen = settings("bert", task, rows_for(task, tmp_path), tmp_path / "out", model={"base": str(base)})
    session = open_session(chosen)
    fit(session)
    assert any("bert.pooler.dense" in note for note in session.notes)
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= {
        key.removeprefix("base_model.model.") for key in load_file(tmp_path / "out" / FILE)
    }


# -- the optimizer's steps -----------------------------------------------------------------------------


# One model of each kind of loss in CI: its own count of labels, the mean over a batch, that over all tokens.
ACCUMULATED = [
    pytest.param(*case, marks=() if case in (TASK_CASES[0], TASK_CASES[3], TASK_CASES[-1]) else pytest.mark.full)
    for case in TASK_CASES
]


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "task"), ACCUMULATED)
def test_accumulated_batches_are_one_batch(kind: str, task: str, tmp_path: Path) -> None:
    data = rows_for(task, tmp_path, 8)
    found = []
    for batch, accumulation in ((4, 1), (1, 4)):
        output = tmp_path / f"{batch}"
        size = {"batch_size": batch, "accumulation": accumulation, "max_steps": 1}
        train(settings(kind, task, data, output, training=size))
        lines = (output / "logs" / "history.jsonl").read_text().splitlines()
        found.append(next(r for r in map(json.loads, lines) if r["kind"] == "train"))
    # Not the weights: Adam's first step has the same size whatever the gradient's is.
    assert found[1]["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-4)
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-4)


def learning_rates(output: Path) -> list[float]:
    lines = (output / "logs" / "history.jsonl").read_text().splitlines()
    return [r["learning_rate"] for r in map(json.loads, lines) if r["kind"] == "train"]


@pytest.mark.parametrize(("schedule", "warmup"), [("linear", 3), ("cosine", 0.25), ("constant", 3)])
def test_the_schedule_is_the_formula(schedule: str, warmup: float, tmp_path: Path) -> None:
    chosen = settings(
        "llama",
        "causal-lm",
        rows_for("causal-lm", tmp_path),
        tmp_path / "out",
        training={"schedule": schedule, "warmup": warmup, "learning_rate": 1e-3},
    )
    train(chosen)
    steps, rise = 8, 2 if warmup == 0.25 else 3
    expected = []
    for step in range(steps):
        rest = (step - rise) / (steps - rise)
        down = {"linear": 1 - rest, "cosine": 0.5 * (1 + math.cos(math.pi * rest)), "constant": 1.0}[schedule]
        expected.append(1e-3 * ((step + 1) / (rise + 1) if step < rise else down))
    assert learning_rates(tmp_path / "out") == pytest.approx(expected)


def logged(output: Path) -> list[int]:
    lines = (output / "logs" / "history.jsonl").read_text().splitlines()
    return [r["step"] for r in map(json.loads, lines) if r["kind"] == "train"]


def test_the_first_step_is_logged_and_so_is_each_half_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kilotune.train import run

    chosen = settings("llama", "causal-lm", rows_for("causal-lm", tmp_path), tmp_path / "a")
    quiet = chosen.replace(logging=chosen.logging.replace(log_every=100))
    train(quiet)
    assert logged(tmp_path / "a") == [1, 4, 8]  # 4 and 8 are epochs' ends, which are saved
    clock = iter(range(0, 10**6, 4))  # the clock is asked when it begins, and when a step begins and ends: 8 s a step
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    slow = quiet.replace(output=str(tmp_path / "b"), training=quiet.training.replace(save_every=100, max_steps=14))
    train(slow)
    # 30 s after the last one: from step 1 on every fourth step, and the last, which is saved.
    assert logged(tmp_path / "b") == [1, 5, 9, 13, 14]


def test_without_epochs_there_are_enough_steps(tmp_path: Path) -> None:
    from kilotune.train.trainer.from_settings import epochs_of, total_steps

    chosen = settings("llama", "causal-lm", rows_for("causal-lm", tmp_path, 16), tmp_path / "out")
    prepared = open_session(chosen).prepared
    for given, batch, epochs, steps in ((None, 4, 25, 100), (None, 5, 25, 100), (None, 16, 100, 100), (2, 4, 2, 8)):
        run = chosen.replace(training=chosen.training.replace(epochs=given, batch_size=batch))
        assert epochs_of(run, prepared) == epochs
        assert total_steps(run, prepared) == steps
    assert epochs_of(chosen.replace(training=chosen.training.replace(epochs=None, batch_size=4)), prepared, 2) == 50
    many = chosen.replace(training=chosen.training.replace(epochs=None, batch_size=1))
    assert epochs_of(many, prepared) == 7  # 16 steps each
    import dataclasses

    from kilotune.train.data.rows import Ragged, Rows

    large = dataclasses.replace(prepared, train=Rows({"input_ids": Ragged([[1, 2]] * 1000, "int64")}))
    assert epochs_of(many, large) == 3


def test_without_a_learning_rate_it_is_the_rules_for_method_and_steps(tmp_path: Path) -> None:
    data = rows_for("causal-lm", tmp_path)
    for method in ("lora", "vera", "dvora"):
        output = tmp_path / method
        adapter = {"method": method, "options": {}}
        run = {"learning_rate": None, "warmup": 0, "schedule": "constant", "max_steps": 1}
        train(settings("llama", "causal-lm", data, output, adapter=adapter, training=run))
        assert learning_rates(output) == [rate_for(method, 1)]
    assert rate_for("dvora", 1) == rate_for("vera", 1) != rate_for("lora", 1)


def test_head_and_second_factor_have_rates_of_their_own(tmp_path: Path) -> None:
    task = "text-classification"
    run = {"head_learning_rate": 3e-3, "lora_plus_ratio": 16, "learning_rate": 1e-4, "weight_decay": 0.1}
    session = open_session(settings("bert", task, rows_for(task, tmp_path), tmp_path / "out", training=run))
    from kilotune.train.trainer.from_settings import make_trainer

    trainer = make_trainer(session.settings, session.model, session.prepared, tmp_path / "run")
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"adapter": 1e-4, "adapter_b": 16e-4, "head": 3e-3, "head_no_decay": 3e-3}
    )
    assert groups["adapter"]["weight_decay"] == 0.1
    assert groups["head_no_decay"]["weight_decay"] == 0.0
    wanted = {id(p) for p in session.model.parameters() if p.requires_grad}
    assert {id(p) for group in groups.values() for p in group["params"]} == wanted


# -- every method, every storage -----------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("method", [*METHODS, *PRESETS])
def test_every_method_trains_by_its_name(method: str, tmp_path: Path) -> None:
    whole = PRESETS.get(method, (method, {}))[0]
    options = dict(METHODS[whole].example)
    chosen = settings(
        "gpt2" if method == "bitfit" else "llama",  # a Llama has no biases
        "causal-lm",
        rows_for("causal-lm", tmp_path),
        tmp_path / "out",
        adapter={"method": method, "options": options},
        training={"max_steps": 1, "warmup": 0},
    )
    session = open_session(chosen)
    before = output_of(session.model, session)
    result = fit(session)
    assert not torch.equal(output_of(session.model, session), before)
    base = load_base(chosen.model, session.task, session.prepared, CPU).model
    again = kilotune.PeftModel.from_pretrained(base, result.folder)
    assert torch.equal(output_of(again, session), output_of(session.model, session))


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal-lm"), ("bert", "text-classification")])
@pytest.mark.parametrize("method", ["full", "head"])
def test_full_and_head_save_the_whole_model(method: str, kind: str, task: str, tmp_path: Path) -> None:
    chosen = settings(kind, task, rows_for(task, tmp_path), tmp_path / "out", adapter={"method": method, "options": {}})
    session = open_session(chosen)
    before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    result = fit(session)
    changed = {name for name, p in session.model.named_parameters() if not torch.equal(p, before[name])}
    if method == "head":
        head = "lm_head" if kind == "llama" else "classifier"
        assert changed
        assert all(name.startswith(head) for name in changed)
        assert result.trained == sum(p.numel() for name, p in before.items() if name.startswith(head))
    else:
        assert len(changed) > len(before) / 2
        assert result.trained == sum(p.numel() for p in before.values())
    import transformers

    again = getattr(transformers, session.task.auto_class).from_pretrained(result.folder)
    assert torch.equal(output_of(again, session), output_of(session.model, session))
    assert json.loads((result.folder / "config.json").read_text()).get("use_cache", True) is not False


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_trained_on(quantization: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    chosen = settings(
        "llama",
        "causal-lm",
        rows_for("causal-lm", tmp_path),
        tmp_path / "out",
        model={"quantization": quantization},
        training={"learning_rate": 2e-2, "save_every": 3},
    )
    session = open_session(chosen)
    kinds = {type(module).__name__ for module in session.model.modules()}
    assert ("Linear4bit" if quantization == "nf4" else "Linear8bitLt") in kinds
    first = evaluate(session, "train")["loss"]
    fit(session)
    assert evaluate(session, "train")["loss"] < first
    assert newest(tmp_path / "out" / "checkpoints") is not None


def test_gradient_checkpointing_gives_the_same_adapter(tmp_path: Path) -> None:
    data = rows_for("causal-lm", tmp_path)
    found = []
    for checkpointing in (False, True):
        output = tmp_path / str(checkpointing)
        chosen = settings("llama", "causal-lm", data, output, model={"gradient_checkpointing": checkpointing})
        session = open_session(chosen)
        fit(session)
        assert session.model.get_base_model().is_activation_checkpointing is checkpointing
        found.append(load_file(output / FILE))
    assert all(torch.allclose(found[1][name], value, atol=1e-6) for name, value in found[0].items())


def test_bfloat16_autocast_leaves_what_is_trained_in_float32(tmp_path: Path) -> None:
    task = "text-classification"
    data = rows_for(task, tmp_path)
    seen: set[torch.dtype] = set()
    chosen = settings("bert", task, data, tmp_path / "out", training={"precision": "bfloat16"})
    session = open_session(chosen)
    layer = next(m for name, m in session.model.named_modules() if name.endswith("attention.self.query"))
    layer.register_forward_hook(lambda module, args, out: seen.add(out.dtype) if module.training else None)
    fit(session)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in session.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_head_on_a_bfloat16_base_is_trained_in_float32(tmp_path: Path) -> None:
    task = "text-classification"
    chosen = settings("bert", task, rows_for(task, tmp_path), tmp_path / "out", model={"dtype": "bfloat16"})
    session = open_session(chosen)
    assert session.model.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16
    fit(session)
    saved = load_file(tmp_path / "out" / FILE)
    assert {value.dtype for value in saved.values()} == {torch.float32}


# -- the best evaluation -------------------------------------------------------------------------------


def worsening(tmp_path: Path, **training: Any) -> TrainSettings:
    """Trained on one thing and evaluated on another, so that after some steps evaluations get worse and worse."""
    data = write_jsonl(tmp_path / "train.jsonl", prompts(16))
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "the", "completion": " mat" * (2 + i)} for i in range(4)])
    run = {"epochs": 6, "learning_rate": 5e-2, "eval_every": 1, "save_every": 100, "best_metric": "loss", **training}
    return settings("llama", "causal-lm", data, tmp_path / "out", data={"validation": str(other)}, training=run)


def evaluations(output: Path) -> dict[int, float]:
    lines = (output / "logs" / "history.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if r["kind"] == "validation"}


def test_early_stopping_and_the_best_checkpoint(tmp_path: Path) -> None:
    chosen = worsening(tmp_path, early_stopping=3)
    session = open_session(chosen)
    result = fit(session)
    losses = evaluations(result.folder)
    best = min(losses, key=lambda step: losses[step])
    assert result.best_step == best
    assert result.steps == best + 3, "three evaluations without a better one"
    assert result.steps < 24
    kept = result.folder / "checkpoints" / f"checkpoint-{best}" / FILE
    assert (result.folder / FILE).read_bytes() == kept.read_bytes()
    assert evaluate(session)["loss"] == pytest.approx(losses[best], rel=1e-5)
    assert result.metrics["best"]["loss"] == losses[best]
    assert result.metrics["last"]["loss"] == losses[result.steps]
    # Gone on with, it is over: no step more.
    again = train(chosen, resume=True)
    assert again is not None
    assert (again.steps, again.best_step) == (result.steps, best)


class StopsAt(Listener):
    """Pulls the plug when a checkpoint of ``step`` is there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def hear(self, event: Event) -> None:
        if event.kind == "save" and event.step == self.step:
            raise KeyboardInterrupt

    def close(self) -> None: ...


def test_the_patience_of_early_stopping_goes_on_after_a_resume(tmp_path: Path) -> None:
    chosen = worsening(tmp_path, early_stopping=3, save_every=1)
    whole = fit(open_session(chosen.replace(output=str(tmp_path / "whole"))))
    with pytest.raises(KeyboardInterrupt):
        fit(open_session(chosen), listeners=[StopsAt(whole.best_step + 2)])
    result = train(chosen, resume=True)
    assert result is not None
    assert (result.steps, result.best_step) == (whole.steps, whole.best_step) == (whole.best_step + 3, whole.best_step)
    assert (result.folder / FILE).read_bytes() == (whole.folder / FILE).read_bytes()


def test_the_last_adapter_where_the_best_is_not_wanted(tmp_path: Path) -> None:
    result = fit(open_session(worsening(tmp_path, load_best=False, max_steps=8)))
    assert result.best_step == 8
    last = newest(result.folder / "checkpoints")
    assert last is not None
    assert (result.folder / FILE).read_bytes() == (last / FILE).read_bytes()


def test_checkpoints_are_counted_and_the_best_is_never_dropped(tmp_path: Path) -> None:
    result = fit(open_session(worsening(tmp_path, save_every=1, keep_checkpoints=2, max_steps=12)))
    left = {path.name for path in (result.folder / "checkpoints").glob("checkpoint-*")}
    losses = evaluations(result.folder)
    assert left == {f"checkpoint-{min(losses, key=lambda step: losses[step])}", "checkpoint-12"}


def test_a_test_split_is_scored_at_the_end_and_never_before(tmp_path: Path) -> None:
    task = "text-classification"
    parts = {"validation_fraction": 0.25, "test_fraction": 0.25}
    result = fit(open_session(settings("bert", task, rows_for(task, tmp_path), tmp_path / "out", data=parts)))
    assert {"loss", "accuracy"} <= set(result.metrics["test"])
    kinds = [record["kind"] for record in result.history]
    assert kinds.count("test") == 1
    assert kinds.index("test") > max(i for i, kind in enumerate(kinds) if kind == "validation")


def test_a_test_split_of_seq2seq_is_scored_by_what_the_model_writes(tmp_path: Path) -> None:
    data = rows_for("seq2seq", tmp_path)
    session = open_session(settings("t5", "seq2seq", data, tmp_path / "out", data={"test_fraction": 0.25}))
    result = fit(session)
    assert "bleu" in {name.lower() for name in result.metrics["test"]}
    again = evaluate(session, "test", generate=True)
    assert again == pytest.approx(dict(result.metrics["test"]))
    # Independently: what the model writes for the test rows, greedily, in one batch.
    import sacrebleu

    batch = session.prepared.collate([session.prepared.test[i] for i in range(4)])
    longest = batch["labels"].shape[1] * 5 // 4 + 9
    model = session.model.eval()
    written = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=longest)
    decode = session.processor.batch_decode
    said = decode(written, skip_special_tokens=True)
    meant = decode(batch["labels"].masked_fill(batch["labels"] == -100, 0), skip_special_tokens=True)
    assert again["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [meant]).score, abs=0.01)


# -- pieces --------------------------------------------------------------------------------------------


def test_an_adapter_can_be_gone_on_from(tmp_path: Path) -> None:
    data = rows_for("causal-lm", tmp_path)
    train(settings("llama", "causal-lm", data, tmp_path / "one"))
    start = {"method": "lora", "options": {}, "start": str(tmp_path / "one")}
    session = open_session(settings("llama", "causal-lm", data, tmp_path / "two", adapter=start))
    first = load_file(tmp_path / "one" / FILE)
    held = {f"base_model.model.{name}.weight": p for name, p in session.model.adapter_parameters()}
    assert len(first) == len(held)
    fit(session)
    assert any(not torch.equal(value, first[name]) for name, value in load_file(tmp_path / "two" / FILE).items())


def test_an_adapter_that_stands_on_another_is_not_gone_on_from_without_it(tmp_path: Path) -> None:
    data = rows_for("causal-lm", tmp_path)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2), "house-style")
    model.add_adapter("ann", LoraConfig(r=2))
    model.set_adapter(["house-style", "ann"], inference_mode=True)
    model.set_requires_grad("ann")
    model.save_pretrained(tmp_path)
    start = {"method": "lora", "options": {}, "start": str(tmp_path / "ann")}
    with pytest.raises(ConfigError, match=r"adapter.start: .* stands on 'house-style' .* fleet train --on house-style"):
        open_session(settings("llama", "causal-lm", data, tmp_path / "two", adapter=start))


def test_evaluate_says_which_splits_there_are(tmp_path: Path) -> None:
    session = open_session(settings("llama", "causal-lm", rows_for("causal-lm", tmp_path), tmp_path / "out"))
    with pytest.raises(ConfigError, match="data.validation: there is no such split"):
        evaluate(session)
    with pytest.raises(ConfigError, match="expected one of train, validation, test, got 'tset'. Did you mean 'test'"):
        evaluate(session, "tset")


def test_head_alone_needs_a_head(tmp_path: Path) -> None:
    from kilotune.train.running.base_model import Loaded, adapt

    chosen = settings("llama", "causal-lm", tmp_path, tmp_path, adapter={"method": "head", "options": {}})
    with pytest.raises(TargetError, match="no head that is known by its name"):
        adapt(Loaded(torch.nn.Linear(2, 2)), chosen, None)
