"""Parameter groups for an optimizer: other learning rates for the head, for LoRA's B (LoRA+) and for embeddings.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354) trains B at a multiple of A's rate. VeRA's vectors want rates 10 to 100
times LoRA's, and a head of its own (VeRA paper, arXiv 2310.11454, table 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..config import number_fault
from ..deltas import Role
from ..errors import AdapterError, ConfigError, gather
from ..layers.slot import BIAS
from .adapter_model import AdapterModel

__all__ = ["optimizer_groups"]

ADAPTER, SECOND, EMBEDDING, HEAD = "adapter", "adapter_b", "adapter_embedding", "head"
UNDECAYED = "_no_decay"


def optimizer_groups(
    model: AdapterModel,
    lr: float,
    *,
    head_lr: float | None = None,
    lora_plus_ratio: float | None = None,
    embedding_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The trained parameters of ``model`` in groups, for ``torch.optim.AdamW(optimizer_groups(model, lr=4e-3))``.

    Every parameter that gets gradients is in exactly one group; each group has a ``name``, and empty ones are left out:

    - ``adapter``: the adapter's own, at ``lr``.
    - ``adapter_b``: with ``lora_plus_ratio``, the second factors (B), and all vectors and biases, at
      ``lr * lora_plus_ratio``, as in the LoRA+ authors' code and in PEFT.
    - ``adapter_embedding``: with ``embedding_lr``, those of adapted embeddings.
    - ``head``: the modules trained whole (``modules_to_save``), at ``head_lr``, or ``lr`` where it is not given; and
      parameters of the base that were unfrozen by hand.
    - ``<name>_no_decay``: of the same kind, what weight decay would pull away from where it started: biases, norms'
      weights, and scales whose neutral value is one (IA3's; DoRA's magnitudes, which PEFT decays; SAID's vector, which
      holds the layers' scales).

    Args:
        model: with at least one adapter that is trained.
        lr: the learning rate.
        head_lr: that of the head.
        lora_plus_ratio: LoRA+'s ratio of B's rate to A's, at least 1; 16 is the paper's choice.
        embedding_lr: that of adapted embeddings, which LoRA+'s authors set to 1e-6.
        weight_decay: for all groups but those called ``_no_decay``.

    Raises:
        ConfigError: numbers that are wrong, or an option that has no effect on this model.
        AdapterError: ``model`` has no adapters, or nothing in it is trained.

    """
    if not isinstance(getattr(model, "_orig_mod", model), AdapterModel):  # torch.compile wraps one
        raise AdapterError(f"optimizer_groups: expected the model of get_peft_model(), got a {type(model).__name__}")
    _check_numbers(lr, head_lr, lora_plus_ratio, embedding_lr, weight_decay)
    rates = {
        ADAPTER: lr,
        SECOND: lr if lora_plus_ratio is None else lr * lora_plus_ratio,
        EMBEDDING: lr if embedding_lr is None else embedding_lr,
        HEAD: lr if head_lr is None else head_lr,
    }
    places = {id(parameter): place for parameter, place in _places(model)}
    groups: dict[str, list[nn.Parameter]] = {name + end: [] for name in rates for end in ("", UNDECAYED)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = [places.get(id(parameter), _Place(HEAD, parameter.ndim > 1)) for parameter in trained]
    _check_effect(found, head_lr, lora_plus_ratio, embedding_lr)
    for parameter, place in zip(trained, found, strict=True):
        name = place.group
        if (name == EMBEDDING and embedding_lr is None) or (name == SECOND and lora_plus_ratio is None):
            name = ADAPTER
        elif name == ADAPTER and parameter.ndim == 1 and lora_plus_ratio is not None:
            name = SECOND
        groups[name if place.decays else name + UNDECAYED].append(parameter)
    return [
        {
            "name": name,
            "params": held,
            "lr": rates[name.removesuffix(UNDECAYED)],
            "weight_decay": 0.0 if name.endswith(UNDECAYED) else weight_decay,
        }
        for name, held in groups.items()
        if held
    ]


class _Place(NamedTuple):
    """What a parameter is, and whether weight decay pulls it to where it changes nothing."""

    group: str
    decays: bool


def _places(model: AdapterModel) -> Iterator[tuple[nn.Parameter, _Place]]:
    for adapter in model.peft_config:
        installed = model.installed(adapter)
        for slot in installed.slots().values():
            embedding = slot.site.fan_in == 1 < slot.site.inn  # an id picks one of the columns
            for key, parameter in slot.named_parameters():
                role = None if slot.method is None else slot.method.roles.get(key)
                group = EMBEDDING if embedding else SECOND if role is Role.SECOND else ADAPTER
                yield parameter, _Place(group, key != BIAS and role not in (Role.ROWS, Role.COLS))
        for key, parameter in installed.shared.trained.items():
            yield parameter, _Place(ADAPTER, installed.method.roles.get(key) not in (Role.ROWS, Role.COLS))


def _check_numbers(lr: object, head_lr: object, ratio: object, embedding_lr: object, weight_decay: object) -> None:
    faults = number_fault("lr", lr, low=0) + number_fault("weight_decay", weight_decay, low=0)
    for name, value, low in (
        ("head_lr", head_lr, 0),
        ("lora_plus_ratio", ratio, 1),
        ("embedding_lr", embedding_lr, 0),
    ):
        faults += [] if value is None else number_fault(name, value, low=low)
    if faults:
        raise ConfigError(gather("optimizer_groups:", faults))


def _check_effect(
    found: Sequence[_Place], head_lr: float | None, ratio: float | None, embedding_lr: float | None
) -> None:
    if not found:
        raise AdapterError(
            "optimizer_groups: nothing in the model is trained; make an adapter active with set_adapter(), and load it "
            "with is_trainable=True"
        )
    there = {place.group for place in found}
    wanted = (
        ("head_lr", head_lr, HEAD, "no module is trained whole; name the head in modules_to_save"),
        ("lora_plus_ratio", ratio, SECOND, "no trained adapter has a second factor, as LoRA's B is"),
        ("embedding_lr", embedding_lr, EMBEDDING, "no trained adapter is on an embedding"),
    )
    faults = [
        f"{option}: has no effect, because {why}"
        for option, value, group, why in wanted
        if value is not None and group not in there
    ]
    if faults:
        raise ConfigError(gather("optimizer_groups:", faults))
