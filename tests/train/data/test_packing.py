"""Packing: every row is in, none too many in a sequence, and no row changes with what it is packed with."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from kilotune.errors import UnsupportedError
from kilotune.train.data.batches import PackedBatch, PaddedBatch
from kilotune.train.data.packing import pack, packed_batch, refuse_leaks

VOCABULARY = 120
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(attention: str = "sdpa", **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=48, max_position_embeddings=64, **more)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def mistral() -> Any:
    """Sees the last 5 tokens only, in each row by itself."""
    torch.manual_seed(0)
    options = {"intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2, "sliding_window": 5}
    config = transformers.MistralConfig(**SIZES, **options)
    return transformers.MistralForCausalLM(config).eval()


def gpt2(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=attention).eval()


def bigcode() -> Any:
    torch.manual_seed(0)
    config = transformers.GPTBigCodeConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPTBigCodeForCausalLM(config).eval()


MODELS = {
    "llama sdpa": llama,
    "llama eager": lambda: llama("eager"),
    "mistral": mistral,
    "gpt2 sdpa": gpt2,
    "gpt2 eager": lambda: gpt2("eager"),
    "gpt_bigcode": bigcode,
}


def examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of 2 to 12 tokens; the first third of each has no loss, the first token never."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = generator.integers(VOCABULARY, size=generator.integers(2, 13))
        labels = ids.copy()
        labels[: max(1, len(ids) // 3)] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = {name: np.concatenate([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return {**found, "position_ids": np.concatenate([np.arange(len(row["labels"])) for row in rows])}


# -- which rows go together ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_each_row_is_packed_once_and_no_sequence_is_too_long(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.choice([1, 2, 7, 30, 64, draw.randint(1, 64)]) for _ in range(500)]
    bins = pack(lengths, 64)
    assert sorted(row for held in bins for row in held) == list(range(500))
    assert max(sum(lengths[row] for row in held) for held in bins) <= 64
    least = -(-sum(lengths) // 64)
    assert len(bins) <= 1.23 * least + 1  # best fit decreasing needs at most 11/9 of the best, and a bit
    assert pack(lengths, 64) == bins


def test_packing_by_hand() -> None:
    assert pack([5, 4, 3, 2, 1], 6) == [[0, 4], [1, 3], [2]]
    assert pack([], 6) == []
    assert pack([6, 6], 6) == [[0], [1]]
    with pytest.raises(ValueError, match="row 1 has 7 tokens"):
        pack([1, 7], 6)


# -- no row sees another -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_has_the_logits_and_the_loss_that_it_has_alone(name: str) -> None:
    model = MODELS[name]()
    rows = examples(9)
    packed = [joined(rows[:4]), joined(rows[4:6]), joined(rows[6:])]
    batch = PackedBatch(pad=3)(packed)
    assert len({len(row["labels"]) for row in packed}) > 1  # so that there is padding
    with torch.no_grad():
        output = model(**batch)
        losses, count = 0.0, 0
        for held, logits in zip((rows[:4], rows[4:6], rows[6:]), output.logits):
            start = 0
            for row in held:
                ids, labels = (torch.tensor(row[key])[None] for key in ("input_ids", "labels"))
                alone = model(input_ids=ids, use_cache=False).logits[0]
                torch.testing.assert_close(logits[start : start + len(alone)], alone, rtol=1e-4, atol=1e-5)
                losses += nn.functional.cross_entropy(
                    alone[:-1], labels[0, 1:], ignore_index=-100, reduction="sum"
                ).item()
                count += int((labels[0, 1:] != -100).sum())
                start += len(alone)
    assert output.loss.item() == pytest.approx(losses / count, rel=1e-5)


@pytest.mark.parametrize("name", ["llama sdpa", "gpt2 eager"])
def test_packed_and_padded_batches_give_the_same_gradients(name: str) -> None:
    rows = examples(6, seed=1)
    gradients = []
    for batch in (
        PackedBatch(pad=3)([joined(rows[:3]), joined(rows[3:])]),
        PaddedBatch({"input_ids": 3, "labels": -100})(rows),
    ):
        model = MODELS[name]()
        model(**batch).loss.backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-6)


def test_a_row_that_is_not_packed_goes_through_the_same_collator() -> None:
    model = llama()
    rows = examples(3, seed=2)
    with torch.no_grad():
        packed = model(**PackedBatch(pad=0)(rows)).loss
        padded = model(**PaddedBatch({"input_ids": 0, "labels": -100})(rows)).loss
    assert packed.item() == pytest.approx(padded.item(), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_keep_rows_apart_pass_the_trial(name: str) -> None:
    model = MODELS[name]()
    model.lm_head.train()  # modes are given back one by one
    before = {key: module.training for key, module in model.named_modules()}
    refuse_leaks(model)
    assert {key: module.training for key, module in model.named_modules()} == before
    refuse_leaks(model.to(torch.bfloat16))


class Leaks(nn.Module):
    """A model that keeps its keys whatever it is told, so that transformers does not look for packed rows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Any, position_ids: Any, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_whose_rows_see_each_other_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match="packed rows see each other .*set data.packing to false"):
        refuse_leaks(Leaks(llama()).to(dtype))


def test_models_that_take_no_positions_are_refused() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=4)).eval()
    with pytest.raises(UnsupportedError, match=r"data.packing: .*MambaForCausalLM"):
        refuse_leaks(model)


def test_padding_is_a_row_of_its_own() -> None:
    batch = packed_batch([joined(examples(2)), joined(examples(1))], pad=7)
    short = len(examples(1)[0]["labels"])
    assert batch["input_ids"][1, short:].unique().tolist() == [7]
    assert batch["labels"][1, short:].unique().tolist() == [-100]
    assert batch["position_ids"][1].tolist() == [*range(short), *range(batch["labels"].shape[1] - short)]
    assert batch["use_cache"] is False
