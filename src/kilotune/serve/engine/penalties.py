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
        self._seen: Tensor | None = None  # (V,) bool: whether prompt or answer has the token
        self._count: Tensor | None = None  # (V,) float32: how often the answer has it
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
        seen, count = self._counted(logits)
        if seen is not None:
            factor = asked.repetition_penalty
            logits.copy_(torch.where(seen, torch.where(logits < 0, logits * factor, logits / factor), logits))
        if count is not None:
            logits -= asked.frequency_penalty * count + asked.presence_penalty * (count > 0)

    def _biases(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._bias is None:
            places, values = zip(*self._sampling.logit_bias, strict=True)
            self._bias = torch.tensor(places, device=like.device), torch.tensor(values).to(like)
        return self._bias

    def _counted(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(seen, count), up to the last token; None: not asked for."""
        asked = self._sampling
        new, made = self._tokens[self._told :], self._tokens[max(self._told, self._prompt) :]
        self._told = len(self._tokens)
        if asked.repetition_penalty != 1.0:
            self._seen = torch.zeros_like(like, dtype=torch.bool) if self._seen is None else self._seen
            self._seen[torch.tensor(new, dtype=torch.int64, device=like.device)] = True
        if asked.frequency_penalty or asked.presence_penalty:
            self._count = torch.zeros_like(like) if self._count is None else self._count
            places = torch.tensor(made, dtype=torch.int64, device=like.device)
            self._count.index_add_(0, places, torch.ones_like(places, dtype=like.dtype))
        return self._seen, self._count
