"""What the tests of TRL's trainers with a reference share: small data, trainers, and log probabilities by hand."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from kilotune import PeftModel
from kilotune.train import for_trainer, with_reference
from tests.support.engine_support import arguments, letters

os.environ.setdefault("TQDM_DISABLE", "1")

PROMPTS = ["abc def", "hello you", "what is", "go"]
CHOSEN = ["ghi", "me too", "it is", "on and on"]
REJECTED = ["xyz", "no way", "was", "away"]
ROWS = len(PROMPTS)
NAMES = ["DPO", "KTO", "GRPO", "RLOO"]
BETA = 0.1


def rows(name: str) -> Any:
    """Data for a trainer, all of it one batch."""
    from datasets import Dataset

    if name in ("DPO", "Reward"):
        return Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})
    if name == "KTO":
        kept = [index % 2 == 0 for index in range(ROWS)]
        answers = [CHOSEN[index] if kept[index] else REJECTED[index] for index in range(ROWS)]
        return Dataset.from_dict({"prompt": PROMPTS, "completion": answers, "label": kept})
    if name == "SFT":
        return Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN})
    return Dataset.from_dict({"prompt": PROMPTS})


class Written:
    """A reward for GRPO and RLOO, which keeps what was written."""

    __name__ = "written"

    def __init__(self) -> None:
        self.pairs: list[tuple[list[int], list[int]]] = []  # tokens of the prompt, and of the completion

    def __call__(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        tokenizer = letters()
        for prompt, written in zip(prompts, completion_ids, strict=True):
            self.pairs.append((list(tokenizer(prompt).input_ids), list(written)))
        return [float(len(set(written))) for written in completion_ids]


def options(name: str, folder: Path, reward: Any = None, **changed: Any) -> dict[str, Any]:
    """The arguments of TRL's trainer ``name`` but for the model; all rows are one batch, in two steps."""
    import trl

    given: dict[str, Any] = {
        "max_steps": 2,
        "save_strategy": "no",
        "bf16": False,
        "per_device_train_batch_size": ROWS,
        "logging_steps": 1,
    }
    made: dict[str, Any] = {"train_dataset": rows(name), "processing_class": letters()}
    if name in ("GRPO", "RLOO"):
        given |= {"num_generations": 2, "max_completion_length": 5, "beta": BETA}
        made["reward_funcs"] = Written() if reward is None else reward
    return {**made, "args": arguments(folder, getattr(trl, f"{name}Config"), **{**given, **changed})}


def trainer(
    name: str, model: PeftModel, folder: Path, reference: str = "start", reward: Any = None, **changed: Any
) -> Any:
    """TRL's trainer ``name`` with a reference that shares the base; none may load a second one."""
    import trl
    from transformers import AutoConfig

    made = with_reference(getattr(trl, f"{name}Trainer"), reference)
    with mock.patch.object(AutoConfig, "from_pretrained", side_effect=AssertionError("a second base was loaded")):
        return made(model=for_trainer(model), **options(name, folder, reward, **changed))


def first(run: Any) -> dict[str, float]:
    """What the first step of a training logs."""
    run.train()
    found: dict[str, float] = run.state.log_history[0]
    return found


# -- by hand -----------------------------------------------------------------------------------------------


def dense(model: PeftModel, adapters: bool) -> nn.Module:
    """A plain model in float64, with the active adapters in its weights or without any."""
    twin = copy.deepcopy(model)
    plain = twin.merge_and_unload() if adapters else twin.unload()
    return plain.double().eval()


def log_probs(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The log probability of each token of an answer."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return torch.stack([scores[len(prompt) + i - 1, token] for i, token in enumerate(answer)])


def dpo_loss(policy: nn.Module, reference: nn.Module) -> float:
    """DPO's loss of :func:`rows`: the mean of -log sigmoid(beta * (change of the chosen - change of the rejected))."""
    tokenizer = letters()
    losses = []
    for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        asked = tokenizer(prompt).input_ids
        changes = []
        for answer in (chosen, rejected):
            tokens = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
            ours, theirs = (log_probs(model, asked, tokens).sum() for model in (policy, reference))
            changes.append(ours - theirs)
        losses.append(-torch.nn.functional.logsigmoid(BETA * (changes[0] - changes[1])))
    return float(torch.stack(losses).mean())
