"""``torch.nn.Embedding``: the canonical matrix is the table transposed, (dim, ids); an id picks one column."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor, nn

from ..deltas import Need
from ._base import LayerKind, run_with


@final
class Embedding(LayerKind):
    """y = weight[ids], weight (ids, dim).

    The factor's gradient is always dense: ``sparse=True`` is about the gradient of the table, which is frozen.
    The gradient of the row ``padding_idx`` is zero, in the factors as in the table.
    """

    name: ClassVar[str] = "embedding"
    offers: ClassVar[frozenset[Need]] = frozenset({Need.LINEAR, Need.OUTPUT})
    takes_dropout: ClassVar[bool] = False
    lacks: ClassVar[Mapping[Need, str]] = {Need.BIAS: "an embedding has no bias"}
    file_keys: ClassVar[Mapping[str, str]] = {
        "lora_A.weight": "lora_embedding_A",
        "lora_B.weight": "lora_embedding_B",
    }

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def refusal(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return (
                f"an Embedding with max_norm={module.max_norm} rescales rows of its own weight in each forward, so "
                "there is no frozen weight to adapt; set max_norm = None once its rows have the norm that they should"
            )
        inputs = list(inspect.signature(module.forward).parameters)
        if len(inputs) != 1:
            return (
                f"{type(module).__name__} computes the ids that it looks up from several inputs ({', '.join(inputs)}); "
                "only an embedding that takes ids alone can be adapted"
            )
        return None

    def features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Embedding)
        return module.embedding_dim, module.num_embeddings

    def input_features(self, module: nn.Module) -> int:
        return 0

    def fan_in(self, module: nn.Module) -> int:
        return 1

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.T

    def native(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.T

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        if type(module).forward is nn.Embedding.forward:
            return self._look_up(module, x, matrix)
        # Some scale what they look up (Gemma's, Bart's): whatever is done with a row is done with the factor's.
        looked_up: Tensor = run_with(module, {"weight": matrix.T}, (x,), {})
        return looked_up

    def feature_axis(self, module: nn.Module, y: Tensor) -> int:
        return -1

    def lift(self, module: nn.Module, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix)

    def project_scaled(self, module: nn.Module, x: Tensor, matrix: Tensor, cols: Tensor) -> Tensor:
        h = self.project(module, x, matrix)  # (..., r)
        return (h * self._look_up(module, x, cols.unsqueeze(0))).to(h.dtype)

    def _look_up(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        """The columns of ``matrix`` (r, ids) for the ids ``x`` (...): (..., r)."""
        assert isinstance(module, nn.Embedding)
        return F.embedding(x, matrix.T, padding_idx=module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)
