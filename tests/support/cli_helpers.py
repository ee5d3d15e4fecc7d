"""Tiny models on disk, and the command line run inside this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)
from typer.testing import CliRunner, Result

from kilotune import PeftModel
from kilotune.cli.main import app

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def kilotune(*words: object) -> Result:
    """Run ``kilotune`` with these words; a defect's traceback is raised, not swallowed."""
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="kilotune", catch_exceptions=False)


def as_json(*words: object) -> Any:
    """Run ``kilotune ... --json``; its whole stdout is one JSON document."""
    result = kilotune(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def error(*words: object) -> str:
    """The error of a run that must fail with exit code 2 and say nothing on stdout."""
    result = kilotune(*words)
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **more})).eval()


def gpt2(**more: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, **ids, **more)
    ).eval()


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**BERT)).eval()


def roberta() -> RobertaForMaskedLM:
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**{**BERT, "pad_token_id": 1})).eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def tokens(batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(1))


def shake(model: PeftModel, size: float = 0.3, seed: int = 5) -> PeftModel:
    """Give every trained number a value, as training would, so that the adapter changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    output: torch.Tensor = model(input_ids=tokens()).logits.double()
    return output


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / one.abs().max())
