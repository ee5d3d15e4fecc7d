"""A toy problem for the tests of comparisons: seconds in all, and it counts what is asked of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kilotune.errors import DivergedError
from kilotune.experiments.compare.problem import ModuleProblem, Score, Tick

STEPS = 8


class Toy(ModuleProblem):
    """A line of three layers learns to copy a fixed teacher; the score is exp(-loss). One batch, SGD."""

    name = "toy"
    metric = "exp(-loss)"
    percent = False
    head = ("2",)
    steps = STEPS

    def __init__(self, diverges_above: float = float("inf"), stop_after: int | None = None) -> None:
        self.limit, self.stop_after = diverges_above, stop_after
        self.fitted: list[tuple[str, float, int, float]] = []
        self.tested = 0
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(24, 6, generator=generator)
        self.wanted = self.inputs @ torch.randn(6, 4, generator=generator)

    def describe(self) -> dict[str, Any]:
        return {"problem": "toy", "limit": str(self.limit)}

    def usual(self, method: str) -> dict[str, Any]:
        return {"target_modules": "all-biased" if method == "bitfit" else ("0", "2")}

    def build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def fit(self, model: nn.Module, rate: float, seed: int, budget: float, tick: Tick) -> None:
        if self.stop_after is not None and len(self.fitted) == self.stop_after:
            raise KeyboardInterrupt
        trained = [p for p in model.parameters() if p.requires_grad]
        self.fitted.append((f"{sum(p.numel() for p in trained)}", rate, seed, budget))
        if rate > self.limit:
            raise DivergedError("too large")
        optimizer = torch.optim.SGD(trained, lr=rate)
        order = torch.Generator().manual_seed(seed)
        for _ in range(round(budget * STEPS)):
            rows = torch.randperm(16, generator=order)[:8]
            optimizer.zero_grad()
            self._loss(model, rows).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            tick(1)

    def scores(self, model: nn.Module, test: bool) -> Score:
        with torch.no_grad():
            loss = self._loss(model, torch.arange(16, 20)).item()
            self.tested += test
            seen = (-self._loss(model, torch.arange(20, 24))).exp().item() if test else None
        return Score((-torch.tensor(loss)).exp().item(), loss, seen)

    def batch_loss(self, model: nn.Module) -> Tensor:
        return self._loss(model, torch.arange(8))

    def _loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(self.inputs[rows]), self.wanted[rows])
