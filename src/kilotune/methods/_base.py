"""What a method answers: which parameters are trained, and what delta they make of a layer's matrix.
Knows nothing of the kind of layer and of how weights are stored.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Generic, TypeVar, final

import torch
from torch import Tensor, nn

from ..config import AdapterConfig, bool_faults, option
from ..deltas import Delta, Role
from ..errors import CheckpointError
from ..projections.matrices import Projections

__all__ = ["Export", "Kept", "LowRankConfig", "Method", "Rate", "Shared", "Site"]

C = TypeVar("C", bound=AdapterConfig)


@final
@dataclass(frozen=True, eq=False)
class Site:
    """All that a method may know of a layer.

    name: its dotted name in the base model; out, inn: the canonical matrix's shape; read: the matrix
    (out, in) as floats; dtype, device: where the layer computes, asked anew each time; fan_in: how many
    columns of the matrix one input meets at once (inn; 1 in an embedding, whose input picks one); kernel_positions: how
    many neighbouring columns belong to one input feature (a convolution's kernel size); matrices: how many
    matrices of this shape stand in front of one another (the experts of one parameter), 0 for one alone; stack:
    the name of the site that this one is a matrix of, if any; pattern_name: the name that patterns are held against
    (its own or its stack's, where it is not said; an attention's, for its output projection); held: the tensors
    that the matrix is made of, whose identities and versions tell whether it is still the same; none: not known;
    output: how many features the layer's output has (out, where it is not said; attention's matrix has more rows);
    input: how many its input has for each place of the output (inn, where it is not said); 0: it has none such;
    gather: read, where the matrix may be sharded over processes, all of which have to call it (see :meth:`whole`).
    strength: how strongly the change is to act, 1.0 as it was trained.
    brought: in :meth:`Method.prepare`, what an adapter's file has of :meth:`Method.carries`, by name.
    """

    name: str
    out: int
    inn: int
    read: Callable[[], Tensor] = field(repr=False)
    dtype: Callable[[], torch.dtype] = field(repr=False)
    device: Callable[[], torch.device] = field(repr=False)
    fan_in: int = 0
    kernel_positions: int = 1
    matrices: int = 0
    stack: str = ""
    pattern_name: str = ""
    held: Callable[[], tuple[Tensor, ...]] = field(default=tuple, repr=False)
    output: int = 0
    input: int = -1
    gather: Callable[[], Tensor] | None = field(default=None, repr=False)
    strength: float | Tensor = 1.0
    brought: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.pattern_name == "":
            object.__setattr__(self, "pattern_name", self.stack or self.name)
        if self.fan_in == 0:
            object.__setattr__(self, "fan_in", self.inn)
        if self.output == 0:
            object.__setattr__(self, "output", self.out)
        if self.input < 0:
            object.__setattr__(self, "input", self.inn)

    def whole(self) -> Tensor:
        """The matrix (out, in) when an adapter is added, which is outside its layer: gathered where it is sharded."""
        return self.read() if self.gather is None else self.gather()


@dataclass(eq=False)
class Shared:
    """What one adapter has once for all its layers.

    trained: model-wide trained parameters by name, as :meth:`Method.init_model` starts them. Once the adapter is in a
    model it is the model's own ``nn.ParameterDict``, so that read from here they are what ``.to_empty()`` or
    ``functional_call`` put there.
    common: equal for adapters whose frozen parts are the same, where equal configurations and layers do not say so.
    """

    trained: dict[str, nn.Parameter] | nn.ParameterDict = field(default_factory=dict)
    common: Hashable = None

    def holding(self, trained: Mapping[str, Tensor]) -> Shared:
        """The same with other values of what is trained: another adapter's, or those of many, stacked in front."""
        made: Any = copy.copy(self)
        made.trained = dict(trained)
        found: Shared = made
        return found


@final
@dataclass(frozen=True)
class Export:
    """An adapter as it goes to a file.

    tensors: key -> tensor. peft: whether PEFT makes of these tensors and this config what the method makes of them.
    The writer closes every other file to it, so that none is ever read there with other random numbers; that
    those which say so are read right is tested against PEFT (tests/conformance/test_read_by_peft.py). config: values
    that differ in the file. section: what a closed file says over the options that PEFT lacks, all of which it has;
    None: nothing is said of it.
    checksum: of the projections, where they are not in the file. fingerprint: of frozen factors of the weights, in its
    place (_svd.py). header: options that PEFT has no key for and can do without, because they change no result; they go
    into the weights' header.
    """

    tensors: dict[str, Tensor]
    peft: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    section: dict[str, Any] = field(default_factory=dict)
    checksum: str | None = None
    fingerprint: str | None = None
    header: dict[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Rate:
    """The usual learning rate of a method.

    at_100: for a training of 100 steps. power: of (100 / steps), by which shorter trainings get more and longer ones
    less (train/settings/rates.py has the rule).
    """

    at_100: float
    power: float = 0.45


@final
class Kept(Enum):
    """What one of a method's tensors in a file is.

    TRAINED: numbers of the adapter's own that training changes. FROZEN: numbers of its own that stay as they started
    (LoRA-FA's A). BROUGHT: frozen numbers that the adapters of one seed or base have in common, brought along for who
    cannot make them (VeRA's matrices, the factors of a weight).
    """

    TRAINED = "trained"
    FROZEN = "frozen"
    BROUGHT = "brought along"


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """What the configurations of all low-rank methods have: any of them can be put into DoRA."""

    use_dora: bool = option(
        False,
        "DoRA over this method: the rows of the adapted matrix get a trained length of their own (dora.py).",
        ours=True,
    )

    def _common_faults(self) -> list[str]:
        return super()._common_faults() + bool_faults(self, "use_dora")


class Method(ABC, Generic[C]):
    """One adapter's method: its configuration and its mathematics.

    name: as users pick it. makes: the delta class, whose needs decide which layers fit. keys: parameter
    name -> the key PEFT uses for it below the module's name. roles: what each parameter is to the layer's
    matrix, where that decides its form in a file. default_targets: exceptions to the table of known architectures.
    What the tensors of a file are, :meth:`kept` says. usual_rate: what it is trained with where nobody says another
    rate; a place to start from, where the class says none. example: options of a small adapter, of a rank that layers
    of 4 features have; the conformance tests run on it.
    """

    name: ClassVar[str]
    config_cls: ClassVar[type[AdapterConfig]]
    makes: type[Delta]
    keys: Mapping[str, str]
    roles: Mapping[str, Role] = {}
    default_targets: Mapping[str, Sequence[str]] = {}
    usual_rate: ClassVar[Rate] = Rate(1e-2)
    example: ClassVar[Mapping[str, Any]] = {}
    # Whether delta() takes the site's strength into account; otherwise what it gives is multiplied by that.
    minds_strength: bool = False
    # Whether delta() carries a leading dimension of its parameters along (the adapters of a batch, the experts of one
    # parameter). Model-wide ones have it where the layer's do: with them, experts are asked one by one.
    stacks: bool = False
    # Whether the delta is a Full whose ``act`` takes each row of its input with numbers of its own, where parameters
    # have as many leading dimensions as the input.
    by_rows: bool = False

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    def frozen(self) -> frozenset[str]:
        """The names of those of a layer's parameters that are never trained (LoRA-FA's A)."""
        return frozenset()

    @property
    def carried(self) -> frozenset[str]:
        """The names of those of :meth:`carries` that a file of this configuration has, as :meth:`kept` says too."""
        return frozenset()

    def carries(self, site: Site) -> dict[str, tuple[int, ...]]:
        """What a file may have of a layer that is in no slot, by name with its shape, under keys as in ``keys``.

        It is frozen and shared by the adapters of a model: :meth:`prepare` finds it in ``site.brought``, and claims it
        of the projections.
        """
        return {}

    def check_brought(self, shared: Shared, brought: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Refuse what a file brought of :meth:`carries`, by site and name, where ``shared`` has something else.

        Raises:
            CheckpointError: an adapter trained with the one cannot run with the other.

        """

    @property
    def needs_out_in(self) -> bool:
        """Whether PEFT makes of a file what the method does only in layers whose weights are stored as (out, in)."""
        return False

    @property
    def untrainable(self) -> str | None:
        """Why an adapter that was loaded cannot be trained on; None: it can."""
        return None

    def completed(self, config: C, model_type: str | None) -> C:
        """The config with what an architecture decides filled in, where the method has rules of its own for it.

        Raises:
            ConfigError: nothing is known of ``model_type``.

        """
        return config

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        """Once per adapter, before any layer: claim projections, make what is frozen for all layers."""
        return Shared()

    def init_model(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """The model-wide trained tensors at their start, after :meth:`prepare` and before any :meth:`init`.

        Of a method that was loaded (:meth:`from_file`) they are the file's. :meth:`delta` finds them under these names
        in ``shared``, a file and a bank's rows have them too.
        """
        return {}

    def verify(self, shared: Shared) -> None:
        """Compare what :meth:`prepare` made with what a checkpoint promised; raises CheckpointError."""

    @abstractmethod
    def count(self, sites: Sequence[Site]) -> int:
        """How many numbers the method trains in these layers, by its formula: of shapes alone, nothing is made or read.

        What is trained beside it (biases, a head) is not counted.

        Args:
            sites: one for each matrix, so that of the experts of one parameter each is there.

        """

    @abstractmethod
    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        """The layer's trained tensors at their start, on the site's device (meta included)."""

    def first_factor(self, site: Site, shared: Shared) -> Hashable | None:
        """What the first factor of :meth:`delta` is, where it is frozen and shared: equal for equal matrices.

        Layers that are fed by the same tensor then multiply it once. None: the layer's own, or trained.
        """
        return None

    @abstractmethod
    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Delta:
        """What the parameters make of the layer's matrix: each forward, each merge."""

    # -- files -----------------------------------------------------------------------------------

    def kept(self, key: str) -> Kept | None:
        """What the tensor under ``key`` in a file is; None where it is none of the method's (a trained bias, a head).

        Store, inspect and banks ask this, so a method with other tensors than those in ``keys`` says it of them too.

        Args:
            key: below its layer's name and as ``keys`` has it (``lora_A.weight``), of a tensor that is of no layer
                without the ``base_model.`` prefix (``vera_A``).

        """
        names = {name for name, own in self.keys.items() if own == key}
        if not names:
            return None
        return Kept.FROZEN if names <= self.frozen else Kept.TRAINED

    @classmethod
    def from_layers(cls, config: C, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors of layers (``<module>.<key>``) under the keys in ``keys``, where a file may have others.

        Raises:
            CheckpointError: they are none of these.

        """
        return dict(tensors)

    @classmethod
    def from_file(cls, config: C, extra: Mapping[str, Tensor], checksum: str | None) -> Method[C]:
        """The method of an adapter that is being loaded.

        Args:
            config: from adapter_config.json.
            extra: the file's tensors that belong to no layer, keys without the ``base_model.`` prefix, and those of
                layers (``<module>.<key>``) that are brought along.
            checksum: of the projections, or the fingerprint of factors, where the file carries one.

        """
        if extra:
            raise CheckpointError(f"{cls.name}: tensors that belong to no layer: {sorted(extra)}")
        return cls(config)

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        """The adapter's tensors under PEFT's keys (``<module>.<key>``), and what changes in its config.

        Closed to PEFT, where the method does not say otherwise.
        """
        named = {
            f"{module}.{self.keys[name]}": tensor for module, own in params.items() for name, tensor in own.items()
        }
        return Export({**named, **shared.trained})
