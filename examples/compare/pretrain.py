"""Pretrain a small causal language model on Python source: the base that the third comparison adapts to C++.

python examples/compare/pretrain.py [--data data/compare/source] [--out data/compare/base] [--steps 2200]

A Llama of 4 layers and hidden size 128 (1.06 million numbers), and a byte-level BPE of 2,048 tokens made of the same
text. Half an hour on one core of a CPU. Same data, same versions, same kind of processor: same model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY, LENGTH, BATCH, RATE = 2048, 160, 16, 2e-3
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--data", type=Path, default=Path("data/compare/source"))
    options.add_argument("--out", type=Path, default=Path("data/compare/base"))
    options.add_argument("--steps", type=int, default=2200)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    train = texts(chosen.data / "python-train.jsonl")
    processor = tokenizer(train)
    model = pretrained(rows(train, processor), processor, chosen.steps)
    held = rows(texts(chosen.data / "python-validation.jsonl"), processor)
    print(f"validation, Python: {loss_of(model, held, processor):.3f} nats a token")
    model.save_pretrained(chosen.out)
    processor.save_pretrained(chosen.out)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def tokenizer(train: list[str]) -> Any:
    """A byte-level BPE, as transformers' fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(train, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def rows(pieces: list[str], processor: Any) -> list[list[int]]:
    return [ids[:LENGTH] for ids in processor(pieces)["input_ids"]]


def batch_of(chosen: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Padded to the longest: input_ids, attention_mask and labels, each (rows, tokens)."""
    longest = max(map(len, chosen))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in chosen])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in chosen])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def pretrained(data: list[list[int]], processor: Any, steps: int) -> Any:
    """The model after ``steps`` steps of AdamW, with a rise of 5 % and a fall along a cosine."""
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SHAPE)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    order = torch.Generator().manual_seed(0)
    picked: list[int] = []
    for step in range(steps):
        if len(picked) < BATCH:
            picked += torch.randperm(len(data), generator=order).tolist()
        batch = batch_of([data[i] for i in picked[:BATCH]], processor.pad_token_id)
        del picked[:BATCH]
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def loss_of(model: Any, data: list[list[int]], processor: Any) -> float:
    """Nats per token."""
    total, count = 0.0, 0
    for start in range(0, len(data), BATCH):
        batch = batch_of(data[start : start + BATCH], processor.pad_token_id)
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * tokens
        count += tokens
    return total / count


if __name__ == "__main__":
    main()
