"""Run by torchrun in two processes (tests/train/trainer/test_two_processes.py): the stock Trainer and SFTTrainer.

``trainer_worker.py FOLDER BASE MODE:CASE ...`` trains each case in each mode, then once more from the checkpoint of
step 2 with other starts, and writes both adapters' numbers to FOLDER/<mode>-<case>-<rank>.safetensors. BASE is the
folder of the small Llama, for the mode in which transformers itself shards it.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from kilotune import PeftModel
from kilotune.errors import UnsupportedError
from kilotune.storage.sharded import is_sharded, whole
from kilotune.train.trainer.for_trainer import for_trainer
from kilotune.train.trainer.parallel import shard_base
from tests.support.engine_support import CASES, adapted, arguments, batches, letters, nf4_llama
from tests.train.trainer.test_sft_trainer import rows

warnings.filterwarnings("ignore", category=FutureWarning)
FOLDER, BASE = Path(sys.argv[1]), sys.argv[2]
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
BATCH = 8  # of both processes together


def model_of(mode: str, case: str, seed: int) -> PeftModel:
    if mode == "native":
        from transformers import LlamaForCausalLM
        from transformers.distributed import DistributedConfig

        base = LlamaForCausalLM.from_pretrained(BASE, distributed_config=DistributedConfig(fsdp_size=2))
        return adapted(case, seed, base)
    model = adapted(case, seed, nf4_llama(BASE) if mode == "nf4" else None)
    return shard_base(model) if mode in ("shard", "sft", "checkpointing", "both") else model  # type: ignore[return-value]


def trainer_of(mode: str, case: str, seed: int, folder: Path) -> tuple[PeftModel, Any]:
    from transformers import Trainer

    options = batches(case, BATCH // WORLD)
    if mode == "checkpointing":
        options["gradient_checkpointing"] = True
    if mode in ("accelerate", "both"):
        # By the class of the blocks, which has another name once it is sharded: accelerate would not find it.
        policy = "TRANSFORMER_BASED_WRAP" if mode == "accelerate" else "NO_WRAP"
        wrap = {"auto_wrap_policy": policy, "state_dict_type": "FULL_STATE_DICT"}
        options |= {"fsdp": True, "fsdp_config": {"version": 2, **wrap}}
    if mode == "sft":
        from trl import SFTConfig, SFTTrainer

        given = arguments(folder, SFTConfig, bf16=False, max_length=32, **options)
        model = model_of(mode, case, seed)
        data = {"train_dataset": rows(), "eval_dataset": rows(), "processing_class": letters()}
        return model, SFTTrainer(model=for_trainer(model), args=given, **data)
    given = arguments(folder, **options)
    if mode in ("accelerate", "both"):
        as_if_on_gpus()
    model = model_of(mode, case, seed)
    data = {"train_dataset": CASES[case][2], "eval_dataset": CASES[case][2]}
    return model, Trainer(model=for_trainer(model), args=given, **data)


def as_if_on_gpus() -> None:
    """Accelerate shards on accelerators only; told that the processes have some, it does the same on the CPU."""
    from accelerate.state import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def numbers(model: PeftModel, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": whole(p).detach().clone().contiguous() for name, p in model.adapter_parameters()}


def refused(case: str) -> None:
    """Sharded by us and by accelerate: nobody would average the adapter's gradients."""
    _, trainer = trainer_of("both", case, 1, FOLDER / "both")
    try:
        trainer.train()
    except UnsupportedError as error:
        (FOLDER / f"both-{RANK}.txt").write_text(str(error))


def run(mode: str, case: str) -> None:
    if mode == "both":
        return refused(case)
    folder = FOLDER / f"{mode}-{case}"
    # DistributedDataParallel gives every process the first one's start; FSDP2 takes a part of each process's own.
    model, trainer = trainer_of(mode, case, 1 if mode == "accelerate" else 1 + RANK, folder)
    trainer.train()
    trainer.save_model(str(folder / "out"))
    held = {"kinds": torch.tensor([sum(is_sharded(p) for p in model.get_base_model().parameters())])}
    dist.barrier()
    again, second = trainer_of(mode, case, 7, folder)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    found = {**numbers(model, "whole"), **numbers(again, "resumed"), **held}
    save_file(found, FOLDER / f"{mode}-{case}-{RANK}.safetensors")
    return dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[3:]:
        run(*argument.split(":"))
    dist.destroy_process_group()
