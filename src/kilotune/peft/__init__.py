"""PEFT's names, paths and shapes over kilotune: ``import kilotune.peft as peft`` runs a script written for PEFT.

A name that is not here raises an ImportError that says what to use. Nothing in kilotune imports this; it translates at
the edge: configurations become ours (config.py), our layers show themselves as PEFT's (layer_shape.py).
"""

from __future__ import annotations

import sys
from opcode import opmap
from types import FrameType
from typing import Any

from .._lazy import lazy
from .vocabulary import HOMES, PEFT, advice

__version__ = PEFT
__all__ = [name for names in HOMES.values() for name in names]

_find, __dir__ = lazy(__name__, HOMES)


def __getattr__(name: str) -> Any:
    try:
        return _find(name)
    except AttributeError:
        if name.startswith("__"):
            raise
        error = ImportError if _imports(sys._getframe(1)) else AttributeError
        raise error(advice(name), name=name) from None


def _imports(frame: FrameType) -> bool:
    """Whether the code there is at ``from kilotune.peft import ...``, whose own error would not say what to use."""
    return frame.f_code.co_code[frame.f_lasti] == opmap["IMPORT_FROM"]
