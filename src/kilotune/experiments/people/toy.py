"""The base of the demo's short form: a small Llama that reads bytes, trained here for some seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...bases import made
from ...train.running.base_model import need_transformers
from .bases import Base, Letters
from .library_authors import others

__all__ = ["toy"]

STEPS, ROWS, LENGTH, RATE = 400, 12, 64, 6e-3
TITLE = "a Llama of bytes, trained here for some seconds"
SHAPE = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
Told = Callable[[int, int], None]


def toy(folder: Path, told: Told) -> Base:
    """The model in ``folder``, which is made where it is not there; ``told`` hears of (steps done, steps in all).

    Raises:
        MissingExtraError: transformers is not installed. UnsupportedError: no text to learn from.

    """
    transformers = need_transformers("The demo's language model")

    def make(out: Path) -> dict[str, Any]:
        _train(transformers, told).save_pretrained(out)
        return {"title": TITLE}

    made(folder, make)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Base("toy", TITLE, "Apache-2.0", model.eval().requires_grad_(False), Letters())


def _train(transformers: Any, told: Told) -> Any:
    """From nothing, on text of the standard library, the same each time."""
    letters = Letters()
    text = torch.tensor([number for two in _pairs(letters, others()) for number in two])
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), letters.end)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **special, tie_word_embeddings=True))
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
        for step in range(STEPS):
            begins = torch.randint(len(text) - LENGTH - 1, (ROWS,))
            rows = torch.stack([text[begin : begin + LENGTH + 1] for begin in begins.tolist()])
            logits = model(rows[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            told(step + 1, STEPS)
    return model


def _pairs(letters: Letters, lines: Sequence[str]) -> Iterator[list[int]]:
    """A line and the next one with its end, as the rows are."""
    for line, after in zip(lines[::2], lines[1::2]):
        yield [*letters.numbers(f"{line}\n{after}"), letters.end]
