"""The optimizer of an adapter: AdamW's hyper-parameters, which may differ from adapter to adapter and step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from ...config import number_fault
from ...errors import ConfigError, gather

__all__ = ["Adam"]


@final
@dataclass(frozen=True, kw_only=True)
class Adam:
    """One step of ``torch.optim.AdamW``, after ``clip_grad_norm_``.

    Args:
        rate: the learning rate of this step.
        betas: decay rates of the two means.
        eps: added to the root of the second mean.
        weight_decay: biases and scales whose neutral value is not 0 are left out.
        max_grad_norm: the gradient is scaled down to this L2 norm; None: never.

    Raises:
        ConfigError: a value that is none; all of them.

    """

    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        faults = [
            *number_fault("rate", self.rate, low=0),
            *number_fault("eps", self.eps, low=0),
            *number_fault("weight_decay", self.weight_decay, low=0),
        ]
        for i, beta in enumerate(self.betas):
            faults += number_fault(f"betas[{i}]", beta, low=0, high=math.nextafter(1, 0))
        if self.max_grad_norm is not None:
            faults += number_fault("max_grad_norm", self.max_grad_norm, low=math.ulp(0))
        if faults:
            raise ConfigError(gather("the optimizer's step cannot be made:", faults))

    @property
    def kind(self) -> tuple[object, ...]:
        """What steps must have in common to be made as one; their rates may differ."""
        return self.betas, self.eps, self.weight_decay, self.max_grad_norm
