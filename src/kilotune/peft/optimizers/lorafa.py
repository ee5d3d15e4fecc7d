"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303) as an optimizer: A stays as it is, and B's gradient is corrected for A.

With the change of a weight s B A, the gradient of B that brings it nearest to a step along the weight's own gradient G
is s^-2 (G_B) (A A^T)^-1, where G_B = s G A^T is what autograd gives. The rest is AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...config import number_fault
from ...errors import ConfigError, gather
from ..layer_shape import Scaling, adapters_in
from ..tuners.inside import tuner_in
from ..tuners.tuners_utils import BaseTuner

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer"]

RIDGE = 1e-8  # on the diagonal of A A^T
FIRST, SECOND = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")


@final
class LoraFAOptimizer(Optimizer):
    """AdamW, which corrects the gradients of LoRA's second factors for the first.

    Args:
        params: groups with ``params``, and of the same length ``names`` and ``scaling_factors`` (a number, or None for
            what is no factor); a factor B is corrected for the A whose name is the same but for that letter.
        lr: the learning rate.
        betas, eps, weight_decay: AdamW's.
        correct_bias: False: without Adam's correction of the first steps.

    Raises:
        ConfigError: numbers out of range; groups without names.

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        faults = [f for name, value in (("lr", lr), ("eps", eps)) for f in number_fault(name, value, low=0)]
        faults += number_fault("weight_decay", weight_decay, low=0)
        faults += [f"betas: expected numbers in [0, 1), got {betas!r}"] if not all(0 <= b < 1 for b in betas) else []
        if faults:
            raise ConfigError(gather("LoraFAOptimizer:", faults))
        common = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, common)
        for group in self.param_groups:
            if any(len(group.get(key, ())) != len(group["params"]) for key in ("names", "scaling_factors")):
                raise ConfigError("LoraFAOptimizer: each group needs names and scaling_factors, one for each parameter")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the loss anew, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_name = dict(zip(group["names"], group["params"], strict=True))
            for name, parameter, scale in zip(group["names"], group["params"], group["scaling_factors"], strict=True):
                if parameter.grad is None:
                    continue
                first = by_name.get(_partner(name))
                grad = parameter.grad if first is None else _corrected(parameter.grad, first, float(scale))
                self._update(parameter, grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        rate = group["lr"]
        if group["correct_bias"]:
            rate *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-rate)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _partner(name: str) -> str:
    """The name of the A of a B; "" of what is none."""
    parts = name.split(".")
    for first, second in zip(FIRST, SECOND, strict=True):
        if second in parts:
            return ".".join(first if part == second else part for part in parts)
    return ""


def _corrected(grad: Tensor, first: Tensor, scale: float) -> Tensor:
    """B's gradient (out, r, ...) for A (r, in, ...)."""
    a = first.flatten(1).float()  # (r, in)
    inverse = torch.linalg.pinv(a @ a.T + RIDGE * torch.eye(len(a), device=a.device), hermitian=True)
    found: Tensor = grad.flatten(1).float() @ inverse / scale**2
    return found.to(grad.dtype).reshape(grad.shape)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """LoRA-FA's optimizer for a model: its factors A are frozen, and everything else that has gradients is trained.

    Args:
        model: a PeftModel whose active adapters are LoRA, without DoRA.
        r, lora_alpha: as in PEFT; each layer's own scale is taken in any case.
        lr, weight_decay: AdamW's.
        use_rslora: None, or what the adapters have.

    Raises:
        ConfigError: other adapters; a scale of zero; a convolution in groups, whose factors make no one matrix; or
            ``use_rslora`` is not as in the adapters.

    """
    tuner = tuner_in(model)
    for name in tuner.active_adapters:
        config = tuner.peft_config[name]
        if str(config.peft_type) != "LORA" or getattr(config, "use_dora", False):
            raise ConfigError(f"create_lorafa_optimizer: adapter {name!r} is no plain LoRA")
        if use_rslora is not None and getattr(config, "use_rslora", False) != use_rslora:
            raise ConfigError(f"use_rslora={use_rslora!r}: adapter {name!r} is made otherwise; leave it out here")
    scales = _scales(tuner)
    named = list(model.named_parameters())
    for name, parameter in named:
        if not {*FIRST}.isdisjoint(name.split(".")):
            parameter.requires_grad_(False)
    group = {
        "params": [parameter for _, parameter in named],
        "names": [name for name, _ in named],
        "scaling_factors": [scales.get(id(parameter)) for _, parameter in named],
    }
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay)


def _scales(tuner: BaseTuner) -> dict[int, float]:
    """The scale of the layer and adapter that each factor is of."""
    found: dict[int, float] = {}
    for name, layer in tuner.adapted_layers().items():
        scaling = Scaling(layer)
        for adapter, slot in adapters_in(layer).items():
            if adapter not in scaling:
                continue
            if layer.kind.groups(layer.base_layer) > 1:
                raise ConfigError(f"create_lorafa_optimizer: {name!r} is a convolution in groups")
            if (scale := float(scaling[adapter])) == 0:
                raise ConfigError(f"create_lorafa_optimizer: the scale of {adapter!r} in {name!r} is 0")
            found.update({id(parameter): scale for parameter in slot.values().values()})
    return found
