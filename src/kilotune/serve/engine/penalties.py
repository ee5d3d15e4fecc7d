"""What a request does to the logits before a token of it is chosen: logit_bias, and penalties of what it has already.

Only requests that ask for any of this have a :class:`Penalties`, so others cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, final

import torch
from torch import Tensor

from .interface import Sampling

__all__ = ["Penalties"]


@final
class Penalties:
    """Of one request.

    Args:
        sampling: with the penalties.
        tokens: the prompt; what is chosen is added to this list by who holds it.

    """

    def __init__(self, sampling: Sampling, tokens: Sequence[int]) -> None:
        self._sampling, self._tokens, self._prompt = sampling, tokens, len(tokens)
        self._told = 0  # of the tokens, how many are counted
        self._all, self._answer = _Counted(), _Counted()
        self._bias: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, sampling: Sampling, tokens: Sequence[int]) -> Self | None:
        """None where the logits stay as they are."""
        asked = (
            sampling.logit_bias
            or sampling.repetition_penalty != 1.0
            or sampling.frequency_penalty
            or sampling.presence_penalty
        )
        return cls(sampling, tokens) if asked else None

    def apply(self, logits: Tensor) -> None:
        """Change the logits (V,) of the next token, in place."""
        asked = self._sampling
        if asked.logit_bias:
            places, values = self._biases(logits)
            logits.index_add_(0, places, values)
        self._count(logits)
        if (ids := self._all.ids) is not None:
            factor, own = asked.repetition_penalty, logits[ids]
            logits[ids] = torch.where(own < 0, own * factor, own / factor)
        if (ids := self._answer.ids) is not None:
            logits[ids] -= asked.frequency_penalty * self._answer.counts + asked.presence_penalty

    def _biases(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._bias is None:
            places, values = zip(*self._sampling.logit_bias, strict=True)
            self._bias = torch.tensor(places, device=like.device), torch.tensor(values).to(like)
        return self._bias

    def _count(self, like: Tensor) -> None:
        """Take note of the tokens that came since the last time, as far as a penalty asks for them."""
        asked = self._sampling
        if asked.repetition_penalty != 1.0:
            self._all.add(self._tokens[self._told :], like)
        if asked.frequency_penalty or asked.presence_penalty:
            self._answer.add(self._tokens[max(self._told, self._prompt) :], like)
        self._told = len(self._tokens)


@final
class _Counted:
    """Different tokens (n,) int64, None while there are none, and how often each came (n,)."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self.ids: Tensor | None = None
        self.counts = torch.zeros(0)

    def add(self, tokens: Sequence[int], like: Tensor) -> None:
        """Count tokens, on the device of ``like`` and in its dtype."""
        if not tokens:
            return
        fresh = [token for token in dict.fromkeys(tokens) if token not in self._places]
        self._places |= {token: place for place, token in enumerate(fresh, len(self._places))}
        if fresh:
            more = torch.tensor(fresh, device=like.device)
            self.ids = more if self.ids is None else torch.cat([self.ids, more])
            self.counts = torch.cat([self.counts.to(like), like.new_zeros(len(fresh))])
        places = torch.tensor([self._places[token] for token in tokens], device=like.device)
        self.counts.index_add_(0, places, torch.ones_like(places, dtype=like.dtype))
