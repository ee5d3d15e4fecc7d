"""Users for joint trainings, and each one's lone twin: a plain loop over one adapter, without kilotune's fleet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kilotune import AdapterConfig, get_peft_model, optimizer_groups
from kilotune.fleet import Finished, FleetSettings, User

Row = dict[str, Any]


def token_rows(count: int, seed: int, vocabulary: int = 32, longest: int = 9) -> list[Row]:
    """Token rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, longest + 1, (1,), generator=generator))
        ids = torch.randint(2, vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return rows


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Right padding, with a mask."""
    size = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (size - len(row["input_ids"])) for row in rows]
    labels = [row["labels"] + [-100] * (size - len(row["labels"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (size - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def points(count: int, seed: int) -> list[Row]:
    """Rows of six numbers with one of three classes, for the small models of models.py."""
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return [{"x": x, "labels": int(torch.randint(3, (1,), generator=generator))} for x in xs]


def stacked(rows: Sequence[Row]) -> dict[str, Tensor]:
    return {"inputs": torch.stack([row["x"] for row in rows]), "labels": torch.tensor([row["labels"] for row in rows])}


class Kept:
    """A sink's function that keeps what it is given."""

    def __init__(self) -> None:
        self.adapters: dict[str, dict[str, Tensor]] = {}
        self.finished: list[Finished] = []

    def __call__(self, one: Finished) -> None:
        assert one.name not in self.adapters, "twice"
        self.adapters[one.name] = dict(one.contents.tensors)
        self.finished.append(one)


def order_again(seed: int, epoch: int, count: int) -> list[int]:
    """The documented order of an epoch, by numpy's own Philox: words sorted, for the key (seed, 7)."""
    bits = np.random.Philox(key=[seed, 7], counter=[0, 0, 0, 1 + epoch])
    words = [int(word) for word in bits.random_raw(count)]
    return sorted(range(count), key=lambda i: (words[i], i))


def factor_again(settings: FleetSettings, total: int) -> Callable[[int], float]:
    """Transformers' schedules, written again, with a warm-up that begins above 0."""
    rise = math.ceil(settings.warmup * total) if settings.warmup < 1 else int(settings.warmup)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        progress = (step - rise) / max(1, total - rise)
        return {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[
            settings.schedule
        ]

    return factor


def alone(
    base: nn.Module,
    config: AdapterConfig,
    user: User,
    settings: FleetSettings,
    collate: Callable[[Sequence[Row]], dict[str, Tensor]],
    prepare: Callable[[Any, int], None] = lambda model, step: None,
) -> tuple[Any, list[float]]:
    """(the model after training its one adapter, the validation losses): torch's AdamW, clipping and LambdaLR."""
    seed = settings.seed if user.seed is None else user.seed
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    if next(iter(base.parameters())).dtype == torch.float64:
        model.double()
    model.eval()
    groups = optimizer_groups(
        model, lr=settings.rate(config, settings.steps(len(user.data))), weight_decay=settings.weight_decay
    )
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)
    rows, size = len(user.data), settings.batch_size
    per_epoch = math.ceil(rows / size)
    total = settings.max_steps or math.ceil(settings.epochs * per_epoch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor_again(settings, total))
    best, worse, seen, state = math.inf, 0, [], None
    for step in range(total):
        epoch, batch = divmod(step, per_epoch)
        picked = order_again(seed, epoch, rows)[batch * size : (batch + 1) * size]
        prepare(model, step)
        optimizer.zero_grad()
        mean_loss(model, collate([user.data[i] for i in picked])).backward()
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(
                [p for g in optimizer.param_groups for p in g["params"]], settings.max_grad_norm
            )
        optimizer.step()
        schedule.step()
        every = per_epoch if settings.eval_every == "epoch" else settings.eval_every
        if user.validation is not None and every and ((step + 1) % every == 0 or step + 1 == total):
            with torch.no_grad():
                seen.append(float(mean_loss(model, collate(list(user.validation)))))
            worse = worse + 1
            if seen[-1] < best:
                best, worse = seen[-1], 0
                state = {name: p.detach().clone() for name, p in model.adapter_parameters()}
            if settings.patience is not None and worse >= settings.patience:
                break
    if state is not None and settings.keep_best:
        with torch.no_grad():
            for name, parameter in model.adapter_parameters():
                parameter.copy_(state[name])
    return model, seen


def mean_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over labels, of one user's batch alone."""
    labels = batch["labels"]
    if "inputs" in batch:
        return nn.functional.cross_entropy(model(batch["inputs"]), labels)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def tensors_of(model: Any) -> dict[str, Tensor]:
    """What ``save_pretrained`` would write."""
    from kilotune.adapter_files.writing import state_of

    return state_of(model.installed("default"))[1]


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two adapters, which must have the same tensors."""
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)
