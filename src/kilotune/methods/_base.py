"""What a method answers: which parameters are trained, and what delta they make of a layer's matrix.
Knows nothing of the kind of layer and of how weights are stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, final

import torch
from torch import Tensor, nn

from ..config import AdapterConfig, bool_faults, option
from ..deltas import Delta, Role
from ..errors import CheckpointError
from ..projections import Projections

__all__ = ["Export", "LowRankConfig", "Method", "Shared", "Site"]

C = TypeVar("C", bound=AdapterConfig)


@final
@dataclass(frozen=True, eq=False)
class Site:
    """All that a method may know of a layer.

    name: its dotted name in the base model; out, inn: the canonical matrix's shape; read: the matrix
    (out, in) as floats; dtype, device: where the layer computes, asked anew each time; fan_in: how many
    columns of the matrix one input meets at once (inn; 1 in an embedding, whose input picks one); taps: how
    many neighbouring columns belong to one input feature (a convolution's kernel size).
    """

    name: str
    out: int
    inn: int
    read: Callable[[], Tensor] = field(repr=False)
    dtype: Callable[[], torch.dtype] = field(repr=False)
    device: Callable[[], torch.device] = field(repr=False)
    fan_in: int = 0
    taps: int = 1

    def __post_init__(self) -> None:
        if self.fan_in == 0:
            object.__setattr__(self, "fan_in", self.inn)


@dataclass(eq=False)
class Shared:
    """What one adapter has once for all its layers. ``trained``: model-wide trained parameters by name."""

    trained: dict[str, nn.Parameter] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Export:
    """An adapter as it goes to a file.

    tensors: key -> tensor. config: values that differ in the file. section: what PEFT has no key for; None
    where PEFT can read the file as it is. checksum: of the projections, where they are not in the file.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    section: dict[str, Any] | None = None
    checksum: str | None = None


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """What the configurations of all low-rank methods have: any of them can be put into DoRA."""

    use_dora: bool = option(
        False,
        "DoRA over this method: the rows of the adapted matrix get a trained length of their own (dora.py).",
        ours=True,
    )

    def _common_faults(self) -> list[str]:
        missing = ["use_dora: DoRA is not there yet, got True"] if self.use_dora is True else []
        return super()._common_faults() + bool_faults(self, "use_dora") + missing


class Method(ABC, Generic[C]):
    """One adapter's method: its configuration and its mathematics.

    name: as users pick it. makes: the delta class, whose needs decide which layers fit. keys: parameter
    name -> the key PEFT uses for it below the module's name. roles: what each parameter is to the layer's
    matrix, where that decides its form in a file. default_targets: exceptions to the table of known
    architectures.
    """

    name: ClassVar[str]
    config_cls: ClassVar[type[AdapterConfig]]
    makes: type[Delta]
    keys: Mapping[str, str]
    roles: Mapping[str, Role] = {}
    default_targets: ClassVar[Mapping[str, Sequence[str]]] = {}

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    def frozen(self) -> frozenset[str]:
        """The names of those of a layer's parameters that are never trained (LoRA-FA's A)."""
        return frozenset()

    @property
    def rebuilt(self) -> frozenset[str]:
        """The names of frozen parameters that no file holds, because :meth:`init` makes them again."""
        return frozenset()

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        """Once per adapter, before any layer: claim projections, make model-wide parameters."""
        return Shared()

    def verify(self, shared: Shared) -> None:
        """Compare what :meth:`prepare` made with what a checkpoint promised; raises CheckpointError."""

    @abstractmethod
    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        """The layer's trained tensors at their start, on the site's device (meta included)."""

    @abstractmethod
    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Delta:
        """What the parameters make of the layer's matrix: each forward, each merge."""

    # -- files -----------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls, config: C, extra: Mapping[str, Tensor], checksum: str | None) -> Method[C]:
        """The method of an adapter that is being loaded.

        Args:
            config: from adapter_config.json.
            extra: the file's tensors that belong to no layer, keys without the ``base_model.`` prefix.
            checksum: of the projections, where the file carries one.

        """
        if extra:
            raise CheckpointError(f"{cls.name}: tensors that belong to no layer: {sorted(extra)}")
        return cls(config)

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        """The adapter's tensors under PEFT's keys (``<module>.<key>``), and what changes in its config."""
        named = {
            f"{module}.{self.keys[name]}": tensor
            for module, own in params.items()
            for name, tensor in own.items()
            if name not in self.rebuilt
        }
        return Export({**named, **shared.trained})
