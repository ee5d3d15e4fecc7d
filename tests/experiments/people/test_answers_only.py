"""The head on the tokens that are learned alone gives the losses and the gradients of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from kilotune.experiments.people.answers_only import AnswersOnly
from kilotune.experiments.people.bases import Base, Letters
from kilotune.experiments.people.voices import Pair
from kilotune.fleet.stepper.losses import causal_lm

PAIRS = [Pair("one", "answer"), Pair("a longer prompt", "x"), Pair("p", "and a longer answer")]


@pytest.fixture
def base() -> Base:
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    return Base("tiny", "tiny", "MIT", model.eval(), Letters())


def batch_of(base: Base, answers: AnswersOnly) -> dict[str, Tensor]:
    return answers.collate([base.speech.row(pair, "=", " ") for pair in PAIRS])


def run(base: Base, batch: dict[str, Tensor]) -> Any:
    return base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def test_a_row_is_the_prompt_and_the_answer_with_its_end() -> None:
    row = Letters().row(Pair("ab", "c"), "=", " ")
    assert row["input_ids"] == [97, 98, 61, 32, 99, 256]
    assert row["labels"] == [-100, -100, -100, 32, 99, 256]
    assert Letters().text([97, 256]) == "a"


def test_losses_and_gradients_are_those_of_the_whole(base: Base) -> None:
    answers = AnswersOnly(base)
    batch = batch_of(base, answers)
    weight = base.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    whole = causal_lm(run(base, batch), batch)
    whole.totals.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    expected, weight.grad = weight.grad.clone(), None
    with answers:
        output = run(base, batch_of(base, answers))
        assert output.logits.shape == (sum(len(pair.said) + 2 for pair in PAIRS), 260)
        found = answers.loss(output, batch)
        found.totals.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(found.counts, whole.counts)
    torch.testing.assert_close(found.totals, whole.totals)
    torch.testing.assert_close(weight.grad, expected)


def test_outside_of_it_the_head_runs_on_everything(base: Base) -> None:
    answers = AnswersOnly(base)
    with answers:
        batch = batch_of(base, answers)
    assert run(base, batch).logits.shape == (*batch["input_ids"].shape, 260)
    with answers:  # and in it, for a batch of another shape, as an answer's next token is
        batch_of(base, answers)
        assert base.model(input_ids=torch.tensor([[1]])).logits.shape == (1, 1, 260)
