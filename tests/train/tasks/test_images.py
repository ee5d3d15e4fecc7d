"""Image classification from folders, tables and lists: scikit-learn's digits, a real image processor, a ViT."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits

from kilotune.errors import ConfigError
from kilotune.train.data.images import open_image
from kilotune.train.tasks import TASKS, Limits, Prepared
from tests.support.train_data import jsonl, settings

SIZE = 16
CONFIG: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": SIZE, "width": SIZE},
    "image_mean": [0.5, 0.25, 0.5],
    "image_std": [0.5, 0.25, 0.125],
    "resample": 2,
}


def digit(number: int) -> Image.Image:
    return Image.fromarray((load_digits().images[number] * 15.9).astype(np.uint8))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder, as far as an image processor needs it."""
    folder = tmp_path_factory.mktemp("vit")
    (folder / "preprocessor_config.json").write_text(json.dumps(CONFIG))
    transformers.ViTConfig(image_size=SIZE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 60 digits as files, a folder for each class."""
    folder = tmp_path_factory.mktemp("digits")
    for i, label in enumerate(load_digits().target[:60]):
        (folder / str(label)).mkdir(exist_ok=True)
        digit(i).save(folder / str(label) / f"{i:02}.png")
    return folder


def prepare(base: str, path: Any, limits: Limits = Limits(), **data: Any) -> Prepared:  # noqa: B008  # frozen
    task = TASKS["image-classification"]()
    return task.prepare(settings(train=str(path), **data), task.load_processor(base), limits, 0)


def fault(base: str, path: Any, **data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(base, path, **data)
    return str(caught.value)


def test_pictures_are_prepared_as_the_processor_says(base: str, digits: Path) -> None:
    """By hand: resized bilinearly, divided by 255, the mean taken away and divided by the deviation, per channel."""
    prepared = prepare(base, digits)
    files = sorted(digits.rglob("*.png"), key=lambda path: (path.parent.name, path.name))
    assert prepared.labels == tuple("0123456789")
    assert len(prepared.train) == 60
    for i in (0, 17, 59):
        row = prepared.train[i]
        resized = Image.open(files[i]).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        pixels = torch.tensor(np.asarray(resized, np.float32) / 255).permute(2, 0, 1)
        mean, deviation = (torch.tensor(CONFIG[key])[:, None, None] for key in ("image_mean", "image_std"))
        torch.testing.assert_close(row["pixel_values"], (pixels - mean) / deviation, rtol=1e-5, atol=1e-5)
        assert row["labels"] == int(files[i].parent.name)
    batch = prepared.collate([prepared.train[0], prepared.train[1]])
    assert batch["pixel_values"].shape == (2, 3, SIZE, SIZE)
    assert batch["labels"].tolist() == [0, 0]
    counts = np.bincount(load_digits().target[:60])
    assert prepared.notes == ("train: " + ", ".join(f"{i}: {count}" for i, count in enumerate(counts)),)
    assert prepared.tokens == 0
    assert prepared.preview == (
        f"{digits}/0/00.png: class '0' (0 of 10)\n      | a picture of 8 x 8 pixels; the model sees 3 x {SIZE} x {SIZE}"
    )


def test_the_same_pictures_from_a_list_and_from_parquet(base: str, digits: Path, tmp_path: Path) -> None:
    import datasets

    wanted = prepare(base, digits)
    files = sorted(digits.rglob("*.png"), key=lambda path: (path.parent.name, path.name))
    numbers = [int(path.parent.name) for path in files]
    relative = [os.path.relpath(path, tmp_path) for path in files]  # to the list's own folder
    listed = jsonl(tmp_path / "list.jsonl", [{"file": a, "digit": b} for a, b in zip(relative, numbers)])
    names = {"image": "file", "label": "digit"}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    held = [{"bytes": path.read_bytes(), "path": None} for path in files]
    table = datasets.Dataset.from_dict({"image": held, "label": numbers}, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    for path, columns in ((listed, names), (tmp_path / "rows.parquet", {})):
        prepared = prepare(base, path, columns=columns)
        assert prepared.labels == wanted.labels
        for i in (0, 33, 59):
            torch.testing.assert_close(prepared.train[i]["pixel_values"], wanted.train[i]["pixel_values"])
            assert prepared.train[i]["labels"] == wanted.train[i]["labels"]


def test_a_vit_learns_the_digits_and_is_scored(base: str, digits: Path, tmp_path: Path) -> None:
    prepared = prepare(base, digits, validation_fraction=0.2)
    options = TASKS["image-classification"]().model_options(prepared)
    torch.manual_seed(0)
    sizes = {"image_size": SIZE, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.ViTConfig(**sizes, num_attention_heads=2, initializer_range=0.2, **options)
    model = transformers.ViTForImageClassification(config)
    assert model.config.id2label[7] == "7"
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=15,
        learning_rate=3e-3,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        data_collator=prepared.collate,
        compute_metrics=prepared.metrics,
        preprocess_logits_for_metrics=prepared.reduce_logits,
    )
    before = trainer.evaluate()
    trainer.train()
    scores = trainer.evaluate()
    model.eval()
    with torch.no_grad():
        said = [int(model(pixel_values=row["pixel_values"][None]).logits.argmax()) for row in prepared.validation]
    right = [a == row["labels"] for a, row in zip(said, prepared.validation)]
    assert scores["eval_accuracy"] == pytest.approx(np.mean(right))
    assert scores["eval_loss"] < before["eval_loss"]


# -- bad input -----------------------------------------------------------------------------------------


def test_broken_and_missing_pictures_are_named_together(base: str, tmp_path: Path) -> None:
    digit(0).save(tmp_path / "fine.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [
        {"image": name, "label": i} for i, name in enumerate(("fine.png", "broken.png", "none.png", "fine.png", None))
    ]
    text = fault(base, jsonl(tmp_path / "list.jsonl", rows))
    assert sorted(re.findall(r"list.jsonl:(\d)", text)) == ["2", "3", "5"]
    assert "broken.png: no image that can be opened" in text
    assert f"there is no image {tmp_path}/none.png" in text
    assert "list.jsonl:5: the image is missing" in text


def test_a_picture_that_breaks_off_is_named_when_it_is_used(base: str, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        digit(0).resize((64, 64)).save(tmp_path / name / "1.png")
    path = tmp_path / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:-400])
    prepared = prepare(base, tmp_path)
    assert prepared.train[0]["labels"] == 0
    with pytest.raises(ConfigError, match=rf"{path}: .*a broken image"):
        prepared.train[1]


def test_folders_that_are_laid_out_otherwise(base: str, digits: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert "expected one folder of images per class, found no folder in it" in fault(base, nothing)
    split = tmp_path / "split"
    for name in ("train", "test"):
        (split / name / "a").mkdir(parents=True)
        digit(0).save(split / name / "a" / "1.png")
    assert f"{split} holds splits, not classes: set data.train to {split / 'test'}" in fault(base, split)
    empty = tmp_path / "classes"
    for name in "ab":
        (empty / name).mkdir(parents=True)
    digit(0).save(empty / "a" / "1.png")
    assert f"{empty / 'b'}: no images (known: .png" in fault(base, empty)
    (empty / "b").rmdir()
    assert "has the one class 'a' in all its rows" in fault(base, empty)
    assert "expected a folder with one folder of images per class" in fault(
        base, digits / "0" / "00.png", format="images"
    )
    assert "data.max_length: has no effect on task 'image-classification'" in fault(base, digits, max_length=5)


def test_pictures_of_different_sizes_need_a_processor_that_resizes(tmp_path: Path) -> None:
    for name, size in (("a", 8), ("b", 9)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        digit(0).resize((size, size)).save(tmp_path / "pictures" / name / "1.png")
    model = tmp_path / "model"
    transformers.ViTConfig().save_pretrained(model)
    (model / "preprocessor_config.json").write_text(json.dumps({**CONFIG, "do_resize": False}))
    prepared = prepare(str(model), tmp_path / "pictures")
    with pytest.raises(ConfigError, match=r"images of different shapes \(\(3, 8, 8\), \(3, 9, 9\)\).*do_resize"):
        prepared.collate([prepared.train[0], prepared.train[1]])


def test_a_model_without_an_image_processor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no image processor can be loaded from .*the folder has: config.json"):
        TASKS["image-classification"]().load_processor(str(tmp_path))


def test_images_of_all_kinds_are_opened_as_rgb(tmp_path: Path) -> None:
    grey, see_through = digit(3), digit(3).convert("RGBA")
    for picture in (grey, see_through, grey.convert("P"), grey.convert("1")):
        assert open_image(picture, None).mode == "RGB"
    memory = io.BytesIO()
    grey.save(memory, "PNG")
    assert np.array_equal(
        np.asarray(open_image({"bytes": memory.getvalue(), "path": "x"}, None)), np.asarray(grey.convert("RGB"))
    )
    with pytest.raises(ConfigError, match="expected an image or its path, got int"):
        open_image(5, None)
    with pytest.raises(ConfigError, match="expected an image or its path, got NoneType"):
        open_image({"bytes": None, "path": None}, None)


@pytest.mark.parametrize("labels", [None, ("3", "x", "0", "1", "2", "4", "5", "6", "7", "8", "9")])
def test_a_kept_head_numbers_the_classes(base: str, digits: Path, labels: tuple[str, ...] | None) -> None:
    prepared = prepare(base, digits, Limits(labels=labels))
    names = labels or tuple("0123456789")
    assert prepared.labels == names
    files = sorted(digits.rglob("*.png"), key=lambda path: (path.parent.name, path.name))
    assert [names[i] for i in prepared.train.labels] == [path.parent.name for path in files]  # type: ignore[attr-defined]
    score = prepared.metrics(SimpleNamespace(predictions=np.array([0, 1]), label_ids=np.array([0, 2])))  # type: ignore[misc]
    assert score["accuracy"] == 0.5
