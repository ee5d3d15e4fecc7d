"""What the model says of a prompt's own tokens: each one's log-probability after those before it.

A prompt is read in parts, and of each part as many logits are there as it has tokens: :data:`LOGITS` bounds them for
all prompts of a step that ask. Requests that do not ask compute none of this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from .fairness import Unread, share_out
from .interface import Scored

__all__ = ["PromptScores", "most_tokens", "share_scored"]

LOGITS = 1 << 24  # numbers of one step, over the whole vocabulary; 64 MiB
ROWS = 64  # of them that are worked on at a time
LEAST = -9999.0  # in place of minus infinity, which JSON does not have


def most_tokens(vocabulary: int) -> int:
    """Of how many tokens of prompts one step may have the logits."""
    return max(16, LOGITS // vocabulary)


def share_scored(given: dict[str, int], scored: Sequence[Unread], most: int) -> dict[str, int]:
    """The tokens of a step that each prompt gets, with at most ``most`` for those of ``scored``, together."""
    own = [prompt._replace(tokens=given[prompt.id]) for prompt in scored]
    return {**given, **share_out(own, most)} if sum(prompt.tokens for prompt in own) > most else given


@final
class PromptScores:
    """Of one request, as far as its prompt was read; the first token has nothing before it, and no number.

    Args:
        prompt: its tokens.
        top: how many likeliest tokens come with each.

    """

    def __init__(self, prompt: Sequence[int], top: int) -> None:
        self._prompt, self._top = prompt, top
        self._found: list[Scored | None] = [None]
        self.finite = True

    @property
    def complete(self) -> bool:
        """Whether all tokens have theirs."""
        return len(self._found) == len(self._prompt)

    @property
    def all(self) -> tuple[Scored | None, ...]:
        """One for each token of the prompt."""
        return tuple(self._found)

    def take(self, begin: int, logits: Tensor) -> None:
        """What a step made of a part of the prompt; what was read before, and is read again, stays as it is.

        Args:
            begin: the place of its first token.
            logits: (tokens, vocabulary), one row for each token of the part.

        """
        known = len(self._found) - 1 - begin
        fresh = logits[known : len(self._prompt) - 1 - begin]
        for at in range(0, fresh.shape[0], ROWS):
            self._add(fresh[at : at + ROWS].float())

    def _add(self, rows: Tensor) -> None:
        place = len(self._found)
        ids = list(self._prompt[place : place + rows.shape[0]])
        total = rows.logsumexp(-1, keepdim=True)
        own = rows.gather(1, torch.tensor(ids, device=rows.device).unsqueeze(1))
        ranks = (rows > own).sum(-1).add(1).tolist()
        best = rows.topk(min(self._top, rows.shape[1]), -1)
        values, likely = (best.values - total).tolist(), best.indices.tolist()
        for i, value in enumerate((own - total).squeeze(1).tolist()):
            self.finite &= not math.isnan(value)
            top = tuple((token, max(v, LEAST)) for token, v in zip(likely[i], values[i], strict=True))
            self._found.append(Scored(ids[i], max(value, LEAST), ranks[i], top))
