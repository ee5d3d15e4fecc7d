"""The entry point of vLLM's group ``vllm.general_plugins``, and the version guard.

vLLM calls :func:`register` in every process, some more than once. It names the engine's folder, registers the
resolver, and puts a factory in the place of one internal name of vLLM, which gives our manager where
``additional_config`` asks for it and vLLM's own everywhere else. An unknown version is left alone until somebody asks.
"""

from __future__ import annotations

import atexit
import importlib
import re
from typing import Any, Final

from ..errors import UnsupportedError
from . import worker_status as run
from .settings import KEY

__all__ = ["TESTED", "active", "register", "version_fault"]

TESTED: Final = ("0.32",)  # the internal names below were read and run with these, and with no others
MODULE: Final = "vllm.v1.worker.lora_model_runner_mixin"
NAME: Final = "LRUCacheWorkerLoRAManager"
MARK: Final = "kilotune_factory"


def version_fault(version: str) -> str | None:
    """Why this version of vLLM is refused, or None."""
    if re.match(r"(\d+\.\d+)(\.|$)", version) and ".".join(version.split(".")[:2]) in TESTED:
        return None
    return (
        f"vLLM {version} is installed, and kilotune's plugin is tested with {', '.join(TESTED)} only: it replaces an "
        "internal name, which may mean something else there. Install vllm==0.32.*, or export the adapters to LoRA"
    )


def register() -> None:
    """What vLLM calls; does nothing the second time in a process."""
    import vllm

    if run.inherit():
        atexit.register(run.clear)
    module = importlib.import_module(MODULE)
    stock = getattr(module, NAME, None)
    if getattr(stock, MARK, False):
        return
    setattr(module, NAME, _factory(stock, str(vllm.__version__)))
    if version_fault(str(vllm.__version__)) is None:
        from .native.resolver import register_resolver

        register_resolver()


def active() -> bool:
    """Whether the hook is in its place in this process."""
    return bool(getattr(getattr(importlib.import_module(MODULE), NAME, None), MARK, False))


def _factory(stock: Any, version: str) -> Any:
    """What stands in the place of vLLM's class: called as it, gives its kind of object."""

    def manager(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        asked = vllm_config.additional_config
        if not (isinstance(asked, dict) and KEY in asked):
            return stock(vllm_config, *args, **kwargs)
        if fault := version_fault(version):
            raise UnsupportedError(fault)
        from .native.manager import VeraWorkerManager

        return VeraWorkerManager(vllm_config, *args, **kwargs)

    setattr(manager, MARK, True)
    return manager
