"""A script written for PEFT, its imports as they were, but for the two lines in front; run by test_in_place.py."""

from __future__ import annotations

import kilotune.peft

kilotune.peft.install()

import json  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402

from tests.support.models import tiny_llama  # noqa: E402

warnings.simplefilter("ignore")  # of transformers' own
ROWS = [{"input_ids": torch.arange(6), "labels": torch.arange(6)} for _ in range(8)]
IDS = torch.arange(6)[None]


def trained(folder: Path) -> dict[str, object]:
    """transformers' Trainer: it saves the adapter and no base, and goes on from a checkpoint."""
    base = folder / "base"
    tiny_llama().save_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(str(folder / "out"), **options, **quiet), train_dataset=ROWS)
    trainer.train()
    with torch.no_grad():
        first = model(IDS).logits
    trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    with torch.no_grad():
        again = model(IDS).logits
        read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "out" / "checkpoint-4")(
            IDS
        ).logits
    files = sorted(path.name for path in (folder / "out" / "checkpoint-4").iterdir())
    return {
        "adapter": "adapter_model.safetensors" in files,
        "base": "model.safetensors" in files,
        "resumed": bool(torch.equal(first, again)),
        "read": bool(torch.allclose(read, again, atol=1e-6)),
        "layers": sum(isinstance(module, LoraLayer) for module in model.modules()),
    }


def added(folder: Path) -> dict[str, object]:
    """transformers' own ``model.add_adapter()`` and what belongs to it."""
    model = tiny_llama()
    plain = model(IDS).logits
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    on = model(IDS).logits
    model.disable_adapters()
    off = model(IDS).logits
    model.enable_adapters()
    model.add_adapter(LoraConfig(target_modules=["v_proj"], init_lora_weights=False), "two")
    model.set_adapter("two")
    second = model(IDS).logits
    model.save_pretrained(folder / "two")
    keys = sorted(model.get_adapter_state_dict())
    model.delete_adapter("two")
    other = tiny_llama()
    other.load_adapter(str(folder / "two"))
    return {
        "acts": not torch.equal(on, plain),
        "off": bool(torch.equal(off, plain)),
        "two": not torch.equal(second, on),
        "left": sorted(model.peft_config),
        "keys": len(keys),
        "read": bool(torch.allclose(other(IDS).logits, second, atol=1e-6)),
    }


if __name__ == "__main__":
    where = Path(sys.argv[1])
    print(json.dumps({"trained": trained(where), "added": added(where)}))
