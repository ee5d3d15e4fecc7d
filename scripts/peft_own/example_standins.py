"""What stands in for the hub's data, an accelerator and absent packages while an example script of PEFT runs.

All of it is put in place before the script is run, at the edges that the script itself calls, and none inside
of PEFT or of kilotune.peft.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

ROWS = 16
WORDS = ("fox", "dog", "river", "sea")


def texts(what: str, rows: int = ROWS) -> list[str]:
    """Short texts that differ."""
    return [f"the {WORDS[row % len(WORDS)]} and number {row}: {what}" for row in range(rows)]


def columns(*names: str) -> dict[str, list[Any]]:
    """Columns of text."""
    return {name: texts(name) for name in names}


def numbered(name: str, count: int = 2) -> dict[str, list[Any]]:
    """A column of class numbers."""
    return {name: [row % count for row in range(ROWS)]}


def complaints() -> Any:
    """Tweets with the number of a class, whose names the column knows."""
    from datasets import ClassLabel, Dataset

    rows = {"Tweet text": texts("tweet"), "ID": list(range(ROWS)), **numbered("Label")}
    return Dataset.from_dict(rows).cast_column("Label", ClassLabel(names=["complaint", "no_complaint"]))


def chats() -> dict[str, list[Any]]:
    """Conversations of two messages."""
    return {"messages": [[{"role": "user", "content": t}, {"role": "assistant", "content": t}] for t in texts("said")]}


DATA: Mapping[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
    "yahma/alpaca-cleaned": (("train",), lambda: columns("instruction", "input", "output")),
    "meta-math/MetaMathQA": (("train",), lambda: columns("query", "response")),
    "meta-math/MetaMathQA-40K": (("train",), lambda: columns("query", "response")),
    "timdettmers/openassistant-guanaco": (("train", "test"), lambda: {"text": texts("said", 64)}),
    "tiny/chats": (("train", "test"), chats),
    "smangrul/amazon_esci": (
        ("train", "validation"),
        lambda: {**columns("query", "product_title"), **numbered("relevance_label")},
    ),
    "json": (("train", "validation"), lambda: columns("sentence", "label")),
    "parquet": (("train", "test"), complaints),
    "glue": (
        ("train", "validation", "test"),
        lambda: {**columns("sentence1", "sentence2"), **numbered("label"), "idx": list(range(ROWS))},
    ),
    "zeroshot/twitter-financial-news-sentiment": (
        ("train", "validation"),
        lambda: {"text": texts("tweet", 160), "label": [row % 3 for row in range(160)]},
    ),
    "Abirate/english_quotes": (("train",), lambda: columns("quote")),
}


def made(name: str, split: str | None) -> Any:
    """The rows of a data set: of one split, or of all."""
    from datasets import Dataset, DatasetDict

    splits, rows = DATA[name]
    whole = rows()
    data = whole if isinstance(whole, Dataset) else Dataset.from_dict(whole)
    return DatasetDict(dict.fromkeys(splits, data)) if split is None else data


def data(allowed: tuple[str, ...]) -> None:
    """``load_dataset`` gives the stand-ins of these names, and fails on all others."""
    import datasets

    def load(path: str, *args: Any, split: str | None = None, **kwargs: Any) -> Any:
        if path not in allowed:
            raise LookupError(f"no rows stand in for the data set {path!r}")
        return made(path, split)

    datasets.load_dataset = load


def accelerator() -> None:
    """A script that takes the first accelerator without asking whether there is one gets the CPU; libraries do not."""
    import torch

    original = torch.accelerator.current_accelerator

    def current(check_available: bool = False) -> Any:
        found = original(check_available)
        asked = sys._getframe(1).f_globals.get("__name__")
        return torch.device("cpu") if found is None and asked == "__main__" else found

    torch.accelerator.current_accelerator = current
    for name in ("empty_cache", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        setattr(torch.cpu, name, lambda: 0)


def training_arguments(halves: bool) -> None:
    """On the CPU, without what the installed transformers no longer takes and, with ``halves``, without fp16."""
    import transformers

    original: Any = transformers.TrainingArguments.__init__
    known = set(inspect.signature(original).parameters)

    @functools.wraps(original)
    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name in known}
        if halves:
            kwargs["fp16"] = False
        original(self, *args, **{**kwargs, "use_cpu": True})

    transformers.TrainingArguments.__init__ = start

    auto: Any = transformers.AutoModelForSequenceClassification
    load = auto.from_pretrained
    auto.from_pretrained = lambda *args, max_length=None, **kwargs: load(*args, **kwargs)


class Metric:
    """In the place of one of ``evaluate``'s, by scikit-learn."""

    def __init__(self, name: str) -> None:
        self.name, self.scores, self.truth = name, [], []  # type: tuple[str, list[float], list[float]]

    def add_batch(self, references: Any, predictions: Any = None, prediction_scores: Any = None) -> None:
        """Rows to score."""
        self.scores += (predictions if predictions is not None else prediction_scores).tolist()
        self.truth += references.tolist()

    def compute(self) -> dict[str, float]:
        """The score of the rows so far, which are forgotten."""
        from sklearn import metrics

        score = metrics.roc_auc_score if self.name == "roc_auc" else metrics.accuracy_score
        value = float(score(self.truth, self.scores))
        self.scores, self.truth = [], []
        return {self.name: value}


def evaluate() -> None:
    """A package ``evaluate``, where there is none."""
    package = ModuleType("evaluate")
    package.load = lambda name, *args, **kwargs: Metric(name)  # type: ignore[attr-defined]
    sys.modules["evaluate"] = package


def hub(home: Path) -> None:
    """Pushing writes into the hub's cache, where loading looks."""
    import huggingface_hub
    import peft

    from peft_own.models import place

    def push(self: Any, repo_id: str, **kwargs: Any) -> None:
        self.save_pretrained(str(place(home, repo_id)))

    peft.PeftModel.push_to_hub = push
    for name in ("delete_repo", "notebook_login"):
        setattr(huggingface_hub, name, lambda *args, **kwargs: None)


def pictures(folder: Path) -> None:
    """Two pictures, and a ``torchvision.transforms`` that knows what the script asks of it."""
    import numpy
    import torch
    from PIL import Image

    folder.mkdir()
    for number in range(2):
        pixels = numpy.random.default_rng(number).integers(0, 255, (40, 40, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{number}.png")

    def resize(size: int, interpolation: Any = None) -> Any:
        return lambda image: image.resize((size, size))

    def crop(size: int) -> Any:
        return lambda image: image.crop((0, 0, size, size))

    def to_tensor() -> Any:
        return lambda image: torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255

    def normalize(mean: list[float], std: list[float]) -> Any:
        return lambda tensor: (tensor - mean[0]) / std[0]

    transforms: Any = ModuleType("torchvision.transforms")
    transforms.Compose = lambda steps: lambda image: functools.reduce(lambda value, step: step(value), steps, image)
    transforms.Resize, transforms.CenterCrop, transforms.RandomCrop = resize, crop, crop
    transforms.ToTensor, transforms.Normalize = to_tensor, normalize
    transforms.InterpolationMode = type("InterpolationMode", (), {"BILINEAR": 2})
    package: Any = ModuleType("torchvision")
    package.transforms = transforms
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}
