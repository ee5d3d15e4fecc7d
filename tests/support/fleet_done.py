"""256 users, each the source of a module of Python's library, trained together: ``python fleet_done.py FOLDER``.

A process of its own, so that what comes after it knows only what the store holds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kilotune import VeraConfig
from kilotune.fleet import FleetSettings, User, fit, open_store

COUNT, LENGTH = 256, 24
CONFIG = VeraConfig(r=16, target_modules="all-linear")
SETTINGS = FleetSettings(batch_size=4, users_per_step=64, epochs=4, learning_rate=0.02, seed=5)


def base() -> Any:
    """A Llama over bytes, random: what its adapters learn is all that it knows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@cache
def users() -> list[User]:
    """The longest modules of the standard library, cut into rows of bytes; a user has 4 to 10 of them."""
    folder = Path(next(path for path in sys.path if Path(path, "argparse.py").is_file()))
    files = [
        path
        for path in sorted(folder.rglob("*.py"))
        if path.stat().st_size > 3000 and "site-packages" not in path.parts
    ]
    found = []
    for i, path in enumerate(files[:: max(1, len(files) // COUNT)][:COUNT]):
        text = path.read_bytes()
        rows = [
            list(text[start : start + LENGTH - start % 7]) for start in range(200, 200 + LENGTH * (4 + i % 7), LENGTH)
        ]
        found.append(User(f"{i:03}-{path.stem}", rows, metadata={"module": path.name}))
    assert len(found) == COUNT
    return found


def collate(rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """Bytes padded on the right."""
    size = max(map(len, rows))
    ids = torch.tensor([row + [0] * (size - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with open_store(f"sqlite:///{folder / 'adapters.db'}") as store:
        report = fit(base(), CONFIG, users(), SETTINGS, collate=collate, sink=store, folder=folder / "state")
    assert not report.failed, report.failed[:3]
    better = [user for user in report.users if user.losses[-1] < user.losses[0]]
    print(f"{len(better)} of {len(report.users)} lost less in the last epoch than in the first")
    assert len(better) > 0.98 * COUNT
