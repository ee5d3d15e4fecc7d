"""vLLM's parallel linear layers with VeRA added to what they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ...errors import UnsupportedError
from ..arena import FusedLayer, Routes
from ..layout import Part, Site

__all__ = ["parts_of", "wrap"]


class _Vera:
    """What the three have in common. The layers' own LoRA weights are never made."""

    vera: FusedLayer
    routes: Routes

    def create_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: all numbers are in the arena."""

    def set_lora(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the arena copies one row for all layers."""

    def reset_lora(self, index: int) -> None:
        """Nothing, as above."""

    def _changed(self, x: Tensor, out: Tensor) -> Tensor:
        # In a compiled graph the question would be answered once, when it is traced.
        if self.routes.idle and not torch.compiler.is_compiling():
            return out
        self.vera.add(x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1]))
        return out


@final
class VeraColumn(_Vera, ColumnParallelLinearWithLoRA):  # type: ignore[misc]  # vLLM is untyped here
    """Each worker has a part of the outputs."""

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._changed(x, self._get_quant_method().apply(self.base_layer, x, bias))


@final
class VeraRow(_Vera, RowParallelLinearWithLoRA):  # type: ignore[misc]  # vLLM is untyped here
    """Each worker has a part of the inputs, and the sum over workers that follows adds our parts too."""

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._changed(x, self._get_quant_method().apply(self.base_layer, x, bias))


@final
class VeraReplicated(_Vera, ReplicatedLinearWithLoRA):  # type: ignore[misc]  # vLLM is untyped here
    """Every worker has all of it."""

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        given = self.base_layer(x)
        return self._changed(x, given[0] if isinstance(given, tuple) else given)


def wrap(layer: LinearBase, vera: FusedLayer, routes: Routes) -> torch.nn.Module:
    """The layer with VeRA."""
    if isinstance(layer, RowParallelLinear):
        made: Any = VeraRow(layer)
    elif isinstance(layer, ColumnParallelLinear):
        made = VeraColumn(layer)
    else:
        made = VeraReplicated(layer)
    made.vera, made.routes = vera, routes
    return made  # type: ignore[no-any-return]


def parts_of(name: str, layer: LinearBase, packed: Sequence[str], targets: Sequence[str]) -> list[Part]:
    """The layers of the checkpoint in ``layer`` that are targets, as this worker has them.

    Raises:
        UnsupportedError: a kind of layer that is not known here.

    """
    parent, _, last = name.rpartition(".")
    names = [f"{parent}.{part}" if parent else part for part in (packed or [last])]
    if not any(part.rpartition(".")[2] in targets for part in names):
        return []
    spans = _spans(name, layer, len(names))
    columns = (0, layer.input_size)
    if isinstance(layer, RowParallelLinear):
        own = layer.input_size_per_partition
        columns = (layer.tp_rank * own, (layer.tp_rank + 1) * own)
    found, at = [], 0
    for part, (out, rows) in zip(names, spans):
        if part.rpartition(".")[2] in targets:
            found.append(Part(Site(part, out, layer.input_size), rows, at, columns))
        at += rows[1] - rows[0]
    return found


def _spans(name: str, layer: LinearBase, count: int) -> list[tuple[int, tuple[int, int]]]:
    """(whole outputs, those of this worker) of each part."""
    if isinstance(layer, QKVParallelLinear):
        heads = [layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads]
        sizes = [layer.head_size, layer.head_size, layer.v_head_size]
        own = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
        ranks = [layer.tp_rank] + [layer.tp_rank // layer.num_kv_head_replicas] * 2
        spans = [
            (head * size, (rank * mine * size, (rank + 1) * mine * size))
            for head, size, mine, rank in zip(heads, sizes, own, ranks)
        ]
    elif isinstance(layer, MergedColumnParallelLinear):
        shares = [(out, out // layer.tp_size) for out in layer.output_sizes]
        spans = [(out, (layer.tp_rank * own, (layer.tp_rank + 1) * own)) for out, own in shares]
    elif isinstance(layer, ColumnParallelLinear):
        own_out = layer.output_size_per_partition
        spans = [(layer.output_size, (layer.tp_rank * own_out, (layer.tp_rank + 1) * own_out))]
    elif isinstance(layer, RowParallelLinear | ReplicatedLinear):
        spans = [(layer.output_size, (0, layer.output_size))]
    else:
        spans = []
    if len(spans) != count:
        raise UnsupportedError(
            f"{name} ({type(layer).__name__}) is a target, but how its {count} layers lie in it is not known here; "
            "leave it out of targets"
        )
    return spans
