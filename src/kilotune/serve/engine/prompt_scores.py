"""What the model says of a prompt's own tokens: each one's log-probability after those before it.

A prompt is read in parts, and of each part as many logits are there as it has tokens: :data:`LOGITS` bounds them for
all prompts of a step that ask. Requests that do not ask compute none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final, overload

import numpy as np
import torch
from torch import Tensor

from .fairness import Unread, share_out
from .interface import Scored

__all__ = ["PromptScores", "Scores", "most_tokens", "share_scored"]

Numbers = np.ndarray[Any, np.dtype[Any]]

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


class Part(NamedTuple):
    """Some tokens: logprobs and ranks (n,), the likeliest ones' ids and values (n, top)."""

    logprobs: Numbers
    ranks: Numbers
    ids: Numbers
    values: Numbers


@final
class Scores(Sequence[Scored | None]):
    """One for each token of a prompt, None for the first; kept as numbers of 4 bytes, for there may be millions."""

    def __init__(self, prompt: Sequence[int], parts: Sequence[Part]) -> None:
        self._prompt = prompt
        self._part = Part(*(np.concatenate(own) for own in zip(*parts, strict=True))) if parts else None

    def __len__(self) -> int:
        return len(self._prompt)

    @overload
    def __getitem__(self, place: int) -> Scored | None: ...
    @overload
    def __getitem__(self, place: slice) -> list[Scored | None]: ...
    def __getitem__(self, place: int | slice) -> Scored | list[Scored | None] | None:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        at = range(len(self))[place] - 1
        if at < 0 or self._part is None:
            return None
        logprobs, ranks, ids, values = self._part
        top = tuple(zip(ids[at].tolist(), values[at].tolist(), strict=True))
        return Scored(self._prompt[at + 1], float(logprobs[at]), int(ranks[at]), top)


@final
class PromptScores:
    """Of one request, as far as its prompt was read; the first token has nothing before it, and no number.

    Args:
        prompt: its tokens.
        top: how many likeliest tokens come with each.

    """

    def __init__(self, prompt: Sequence[int], top: int) -> None:
        self._prompt, self._top = prompt, top
        self._parts: list[Part] = []
        self._known = 1  # tokens of the prompt
        self.finite = True

    @property
    def complete(self) -> bool:
        """Whether all tokens have theirs."""
        return self._known == len(self._prompt)

    @property
    def all(self) -> Scores:
        """Of all tokens, once it is complete."""
        return Scores(self._prompt, self._parts)

    def take(self, begin: int, logits: Tensor) -> None:
        """What a step made of a part of the prompt; what was read before, and is read again, stays as it is.

        Args:
            begin: the place of its first token.
            logits: (tokens, vocabulary), one row for each token of the part.

        """
        fresh = logits[self._known - 1 - begin : len(self._prompt) - 1 - begin]
        for at in range(0, fresh.shape[0], ROWS):
            self._add(fresh[at : at + ROWS].float())

    def _add(self, rows: Tensor) -> None:
        ids = torch.tensor(self._prompt[self._known : self._known + rows.shape[0]], device=rows.device)
        total = rows.logsumexp(-1, keepdim=True)
        own = rows.gather(1, ids.unsqueeze(1))
        best = rows.topk(min(self._top, rows.shape[1]), -1)
        logprobs = (own - total).squeeze(1)
        self.finite &= not bool(logprobs.isnan().any())
        ranks = (rows > own).sum(-1).add(1)
        found = (logprobs.clamp(min=LEAST), ranks.int(), best.indices.int(), (best.values - total).clamp(min=LEAST))
        self._parts.append(Part(*(one.cpu().numpy() for one in found)))
        self._known += rows.shape[0]
