"""``kilotune evaluate``: its numbers are those of the merged model and a sum written here."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from kilotune import LoraConfig, PeftModel, get_peft_model
from kilotune.train.results.scoring import scoring_settings
from kilotune.train.run import train
from kilotune.train.settings.config_file import settings_from
from tests.support.cli_helpers import as_json, error, kilotune
from tests.support.train_support import model_folder, pictures, prompts, sentence, write_jsonl

CLOSE = 1e-5


def trained(folder: Path, kind: str, task: str, data: Path, **more: Any) -> Path:
    """The folder of a training of some steps at a high rate, so that its adapter matters."""
    values = {
        "task": task,
        "output": str(folder),
        "model": {"base": str(model_folder(kind))},
        "adapter": {"method": "lora", "options": {"r": 4}},
        "data": {"train": str(data), **more},
        "training": {"max_steps": 6, "batch_size": 4, "learning_rate": 0.05, "eval_every": None, "device": "cpu"},
        "logging": {"progress": "quiet", "report": False},
    }
    train(settings_from(values))
    return folder


def classified(count: int, shift: int = 0) -> list[dict[str, Any]]:
    words = ("red", "blue", "rain")
    return [{"text": f"{words[i % 3]} {sentence(i + shift, 4)}", "label": words[i % 3]} for i in range(count)]


def test_chats_are_scored_in_the_adapters_own_template(tmp_path: Path) -> None:
    """As over a base that has this template itself; and it is told."""
    from tests.support.generation_support import pair

    base, adapter = pair("llama", True)
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a {% endif %}"
    own, other = tmp_path / "own", tmp_path / "base"
    shutil.copytree(adapter, own)
    shutil.copytree(base, other)
    (own / "chat_template.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(other)
    turns = [(sentence(i, 3), sentence(i + 9, 4)) for i in range(4)]
    roles = ("user", "assistant")
    said = [{"messages": [{"role": role, "content": text} for role, text in zip(roles, turn)]} for turn in turns]
    data = write_jsonl(tmp_path / "test.jsonl", said)
    how = ("--task", "causal-lm", "--set", "training.device=cpu")
    mine, theirs, usual = (
        as_json("evaluate", folder, data, "--base", over, *how)
        for folder, over in ((own, base), (adapter, other), (adapter, base))
    )
    assert mine["metrics"]["loss"] == pytest.approx(theirs["metrics"]["loss"], rel=CLOSE)
    assert mine["metrics"]["loss"] != pytest.approx(usual["metrics"]["loss"], rel=CLOSE)
    told = f"chats are in the adapter's own chat template, which is not that of {base}"
    assert told in mine["notes"]
    assert not [note for note in (*theirs["notes"], *usual["notes"]) if "chat template" in note]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("language")
    data = write_jsonl(place / "train.jsonl", prompts(16))
    write_jsonl(place / "test.jsonl", prompts(23)[16:])
    return trained(place / "out", "llama", "causal-lm", data).parent


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("classifier")
    data = write_jsonl(place / "train.jsonl", classified(24))
    # Only two of the three classes, the last one first: their numbers must be the training's.
    rows = [row for row in classified(20, 7) if row["label"] != "blue"][:12]
    write_jsonl(place / "test.jsonl", sorted(rows, key=lambda row: row["label"], reverse=True))
    return trained(place / "out", "bert", "text-classification", data).parent


# -- the numbers -----------------------------------------------------------------------------------


@torch.no_grad()
def answers_loss(model: Any, rows: list[dict[str, Any]], tokenizer: Any) -> float:
    """The mean over all tokens of all completions, and the end-of-text tokens after them."""
    total, count = 0.0, 0
    for row in rows:
        before = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(float(scores[i - 1, ids[i]]) for i in range(len(before), len(ids)))
        count += len(ids) - len(before)
    return total / count


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_language_model(language: Path) -> None:
    base = model_folder("llama")
    rows, tokenizer = rows_of(language / "test.jsonl"), AutoTokenizer.from_pretrained(base)
    done = as_json("evaluate", language / "out", language / "test.jsonl", "--base", base)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    alone = answers_loss(plain, rows, tokenizer)
    adapted = PeftModel.from_pretrained(plain, language / "out").merge_and_unload().eval()
    want = answers_loss(adapted, rows, tokenizer)
    assert done["rows"] == len(rows) == 7
    assert done["task"] == "causal-lm"
    assert done["metrics"]["perplexity"] == pytest.approx(math.exp(want), rel=CLOSE)
    assert abs(want - alone) > 0.01
    without = as_json("evaluate", language / "out", language / "test.jsonl", "--base", base, "--base-alone")
    assert without["metrics"]["perplexity"] == pytest.approx(math.exp(alone), rel=CLOSE)
    assert without["adapter"] is None


def test_a_classifier_keeps_the_classes_of_its_training(classifier: Path) -> None:
    base = model_folder("bert")
    rows, tokenizer = rows_of(classifier / "test.jsonl"), AutoTokenizer.from_pretrained(base)
    done = as_json("evaluate", classifier / "out", classifier / "test.jsonl", "--base", base)
    names = json.loads((classifier / "out" / "labels.json").read_text())["labels"]
    assert names == ["blue", "rain", "red"]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = PeftModel.from_pretrained(model, classifier / "out").merge_and_unload().eval()
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    want = torch.tensor([names.index(row["label"]) for row in rows])
    assert done["metrics"]["accuracy"] == pytest.approx(float((logits.argmax(-1) == want).double().mean()))
    assert len(rows) % 4 == 0  # the Trainer's loss is a mean over batches, here all full
    assert done["metrics"]["loss"] == pytest.approx(float(F.cross_entropy(logits, want)), rel=CLOSE)
    assert done["rows"] == len(rows)


def test_pictures(tmp_path: Path) -> None:
    base, names = model_folder("vit"), ("dark", "light")
    folder = trained(tmp_path / "out", "vit", "image-classification", pictures(tmp_path / "train"))
    test = pictures(tmp_path / "test", 5)
    done = as_json("evaluate", folder, test, "--base", base)
    model = AutoModelForImageClassification.from_pretrained(base, num_labels=2)
    model = PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
    processor = AutoImageProcessor.from_pretrained(base)
    right = [
        int(model(**processor(Image.open(path), return_tensors="pt")).logits.argmax()) == names.index(path.parent.name)
        for path in test.rglob("*.png")
    ]
    assert done["rows"] == len(right) == 10
    assert done["metrics"]["accuracy"] == pytest.approx(sum(right) / len(right))
    text = error("evaluate", folder, test, "--base", base, "--base-alone")
    assert "the adapter brings classifier, without which the base has nothing to score" in text


def test_an_encoder_decoder_can_be_scored_by_what_it_writes(tmp_path: Path) -> None:
    base = model_folder("t5")
    rows = [{"source": sentence(i, 4), "target": sentence(i + 2, 3)} for i in range(12)]
    folder = trained(tmp_path / "out", "t5", "seq2seq", write_jsonl(tmp_path / "train.jsonl", rows[:8]))
    test = write_jsonl(tmp_path / "test.jsonl", rows[8:])
    done = as_json("evaluate", folder, test, "--base", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), folder).merge_and_unload().eval()
    total, count = 0.0, 0
    for row in rows[8:]:
        labels = torch.tensor([tokenizer(row["target"])["input_ids"]])
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tokenizer(row["source"])["input_ids"]]), labels=labels)
        total += float(out.loss) * labels.numel()
        count += labels.numel()
    assert done["metrics"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert "bleu" not in done["metrics"]
    assert "bleu" in as_json("evaluate", folder, test, "--base", base, "--generate")["metrics"]


def test_a_whole_model_is_scored_without_a_base(tmp_path: Path, classifier: Path) -> None:
    """What the method ``full`` leaves behind: here the merged model in place of it."""
    model = AutoModelForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=3)
    merged = PeftModel.from_pretrained(model, classifier / "out").merge_and_unload()
    merged.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder("bert")).save_pretrained(tmp_path)
    for name in ("labels.json", "kilotune-train.yaml"):
        shutil.copy(classifier / "out" / name, tmp_path)
    done = as_json("evaluate", tmp_path, classifier / "test.jsonl")
    want = as_json("evaluate", classifier / "out", classifier / "test.jsonl", "--base", model_folder("bert"))
    assert done["metrics"]["accuracy"] == want["metrics"]["accuracy"]
    assert done["metrics"]["loss"] == pytest.approx(want["metrics"]["loss"], rel=CLOSE)


def test_what_is_printed(language: Path) -> None:
    base = model_folder("llama")
    words = ("evaluate", language / "out", language / "test.jsonl", "--base", base)
    result = kilotune(*words)
    metrics = as_json(*words)["metrics"]
    assert f"{language / 'out'} on" in " ".join(result.stdout.split())
    for name, value in metrics.items():
        assert f"{name}" in result.stdout
        assert f"{value:.4f}" in result.stdout


def test_settings_of_the_training_hold_and_can_be_changed(tmp_path: Path, language: Path) -> None:
    renamed = [{"question": row["prompt"], "answer": row["completion"]} for row in prompts(5)]
    test = write_jsonl(tmp_path / "test.jsonl", renamed)
    words = ("evaluate", language / "out", test, "--base", model_folder("llama"))
    assert "prompt" in error(*words)
    columns = ("--set", "data.columns.prompt=question", "--set", "data.columns.completion=answer")
    plain = write_jsonl(tmp_path / "plain.jsonl", prompts(5))
    done, want = as_json(*words, *columns), as_json(words[0], words[1], plain, *words[3:])
    assert done["metrics"] == want["metrics"]
    everything = as_json(*words, *columns, "--set", "data.loss_on=all")
    assert everything["metrics"]["perplexity"] != done["metrics"]["perplexity"]


def test_what_of_a_trainings_settings_is_kept(tmp_path: Path) -> None:
    values = {
        "task": "causal-lm",
        "model": {"base": "owner/other", "revision": "v1", "dtype": "bfloat16"},
        "data": {
            "train": "a.jsonl",
            "test_fraction": 0.1,
            "columns": {"text": "body"},
            "loss_on": "all",
            "max_length": 9,
        },
        "training": {"epochs": 7, "batch_size": 3, "seed": 4, "eval_every": 5, "device": "cpu"},
    }
    (tmp_path / "kilotune-train.yaml").write_text(json.dumps(values))
    got = scoring_settings(tmp_path, ["b.jsonl"], "mine", changes=["training.batch_size=2"])
    want = {
        "task": "causal-lm",
        "model": {"base": "mine", "dtype": "bfloat16"},
        "adapter": {"method": "lora"},
        "data": {"test": ["b.jsonl"], "columns": {"text": "body"}, "loss_on": "all", "max_length": 9},
        "training": {"batch_size": 2, "seed": 4, "device": "cpu"},
    }
    assert got == settings_from(want)


def test_rows_that_are_cut_are_told(language: Path) -> None:
    words = ("evaluate", language / "out", language / "test.jsonl", "--base", model_folder("llama"))
    result = kilotune(*words, "--set", "data.max_length=6")
    assert result.exit_code == 0
    assert "warning: " in result.stderr
    assert "longer than 6 tokens" in result.stderr


# -- adapters from elsewhere -----------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path, classifier: Path) -> Path:
    """The adapter alone, as PEFT would leave it: no settings, no labels, no tokenizer."""
    (tmp_path / "bare").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(classifier / "out" / name, tmp_path / "bare")
    return tmp_path / "bare"


def test_an_adapter_that_was_trained_elsewhere(bare: Path, classifier: Path) -> None:
    words = ("evaluate", bare, classifier / "test.jsonl", "--base", model_folder("bert"))
    assert "say what is to be scored: --task causal-lm|text-classification" in error(*words)
    assert "--labels a,b,c" in error(*words, "--task", "text-classification")
    batches = ("--set", "training.batch_size=4")  # as its training had them
    done = as_json(*words, "--task", "text-classification", "--labels", "blue, rain, red", *batches)
    want = as_json("evaluate", classifier / "out", *words[2:])
    assert done["metrics"] == want["metrics"]
    other = as_json(*words, "--task", "text-classification", "--labels", "red,rain,blue")
    assert other["metrics"]["loss"] != want["metrics"]["loss"]


def test_labels_that_are_not_as_many_as_the_heads(bare: Path, classifier: Path) -> None:
    words = ("evaluate", bare, classifier / "test.jsonl", "--base", model_folder("bert"), "-t", "text-classification")
    assert "does not fit this BertForSequenceClassification" in error(*words, "--labels", "rain,red")


@pytest.mark.filterwarnings("ignore::kilotune.OtherBaseWarning")  # the head is drawn anew, so it is another base
def test_an_adapter_that_brings_no_head(tmp_path: Path, classifier: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=3)
    get_peft_model(model, LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path)
    words = ("evaluate", tmp_path, classifier / "test.jsonl", "--base", model_folder("bert"))
    text = error(*words, "--task", "text-classification", "--labels", "blue,rain,red")
    assert "brings no weights for classifier, and the base" in text


# -- bad input -------------------------------------------------------------------------------------


def test_bad_input(tmp_path: Path, classifier: Path, language: Path) -> None:
    base = ("--base", model_folder("bert"))
    words = ("evaluate", classifier / "out", classifier / "test.jsonl")
    assert "was trained for text-classification" in error(*words, *base, "--task", "seq2seq")
    assert "is not scored by what the model writes" in error(*words, *base, "--generate")
    assert "give it yourself: --base" in error(*words)  # a path that the adapter names is not opened by itself
    assert "there is no such setting" in error(*words, *base, "--set", "data.maxlength=3")
    assert "no_such.jsonl" in error("evaluate", classifier / "out", tmp_path / "no_such.jsonl", *base)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a", "label": "red"}\n{"text": \n')
    assert "broken.jsonl:2" in error("evaluate", classifier / "out", broken, *base)
    strange = write_jsonl(tmp_path / "strange.jsonl", [{"text": "cat", "label": "reed"}])
    text = error("evaluate", classifier / "out", strange, *base)
    assert "strange.jsonl:1" in text
    assert "class 'reed'" in text
    assert "Did you mean 'red'?" in text
    mine = Path(shutil.copytree(classifier / "out", tmp_path / "mine"))
    (mine / "labels.json").write_text('{"labels": 3}')
    assert "labels.json is damaged" in error("evaluate", mine, classifier / "test.jsonl", *base)
    lm = ("evaluate", language / "out", language / "test.jsonl", "--base")
    assert "error: --base: 'owner/nothing' is no folder here" in error(*lm, "owner/nothing")
    fits = model_folder("llama")
    assert "--labels: causal-lm has no classes" in error(*lm, fits, "--labels", "a,b")
    idle = error(*lm, fits, "--set", "data.train=x.jsonl", "--set", "training.epochs=1", "--set", "data.loss_on=all")
    assert "data.train: has no effect on a score" in idle
    assert "training.epochs: has no effect on a score" in idle
    assert "loss_on: has no effect" not in idle


def test_an_adapter_of_another_base(language: Path) -> None:
    """One of other sizes, and one whose weights alone are others, which a training remembers."""
    words = ("evaluate", language / "out", language / "test.jsonl", "--base")
    assert "another base" in error(*words, model_folder("llama", seed=5))
    assert kilotune(*words, model_folder("gpt2")).exit_code == 2
    said = error("generate", language / "out", "cat", "--base", model_folder("llama", seed=5))
    assert "was trained on another base than" in said
