"""``nn.DataParallel``: its replicas run in threads what ran where they were made, in the backward too.

torch copies to GPUs only. Here its own code makes the replicas, with a broadcast that works on a CPU, and they run in
threads as it runs them.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kilotune import AdapterConfig, BitfitConfig, LoraConfig, UnsupportedError, VeraConfig, get_config, get_peft_model
from kilotune.layers.active_adapters import ActiveState
from kilotune.model.adapter_model import AdapterModel
from tests.support.models import randomize
from tests.support.readers import READERS, WIDTH, seeded

replicate = importlib.import_module("torch.nn.parallel.replicate")
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.count, ctx.each = count, len(tensors)
        copies = [t.clone() for _ in range(count) for t in tensors]
        frozen = [c for c, t in zip(copies, tensors * count) if not t.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *(sum(grads[k * ctx.each + i] for k in range(ctx.count)) for i in range(ctx.each))


def _broadcast(tensors: list[Tensor], devices: list[Any], detach: bool = False) -> list[list[Tensor]]:
    copies = _Copies.apply(len(devices), *tensors) if tensors else ()
    return [list(copies[k * len(tensors) : (k + 1) * len(tensors)]) for k in range(len(devices))]


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", _broadcast)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)


def parallel(model: nn.Module, x: Tensor) -> Tensor:
    """Half of the rows in each of two threads."""
    replicas, parts = replicate.replicate(model, [0, 1]), x.chunk(2)
    found: dict[int, Any] = {}
    recording = torch.is_grad_enabled()

    def work(place: int) -> None:
        torch.set_grad_enabled(recording)
        try:
            found[place] = replicas[place](parts[place])
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found.values():
        if isinstance(one, Exception):
            raise one
    return torch.cat([found[0], found[1]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.down(torch.tanh(self.up(x))))


CONFIGS: dict[str, AdapterConfig] = {
    "vera": VeraConfig(r=4, target_modules=["up", "down"]),
    "lora": LoraConfig(r=2, target_modules=["up", "down"], bias="lora_only"),
    "dora": get_config("dora", r=2, target_modules=["up", "down"]),
    "bitfit": BitfitConfig(target_modules=["up", "down"]),
    "unilora": get_config("unilora", r=2, theta_d_length=5, target_modules=["up", "down"]),
    "whole": LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"]),
}


def model_with(name: str) -> AdapterModel:
    model = get_peft_model(Net().double(), CONFIGS[name], "a")
    model.add_adapter("b", CONFIGS[name])
    for seed, adapter in enumerate(("a", "b")):
        randomize(model, adapter, seed=seed)
    return model.double()


Step = Callable[[AdapterModel, Callable[[nn.Module, Tensor], Tensor], Tensor], Any]


def _plain(model: AdapterModel, run: Any, x: Tensor) -> None:
    run(model, x).square().sum().backward()


def _disabled(model: AdapterModel, run: Any, x: Tensor) -> None:
    with model.disable_adapter():
        run(model, x).square().sum().backward()


def _left(model: AdapterModel, run: Any, x: Tensor) -> None:
    y = run(model, x)
    with model.disable_adapter():
        z = run(model, x)
    (y * z).sum().backward()


def _in_the_replica(model: AdapterModel, run: Any, x: Tensor) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with model.disable_adapter():
                base = self.inner(x)
            return self.inner(x) * base  # type: ignore[no-any-return]

    run(Both(), x).sum().backward()


def gradients(model: AdapterModel, step: Step, run: Any, reentrant: bool | None) -> dict[str, Tensor | None]:
    model.model.reentrant = reentrant
    model.zero_grad()
    x = X.clone().requires_grad_()
    step(model, run, x)
    return {"x": x.grad, **{key: p.grad for key, p in model.adapter_parameters("a")}}


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "other"])
@pytest.mark.parametrize("step", [_plain, _disabled, _left])
@pytest.mark.parametrize("name", CONFIGS)
def test_replicas_run_what_ran_where_they_were_made(name: str, step: Step, reentrant: bool | None) -> None:
    model = model_with(name)
    right = gradients(model, step, lambda m, x: m(x), None)
    found = gradients(model, step, parallel, reentrant)
    for key, value in right.items():  # torch's broadcast gives a zero where the plain model gives none
        value = torch.zeros_like(found[key]) if value is None and found[key] is not None else value
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_replica_may_say_itself_what_it_runs(name: str) -> None:
    model = model_with(name)
    right = gradients(model, _in_the_replica, lambda m, x: m(x), None)
    torch.testing.assert_close(gradients(model, _in_the_replica, parallel, None), right, rtol=1e-10, atol=1e-12)
    for reentrant in (True, False):
        with pytest.raises(UnsupportedError, match=r"in a replica of nn\.DataParallel"):
            gradients(model, _in_the_replica, parallel, reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_other_adapters_meanwhile_change_nothing(reentrant: bool) -> None:
    """A replica has the parameters that it was made with."""

    def step(model: AdapterModel, run: Any, x: Tensor) -> None:
        loss = run(model, x).square().sum()
        model.set_adapter("b")
        for _, p in model.adapter_parameters("a"):
            p.requires_grad_()  # which set_adapter() takes away, from autograd too
        loss.backward()
        model.set_adapter("a")

    model = model_with("vera")
    right = gradients(model, step, lambda m, x: m(x), None)
    torch.testing.assert_close(gradients(model, step, parallel, reentrant), right, rtol=1e-10, atol=1e-12)


def test_a_planted_state_of_the_threads_own_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActiveState, "inherited", lambda self: self)
    model = model_with("vera")
    right = gradients(model, _disabled, lambda m, x: m(x), None)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(model, _disabled, parallel, None)["x"], right["x"])


def test_layers_that_are_read_and_never_called_have_the_adapter_in_replicas_too() -> None:
    make, targets = READERS["swin"]
    model = get_peft_model(seeded(make()), LoraConfig(r=2, target_modules=targets))
    randomize(model.double())
    x = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = model(x)
    wanted.square().sum().backward()
    gradients = [p.grad for _, p in model.adapter_parameters()]
    model.zero_grad()
    y = parallel(model, x)
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    torch.testing.assert_close([p.grad for _, p in model.adapter_parameters()], gradients)
