"""The convolutional network experiment: one pretrained network, adapted with VeRA, with LoRA and in full.

For every seed a network is pretrained on ten classes; three copies of that very network are then trained on a
few classes only, one by each method, on the same pictures in the same order. Everything that the library
promises is measured on the way: what is trained, what stays, merging, saving and loading.
"""

from __future__ import annotations

import copy
import platform
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...config import AdapterConfig
from ...methods import LoraConfig, VeraConfig
from ...model.merging import MergePrecisionWarning
from ...model.parameter_report import count_parameters
from ...model.peft_model import PeftModel, get_peft_model
from ..images.cifar import cifar10
from ..images.convnet import LORA_WIDTHS, VERA_WIDTHS, ConvNet, build
from ..images.digits_data import Data, ImageSet, Progress, digits
from ..images.training import accuracy_among, count_steps, logits_of, one_thread, per_class, thin, train
from .results import AdapterFacts, CnnResult, Counts, MethodRun, SeedRun
from .settings import LORA_ALPHA, LORA_RANK, METHODS, VERA_D_INITIAL, VERA_RANK, CnnSettings

__all__ = ["adapted", "adapter_config", "count", "run"]

CURVE_POINTS = 60
STARTS_AT_ZERO = {"vera": ".vera_lambda_b", "lora": ".lora_B"}
TUTORIAL_COUNTS = {
    ("vera", VERA_WIDTHS): (542, 89_118, 89_660),
    ("lora", LORA_WIDTHS): (3_272, 74_838, 78_110),
}


def run(settings: CnnSettings, progress: Progress | None = None) -> CnnResult:
    """Run the experiment; whether it succeeded is in the result's ``checks``.

    Args:
        settings: what to run.
        progress: told of the work done, in training steps.

    Raises:
        KilotuneError: the data cannot be had, or a training diverged.
    """
    started = time.perf_counter()
    with (
        one_thread(),
        torch.random.fork_rng(devices=[]),
        tempfile.TemporaryDirectory(prefix="kilotune-cnn-") as folder,
    ):
        data = digits() if settings.data == "digits" else cifar10(settings.data_dir, progress)
        stage = _Stage.of(settings, data, Path(folder), progress)
        seeds = [stage.run_seed(seed) for seed in settings.all_seeds]
        first = Path(folder) / str(settings.first_seed)
        adapters = {
            path.relative_to(first).as_posix(): path.read_bytes()
            for method in ("vera", "lora")
            for path in sorted((first / method).iterdir())
        }
    return CnnResult(
        settings=settings,
        source=data.source,
        class_names=data.class_names,
        sizes={"pretraining": len(data.train), "adaptation": len(stage.adapting), "test": len(stage.test)},
        counts=count(settings.first_seed),
        seeds=seeds,
        versions=_versions(),
        seconds=time.perf_counter() - started,
        adapters=adapters,
        samples=_samples(data.test, stage.test),
    )


def adapter_config(method: str, net: ConvNet, seed: int) -> AdapterConfig:
    """The tutorials' "vera" (r 32, a pair per shape) or "lora" (r 4), on every linear layer."""
    if method == "vera":
        return VeraConfig(
            r=VERA_RANK,
            target_modules=net.linear_names,
            projection_prng_key=seed,
            d_initial=VERA_D_INITIAL,
            sharing="shape",
        )
    return LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=net.linear_names)


def count(seed: int = 0) -> list[Counts]:
    """Parameters of VeRA and LoRA side by side on one network, and of LoRA on its own tutorial's."""
    rows = (("vera", VERA_WIDTHS), ("lora", VERA_WIDTHS), ("lora", LORA_WIDTHS))
    return [_count(method, widths, seed) for method, widths in rows]


def _count(method: str, widths: tuple[int, ...], seed: int) -> Counts:
    net = build(widths, seed)
    report = count_parameters(adapted(method, net, seed))
    return Counts(
        method=method,
        rank=VERA_RANK if method == "vera" else LORA_RANK,
        widths=widths,
        trainable=report.trainable,
        frozen=report.frozen_base,
        shared=report.frozen_shared,
        pairs=report.pairs,
        tutorial=TUTORIAL_COUNTS.get((method, widths)),
    )


def adapted(method: str, net: ConvNet, seed: int) -> PeftModel:
    """The network itself, with an adapter whose random start is drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(net, adapter_config(method, net, seed))


@final
@dataclass(frozen=True)
class _Trained:
    """A training's loss curve and its seconds."""

    losses: list[tuple[int, float]]
    seconds: float


@final
@dataclass
class _Stage:
    """What all seeds share, and how far the whole run has come."""

    settings: CnnSettings
    data: Data
    adapting: ImageSet
    test: ImageSet
    folder: Path
    progress: Progress | None
    total_steps: int
    done_steps: int = 0

    @classmethod
    def of(cls, settings: CnnSettings, data: Data, folder: Path, progress: Progress | None) -> _Stage:
        adapting = data.train.only(settings.classes).turned(settings.classes, settings.rotation)
        test = data.test.turned(settings.classes, settings.rotation)
        steps = count_steps(len(data.train), settings.pretraining)
        steps += sum(count_steps(len(adapting), settings.adaptation(method)) for method in METHODS)
        return cls(settings, data, adapting, test, folder, progress, steps * settings.seeds)

    def train(self, what: str, model: torch.nn.Module, images: ImageSet, method: str | None, seed: int) -> _Trained:
        """Train, and keep the progress bar moving."""
        recipe = self.settings.adaptation(method) if method else self.settings.pretraining

        def tick(steps: int) -> None:
            self.done_steps += steps
            if self.progress is not None:
                self.progress(what, self.done_steps, self.total_steps)

        started = time.perf_counter()
        losses = train(model, images, recipe, seed, tick)
        return _Trained(thin(losses, CURVE_POINTS), time.perf_counter() - started)

    def run_seed(self, seed: int) -> SeedRun:
        """Pretrain a network and adapt its copies."""
        net = build(VERA_WIDTHS, seed)
        trained = self.train(f"seed {seed}: pretraining", net, self.data.train, None, seed)
        untouched = logits_of(net, self.data.test)
        start = logits_of(net, self.test)
        return SeedRun(
            seed=seed,
            pretrained=per_class(untouched, self.test.labels, 10),
            before=per_class(start, self.test.labels, 10),
            among=accuracy_among(start, self.test.labels, self.settings.classes),
            losses=trained.losses,
            seconds=trained.seconds,
            runs={method: self.run_method(method, net, seed, start) for method in METHODS},
        )

    def run_method(self, method: str, net: ConvNet, seed: int, start: Tensor) -> MethodRun:
        """Adapt a copy of ``net``, whose outputs are ``start``, and measure it."""
        folder = self.folder / str(seed) / method
        folder.parent.mkdir(exist_ok=True)
        what = f"seed {seed}: {method}"
        if method == "full":
            return self._run_full(what, copy.deepcopy(net), seed, folder)
        return self._run_adapter(what, method, net, seed, start, folder)

    def _run_full(self, what: str, net: ConvNet, seed: int, folder: Path) -> MethodRun:
        trained = self.train(what, net, self.adapting, "full", seed)
        logits = logits_of(net, self.test)
        folder.mkdir()
        save_file(net.state_dict(), folder / "model.safetensors")
        again = copy.deepcopy(net)
        for parameter in again.parameters():
            torch.nn.init.zeros_(parameter)  # so that only loading can make it right
        again.load_state_dict(load_file(folder / "model.safetensors"))
        exact = torch.equal(logits_of(again, self.test), logits)
        return self._measured(trained, logits, folder, exact, None)

    def _run_adapter(self, what: str, method: str, net: ConvNet, seed: int, start: Tensor, folder: Path) -> MethodRun:
        model = adapted(method, copy.deepcopy(net), seed)
        before = _norms(method, model)
        trained = self.train(what, model, self.adapting, method, seed)
        logits = logits_of(model, self.test)
        with model.disable_adapter():
            intact = torch.equal(logits_of(model, self.test), start)
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(copy.deepcopy(net), folder)
        exact = torch.equal(logits_of(again, self.test), logits)
        after = _norms(method, model)
        with warnings.catch_warnings():  # a delta too small to merge well is measured below, and judged
            warnings.simplefilter("ignore", MergePrecisionWarning)
            model.merge_adapter()
        merged = logits_of(model, self.test)
        model.unmerge_adapter()
        facts = AdapterFacts(
            norms={name: (before[name], after[name]) for name in before},
            base_intact=intact,
            merge_difference=((merged - logits).abs().max() / logits.abs().max()).item(),
            merge_changes=int((merged.argmax(1) != logits.argmax(1)).sum()),
            unmerge_exact=torch.equal(logits_of(model, self.test), logits),
        )
        return self._measured(trained, logits, folder, exact, facts)

    def _measured(
        self, trained: _Trained, logits: Tensor, folder: Path, exact: bool, facts: AdapterFacts | None
    ) -> MethodRun:
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        return MethodRun(
            after=per_class(logits, self.test.labels, 10),
            among=accuracy_among(logits, self.test.labels, self.settings.classes),
            losses=trained.losses,
            seconds=trained.seconds,
            reload_exact=exact,
            weight_bytes=sum(size for name, size in sizes.items() if name.endswith(".safetensors")),
            folder_bytes=sum(sizes.values()),
            adapter=facts,
        )


def _norms(method: str, model: PeftModel) -> dict[str, float]:
    """Per layer, the norm of what the method starts at zero."""
    ending = STARTS_AT_ZERO[method]
    parameters: Mapping[str, Tensor] = dict(model.adapter_parameters("default"))
    return {
        name.removesuffix(ending): values.detach().double().norm().item()
        for name, values in parameters.items()
        if name.endswith(ending)
    }


def _samples(plain: ImageSet, turned: ImageSet) -> tuple[Tensor, Tensor]:
    """The first test picture of every class, as it is and as it was turned: two times (10, 3, 32, 32)."""
    rows = torch.stack([(plain.labels == label).nonzero()[0, 0] for label in range(10)])
    return plain.images[rows], turned.images[rows]


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("kilotune")
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        own = "not installed"
    return {
        "kilotune": own,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
