"""What the tests of engines share: small data, a tokenizer of letters, and the stock Trainer's arguments."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kilotune import AdapterConfig, LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model
from tests.support.models import tiny_classifier, tiny_llama

ROWS = 16
IDS = torch.randint(2, 32, (ROWS, 6), generator=torch.Generator().manual_seed(5))
LINES = [{"input_ids": row, "labels": row} for row in IDS]
CLASSES = [{"input_ids": row, "labels": row[0] % 3} for row in IDS]

# Of each place where trained numbers can be: in layers, once for the model, in a head of their own, beside frozen ones.
CASES: dict[str, tuple[Callable[[], Any], AdapterConfig, list[dict[str, Tensor]]]] = {
    "lora": (tiny_llama, LoraConfig(r=2), LINES),
    "vera": (tiny_llama, VeraConfig(r=4, target_modules="all-linear"), LINES),
    "dvora": (tiny_llama, get_config("dvora", r=4), LINES),
    "lora_fa": (tiny_llama, get_config("lora_fa", r=2), LINES),
    "unilora": (tiny_llama, get_config("unilora", r=2, theta_d_length=32), LINES),
    "head": (tiny_classifier, VeraConfig(r=4, task_type="SEQ_CLS"), CLASSES),
}


def adapted(case: str, seed: int = 1, base: Any = None) -> PeftModel:
    """The model of a case; adapters with random starts differ from seed to seed."""
    make, config, _ = CASES[case]
    model = make() if base is None else base
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def arguments(folder: Path, cls: Any = None, **changed: Any) -> Any:
    """``TrainingArguments`` (or ``cls``) for six steps on the CPU, with a checkpoint every two."""
    from transformers import TrainingArguments

    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return (cls or TrainingArguments)(**{**values, **changed})


def weights(model: PeftModel) -> dict[str, Tensor]:
    """The trained numbers now."""
    return {name: p.detach().clone() for name, p in model.adapter_parameters()}


def batches(case: str, size: int) -> dict[str, Any]:
    """Arguments for batches of ``size`` rows in this process, an evaluation every two steps, and the best one kept."""
    return {
        "per_device_train_batch_size": size,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        # The small BERT has gradients of 1e-8, all rounding, which Adam would make as large as all others. Its loss is
        # a mean over its own rows, whatever number of items the Trainer tells it.
        "adam_epsilon": 1e-5,
        "average_tokens_across_devices": CASES[case][2] is not CLASSES,
    }


def letters() -> Any:
    """A tokenizer of 32 tokens: one for each letter, and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz ."]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def nf4_llama(folder: str | None = None) -> Any:
    """The small Llama with its linear layers in NF4, as transformers loads it; ``folder`` holds it already."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            tiny_llama().save_pretrained(made)
            return nf4_llama(made)
    scheme = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=scheme, device_map={"": "cpu"})
