"""Run by torchrun in two processes (tests/train/trainer/test_sharding.py): DDP and FSDP2, no Trainer.

``layers_worker.py FOLDER`` runs every check, in the same order in each process, and rank 0 writes what they found to
FOLDER/found.json: name -> what the check returned, or the text of what it raised.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kilotune import AdapterConfig, LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model
from kilotune.errors import KilotuneError
from kilotune.storage.sharded import is_sharded
from kilotune.train.trainer.parallel import shard_base
from tests.support.models import Nested, disk, randomize
from tests.support.readers import READERS, WIDTH, seeded

FOLDER = Path(sys.argv[1])
LINEAR = {"target_modules": "all-linear"}
CONFIGS: dict[str, AdapterConfig] = {
    "vera": VeraConfig(r=8, **LINEAR),
    "vera-shapes": VeraConfig(r=8, sharing="shape", **LINEAR),
    "lora": LoraConfig(r=2, bias="all", **LINEAR),
    "lora_fa": get_config("lora_fa", r=2, **LINEAR),
    "loraxs": get_config("loraxs", r=2, **LINEAR),
    "dora": get_config("dora", r=2, **LINEAR),
    "dvora": get_config("dvora", r=8, **LINEAR),
    "ia3": get_config("ia3", target_modules="all-linear", feedforward_modules=[]),
    "bitfit": get_config("bitfit"),
    "unilora": get_config("unilora", r=2, theta_d_length=32, **LINEAR),
    "intrinsic": get_config("intrinsic", d=16, **LINEAR),
    "bottleneck": get_config("parallel", target_modules=r"blocks\.\d+\.mix\.up"),
    "head": VeraConfig(r=8, target_modules=r"blocks\.\d+\.mix\..*", modules_to_save=["head"]),
}
checks: dict[str, Callable[[], Any]] = {}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    checks[function.__name__] = function
    return function


def adapted(config: AdapterConfig, base: nn.Module | None = None, seed: int = 1) -> PeftModel:
    base = Nested() if base is None else base
    torch.manual_seed(seed)
    return get_peft_model(base, config)


def train(model: nn.Module, share: int, of: int) -> None:
    """Five steps of AdamW on the ``share``-th part of each batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
        loss = nn.functional.mse_loss(model(x.chunk(of)[share]), y.chunk(of)[share])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: PeftModel) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.adapter_parameters():
        held: Any = parameter.detach()
        found[name] = (held.full_tensor() if is_sharded(held) else held).clone()
    return found


def apart(model: PeftModel, other: PeftModel) -> float:
    """The largest difference of trained numbers."""
    mine, theirs = weights(model), weights(other)
    assert mine.keys() == theirs.keys()
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine)


def moved(model: PeftModel, start: dict[str, Tensor]) -> float:
    """The largest change that training made of a number."""
    return max((value - start[name]).abs().max().item() for name, value in weights(model).items())


RANK, WORLD = 0, 1


def one_process(config: AdapterConfig) -> PeftModel:
    model = adapted(config)
    train(model, 0, 1)
    return model


def compared(make: Callable[[AdapterConfig], tuple[PeftModel, nn.Module]]) -> dict[str, list[float]]:
    """[difference to one process, change in training] of each method."""
    found = {}
    for name, config in CONFIGS.items():
        alone = one_process(config)
        start = weights(adapted(config))
        model, runs = make(config)
        train(runs, RANK, WORLD)
        found[name] = [apart(model, alone), moved(alone, start)]
    return found


# -- the same adapter as one process -------------------------------------------------------------------


@check
def replicated() -> Any:
    """Ranks with other starts: the first one's are everybody's."""

    def make(config: AdapterConfig) -> tuple[PeftModel, nn.Module]:
        model = adapted(config, seed=1 + RANK)
        return model, DistributedDataParallel(model)

    return compared(make)


@check
def base_in_shards() -> Any:
    def make(config: AdapterConfig) -> tuple[PeftModel, nn.Module]:
        model = adapted(config, seed=1 + RANK)
        shard_base(model)
        return model, DistributedDataParallel(model)

    return compared(make)


@check
def added_to_shards() -> Any:
    """DoRA and LoRA-XS need the weights when they are added: gathered by both processes."""

    def make(config: AdapterConfig) -> tuple[PeftModel, nn.Module]:
        model = adapted(config, base=shard_base(Nested()))
        assert all(is_sharded(p) for layer in model.adapted_layers().values() for p in layer.base_tensors())
        return model, DistributedDataParallel(model)

    return compared(make)


@check
def added_to_shards_and_not_reduced() -> Any:
    """Each process would train an adapter of its own: refused, and right in torch's order."""
    base = Nested()
    for block in base.blocks.children():
        fully_shard(block)
    late = adapted(CONFIGS["vera"], base=fully_shard(base))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(RANK))
    said = refused(lambda: train(late, RANK, WORLD))
    with torch.no_grad():
        runs = late(x).shape == (4, 3)
    late.eval()
    runs = runs and late(x).shape == (4, 3)
    early = adapted(CONFIGS["vera"])
    fully_shard(early)
    train(early, RANK, WORLD)
    alone = one_process(CONFIGS["vera"])
    return {"refused": said, "runs": runs, "in order": apart(early, alone)}


@check
def adapters_in_shards() -> Any:
    """torch's own way, and that of accelerate's FSDP2: blocks with all that is in them."""

    def make(config: AdapterConfig) -> tuple[PeftModel, nn.Module]:
        model = adapted(config)
        for block in model.get_base_model().get_submodule("blocks").children():
            fully_shard(block)
        return model, fully_shard(model)

    return compared(make)


# -- what is held and sent -----------------------------------------------------------------------------


@contextmanager
def listening() -> Iterator[list[Tensor]]:
    """The tensors that DistributedDataParallel broadcasts."""
    real, sent = dist._broadcast_coalesced, []

    def recorded(group: Any, tensors: Any, *args: Any) -> Any:
        sent.extend(tensors)
        return real(group, tensors, *args)

    dist._broadcast_coalesced = recorded
    try:
        yield sent
    finally:
        dist._broadcast_coalesced = real


@check
def projections_stay_at_home() -> Any:
    """Sent in DDP's start and steps, sharded, or held more than once?"""
    model = adapted(CONFIGS["vera"])
    model(torch.randn(2, 6))  # makes the matrices
    places = {t.untyped_storage().data_ptr() for t in model.projections.tensors()}
    shard_base(model)
    with listening() as sent:
        ddp = DistributedDataParallel(model)
        train(ddp, RANK, WORLD)
    held = model.projections.tensors()
    return {
        "pairs": len(held),
        "sharded": any(map(is_sharded, held)),
        "moved": {t.untyped_storage().data_ptr() for t in held} != places,
        "among the parameters": any(
            p.untyped_storage().data_ptr() in places for p in model.parameters() if not is_sharded(p)
        ),
        "sent": sum(t.untyped_storage().data_ptr() in places for t in sent),
        "numbers sent": sum(t.numel() for t in sent),
        "trained numbers": sum(p.numel() for _, p in model.adapter_parameters()),
    }


@check
def each_process_holds_its_part() -> Any:
    model = adapted(CONFIGS["vera"])
    before = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    shard_base(model)
    held: Any = [p for p in model.parameters() if is_sharded(p)]
    return {
        "whole": before,
        "here": sum(p.to_local().numel() for p in held),
        "frozen and whole": sum(p.numel() for p in model.parameters() if not (is_sharded(p) or p.requires_grad)),
        "trained and whole": all(not is_sharded(p) for _, p in model.adapter_parameters()),
    }


@check
def gathered_once() -> Any:
    """How often each layer's weight is gathered when an adapter is added on shards."""
    from torch.distributed.tensor import DTensor

    real, count = DTensor.full_tensor, 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return real(self, *args, **kwargs)

    found = {}
    DTensor.full_tensor = counted  # type: ignore[method-assign]
    try:
        for name in ("vera", "lora_fa", "dvora", "intrinsic", "ia3"):
            base = shard_base(Nested())
            count = 0
            model = adapted(CONFIGS[name], base=base)
            found[name] = [count, len(model.adapted_layers())]
    finally:
        DTensor.full_tensor = real  # type: ignore[method-assign]
    return found


# -- reading, merging, files -----------------------------------------------------------------------------


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except KilotuneError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


@check
def refusals() -> Any:
    model = adapted(CONFIGS["dvora"], base=shard_base(Nested()))
    layer = model.adapted_layers()["blocks.0.mix.up"]
    alone = adapted(CONFIGS["dora"])
    fully_shard(alone.adapted_layers()["blocks.0.mix.up"].base_layer)
    unit = Nested()
    fully_shard(unit.head)
    return {
        "read": refused(layer.site("blocks.0.mix.up").read),
        "merge": refused(model.merge_adapter),
        "merge for good": refused(lambda: model.merge_and_unload(dtype=torch.float32)),
        "again": refused(lambda: shard_base(model)),
        "a layer alone": refused(lambda: alone(torch.randn(2, 6))),
        "copied": refused(lambda: get_peft_model(unit, CONFIGS["head"])),
    }


@check
def a_layer_by_itself() -> Any:
    """What needs no weight runs through the layer's own forward, which gathers it."""
    config = CONFIGS["vera"]
    alone, model = adapted(config), adapted(config)
    randomize(alone)
    randomize(model)
    fully_shard(model.adapted_layers()["blocks.0.mix.up"].base_layer)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    return (model(x) - alone(x)).abs().max().item()


@check
def disabled_and_switched() -> Any:
    base, x = Nested(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    expected = base(x)
    model = adapted(CONFIGS["vera"], base=shard_base(base))
    randomize(model)
    model.add_adapter("second", CONFIGS["lora_fa"])
    model.set_adapter("second")
    randomize(model, "second", seed=2)
    ddp = DistributedDataParallel(model)  # refuses parameters that get no gradient, which the inactive one's are
    train(ddp, RANK, WORLD)
    train(ddp, RANK, WORLD)
    with model.disable_adapter():
        return (model(x) - expected).abs().max().item()


@check
def saved_from_shards() -> Any:
    """Only the first process writes; the files are those of an adapter that is whole, bit for bit."""
    found = {}
    for name in ("vera", "dora", "unilora", "head"):
        model, alone = adapted(CONFIGS[name]), adapted(CONFIGS[name])
        randomize(model)
        randomize(alone)
        for block in model.get_base_model().get_submodule("blocks").children():
            fully_shard(block)
        fully_shard(model)
        kinds = {type(p).__name__ for _, p in model.adapter_parameters()}
        model.save_pretrained(FOLDER / f"{name}-shards", is_main_process=RANK == 0)
        dist.barrier()
        assert {type(p).__name__ for _, p in model.adapter_parameters()} == kinds == {"DTensor"}
        if RANK == 0:
            alone.save_pretrained(FOLDER / name)
            found[name] = disk(FOLDER / f"{name}-shards") == disk(FOLDER / name)
        dist.barrier()
    model = adapted(CONFIGS["vera"])
    model.save_pretrained(FOLDER / f"other-{RANK}", is_main_process=RANK == 0)
    found["other processes write"] = (FOLDER / f"other-{RANK}").exists() and RANK != 0
    return found


@check
def loaded_onto_shards() -> Any:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    found = {}
    for name in ("vera", "dora", "unilora", "head"):
        whole = PeftModel.from_pretrained(Nested(), FOLDER / name)
        model = PeftModel.from_pretrained(shard_base(Nested()), FOLDER / name)
        found[name] = (model(x) - whole(x)).abs().max().item()
    return found


@check
def meta_then_shards() -> Any:
    """A base that never is whole anywhere: on meta, sharded, filled part by part, and an adapter added on that."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.device("meta"):
        base = Nested()
    shard_base(base)
    base.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(base, Nested().state_dict() if RANK == 0 else {}, options=options)
    model, alone = adapted(CONFIGS["dvora"], base=base), one_process(CONFIGS["dvora"])
    train(DistributedDataParallel(model), RANK, WORLD)
    return apart(model, alone)


@check
def weights_that_are_read() -> Any:
    """[difference of the output, of the gradients] to one process, where layers are read and never called."""
    found = {}
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    for name in ("swin", "attention pool", "own backward"):
        make, targets = READERS[name]
        config = LoraConfig(r=2, target_modules=targets)
        whole, model = (adapted(config, nn.Sequential(seeded(make()).float())) for _ in range(2))
        randomize(whole)
        randomize(model)
        fully_shard(model.model[0])
        fully_shard(model)
        outputs = [one(x) for one in (whole, model)]
        for y in outputs:
            y.square().sum().backward()
        pairs = zip(whole.adapter_parameters(), model.adapter_parameters(), strict=True)
        apart = [(one.grad - two.grad.full_tensor()).abs().max().item() for (_, one), (_, two) in pairs]  # type: ignore[union-attr]
        found[name] = [(outputs[0] - outputs[1]).abs().max().item(), max(apart)]
    return found


@check
def counted() -> Any:
    whole, model = adapted(CONFIGS["vera"]), adapted(CONFIGS["vera"], base=shard_base(Nested()))
    return [whole.get_nb_trainable_parameters(), model.get_nb_trainable_parameters()]


def main() -> None:
    global RANK, WORLD
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    RANK, WORLD = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for name, function in checks.items():
        try:
            found[name] = function()
        except Exception:
            found[name] = traceback.format_exc()
            print(f"rank {RANK}: {name}:\n{found[name]}", flush=True)
        dist.barrier()
    everybody: list[Any] = [None] * WORLD
    dist.all_gather_object(everybody, found)
    if RANK == 0:
        (FOLDER / "found.json").write_text(json.dumps(everybody))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
