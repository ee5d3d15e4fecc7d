"""Joint training of many users' adapters against PEFT, which trains them one by one.

python benchmarks/fleet.py [--hidden 128] [--layers 4] [--users 256] [--per-step 64] [--rows 4] [--length 32]
                           [--steps 4] [--rank 64] [--peft-users 4] [--rounds 5] [--bars]

The model is of the size of the one that examples/compare/pretrain.py makes. Every user has ``--rows`` sequences of
``--length`` tokens a step, and ``--steps`` steps of AdamW with clipping and a linear schedule, in VeRA adapters of all
linear layers but the prediction.

- **joint**: ``--users`` users from their start to the finished adapter's tensors, ``--per-step`` of them in a batch.
- **joint, one by one**: the same code with one user in a batch.
- **peft**: ``--peft-users`` users one after the other: the adapter is made, trained, its state dict taken, and it is
  unloaded. **peft, steps alone**: only the steps are timed.

Times are for one user. The bar is from start to finished adapter on both sides: joint at most a third of PEFT's; exit
code 1 where not. Who resets PEFT's vectors saves its wrapping, so its steps alone stand beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import _harness as harness
import kilotune
from _harness import Bar, Progress, Rounds
from _models import Shape, build, twin
from kilotune.fleet import FleetSettings, User, fit

LIMIT = 1 / 3
RATE = 4e-3
JOINT, ALONE, PEFT, STEPS = "joint", "joint, one by one", "peft", "peft, steps alone"


def data_of(user: int, chosen: argparse.Namespace, vocabulary: int) -> list[Tensor]:
    """The user's rows of tokens."""
    generator = torch.Generator().manual_seed(user)
    return list(torch.randint(0, vocabulary, (chosen.rows * chosen.steps, chosen.length), generator=generator))


def collate(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """A batch of rows of one length."""
    ids = torch.stack(list(rows))
    return {"input_ids": ids, "labels": ids}


def joint(base: Any, chosen: argparse.Namespace, count: int, per_step: int, vocabulary: int) -> None:
    """Train ``count`` users."""
    settings = FleetSettings(
        batch_size=chosen.rows, users_per_step=per_step, epochs=1, learning_rate=RATE, warmup=0, eval_every=None
    )
    users = (User(f"u{i}", data_of(i, chosen, vocabulary), seed=i) for i in range(count))
    kept: list[Any] = []
    config = kilotune.VeraConfig(r=chosen.rank, target_modules="all-linear")
    report = fit(base, config, users, settings, collate=collate, sink=kept.append)
    if len(kept) != count or any(user.steps != chosen.steps for user in report.users):
        raise AssertionError(f"{len(kept)} of {count} users were trained: {report.failed[:3]}")


def peft_users(base: Any, chosen: argparse.Namespace, vocabulary: int) -> tuple[float, float]:
    """(seconds of all, seconds of the steps) of ``--peft-users`` users."""
    import peft

    device = next(base.parameters()).device
    in_steps, start = 0.0, time.perf_counter()
    for i in range(chosen.peft_users):
        rows = data_of(i, chosen, vocabulary)
        config = peft.VeraConfig(r=chosen.rank, target_modules="all-linear", save_projection=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base, config).eval()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / chosen.steps)
        begun = _now(device)
        for step in range(chosen.steps):
            batch = collate(rows[step * chosen.rows : (step + 1) * chosen.rows])
            optimizer.zero_grad()
            model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
        in_steps += _now(device) - begun
        peft.get_peft_model_state_dict(model)
        base = model.unload()
    return _now(device) - start, in_steps


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(chosen: argparse.Namespace, device: torch.device, times: Rounds, progress: Progress) -> None:
    """Rounds of all variants, in turns; seconds a user."""
    shape = Shape("llama", chosen.hidden, chosen.layers)
    base = build(shape, chosen.length, device, harness.DTYPES[chosen.dtype]).eval()
    theirs = twin(base)
    few = min(chosen.peft_users, chosen.users)
    times.seconds.update({name: [] for name in (JOINT, ALONE, PEFT, STEPS)})
    idle = harness.Idleness()
    for number in range(-1, chosen.rounds):  # the first is for imports and caches
        taken: dict[str, float] = {}

        def timed(name: str, count: int, per_step: int, taken: dict[str, float] = taken) -> None:
            start = _now(device)
            joint(base, chosen, count, per_step, shape.vocabulary)
            taken[name] = (_now(device) - start) / count

        def theirs_now(taken: dict[str, float] = taken) -> None:
            whole, steps = peft_users(theirs, chosen, shape.vocabulary)
            taken.update({PEFT: whole / chosen.peft_users, STEPS: steps / chosen.peft_users})

        runs: list[Callable[[], None]] = [
            lambda: timed(JOINT, chosen.users, chosen.per_step),
            lambda: timed(ALONE, few, 1),
            theirs_now,
        ]
        first = number % len(runs)
        progress.show(f"round {number + 1} of {chosen.rounds}")
        for run in runs[first:] + runs[:first]:
            run()
        if number >= 0:
            for name, seconds in taken.items():
                times.seconds[name].append(seconds)
            times.others = idle.others()
    progress.clear()


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=5)
    for name, default in (
        ("hidden", 128), ("layers", 4), ("users", 256), ("per-step", 64), ("rows", 4), ("length", 32), ("steps", 4),
        ("rank", 64), ("peft-users", 4),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=harness.positive, default=default)
    parser.add_argument("--bars", action="store_true", help="what the project promises, and whether it holds")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run with the command line's words; returns the exit code."""
    chosen = options(words)
    device, progress, times = harness.device_of(chosen), Progress(), Rounds()
    measure(chosen, device, times, progress)
    where = harness.title_of(harness.machine(device))
    print(
        f"\nhidden {chosen.hidden}, {chosen.layers} layers, VeRA r {chosen.rank}, {chosen.users} users, {chosen.steps} "
        f"steps of {chosen.rows} x {chosen.length} tokens, {chosen.per_step} users in a batch, {times}; {where}\n"
    )
    rows = []
    for name, seconds in times.seconds.items():
        median = harness.Spread.of(seconds).median
        rows.append([name, f"{60 / median:,.0f}", *(str(times.ratio(name, to)) for to in (PEFT, STEPS))])
    print(harness.table(["way", "users per minute", "time / peft (quartiles)", "/ peft, steps alone"], rows))
    stem = f"fleet-{chosen.hidden}-r{chosen.rank}-{chosen.length}-{device.type}-{chosen.dtype}"
    print("written: " + harness.write_results(chosen.out, stem, chosen, device, times).name)
    ratio = times.ratio(JOINT, PEFT)
    return harness.judge([Bar("joint over PEFT", ratio and ratio.median, LIMIT)]) if chosen.bars else 0


if __name__ == "__main__":
    sys.exit(main())
