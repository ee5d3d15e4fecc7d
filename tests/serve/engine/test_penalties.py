"""Penalties and logit_bias against transformers' processors, OpenAI's formula, and alone in a mixed batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from kilotune.errors import ConfigError
from kilotune.serve.engine.interface import Generation, Sampling
from kilotune.serve.engine.penalties import Penalties
from kilotune.serve.engine.running_requests import check_request
from kilotune.serve.engine.sampling import Picker, _penalised, choose

SIZE = 30
TOKENS = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=20)


def changed(sampling: Sampling, prompt: list[int], answer: list[int], logits: torch.Tensor) -> torch.Tensor:
    """As the engine has it: the answer's tokens come one by one, and each step applies them."""
    tokens = list(prompt)
    made = Penalties.of(sampling, tokens)
    assert made is not None
    for token in answer:
        made.apply(torch.zeros(SIZE))
        tokens.append(token)
    found = logits.clone()
    made.apply(found)
    return found


@given(TOKENS, TOKENS, st.floats(0.1, 3.0), st.integers(0, 1000))
def test_repetition_and_bias_are_those_of_transformers(
    prompt: list[int], answer: list[int], factor: float, seed: int
) -> None:
    logits = 3 * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    bias = {token: float(place - 3) for place, token in enumerate(dict.fromkeys([*answer[:4], 0, 29]))}
    ids = torch.tensor([[*prompt, *answer]])
    wanted = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])(ids, logits[None])
    wanted = RepetitionPenaltyLogitsProcessor(factor)(ids, wanted)
    sampling = Sampling(max_tokens=1, repetition_penalty=factor, logit_bias=tuple(bias.items()))
    torch.testing.assert_close(changed(sampling, prompt, answer, logits), wanted[0])


@given(TOKENS, st.lists(st.integers(0, SIZE - 1), max_size=20), st.floats(-2, 2), st.floats(0.25, 2))
def test_frequency_and_presence_are_of_the_answer_alone(
    prompt: list[int], answer: list[int], presence: float, frequency: float
) -> None:
    logits = torch.linspace(-2, 2, SIZE)
    wanted = [
        float(value) - answer.count(token) * frequency - (presence if token in answer else 0.0)
        for token, value in enumerate(logits)
    ]
    sampling = Sampling(max_tokens=1, presence_penalty=presence, frequency_penalty=frequency)
    torch.testing.assert_close(changed(sampling, prompt, answer, logits), torch.tensor(wanted), rtol=1e-5, atol=1e-5)


def test_each_row_of_a_batch_has_its_own_and_logprobs_are_the_models() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]]).expand(4, -1)
    kinds: list[tuple[Sampling, list[int]]] = [
        (Sampling(max_tokens=1, temperature=0.0, logprobs=1), []),
        (Sampling(max_tokens=1, temperature=0.0, logit_bias=((3, 50.0),), logprobs=1), []),
        (Sampling(max_tokens=1, temperature=0.0, repetition_penalty=2.0), [2]),
        (Sampling(max_tokens=1, temperature=1.0, top_k=1, logit_bias=((2, -100.0), (1, -100.0))), []),
    ]
    got = choose(logits, [Picker(sampling, tokens) for sampling, tokens in kinds])
    assert [choice.token for choice in got] == [2, 3, 1, 0]
    own = torch.log_softmax(logits[0], -1)
    assert [got[0].logprob, got[1].logprob] == pytest.approx([float(own[2]), float(own[3])])
    assert got[1].top == ((2, pytest.approx(float(own[2]))),)
    assert logits[0].tolist() == [1.0, 2.0, 3.0, 0.0]


def test_a_bias_decides_what_is_drawn() -> None:
    sampling = Sampling(max_tokens=1, seed=1, logit_bias=((7, 100.0),))
    assert choose(torch.randn(1, SIZE), [Picker(sampling)])[0].token == 7


def test_rows_without_penalties_cost_nothing() -> None:
    plain = Picker(Sampling(max_tokens=1, min_p=0.5, top_p=0.5, logprobs=2), [1])
    assert plain.penalties is None
    logits = torch.zeros(2, SIZE)
    assert _penalised(logits, [plain, plain]) is logits
    assert _penalised(logits, [plain, Picker(Sampling(max_tokens=1, presence_penalty=1.0))]) is not logits


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number from 0.01 to 100, got 0.0"),
        ({"frequency_penalty": 2.1}, "frequency_penalty: expected a number from -2 to 2"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"min_p": -0.1}, "min_p: expected a number from 0 to 1"),
        ({"logit_bias": ((SIZE, 1.0),)}, "logit_bias: token 30; the model has 30"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias: expected numbers from -100 to 100, got 101.0 of token 1"),
    ],
)
def test_what_is_out_of_bounds_is_refused(change: dict[str, object], part: str) -> None:
    sampling = Sampling(max_tokens=1, **change)  # type: ignore[arg-type]
    request = Generation(id="x", tenant="ann", adapter=None, prompt=(1,), sampling=sampling)
    with pytest.raises(ConfigError, match=part):
        check_request(request, SIZE, 64, True)
