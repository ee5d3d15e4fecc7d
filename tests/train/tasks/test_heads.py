"""Tasks with a head on text: classes, numbers, tags; and sequence to sequence. Real tokenizers, models and Trainer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import kilotune
from kilotune.errors import ConfigError
from kilotune.train import metrics
from kilotune.train.tasks import TASKS, Limits, Prepared
from tests.support.train_data import byte_level, corpus, docstrings, jsonl, metaspace, settings, word_piece

BERT = Limits(max_length=128, pad_token_id=0, vocabulary=300)
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def prepare(task: str, path: str | None, tokenizer: Any = None, limits: Limits = BERT, **data: Any) -> Prepared:
    tokenizer = word_piece() if tokenizer is None else tokenizer
    return TASKS[task]().prepare(settings(train=path, **data), tokenizer, limits, 0)


def fault(task: str, path: str | None, *args: Any, **data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(task, path, *args, **data)
    return str(caught.value)


def trainer(model: Any, prepared: Prepared, folder: Path, steps: int = 1, rate: float = 1e-2) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=rate,
        per_device_train_batch_size=8,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        data_collator=prepared.collate,
        compute_metrics=prepared.metrics,
        preprocess_logits_for_metrics=prepared.reduce_logits,
    )


def rows_of(texts: dict[str, list[str]], size: int = 200) -> list[dict[str, str]]:
    return [{"text": text[:size], "label": name} for name, held in texts.items() for text in held]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Docstrings by the module that they stand in."""
    return jsonl(tmp_path_factory.mktemp("heads") / "classes.jsonl", rows_of(docstrings()))


# -- text classification -------------------------------------------------------------------------------


def test_texts_are_tokenised_as_the_tokenizer_does_and_classes_numbered(classes: str) -> None:
    tokenizer = word_piece()
    prepared = prepare("text-classification", classes, max_length=40)
    rows = rows_of(docstrings())
    names = tuple(sorted(docstrings()))
    assert prepared.labels == names
    wanted = tokenizer([row["text"] for row in rows], truncation=True, max_length=40)["input_ids"]
    assert [row["input_ids"].tolist() for row in prepared.train] == wanted
    assert [int(row["labels"]) for row in prepared.train] == [names.index(row["label"]) for row in rows]
    assert prepared.tokens == sum(map(len, wanted))
    whole = [len(ids) for ids in tokenizer([row["text"] for row in rows])["input_ids"]]
    long, lost = sum(size > 40 for size in whole), sum(max(0, size - 40) for size in whole)
    assert prepared.notes[0].startswith(f"{long} of {len(rows)} rows of train (")
    assert prepared.notes[0].endswith(f"longer than 40 tokens: cut there; {lost:,} tokens are lost")
    assert prepared.notes[1] == "train: " + ", ".join(f"{name}: {len(docstrings()[name])}" for name in names)
    assert prepared.preview.splitlines()[0] == f"{classes}:1: class 'argparse' (0 of 8)"


def test_a_batch_is_padded_and_masked(classes: str) -> None:
    prepared = prepare("text-classification", classes, max_length=40)
    rows = [prepared.train[i] for i in (0, 100, 200)]
    batch = prepared.collate(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        assert batch["input_ids"][i, :size].tolist() == row["input_ids"].tolist()
        assert (batch["input_ids"][i, size:] == 0).all()
        assert batch["attention_mask"][i].sum() == size
        assert batch["labels"][i] == row["labels"]
    assert batch["labels"].dtype == torch.int64


def test_pairs_have_token_types_and_single_texts_have_not(tmp_path: Path) -> None:
    tokenizer = word_piece()
    rows = [{"text": "one thing", "text_pair": "and another", "label": i % 2} for i in range(4)]
    prepared = prepare("text-classification", jsonl(tmp_path / "pairs.jsonl", rows))
    wanted = tokenizer("one thing", "and another")
    row = prepared.train[0]
    assert row["input_ids"].tolist() == wanted["input_ids"]
    assert row["token_type_ids"].tolist() == wanted["token_type_ids"]
    assert set(wanted["token_type_ids"]) == {0, 1}
    assert prepared.collate([row])["token_type_ids"].tolist() == [wanted["token_type_ids"]]
    single = prepare(
        "text-classification", jsonl(tmp_path / "s.jsonl", [{k: r[k] for k in ("text", "label")} for r in rows])
    )
    assert set(single.train[0]) == {"input_ids", "labels"}


def test_the_head_learns_and_its_scores_are_those_of_its_predictions(tmp_path: Path) -> None:
    rows = [{"text": text[:90], "label": "long" if len(text) > 90 else "short"} for text in corpus()[:150]]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare("text-classification", path, max_length=40, validation_fraction=0.2)
    options = TASKS["text-classification"]().model_options(prepared)
    assert options["problem_type"] == "single_label_classification"
    assert options["id2label"] == dict(enumerate(prepared.labels))
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **options))
    runner = trainer(model, prepared, tmp_path, steps=15, rate=3e-3)
    before = runner.evaluate()
    runner.train()
    after = runner.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    model.eval()
    with torch.no_grad():
        said = [int(model(**prepared.collate([row])).logits.argmax()) for row in prepared.validation]
    right = [a == int(row["labels"]) for a, row in zip(said, prepared.validation)]
    assert after["eval_accuracy"] == pytest.approx(np.mean(right))


def test_whole_numbers_are_classes_in_their_order_and_truth_values_too(tmp_path: Path) -> None:
    for held, names in (([10, 9, 2, 10], ("2", "9", "10")), ([True, False, True], ("False", "True"))):
        path = jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": label} for label in held])
        prepared = prepare("text-classification", path)
        assert prepared.labels == names
        assert [names[int(row["labels"])] for row in prepared.train] == list(map(str, held))


def test_classes_of_files_of_different_kinds_are_the_same(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": i} for i in (0, 1, 1)])
    test = tmp_path / "test.csv"
    test.write_text("text,label\na,1\n")
    prepared = prepare("text-classification", train, test=str(test))
    assert [int(row["labels"]) for row in prepared.test] == [1]


def test_one_class_and_unseen_classes_are_named_together(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": "good"}] * 3)
    test = jsonl(tmp_path / "test.jsonl", [{"text": "a", "label": label} for label in ("good", "goodd", "bad", "bad")])
    lines = fault("text-classification", train, test=test).splitlines()
    assert lines[0] == "the classes do not fit:"
    assert "column 'label' has the one class 'good' in all its rows, so there is nothing to learn" in lines[1]
    assert lines[2] == (
        f"  - {test}:2: class 'goodd' (1 times in data.test) is not in data.train. Did you mean 'good'? Classes: 'good'"
    )
    assert f"{test}:3: class 'bad' (2 times in data.test) is not in data.train. Classes:" in lines[3]


def test_a_data_set_s_own_class_list_counts_even_where_a_class_has_no_row(tmp_path: Path) -> None:
    import datasets

    names = ["no", "maybe", "yes"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    prepared = prepare("text-classification", str(tmp_path / "rows.parquet"))
    assert prepared.labels == tuple(names)
    assert [int(row["labels"]) for row in prepared.train] == [2, 0]
    assert prepared.notes[-1] == "train: no: 1, maybe: 0, yes: 1"


def test_a_head_that_is_there_decides_the_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": label} for label in ("x", "y")])
    kept = Limits(128, 0, 300, labels=("y", "z", "x"))
    prepared = prepare("text-classification", path, None, kept)
    assert prepared.labels == ("y", "z", "x")
    assert [int(row["labels"]) for row in prepared.train] == [2, 0]
    scored = TASKS["text-classification"]().prepare(settings(test=path), word_piece(), kept, 0)
    assert [int(row["labels"]) for row in scored.test] == [2, 0]
    text = fault("text-classification", path, None, Limits(128, 0, 300, labels=("y", "z")))
    assert f"{path}:1: class 'x' (1 times in data.train) is not of the model's head. Classes: 'y', 'z'" in text


def test_faults_of_texts_and_labels_come_together(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"text": "a", "label": "x"},
        {"text": 5, "label": "y"},
        {"text": "b"},
        {"text": "c", "label": [1]},
    ]
    text = fault("text-classification", jsonl(tmp_path / "rows.jsonl", rows))
    assert sorted(re.findall(r"rows.jsonl:(\d)", text)) == ["2", "3", "4"]


@pytest.mark.parametrize("task", [name for name in TASKS if name != "causal-lm"])
def test_settings_without_effect_are_refused(task: str, classes: str) -> None:
    text = fault(task, classes, packing=True, loss_on="all")
    assert f"data.packing: has no effect on task {task!r}" in text
    assert f"data.loss_on: has no effect on task {task!r}" in text


def test_a_decoder_without_a_pad_token_can_be_a_classifier(classes: str, tmp_path: Path) -> None:
    """The tokenizer is told to pad with its end-of-text, which is what the model's config then gets."""
    tokenizer = byte_level(pad_token=None)
    prepared = prepare("text-classification", classes, tokenizer, Limits(64, None, 400), validation_fraction=0.1)
    options = TASKS["text-classification"]().model_options(prepared)
    config = transformers.GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=1, n_head=2, **options)
    config.pad_token_id = tokenizer.pad_token_id
    model = transformers.GPT2ForSequenceClassification(config).eval()
    rows = [prepared.train[i] for i in range(5)]
    with torch.no_grad():
        together = model(**prepared.collate(rows)).logits
        alone = torch.cat([model(**prepared.collate([row])).logits for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# -- regression ----------------------------------------------------------------------------------------


def test_regression_learns_numbers(tmp_path: Path) -> None:
    rows = [{"text": text[:120], "score": len(text[:120]) / 60} for text in corpus()[:150]]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare("regression", path, max_length=40, columns={"label": "score"}, validation_fraction=0.2)
    assert prepared.labels is None
    held = [row["labels"] for part in (prepared.train, prepared.validation) for row in part]
    assert sorted(held) == pytest.approx(sorted(row["score"] for row in rows))
    assert re.match(r"train: numbers from [\d.]+ to 2, mean 1\.\d+, standard deviation 0\.\d+", prepared.notes[-2])
    options = TASKS["regression"]().model_options(prepared)
    assert options == {"problem_type": "regression", "num_labels": 1}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **options))
    runner = trainer(model, prepared, tmp_path, steps=12, rate=3e-3)
    before = runner.evaluate()
    runner.train()
    scores = runner.evaluate()
    assert scores["eval_loss"] == pytest.approx(scores["eval_mse"], rel=1e-5)
    assert scores["eval_mse"] < before["eval_mse"]
    found = runner.predict(prepared.validation)
    assert scores["eval_pearson"] == pytest.approx(np.corrcoef(found.predictions, found.label_ids)[0, 1], rel=1e-4)


def test_numbers_that_are_none_or_all_the_same(tmp_path: Path) -> None:
    bad = jsonl(
        tmp_path / "bad.jsonl", [{"text": "a", "label": value} for value in (1, "x", float("nan"), None, 10**400)]
    )
    assert sorted(re.findall(r"bad.jsonl:(\d)", fault("regression", bad))) == ["2", "3", "4", "5"]
    same = jsonl(tmp_path / "same.jsonl", [{"text": "a", "label": 2.5}] * 3)
    assert "the number is 2.5 in all rows, so there is nothing to learn" in fault("regression", same)
    table = tmp_path / "rows.csv"
    table.write_text("text,label\na,1.5\nb,-2\nc,three\n")
    assert "rows.csv:4: 'label' is 'three', and should be a finite number" in fault("regression", str(table))


# -- token classification ------------------------------------------------------------------------------


def tagged(texts: Sequence[str]) -> list[dict[str, list[str]]]:
    """Words in capitals are entities, those in the middle of a run of them go on."""
    rows = []
    for text in texts:
        words = text.split()[:30]
        capital = [word[:1].isupper() for word in words]
        tags = ["O" if not now else "I-CAP" if i and capital[i - 1] else "B-CAP" for i, now in enumerate(capital)]
        rows.append({"tokens": words, "tags": tags})
    return rows


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return jsonl(tmp_path_factory.mktemp("heads") / "words.jsonl", tagged(corpus()))


def test_the_first_token_of_a_word_carries_its_tag(words: str) -> None:
    """By hand: every word is tokenised by itself, and its pieces put one after the other."""
    tokenizer = word_piece()
    prepared = prepare("token-classification", words, max_length=128)
    names = ("B-CAP", "I-CAP", "O")
    assert prepared.labels == names
    for row, made in zip(tagged(corpus()), prepared.train):
        ids, labels = [tokenizer.cls_token_id], [-100]
        for word, tag in zip(row["tokens"], row["tags"]):
            pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
            ids += pieces
            labels += [names.index(tag), *([-100] * (len(pieces) - 1))]
        ids, labels = [*ids, tokenizer.sep_token_id], [*labels, -100]
        if len(ids) <= 128:
            assert (made["input_ids"].tolist(), made["labels"].tolist()) == (ids, labels)


def test_words_that_are_cut_off_or_vanish_are_counted(tmp_path: Path) -> None:
    rows = [{"tokens": ["one"] * 30, "tags": [1] * 30}, {"tokens": ["two", "\u200b", "\u00ad"], "tags": [0, 1, 1]}]
    tokenizer = word_piece()
    each = len(tokenizer("one", add_special_tokens=False)["input_ids"])
    prepared = prepare("token-classification", jsonl(tmp_path / "rows.jsonl", rows), max_length=20)
    kept = -(-18 // each)  # a word counts when its first token is there
    assert prepared.labels == ("0", "1")
    assert (
        f"1 of 2 rows of train (50 %) longer than 20 tokens: cut there; {30 - kept} words are lost" in prepared.notes[0]
    )
    assert (prepared.train[0]["labels"] != -100).sum() == kept
    vanished = [note for note in prepared.notes if "leaves nothing" in note]
    count = sum(not tokenizer(word, add_special_tokens=False)["input_ids"] for word in rows[1]["tokens"])
    assert count > 0
    assert vanished == [f"train: of {count} words the tokenizer leaves nothing; they are not learned or scored"]


@pytest.mark.parametrize(("make", "limits"), [(byte_level, Limits(256, 1, 400)), (metaspace, Limits(256, 2, 700))])
def test_words_are_read_as_a_text_whatever_the_tokenizer(make: Any, limits: Limits, words: str) -> None:
    """Tokens from one label to the next are the word that the label is for, and all of them are the text."""
    tokenizer = make()
    prepared = prepare("token-classification", words, tokenizer, limits, limit=30)
    assert prepared.labels is not None
    for row, made in zip(tagged(corpus()), prepared.train):
        ids = made["input_ids"]
        assert ids.tolist() == tokenizer(" ".join(row["tokens"]))["input_ids"]
        starts = [*np.flatnonzero(made["labels"] != -100), len(ids)]
        found = [tokenizer.decode(ids[a:b]).strip() for a, b in pairwise(starts)]
        assert found == row["tokens"]
        assert [prepared.labels[i] for i in made["labels"][starts[:-1]]] == row["tags"]


def test_entity_scores_come_out_of_the_trainer(words: str, tmp_path: Path) -> None:
    prepared = prepare("token-classification", words, max_length=48, validation_fraction=0.2)
    assert (prepared.best_metric, prepared.greater_is_better) == ("f1", True)
    torch.manual_seed(0)
    options = TASKS["token-classification"]().model_options(prepared)
    model = transformers.BertForTokenClassification(transformers.BertConfig(**SIZES, **options))
    runner = trainer(model, prepared, tmp_path)
    scores = runner.evaluate()
    found = runner.predict(prepared.validation)
    right = found.predictions[found.label_ids != -100] == found.label_ids[found.label_ids != -100]
    assert scores["eval_accuracy"] == pytest.approx(right.mean())
    assert right.size == sum((row["labels"] != -100).sum() for row in prepared.validation)
    assert {"eval_f1", "eval_precision", "eval_recall"} <= set(scores)


def test_bad_tags_are_named(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"tokens": ["a", "b"], "tags": ["O", "B-X"]},
        {"tokens": ["a", "b"], "tags": ["O"]},
        {"tokens": "a b", "tags": ["O", "O"]},
        {"tokens": ["a"], "tags": [None]},
    ]
    text = fault("token-classification", jsonl(tmp_path / "rows.jsonl", rows))
    assert "rows.jsonl:2: 2 words and 1 tags; each word needs one" in text
    assert "rows.jsonl:3: 'tokens' is 'a b', and should be a list of words" in text
    assert "rows.jsonl:4: 'tags' has an item 1 that is None" in text
    train = jsonl(tmp_path / "train.jsonl", rows[:1])
    test = jsonl(tmp_path / "test.jsonl", [{"tokens": ["a"], "tags": ["B-Y"]}])
    assert "test.jsonl:1: class 'B-Y' (1 times in data.test) is not in data.train. Did you mean 'B-X'?" in fault(
        "token-classification", train, test=test
    )


def test_other_tags_are_scored_as_classes(tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "end"], "tags": ["DET", "NOUN"]}] * 2
    prepared = prepare("token-classification", jsonl(tmp_path / "rows.jsonl", rows))
    assert prepared.best_metric == "f1_macro"
    assert prepared.preview.splitlines()[1:3] == ["      | [CLS]", "learn > the  DET"]


# -- sequence to sequence ------------------------------------------------------------------------------


def t5(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 700, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2, "d_kv": 16}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0, **more))


@pytest.fixture(scope="module")
def summaries(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{"source": text, "target": text.split("\n")[0]} for text in corpus()]
    return jsonl(tmp_path_factory.mktemp("heads") / "summaries.jsonl", rows)


def test_sources_and_targets(summaries: str) -> None:
    tokenizer = metaspace(pad_token="<unk>")
    prepared = prepare("seq2seq", summaries, tokenizer, Limits(None, 0, 700), max_length=64)
    for text, row in zip(corpus(), prepared.train):
        assert row["input_ids"].tolist() == tokenizer(text, truncation=True, max_length=64)["input_ids"]
        assert row["labels"].tolist() == tokenizer(text_target=text.split("\n")[0])["input_ids"][:64]
    assert prepared.notes[0].startswith("source: ")
    head, *lines = prepared.preview.splitlines()
    assert head.startswith(f"{summaries}:1: 64 tokens read, ")
    assert lines[-1] == f"learn > <s> {corpus()[0].splitlines()[0]}"
    batch = prepared.collate([prepared.train[0], prepared.train[1]])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


def test_a_seq2seq_model_is_scored_by_its_tokens_and_by_what_it_writes(summaries: str, tmp_path: Path) -> None:
    tokenizer = metaspace(pad_token="<unk>")
    prepared = prepare(
        "seq2seq", summaries, tokenizer, Limits(None, 0, 700), max_length=24, limit=40, validation_fraction=0.2
    )
    task = TASKS["seq2seq"]()
    model = kilotune.get_peft_model(t5(), kilotune.LoraConfig(r=2, target_modules=["q", "v"], task_type=task.task_type))
    runner = trainer(model.get_base_model(), prepared, tmp_path)
    scores = runner.evaluate()
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in prepared.validation:
            output = model(**prepared.collate([row]))
            total += output.loss.item() * len(row["labels"])
            count += len(row["labels"])
    assert scores["eval_perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)
    texts = [[], []]
    with torch.no_grad():
        for row in prepared.validation:
            batch = prepared.collate([row])
            made = model.generate(input_ids=batch["input_ids"], max_length=20, do_sample=False)[0]
            for held, ids in zip(texts, (made, row["labels"])):
                held.append(tokenizer.decode(ids, skip_special_tokens=True))
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=3,
        predict_with_generate=True,
        generation_max_length=20,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    writer = transformers.Seq2SeqTrainer(
        model=model.get_base_model(),
        args=arguments,
        eval_dataset=prepared.validation,
        data_collator=prepared.collate,
        compute_metrics=prepared.metrics,
        preprocess_logits_for_metrics=prepared.reduce_logits,
    )
    written = writer.evaluate()
    wanted = metrics.generation(*texts)
    assert {name: written[f"eval_{name}"] for name in wanted} == wanted
    assert set(wanted) == {"bleu", "chrf", "exact_match"}


def test_a_model_that_writes_the_target_has_full_marks(summaries: str) -> None:
    """A stand-in that repeats what it is asked for; scored as transformers' Seq2SeqTrainer hands it in."""
    tokenizer = metaspace(pad_token="<unk>")
    prepared = prepare("seq2seq", summaries, tokenizer, Limits(None, 0, 700), max_length=24, limit=12)
    labels = prepared.collate(list(map(prepared.train.__getitem__, range(12))))["labels"].numpy()
    assert (labels == -100).any()
    said = np.concatenate([np.zeros((12, 1), np.int64), labels], axis=1)
    assert prepared.metrics(SimpleNamespace(predictions=said, label_ids=labels)) == {
        "bleu": pytest.approx(100),
        "chrf": pytest.approx(100),
        "exact_match": 1.0,
    }
    other = SimpleNamespace(predictions=said[::-1], label_ids=labels)
    assert prepared.metrics(other)["exact_match"] < 1


# -- processors ----------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_not_there_says_what_the_folder_has(tmp_path: Path) -> None:
    task = TASKS["text-classification"]()
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ConfigError, match=r"no tokenizer can be loaded from .*\(the folder has: notes.txt\)"):
        task.load_processor(str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"no tokenizer for 'someone/nothing': it is no folder here, and the hub.*HF_HOME"
    ):
        task.load_processor("someone/nothing")
    word_piece().save_pretrained(tmp_path)
    assert task.load_processor(str(tmp_path))("a text")["input_ids"] == word_piece()("a text")["input_ids"]
