"""vLLM's two managers of adapters, for VeRA. What they override, and the versions, are in docs/vllm.md.

An exception in a worker ends the engine for all tenants, or leaves the workers' replies out of step. So nothing here
raises once the engine runs: an adapter that cannot be loaded is quarantined, its tokens take the poison row of the
arena, and the gate turns its requests into errors.
"""

from __future__ import annotations

import logging
from typing import Any, final

import torch
from torch import Tensor
from vllm.distributed import get_pp_group, get_world_group
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import replace_submodule
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models import supports_multimodal

from ...errors import UnsupportedError, first_line
from .. import worker_status as run
from ..arena import Arena, FusedLayer, Routes
from ..layout import Cut, Part
from ..merged_base import check_merged
from ..row_files import Spill, read_row
from ..settings import KEY, Settings
from .layers import parts_of, wrap

__all__ = ["VeraModelManager", "VeraWorkerManager"]

logger = logging.getLogger("vllm.kilotune")
QUARANTINED = 10_000  # numbers of adapters that are remembered as lost


def _model(number: int, row: Tensor) -> LoRAModel:
    """An adapter as vLLM's caches keep it: one module, which is the arena, and one row for it."""
    return LoRAModel(number, 1, {KEY: LoRALayerWeights(KEY, 1, 1, row, row)})


@final
class VeraModelManager(LRUCacheLoRAModelManager):  # type: ignore[misc]  # vLLM is untyped here
    """The adapters of one worker: which are registered, and which are in a slot (vLLM's own two caches)."""

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        self.supports_mm = False
        self.vllm_config = vllm_config
        self.settings = Settings.of(vllm_config.additional_config[KEY])
        self._refuse_what_is_not_served()
        self.dtype: torch.dtype = self.lora_config.lora_dtype
        self.cut = Cut(self.settings.rank, self.settings.seed, self._layers(), final=get_pp_group().is_last_rank)
        self.arena = Arena(self.lora_slots, self.cut, self.device, self.dtype)
        tokens = max(max_num_batched_tokens, self.max_num_seqs, vllm_config.scheduler_config.max_num_batched_tokens)
        self.routes = Routes(tokens + 64, self.arena)
        self.punica_wrapper_mapping = {DEFAULT_LANGUAGE_WRAPPER_KEY: self.routes}

    def _refuse_what_is_not_served(self) -> None:
        check_merged(self.settings.on, self.vllm_config.model_config.model)
        if supports_multimodal(self.model):
            raise UnsupportedError("multimodal models are not served by kilotune's plugin")
        if self._is_moe:
            raise UnsupportedError("mixtures of experts are not served by kilotune's plugin")
        if self.lora_config.fully_sharded_loras:
            raise UnsupportedError("fully_sharded_loras: leave it out, VeRA is split in its own way")
        if self.lora_config.lora_dtype != self.vllm_config.model_config.dtype:
            raise UnsupportedError("lora_dtype: leave it out, adapters compute in the model's own type")

    def _layers(self) -> dict[str, list[Part]]:
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, LinearBase):
                packed = self.packed_modules_mapping.get(name.rpartition(".")[2], [])
                if parts := parts_of(name, module, packed, self.settings.targets):
                    found[name] = parts
        return found

    def _create_lora_modules(self) -> None:
        for name, parts in self.cut.layers.items():
            fused = FusedLayer(self.routes, self.cut.rank, name, parts)
            replace_submodule(self.model, name, wrap(self.model.get_submodule(name), fused, self.routes))
        # activate_adapter copies a row into a slot of each entry here: one.
        self.modules = {KEY: self.arena}

    def _add_adapter(self, lora: LoRAModel) -> None:
        self._registered_adapters[lora.id] = lora

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> LoRAModel:
        return _model(lora_id, torch.zeros(self.cut.numbers, dtype=self.dtype))

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        self.routes.set(mapping.index_mapping, self.lora_index_to_id)


@final
class VeraWorkerManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]  # vLLM is untyped here
    """Loads rows, and keeps its own copy of each, so that no adapter that was once here can be lost."""

    _manager_cls = VeraModelManager

    def __init__(self, vllm_config: Any, device: torch.device, embedding_modules: dict[str, str]) -> None:
        super().__init__(vllm_config, device, embedding_modules)
        self.vllm_config = vllm_config
        self._paths: dict[int, str] = {}
        self._quarantined: dict[int, str] = {}

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: Any) -> Any:
        made = super().create_lora_manager(model, vllm_config)
        manager = self._adapter_manager
        self._folder = run.folder()
        self._spill = Spill(manager.cut.numbers, manager.dtype, manager.settings.spill)
        group, config = get_world_group(), vllm_config.model_config
        run.announce(
            group.rank_in_group, group.world_size, config.model, manager.dtype, manager.settings, manager.cut.sites
        )
        logger.info(
            "kilotune: VeRA of rank %d in %d layers, %d slots of %.2f MB",
            manager.cut.rank,
            len(manager.cut.sites),
            manager.lora_slots,
            self._spill.size / 1e6,
        )
        return made

    # -- never raising -----------------------------------------------------------------------------

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        number, path = lora_request.lora_int_id, lora_request.lora_path
        manager = self._adapter_manager
        try:
            there = manager.get_adapter(number) is not None
            if not there or self._paths.get(number, path) != path:
                self._load(number, path)
            else:
                manager._registered_adapters.touch(number)
            manager.activate_adapter(number)
        except Exception as error:  # whatever it was: see above
            self._quarantine(number, path, error)
            return False
        self._paths[number] = path
        self._quarantined.pop(number, None)
        return True

    def _load(self, number: int, path: str) -> None:
        manager = self._adapter_manager
        if (row := self._spill.get(path)) is None:
            whole, layout = read_row(self._folder, path)
            row = manager.cut.local(whole.to(manager.dtype), layout)
            self._spill.put(path, row)
        manager.remove_adapter(number)
        while len(manager) + 1 > manager.capacity:
            oldest = next(iter(manager._registered_adapters.order))
            self._paths.pop(oldest, None)
            manager.remove_oldest_adapter()
        manager.add_adapter(_model(number, row))

    def _quarantine(self, number: int, path: str, error: Exception) -> None:
        if number not in self._quarantined:
            logger.error("kilotune: adapter %d (%s) is quarantined: %s", number, path[-80:], first_line(error))
        self._quarantined[number] = path
        while len(self._quarantined) > QUARANTINED:
            self._quarantined.pop(next(iter(self._quarantined)))
        run.lose(path)

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        manager = self._adapter_manager
        missing = []
        for request in lora_requests:
            number = request.lora_int_id
            if number in manager._active_adapters and self._paths.get(number, request.lora_path) == request.lora_path:
                manager._active_adapters.touch(number)  # before anything is put out of its slot
                manager._registered_adapters.touch(number)
            else:
                missing.append(request)
        for request in missing[: max(0, manager.lora_slots - (len(lora_requests) - len(missing)))]:
            self.add_adapter(request)

    def remove_adapter(self, adapter_id: int) -> bool:
        self._paths.pop(adapter_id, None)
        return bool(self._adapter_manager.remove_adapter(adapter_id))

    def remove_all_adapters(self) -> None:
        self._paths.clear()
        self._adapter_manager.remove_all_adapters()

    def pin_adapter(self, adapter_id: int) -> bool:
        try:
            return bool(self._adapter_manager.pin_adapter(adapter_id))
        except Exception as error:  # not registered
            logger.warning("kilotune: adapter %d cannot be pinned: %s", adapter_id, first_line(error))
            return False
