"""Choosing tokens, text as it comes, turns of tenants: each against something independent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kilotune.serve.engine.fairness import FairQueue
from kilotune.serve.engine.interface import Sampling
from kilotune.serve.engine.sampling import CANDIDATES, Picker, choose
from kilotune.serve.engine.text_stream import TextStream
from tests.support.serve_support import byte_tokenizer as tokenizer

DRAWS = 800
CASES = {
    "all": {},
    "hot": {"temperature": 1.8},
    "cold": {"temperature": 0.3},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 5},
    "both": {"top_k": 9, "top_p": 0.6, "temperature": 1.3},
    "hardly any": {"top_p": 1e-9},
    "min_p": {"min_p": 0.1},
    "min_p and others": {"min_p": 0.2, "top_p": 0.8, "top_k": 15, "temperature": 1.4},
}


def wanted(
    logits: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None, min_p: float = 0.0
) -> torch.Tensor:
    """The probabilities that transformers' own warpers leave."""
    scores = logits.unsqueeze(0).clone()
    ids = torch.zeros(1, 1, dtype=torch.int64)
    if temperature != 1.0:
        scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p > 0.0:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    return torch.softmax(scores, -1)[0]


@pytest.mark.parametrize("size", [20, 3 * CANDIDATES])
@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_probabilities_of_transformers(case: str, size: int) -> None:
    logits = 2.0 * torch.randn(size, generator=torch.Generator().manual_seed(4))
    expected = wanted(logits, **CASES[case])  # type: ignore[arg-type]
    pickers = [Picker(Sampling(max_tokens=1, seed=i, **CASES[case])) for i in range(DRAWS)]  # type: ignore[arg-type]
    got = np.bincount([c.token for c in choose(logits.expand(DRAWS, -1), pickers)], minlength=size) / DRAWS
    assert set(np.flatnonzero(got)) <= set(torch.nonzero(expected).flatten().tolist())
    # Each count is within five of its standard deviations (and three draws) of what is expected.
    spread = (expected * (1 - expected) / DRAWS).sqrt().numpy()
    assert (np.abs(got - expected.numpy()) <= 5 * spread + 3 / DRAWS).all()


def test_flat_distributions_reach_beyond_the_candidates() -> None:
    size = 10 * CANDIDATES
    pickers = [Picker(Sampling(max_tokens=1, seed=i, top_p=0.9)) for i in range(200)]
    tokens = [choice.token for choice in choose(torch.linspace(0.0, 0.1, size).expand(200, -1), pickers)]
    assert min(tokens) < 0.2 * size
    assert min(tokens) >= 0.08 * size  # the tenth that is left out, to rounding


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_a_row_draws_the_same_in_any_company(seed: int, others: int) -> None:
    logits = torch.randn(others + 1, 50, generator=torch.Generator().manual_seed(seed % 1000))
    sampling = Sampling(max_tokens=1, seed=seed, temperature=1.5, top_p=0.95)
    alone = [choose(logits[:1], [picker])[0].token for picker in [Picker(sampling)] for _ in range(3)]
    picker = Picker(sampling)
    rest = [Picker(Sampling(max_tokens=1, temperature=float(i))) for i in range(others)]
    assert alone == [choose(logits, [picker, *rest])[0].token for _ in range(3)]


def test_greedy_ties_logprobs_and_what_is_not_finite() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [float("nan"), 0.0, 0.0], [0.0, float("inf"), 0.0], [3.0, 0.0, 1.0]])
    plain = Sampling(max_tokens=1, temperature=0.0, logprobs=2)
    drawn = Sampling(max_tokens=1, temperature=1.0, seed=1)
    got = choose(logits, [Picker(plain), Picker(drawn), Picker(drawn), Picker(plain)])
    assert [choice.finite for choice in got] == [True, False, False, True]
    assert (got[0].token, got[3].token) == (1, 0)
    expected = torch.log_softmax(logits[0], -1)
    assert got[0].logprob == pytest.approx(float(expected[1]))
    assert got[0].top == tuple((i, pytest.approx(float(expected[i]))) for i in (1, 2))
    assert got[1].logprob is None


# -- text --------------------------------------------------------------------------------------------

TEXT = "größer 🦜🦜 naïve\n\tend — 日本語 ok"


@pytest.mark.parametrize("prompt", ["", "the red fox", "日"])
def test_pieces_join_to_the_whole_text(prompt: str) -> None:
    own = tokenizer()
    ids = own.encode(TEXT, add_special_tokens=False)
    stream = TextStream(own, own.encode(prompt, add_special_tokens=False) if prompt else [], ())
    pieces = [stream.push(token)[0] for token in ids]
    assert "".join(pieces) + stream.flush() == TEXT
    assert "" in pieces  # bytes of a character that is not whole
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_ends_does_not_hold_the_text_up() -> None:
    own = tokenizer()
    half = own.encode("🦜", add_special_tokens=False)[:1]
    stream = TextStream(own, [], ())
    pieces = [stream.push(token)[0] for token in half * 20]
    assert sum(bool(piece) for piece in pieces) >= 2
    rest = own.encode(" ok", add_special_tokens=False)
    assert ("".join(pieces + [stream.push(token)[0] for token in rest]) + stream.flush()).endswith(" ok")


@given(st.text(alphabet="abc", min_size=1, max_size=30), st.lists(st.text(alphabet="abc", min_size=1, max_size=4)))
def test_a_stop_text_ends_at_its_first_place(text: str, stops: list[str]) -> None:
    own = tokenizer()
    stream = TextStream(own, [], stops)
    got = ""
    for token in own.encode(text, add_special_tokens=False):
        piece, stopped = stream.push(token)
        got += piece
        assert not any(stop in got for stop in stops)
        if stopped:
            break
    else:
        got += stream.flush()
    found = [text.index(stop) for stop in stops if stop in text]
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not found:
        assert got == text
    else:  # where several stop texts end with one token, the one that begins first counts
        assert text.startswith(got)
        assert min(found) == len(got) or len(got) in found
        assert len(got) <= min(ends)


# -- turns -------------------------------------------------------------------------------------------


def test_the_least_served_tenant_is_next() -> None:
    queue: FairQueue[int] = FairQueue()
    for i in range(6):
        queue.add("many", i)
    order = []
    for step in range(9):
        if step == 2:
            for i in range(3):
                queue.add("late", i)
        tenant = queue.turn()[0]
        queue.pop(tenant)
        queue.started(tenant)
        queue.charge(tenant, 10.0 if tenant == "many" else 20.0)
        order.append(tenant)
    assert order[:2] == ["many", "many"]
    # It starts level with the other, and each of its requests counts twice.
    assert order[2:] == ["many", "late", "many", "many", "late", "many", "late"]


def test_nothing_is_kept_of_who_has_left() -> None:
    queue: FairQueue[int] = FairQueue()
    for i in range(100):
        queue.add(f"t{i}", i)
        queue.pop(f"t{i}")
        queue.started(f"t{i}")
        queue.ended(f"t{i}")
    queue.add("x", 1)
    assert queue.remove("x", 1)
    assert not queue.remove("x", 1)
    assert (queue._waiting, queue._served, queue._running) == ({}, {}, {})
