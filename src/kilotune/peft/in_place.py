"""``import peft`` gives kilotune.peft: for scripts whose imports stay as they are, and for libraries that ask for PEFT.

::

    import kilotune.peft
    kilotune.peft.install()      # first of all
    from peft import LoraConfig  # ours
    from transformers import Trainer  # takes our models for PEFT's, and saves their adapters
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import final

from ..errors import UnsupportedError

__all__ = ["install", "installed"]

PEFT = "peft"
OURS = "kilotune.peft"
# What looks for PEFT once, when it is imported.
ASKED_ALREADY = ("transformers.trainer_utils", "trl", "diffusers")


def installed() -> bool:
    """Whether ``import peft`` gives kilotune.peft here."""
    return sys.modules.get(PEFT) is sys.modules[OURS]


def install() -> None:
    """Let ``import peft`` give kilotune.peft in this process, whether PEFT is installed or not; once is enough.

    Raises:
        UnsupportedError: PEFT has been imported already, or a library that has looked for it.

    """
    if installed():
        return
    early = [name for name in (PEFT, *ASKED_ALREADY) if name in sys.modules]
    if early:
        raise UnsupportedError(f"kilotune.peft.install(): {early[0]!r} is imported already; call it before all others")
    sys.modules[PEFT] = sys.modules[OURS]
    sys.meta_path.insert(0, _Finder())


@final
class _Finder(MetaPathFinder):
    """Finds ``peft.x.y`` where ``kilotune.peft.x.y`` is."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{PEFT}."):
            return None
        return ModuleSpec(fullname, _Loader())


@final
class _Loader(Loader):
    """Puts the module of ours in the place of a new one."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.removeprefix(PEFT)
        try:
            sys.modules[module.__name__] = importlib.import_module(f"{OURS}{name}")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"kilotune.peft has no module {module.__name__!r}", name=module.__name__
            ) from error
