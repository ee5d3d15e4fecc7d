"""The next token of each request of a step, each by its own temperature, top_p, top_k and seed. Exact, one by one.

Order, as in transformers: penalties (penalties.py), what a grammar allows (grammars.py), temperature, top_k, top_p of
what is left, min_p. A draw is the inverse of the cumulated probabilities at one random number, of a generator that the
request has for itself: with a seed it gives the same numbers whatever else is in the batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from .interface import Sampling
from .penalties import Penalties

__all__ = ["Choice", "Picker", "choose"]

CANDIDATES = 128  # likeliest tokens among which top_p mostly ends; where it does not, all are sorted


@final
class Choice(NamedTuple):
    """What was chosen. finite: whether the logits were numbers; else the token means nothing."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    finite: bool


@final
class Picker:
    """How one request chooses, and its random numbers.

    tokens: the prompt, in the list to which the request adds what was chosen.

    Attributes:
        allowed: (V,) bool, of a request with a grammar: the tokens that may come next; set before each of them.
        idle: nothing is to be chosen this time, so nothing is drawn either.
    """

    def __init__(self, sampling: Sampling, tokens: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self.allowed: Tensor | None = None
        self.idle = False
        self.penalties = Penalties.of(sampling, tokens)
        seed = int.from_bytes(os.urandom(16), "little") if sampling.seed is None else sampling.seed
        self._random = np.random.Generator(np.random.Philox(seed))

    @property
    def greedy(self) -> bool:
        """Whether it takes the likeliest token."""
        return self.sampling.temperature == 0.0 or self.sampling.top_k == 1 or self.idle

    @property
    def whole(self) -> bool:
        """Whether it draws from all tokens."""
        return self.sampling.top_p >= 1.0 and self.sampling.top_k is None

    def draw(self) -> float:
        """The next random number, in [0, 1)."""
        return float(self._random.random())


def choose(logits: Tensor, pickers: Sequence[Picker]) -> list[Choice]:
    """One token for each row.

    Args:
        logits: (n, vocabulary) float32.
        pickers: how each row chooses.

    """
    scores = _penalised(logits, pickers)
    best = scores.max(-1)
    peaks, tokens = best.values, best.indices.clone()
    finite = torch.isfinite(peaks)
    drawn = [row for row, picker in enumerate(pickers) if not picker.greedy]
    if drawn:
        tokens[drawn] = _drawn(scores, peaks, [(row, pickers[row]) for row in drawn])
    told = [row for row, picker in enumerate(pickers) if picker.sampling.logprobs is not None]
    logprobs = _logprobs(logits, tokens, told, pickers) if told else {}
    plain: tuple[float | None, tuple[tuple[int, float], ...]] = (None, ())
    numbers, good = tokens.tolist(), finite.tolist()
    return [Choice(int(numbers[i]), *logprobs.get(i, plain), bool(good[i])) for i in range(len(pickers))]


def _penalised(logits: Tensor, pickers: Sequence[Picker]) -> Tensor:
    """(n, V): the logits, of rows with penalties or a grammar changed; the very same tensor where no row has any."""
    rows = [(i, one) for i, one in enumerate(pickers) if one.penalties is not None or one.allowed is not None]
    if not rows:
        return logits
    scores = logits.clone()
    for row, picker in rows:
        if picker.penalties is not None:
            picker.penalties.apply(scores[row])
        if picker.allowed is not None:
            scores[row].masked_fill_(~picker.allowed.to(scores.device), -torch.inf)
    return scores


def _drawn(logits: Tensor, peaks: Tensor, rows: Sequence[tuple[int, Picker]]) -> Tensor:
    """(len(rows),) int64: what these rows draw."""
    places = torch.tensor([row for row, _ in rows], device=logits.device)
    heat = torch.tensor([picker.sampling.temperature for _, picker in rows], device=logits.device).unsqueeze(1)
    scaled = (logits.index_select(0, places) - peaks.index_select(0, places).unsqueeze(1)) / heat  # (m, V), at most 0
    weights = scaled.nan_to_num(nan=-torch.inf).exp()
    found = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
    whole = [i for i, (_, picker) in enumerate(rows) if picker.whole]
    if whole:
        own = [rows[i][1] for i in whole]
        found[whole] = _inverse(_likely(weights[whole], own), torch.tensor([picker.draw() for picker in own]))
    for i, (_, picker) in enumerate(rows):
        if not picker.whole:
            found[i] = _among_likeliest(weights[i], picker)
    return found


def _likely(weights: Tensor, pickers: Sequence[Picker]) -> Tensor:
    """The weights (m, V), whose largest is 1, without those that min_p leaves out."""
    least = [picker.sampling.min_p for picker in pickers]
    if not any(least):
        return weights
    return weights * (weights >= torch.tensor(least, device=weights.device).unsqueeze(1))


def _inverse(weights: Tensor, at: Tensor) -> Tensor:
    """Where the cumulated weights (m, n) reach the share ``at`` (m,) of their total."""
    cumulated = weights.double().cumsum(-1)
    goal = at.to(cumulated).unsqueeze(1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, goal, right=True).squeeze(1).clamp(max=weights.shape[1] - 1)


def _among_likeliest(weights: Tensor, picker: Picker) -> Tensor:
    """One draw from the weights (V,) of one row, cut by top_k, top_p and min_p."""
    vocabulary = weights.shape[0]
    top_k = min(picker.sampling.top_k or vocabulary, vocabulary)
    top_p = picker.sampling.top_p
    total = weights.double().sum() if top_k == vocabulary else None
    for size in dict.fromkeys((min(CANDIDATES, top_k), top_k)):
        kept, ids = weights.topk(size)
        cumulated = kept.double().cumsum(0)
        if total is None and size < top_k:
            if top_p >= 1.0:
                continue
            total_here = weights.topk(top_k).values.double().sum()
        else:
            total_here = cumulated[-1] if total is None else total
        reached = cumulated >= top_p * total_here
        if size == top_k or bool(reached[-1]):
            last = int(reached.int().argmax()) if bool(reached[-1]) else size - 1
            left = _likely(kept[None, : last + 1], [picker])
            return ids[_inverse(left, torch.tensor([picker.draw()]))[0]]
    raise AssertionError("the last size takes all")


def _logprobs(
    logits: Tensor, tokens: Tensor, rows: Sequence[int], pickers: Sequence[Picker]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    places = torch.tensor(rows, device=logits.device)
    all_of = torch.log_softmax(logits.index_select(0, places), -1)  # (m, V)
    own = all_of.gather(1, tokens.index_select(0, places).unsqueeze(1)).squeeze(1).tolist()
    wanted = [pickers[row].sampling.logprobs or 0 for row in rows]
    most = min(max(wanted), logits.shape[1])
    values, ids = all_of.topk(most, -1) if most else (all_of[:, :0], all_of[:, :0])
    found = {}
    for i, (row, count) in enumerate(zip(rows, wanted, strict=True)):
        pairs = zip(ids[i, :count].tolist(), values[i, :count].tolist(), strict=True)
        found[row] = (float(own[i]), tuple((int(token), float(value)) for token, value in pairs))
    return found
