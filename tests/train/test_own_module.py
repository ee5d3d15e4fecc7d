"""``fit_module``: any torch module, with pairs of inputs and labels."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kilotune import PeftModel
from kilotune.errors import ConfigError, TargetError
from kilotune.train import fit_module

FILE = "adapter_model.safetensors"
QUIET: dict[str, Any] = {"device": "cpu", "progress": "quiet"}


class Net(nn.Module):
    """A convolution with a batch norm and dropout, then a layer: (rows, 2, 6, 6) -> (rows, 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(4 * 16, 3)
        with torch.no_grad():  # as if it had been trained
            self.norm.running_mean.uniform_(-0.5, 0.5)
            self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        hidden = self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1)
        return self.out(hidden if scale is None else hidden * scale[:, None])


def rows(count: int = 24, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 2, 6, 6, generator=generator)
    return TensorDataset(inputs, inputs.sum((1, 2, 3)).sign().long() + 1)


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((outputs.argmax(-1) == labels).mean())}


OPTIONS: dict[str, Any] = {"method": "lora", "options": {"r": 2}, "epochs": 3, "batch_size": 8, "learning_rate": 2e-2}


def test_it_learns_and_its_adapter_gives_the_trained_model_again(tmp_path: Path) -> None:
    net = Net()
    twin = copy.deepcopy(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model, result = fit_module(
        net,
        rows(),
        nn.functional.cross_entropy,
        tmp_path / "out",
        validation=rows(16, 1),
        test=rows(16, 2),
        metrics=accuracy,
        best_metric="accuracy",
        **OPTIONS,
        **QUIET,
    )
    losses = [record["loss"] for record in result.history if record["kind"] == "train"]
    assert len(losses) >= 1
    assert result.steps == 9
    # Independent: the module itself, on the test rows.
    inputs, labels = rows(16, 2).tensors
    with torch.no_grad():
        outputs = model.eval()(inputs)
    assert result.metrics["test"]["accuracy"] == pytest.approx(float((outputs.argmax(-1) == labels).float().mean()))
    assert result.metrics["test"]["loss"] == pytest.approx(
        float(nn.functional.cross_entropy(outputs, labels)), rel=1e-5
    )
    # The base is as it was, the batch norm's statistics too, and base and files are the trained model.
    base = model.get_base_model().state_dict()
    assert all(torch.equal(base[name], value) for name, value in before.items() if name in base)
    assert torch.equal(net.norm.running_mean, before["norm.running_mean"])
    again = PeftModel.from_pretrained(twin, tmp_path / "out").eval()
    assert torch.equal(again(inputs), outputs)


def test_the_loss_falls(tmp_path: Path) -> None:
    run = {**OPTIONS, "epochs": 12}
    model, _ = fit_module(Net(), rows(), nn.functional.cross_entropy, tmp_path / "out", **run, **QUIET)
    inputs, labels = rows().tensors
    with torch.no_grad():
        trained = nn.functional.cross_entropy(model.eval()(inputs), labels)
        plain = nn.functional.cross_entropy(Net().eval()(inputs), labels)
    assert trained < 0.8 * plain


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_modules_of_several_inputs(form: str, tmp_path: Path) -> None:
    inputs, labels = rows().tensors
    scale = torch.ones(len(labels))
    pairs = [((x, s) if form == "tuple" else {"x": x, "scale": s}, y) for x, s, y in zip(inputs, scale, labels)]
    one = tmp_path / "one"
    fit_module(Net(), pairs, nn.functional.cross_entropy, one, **OPTIONS, **QUIET)  # type: ignore[arg-type]
    fit_module(Net(), rows(), nn.functional.cross_entropy, tmp_path / "two", **OPTIONS, **QUIET)
    found = [load_file(tmp_path / name / FILE) for name in ("one", "two")]
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items()), "a scale of 1 changes nothing"


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        net = Net()
        net.drop.p = 0.0
        run = {**OPTIONS, "batch_size": batch, "accumulation": accumulation, "epochs": 1, "max_steps": 1}
        _, result = fit_module(net, rows(), nn.functional.cross_entropy, tmp_path / str(batch), **run, **QUIET)
        found.append(next(record for record in result.history if record["kind"] == "train"))
    assert found[1]["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-4)
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-4)


def test_full_fine_tuning_saves_the_module(tmp_path: Path) -> None:
    run = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2}
    model, result = fit_module(
        Net(), rows(), nn.functional.cross_entropy, tmp_path / "out", method="full", **run, **QUIET
    )
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(model.norm.running_mean, Net().norm.running_mean), "its statistics are its own"
    assert result.trained == sum(p.numel() for p in Net().parameters())


def test_gone_on_with_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    from kilotune.train.running.events import Event, Listener

    class Stop(Listener):
        def hear(self, event: Event) -> None:
            if event.kind == "step" and event.step == 5:
                raise KeyboardInterrupt

        def close(self) -> None: ...

    from kilotune.train import own_module as modules

    run = {**OPTIONS, "save_every": 2}
    loss = nn.functional.cross_entropy
    fit_module(Net(), rows(), loss, tmp_path / "whole", **run, **QUIET)
    real = modules.progress_for
    modules.progress_for = lambda *args, **kwargs: Stop()  # type: ignore[assignment]
    try:
        with pytest.raises(KeyboardInterrupt):
            fit_module(Net(), rows(), loss, tmp_path / "out", **run, **QUIET)
    finally:
        modules.progress_for = real
    fit_module(Net(), rows(), loss, tmp_path / "out", resume=True, **run, **QUIET)
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    other = Net()
    with torch.no_grad():
        other.out.weight.add_(1.0)
    with pytest.raises(ConfigError, match="its weights are not those that the run began with"):
        fit_module(other, rows(), loss, tmp_path / "out", resume=True, **run, **QUIET)


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path) -> None:
    loss, out = nn.functional.cross_entropy, tmp_path / "out"

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(rows())

    for given, said in (
        ({"train": []}, "train: has no rows"),
        ({"train": [torch.ones(2)] * 4}, "train: expected rows of .inputs, labels., got a torch.Tensor"),
        ({"train": Stream()}, "train: a .*Stream has no length"),
        ({"train": rows(), "validation": []}, "validation: has no rows"),
        ({"train": rows(), "epochs": 0}, "training.epochs: expected a number above 0"),
        ({"train": rows(), "epoch": 3}, "training.epoch: there is no such setting. Did you mean 'epochs'"),
        ({"train": rows(), "method": "lorra"}, "Did you mean 'lora'"),
        ({"train": rows(), "early_stopping": 2}, "training.early_stopping: 2 needs a validation split"),
    ):
        with pytest.raises(ConfigError, match=said):
            fit_module(Net(), given.pop("train"), loss, out, **{**QUIET, **given})
    with pytest.raises(TargetError, match="no module is called 'outt'"):
        fit_module(Net(), rows(), loss, out, options={"target_modules": ["outt"]}, **QUIET)
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is there and not empty"):
        fit_module(Net(), rows(), loss, out, **QUIET)


def test_the_folder_says_what_it_was(tmp_path: Path) -> None:
    fit_module(Net(), rows(), nn.functional.cross_entropy, tmp_path / "out", **OPTIONS, **QUIET)
    assert not (tmp_path / "out" / "kilotune-train.yaml").exists(), "no file could say what the module and its data are"
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["steps"] == 9
