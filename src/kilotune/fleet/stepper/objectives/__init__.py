"""What a model in training learns from rows of tokens, one kind a file.

Each makes a loss of the log-probabilities of a row's labels, or of all tokens in their places; OBJECTIVES has them by
name. Stands on ../losses.py. Begin in _base.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from ._base import Objective
from .divergence import Distribution, Divergence, Likely
from .dpo import Dpo
from .kto import Kto
from .policy import Grpo, ImportanceSampling, Ppo
from .supervised import Supervised

__all__ = [
    "OBJECTIVES",
    "Distribution",
    "Divergence",
    "Dpo",
    "Grpo",
    "ImportanceSampling",
    "Kto",
    "Likely",
    "Objective",
    "Ppo",
    "Supervised",
]

OBJECTIVES: Mapping[str, type[Objective]] = {
    made.name: made for made in (Supervised, Dpo, Kto, ImportanceSampling, Ppo, Grpo, Distribution, Divergence)
}
