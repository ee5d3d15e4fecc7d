"""PEFT's LoraModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from ....errors import ConfigError
from ...weighted import combine, configuration
from ..tuners_utils import BaseTuner

__all__ = ["LoraModel"]


@final
class LoraModel(BaseTuner):
    """A base model with adapters, the first of them LoRA's; others may be of any method."""

    prefix: ClassVar[str] = "lora_"

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is made of others in the model; not active until set, and frozen.

        With "cat" it is their weighted sum exactly, and its rank the sum of theirs; with "svd" the nearest to it of
        ``svd_rank``. All others act on the factors, so that what they make is no sum of the changes.

        Args:
            adapters: names of LoRA adapters.
            weights: one for each; may be negative.
            adapter_name: of the new one; where it is taken, nothing is done, as in PEFT.
            combination_type: "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", and the
                last four with "_svd" behind, which act on the whole change.
            svd_rank: the rank of those with an SVD; by default the largest of the ranks.
            svd_clamp: a quantile at which the SVD's factors are cut.
            svd_full_matrices, svd_driver: as in PEFT; they change no result.
            density: the share of numbers that is kept, for all but "linear", "cat" and "svd".
            majority_sign_method: "total" or "frequency", for "ties" and "dare_ties".

        Raises:
            AdapterError: an unknown adapter. ConfigError: adapters that cannot be added so.

        """
        if adapter_name in self.peft_config:
            return
        if len(adapters) != len(weights):
            raise ConfigError(f"weights: expected one for each of {len(adapters)} adapters, got {len(weights)}")
        config = configuration(self, adapters, combination_type, svd_rank)
        self.inject(adapter_name, config)
        try:
            combine(self, adapters, weights, adapter_name, combination_type, density, majority_sign_method, svd_clamp)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
        self.set_requires_grad(adapter_name, False)
