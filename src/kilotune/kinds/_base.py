"""What a layer kind answers: how the weight is seen as the canonical matrix, how an input runs through
a factor of it. Knows nothing of methods and storage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as torch_modules

from ..deltas import Delta, Full, Need, Role
from ..errors import UnsupportedError
from ..kernels.lowrank import scale_features

__all__ = ["LayerKind", "NoMatrix", "beside", "hooked", "run_with"]


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see or change what goes through ``module``, or through all modules."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    everybodys = (
        torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
        or torch_modules._global_backward_hooks
        or torch_modules._global_backward_pre_hooks
    )
    return bool(own or everybodys)


def beside(module: nn.Module, values: Mapping[str, Tensor | None]) -> nn.Module:
    """A second module around the same tensors, but for ``values`` in the place of its parameters, by dotted names.

    ``module`` stays as it is, so that other threads may run it meanwhile.
    """
    made = type(module).__new__(type(module))
    own = {name: value for name, value in values.items() if "." not in name}
    # A plain tensor may stand in a parameter's place, as in FSDP's forward, and would be found first.
    rest_of = {name: value for name, value in module.__dict__.items() if name not in own}
    made.__dict__ = {**rest_of, "_parameters": {**module._parameters, **own}}
    inner: dict[str, dict[str, Tensor | None]] = {}
    for name in values.keys() - own.keys():
        child, _, rest = name.partition(".")
        inner.setdefault(child, {})[rest] = values[name]
    if inner:
        changed = {child: beside(module.get_submodule(child), held) for child, held in inner.items()}
        made.__dict__["_modules"] = {**module._modules, **changed}
    return made


def run_with(module: nn.Module, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of ``module`` with ``values`` in the place of its parameters, by dotted names.

    torch's ``functional_call`` puts them into the module while it runs, where another thread would read them. It stays
    where the very module has to run: for compilers, and for hooks and a patched forward, which know that one.
    """
    if torch.compiler.is_compiling() or hooked(module) or "forward" in module.__dict__:
        return functional_call(module, values, args, kwargs)
    other = beside(module, values)
    before = dict(other.__dict__)
    result = other(*args, **kwargs)
    for name, value in other.__dict__.items():
        if before.get(name, before) is not value:  # what a forward keeps stays with the module
            module.__dict__[name] = value
    return result


class LayerKind(ABC):
    """One kind of layer. Stateless: one instance serves all layers.

    offers: which :class:`~kilotune.deltas.Need` a layer of this kind can meet. stores_in_out: the weight is
    kept as (in, out), which PEFT calls ``fan_in_fan_out``. substitutes: the layer's input reaches no factor
    (attention has three inputs), so the layer runs with a weight that is built for each step; dropout on the
    adapter's input is then refused. takes_dropout: dropout on the input makes sense (not for token ids, where
    it is left out, as in PEFT). file_keys: a method's key in a checkpoint -> PEFT's key for this kind.
    all_linear: 'all-linear' takes such layers. lacks: for a need that is not offered, why.
    parameter: the name of the one parameter of a module that such a layer is, where it is not the module.
    with_it: children that are adapted together with such a layer, as PEFT does. named_bias: the bias is called
    ``bias``, so the option of that name reaches it. shares_input: :meth:`project` depends on the input and the matrix
    alone, so that layers with the same input may share what it gives.
    """

    name: ClassVar[str]
    offers: ClassVar[frozenset[Need]]
    stores_in_out: ClassVar[bool] = False
    substitutes: ClassVar[bool] = False
    takes_dropout: ClassVar[bool] = True
    file_keys: ClassVar[Mapping[str, str]] = {}
    all_linear: ClassVar[bool] = False
    lacks: ClassVar[Mapping[Need, str]] = {}
    parameter: str | None = None
    with_it: ClassVar[tuple[str, ...]] = ()
    named_bias: ClassVar[bool] = True
    shares_input: ClassVar[bool] = False

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this kind."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why a module that :meth:`matches` cannot be adapted as it is, but for its bias; None where it can."""
        return None

    def lack(self, module: nn.Module, need: Need) -> str | None:
        """Why ``need`` is not offered for ``module``, in words; None where there is nothing to say."""
        return self.lacks.get(need)

    def bias_slot(self, module: nn.Module) -> bool:
        """Whether ``module`` has a place for a bias, filled or not; without one a changed bias cannot be merged."""
        return True

    @abstractmethod
    def features(self, module: nn.Module) -> tuple[int, int]:
        """(out, in) of the canonical matrix, without reading the weight."""

    def output_features(self, module: nn.Module) -> int:
        """How many features the layer's output has: one for each row of the matrix, but a third in attention."""
        return self.features(module)[0]

    def input_features(self, module: nn.Module) -> int:
        """How many features the input has for each place of the output; 0 where it has none (ids, a window)."""
        return self.features(module)[1]

    def features_last(self, module: nn.Module, y: Tensor) -> Tensor:
        """The output with its features on the last axis: (..., features)."""
        return y

    def features_back(self, module: nn.Module, y: Tensor) -> Tensor:
        """The inverse of :meth:`features_last`."""
        return y

    def fan_in(self, module: nn.Module) -> int:
        """How many columns of the matrix one input meets at once: all of them, but 1 in an embedding."""
        return self.features(module)[1]

    def kernel_positions(self, module: nn.Module) -> int:
        """How many neighbouring columns of the matrix belong to one input feature: a convolution's kernel size."""
        return 1

    def groups(self, module: nn.Module) -> int:
        """Into how many parts, each with inputs of its own, the outputs fall: a grouped convolution's groups."""
        return 1

    def matrices(self, module: nn.Module) -> int:
        """How many matrices the weight holds, in front of one another; 0 where it is one."""
        return 0

    # -- the matrix ------------------------------------------------------------------------------

    @abstractmethod
    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight as stored -> the canonical matrix (out, in); a view where possible."""

    @abstractmethod
    def native(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """The canonical matrix (out, in) -> the weight as stored."""

    def native_bias(self, module: nn.Module, bias: Tensor) -> Tensor:
        """A bias (out,) in the shape in which ``module`` stores it."""
        return bias

    # -- running ---------------------------------------------------------------------------------

    @abstractmethod
    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        """Run the input through a first factor (r, in): x (..., in) -> (..., r)."""

    def run(self, module: nn.Module, x: Tensor, matrix: Tensor, cols: Tensor | None = None) -> Tensor:
        """Run the input through a whole matrix (out, in), or it times diag(cols): x (..., in) -> (..., out).

        As through a first factor, but in a grouped convolution, where each row meets one group only.
        """
        if cols is None:
            return self.project(module, x, matrix)
        return self.project_scaled(module, x, matrix, cols)

    def is_product(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the layer's forward of x is x W^T + bias, with its features on the last axis, and nothing else."""
        return False

    def feature_axis(self, module: nn.Module, y: Tensor) -> int | None:
        """Where :meth:`lift` finds the features, -1 or 1, if it is a plain product along that axis; else None."""
        return None

    def is_plain(self, module: nn.Module, x: Tensor, y: Tensor) -> bool:
        """Whether the layer's own part of y is W x along the last axis, so that a change may act on x itself."""
        inn = self.features(module)[1]
        whole = x.is_floating_point() and self.input_features(module) == inn == x.shape[-1]
        return whole and not self.substitutes and self.feature_axis(module, y) == -1

    def run_full(
        self, module: nn.Module, delta: Full, x: Tensor, cols: Tensor | None, y: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The change (or it times diag(cols)) times x (..., out): as it acts, or by its matrix in ``dtype``."""
        if delta.act is not None and self.is_plain(module, x, y):
            return delta.act(x if cols is None else scale_features(x, cols, 1.0))
        return self.run(module, x, delta.delta.to(dtype), cols)

    @abstractmethod
    def lift(self, module: nn.Module, h: Tensor, matrix: Tensor) -> Tensor:
        """Run (..., r) through a second factor (out, r) -> (..., out)."""

    def project_scaled(self, module: nn.Module, x: Tensor, matrix: Tensor, cols: Tensor) -> Tensor:
        """Run the input through ``matrix diag(cols)``, cols (in,)."""
        wide = torch.promote_types(matrix.dtype, cols.dtype)
        return self.project(module, x, (matrix.to(wide) * cols).to(matrix.dtype))

    def spread(self, vector: Tensor, like: Tensor) -> Tensor:
        """Shape a per-feature vector (n,) so that it broadcasts over ``like``'s features (the last axis)."""
        return vector

    def call(self, module: nn.Module, shift: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The base layer's output, with ``shift`` (out,) added to its bias where it is given."""
        output = module(*args, **kwargs)
        if shift is None:
            return output
        y = self.tensor_of(output)
        return self.with_tensor(output, y + self.spread(shift, y).to(y.dtype))

    def stand_in(self, module: nn.Module, weight: Tensor, base: Tensor | None, deltas: Sequence[Delta]) -> Any:
        """What multiplies in the place of ``weight`` with ``deltas`` in it, so that they need not be built.

        None where there is no such thing. base: the weight without merged adapters, where some are merged.
        """
        return None

    def run_with(
        self, module: nn.Module, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of ``module`` with other parameters, by name; where the kind ``substitutes``."""
        return run_with(module, weights, args, kwargs)

    def tensor_of(self, output: Any) -> Tensor:
        """The tensor in what the layer returned: itself, or the first of several."""
        first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return first

    def with_tensor(self, output: Any, tensor: Tensor) -> Any:
        """What the layer returned, with another tensor in it."""
        return type(output)((tensor, *output[1:])) if isinstance(output, (tuple, list)) else tensor

    # -- files -----------------------------------------------------------------------------------

    def file_key(self, module: nn.Module, key: str) -> str:
        """PEFT's key, for this kind of layer, for what a method calls ``key``."""
        return self.file_keys.get(key, key)

    def to_file(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        """One of a method's tensors as PEFT keeps it for this kind of layer."""
        return tensor

    def from_file(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`to_file`; the shape has been checked."""
        return tensor

    def to_blocks(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        """One of a method's tensors as PEFT keeps it where there are several :meth:`groups`, at ``groups`` the rank."""
        return self.to_file(module, role, tensor)

    def from_blocks(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        """What a tensor of :meth:`peft_shape` is here, at PEFT's rank.

        Raises:
            CheckpointError: what the tensor says is no change of such a layer.

        """
        return tensor

    def peft_shape(self, module: nn.Module, role: Role, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape in PEFT's file of a tensor of ``shape``, where :meth:`to_file` gives another; else None."""
        return None


class NoMatrix(LayerKind, ABC):
    """A kind that offers a bias or an output, and no matrix."""

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        raise UnsupportedError(f"a {type(module).__name__} has no matrix that an adapter could change")

    def native(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return self.canonical(module, matrix)

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        return self.canonical(module, matrix)

    def lift(self, module: nn.Module, h: Tensor, matrix: Tensor) -> Tensor:
        return self.canonical(module, matrix)
