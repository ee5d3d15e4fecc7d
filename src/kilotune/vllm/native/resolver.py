"""How vLLM's server finds an adapter by the name in a request: our store, and nothing that is not validated."""

from __future__ import annotations

import asyncio
import threading
from typing import final

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from ...errors import AdapterError
from ..adapter_source import shared

__all__ = ["NAME", "StoreResolver", "adapter_request", "register_resolver"]

NAME = "kilotune"


@final
class StoreResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is untyped here
    """The server ignores whether a worker could load what we give it, so all is checked before."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        found = await asyncio.to_thread(shared().find, lora_name)
        # The server gives it a number of its own.
        return None if found is None else LoRARequest(lora_name=found.name, lora_int_id=1, lora_path=found.path)


def register_resolver() -> None:
    """Add it to those that the server asks, once."""
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, StoreResolver())


_numbers: dict[str, int] = {}
_lock = threading.Lock()


def adapter_request(model: str) -> LoRARequest:
    """What ``LLM.generate(..., lora_request=...)`` takes, for an adapter of the engine's store.

    Args:
        model: as in a request to the server: ``ann``, ``ann@3``, ``ann@live``.

    Raises:
        AdapterError: there is none, or the plugin is not active. CheckpointError, UnsupportedError: it cannot be
            served.

    """
    source = shared()
    if source.served() is None:
        raise AdapterError(
            "the plugin is not active in the workers: pass additional_config={'kilotune': {...}} to vLLM"
        )
    if (found := source.find(model)) is None:
        raise AdapterError(f"the store has no adapter {model!r}, or that is no name of one")
    with _lock:
        number = _numbers.setdefault(found.name, len(_numbers) + 1)
    return LoRARequest(lora_name=found.name, lora_int_id=number, lora_path=found.path)
